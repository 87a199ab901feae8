"""What is validated on, and which weights are tested and written; with and without an average of them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nst_det.data.splits import hold_out
from nst_det.data.voc import VocDataset
from nst_det.detection import data, pipeline
from nst_det.detection.checkpoint import BEST_FILE
from nst_det.detection.data import split_training
from nst_det.detection.pipeline import train_detector
from nst_det.detection.trainer import Trainer
from nst_det.engine.checkpoint import checkpoints, load_checkpoint
from nst_det.engine.metrics import read_metrics
from nst_det.engine.nan_guard import NotFinite
from nst_det.errors import UserError
from nst_det.evaluation.thresholds import read_thresholds
from tests.helpers.detection import same_bits

VALIDATED = {"DATASETS.VAL_FRACTION": 0.25, "SOLVER.MAX_ITER": 4, "TEST.EVAL_PERIOD": 2}
# reached at the fourth of six steps
DECAY = 0.6
AVERAGED = {"SOLVER.EMA_DECAY": DECAY, "DATASETS.TEST": []}


def copy(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.fixture
def evaluated(monkeypatch):
    """What is evaluated: (ids of the images, weights) each time."""
    seen, detect = [], pipeline.detect

    def recorded(detector, batches, over):
        seen.append((tuple(item.id for item in over.annotations()), copy(detector)))
        return detect(detector, batches, over)

    monkeypatch.setattr(pipeline, "detect", recorded)
    return seen


def test_a_run_trains_on_the_rest_and_validates_on_what_was_kept(on_shapes, shapes, tmp_path, monkeypatch, evaluated):
    whole = VocDataset(shapes, "trainval")
    left, kept = hold_out(whole, 0.25)
    trained, listed = set(), data.list_items

    def list_items(*given):
        items = listed(*given)
        trained.update(item.id for item in items)
        return items

    monkeypatch.setattr(data, "list_items", list_items)
    result = train_detector(on_shapes("run", {**VALIDATED, "DATASETS.TEST": []}))
    assert trained
    assert trained <= set(left.ids)
    # once in the middle and once at the end
    assert [ids for ids, _ in evaluated] == [kept.ids] * 2
    assert 0 <= result["validation"]["map"] <= 1
    assert "map" not in result
    assert set(read_thresholds(tmp_path / "run")) <= set(whole.classes)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["validation"] == result["validation"]
    assert split_training(on_shapes(), [whole]) == ([whole], None)


@pytest.mark.parametrize(("select", "maps"), [("best", (0.5, 0.25)), ("last", (0.5, 0.25)), ("best", (0.25, 0.5))])
def test_the_best_checkpoint_is_chosen_without_the_test_split(
    on_shapes, shapes, tmp_path, monkeypatch, evaluated, select, maps
):
    figures = iter([*maps, 0.125])

    def score(found, data, validation):
        value = next(figures)
        return {"map": value, "map_area": 0.0, **({"thresholds": {"arrow": value}} if validation else {})}

    monkeypatch.setattr(pipeline, "score", score)
    result = train_detector(on_shapes("run", {**VALIDATED, "TEST.SELECT": select}))
    (_, middle), (_, last), (tested, chosen) = evaluated
    best = middle if maps[0] > maps[1] else last
    assert not same_bits(middle, last)
    # the test split is looked at once, by the chosen weights, which are those that are kept
    kept = hold_out(VocDataset(shapes, "trainval"), 0.25)[1].ids
    assert [ids for ids, _ in evaluated] == [kept, kept, tested]
    assert tested == VocDataset(shapes, "test").ids
    assert same_bits(chosen, best if select == "best" else last)
    assert same_bits(chosen, load_file(tmp_path / "run" / "model.safetensors"))
    assert same_bits(best, load_file(tmp_path / "run" / BEST_FILE))
    assert result["checkpoints"] == {
        "best": {"step": 2 if best is middle else 4, "map": max(maps), "map_area": 0.0},
        "last": {"step": 4, "map": maps[1], "map_area": 0.0},
        "tested": select,
    }
    assert result["thresholds"] == {"arrow": max(maps) if select == "best" else maps[1]}
    assert (result["map"], result["validation"]) == (0.125, {"map": maps[1], "map_area": 0.0})
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[1]
    assert row["val/map"] == maps[0]
    assert "map" not in row


def test_training_stops_where_validation_gets_no_better(
    on_shapes, tmp_path, monkeypatch, trained, evaluated, stops_after_saving
):
    """Of six steps the fourth is the second in a row that isn't better than the second."""
    changes = {"DATASETS.VAL_FRACTION": 0.25, "TEST.EVAL_PERIOD": 1, "TEST.PATIENCE": 2, "TEST.SELECT": "best"}
    figures = iter([0.1, 0.3, 0.2, 0.3, 0.3, 0.125])
    monkeypatch.setattr(pipeline, "score", lambda *_: {"map": next(figures), "map_area": 0.0})
    with stops_after_saving(4), pytest.raises(UserError, match="stopped"):
        train_detector(on_shapes("run", changes))
    assert sorted(trained) == [1, 2, 3, 4]
    trained.clear()
    result = train_detector(on_shapes("run", changes))
    assert not trained
    assert (result["steps"], result["map"]) == (4, 0.125)
    assert [result["checkpoints"][name]["step"] for name in ("best", "last")] == [2, 4]
    assert same_bits(load_file(tmp_path / "run" / "model.safetensors"), evaluated[1][1])
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 4


