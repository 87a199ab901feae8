"""Signals, damaged checkpoints, losses that are no number and a full disk with Detectron2's trainer."""

import math
import os
import pickle
import re
import shutil
import signal
import struct
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

from safetensors.torch import load_file  # noqa: E402

from nst_det.detect.detectron2 import DistillTrainer  # noqa: E402
from nst_det.runtime.metrics import read_metrics  # noqa: E402
from nst_det.runtime.replayed import read_step  # noqa: E402

SIDES = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
CHUNKS = ((b"IHDR", SIDES), (b"IDAT", zlib.compress(b"x")), (b"IEND", b""))
PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in CHUNKS
)


def same_run(one, other):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_metrics(one / "metrics.jsonl") == read_metrics(other / "metrics.jsonl")


@pytest.fixture(scope="module")
def whole(command, tiny_yaml, tmp_path_factory):
    """An undisturbed run without evaluation."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert command("--config-file", tiny_yaml, "DATASETS.TEST", "[]", "OUTPUT_DIR", folder) == 0
    return folder


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(command, tiny_yaml, whole, tmp_path, monkeypatch, signum):
    folder, run_step = tmp_path / "run", DistillTrainer.run_step

    def signalled(self):
        if self.iter == 1:
            os.kill(os.getpid(), signum)
        run_step(self)

    monkeypatch.setattr(DistillTrainer, "run_step", signalled)
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "OUTPUT_DIR", folder]
    assert command(*words) == 75
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    monkeypatch.undo()
    assert command(*words) == 0
    same_run(folder, whole)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(command, tiny_yaml, whole, tmp_path, capfd):
    folder = tmp_path / "run"
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "OUTPUT_DIR", folder]
    assert command(*words) == 0
    for name in ("result.json", "model.safetensors", "model_final.pth"):
        (folder / name).unlink()
    newest = folder / "model_0000005.pth"
    (folder / "last_checkpoint").write_text(newest.name)
    os.truncate(newest, newest.stat().st_size // 2)
    capfd.readouterr()
    assert command(*words) == 0
    assert f"{newest}: damaged checkpoint, or not one" in capfd.readouterr().err
    same_run(folder, whole)


def test_a_loss_that_is_no_number_is_one_line_with_images_and_file(command, tiny_yaml, tmp_path, monkeypatch, capfd):
    from nst_det.detect.detectron2 import trainer as module

    see = module.DistillTrainer._see_losses

    def poisoned(self, model, inputs, losses):
        if self.iter == 2:
            with torch.no_grad():
                losses["loss_cls"].mul_(math.nan)
        see(self, model, inputs, losses)

    monkeypatch.setattr(module.DistillTrainer, "_see_losses", poisoned)
    folder = tmp_path / "run"
    assert command("--config-file", tiny_yaml, "DATASETS.TEST", "[]", "OUTPUT_DIR", folder) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    line = said.strip().splitlines()[-1]
    file = folder / "nonfinite" / "step-00000002.pt"
    assert line.startswith("nst-det: not finite at step 2: loss_cls; images i")
    assert f"nst-det replay {file}" in line
    content = read_step(file)
    assert content["not_finite"] == ["loss_cls"]
    assert {"image", "boxes", "labels"} <= set(content["batch"][0])


@pytest.fixture
def poisoned(monkeypatch):
    """Let a loss be no number in the next run's step, ``times`` times."""

    def poison(step, times=1):
        see, left = DistillTrainer._see_losses, [step] * times

        def poisoned_losses(self, model, inputs, losses):
            if self.iter in left:
                left.remove(self.iter)
                with torch.no_grad():
                    losses["loss_cls"].mul_(math.nan)
            see(self, model, inputs, losses)

        monkeypatch.setattr(DistillTrainer, "_see_losses", poisoned_losses)

    return poison


def test_a_step_that_is_passed_over_changes_nothing_but_the_batch(command, tiny_yaml, whole, tmp_path, poisoned):
    poisoned(step=2)
    folder = tmp_path / "run"
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "SOLVER.NON_FINITE.POLICY", "skip"]
    assert command(*words, "OUTPUT_DIR", folder) == 0
    rows, undisturbed = (read_metrics(path / "metrics.jsonl") for path in (folder, whole))
    assert [row["lr"] for row in rows] == [row["lr"] for row in undisturbed]
    assert rows[:2] == undisturbed[:2]
    assert ["total_loss" in row for row in rows] == [True, True, False, True, True, True]
    # the forward pass of the step that was not made left its mark neither in weights nor in running statistics
    states = [torch.load(path / "model_0000002.pth") for path in (folder, whole)]
    names = [name for name in states[0]["model"] if name.endswith("num_batches_tracked")]
    assert {int(state["model"][names[0]]) for state in states} == {2, 3}
    assert states[0]["trainer"]["non_finite"]["count"] == 1


