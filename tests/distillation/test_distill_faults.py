"""A non-finite loss in stage one: named, dumped, replayed, and handled by each policy; signals; a GPU; a full disk."""

import errno
import logging
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nst_det.distillation.build import Teacher
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine.checkpoint import checkpoints, load_checkpoint
from nst_det.engine.io import read_json
from nst_det.engine.nan_guard import read_step
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.signals import Preempted
from nst_det.engine.train_state import OptimizedState
from nst_det.errors import UserError
from tests.helpers.stage_one import assert_same_run, metrics, overrides, run

METHOD = "kd+nst-poly"
KEYS = {"METHODS": ["ce", METHOD], "SOLVER.CHECKPOINT_PERIOD": 2}
BROKEN = "nst-poly (res4), the teacher's map res4"
# two batches of seven a step
PARTS = {"SOLVER.IMS_PER_BATCH": 14, "SOLVER.ACCUMULATE": 2}


def dump(output, step, run="students/" + METHOD):
    return output / run / "nonfinite" / f"step-{step:08d}.pt"


@pytest.fixture
def poisoned(monkeypatch, taught):
    """Keys of a run whose teacher gives NaN in one place of res4 from batch ``faulty`` on, ``times`` times."""

    def poison(times=math.inf, faulty=5):
        counts = {"seen": 0, "left": times}
        ask = Teacher.__call__

        def asked(self, images, rows):
            outputs = ask(self, images, rows)
            counts["seen"] += 1
            if counts["seen"] > faulty and counts["left"] > 0:
                counts["left"] -= 1
                outputs.maps["res4"] = outputs.maps["res4"].clone()
                outputs.maps["res4"][3, 0, 0, 0] = math.nan
            return outputs

        monkeypatch.setattr(Teacher, "__call__", asked)
        return {**KEYS, **taught}

    return poison


@pytest.fixture
def replayed(cli, capsys):
    """What a replay of a file prints, which must have found the same, with the same bits of the finite term."""

    def replay(file):
        assert cli("replay", file) == 0
        printed = capsys.readouterr().out
        assert "the same as in the run" in printed
        row = next(line.split() for line in printed.splitlines() if " ce " in line)
        assert row[3] == row[5] == f"{read_step(file)['terms']['ce']:.9g}"
        return printed

    return replay


def test_a_non_finite_loss_stops_before_the_optimizer_and_is_replayed(images, tmp_path, poisoned, replayed):
    with pytest.raises(UserError, match=r"kd\+nst-poly: not finite at step 5: ") as stopped:
        run(images, tmp_path, **poisoned())
    file = dump(tmp_path, 5)
    assert f"{BROKEN}; images train/class" in str(stopped.value)
    assert f"nst-det replay {file}" in str(stopped.value)
    content = read_step(file)
    assert all((images / name).is_file() for name in content["images"])
    assert len(content["images"]) == 7
    assert math.isnan(content["terms"]["nst-poly"])
    assert all(bool(value.isfinite().all()) for value in content["model"].values())
    # the checkpoint before is whole; neither data nor teacher are needed again
    assert load_checkpoint(checkpoints(file.parents[1] / "checkpoints")[-1])["iteration"] == 3
    assert BROKEN in replayed(file)


def test_of_several_parts_the_one_with_the_fault_is_named_and_replayed(images, tmp_path, poisoned, replayed):
    # the first of step 2
    with pytest.raises(UserError, match="not finite at step 2: ") as stopped:
        run(images, tmp_path, **poisoned(times=1, faulty=4), **PARTS)
    assert f"{BROKEN}; images" in str(stopped.value)
    content = read_step(dump(tmp_path, 2))
    assert (content["piece"], len(content["images"])) == (0, 7)
    assert f"not finite now: {BROKEN}\n" in replayed(dump(tmp_path, 2))


