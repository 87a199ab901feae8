"""A loss that is no number in stage two, signals, and a damaged checkpoint."""

import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from nst_det.cli import main
from nst_det.detection import trainer as module
from nst_det.detection.pipeline import train_detector
from nst_det.detection.torchvision.detector import Detector
from nst_det.engine.checkpoint import checkpoints
from nst_det.engine.metrics import read_metrics
from nst_det.engine.nan_guard import read_step
from nst_det.errors import UserError

CALM = {"DATASETS.TEST": [], "MODEL.TIMM.NORM": "BN"}


@pytest.fixture
def taught(taught):
    return {**CALM, **taught}


@pytest.fixture
def poisoned(monkeypatch):
    """Let the weights' scale of a transfer adapter on p3 become infinite in step 4, ``times`` times."""

    def poison(times=math.inf):
        backward, left = module.Trainer.backward, {"times": times}

        def poisoned_backward(self, batch):
            if self.iter == 4 and left["times"] > 0:
                left["times"] -= 1
                terms = self.model.transfer.terms["fitnet"]
                with torch.no_grad():
                    next(terms["p3"].parameters()).fill_(math.inf)
            return backward(self, batch)

        monkeypatch.setattr(module.Trainer, "backward", poisoned_backward)

    return poison


def test_terms_levels_and_images_are_named_and_the_step_runs_again(on_shapes, tmp_path, taught, poisoned, capsys):
    poisoned()
    with pytest.raises(UserError, match="^not finite at step 4: ") as stopped:
        train_detector(on_shapes("run", taught))
    line = str(stopped.value)
    assert "not finite at step 4: loss_transfer_fitnet (p3); images " in line
    file = tmp_path / "run" / "nonfinite" / "step-00000004.pt"
    assert str(file) in line
    content = read_step(file)
    assert content["not_finite"] == ["loss_transfer_fitnet (p3)"]
    assert [item["image_id"] for item in content["batch"]] == content["images"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["replay", str(file)])
    said = capsys.readouterr().out
    assert (left.value.code, "the same as in the run" in said) == (0, True)
    row = next(line.split() for line in said.splitlines() if "loss_rpn_cls" in line)
    # the terms that are finite have the same bits
    assert row[3] == row[5] == f"{content['terms']['loss_rpn_cls']:.9g}"


def test_a_skipped_step_changes_nothing(on_shapes, tmp_path, monkeypatch):
    forward, seen = Detector.forward, []

    def broken(self, batch):
        losses = forward(self, batch)
        if self.training:
            seen.append({name: value.clone() for name, value in self.state_dict().items()})
            if len(seen) == 4:
                losses = {**losses, "loss_cls": losses["loss_cls"] * math.nan}
        return losses

    monkeypatch.setattr(Detector, "forward", broken)
    result = train_detector(on_shapes("run", {**CALM, "SOLVER.NON_FINITE.POLICY": "skip"}))
    assert result["steps"] == 6
    assert all(math.isfinite(value) for value in result["losses"].values())
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["loss_cls"] is None for row in rows] == [False, False, False, True, False, False]
    # seen after each forward pass: the fifth began where the fourth had begun, running statistics included
    name = next(name for name in seen[0] if name.endswith("num_batches_tracked"))
    assert [int(state[name]) for state in seen] == [1, 2, 3, 4, 4, 5]
    weight = next(name for name in seen[0] if name.endswith("fc1.weight"))
    assert torch.equal(seen[3][weight], seen[4][weight])
    assert not torch.equal(seen[4][weight], seen[5][weight])


def test_going_back(on_shapes, tmp_path, taught, poisoned):
    poisoned(times=1)
    train_detector(on_shapes("run", {**taught, "SOLVER.NON_FINITE.POLICY": "back"}))
    monkeyless = read_metrics(tmp_path / "run" / "metrics.jsonl")
    train_detector(on_shapes("whole", {**taught, "SOLVER.NON_FINITE.POLICY": "back"}))
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [row["lr"] for row in monkeyless] == [row["lr"] * (1 if row["step"] < 3 else 0.5) for row in whole]
    assert monkeyless[:3] == whole[:3]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_saves_and_the_same_command_goes_on(on_shapes, tmp_path, monkeypatch, small_words, signum, workers):
    changes = {**CALM, "SOLVER.CHECKPOINT_PERIOD": 100, "DATALOADER.NUM_WORKERS": workers}
    train_detector(on_shapes("whole", changes))
    config = on_shapes("run", changes)
    (tmp_path / "run.yaml").write_text(config.dump())
    command = ["train-det", "--config-file", str(tmp_path / "run.yaml")]
    step = module.Trainer.run_step

    def signalled(self):
        if self.iter == 2:
            os.kill(os.getpid(), signum)
        step(self)

    monkeypatch.setattr(module.Trainer, "run_step", signalled)
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 75
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003.pt"]
    monkeypatch.undo()
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == read_metrics(tmp_path / "run" / "metrics.jsonl")


FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has")


@pytest.mark.parametrize(
    ("step", "error", "resumes"),
    [(4, FULL, "step-00000003.pt"), (1, RuntimeError("CUDA error: device lost\nx"), "no checkpoint")],
)
def test_a_gpu_that_fails_is_one_line_and_the_same_command_goes_on(
    on_shapes, tmp_path, monkeypatch, capsys, step, error, resumes
):
    train_detector(on_shapes("whole", CALM))
    (tmp_path / "run.yaml").write_text(on_shapes("run", CALM).dump())
    command = ["train-det", "--config-file", str(tmp_path / "run.yaml")]
    forward, calls = Detector.forward, []

    def failing(self, batch):
        calls.append(batch)
        if len(calls) == step + 1:
            raise error
        return forward(self, batch)

    monkeypatch.setattr(Detector, "forward", failing)
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(command)
    said = capsys.readouterr().err
    line = said.splitlines()[-1]
    assert (left.value.code, "Traceback" in said, "forward pass in" in said) == (2, False, True)
    assert line.startswith(f"nst-det: {str(error).partition(' GPU 0')[0].partition(chr(10))[0].rstrip('.')}; ")
    assert ("SOLVER.ACCUMULATE" in line) == ("memory" in line)
    assert resumes in line
    monkeypatch.undo()
    if error is FULL:
        # also while it is taken up again: the checkpoint is not at fault
        monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", lambda *_: (_ for _ in ()).throw(FULL))
        with pytest.raises(UserError, match=f"^CUDA out of memory.*{resumes}"):
            train_detector(on_shapes("run", CALM))
        monkeypatch.undo()
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(on_shapes, tmp_path, caplog):
    train_detector(on_shapes("whole", {**CALM, "SOLVER.CHECKPOINT_PERIOD": 2}))
    train_detector(on_shapes("run", {**CALM, "SOLVER.CHECKPOINT_PERIOD": 2}))
    for name in ("result.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    os.utime(newest)
    train_detector(on_shapes("run", {**CALM, "SOLVER.CHECKPOINT_PERIOD": 2}))
    assert f"{newest}: damaged checkpoint (checksum of" in caplog.text
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