@pytest.mark.parametrize(("key", "value"), [("SELECT", "best"), ("PATIENCE", 3)])
def test_a_choice_without_a_validation_split_is_refused(on_shapes, key, value):
    for changes in ({"DATASETS.VAL_FRACTION": 0.25}, {"TEST.EVAL_PERIOD": 2}):
        with pytest.raises(UserError, match=rf"TEST\.{key} {value}"):
            on_shapes("run", {f"TEST.{key}": value, **changes})


@pytest.fixture
def trained(monkeypatch):
    """Step -> the weights in training after it, where the optimizer made it."""
    states, step = {}, Trainer.run_step

    def recorded(self):
        average = self.state.average
        steps = average.steps if average else 0
        step(self)
        if not average or average.steps > steps:
            states[self.state.step] = copy(self.model)

    monkeypatch.setattr(Trainer, "run_step", recorded)
    return states


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_average_is_evaluated_chosen_and_written(
    on_shapes, tmp_path, taught, trained, averaged_in_float64, evaluated, monkeypatch
):
    # of three evaluations the second is the best
    figures = iter([{"map": 0.1}, {"map": 0.3}, {"map": 0.2}])
    monkeypatch.setattr(pipeline, "score", lambda *_: next(figures))
    choice = {"DATASETS.VAL_FRACTION": 0.25, "TEST.EVAL_PERIOD": 2, "TEST.SELECT": "best"}
    result = train_detector(on_shapes("run", {**AVERAGED, **taught, **choice}))
    assert result["checkpoints"]["best"]["step"] == 4
    averages = [weights for _, weights in evaluated]
    assert len(averages) == 3
    for done, found in zip((2, 4, 6), averages):
        assert_close(found, averaged_in_float64([trained[step] for step in range(1, done + 1)], DECAY))
    for name in (BEST_FILE, "model.safetensors"):
        assert same_bits(load_file(tmp_path / "run" / name), averages[1])
    # the checkpoint has both, of the last step
    state = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    averaged = state["trainer"]["averaged"]
    assert averaged["steps"] == 6
    assert same_bits(state["model"], averages[2])
    assert same_bits(averaged["trained"], trained[6])


def test_training_is_as_without_an_average_and_resumes(on_shapes, tmp_path, taught, trained, stops_after_saving):
    train_detector(on_shapes("one", {**AVERAGED, **taught}))
    last = trained[6]
    train_detector(on_shapes("without", {**AVERAGED, **taught, "SOLVER.EMA_DECAY": 0}))
    assert same_bits(load_file(tmp_path / "without" / "model.safetensors"), last)
    assert read_metrics(tmp_path / "one" / "metrics.jsonl") == read_metrics(tmp_path / "without" / "metrics.jsonl")
    with stops_after_saving(3), pytest.raises(UserError, match="stopped"):
        train_detector(on_shapes("two", {**AVERAGED, **taught}))
    train_detector(on_shapes("two", {**AVERAGED, **taught}))
    names = ("one", "two", "without")
    one, two, without = (load_checkpoint(checkpoints(tmp_path / name / "checkpoints")[-1]) for name in names)
    assert "averaged" not in without["trainer"]
    first, second = (state["trainer"]["averaged"] for state in (one, two))
    assert first["steps"] == second["steps"] == 6
    assert same_bits(first["trained"], second["trained"])
    for state in (two["model"], load_file(tmp_path / "two" / "model.safetensors")):
        assert same_bits(state, one["model"])


@pytest.mark.parametrize("policy", ["skip", "back"])
def test_a_step_that_failed_is_not_in_the_average(
    on_shapes, tmp_path, trained, averaged_in_float64, monkeypatch, policy
):
    backward, left = Trainer.backward, [4]

    def failing(self, batch):
        found = backward(self, batch)
        if self.iter in left:
            left.remove(self.iter)
            raise NotFinite("the test's step")
        return found

    monkeypatch.setattr(Trainer, "backward", failing)
    train_detector(on_shapes("run", {**AVERAGED, "SOLVER.NON_FINITE.POLICY": policy, "SOLVER.ACCUMULATE": 2}))
    steps = [1, 2, 3, 4, 6] if policy == "skip" else [1, 2, 3, 4, 5, 6]
    assert sorted(trained) == steps
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert_close(found, averaged_in_float64([trained[step] for step in steps], DECAY))
