"""A loss that is no number in stage one: named, kept, run again, and met by each policy; signals; a full disk."""

import errno
import logging
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nst_det.cli import main
from nst_det.distillation.build import Teacher
from nst_det.distillation.config import load_distill_config
from nst_det.distillation.pipeline import distill
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine.checkpoint import checkpoints, load_checkpoint
from nst_det.engine.metrics import read_metrics
from nst_det.engine.nan_guard import read_step
from nst_det.errors import UserError

KEYS = {
    "NAME": "small",
    "METHODS": ["ce", "at:1+nst-poly:10"],
    "TRANSFER.LEVELS": ["res3", "res4"],
    "DATA.IMAGE_SIZE": 32,
    "DATA.AUGMENT.SHIFT": 2,
    # dropout: a step that is run again must draw the same
    "STUDENT.ARCH_KWARGS": {"drop_rate": 0.2},
    "TEACHER.ARCH": "nst_resnet10_w32",
    "TEACHER.SOLVER": {"MAX_ITER": 4},
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.BASE_LR": 2e-3,
    "SOLVER.MAX_ITER": 8,
    "SOLVER.IMS_PER_BATCH": 7,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "LOG_PERIOD": 1,
}
FAULTY = 5


def words(images, output, **keys):
    values = {"DATA.ROOT": images, "OUTPUT_DIR": output, "REGISTRY": output / "backbones", **KEYS, **keys}
    return [str(word) for pair in values.items() for word in pair]


def run(images, output, **keys):
    return distill(load_distill_config(None, words(images, output, **keys)))


def weights(results, method):
    return load_file(results[method]["backbone"])


def assert_same_backbones(first, second):
    for word in KEYS["METHODS"]:
        name = f"small-{word}-s0.safetensors"
        one, other = (load_file(folder / "backbones" / name) for folder in (first, second))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def taught(images, tmp_path_factory):
    """An undisturbed run with a teacher."""
    output = tmp_path_factory.mktemp("taught")
    torch.set_num_threads(1)
    return output, run(images, output)


@pytest.fixture
def poisoned(monkeypatch, taught):
    """Keys of a run whose teacher says NaN in one place of res4 about batch ``faulty``, ``times`` times."""

    def poison(times=math.inf, faulty=FAULTY):
        counts = {"seen": 0, "left": times}
        ask = Teacher.__call__

        def asked(self, images, rows):
            said = ask(self, images, rows)
            if len(images) == 7:
                counts["seen"] += 1
                if counts["seen"] > faulty and counts["left"] > 0:
                    counts["left"] -= 1
                    said.maps["res4"] = said.maps["res4"].clone()
                    said.maps["res4"][3, 0, 0, 0] = math.nan
            return said

        monkeypatch.setattr(Teacher, "__call__", asked)
        return {"TEACHER.WEIGHTS": taught[1]["teacher"]["backbone"]}

    return poison


def test_the_first_one_stops_before_the_optimizer_and_can_be_run_again(images, tmp_path, poisoned, capsys):
    keys = poisoned()
    with pytest.raises(UserError, match="at:1\\+nst-poly:10: not finite at step 5: ") as stopped:
        run(images, tmp_path, **keys)
    line = str(stopped.value)
    broken = "at (res4), nst-poly (res4), the teacher's map res4; images train/class"
    assert broken in line
    folder = tmp_path / "students" / "at:1+nst-poly:10"
    file = folder / "nonfinite" / "step-00000005.pt"
    assert f"nst-det replay {file}" in line
    content = read_step(file)
    assert all((images / name).is_file() for name in content["images"])
    assert len(content["images"]) == 7
    assert math.isnan(content["terms"]["at"])
    assert all(bool(value.isfinite().all()) for value in content["model"].values())
    # the checkpoint before is whole, and the same file says the same again, without data and teacher
    assert load_checkpoint(checkpoints(folder / "checkpoints")[-1])["iteration"] == 3
    said = replayed(file, capsys)
    assert "the same as in the run" in said
    assert "at (res4), nst-poly (res4), the teacher's map res4" in said
    # the term that is finite has the same bits
    row = next(line.split() for line in said.splitlines() if " ce " in line)
    assert row[3] == row[5] == f"{content['terms']['ce']:.9g}"


def replayed(file, capsys):
    with pytest.raises(SystemExit) as left:
        main(["replay", str(file)])
    assert left.value.code == 0
    return capsys.readouterr().out


# two batches of seven a step
PARTS = {"SOLVER.IMS_PER_BATCH": 14, "SOLVER.ACCUMULATE": 2}


