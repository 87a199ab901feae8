"""One YAML and one set of weights on both engines: the same losses, gradients, features and detections."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from nst_det.detection.checkpoint import save_weights
from nst_det.detection.config import load_detect_config, resolve_classes
from nst_det.detection.data import evaluation_batches
from nst_det.detection.pipeline import detect, score, train_detector
from nst_det.detection.torchvision import build_detector
from nst_det.detection.torchvision.roi_heads import Instances
from nst_det.detectron2 import DistillTrainer
from nst_det.detectron2.config import load_config, register_datasets
from nst_det.detectron2.parity import Parity, compare, load_engines, match
from nst_det.engine.config import flat
from nst_det.engine.io import read_json

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "detect"
CONFIGS = sorted(path for name in ("voc", "quick", "c4") for path in (FOLDER / name).glob("*.yaml"))
QUICK = str(FOLDER / "quick" / "bccd_base.yaml")
EXHAUSTIVE = [
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "1000000", "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1000000", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_detectron2_reads_the_same_values(path):
    ours, theirs = (
        flat(load_detect_config(path, ["ENGINE", "torchvision"])),
        flat(load_config(path, ["ENGINE", "torchvision"])),
    )
    # Detectron2 writes events unless it is told not to; its config is one of this machine at once
    named = {"MODEL.ROI_HEADS.NAME", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "TENSORBOARD"}
    for key, value in ours.items():
        if key not in named:
            mine, other = (list(item) if isinstance(item, tuple) else item for item in (value, theirs[key]))
            assert mine == other, key


def both(yaml, *opts):
    """Detectron2's detector and ours, with the same weights, and Detectron2's config."""
    theirs = load_config(yaml, opts)
    register_datasets(theirs)
    ours = load_detect_config(yaml, [*opts, "ENGINE", "torchvision"])
    resolve_classes(ours, MetadataCatalog.get(theirs.DATASETS.TRAIN[0]).thing_classes)
    torch.manual_seed(0)
    model, detector = build_model(theirs), build_detector(ours)
    # random normalization, and heads that are sure of something, so that every part is at work
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif "objectness" in name or "cls_score" in name:
                value.mul_(20)
    detector.load_state_dict(model.state_dict(), strict=True)
    return model, detector, theirs


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["INPUT.FORMAT", "BGR", "MODEL.RPN.SMOOTH_L1_BETA", "0.1", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "0.5"],
        [
            *("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.OUT_FEATURES", "['res4']"),
            *("MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"),
            *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32]]"),
        ],
    ],
    ids=["fpn", "bgr and smooth L1", "without fpn"],
)
def test_one_training_step_has_the_same_losses_and_gradients(tiny_yaml, opts):
    model, detector, cfg = both(tiny_yaml, *EXHAUSTIVE, *opts)
    batch = [DatasetMapper(cfg, True)(item) for item in DatasetCatalog.get("tiny_train")[:3]]
    with EventStorage():
        wanted = model.train()(batch)
    given = [
        {"image": item["image"], "boxes": item["instances"].gt_boxes.tensor, "labels": item["instances"].gt_classes}
        for item in batch
    ]
    found = detector.train()(given)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(value.detach()) > 0
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=0)
    sum(wanted.values()).backward()
    sum(found.values()).backward()
    theirs, ours = dict(model.named_parameters()), dict(detector.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, parameter in theirs.items():
        if name.startswith("backbone."):
            difference = float((ours[name].grad - parameter.grad).norm() / parameter.grad.norm())
            assert difference <= 1e-3, f"{name}: {difference}"


def test_what_parity_counts():
    def count(theirs, ours):
        found = Parity()
        match(found, Instances(*theirs), Instances(*ours), threshold=0.1)
        return found

    boxes, scores, labels = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20]]), torch.tensor([0.9, 0.5]), torch.arange(2)
    same = count((boxes, scores, labels), (boxes.flip(0), scores.flip(0), labels.flip(0)))
    assert (same.unmatched, same.box, same.score, same.detections) == (0, 0.0, 0.0, 2)
    assert same.passed
    moved = count((boxes, scores, labels), (boxes + 0.04, scores + 0.002, labels))
    assert moved.box == pytest.approx(0.04, abs=1e-5)
    assert not moved.passed
    assert count((boxes, scores, labels), (boxes, scores, 1 - labels)).unmatched == 4
    # one at the threshold may be on one engine alone
    assert count((boxes[:1], torch.tensor([0.1004]), labels[:1]), (boxes[:0], scores[:0], labels[:0])).passed


@pytest.fixture(scope="module")
def trained(real_data, tmp_path_factory):
    """A detector trained by Detectron2 for a few steps on blood cells: its config's options and weights."""
    folder = tmp_path_factory.mktemp("trained")
    roots = [f"DATASETS.VOC.bccd_{split}.ROOT" for split in ("trainval", "test")]
    opts = [word for key in roots for word in (key, str(real_data / "bccd"))]
    torch.set_num_threads(1)
    cfg = load_config(QUICK, [*opts, "SOLVER.MAX_ITER", "45", "OUTPUT_DIR", str(folder), "DATASETS.TEST", "[]"])
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return opts, str(folder / "model_final.pth")


