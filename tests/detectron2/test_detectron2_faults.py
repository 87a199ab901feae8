"""Signals, GPU errors, damaged files, a full disk, and losses that are not finite, with Detectron2's trainer."""

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

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from safetensors.torch import load_file

from nst_det.engine.metrics import read_metrics
from nst_det.engine.nan_guard import read_step

SIDES = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
CHUNKS = ((b"IHDR", SIDES), (b"IDAT", zlib.compress(b"x")), (b"IEND", b""))
PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in CHUNKS
)


@pytest.fixture
def last_line(capfd):
    """``last_line()``: of the standard error; there is no traceback in it."""

    def line():
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        return printed.strip().splitlines()[-1]

    return line


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes(train, same_run, whole, tmp_path, at_step, signum):
    folder = tmp_path / "run"
    with at_step(1, lambda _: os.kill(os.getpid(), signum)):
        assert train(folder) == 75
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    assert train(folder) == 0
    same_run(folder, whole)


@pytest.mark.parametrize(
    ("step", "error", "resumes"),
    [
        (4, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), "model_0000002.pth"),
        (1, RuntimeError("CUDA error: device lost\nx"), "no checkpoint"),
    ],
)
def test_a_gpu_that_fails(train, same_run, whole, tmp_path, at_step, last_line, step, error, resumes):
    folder = tmp_path / "run"

    def fail(_):
        raise error

    with at_step(step, fail):
        assert train(folder) == 2
    line = last_line()
    assert line.startswith(f"nst-det: {str(error).splitlines()[0].rstrip('.')}; ")
    assert ("SOLVER.IMS_PER_BATCH" in line) == ("memory" in line)
    assert resumes in line
    assert train(folder) == 0
    same_run(folder, whole)