def test_of_several_parts_the_one_with_the_fault_is_named_and_run_again(images, tmp_path, poisoned, capsys):
    # the first of step 2
    with pytest.raises(UserError) as stopped:
        run(images, tmp_path, **poisoned(times=1, faulty=4), **PARTS)
    broken = "at (res4), nst-poly (res4), the teacher's map res4"
    assert f"not finite at step 2: {broken}; images" in str(stopped.value)
    file = tmp_path / "students" / "at:1+nst-poly:10" / "nonfinite" / "step-00000002.pt"
    content = read_step(file)
    assert (content["piece"], len(content["images"])) == (0, 7)
    said = replayed(file, capsys)
    assert f"not finite now: {broken}\nthe same as in the run" in said
    row = next(line.split() for line in said.splitlines() if " ce " in line)
    assert row[3] == row[5] == f"{content['terms']['ce']:.9g}"


@pytest.mark.parametrize("faulty", [0, 1])
def test_of_several_parts_the_one_with_the_broken_gradient_is_kept(images, tmp_path, monkeypatch, capsys, faulty):
    forward_backward = StudentTrainer.forward_backward

    def infinite(self, images, labels, teacher, part=0):
        broken = self.step == 2 and part == faulty
        bias = dict(self.model.named_parameters())["fc.bias"]
        hook = bias.register_hook(lambda gradient: gradient.fill_(math.inf)) if broken else None
        forward_backward(self, images, labels, teacher, part)
        if hook is not None:
            hook.remove()

    monkeypatch.setattr(StudentTrainer, "forward_backward", infinite)
    with pytest.raises(UserError, match=r"teacher: not finite at step 2: the gradient of fc\.bias; images"):
        run(images, tmp_path, **PARTS, **{"TEACHER.SOLVER": {"MAX_ITER": 4, "IMS_PER_BATCH": 14, "ACCUMULATE": 2}})
    file = tmp_path / "teacher" / "nonfinite" / "step-00000002.pt"
    assert read_step(file)["piece"] == faulty
    assert "the same as in the run" in replayed(file, capsys)


def test_a_step_that_is_skipped_leaves_the_network_as_it_was(images, tmp_path, poisoned, monkeypatch, caplog):
    states = {}
    update = StudentTrainer.update

    def kept(self):
        update(self)
        states[self.word, self.step] = {name: value.clone() for name, value in self.model.state_dict().items()}

    monkeypatch.setattr(StudentTrainer, "update", kept)
    with caplog.at_level(logging.WARNING):
        results = run(images, tmp_path, **poisoned(times=1), **{"SOLVER.NON_FINITE": {"POLICY": "skip"}})
    word = "at:1+nst-poly:10"
    assert "this step is skipped (1 of 3)" in caplog.text
    assert (word, 6) not in states
    assert ("ce", 6) in states
    row = read_metrics(tmp_path / "students" / word / "metrics.jsonl")[5]
    assert (row["step"], row["loss/at"], row["loss/total"]) == (5, None, None)
    assert all(torch.isfinite(value).all() for value in weights(results, word).values())


def test_what_a_forward_pass_changes_is_put_back(images, tmp_path, poisoned, monkeypatch):
    found = {}
    meet = StudentTrainer.handle_nonfinite

    def met(self, *args):
        found["before"] = {name: value.clone() for name, value in self.model.state_dict().items()}
        meet(self, *args)
        found["after"] = {name: value.clone() for name, value in self.model.state_dict().items()}

    monkeypatch.setattr(StudentTrainer, "handle_nonfinite", met)
    run(images, tmp_path, **poisoned(times=1), **{"SOLVER.NON_FINITE": {"POLICY": "skip"}})
    counted = [name for name in found["after"] if name.endswith("num_batches_tracked")]
    assert counted
    for name in counted:
        assert (int(found["before"][name]), int(found["after"][name])) == (6, 5)


