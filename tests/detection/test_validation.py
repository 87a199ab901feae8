import json

import pytest
import torch
from safetensors.torch import load_file

from nst_det.data.splits import hold_out
from nst_det.data.voc import VocDataset
from nst_det.detection import data as dataset
from nst_det.detection import pipeline as evaluation
from nst_det.detection import pipeline as stage
from nst_det.detection.data import split_training
from nst_det.engine.metrics import read_metrics


@pytest.fixture
def config(small, shapes, tmp_path):
    voc = {"train": {"ROOT": str(shapes), "SPLIT": "trainval"}, "test": {"ROOT": str(shapes), "SPLIT": "test"}}

    def make(**changes):
        return small(
            {
                "MODEL.ROI_HEADS.NUM_CLASSES": 0,
                "DATASETS.VOC": voc,
                "DATASETS.TRAIN": ["train"],
                "DATASETS.TEST": [],
                "DATASETS.VAL_FRACTION": 0.25,
                "SOLVER.MAX_ITER": 4,
                "TEST.EVAL_PERIOD": 2,
                "OUTPUT_DIR": str(tmp_path / "run"),
            }
            | {key.replace("__", "."): value for key, value in changes.items()}
        )

    return make


def test_a_run_trains_on_the_rest_and_validates_on_what_was_kept(config, shapes, tmp_path, monkeypatch):
    data = VocDataset(shapes, "trainval")
    left, kept = hold_out(data, 0.25)
    trained, evaluated, opened = set(), [], []
    listed, found = dataset.list_items, evaluation.detect

    def list_items(sets, *rest):
        items = listed(sets, *rest)
        trained.update(item.id for item in items)
        return items

    def detect(detector, batches, over):
        evaluated.append([a.id for a in over.annotations()])
        return found(detector, batches, over)

    class Opened(VocDataset):
        def __init__(self, root, split, classes=None):
            opened.append(split)
            super().__init__(root, split, classes)

    monkeypatch.setattr(dataset, "list_items", list_items)
    monkeypatch.setattr(dataset, "VocDataset", Opened)
    monkeypatch.setattr(stage, "detect", detect)
    result = stage.train_detector(config())
    assert trained
    assert trained <= set(left.ids)
    # once in the middle and once at the end
    assert evaluated == [list(kept.ids)] * 2
    assert set(opened) == {"trainval"}
    assert 0 <= result["validation"]["map"] <= 1
    assert "map" not in result
    assert json.loads((tmp_path / "run" / "result.json").read_text())["validation"] == result["validation"]


def test_test_data_is_evaluated_at_the_end_only(config, shapes, monkeypatch):
    evaluated = []

    def detect(detector, batches, over):
        evaluated.append(tuple(a.id for a in over.annotations()))
        return found(detector, batches, over)

    found = evaluation.detect
    monkeypatch.setattr(stage, "detect", detect)
    result = stage.train_detector(config(DATASETS__TEST=["test"], TEST__EVAL_PERIOD=3))
    kept = hold_out(VocDataset(shapes, "trainval"), 0.25)[1].ids
    assert evaluated == [kept, kept, VocDataset(shapes, "test").ids]
    assert "map" in result
    assert "map" in result["validation"]


@pytest.mark.parametrize(("select", "maps"), [("best", (0.5, 0.25)), ("last", (0.5, 0.25)), ("best", (0.25, 0.5))])
def test_the_best_checkpoint_is_chosen_without_the_test_split(config, shapes, tmp_path, monkeypatch, select, maps):
    seen, tested = [], []
    said = iter([*maps, 0.125])

    def score(found, over):
        seen.append(tuple(a.id for a in over.annotations()))
        return {"map": next(said), "map_area": 0.0}

    def detect(detector, batches, over):
        tested.append({name: value.clone() for name, value in detector.state_dict().items()})
        return []

    monkeypatch.setattr(stage, "score", score)
    monkeypatch.setattr(stage, "detect", detect)
    monkeypatch.setattr(stage, "write_detections", lambda path, found: None)
    result = stage.train_detector(config(DATASETS__TEST=["test"], TEST__SELECT=select))
    middle, last, chosen = tested
    best = middle if maps[0] > maps[1] else last
    assert not torch.equal(middle["backbone.fpn_output2.weight"], last["backbone.fpn_output2.weight"])
    # the test split is looked at once, by the chosen weights, which are those that are kept
    assert seen.count(VocDataset(shapes, "test").ids) == 1
    assert seen[-1] == VocDataset(shapes, "test").ids
    kept = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in (best if select == "best" else last).items():
        assert torch.equal(chosen[name], value)
        assert torch.equal(kept[name], value)
    saved = load_file(tmp_path / "run" / "model_best.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in best.items())
    assert result["checkpoints"] == {
        "best": {"step": 2 if best is middle else 4, "map": max(maps), "map_area": 0.0},
        "last": {"step": 4, "map": maps[1], "map_area": 0.0},
        "tested": select,
    }
    assert result["map"] == 0.125
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[1]
    assert row["val/map"] == maps[0]
    assert "map" not in row


def test_without_a_share_nothing_is_cut(config, shapes):
    whole = VocDataset(shapes, "trainval")
    assert split_training(config(DATASETS__VAL_FRACTION=0.0), [whole]) == ([whole], None)
