"""VOC folders in Detectron2's catalogs, loaders and evaluators."""

import copy
import itertools
import random
import shutil
import signal

import numpy as np
import pycocotools.mask
import pytest
import torch

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from nst_det.detection.data import SampleIndex
from nst_det.detectron2 import DistillTrainer, VocEvaluator, register_voc
from nst_det.detectron2 import evaluator as room
from nst_det.detectron2.data import ImageMapper, SeededImages, build_train_loader
from nst_det.engine.io import read_json
from nst_det.errors import UserError
from nst_det.evaluation.io import detections_from_json
from tests.helpers.loaders import assert_takes_few_files


def test_a_root_becomes_dataset_dicts(voc_root):
    data = register_voc("some_voc", voc_root, "test", use_difficult=False)
    dicts = DatasetCatalog.get("some_voc")
    assert [item["image_id"] for item in dicts] == list(data.ids)
    assert MetadataCatalog.get("some_voc").thing_classes == ["bar", "square"]
    # one object of i09 is difficult
    assert [len(item["annotations"]) for item in dicts] == [2, 1, 2, 2]
    first = dicts[0]["annotations"][0]
    assert first["bbox_mode"] == BoxMode.XYXY_ABS
    assert first["bbox"] == data.annotation(data.ids[0]).boxes[0].tolist()
    # the same name again is another folder or split, not an error
    assert register_voc("some_voc", voc_root, "train").split == "train"
    assert len(DatasetCatalog.get("some_voc")) == 8


def test_augmentation_depends_on_seed_step_and_place_alone():
    def mapper(item):
        return item["value"], random.random(), np.random.rand()

    images = SeededImages([{"value": 0}, {"value": 1}], mapper, seed=5)
    first = images[SampleIndex(0, 7, 1)]
    random.seed(99)
    np.random.seed(99)
    state = random.getstate(), np.random.get_state()[1].copy()
    assert images[SampleIndex(0, 7, 1)] == first
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()
    assert images[SampleIndex(1, 7, 1)][1:] == first[1:]
    assert images[SampleIndex(0, 8, 1)][1:] != first[1:]
    assert images[SampleIndex(0, 7, 0)][1:] != first[1:]
    assert SeededImages([{"value": 0}], mapper, seed=6)[SampleIndex(0, 7, 1)][1:] != first[1:]


def plain(value):
    """Everything in a batch as lists and dicts."""
    if isinstance(value, Instances):
        fields = {"gt_boxes": value.gt_boxes.tensor, "gt_classes": value.gt_classes}
        assert set(value.get_fields()) == set(fields)
        return plain({"size": value.image_size, **fields})
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("preset", ["none", "voc"])
def test_cached_images_are_mapped_as_detectron2_maps_them(configured, preset):
    cfg = configured("INPUT.AUGMENTATION", preset)
    theirs, ours = (DatasetMapper if preset == "none" else ImageMapper)(cfg, True), ImageMapper(cfg, cached=True)
    for item, seed in itertools.product(DatasetCatalog.get("tiny_train")[:3], range(3)):
        np.random.seed(seed)
        wanted = plain(theirs(item))
        np.random.seed(seed)
        assert plain(ours(item)) == wanted


def test_workers_give_the_same_batches_and_ask_no_gpu_for_anything(configured, cuda_in_use):
    found = []
    for workers in (0, 2):
        words = ["DATALOADER.NUM_WORKERS", workers, "MODEL.DEVICE", "cpu", "INPUT.AUGMENTATION", "strong"]
        cfg = configured(*words)
        train = build_train_loader(cfg)
        train.batch_sampler.start = 3
        found.append([plain(batch) for batch in itertools.islice(train, 6)])
        assert [plain(batch) for batch in itertools.islice(train, 6)] == found[-1]
        found[-1] += [plain(batch) for batch in DistillTrainer.build_test_loader(cfg, "tiny_test")]
    assert found[0] == found[1]
    assert len(found[0]) == 6 + 4


def test_masks_are_changed_with_their_boxes(configured):
    # without CROP Detectron2 makes no boxes of the masks
    cfg = configured("INPUT.AUGMENTATION", "strong", "MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", "bitmask")
    item = copy.deepcopy(DatasetCatalog.get("tiny_train")[0])
    for one in item["annotations"]:
        x0, y0, x1, y1 = map(round, one["bbox"])
        mask = np.zeros((item["height"], item["width"]), np.uint8, order="F")
        mask[y0:y1, x0:x1] = 1
        one["segmentation"] = pycocotools.mask.encode(mask)
    mapper, shown = ImageMapper(cfg), set()
    for seed in range(20):
        np.random.seed(seed)
        found = mapper(item)["instances"]
        masks, boxes = found.gt_masks.get_bounding_boxes().tensor, found.gt_boxes.tensor
        assert torch.allclose(masks, boxes, atol=1.01)
        assert len(boxes) > 0
        shown.add((found.image_size, len(boxes)))
    assert len(shown) > 10