@pytest.mark.parametrize("faulty", [None, 0, 1])
def test_a_non_finite_gradient_is_named_where_the_loss_is_finite(images, tmp_path, monkeypatch, replayed, faulty):
    forward_backward = StudentTrainer.forward_backward

    def infinite(self, images, labels, teacher, part=0):
        broken = self.step == 2 and part == (faulty or 0)
        bias = dict(self.model.named_parameters())["fc.bias"]
        hook = bias.register_hook(lambda gradient: gradient.fill_(math.inf)) if broken else None
        forward_backward(self, images, labels, teacher, part)
        if hook is not None:
            hook.remove()

    monkeypatch.setattr(StudentTrainer, "forward_backward", infinite)
    parts = {} if faulty is None else {"IMS_PER_BATCH": 14, "ACCUMULATE": 2}
    with pytest.raises(UserError, match=r"teacher: not finite at step 2: the gradient of fc\.bias; images"):
        run(images, tmp_path, **{"TEACHER.SOLVER": {"MAX_ITER": 4, **parts}})
    assert read_step(dump(tmp_path, 2, "teacher"))["piece"] == (faulty or 0)
    replayed(dump(tmp_path, 2, "teacher"))


def test_gradients_that_no_scale_makes_finite_are_named(images, tmp_path, monkeypatch):
    """As in fp16 on a GPU: its scaler passes over such steps, each with half of the scale."""
    scaler, forward_backward = torch.amp.GradScaler, StudentTrainer.forward_backward

    def infinite(self, *batch):
        hook = self.model.fc.bias.register_hook(lambda gradient: gradient * math.nan)
        forward_backward(self, *batch)
        hook.remove()

    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **_: scaler(device, init_scale=2.0))
    monkeypatch.setattr(StudentTrainer, "forward_backward", infinite)
    with pytest.raises(UserError, match=r"not finite at step 2: the gradient of fc\.bias; images"):
        run(images, tmp_path, METHODS=["ce"])


def test_gradients_too_large_together_are_named(images, tmp_path, taught):
    keys = {"METHODS": ["at:1e38"], "TRANSFER.WEIGHTS": {"at": 1e38}, "SOLVER.CLIP_GRADIENTS.ENABLED": False}
    with pytest.raises(UserError, match=r"at:1e38: not finite at step 0: the norm of all gradients; images train"):
        run(images, tmp_path, **taught, **keys, **{"SOLVER.BASE_LR": 1e30})


def test_a_skipped_step_leaves_the_network_as_it_was(images, tmp_path, poisoned, monkeypatch, caplog):
    states, updated, handle = {}, [], StudentTrainer.handle_nonfinite
    update = StudentTrainer.update

    def kept(self):
        updated.append((self.name, self.step))
        update(self)

    def handled(self, *args):
        for when in ("before", "after"):
            states[when] = {name: value.clone() for name, value in self.model.state_dict().items()}
            when == "before" and handle(self, *args)

    monkeypatch.setattr(StudentTrainer, "update", kept)
    monkeypatch.setattr(StudentTrainer, "handle_nonfinite", handled)
    with caplog.at_level(logging.WARNING):
        results = run(images, tmp_path, **poisoned(times=1), **{"SOLVER.NON_FINITE": {"POLICY": "skip"}})
    assert "this step is skipped (1 of 3)" in caplog.text
    assert (METHOD, 5) not in updated
    assert {("ce", 5), (METHOD, 6)} < set(updated)
    # what the forward pass changed is put back
    counted = [name for name in states["after"] if name.endswith("num_batches_tracked")]
    assert {(int(states["before"][name]), int(states["after"][name])) for name in counted} == {(6, 5)}
    row = metrics(tmp_path, METHOD)[6]
    assert (row["step"], row["loss/nst-poly"], row["loss/total"]) == (5, None, None)
    assert all(torch.isfinite(value).all() for value in load_file(results[METHOD]["backbone"]).values())


def test_rolling_back_lowers_the_rate_from_the_last_checkpoint_on(images, tmp_path, poisoned, finished):
    run(images, tmp_path, **poisoned(times=1), **{"SOLVER.NON_FINITE": {"POLICY": "back", "LR_FACTOR": 0.25}})
    rows, whole = metrics(tmp_path, METHOD), metrics(finished[0], METHOD)
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    rates, expected = ({row["step"]: row["lr"] for row in run if "lr" in row} for run in (rows, whole))
    assert all(rates[step] == expected[step] * (1 if step < 4 else 0.25) for step in expected)
    # the others are not concerned
    assert metrics(tmp_path, "ce") == metrics(finished[0], "ce")