def test_too_many_steps_to_pass_over(command, tiny_yaml, tmp_path, poisoned, capfd):
    poisoned(step=1)
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "SOLVER.NON_FINITE.POLICY", "skip"]
    assert command(*words, "SOLVER.NON_FINITE.LIMIT", 1, "SOLVER.MAX_ITER", 3, "OUTPUT_DIR", tmp_path / "run") == 0
    poisoned(step=1)
    poisoned(step=2)
    assert command(*words, "SOLVER.NON_FINITE.LIMIT", 1, "OUTPUT_DIR", tmp_path / "other") == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "not finite at step 2: loss_cls; " in line
    assert "(after 1 times skip, SOLVER.NON_FINITE.LIMIT)" in line


@pytest.mark.parametrize(("step", "again"), [(1, 0), (4, 3)])
def test_going_back(command, tiny_yaml, whole, tmp_path, poisoned, step, again):
    poisoned(step)
    folder = tmp_path / "run"
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "SOLVER.NON_FINITE.POLICY", "back"]
    assert command(*words, "OUTPUT_DIR", folder) == 0
    rows, undisturbed = (read_metrics(path / "metrics.jsonl") for path in (folder, whole))
    assert rows[:again] == undisturbed[:again]
    assert [row["lr"] for row in rows] == [row["lr"] * (0.5 if row["step"] >= again else 1) for row in undisturbed]
    # the first step after it sees the same batch with the same weights
    assert rows[again] == {**undisturbed[again], "lr": rows[again]["lr"]}
    assert all("total_loss" in row for row in rows)


def test_a_run_that_went_back_keeps_its_rate_when_it_is_stopped(command, tiny_yaml, tmp_path, poisoned, monkeypatch):
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "SOLVER.NON_FINITE.POLICY", "back"]
    poisoned(step=4)
    assert command(*words, "OUTPUT_DIR", tmp_path / "whole") == 0
    poisoned(step=4)
    run_step, seen = DistillTrainer.run_step, []

    def stopped(self):
        seen.append(self.iter)
        if seen.count(3) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        run_step(self)

    monkeypatch.setattr(DistillTrainer, "run_step", stopped)
    assert command(*words, "OUTPUT_DIR", tmp_path / "run") == 75
    monkeypatch.undo()
    assert command(*words, "OUTPUT_DIR", tmp_path / "run") == 0
    same_run(tmp_path / "run", tmp_path / "whole")


def test_pickled_weights_only_where_they_are_trusted(command, tiny_yaml, whole, tmp_path, capfd):
    weights = {name: value.numpy() for name, value in load_file(whole / "model.safetensors").items()}
    file = tmp_path / "zoo.pkl"
    file.write_bytes(pickle.dumps({"model": weights, "__author__": "x", "seed": np.zeros(1)}))
    words = ["--config-file", tiny_yaml, "MODEL.WEIGHTS", file, "DATASETS.TEST", "[]", "SOLVER.MAX_ITER", 1]
    assert command(*words, "OUTPUT_DIR", tmp_path / "one") == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"nst-det: {file}: not opened: it is a pickle")
    assert command("--trust-pickle", *words, "OUTPUT_DIR", tmp_path / "two") == 0


def test_a_full_disk_is_one_line(command, tiny_yaml, tmp_path, monkeypatch, capfd):
    replace = os.replace

    def full(source, target):
        if str(target).endswith("model_0000005.pth"):
            raise OSError(28, os.strerror(28), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    folder = tmp_path / "run"
    assert command("--config-file", tiny_yaml, "DATASETS.TEST", "[]", "OUTPUT_DIR", folder) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "model_0000005.pth: can't be written (No space left on device)" in said.strip().splitlines()[-1]
    assert (folder / "last_checkpoint").read_text() == "model_0000002.pth"
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("cached", [1024, 0])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_too_large_or_damaged_is_named(command, voc_root, tiny_yaml, tmp_path, capfd, cached, workers):
    root = tmp_path / "voc"
    shutil.copytree(voc_root, root)
    (tmp_path / "c.yaml").write_text(tiny_yaml.read_text().replace(str(voc_root), str(root)))
    words = ["--config-file", tmp_path / "c.yaml", "DATALOADER.CACHE_IMAGES_MB", cached]
    words += ["DATALOADER.NUM_WORKERS", workers, "DATASETS.TEST", "[]"]
    for number, content in enumerate((PNG, b"no image")):
        for path in (root / "JPEGImages").iterdir():
            path.write_bytes(content)
        assert command(*words, "OUTPUT_DIR", tmp_path / f"run{number}") == 2
        line = capfd.readouterr().err.strip().splitlines()[-1]
        says = ("100000x100000 is more than|more than 80000000 pixels", "can't be decoded as an image")[number]
        assert re.search(rf"^nst-det: {root}/JPEGImages/i\d+\.jpg: .*({says})", line), line
        assert "Traceback" not in line
