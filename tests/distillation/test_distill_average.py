"""SOLVER.EMA_DECAY in stage one: the average against a recursion over the weights in training, stops and faults."""

import math

import pytest
import torch
from safetensors.torch import load_file

from nst_det.distillation import pipeline as stage
from nst_det.distillation.build import build_losses, copy_of, initial_student
from nst_det.distillation.config import load_distill_config
from nst_det.distillation.pipeline import distill, parse_methods
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine import train_state
from nst_det.engine.checkpoint import checkpoints, load_checkpoint
from nst_det.engine.metrics import read_metrics
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.models import load_card

# reached at the fourth of six steps
DECAY, STEPS = 0.6, 6
METHODS = ["ce", "fitnet"]


def config(images, output, **keys):
    values = {
        "NAME": "small",
        "METHODS": METHODS,
        "DATA.ROOT": images,
        "OUTPUT_DIR": output,
        "REGISTRY": output / "backbones",
        "DATA.IMAGE_SIZE": 32,
        "STUDENT.ARCH_KWARGS": {"drop_rate": 0.2},
        "TEACHER.ARCH": "nst_resnet10_w32",
        "SOLVER.OPTIMIZER": "ADAMW",
        "SOLVER.BASE_LR": 2e-3,
        "SOLVER.MAX_ITER": STEPS,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.ACCUMULATE": 2,
        "SOLVER.EMA_DECAY": DECAY,
        "TEST.EVAL_PERIOD": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "LOG_PERIOD": 1,
        **keys,
    }
    return load_distill_config(None, [str(word) for pair in values.items() for word in pair])


@pytest.fixture
def trained(monkeypatch):
    """Word -> step -> the weights in training after it, of the runs in a test."""
    states, update = {}, StudentTrainer.update

    def recorded(self):
        update(self)
        states.setdefault(self.word, {})[self.step] = {k: v.clone() for k, v in self.model.state_dict().items()}

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
    measure, measured = stage.measure, {}

    def seen(networks, *others):
        measured.update({word: network.state_dict() for word, network in networks.items()})
        return measure(networks, *others)

    monkeypatch.setattr(stage, "measure", seen)
    results = distill(config(images, tmp_path / "with"))
    for word in ("teacher", *METHODS):
        assert_averaged(results[word]["backbone"], trained[word], averaged_in_float64)
        # what was measured last is what was written
        written = load_file(results[word]["backbone"])
        assert all(torch.equal(written[name], value) for name, value in measured[word].items())
        assert load_card(results[word]["backbone"]).config["SOLVER"]["EMA_DECAY"] == DECAY

    with_average = {word: dict(states) for word, states in trained.items()}
    saved, save = [], train_state.save_checkpoint
    monkeypatch.setattr(train_state, "save_checkpoint", lambda *words: (saved.append(words[2]), save(*words))[1])
    keys = {"SOLVER.EMA_DECAY": 0.0, "TEACHER.WEIGHTS": results["teacher"]["backbone"]}
    plain = distill(config(images, tmp_path / "without", **keys))
    assert saved
    assert not any("averaged" in state["trainer"] for state in saved)
    for word in METHODS:
        last, written = with_average[word][STEPS], load_file(plain[word]["backbone"])
        assert all(torch.equal(written[name], value) for name, value in last.items())
        rows = [read_metrics(tmp_path / run / "students" / word / "metrics.jsonl") for run in ("with", "without")]
        losses = [[row["loss/total"] for row in run if "loss/total" in row] for run in rows]
        assert losses[0] == losses[1]
        assert len(losses[0]) == STEPS


def test_a_run_that_goes_on_ends_with_the_same_bits(images, tmp_path, trained, stops_after_saving):
    results = distill(config(images, tmp_path / "one"))
    undisturbed = {word: states.pop(STEPS) for word, states in trained.items()}
    with stops_after_saving(4), pytest.raises(UserError, match="stopped"):
        distill(config(images, tmp_path / "two"))
    others = distill(config(images, tmp_path / "two"))
    for word in ("teacher", *METHODS):
        assert others[word]["sha256"] == results[word]["sha256"]
        assert others[word]["top1_best"] == results[word]["top1_best"]
        assert all(torch.equal(trained[word][STEPS][name], value) for name, value in undisturbed[word].items())


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
    student = StudentTrainer(
        "ce", copy_of(network, torch.device("cpu")), network.levels, loss, made.SOLVER, 0, RunFolder(tmp_path)
    )
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


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_what_is_no_decay_is_refused(images, tmp_path, decay):
    with pytest.raises(UserError, match=r"SOLVER.EMA_DECAY must be 0 for no average, or a fraction below 1"):
        config(images, tmp_path, **{"SOLVER.EMA_DECAY": decay})


def test_it_can_not_be_switched_on_in_the_middle(images, tmp_path, stops_after_saving):
    keys = {"METHODS": ["ce"], "SOLVER.EMA_DECAY": 0.0}
    with stops_after_saving(2), pytest.raises(UserError, match="stopped"):
        distill(config(images, tmp_path, **keys))
    (checkpoint,) = checkpoints(tmp_path / "students" / "ce" / "checkpoints")
    assert "averaged" not in load_checkpoint(checkpoint)["trainer"]
    with pytest.raises(UserError, match=r"holds a run with SOLVER.EMA_DECAY 0.0, now it is 0.6"):
        distill(config(images, tmp_path, **{**keys, "SOLVER.EMA_DECAY": DECAY}))
