"""Signals, damaged checkpoints, pickles and a full disk with Detectron2's trainer."""

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

from nst_det.detectron2 import DistillTrainer  # noqa: E402
from nst_det.detectron2.hooks import FiniteCheck  # noqa: E402

SIDES = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
CHUNKS = ((b"IHDR", SIDES), (b"IDAT", zlib.compress(b"x")), (b"IEND", b""))
PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in CHUNKS
)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(
    command, same_run, tiny_yaml, whole, tmp_path, monkeypatch, signum
):
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


@pytest.mark.parametrize(
    ("step", "error", "resumes"),
    [
        (4, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), "model_0000002.pth"),
        (1, RuntimeError("CUDA error: device lost\nx"), "no checkpoint"),
    ],
)
def test_a_gpu_that_fails_is_one_line_and_the_same_command_goes_on(
    command, same_run, tiny_yaml, whole, tmp_path, monkeypatch, capfd, step, error, resumes
):
    folder, see = tmp_path / "run", FiniteCheck.see_batch

    def failing(self, *args):
        if self.trainer.iter == step:
            raise error
        see(self, *args)

    monkeypatch.setattr(FiniteCheck, "see_batch", failing)
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "OUTPUT_DIR", folder]
    assert command(*words) == 2
    said = capfd.readouterr()
    line = said.err.strip().splitlines()[-1]
    assert "Traceback" not in said.err
    assert "forward pass in" in said.err + said.out
    assert line.startswith(f"nst-det: {str(error).splitlines()[0].rstrip('.')}; ")
    assert ("SOLVER.IMS_PER_BATCH" in line) == ("memory" in line)
    assert f"from step 3, {folder / resumes}" in line or ("no checkpoint" in line and resumes == "no checkpoint")
    monkeypatch.undo()
    assert command(*words) == 0
    same_run(folder, whole)


def test_the_checkpoint_before_a_damaged_one_is_taken(command, same_run, tiny_yaml, whole, tmp_path, capfd):
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