def test_a_stop_while_one_catches_up_saves_those_ahead_of_it(images, tmp_path, poisoned, monkeypatch):
    update = StudentTrainer.update

    def signalled(self):
        if (self.name, self.step, self.guard.count) == (METHOD, 2, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        update(self)

    monkeypatch.setattr(StudentTrainer, "update", signalled)
    keys = {"SOLVER.CHECKPOINT_PERIOD": 9, "SOLVER.NON_FINITE.POLICY": "back"}
    with pytest.raises(Preempted):
        run(images, tmp_path, **{**poisoned(times=1), **keys})
    newest = [checkpoints(tmp_path / "students" / name / "checkpoints")[-1].name for name in KEYS["METHODS"]]
    assert newest == ["step-00000006.pt", "step-00000003.pt"]


def test_the_limit_holds_and_what_ended_the_run_is_told_until_it_begins_again(images, tmp_path, poisoned):
    ended = [RunFolder(tmp_path / "students" / name).not_finite_path for name in KEYS["METHODS"]]
    keys, policy = poisoned(times=4), {"POLICY": "skip", "LIMIT": 2}
    with pytest.raises(UserError, match=r"step 7.*after 2 times skip, SOLVER.NON_FINITE.LIMIT"):
        run(images, tmp_path, **keys, **{"SOLVER.NON_FINITE": policy})
    assert [path.exists() for path in ended] == [False, True]
    assert read_json(ended[1]) == {"step": 7, "not_finite": BROKEN.split(", ")}
    run(images, tmp_path, **keys, **{"SOLVER.NON_FINITE": {**policy, "LIMIT": 4}})
    assert not ended[1].exists()


@pytest.fixture
def unread(monkeypatch):
    """A call: from there on the host learns a step later how a step ended, as on a GPU."""
    return lambda: monkeypatch.setattr(OptimizedState, "waits", property(lambda self: self.suspect == self.step))


# what is read in the next step, at a checkpoint, at the end, and before the optimizer has any state
@pytest.mark.parametrize(
    ("faulty", "method", "policy", "keys"),
    [
        (4, METHOD, "skip", {"SOLVER.EMA_DECAY": 0.9}),
        (4, METHOD, "back", {"SOLVER.EMA_DECAY": 0.9, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm"}),
        (3, "ce", "skip", {"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value"}),
        (7, METHOD, "skip", {"SOLVER.OPTIMIZER": "SGD", "SOLVER.ACCUMULATE": 2, "SOLVER.IMS_PER_BATCH": 6}),
        (0, "ce", "skip", {"SOLVER.OPTIMIZER": "SGD", "METHODS": ["ce"]}),
        (None, "ce", "skip", {"SOLVER.EMA_DECAY": 0.9}),
    ],
)
def test_a_fault_that_is_seen_a_step_later_is_handled_alike(
    images, tmp_path, taught, monkeypatch, unread, faulty, method, policy, keys
):
    forward_backward, made = StudentTrainer.forward_backward, []

    def infinite(self, *args):
        broken = (self.name, self.step, self.guard.count) == (method, faulty, 0)
        made.append((self.name, self.step))
        bias = dict(self.model.named_parameters())["fc.bias"]
        hook = bias.register_hook(lambda gradient: gradient.fill_(math.inf)) if broken else None
        forward_backward(self, *args)
        if hook is not None:
            hook.remove()

    monkeypatch.setattr(StudentTrainer, "forward_backward", infinite)
    keys = {**taught, "METHODS": ["ce", METHOD], "LOG_PERIOD": 3, "SOLVER.NON_FINITE.POLICY": policy, **keys}
    results, steps = {}, {}
    for name in ("known", "unread"):
        results[name] = run(images, tmp_path / name, **keys)
        steps[name], made[:] = list(made), []
        unread()
    assert_same_run(tmp_path / "known", tmp_path / "unread", *results.values(), methods=keys["METHODS"])
    dumps = [sorted((tmp_path / name).rglob("nonfinite/*.pt")) for name in results]
    assert [file.name for file in dumps[0]] == ([] if faulty is None else [f"step-{faulty:08d}.pt"])
    for one, other in zip(*dumps, strict=True):
        first, second = read_step(one), read_step(other)
        assert (first["not_finite"], first["images"]) == (second["not_finite"], second["images"])
        assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    # it was made again, and in vain the one after it had been begun
    again = [step for name, step in steps["unread"] if name == method]
    for step in steps["known"]:
        again.remove(step[1]) if step[0] == method else None
    parts = keys.get("SOLVER.ACCUMULATE", 1)
    assert again == ([] if faulty is None else [faulty] * parts if faulty in (3, 7) else [faulty, faulty + 1])


def test_a_fault_that_is_seen_later_ends_the_run_at_its_own_step(images, tmp_path, poisoned, unread):
    unread()
    with pytest.raises(UserError, match=rf"kd\+nst-poly: not finite at step 4: {re.escape(BROKEN)}; images"):
        run(images, tmp_path, **poisoned(faulty=4), LOG_PERIOD=3)
    assert dump(tmp_path, 4).is_file()


def test_a_signal_waits_for_a_step_that_is_known(images, tmp_path, taught, monkeypatch, cli, unread, finished):
    update = StudentTrainer.update

    def signalled(self, *args):
        if self.name == "ce" and self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, *args)

    unread()
    (tmp_path / "c.yaml").write_text("SEED: 0\n")
    typed = overrides(images, tmp_path / "out", **{**KEYS, **taught, "LOG_PERIOD": 4, "SOLVER.CHECKPOINT_PERIOD": 9})
    command = ["distill", "--config-file", tmp_path / "c.yaml", *typed]
    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "update", signalled)
        assert cli(*command) == 75
    for method in KEYS["METHODS"]:
        saved = checkpoints(tmp_path / "out" / "students" / method / "checkpoints")
        assert [file.name for file in saved] == ["step-00000003.pt"]
    assert cli(*command) == 0
    for method in KEYS["METHODS"]:
        name = f"backbones/small-{method}-s0.safetensors"
        one, other = (load_file(folder / name) for folder in (finished[0], tmp_path / "out"))
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def command(images, tmp_path, taught, cli, finished):
    """``command(code)``: runs the same command; ``command(0)`` must end with the bits of the undisturbed run."""
    (tmp_path / "c.yaml").write_text("SEED: 0\n")

    def ends_with(code, **keys):
        typed = overrides(images, tmp_path / "out", **KEYS, **taught, **keys)
        assert cli("distill", "--config-file", tmp_path / "c.yaml", *typed) == code
        for method in KEYS["METHODS"] if code == 0 else ():
            name = f"backbones/small-{method}-s0.safetensors"
            one, other = (load_file(folder / name) for folder in (finished[0], tmp_path / "out"))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
            assert metrics(finished[0], method) == metrics(tmp_path / "out", method)

    return ends_with


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_the_same_command_resumes(tmp_path, command, monkeypatch, signum):
    update = StudentTrainer.update

    def signalled(self):
        if self.name == "ce" and self.step == 2:
            os.kill(os.getpid(), signum)
        update(self)

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "update", signalled)
        command(75)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    for method in KEYS["METHODS"]:
        saved = checkpoints(tmp_path / "out" / "students" / method / "checkpoints")
        assert saved[-1].name == "step-00000003.pt"
    command(0)