@pytest.mark.real_data
def test_the_same_features_and_detections_on_real_images(trained, real_data, cli, capsys):
    opts, weights = trained
    images = [str(path) for path in sorted((real_data / "bccd" / "JPEGImages").glob("*.jpg"))[:20]]
    found = compare(load_engines(QUICK, weights, opts), images)
    assert found.images == 20
    assert found.pixels == 0
    assert set(found.features) == {"p2", "p3", "p4", "p5", "p6"}
    assert max(found.features.values()) <= 1e-4
    assert found.detections > 100
    assert (found.unmatched, found.passed) == (0, True)
    assert found.box <= 0.05
    assert found.score <= 1e-3
    words = ["--config-file", QUICK, "--weights", weights, "--image", *images[:2], "--opts", *opts]
    assert cli("parity", *words) == 0
    assert "the same detector" in capsys.readouterr().out


@pytest.mark.real_data
def test_the_same_map_on_real_images(trained, tmp_path):
    opts, weights = trained
    cfg = load_config(QUICK, [*opts, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path)])
    register_datasets(cfg)
    engines = load_engines(QUICK, weights, opts)
    theirs = DistillTrainer.test(cfg, engines.detectron2)
    data = MetadataCatalog.get("bccd_test").voc
    alone = load_detect_config(QUICK, [*opts, "DATALOADER.NUM_WORKERS", "0"])
    ours = score(detect(engines.torchvision, evaluation_batches(alone, data), data), data)
    assert ours["map"] > 0.05
    assert theirs["voc"]["AP50"] == pytest.approx(100 * ours["map"], abs=1e-2)
    assert read_json(tmp_path / "inference" / "result.json")["coco"]["AP"] == pytest.approx(
        ours["coco"]["AP"], abs=1e-4
    )


def test_each_engine_reads_the_others_weights(tiny_yaml, tmp_path):
    engine = ["ENGINE", "torchvision"]
    opts = [*engine, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", str(tmp_path / "ours")]
    assert math.isfinite(train_detector(load_detect_config(tiny_yaml, opts))["map"])
    engines = load_engines(tiny_yaml, str(tmp_path / "ours" / "model.safetensors"), engine)
    state = engines.detectron2.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in engines.torchvision.state_dict().items())
    torch.save({"model": state, "iteration": 5}, tmp_path / "theirs.pth")
    again = load_engines(tiny_yaml, str(tmp_path / "theirs.pth"), engine)
    assert torch.equal(again.torchvision.state_dict()["backbone.fpn_output2.bias"], state["backbone.fpn_output2.bias"])
    save_weights(tmp_path / "again.safetensors", again.torchvision, ["bar", "square"])
    load_engines(tiny_yaml, str(tmp_path / "again.safetensors"), engine)
