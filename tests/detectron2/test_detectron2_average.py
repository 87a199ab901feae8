"""Which weights are evaluated and written: averages of SOLVER.EMA_DECAY, and those that a validation split chose."""

import pytest
import torch

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from detectron2.data import DatasetCatalog
from safetensors.torch import load_file

from nst_det.data.splits import hold_out
from nst_det.data.voc import VocDataset
from nst_det.detectron2 import DistillTrainer, trainer
from nst_det.detectron2.config import VALIDATION, validation_config
from nst_det.detectron2.train_net import train as train_net
from nst_det.engine.config import plain
from nst_det.engine.io import read_json
from nst_det.engine.metrics import read_metrics
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.evaluation.thresholds import read_thresholds

# reached at the fourth of six steps
DECAY = 0.6
AVERAGED = ["SOLVER.EMA_DECAY", DECAY]
VALIDATED = ["DATASETS.VAL_FRACTION", 0.25, "TEST.EVAL_PERIOD", 3]


@pytest.fixture
def trained(monkeypatch):
    """Step -> the weights in training after it, where the optimizer made it."""
    states, run_step = {}, DistillTrainer.run_step

    def recorded(self):
        before = self.state.average.steps
        run_step(self)
        if self.state.average.steps > before:
            states[self.iter + 1] = {name: value.clone() for name, value in self.student.state_dict().items()}

    monkeypatch.setattr(DistillTrainer, "run_step", recorded)
    return states


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def same(first, second):
    return all(torch.equal(second[name], value) for name, value in first.items())


def test_the_average_is_evaluated_chosen_and_written(
    train, taught, tmp_path, trained, averaged_in_float64, monkeypatch
):
    evaluated, test = [], DistillTrainer.test.__func__

    def seen(cls, cfg, model, evaluators=None):
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return test(cls, cfg, model, evaluators)

    monkeypatch.setattr(DistillTrainer, "test", classmethod(seen))
    folder = tmp_path / "run"
    assert train(folder, *AVERAGED, *VALIDATED, *taught("fitnet:1+nst-poly:1", ["p2", "p3"]), test=True) == 0
    expected = {done: averaged_in_float64([trained[s] for s in range(1, done + 1)], DECAY) for done in (3, 6)}
    # in the middle, at the end, and on the test set
    assert len(evaluated) == 3
    for done, found in zip((3, 6, 6), evaluated):
        assert_close(found, expected[done])
    best = read_json(folder / "result.json")["checkpoints"]["best"]["step"]
    assert_close(load_file(folder / "model_best.safetensors"), expected[best])
    assert_close(load_file(folder / "model.safetensors"), expected[6])
    # the model in a checkpoint is the one to use, the one in training is in the trainer's state
    saved = torch.load(folder / "model_final.pth")
    assert same(saved["model"], evaluated[-1])
    assert saved["trainer"]["averaged"]["steps"] == 6
    assert same(saved["trainer"]["averaged"]["trained"], trained[6])


def test_training_is_as_without(train, whole, tmp_path):
    assert train(tmp_path / "run", *AVERAGED) == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    averaged, plain = (torch.load(folder / "model_final.pth") for folder in (tmp_path / "run", whole))
    assert same(averaged["trainer"]["averaged"]["trained"], plain["model"])
    assert "averaged" not in plain["trainer"]


def test_a_resumed_run_ends_with_the_same_bits(train, taught, tmp_path, at_step):
    def stop(_):
        raise UserError("stopped")

    words = [*AVERAGED, *taught("fitnet:1+nst-poly:1", ["p2", "p3"])]
    assert train(tmp_path / "one", *words) == 0
    with at_step(4, stop):
        assert train(tmp_path / "two", *words) == 2
    assert (tmp_path / "two" / "last_checkpoint").read_text() == "model_0000002.pth"
    assert train(tmp_path / "two", *words) == 0
    one, two = (torch.load(tmp_path / name / "model_final.pth") for name in ("one", "two"))
    averaged = [saved["trainer"]["averaged"] for saved in (one, two)]
    assert averaged[0]["steps"] == averaged[1]["steps"] == 6
    assert same(one["model"], two["model"])
    assert same(averaged[0]["trained"], averaged[1]["trained"])
    assert read_metrics(tmp_path / "one" / "metrics.jsonl") == read_metrics(tmp_path / "two" / "metrics.jsonl")


@pytest.mark.parametrize(("policy", "steps"), [("skip", [1, 2, 3, 4, 6]), ("back", [1, 2, 3, 4, 5, 6])])
def test_a_step_that_failed_is_not_in_it(train, tmp_path, trained, averaged_in_float64, poisoned, policy, steps):
    poisoned(4)
    assert train(tmp_path / "run", *AVERAGED, "SOLVER.NON_FINITE.POLICY", policy) == 0
    assert sorted(trained) == steps
    expected = averaged_in_float64([trained[step] for step in steps], DECAY)
    assert_close(load_file(tmp_path / "run" / "model.safetensors"), expected)