@pytest.mark.parametrize(
    ("step", "error", "resumes"),
    [
        (5, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), "step-00000004.pt"),
        (1, RuntimeError("CUDA error: unspecified launch failure\nx"), "no checkpoint"),
    ],
)
def test_a_gpu_that_fails_is_one_line_and_the_same_command_resumes(
    tmp_path, command, monkeypatch, capsys, step, error, resumes
):
    forward_backward = StudentTrainer.forward_backward

    def failing(self, *args):
        if (self.name, self.step) == (METHOD, step):
            raise error
        forward_backward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "forward_backward", failing)
        command(2)
    printed = capsys.readouterr().err
    line = printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert line.startswith(f"nst-det: {str(error).splitlines()[0].rstrip('.')}; ")
    assert ("SOLVER.ACCUMULATE" in line) == ("memory" in line)
    assert resumes in line
    if step == 5:
        assert str(tmp_path / "out" / "students" / "ce" / "checkpoints" / resumes) in line
    command(0)


def test_a_full_disk_is_one_line_and_the_last_good_state_stays(tmp_path, command, monkeypatch, capsys):
    replace, room = os.replace, {"left": 9}

    def full(source, target):
        if Path(target).suffix == ".pt":
            room["left"] -= 1
            if room["left"] < 6:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        command(2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nst-det: ")]
    assert "step-00000004.pt: can't be written (No space left on device)" in line
    assert not list((tmp_path / "out").rglob("*.tmp"))
    command(0)