def test_a_preset_that_another_reader_left_without_its_keys(configured):
    cfg = configured()
    cfg.defrost()
    cfg.INPUT.AUGMENTATION = "voc"
    with pytest.raises(UserError, match=r"INPUT\.AUGMENTATION voc"):
        ImageMapper(cfg)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_evaluation_too(configured, voc_root, tiny_yaml, tmp_path, workers):
    shutil.copytree(voc_root, tmp_path / "voc")
    (tmp_path / "c.yaml").write_text(tiny_yaml.read_text().replace(str(voc_root), str(tmp_path / "voc")))
    path = tmp_path / "voc" / "JPEGImages" / "i08.jpg"
    path.write_bytes(path.read_bytes()[:300])
    cfg = configured("DATALOADER.NUM_WORKERS", workers, file=tmp_path / "c.yaml")
    with pytest.raises(UserError, match=f"^{path}: ") as caught:
        list(DistillTrainer.build_test_loader(cfg, "tiny_test"))
    assert "Traceback" not in str(caught.value)


LOADERS = """
import sys
from nst_det.detectron2.config import load_config, register_datasets
from nst_det.detectron2.data import SeededImages as Images, build_train_loader
from nst_det.detectron2.trainer import DistillTrainer
cfg = load_config(sys.argv[1], sys.argv[2:])
register_datasets(cfg)
loaders = [build_train_loader(cfg)]
"""
# Detectron2's own as well
ALL = """
loaders.append(DistillTrainer.build_test_loader(cfg, "tiny_test"))
for grouping in (True, False):
    unseeded = cfg.clone()
    unseeded.defrost()
    unseeded.SEED, unseeded.DATALOADER.ASPECT_RATIO_GROUPING = -1, grouping
    loaders.append(build_train_loader(unseeded))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_training_however_that_ends(tiny_yaml, signum, left_behind):
    words = ["DATALOADER.NUM_WORKERS", 3, "SOLVER.IMS_PER_BATCH", 32]
    assert left_behind(LOADERS + ALL, signum, tiny_yaml, *words) == []


@pytest.mark.slow
def test_batches_that_wait_take_few_files(tiny_yaml):
    words = ["DATALOADER.NUM_WORKERS", 12, "SOLVER.IMS_PER_BATCH", 16, "INPUT.MIN_SIZE_TRAIN", "[32]"]
    assert_takes_few_files(LOADERS, tiny_yaml, *words)


def instances(boxes, scores, labels):
    found = Instances((100, 100))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(labels, dtype=torch.int64)
    return {"instances": found}


def noisy(data, seed):
    """Detections near the objects and elsewhere, whose scores and boxes Detectron2's rounding leaves as they are."""
    draw = np.random.default_rng(seed)
    for annotation in data.annotations():
        boxes = [draw.uniform((0, 0, 50, 50), (40, 40, 90, 90)) for _ in range(3)]
        labels = draw.integers(0, len(data.classes), 3).tolist()
        for box, label in zip(annotation.boxes, data.labels(annotation)):
            for spread in (1, 4, 8):
                boxes.append(box + draw.normal(0, spread, 4))
                labels.append(int(label))
        scores = draw.permutation(np.arange(1, 1000))[: len(boxes)] / 1000
        yield annotation.id, np.round(boxes, 1), scores, labels


def test_ap_agrees_with_detectron2s_evaluator(voc_root, tmp_path):
    data = register_voc("agreed_voc", voc_root, "test", ("bar", "square"))
    MetadataCatalog.get("agreed_voc").set(year=2007)
    theirs, ours = PascalVOCDetectionEvaluator("agreed_voc"), VocEvaluator("agreed_voc", tmp_path)
    theirs.reset()
    ours.reset()
    for id_, boxes, scores, labels in noisy(data, 0):
        for evaluator in (theirs, ours):
            evaluator.process([{"image_id": id_}], [instances(boxes, scores, labels)])
    wanted, found = theirs.evaluate()["bbox"], ours.evaluate()
    for name in ("AP", "AP50", "AP75"):
        assert found["voc"][name] == pytest.approx(wanted[name], abs=1e-4)
    assert 5 < found["voc"]["AP"] < found["voc"]["AP50"] < 100
    assert found["bbox"]["AP50"] > found["bbox"]["AP75"]
    written = read_json(tmp_path / "result.json")
    assert 100 * written["map"] == pytest.approx(found["voc"]["AP50"])
    assert 100 * written["per_class"]["bar"] == pytest.approx(found["voc"]["AP50-bar"])
    records = detections_from_json(read_json(tmp_path / "detections.json"), data.ids, data.classes, "detections.json")
    assert len(records) == sum(len(scores) for _, _, scores, _ in noisy(data, 0))


def test_detections_are_gathered_and_an_image_counts_once(voc_root, monkeypatch):
    data = register_voc("gathered_voc", voc_root, "test")
    whole, first, second = (VocEvaluator("gathered_voc", coco=False) for _ in range(3))
    for index, (id_, *found) in enumerate(noisy(data, 1)):
        given = [{"image_id": id_}], [instances(*found)]
        # the first image in both
        for evaluator in (whole, first if index % 2 else second, *([first] if index == 0 else [])):
            evaluator.process(*given)
    alone, gather = whole.evaluate(), []
    monkeypatch.setattr(room.comm, "gather", lambda mine: gather.append(mine) or gather)
    monkeypatch.setattr(room.comm, "is_main_process", lambda: False)
    assert second.evaluate() is None
    monkeypatch.setattr(room.comm, "is_main_process", lambda: True)
    assert first.evaluate() == alone