def test_before_the_first_step_it_is_what_was_loaded(configured):
    made = DistillTrainer(configured(*AVERAGED, "MODEL.WEIGHTS", "backbone://small"))
    made.resume_or_load(resume=False)
    assert made.state.eval_model is not made.student
    assert same(made.state.eval_model.state_dict(), made.student.state_dict())


def test_a_run_validates_on_the_images_that_were_kept_and_tests_at_the_end(configured, voc_root, tmp_path):
    cfg = configured(*VALIDATED)
    # the very images that the torchvision engine keeps
    left, kept = hold_out(VocDataset(voc_root, "train"), 0.25)
    assert [item["image_id"] for item in DatasetCatalog.get("tiny_train")] == list(left.ids)
    assert [item["image_id"] for item in DatasetCatalog.get(VALIDATION)] == list(kept.ids)
    folder = RunFolder(cfg.OUTPUT_DIR)
    with folder.opened(cfg):
        train_net(cfg, folder, resume=False)
    result = folder.result()
    assert 0 <= result["validation"]["map"] <= 1
    assert 0 <= result["map"] <= 1
    assert set(read_thresholds(folder.path)) <= set(left.classes)
    assert "thresholds" not in result["validation"]
    checkpoints = result["checkpoints"]
    assert checkpoints["last"] == {"step": 6, **{name: result["validation"][name] for name in ("map", "map_area")}}
    assert checkpoints["best"]["map"] >= checkpoints["last"]["map"]
    rows = {row["step"]: row for row in read_metrics(folder.metrics_path)}
    assert max(rows[2]["val/map"], checkpoints["last"]["map"]) == checkpoints["best"]["map"]
    found = read_json(tmp_path / "run" / "validation" / "inference" / "detections.json")
    assert {item["image_id"] for item in found} <= set(kept.ids)


def test_the_best_weights_are_tested_and_kept(configured, tmp_path, monkeypatch):
    measured = iter([{"map": 0.5, "map_area": 0.5, "thresholds": {"cat": 0.5}}, {"map": 0.25, "map_area": 0.25}])
    read = trainer.read_json
    monkeypatch.setattr(trainer, "read_json", lambda path: next(measured) if "validation" in str(path) else read(path))
    cfg = configured(*VALIDATED, "TEST.SELECT", "best")
    folder = RunFolder(cfg.OUTPUT_DIR)
    with folder.opened(cfg):
        train_net(cfg, folder, resume=False)
    best, kept = (load_file(tmp_path / "run" / name) for name in ("model_best.safetensors", "model.safetensors"))
    assert same(best, kept)
    assert not same(best, torch.load(tmp_path / "run" / "model_final.pth")["model"])
    assert folder.result()["checkpoints"]["best"] == {"step": 3, "map": 0.5, "map_area": 0.5}
    assert folder.result()["checkpoints"]["tested"] == "best"
    assert folder.result()["thresholds"] == {"cat": 0.5}


def test_a_split_of_its_own_is_validated_on(configured):
    cfg = configured("DATASETS.VAL", "[tiny_test]", "TEST.EVAL_PERIOD", 3, "TEST.SELECT", "best")
    ids = {name: [item["image_id"] for item in DatasetCatalog.get(name)] for name in ("tiny_train", "tiny_test")}
    assert len(ids["tiny_train"]) == 8
    (name,) = validation_config(cfg).DATASETS.TEST
    assert [item["image_id"] for item in DatasetCatalog.get(name)] == ids["tiny_test"]
    # a data set of a user's keeps its name
    own = plain({**cfg.DATASETS.VOC, "validation": cfg.DATASETS.VOC.tiny_test})
    configured("DATASETS.VOC", own, "DATASETS.TEST", "[validation]", "DATASETS.VAL_FRACTION", 0.25)
    assert [item["image_id"] for item in DatasetCatalog.get("validation")] == ids["tiny_test"]
    with pytest.raises(UserError, match="no data set 'nowhere'"):
        configured("DATASETS.VAL", "[nowhere]")


def test_training_stops_where_validation_gets_no_better(configured, tmp_path, monkeypatch):
    measured = iter([{"map": value, "map_area": value} for value in (0.25, 0.5, 0.5, 0.25, 0.25)])
    read = trainer.read_json
    monkeypatch.setattr(trainer, "read_json", lambda path: next(measured) if "validation" in str(path) else read(path))
    choice = ["TEST.EVAL_PERIOD", 1, "TEST.SELECT", "best", "TEST.PATIENCE", 2]
    cfg = configured("DATASETS.VAL_FRACTION", 0.25, *choice)
    folder = RunFolder(cfg.OUTPUT_DIR)
    with folder.opened(cfg):
        train_net(cfg, folder, resume=False)
    # of six steps the fourth is the second in a row that isn't better than the second
    assert folder.result()["steps"] == 4
    assert [row["step"] for row in read_metrics(folder.metrics_path)] == [0, 1, 2, 3]
    assert [folder.result()["checkpoints"][name]["step"] for name in ("best", "last")] == [2, 4]
    assert torch.load(tmp_path / "run" / "model_final.pth")["iteration"] == 3
    best, kept = (load_file(tmp_path / "run" / name) for name in ("model_best.safetensors", "model.safetensors"))
    assert same(best, kept)