def test_going_back_lowers_the_rate_from_the_last_checkpoint_on(images, tmp_path, poisoned, taught):
    back = {"SOLVER.NON_FINITE": {"POLICY": "back", "LR_FACTOR": 0.25}}
    run(images, tmp_path, **poisoned(times=1), **back)
    word = "at:1+nst-poly:10"
    rows = read_metrics(tmp_path / "students" / word / "metrics.jsonl")
    whole = read_metrics(taught[0] / "students" / word / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    rates = {row["step"]: row["lr"] for row in rows if "lr" in row}
    expected = {row["step"]: row["lr"] for row in whole if "lr" in row}
    assert all(rates[step] == expected[step] * (1 if step < 4 else 0.25) for step in expected)
    # the others are not concerned
    other = [read_metrics(folder / "students" / "ce" / "metrics.jsonl") for folder in (tmp_path, taught[0])]
    assert other[0] == other[1]


def test_the_limit_holds(images, tmp_path, poisoned):
    with pytest.raises(UserError, match=r"step 7.*after 2 times skip, SOLVER.NON_FINITE.LIMIT"):
        run(images, tmp_path, **poisoned(), **{"SOLVER.NON_FINITE": {"POLICY": "skip", "LIMIT": 2}})


def test_a_gradient_that_is_no_number_is_named_where_the_loss_is_finite(images, tmp_path, monkeypatch):
    forward_backward = StudentTrainer.forward_backward

    def infinite(self, *args):
        forward_backward(self, *args)
        if self.step == 2:
            dict(self.model.named_parameters())["fc.bias"].grad[1] = math.inf
            self._norm = torch.tensor(math.inf)

    monkeypatch.setattr(StudentTrainer, "forward_backward", infinite)
    with pytest.raises(UserError, match=r"teacher: not finite at step 2: the gradient of fc\.bias; images"):
        run(images, tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_the_same_command_goes_on(images, tmp_path, taught, monkeypatch, signum):
    update = StudentTrainer.update

    def signalled(self):
        if self.word == "ce" and self.step == 2:
            os.kill(os.getpid(), signum)
        update(self)

    monkeypatch.setattr(StudentTrainer, "update", signalled)
    (tmp_path / "c.yaml").write_text("SEED: 0\n")
    keys = {"SOLVER.CHECKPOINT_PERIOD": 100, "TEACHER.WEIGHTS": taught[1]["teacher"]["backbone"]}
    command = ["distill", "--config-file", str(tmp_path / "c.yaml"), *words(images, tmp_path / "out", **keys)]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 75
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    for word in KEYS["METHODS"]:
        folder = tmp_path / "out" / "students" / word
        assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-00000003.pt"]
    monkeypatch.undo()
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 0
    assert_same_backbones(taught[0], tmp_path / "out")
    for word in KEYS["METHODS"]:
        rows = [read_metrics(folder / "students" / word / "metrics.jsonl") for folder in (taught[0], tmp_path / "out")]
        assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("step", "error", "resumes"),
    [
        (5, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), "step-00000004.pt"),
        (1, RuntimeError("CUDA error: unspecified launch failure\nx"), "no checkpoint"),
    ],
)
def test_a_gpu_that_fails_is_one_line_and_the_same_command_goes_on(
    images, tmp_path, taught, monkeypatch, capsys, step, error, resumes
):
    forward_backward = StudentTrainer.forward_backward

    def failing(self, *args):
        if (self.word, self.step) == ("at:1+nst-poly:10", step):
            raise error
        forward_backward(self, *args)

    monkeypatch.setattr(StudentTrainer, "forward_backward", failing)
    (tmp_path / "c.yaml").write_text("SEED: 0\n")
    keys = {"TEACHER.WEIGHTS": taught[1]["teacher"]["backbone"]}
    command = ["distill", "--config-file", str(tmp_path / "c.yaml"), *words(images, tmp_path / "out", **keys)]
    with pytest.raises(SystemExit) as left:
        main(command)
    said = capsys.readouterr().err
    line = said.splitlines()[-1]
    assert (left.value.code, "Traceback" in said, "forward pass in" in said) == (2, False, True)
    assert line.startswith(f"nst-det: {str(error).splitlines()[0].rstrip('.')}; ")
    assert ("SOLVER.ACCUMULATE" in line) == ("memory" in line)
    assert line.endswith(resumes) or ("no checkpoint" in line and resumes == "no checkpoint")
    if step == 5:
        assert str(tmp_path / "out" / "students" / "ce" / "checkpoints" / resumes) in line
    monkeypatch.undo()
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 0
    assert_same_backbones(taught[0], tmp_path / "out")


def test_a_full_disk_is_one_line_and_the_last_good_state_stays(images, tmp_path, taught, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text("SEED: 0\n")
    keys = {"TEACHER.WEIGHTS": taught[1]["teacher"]["backbone"]}
    command = ["distill", "--config-file", str(tmp_path / "c.yaml"), *words(images, tmp_path / "out", **keys)]
    replace, room = os.replace, {"left": 9}

    def full(source, target):
        if Path(target).suffix == ".pt":
            room["left"] -= 1
            if room["left"] < 6:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nst-det: ")]
    assert len(said) == 1
    assert "step-00000004.pt: can't be written (No space left on device); free some space" in said[0]
    assert not list((tmp_path / "out").rglob("*.tmp"))
    monkeypatch.undo()
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 0
    assert_same_backbones(taught[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
