"""SOLVER.EMA_DECAY in the torchvision engine: the average against a recursion over the weights in training."""

import pytest
import torch
from safetensors.torch import load_file

from nst_det.detection import pipeline as stage
from nst_det.detection import trainer as module
from nst_det.detection.checkpoint import BEST_FILE
from nst_det.detection.pipeline import train_detector
from nst_det.engine.checkpoint import checkpoints, load_checkpoint
from nst_det.engine.metrics import read_metrics
from nst_det.engine.nan_guard import NotFinite
from nst_det.errors import UserError

# reached at the fourth of six steps
DECAY = 0.6
AVERAGED = {"SOLVER.EMA_DECAY": DECAY, "DATASETS.TEST": []}


@pytest.fixture
def taught(taught):
    return {**AVERAGED, **taught}


@pytest.fixture
def trained(monkeypatch):
    """Step -> the weights in training after it, where the optimizer made it."""
    states, step = {}, module.Trainer.run_step

    def recorded(self):
        average = self.state.average
        steps = average.steps if average else 0
        step(self)
        if not average or average.steps > steps:
            states[self.state.step] = {name: value.clone() for name, value in self.model.state_dict().items()}

    monkeypatch.setattr(module.Trainer, "run_step", recorded)
    return states


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_average_is_evaluated_chosen_and_written(
    on_shapes, tmp_path, taught, trained, averaged_in_float64, monkeypatch
):
    evaluated, detect = [], stage.detect

    def seen(detector, *others):
        evaluated.append({name: value.clone() for name, value in detector.state_dict().items()})
        return detect(detector, *others)

    monkeypatch.setattr(stage, "detect", seen)
    # of three evaluations the second is the best
    figures = iter([{"map": 0.1}, {"map": 0.3}, {"map": 0.2}])
    monkeypatch.setattr(stage, "score", lambda *_: next(figures))
    choice = {"DATASETS.VAL_FRACTION": 0.25, "TEST.EVAL_PERIOD": 2, "TEST.SELECT": "best"}
    result = train_detector(on_shapes("run", {**taught, **choice}))
    assert result["checkpoints"]["best"]["step"] == 4
    assert len(evaluated) == 3
    for done, found in zip((2, 4, 6), evaluated):
        assert_close(found, averaged_in_float64([trained[step] for step in range(1, done + 1)], DECAY))
    for name in (BEST_FILE, "model.safetensors"):
        written = load_file(tmp_path / "run" / name)
        assert all(torch.equal(written[name], value) for name, value in evaluated[1].items())
    # the checkpoint has both, of the last step
    state = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    averaged = state["trainer"]["averaged"]
    assert averaged["steps"] == 6
    assert all(torch.equal(state["model"][name], value) for name, value in evaluated[2].items())
    assert all(torch.equal(averaged["trained"][name], value) for name, value in trained[6].items())


def test_training_is_as_without(on_shapes, tmp_path, taught, trained):
    train_detector(on_shapes("with", taught))
    last = trained[6]
    train_detector(on_shapes("without", {**taught, "SOLVER.EMA_DECAY": 0}))
    written = load_file(tmp_path / "without" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in last.items())
    assert read_metrics(tmp_path / "with" / "metrics.jsonl") == read_metrics(tmp_path / "without" / "metrics.jsonl")
    state = load_checkpoint(checkpoints(tmp_path / "without" / "checkpoints")[-1])
    assert "averaged" not in state["trainer"]


def test_a_run_that_goes_on_ends_with_the_same_bits(on_shapes, tmp_path, taught, stops_after_saving):
    train_detector(on_shapes("one", taught))
    with stops_after_saving(3), pytest.raises(UserError, match="stopped"):
        train_detector(on_shapes("two", taught))
    train_detector(on_shapes("two", taught))
    one, two = (load_checkpoint(checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("one", "two"))
    first, second = (state["trainer"]["averaged"] for state in (one, two))
    assert first["steps"] == second["steps"] == 6
    assert all(torch.equal(second["trained"][name], value) for name, value in first["trained"].items())
    written = load_file(tmp_path / "two" / "model.safetensors")
    for state in (two["model"], written):
        assert all(torch.equal(state[name], value) for name, value in one["model"].items())


@pytest.mark.parametrize("policy", ["skip", "back"])
def test_a_step_that_failed_is_not_in_it(on_shapes, tmp_path, trained, averaged_in_float64, monkeypatch, policy):
    backward, left = module.Trainer.backward, [4]

    def failing(self, batch):
        found = backward(self, batch)
        if self.iter in left:
            left.remove(self.iter)
            raise NotFinite("the test's step")
        return found

    monkeypatch.setattr(module.Trainer, "backward", failing)
    train_detector(on_shapes("run", {**AVERAGED, "SOLVER.NON_FINITE.POLICY": policy, "SOLVER.ACCUMULATE": 2}))
    steps = [1, 2, 3, 4, 6] if policy == "skip" else [1, 2, 3, 4, 5, 6]
    assert sorted(trained) == steps
    assert_close(
        load_file(tmp_path / "run" / "model.safetensors"),
        averaged_in_float64([trained[step] for step in steps], DECAY),
    )
