import numpy as np
import pytest
import torch

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.evaluation import PascalVOCDetectionEvaluator  # noqa: E402
from detectron2.structures import Boxes, BoxMode, Instances  # noqa: E402

from nst_det.detectron2 import VocEvaluator, register_voc  # noqa: E402
from nst_det.detectron2 import evaluator as room  # noqa: E402
from nst_det.detectron2.data import ImageMapper  # noqa: E402
from nst_det.engine.io import read_json  # noqa: E402
from nst_det.evaluation.io import detections_from_json  # noqa: E402


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


def test_it_agrees_with_detectron2s_evaluator(voc_root, tmp_path):
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


def test_it_gathers_over_processes_and_counts_an_image_once(voc_root, monkeypatch):
    data = register_voc("gathered_voc", voc_root, "test")
    whole, first, second = (VocEvaluator("gathered_voc", coco=False) for _ in range(3))
    for evaluator in (whole, first, second):
        evaluator.reset()
    for index, (id_, boxes, scores, labels) in enumerate(noisy(data, 1)):
        given = [{"image_id": id_}], [instances(boxes, scores, labels)]
        whole.process(*given)
        (first if index % 2 else second).process(*given)
        if index == 0:
            first.process(*given)
    alone = whole.evaluate()
    monkeypatch.setattr(room.comm, "gather", lambda mine: [mine, second._found])
    assert first.evaluate() == alone
    monkeypatch.setattr(room.comm, "is_main_process", lambda: False)
    assert first.evaluate() is None


def test_cached_images_are_mapped_as_detectron2_maps_them(voc_root, tiny_yaml):
    from detectron2.data import DatasetMapper

    from nst_det.detectron2.config import load_config, register_datasets

    cfg = load_config(tiny_yaml)
    register_datasets(cfg)
    theirs, ours = DatasetMapper(cfg, True), ImageMapper(cfg, cached=True)
    for item in DatasetCatalog.get("tiny_train")[:3]:
        for seed in range(3):
            np.random.seed(seed)
            wanted = theirs(item)
            np.random.seed(seed)
            got = ours(item)
            assert torch.equal(got["image"], wanted["image"])
            assert torch.equal(got["instances"].gt_boxes.tensor, wanted["instances"].gt_boxes.tensor)
            assert got.keys() == wanted.keys()