def test_the_checkpoint_before_a_damaged_one_is_taken(train, same_run, whole, tmp_path, capfd):
    folder = tmp_path / "run"
    assert train(folder) == 0
    for name in ("result.json", "model.safetensors", "model_final.pth"):
        (folder / name).unlink()
    newest = folder / "model_0000005.pth"
    (folder / "last_checkpoint").write_text(newest.name)
    os.truncate(newest, newest.stat().st_size // 2)
    capfd.readouterr()
    assert train(folder) == 0
    assert f"{newest}: damaged checkpoint" in capfd.readouterr().err
    same_run(folder, whole)


def test_pickled_weights_only_where_they_are_trusted(train, whole, tmp_path, last_line):
    weights = {name: value.numpy() for name, value in load_file(whole / "model.safetensors").items()}
    file = tmp_path / "zoo.pkl"
    file.write_bytes(pickle.dumps({"model": weights, "__author__": "x", "seed": np.zeros(1)}))
    words = ["MODEL.WEIGHTS", file, "SOLVER.MAX_ITER", 1]
    assert train(tmp_path / "one", *words) == 2
    assert last_line().startswith(f"nst-det: {file}: ")
    assert train(tmp_path / "two", *words, flags=["--trust-pickle"]) == 0


def test_a_full_disk(train, tmp_path, monkeypatch, last_line):
    replace, folder = os.replace, tmp_path / "run"

    def full(source, target):
        if str(target).endswith("model_0000005.pth"):
            raise OSError(28, os.strerror(28), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert train(folder) == 2
    assert re.search("model_0000005.pth: .*No space left", last_line())
    assert (folder / "last_checkpoint").read_text() == "model_0000002.pth"
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("cached", [1024, 0])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("content", "fault"), [(PNG, "80000000 pixels|100000x100000"), (b"no image", "no JPEG")])
def test_an_image_is_too_large_or_damaged(
    train, voc_root, tiny_yaml, tmp_path, last_line, cached, workers, content, fault
):
    root, config = tmp_path / "voc", tmp_path / "c.yaml"
    shutil.copytree(voc_root, root)
    config.write_text(tiny_yaml.read_text().replace(str(voc_root), str(root)))
    for path in (root / "JPEGImages").iterdir():
        path.write_bytes(content)
    words = ["DATALOADER.CACHE_IMAGES_MB", cached, "DATALOADER.NUM_WORKERS", workers]
    assert train(tmp_path / "run", *words, file=config) == 2
    line = last_line()
    assert re.search(rf"^nst-det: {root}/JPEGImages/i\d+\.jpg: .*({fault})", line), line


def test_a_loss_that_is_not_finite(train, tmp_path, poisoned, last_line):
    poisoned(5)
    folder = tmp_path / "run"
    assert train(folder, test=True) == 2
    line, file = last_line(), folder / "nonfinite" / "step-00000005.pt"
    assert line.startswith("nst-det: not finite at step 5: loss_cls; images i")
    assert f"nst-det replay {file}" in line
    content = read_step(file)
    assert content["not_finite"] == ["loss_cls"]
    assert {"image", "boxes", "labels"} <= set(content["batch"][0])
    # a last step that failed is not evaluated
    assert not (folder / "inference").exists()


@pytest.mark.parametrize(
    ("part", "named", "first"),
    [
        ("roi_heads.box_predictor.cls_score.bias", "loss_cls", "student.roi_heads.box_predictor.cls_score"),
        (
            "proposal_generator.rpn_head.objectness_logits.weight",
            "the RPN's proposals (Predicted boxes or scores contain Inf/NaN. Training has diverged.)",
            "student.proposal_generator.rpn_head.objectness_logits",
        ),
        ("", "loss_transfer_fitnet (p3)", "transfer.terms.fitnet.p3"),
    ],
)
def test_the_step_runs_again(train, cli, taught, tmp_path, at_step, capfd, part, named, first):
    def poison(trainer):
        adapter = trainer.distilled.transfer.terms["fitnet"]["p3"]
        parameter = trainer.student.get_parameter(part) if part else next(adapter.parameters())
        with torch.no_grad():
            parameter.fill_(math.inf)

    folder = tmp_path / "run"
    with at_step(2, poison):
        assert train(folder, *taught("fitnet+nst-poly", ["p2", "p3"]), "TRANSFER.WARMUP_ITERS", 5) == 2
    assert f"not finite at step 2: {named}; images i" in capfd.readouterr().err
    file = folder / "nonfinite" / "step-00000002.pt"
    content = read_step(file)
    assert cli("replay", file) == 0
    printed = capfd.readouterr().out
    assert f"not finite now: {named}\nthe same as in the run\nfirst in the layer {first}" in printed
    assert f"images: {', '.join(content['images'])}" in printed
    assert len(content["images"]) == 2
    terms = {name: value for name, value in content["terms"].items() if math.isfinite(value)}
    for name, value in terms.items():
        row = next(line.split() for line in printed.splitlines() if name in line)
        # the same bits, of anchors and proposals that are drawn too
        assert row[3] == row[5] == f"{value:.9g}"
    assert ("loss_rpn_cls" in terms) == ("RPN" not in named)


@pytest.fixture
def changed_step(train, cli, tmp_path, poisoned, last_line):
    """``changed_step(change, *words)``: the last line of a step's file run again, after ``change(content)``."""

    def replayed(change, *words):
        if not (tmp_path / "run").exists():
            poisoned(0)
            assert train(tmp_path / "run") == 2
            last_line()
        content = torch.load(tmp_path / "run" / "nonfinite" / "step-00000000.pt")
        change(content)
        torch.save(content, tmp_path / "changed.pt")
        assert cli("replay", *words, tmp_path / "changed.pt") == 2
        return last_line()

    return replayed


def test_a_strangers_step_runs_no_code(changed_step, tiny_yaml, tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "teacher.py").write_text(f"open({str(ran)!r}, 'w')\n")
    (tmp_path / "teacher.yaml").write_text(f"A: !!python/object/apply:os.mkdir [{ran}]\n")
    (tmp_path / "teacher.pkl").write_bytes(pickle.dumps({"model": {"x": np.zeros(1)}}))

    def taught_by(config_file, weights=""):
        def change(content):
            content["config"]["TRUST_PICKLE"] = True
            content["config"]["TRANSFER"]["LEVELS"] = ["p2"]
            content["config"]["METHOD"] = "at"
            content["config"]["TEACHER"] |= {"CONFIG_FILE": str(config_file), "WEIGHTS": str(weights)}

        return change

    assert re.search("teacher.py: .*Python code", changed_step(taught_by(tmp_path / "teacher.py")))
    assert re.search("teacher.yaml: .*Python code", changed_step(taught_by(tmp_path / "teacher.yaml")))
    assert re.search("teacher.pkl: .*pickle", changed_step(taught_by(tiny_yaml, tmp_path / "teacher.pkl")))
    assert not ran.exists()
    assert "teacher.py: a LazyConfig" in changed_step(taught_by(tmp_path / "teacher.py"), "--trust-pickle")
    assert ran.exists()


def test_a_step_that_can_not_run_again(changed_step):
    for name in ("config", "batch", "model", "rank"):
        assert f"'{name}'" in changed_step(lambda content, name=name: content.pop(name))
    assert "masks" in changed_step(lambda content: content["config"]["MODEL"].update(MASK_ON=True))


def test_a_skipped_step_changes_nothing_but_the_batch(train, whole, tmp_path, poisoned):
    poisoned(2)
    folder = tmp_path / "run"
    assert train(folder, "SOLVER.NON_FINITE.POLICY", "skip") == 0
    rows, undisturbed = (read_metrics(path / "metrics.jsonl") for path in (folder, whole))
    assert [row["lr"] for row in rows] == [row["lr"] for row in undisturbed]
    assert rows[:2] == undisturbed[:2]
    assert ["total_loss" in row for row in rows] == [True, True, False, True, True, True]
    # the forward pass of the step that was not made left its mark neither in weights nor in running statistics
    states = [torch.load(path / "model_0000002.pth") for path in (folder, whole)]
    counter = next(name for name in states[0]["model"] if name.endswith("num_batches_tracked"))
    assert [int(state["model"][counter]) for state in states] == [2, 3]
    assert states[0]["trainer"]["non_finite"]["count"] == 1


def test_too_many_steps_to_skip(train, tmp_path, poisoned, last_line):
    words = ["SOLVER.NON_FINITE.POLICY", "skip", "SOLVER.NON_FINITE.LIMIT", 1]
    poisoned(1, 2)
    assert train(tmp_path / "run", *words) == 2
    line = last_line()
    assert "not finite at step 2: loss_cls; " in line
    assert "SOLVER.NON_FINITE.LIMIT" in line


@pytest.mark.parametrize(("step", "again"), [(1, 0), (4, 3)])
def test_rolling_back(train, same_run, whole, tmp_path, poisoned, at_step, step, again):
    words = ["SOLVER.NON_FINITE.POLICY", "back"]
    poisoned(step)
    assert train(tmp_path / "run", *words) == 0
    rows, undisturbed = (read_metrics(path / "metrics.jsonl") for path in (tmp_path / "run", whole))
    assert rows[:again] == undisturbed[:again]
    assert [row["lr"] for row in rows] == [row["lr"] * (0.5 if row["step"] >= again else 1) for row in undisturbed]
    # the first step after it sees the same batch with the same weights
    assert rows[again] == {**undisturbed[again], "lr": rows[again]["lr"]}
    assert all("total_loss" in row for row in rows)

    # stopped after that, it keeps its rate
    poisoned(step)
    seen = []

    def stop(trainer):
        seen.append(trainer.iter)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with at_step(again, stop):
        assert train(tmp_path / "stopped", *words) == 75
    assert train(tmp_path / "stopped", *words) == 0
    same_run(tmp_path / "stopped", tmp_path / "run")
