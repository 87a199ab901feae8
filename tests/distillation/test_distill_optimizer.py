"""The optimizer of stage one, and SOLVER.EMA_DECAY: the average against a recursion over the weights in training."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nst_det.distillation import validation
from nst_det.distillation.build import build_losses, initial_student
from nst_det.distillation.config import get_defaults
from nst_det.distillation.pipeline import distill, parse_methods
from nst_det.distillation.trainer import StudentTrainer, build_optimizer
from nst_det.engine import train_state
from nst_det.engine.checkpoint import checkpoints, load_checkpoint
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.models import load_card
from tests.helpers.stage_one import config as small_config
from tests.helpers.stage_one import metrics

# reached at the fourth of six steps
DECAY, STEPS = 0.6, 6
METHODS = ["ce", "fitnet"]


def config(images, output, **keys):
    changes = {
        "METHODS": METHODS,
        "TEACHER.SOLVER": {},
        "SOLVER.MAX_ITER": STEPS,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.ACCUMULATE": 2,
        "SOLVER.EMA_DECAY": DECAY,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "TEST.EVAL_PERIOD": 2,
        **keys,
    }
    return small_config(images, output, **changes)


@pytest.fixture
def trained(monkeypatch):
    """Name -> step -> the weights in training after it, of the runs in a test."""
    states, update = {}, StudentTrainer.update

    def recorded(self):
        update(self)
        states.setdefault(self.name, {})[self.step] = {k: v.clone() for k, v in self.model.state_dict().items()}

    monkeypatch.setattr(StudentTrainer, "update", recorded)
    return states


def assert_averaged(path, states, averaged_in_float64):
    written, expected = load_file(path), averaged_in_float64(list(states.values()), DECAY)
    assert written.keys() == expected.keys()
    for name, value in written.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_average_is_measured_and_written_and_training_is_as_without(
    images, tmp_path, trained, averaged_in_float64, monkeypatch
):
    measure, measured = validation.measure, {}

    def seen(networks, *others):
        measured.update({name: network.state_dict() for name, network in networks.items()})
        return measure(networks, *others)

    monkeypatch.setattr(validation, "measure", seen)
    results = distill(config(images, tmp_path / "with"))
    for name in ("teacher", *METHODS):
        assert_averaged(results[name]["backbone"], trained[name], averaged_in_float64)
        # what was measured last is what was written
        written = load_file(results[name]["backbone"])
        assert all(torch.equal(written[key], value) for key, value in measured[name].items())
        assert load_card(results[name]["backbone"]).config["SOLVER"]["EMA_DECAY"] == DECAY

    with_average = {name: dict(states) for name, states in trained.items()}
    saved, save = [], train_state.save_checkpoint
    monkeypatch.setattr(train_state, "save_checkpoint", lambda *words: (saved.append(words[2]), save(*words))[1])
    keys = {"SOLVER.EMA_DECAY": 0.0, "TEACHER.WEIGHTS": results["teacher"]["backbone"]}
    plain = distill(config(images, tmp_path / "without", **keys))
    assert saved
    assert not any("averaged" in state["trainer"] for state in saved)
    for name in METHODS:
        last, written = with_average[name][STEPS], load_file(plain[name]["backbone"])
        assert all(torch.equal(written[key], value) for key, value in last.items())
        rows = [metrics(tmp_path / run, name) for run in ("with", "without")]
        losses = [[row["loss/total"] for row in run if "loss/total" in row] for run in rows]
        assert losses[0] == losses[1]
        assert len(losses[0]) == STEPS


def test_a_stopped_run_resumes_to_the_same_bits(images, tmp_path, trained, stops_after_saving):
    results = distill(config(images, tmp_path / "one"))
    undisturbed = {name: states.pop(STEPS) for name, states in trained.items()}
    with stops_after_saving(4), pytest.raises(UserError, match="stopped"):
        distill(config(images, tmp_path / "two"))
    others = distill(config(images, tmp_path / "two"))
    for name in ("teacher", *METHODS):
        assert others[name]["sha256"] == results[name]["sha256"]
        assert others[name]["top1_best"] == results[name]["top1_best"]
        assert all(torch.equal(trained[name][STEPS][key], value) for key, value in undisturbed[name].items())


@pytest.mark.parametrize("policy", ["skip", "back"])
def test_a_step_that_failed_is_not_in_it(images, tmp_path, trained, averaged_in_float64, monkeypatch, policy):
    forward_backward, left, kept = StudentTrainer.forward_backward, [3], {}

    def infinite(self, images, labels, teacher, part=0):
        forward_backward(self, images, labels, teacher, part)
        if self.step in left and part == 1:
            left.remove(self.step)
            self._norm = torch.tensor(math.inf)

    def saved(folder, step, state):
        kept[step] = state["trainer"]["averaged"]["steps"]
        return save(folder, step, state)

    save = train_state.save_checkpoint
    monkeypatch.setattr(train_state, "save_checkpoint", saved)
    monkeypatch.setattr(StudentTrainer, "forward_backward", infinite)
    keys = {"METHODS": ["ce"], "SOLVER.NON_FINITE": {"POLICY": policy}, "SOLVER.CHECKPOINT_PERIOD": 2}
    result = distill(config(images, tmp_path, **keys))["ce"]
    steps = [1, 2, 3, 5, 6] if policy == "skip" else [1, 2, 3, 4, 5, 6]
    states = {step: trained["ce"][step] for step in steps}
    assert set(trained["ce"]) == set(steps)
    assert kept[6] == len(steps)
    assert_averaged(result["backbone"], states, averaged_in_float64)


def test_a_step_that_the_gradient_scaler_passed_over_is_not_in_it(images, tmp_path):
    made = config(images, tmp_path, **{"SOLVER.ACCUMULATE": 1})
    network = initial_student(made, 3)
    loss = build_losses(made, parse_methods(["ce"]), network, None, False)["ce"]
    student = StudentTrainer("ce", network, loss, made, made.SOLVER, None, RunFolder(tmp_path))
    # fp16 is for GPUs, its scaler works here too
    student.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    images_, labels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    averages = []
    for broken in (False, True, False):
        student.forward_backward(images_, labels, None)
        if broken:
            next(student.model.parameters()).grad[0] = math.inf
        student.update()
        averages.append((student.average.steps, next(student.eval_model.parameters()).clone()))
    assert [steps for steps, _ in averages] == [1, 1, 2]
    assert torch.equal(averages[0][1], averages[1][1])
    assert not torch.equal(averages[1][1], averages[2][1])
    assert student.scaler.get_scale() == 2.0


def test_it_cannot_be_switched_on_in_the_middle(images, tmp_path, stops_after_saving):
    keys = {"METHODS": ["ce"], "SOLVER.EMA_DECAY": 0.0}
    with stops_after_saving(2), pytest.raises(UserError, match="stopped"):
        distill(config(images, tmp_path, **keys))
    (checkpoint,) = checkpoints(tmp_path / "students" / "ce" / "checkpoints")
    assert "averaged" not in load_checkpoint(checkpoint)["trainer"]
    with pytest.raises(UserError, match="SOLVER.EMA_DECAY 0.0, now it is 0.6"):
        distill(config(images, tmp_path, **{**keys, "SOLVER.EMA_DECAY": DECAY}))


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_scales_shifts_and_biases_have_their_own_decay(name):
    network, solver = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), get_defaults().SOLVER
    network[0].bias.requires_grad_(False)
    solver.OPTIMIZER, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM = name, 0.5, 0.25
    groups = build_optimizer([network], solver).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays == {id(network[0].weight): 0.5, id(network[1].weight): 0.25, id(network[1].bias): 0.25}


def test_sgd_step_by_hand():
    layer, solver = nn.Linear(1, 1, bias=False), get_defaults().SOLVER
    layer.weight.data.fill_(2.0)
    solver.BASE_LR, solver.MOMENTUM, solver.NESTEROV, solver.WEIGHT_DECAY = 0.1, 0.9, True, 0.5
    layer.weight.grad = torch.full((1, 1), 3.0)
    build_optimizer([layer], solver).step()
    # g = 3 + 0.5 * 2 = 4, buffer 4, step g + 0.9 * 4 = 7.6
    assert layer.weight.item() == pytest.approx(2.0 - 0.1 * 7.6)
