"""A run of stage one: its files, its metrics, what it refuses, and that it resumes to the same bits."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as F

from nst_det.distillation import build, loop
from nst_det.distillation.build import Teacher, TeacherView, build_losses, copy_of, initial_student, initial_teacher
from nst_det.distillation.config import load_distill_config
from nst_det.distillation.loop import Unread, one_step
from nst_det.distillation.pipeline import StageOne, distill
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine.checkpoint import checkpoints
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.trainer import Clock
from nst_det.errors import UserError
from nst_det.losses.loss_balance import GradientBalance
from nst_det.models import Card, create_model, input_contract, load_card, prove_parity, save_backbone
from tests.helpers.hub import NAME, REPO, offline_cache, snapshot, weights
from tests.helpers.stage_one import METHODS, STEPS, assert_same_run, config, metrics, overrides, run

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "distill"


def test_results_and_cards(finished):
    output, results = finished
    assert list(results) == ["teacher", *METHODS]
    assert (output / "config.yaml").exists()
    for method in METHODS:
        folder, result = output / "students" / method, results[method]
        assert json.loads((folder / "result.json").read_text()) == result
        assert json.loads((folder / "config.json").read_text())["METHOD"] == method
        assert set(result["speed"]) == {"images_per_second", "data_wait"}
        assert 0 < result["speed"]["data_wait"] < 1
        # trained side by side: as fast as each other
        assert result["speed"] == results["ce"]["speed"] != results["teacher"]["speed"]
        assert (folder / "provenance.json").exists()
        assert checkpoints(folder / "checkpoints") == []
        assert result["name"] == f"small-{method}-s0"
        assert result["backbone"] == str(output / "backbones" / f"small-{method}-s0.safetensors")
        card = load_card(result["backbone"])
        assert (card.method, card.seed, card.steps, card.top1) == (method, 0, STEPS, result["top1"])
        assert (card.classes, card.input["size"]) == (["class0", "class1", "class2"], 32)
        assert (card.sha256, card.arch_kwargs) == (result["sha256"], {"drop_rate": 0.2})
        assert (card.data["images"], card.data["validation_images"]) == (24, 12)
        assert prove_parity(result["backbone"]) == 0
    card, teacher = load_card(results["kd+nst-poly"]["backbone"]), results["teacher"]
    assert card.weights == {"kd": 1.0, "nst-poly": 10.0}
    measured = {"top1": teacher["top1"], "sha256": teacher["sha256"]}
    assert card.teacher == {"name": "small-teacher", "arch": "nst_resnet10_w32", **measured}
    assert load_card(results["ce"]["backbone"]).teacher == {}
    assert len({results[method]["sha256"] for method in METHODS}) == len(METHODS)


def test_metrics_have_each_term_by_itself(finished):
    output, results = finished
    rows, result = metrics(output, "kd+nst-poly"), results["kd+nst-poly"]
    losses = [row for row in rows if "loss/total" in row]
    assert [row["step"] for row in losses] == list(range(STEPS))
    for row in losses:
        parts = row["loss/ce"] + row["loss/kd"] + row["loss/nst-poly"]
        assert row["loss/total"] == pytest.approx(parts, rel=1e-5)
        # the levels of a term, before its weight; kd has none
        levels = {name: value for name, value in row.items() if name.startswith("level/")}
        assert {name.partition("@")[0] for name in levels} == {"level/nst-poly"}
        assert row["loss/nst-poly"] == pytest.approx(10 * sum(levels.values()), rel=1e-5)
    assert losses[0]["lr"] == pytest.approx(2e-3 * 0.001)
    measured = [row for row in rows if "val/top1" in row]
    assert [row["step"] for row in measured] == [2, 5, 7]
    assert measured[-1]["val/top1"] == result["top1"]
    best = max(row["val/top1"] for row in measured)
    assert result["top1_best"] == best
    assert result["step_best"] == next(row["step"] + 1 for row in measured if row["val/top1"] == best)
    first = {metrics(output, method)[0]["loss/ce"] for method in METHODS}
    assert len(first) == 1, "same weights, same batch, same dropout"


def test_a_method_added_later_trains_on_the_same_batches(finished, images, tmp_path, taught):
    output, results = finished
    run(images, tmp_path, METHODS=["ce"])
    assert not (tmp_path / "teacher").exists(), "labels alone need no teacher"
    before = (tmp_path / "students" / "ce" / "result.json").stat().st_mtime_ns
    others = run(images, tmp_path, METHODS=["kd+nst-poly", "ce"], **taught)
    assert list(others) == ["teacher", "kd+nst-poly", "ce"]
    assert (tmp_path / "students" / "ce" / "result.json").stat().st_mtime_ns == before
    assert_same_run(output, tmp_path, results, others, ["ce", "kd+nst-poly"])


class Stop(Exception):
    pass


@contextmanager
def stopped(monkeypatch, name, step, where="update"):
    """The block ends where the student at ``step`` would call ``where``."""
    real = getattr(StudentTrainer, where)

    def stopping(self):
        if (self.name, self.step) == (name, step):
            raise Stop
        real(self)

    with monkeypatch.context() as patch, suppress(Stop):
        patch.setattr(StudentTrainer, where, stopping)
        yield
        pytest.fail("it was not stopped")


@pytest.mark.parametrize(
    ("where", "name", "step"),
    [("update", "fitnet", 5), ("save", "fitnet", 4), ("save", "ce", 8), ("update", "teacher", 7)],
)
def test_a_stopped_run_resumes_to_the_same_bits(finished, images, tmp_path, monkeypatch, where, name, step):
    output, results = finished
    with stopped(monkeypatch, name, step, where):
        run(images, tmp_path)
    if (where, name) == ("save", "fitnet"):
        ahead = [checkpoints(tmp_path / "students" / method / "checkpoints") for method in ("ce", "fitnet")]
        assert ahead[0] != [] == ahead[1], "the students are at different steps"
    assert_same_run(output, tmp_path, results, run(images, tmp_path))
    assert metrics(output, "../teacher") == metrics(tmp_path, "../teacher")


def test_a_damaged_newest_checkpoint_costs_two_steps_only(finished, images, tmp_path, monkeypatch, caplog):
    output, results = finished
    with stopped(monkeypatch, "ce", 7):
        run(images, tmp_path, **{"SOLVER.CHECKPOINT_PERIOD": 2})
    newest = checkpoints(tmp_path / "students" / "ce" / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    others = run(images, tmp_path)
    assert str(newest) in caplog.text
    assert_same_run(output, tmp_path, results, others)


@pytest.mark.slow
def test_sigkill_and_again(finished, images, tmp_path):
    (tmp_path / "c.yaml").write_text("SEED: 0\n")
    command = [sys.executable, "-m", "nst_det", "distill", "--config-file", str(tmp_path / "c.yaml")]
    command += overrides(images, tmp_path / "out", **{"SOLVER.CHECKPOINT_PERIOD": 1})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    students = tmp_path / "out" / "students"
    deadline = time.monotonic() + 120
    while process.poll() is None and not checkpoints(students / "fitnet/checkpoints") and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (students / "fitnet" / "result.json").exists(), "killed too late to show anything"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "kd+nst-poly" in done.stdout
    for method in METHODS:
        other = json.loads((students / method / "result.json").read_text())
        assert other["sha256"] == finished[1][method]["sha256"]


def test_log_of_shapes_and_balance(images, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    keys = {"TRANSFER.WEIGHTS": {"fitnet": 1e4}, "TRANSFER.TERM_LEVELS": {"fitnet": ["res3:res4"]}}
    run(images, tmp_path, **keys, **{"SOLVER.MAX_ITER": 2})
    lines = [record.getMessage() for record in caplog.records]
    shapes, teacher, balance = (
        next(index for index, text in enumerate(lines) if text.startswith(start))
        for start in ("compared at 32 x 32 pixels", "teacher small-teacher: top-1", "terms against the labels' loss")
    )
    assert shapes < teacher < balance, "shapes are known before hours of training"
    assert "fitnet     res3: 64 x 4 x 4, stride 8     res4: 128 x 2 x 2, stride 16   student averaged" in lines[shapes]
    assert lines[shapes].count("nst-poly") == 2
    named = [line.split()[:2] for line in lines[balance].splitlines()[3:]]
    assert named == [["fitnet", "fitnet"], ["kd+nst-poly", "kd"], ["kd+nst-poly", "nst-poly"]]
    # the last plain line has every student's terms
    last = metrics(tmp_path, "kd+nst-poly")[-2]
    terms = "  ".join(f"{name} {last[f'loss/{name}']:.4g}" for name in ("total", "ce", "kd", "nst-poly"))
    line = next(text for text in lines if " 2/2 " in text and "kd+nst-poly" in text)
    assert line.endswith(f"; kd+nst-poly: {terms}")
    assert "  ce: total " in line
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in warnings if text.startswith("fitnet: the gradient of fitnet")]) == 1


def test_measuring_the_first_step_does_not_change_the_run(finished, images, tmp_path, monkeypatch):
    output, results = finished
    monkeypatch.setattr(GradientBalance, "wants", lambda *_: False)
    assert_same_run(output, tmp_path, results, run(images, tmp_path))


def test_auto_weight_is_in_card_and_result_and_resumes_to_the_same_bits(images, tmp_path, monkeypatch, taught):
    auto, methods = {"TRANSFER.AUTO_WEIGHT": {"nst-poly": 0.5}}, ["ce", "kd+nst-poly"]
    keys = {**taught, **auto, "METHODS": methods, "SOLVER.CHECKPOINT_PERIOD": 3}
    results = run(images, tmp_path / "whole", **keys)
    # three of the five steps are measured by then
    with stopped(monkeypatch, "kd+nst-poly", 3):
        run(images, tmp_path / "part", **keys)
    others = run(images, tmp_path / "part", **keys)
    assert_same_run(tmp_path / "whole", tmp_path / "part", results, others, methods)
    card = load_card(results["kd+nst-poly"]["backbone"])
    assert card.weights == results["kd+nst-poly"]["weights"] == others["kd+nst-poly"]["weights"]
    assert card.weights["kd"] == 1.0
    assert card.weights["nst-poly"] not in (10.0, 50.0)
    # it concerns the methods with that term alone
    without = {**keys, "TRANSFER.AUTO_WEIGHT": {}}
    assert run(images, tmp_path / "whole", **{**without, "METHODS": ["ce"]})["ce"]
    with pytest.raises(UserError, match=r"TRANSFER.AUTO_WEIGHT.nst-poly"):
        run(images, tmp_path / "whole", **without)


def test_transfer_terms_rise_over_the_warm_up(images, tmp_path, taught):
    keys = {**taught, "METHODS": ["at:1000"], "SOLVER.BASE_LR": 1e-12}
    run(images, tmp_path / "a", **keys)
    run(images, tmp_path / "b", **keys, **{"TRANSFER.WARMUP_ITERS": 4})
    rows = [[row["loss/at"] for row in metrics(tmp_path / name, "at:1000") if "lr" in row] for name in "ab"]
    assert [b / a for a, b in zip(*rows)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1], rel=1e-4)


def test_a_method_with_its_own_levels_equals_a_run_with_these_levels(finished, images, tmp_path, taught):
    own = {"kd+nst-poly": {"LEVELS": ["res4"], "WEIGHTS": {"nst-poly": 2.0}}}
    beside = run(images, tmp_path / "a", METHODS=METHODS[1:], **taught, **{"TRANSFER.BY_METHOD": own})
    keys = {"TRANSFER.LEVELS": ["res4"], "TRANSFER.WEIGHTS": {"nst-poly": 2.0}}
    alone = run(images, tmp_path / "b", METHODS=["kd+nst-poly"], **taught, **keys)
    assert beside["kd+nst-poly"]["sha256"] == alone["kd+nst-poly"]["sha256"]
    assert beside["kd+nst-poly"]["sha256"] != finished[1]["kd+nst-poly"]["sha256"]
    assert beside["fitnet"]["sha256"] == finished[1]["fitnet"]["sha256"]


def test_one_teacher_pass_feeds_all_students(images, tmp_path):
    stage = StageOne(config(images, tmp_path))
    student, solver = initial_student(stage.config, 3), stage.config.SOLVER
    teacher = initial_teacher(stage.config, stage.data.classes)
    losses = build_losses(stage.config, stage.methods, student, teacher, True)
    real, calls = Teacher(copy_of(teacher, stage.device), ["res3", "res4"], None), []

    def asked(batch, rows):
        calls.append(batch)
        return real(batch, rows)

    students = [
        StudentTrainer(name, student, losses[name], stage.config, solver, None, RunFolder(tmp_path / name))
        for name in METHODS
    ]
    batches, clock = stage.data.training(stage.config.DATA.AUGMENT, solver), Clock()
    before = {key: value.clone() for key, value in real.model.state_dict().items()}
    one_step(students, asked, iter([batches[0]]), stage.data.normalize, clock, Unread())
    assert len(calls) == 1
    one_step(students[:1], asked, iter([batches[1]]), stage.data.normalize, clock, Unread())
    assert len(calls) == 1, "a student without terms asks no teacher"
    assert all(torch.equal(before[key], value) for key, value in real.model.state_dict().items())
    assert all(parameter.grad is None for parameter in real.model.parameters())
    assert set(clock.seconds) == {"data", "teacher", "students", "optimizers"}


def test_a_worse_teacher_stops_the_run(images, tmp_path, taught):
    spoiled = {"TEACHER.WEIGHTS": tmp_path / "spoiled.safetensors"}
    network = initial_student(config(images, tmp_path), 3)
    save_backbone(spoiled["TEACHER.WEIGHTS"], network.model, load_card(taught["TEACHER.WEIGHTS"]))
    with pytest.raises(UserError, match=r"TEACHER.EXPECTED_TOP1: the teacher \S+ has top-1 0\.\d+"):
        run(images, tmp_path, **spoiled, **{"TEACHER.EXPECTED_TOP1": 1.0})
    assert not (tmp_path / "students").exists()
    # the measured value stays, the expectation may change
    assert run(images, tmp_path, METHODS=["kd"], **spoiled)["kd"]["steps"] == STEPS


def test_teachers_from_files(finished, images, tmp_path, monkeypatch):
    output, results = finished
    # by name from the registry
    monkeypatch.setenv("NST_DET_BACKBONES", str(output / "backbones"))
    by_name, plain = {"TEACHER.WEIGHTS": "backbone://small-teacher"}, {"TEACHER.WEIGHTS": tmp_path / "plain.pth"}
    named = run(images, tmp_path / "a", METHODS=["kd"], **by_name)
    assert all(named["teacher"][key] == results["teacher"][key] for key in ("top1", "backbone", "sha256"))
    # plain weights get a card, and teach the same
    torch.save(load_file(results["teacher"]["backbone"]), tmp_path / "plain.pth")
    taught = run(images, tmp_path / "b", METHODS=["kd"], **plain)
    card = load_card(taught["teacher"]["backbone"])
    assert (card.method, card.top1) == ("weights of plain.pth", results["teacher"]["top1"])
    assert taught["kd"]["sha256"] == named["kd"]["sha256"]
    with pytest.raises(UserError, match=r"TEACHER.WEIGHTS: .*plain.pth.*TEACHER.ARCH"):
        run(images, tmp_path / "c", **plain, **{"TEACHER.ARCH": "resnet18"})
    with pytest.raises(UserError, match=r"TEACHER.WEIGHTS: .*DATA.MEAN \[.*DATA.STD \["):
        run(images, tmp_path / "d", **by_name, **{"DATA.MEAN": [0.5, 0.5, 0.5]})


def test_a_teacher_of_other_classes_gives_maps_but_no_logits(images, tmp_path, taught):
    other = tmp_path / "other"
    shutil.copytree(images, other)
    for part in ("train", "val"):
        (other / part / "class2").rename(other / part / "zebra")
    with pytest.raises(UserError, match="METHODS: kd compares logits"):
        run(other, tmp_path / "a", METHODS=["kd"], **taught)
    with pytest.raises(UserError, match=r"TEACHER.EXPECTED_TOP1: the teacher's classes"):
        run(other, tmp_path / "b", METHODS=["at"], **taught, **{"TEACHER.EXPECTED_TOP1": 0.5})
    done = run(other, tmp_path / "c", METHODS=["at"], **taught)
    assert done["teacher"]["top1"] is None
    assert done["at"]["steps"] == STEPS


def test_a_term_that_reads_boxes_is_refused(images, tmp_path, taught):
    with pytest.raises(UserError, match="fgd@det"):
        run(images, tmp_path, METHODS=["fgd"], **taught)


@pytest.mark.parametrize("classes", [1000, 2, 0])
def test_plain_weights_of_other_classes(images, tmp_path, classes, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(3)
    theirs = timm.create_model("nst_resnet10_w32", num_classes=classes).state_dict()
    torch.save({"state_dict": {f"model.{name}": value for name, value in theirs.items()}}, tmp_path / "theirs.ckpt")
    plain = {"TEACHER.WEIGHTS": tmp_path / "theirs.ckpt", "TEACHER.TRAIN": False}
    with pytest.raises(UserError, match=r"METHODS: kd compares logits.*TEACHER.TRAIN True"):
        run(images, tmp_path / "a", METHODS=["kd"], **plain)
    assert (f"head of {classes} classes" if classes else "without a head") in caplog.text
    done = run(images, tmp_path / "a", METHODS=["at"], **plain)["teacher"]
    card, taken = load_card(done["backbone"]), load_file(done["backbone"])
    assert (card.classes, card.top1, done["steps"]) == ([], None, 0)
    assert all(torch.equal(taken[name], value) for name, value in theirs.items() if not name.startswith("fc."))
    # trained first, the same file teaches logits too
    trained = run(images, tmp_path / "b", METHODS=["kd"], **plain | {"TEACHER.TRAIN": True})["teacher"]
    card, learned = load_card(trained["backbone"]), load_file(trained["backbone"])
    assert (len(card.classes), card.steps) == (3, 10)
    # ten steps from these weights, not from random ones
    distance = (learned["layer4.0.conv1.weight"] - theirs["layer4.0.conv1.weight"]).norm()
    assert 0 < distance < 0.5 * theirs["layer4.0.conv1.weight"].norm()


PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("form", ["plain", "backbone file"])
def test_students_begin_with_published_weights(images, taught, tmp_path, form):
    torch.manual_seed(3)
    theirs, path = create_model("nst_resnet10_w32", 5), tmp_path / "theirs.safetensors"
    if form == "plain":
        path = path.with_suffix(".pth")
        torch.save(theirs.state_dict(), path)
    else:
        save_backbone(path, theirs, Card("nst_resnet10_w32", 5, input=input_contract(*PIXELS, "RGB", 32)))
    keys = {**taught, "METHODS": ["ce", "at"], "STUDENT.WEIGHTS": path, "SOLVER.MAX_ITER": 2, "SOLVER.BASE_LR": 1e-9}
    results, before = run(images, tmp_path / "a", **keys), theirs.state_dict()
    for name in ("ce", "at"):
        card, after = load_card(results[name]["backbone"]), load_file(results[name]["backbone"])
        assert path.name in card.start
        assert "5 classes" in card.start
        assert after["fc.weight"].shape[0] == 3
        for key in ("conv1.weight", "layer4.0.conv1.weight"):
            torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6)
    # other weights are another run
    path.with_suffix(".json").unlink(missing_ok=True)
    other = tmp_path / "other.pth"
    torch.save(create_model("nst_resnet10_w32", 5).state_dict(), other)
    with pytest.raises(UserError, match=r"STUDENT\.SHA256"):
        run(images, tmp_path / "a", **keys | {"STUDENT.WEIGHTS": other})
    with pytest.raises(UserError, match=r"STUDENT\.WEIGHTS.*STUDENT\.ARCH"):
        run(images, tmp_path / "b", **keys | {"STUDENT.WEIGHTS": other, "STUDENT.ARCH": "resnet18"})


@pytest.mark.parametrize(
    ("classes", "kept"),
    [
        (["class0", "class1", "class2"], True),
        # by a card without names, as many
        ([], True),
        (["class1", "class0", "class2"], False),
        (["cat", "dog", "bird"], False),
    ],
)
def test_a_student_keeps_the_head_of_a_backbone_file_of_the_same_classes(images, tmp_path, classes, kept, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(3)
    theirs, path = create_model("nst_resnet10_w32", 3), tmp_path / "theirs.safetensors"
    save_backbone(path, theirs, Card("nst_resnet10_w32", 3, classes=classes, input=input_contract(*PIXELS, "RGB", 32)))
    keys = {"METHODS": ["ce"], "STUDENT.WEIGHTS": path, "SOLVER.MAX_ITER": 2, "SOLVER.BASE_LR": 1e-9}
    done = run(images, tmp_path / "a", **keys)["ce"]
    after, before = load_file(done["backbone"]), theirs.state_dict()
    assert torch.allclose(after["layer4.0.conv1.weight"], before["layer4.0.conv1.weight"], rtol=0, atol=1e-6)
    assert torch.allclose(after["fc.weight"], before["fc.weight"], rtol=0, atol=1e-6) == kept
    assert ("left out" not in load_card(done["backbone"]).start) == kept
    assert bool(re.search(r"STUDENT\.WEIGHTS: theirs\.safetensors.* left out", caplog.text)) != kept


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({"TEACHER.TRAIN": False}, True),
        # what is trained further is told
        ({"TEACHER.TRAIN": True}, False),
        (
            {"TEACHER.ARCH": "nst_resnet10_w32", "STUDENT.ARCH": "vit_tiny_patch16_224", "STUDENT.PRETRAINED": True},
            True,
        ),
    ],
)
def test_the_pixels_of_published_weights(images, tmp_path, monkeypatch, keys, refused, caplog):
    real = build.create_model
    monkeypatch.setattr(build, "create_model", lambda arch, classes, pretrained, **kw: real(arch, classes, **kw))
    keys = {"TEACHER.ARCH": "vit_tiny_patch16_224", "TEACHER.PRETRAINED": True, "DATA.IMAGE_SIZE": 224, **keys}
    key = "STUDENT" if "STUDENT.ARCH" in keys else "TEACHER"
    line = rf"{key}.PRETRAINED: .*\(0.5, 0.5, 0.5\).*DATA.MEAN \[0.5, 0.5, 0.5\], DATA.STD \[0.5, 0.5, 0.5\]"
    make = initial_student if key == "STUDENT" else initial_teacher
    with pytest.raises(UserError, match=line) if refused else nullcontext():
        make(config(images, tmp_path, **keys), 3 if key == "STUDENT" else None)
    assert refused or re.search(line, caplog.text)
    caplog.clear()
    halves = {"DATA.MEAN": [0.5] * 3, "DATA.STD": [0.5] * 3}
    make(config(images, tmp_path, **keys, **halves), 3 if key == "STUDENT" else None)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_published_name_begins_students_and_teachers(images, tmp_path, monkeypatch, caplog):
    theirs = weights(snapshot(offline_cache(tmp_path, monkeypatch)) / "model.safetensors")
    keys = {f"{who}.{key}": NAME for who in ("STUDENT", "TEACHER") for key in ("ARCH", "WEIGHTS")}
    for make, classes, refused in ((initial_student, 3, True), (initial_teacher, ["a"], False)):
        with pytest.raises(UserError, match=r"DATA.MEAN \[0.5, 0.5, 0.5\]") if refused else nullcontext():
            make(config(images, tmp_path, **keys), classes)
        halves = {"DATA.MEAN": [0.5] * 3, "DATA.STD": [0.5] * 3}
        network = make(config(images, tmp_path, **keys, **halves), classes)
        assert REPO in network.start
        assert "head of 1000 classes" in network.start
        assert torch.equal(network.model.conv1[0].weight, theirs.conv1[0].weight)
    # a teacher that learns from other images first is told so
    assert re.search(r"TEACHER\.WEIGHTS.*0\.5", caplog.text)


# changes, and what the line must name
BAD = [
    ({"METHODS": ["kd", "nix"]}, "METHODS: .*'nix'"),
    ({"METHODS": ["kd", "kd"]}, "METHODS: kd "),
    ({"METHODS": ["nst-poly+kd", "kd+nst-poly"]}, r"METHODS: kd\+nst-poly "),
    ({"TRANSFER.LEVELS": ["res9"]}, "TRANSFER: .*'res9'; it has res2, res3, res4, res5"),
    ({"TRANSFER.LEVELS": ["res3:p3"]}, "TRANSFER: .*teacher has no level 'p3'"),
    ({"TRANSFER.LEVELS": ["res3:res4"], "METHODS": ["pkd"]}, "TRANSFER: pkd.*res3:res4"),
    ({"TRANSFER.WEIGHTS": {"nix": 1.0}}, "TRANSFER: .*'nix'"),
    ({"TRANSFER.OPTIONS": {"kd": {"nix": 1}}}, "TRANSFER: kd .*'nix'"),
    ({"TRANSFER.AUTO_WEIGHT": {"nst": 1}}, "TRANSFER: .*'nst'"),
    ({"TRANSFER.AUTO_WEIGHT": {"fitnet": 0}}, "TRANSFER: .*'fitnet'"),
    ({"STUDENT.ARCH": "resnet81"}, "STUDENT.ARCH: .*'resnet81'"),
    ({"TEACHER.ARCH": "nst_resnet18_w48", "TEACHER.PRETRAINED": True}, "TEACHER.ARCH: .*no published weights"),
    ({"TEACHER.TRAIN": False}, "TEACHER.TRAIN .*TEACHER.WEIGHTS"),
    (
        {"TEACHER.ARCH": "swin_tiny_patch4_window7_224"},
        "TEACHER.ARCH: swin.* 32 x 32 .*DATA.IMAGE_SIZE to 224, or TEACHER.ARCH_KWARGS.img_size to 32",
    ),
    ({"STUDENT.ARCH": "hiera_tiny_224", "METHODS": ["ce"]}, "STUDENT.ARCH: hiera.*DATA.IMAGE_SIZE to 224"),
    ({"TEACHER.WEIGHTS": "backbone://../x"}, "can't name a backbone"),
    ({"TEACHER.WEIGHTS": "/nowhere/x.pth"}, "/nowhere/x.pth"),
    ({"DATA.ROOT": "/nowhere"}, "/nowhere: "),
    ({"DATA.ROOT": "$NST_DET_NO_SUCH"}, "DATA.ROOT: .*NST_DET_NO_SUCH"),
    ({"NAME": "../x"}, "can't name a backbone"),
    ({"SOLVER.AMP.DTYPE": "fp16"}, "SOLVER.AMP.DTYPE: fp16 needs a GPU"),
]


@pytest.mark.parametrize(("keys", "named"), BAD)
def test_bad_input_is_refused_before_training(images, tmp_path, keys, named, monkeypatch):
    monkeypatch.setattr(loop, "one_step", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=named) as caught:
        run(images, tmp_path, **keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "teacher").exists()


def test_a_folder_with_another_run_is_refused(finished, images):
    before = (finished[0] / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="SOLVER.BASE_LR 0.002, now it is 0.5"):
        run(images, finished[0], **{"SOLVER.BASE_LR": 0.5})
    assert (finished[0] / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(("methods", "folder"), [([], "teacher"), (["ce"], "students/ce")])
def test_a_backbone_file_that_another_run_has_written_is_refused(images, tmp_path, methods, folder):
    keys = {"REGISTRY": tmp_path / "b", "SOLVER.MAX_ITER": 2, "TEACHER.SOLVER": {"MAX_ITER": 2}}
    for name, rate in (("one", 1e-3), ("other", 2e-3)):
        run(images, tmp_path / name, METHODS=methods, **keys, **{"SOLVER.BASE_LR": rate})
    with pytest.raises(UserError, match=rf"small-.*: not the file that {tmp_path / 'one' / folder} wrote.*NAME"):
        run(images, tmp_path / "one", METHODS=[*methods, "at"], **keys, **{"SOLVER.BASE_LR": 1e-3})


def test_pretrained_weights_of_other_classes_teach_maps(images, tmp_path, monkeypatch):
    real = build.create_model
    # timm's weights would be fetched; their number of classes is in timm's own table
    monkeypatch.setattr(build, "create_model", lambda arch, classes, pretrained=False, **kw: real(arch, classes, **kw))
    keys = {"TEACHER.ARCH": "resnet18", "TEACHER.PRETRAINED": True, "TEACHER.TRAIN": False}
    with pytest.raises(UserError, match=r"METHODS: kd compares logits"):
        run(images, tmp_path / "a", METHODS=["kd"], **keys)
    taken = run(images, tmp_path / "a", METHODS=["at"], **keys)["teacher"]
    assert (taken["top1"], load_card(taken["backbone"]).num_classes) == (None, 0)
    # its file has no random logits for another run
    with pytest.raises(UserError, match=r"METHODS: kd compares logits"):
        run(images, tmp_path / "b", METHODS=["kd"], **{"TEACHER.WEIGHTS": taken["backbone"]})


# networks without classes that see images of another size, mean and std, and the level that they teach
FROZEN = {
    "vit_tiny_patch16_224": ({"img_size": 48}, 48, "res4:block6"),
    "convnext_atto": ({}, 64, "res4"),
}


@pytest.mark.parametrize("arch", FROZEN)
def test_a_frozen_teacher_without_classes(images, tmp_path, arch):
    kwargs, size, level = FROZEN[arch]
    torch.manual_seed(3)
    torch.save(timm.create_model(arch, num_classes=0, **kwargs).state_dict(), tmp_path / "teacher.pth")
    keys = {
        "TEACHER.ARCH": arch,
        "TEACHER.ARCH_KWARGS": kwargs,
        "TEACHER.WEIGHTS": tmp_path / "teacher.pth",
        "TEACHER.TRAIN": False,
        "TEACHER.IMAGE_SIZE": size,
        "TEACHER.MEAN": [0.5] * 3,
        "TEACHER.STD": [0.5] * 3,
        "STUDENT.ARCH": "resnet18",
        "TRANSFER.LEVELS": [level],
    }
    results = run(images, tmp_path / "out", METHODS=["nst-poly+fitnet"], **keys)
    card = load_card(results["teacher"]["backbone"])
    assert (card.input["mean"], card.input["size"], results["teacher"]["top1"]) == ([0.5] * 3, size, None)
    method = next(name for name in results if name != "teacher")
    losses = [row["loss/total"] for row in metrics(tmp_path / "out", method) if "loss/total" in row]
    assert losses[-1] < losses[0]


def test_a_teacher_sees_its_own_images(images, tmp_path):
    keys = {"TEACHER.IMAGE_SIZE": 20, "TEACHER.MEAN": [0.5, 0.4, 0.3], "TEACHER.STD": [0.2, 0.3, 0.4]}
    view = TeacherView(config(images, tmp_path, **keys))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = view(F.normalize(pixels, *PIXELS).float())
    wanted = F.normalize(F.resize(pixels, [20, 20], antialias=True), keys["TEACHER.MEAN"], keys["TEACHER.STD"])
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    same = TeacherView(config(images, tmp_path))
    assert same(pixels) is pixels
    # one that is trained here sees the students' images
    with pytest.raises(UserError, match=r"TEACHER\.IMAGE_SIZE.*TEACHER\.TRAIN"):
        run(images, tmp_path / "out", METHODS=["at"], **keys)


def test_the_command_prints_a_table(images, tmp_path, finished, capsys, cli):
    (tmp_path / "c.yaml").write_text("SEED: 0\n")
    command = ["distill", "--config-file", tmp_path / "c.yaml", *overrides(images, tmp_path / "out", METHODS=["ce"])]
    assert cli(*command) == 0
    line = next(line for line in capsys.readouterr().out.split("\n") if "small-ce-s0" in line)
    assert f"{100 * finished[1]['ce']['top1']:.1f} %" in line
    assert cli(*command, "SOLVER.NIX", "1") == 2
    assert "SOLVER.NIX" in capsys.readouterr().err


@pytest.mark.real_data
def test_two_steps_on_real_images(real_data, tmp_path):
    changes = {"DATA.ROOT": real_data / "tiny_imagenet_50", "OUTPUT_DIR": tmp_path, "REGISTRY": tmp_path / "b"}
    changes |= {"SOLVER.MAX_ITER": 2, "TEACHER.SOLVER.MAX_ITER": 2, "TEACHER.EXPECTED_TOP1": 0.0, "TEST.EVAL_PERIOD": 0}
    typed = [str(word) for pair in changes.items() for word in pair]
    results = distill(load_distill_config(CONFIGS / "tiny_imagenet.yaml", [*typed, "METHODS", "['ce', 'kd+nst-poly']"]))
    card = load_card(results["kd+nst-poly"]["backbone"])
    assert (card.num_classes, card.data["images"], card.data["validation_images"]) == (50, 6000, 1500)
    assert all(name.startswith("n0") for name in card.classes)


def test_compiled_networks_train_alike(images, tmp_path, captured_graphs):
    """Students, teacher, averages, and what is written; a compiler would round sums differently."""
    keys = {"METHODS": ["ce", "kd+nst-poly"], "SOLVER.EMA_DECAY": 0.9, "SOLVER.MAX_ITER": 4}
    results = [run(images, tmp_path / mode, **keys, **{"SOLVER.COMPILE": mode}) for mode in ("off", "default")]
    assert len(captured_graphs) > 2
    assert_same_run(tmp_path / "off", tmp_path / "default", *results, keys["METHODS"])


def test_cudnn_is_set_by_the_config(images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("nst_det.distillation.pipeline.set_cudnn_benchmark", lambda *asked: seen.append(asked))
    for wanted in (True, False):
        StageOne(config(images, tmp_path, **{"CUDNN_BENCHMARK": wanted}))
    assert [asked[0] for asked in seen] == [True, False]


def test_cuda_graphs_on_a_cpu_are_refused_before_anything_is_written(images, tmp_path):
    with pytest.raises(UserError, match=r"SOLVER.COMPILE reduce-overhead"):
        run(images, tmp_path / "run", **{"TEACHER.SOLVER": {"COMPILE": "reduce-overhead"}})
    assert not (tmp_path / "run").exists()
