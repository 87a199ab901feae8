"""A run on the Detectron2 engine that keeps a part of its training images to validate on."""

import json

import pytest

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

import torch  # noqa: E402
from detectron2.data import DatasetCatalog  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from nst_det.data.splits import hold_out  # noqa: E402
from nst_det.data.voc import VocDataset  # noqa: E402
from nst_det.detectron2 import trainer  # noqa: E402
from nst_det.detectron2.config import VALIDATION, load_config, register_datasets  # noqa: E402
from nst_det.detectron2.train_net import train  # noqa: E402
from nst_det.engine.metrics import read_metrics  # noqa: E402
from nst_det.engine.run_dir import RunFolder  # noqa: E402
from nst_det.errors import UserError  # noqa: E402


def test_a_run_validates_on_the_images_that_were_kept_and_tests_at_the_end(tiny_yaml, voc_root, tmp_path):
    opts = ["DATASETS.VAL_FRACTION", "0.25", "TEST.EVAL_PERIOD", "3", "OUTPUT_DIR", str(tmp_path / "run")]
    cfg = load_config(tiny_yaml, opts)
    register_datasets(cfg)
    # the very images that the torchvision engine keeps
    left, kept = hold_out(VocDataset(voc_root, "train"), 0.25)
    assert [item["image_id"] for item in DatasetCatalog.get("tiny_train")] == list(left.ids)
    assert [item["image_id"] for item in DatasetCatalog.get(VALIDATION)] == list(kept.ids)
    folder = RunFolder(cfg.OUTPUT_DIR)
    with folder.opened(cfg):
        train(cfg, folder, resume=False)
    result = folder.result()
    assert 0 <= result["validation"]["map"] <= 1
    assert 0 <= result["map"] <= 1
    checkpoints = result["checkpoints"]
    assert checkpoints["last"] == {"step": 6, **{name: result["validation"][name] for name in ("map", "map_area")}}
    assert checkpoints["best"]["map"] >= checkpoints["last"]["map"]
    rows = {row["step"]: row for row in read_metrics(folder.metrics_path)}
    assert max(rows[2]["val/map"], checkpoints["last"]["map"]) == checkpoints["best"]["map"]
    found = json.loads((tmp_path / "run" / VALIDATION / "inference" / "detections.json").read_text())
    assert {item["image_id"] for item in found} <= set(kept.ids)


def test_the_best_weights_are_tested_and_kept(tiny_yaml, tmp_path, monkeypatch):
    said = iter([{"map": 0.5, "map_area": 0.5}, {"map": 0.25, "map_area": 0.25}])
    read = trainer.read_json
    monkeypatch.setattr(trainer, "read_json", lambda path: next(said) if VALIDATION in str(path) else read(path))
    opts = ["DATASETS.VAL_FRACTION", "0.25", "TEST.EVAL_PERIOD", "3", "TEST.SELECT", "best"]
    cfg = load_config(tiny_yaml, [*opts, "OUTPUT_DIR", str(tmp_path / "run")])
    register_datasets(cfg)
    folder = RunFolder(cfg.OUTPUT_DIR)
    with folder.opened(cfg):
        train(cfg, folder, resume=False)
    best, kept = (load_file(tmp_path / "run" / name) for name in ("model_best.safetensors", "model.safetensors"))
    last = torch.load(tmp_path / "run" / "model_final.pth")["model"]
    assert all(torch.equal(best[name], kept[name]) for name in best)
    assert not all(torch.equal(best[name], last[name]) for name in best)
    assert folder.result()["checkpoints"]["best"] == {"step": 3, "map": 0.5, "map_area": 0.5}
    assert folder.result()["checkpoints"]["tested"] == "best"


def test_data_that_cannot_be_cut_is_named(tiny_yaml):
    cfg = load_config(tiny_yaml, ["DATASETS.VAL_FRACTION", "0.25", "DATASETS.TRAIN", "[tiny_test]"])
    with pytest.raises(UserError, match=r"DATASETS\.VAL_FRACTION: tiny_test is in DATASETS\.TEST too"):
        register_datasets(cfg)
