import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nst_det.distillation import build as networks
from nst_det.distillation import loop
from nst_det.distillation.build import Teacher
from nst_det.distillation.config import load_distill_config
from nst_det.distillation.dataloader import Normalizer
from nst_det.distillation.loop import one_step
from nst_det.distillation.pipeline import StageOne, distill
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine.checkpoint import checkpoints
from nst_det.engine.metrics import read_metrics
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.trainer import Clock
from nst_det.errors import UserError
from nst_det.losses.loss_balance import GradientBalance
from nst_det.models import load_card, prove_parity, save_backbone

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "distill"
STEPS = 8
METHODS = ["ce", "fitnet", "kd+nst-poly"]


def words(images, output, **keys):
    """The command line of a small run."""
    values = {
        "NAME": "small",
        "OUTPUT_DIR": str(output),
        "REGISTRY": str(output / "backbones"),
        "METHODS": METHODS,
        "DATA.ROOT": str(images),
        "DATA.IMAGE_SIZE": 32,
        "DATA.AUGMENT.SHIFT": 2,
        "DATA.AUGMENT.HFLIP": 0.5,
        # dropout: what it draws may not depend on who trains beside
        "STUDENT.ARCH_KWARGS": {"drop_rate": 0.2},
        "TEACHER.ARCH": "nst_resnet10_w32",
        "TEACHER.SOLVER": {"MAX_ITER": 10},
        "TRANSFER.WEIGHTS": {"fitnet": 1.0, "nst-poly": 10.0},
        "SOLVER.OPTIMIZER": "ADAMW",
        "SOLVER.BASE_LR": 2e-3,
        "SOLVER.WEIGHT_DECAY": 0.05,
        "SOLVER.MAX_ITER": STEPS,
        "SOLVER.IMS_PER_BATCH": 7,
        "SOLVER.CLIP_GRADIENTS": {"ENABLED": True, "CLIP_VALUE": 5.0},
        "SOLVER.WARMUP_ITERS": 2,
        "TEST.EVAL_PERIOD": 3,
        "SOLVER.CHECKPOINT_PERIOD": 4,
        "LOG_PERIOD": 1,
        **keys,
    }
    return [str(word) for pair in values.items() for word in pair]


def run(images, output, **keys):
    return distill(load_distill_config(None, words(images, output, **keys)))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """An undisturbed run of all methods, and its results."""
    output = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    return output, run(images, output)


def weights(results, method):
    return load_file(results[method]["backbone"])


def assert_same_run(output, other, results, others, methods=METHODS):
    for method in methods:
        assert results[method]["sha256"] == others[method]["sha256"], method
        rows = [read_metrics(folder / "students" / method / "metrics.jsonl") for folder in (output, other)]
        assert rows[0] == rows[1]
        for key in ("top1", "top5", "top1_best", "step_best", "steps", "seed", "params"):
            assert results[method][key] == others[method][key]


def test_layout_results_and_cards(finished):
    output, results = finished
    assert list(results) == ["teacher", *METHODS]
    for method in METHODS:
        folder = output / "students" / method
        assert json.loads((folder / "result.json").read_text()) == results[method]
        assert json.loads((folder / "config.json").read_text())["METHOD"] == method
        speed = results[method]["speed"]
        assert set(speed) == {"images_per_second", "data_wait"}
        assert 0 < speed["data_wait"] < 1
        # trained side by side: as fast as each other
        assert speed == results["ce"]["speed"] != results["teacher"]["speed"]
        assert (folder / "provenance.json").exists()
        assert checkpoints(folder / "checkpoints") == []
        name = f"small-{method}-s0"
        assert results[method]["name"] == name
        assert results[method]["backbone"] == str(output / "backbones" / f"{name}.safetensors")
        card = load_card(results[method]["backbone"])
        assert (card.method, card.seed, card.steps, card.top1) == (method, 0, STEPS, results[method]["top1"])
        assert card.classes == ["class0", "class1", "class2"]
        assert card.input["size"] == 32
        assert card.sha256 == results[method]["sha256"]
        assert card.data["images"] == 24
        assert card.data["validation_images"] == 12
        assert card.arch_kwargs == {"drop_rate": 0.2}
        assert prove_parity(results[method]["backbone"]) == 0
    assert load_card(results["kd+nst-poly"]["backbone"]).weights == {"kd": 1.0, "nst-poly": 10.0}
    teacher = load_card(results["kd+nst-poly"]["backbone"]).teacher
    assert teacher == {
        "name": "small-teacher",
        "arch": "nst_resnet10_w32",
        "top1": results["teacher"]["top1"],
        "sha256": results["teacher"]["sha256"],
    }
    assert load_card(results["ce"]["backbone"]).teacher == {}
    assert (output / "config.yaml").exists()


def test_metrics_have_each_term_by_itself(finished):
    output, results = finished
    rows = read_metrics(output / "students" / "kd+nst-poly" / "metrics.jsonl")
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
    assert measured[-1]["val/top1"] == results["kd+nst-poly"]["top1"]
    best = max(row["val/top1"] for row in measured)
    assert results["kd+nst-poly"]["top1_best"] == best
    assert results["kd+nst-poly"]["step_best"] == next(r["step"] + 1 for r in measured if r["val/top1"] == best)


def test_students_differ_by_their_method_only_from_the_first_step_on(finished, images, tmp_path):
    _, results = finished
    assert len({results[method]["sha256"] for method in METHODS}) == len(METHODS)
    stage = StageOne(load_distill_config(None, words(images, tmp_path, **{"DATALOADER.NUM_WORKERS": -1})))
    assert stage.config.DATALOADER.NUM_WORKERS == 0
    start = networks.initial_student(stage.config, 3)
    again = networks.initial_student(stage.config, 3)
    assert all(torch.equal(a, b) for a, b in zip(start.model.state_dict().values(), again.model.state_dict().values()))
    first = {
        method: read_metrics(finished[0] / "students" / method / "metrics.jsonl")[0]["loss/ce"] for method in METHODS
    }
    assert len(set(first.values())) == 1, "same weights, same batch, same dropout"


def test_a_method_added_later_trains_on_the_very_same_batches(finished, images, tmp_path):
    output, results = finished
    teacher = str(output / "backbones" / "small-teacher.safetensors")
    run(images, tmp_path, METHODS=["ce"])
    assert not (tmp_path / "teacher").exists(), "labels alone need no teacher"
    before = (tmp_path / "students" / "ce" / "result.json").stat().st_mtime_ns
    others = run(images, tmp_path, METHODS=["kd+nst-poly", "ce"], **{"TEACHER.WEIGHTS": teacher})
    assert list(others) == ["teacher", "kd+nst-poly", "ce"]
    assert (tmp_path / "students" / "ce" / "result.json").stat().st_mtime_ns == before
    assert_same_run(output, tmp_path, results, others, ["ce", "kd+nst-poly"])


class Stop(Exception):
    pass


@contextmanager
def stopped(monkeypatch, word, step, where="update"):
    """The block ends where the student ``word`` at ``step`` would call ``where``."""
    real = getattr(StudentTrainer, where)

    def stopping(self):
        if (self.word, self.step) == (word, step):
            raise Stop
        real(self)

    with monkeypatch.context() as patch, suppress(Stop):
        patch.setattr(StudentTrainer, where, stopping)
        yield
        pytest.fail("it was not stopped")


@pytest.mark.parametrize(
    ("where", "method", "step"), [("update", "fitnet", 5), ("save", "fitnet", 4), ("save", "ce", 8)]
)
def test_a_stopped_run_goes_on_to_the_same_bits(finished, images, tmp_path, monkeypatch, where, method, step):
    output, results = finished
    with stopped(monkeypatch, method, step, where):
        run(images, tmp_path)
    ahead = {word: checkpoints(tmp_path / "students" / word / "checkpoints") for word in METHODS}
    if where == "save" and method == "fitnet":
        assert ahead["ce"] != [] == ahead["fitnet"], "the students stand at different steps"
    others = run(images, tmp_path)
    assert_same_run(output, tmp_path, results, others)
    teachers = [read_metrics(folder / "teacher" / "metrics.jsonl") for folder in (output, tmp_path)]
    assert teachers[0] == teachers[1]


def test_a_stopped_teacher_goes_on_to_the_same_bits(finished, images, tmp_path, monkeypatch):
    _, results = finished
    with stopped(monkeypatch, "teacher", 7):
        run(images, tmp_path, METHODS=[])
    others = run(images, tmp_path, METHODS=[])
    assert list(others) == ["teacher"]
    assert others["teacher"]["sha256"] == results["teacher"]["sha256"]


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
    _, results = finished
    command = [sys.executable, "-m", "nst_det", "distill", "--config-file", str(tmp_path / "c.yaml")]
    (tmp_path / "c.yaml").write_text("SEED: 0\n")
    command += words(images, tmp_path / "out", **{"SOLVER.CHECKPOINT_PERIOD": 1})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "out" / "students" / "fitnet" / "checkpoints"
    deadline = time.monotonic() + 120
    while process.poll() is None and not checkpoints(folder) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "students" / "fitnet" / "result.json").exists(), "killed too late to show anything"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "kd+nst-poly" in done.stdout
    for method in METHODS:
        other = json.loads((tmp_path / "out" / "students" / method / "result.json").read_text())
        assert other["sha256"] == results[method]["sha256"]


def test_shapes_before_the_teacher_and_balance_in_the_first_step_are_said(images, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    keys = {"TRANSFER.WEIGHTS": {"fitnet": 1e4}, "TRANSFER.TERM_LEVELS": {"fitnet": ["res3:res4"]}}
    run(images, tmp_path, METHODS=["ce", "fitnet", "kd+nst-poly"], **keys, **{"SOLVER.MAX_ITER": 2})
    said = [record.getMessage() for record in caplog.records]
    shapes, gate, balance = (
        next(index for index, text in enumerate(said) if text.startswith(start))
        for start in ("compared at 32 x 32 pixels", "teacher small-teacher: top-1", "terms against the labels' loss")
    )
    assert shapes < gate < balance
    assert "fitnet     res3: 64 x 4 x 4, stride 8     res4: 128 x 2 x 2, stride 16   student averaged" in said[shapes]
    assert said[shapes].count("nst-poly") == 2
    assert [line.split()[:2] for line in said[balance].splitlines()[3:]] == [
        ["fitnet", "fitnet"], ["kd+nst-poly", "kd"], ["kd+nst-poly", "nst-poly"]
    ]  # fmt: skip
    # the last plain line has every student's terms
    last = read_metrics(tmp_path / "students" / "kd+nst-poly" / "metrics.jsonl")[-2]
    terms = "  ".join(f"{name} {last[f'loss/{name}']:.4g}" for name in ("total", "ce", "kd", "nst-poly"))
    line = next(text for text in said if " 2/2 " in text and "kd+nst-poly" in text)
    assert line.endswith(f"; kd+nst-poly: {terms}")
    assert "  ce: total " in line
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in warnings if text.startswith("fitnet: the gradient of fitnet")]) == 1


def test_measuring_the_first_step_does_not_change_the_run(finished, images, tmp_path, monkeypatch):
    output, results = finished
    monkeypatch.setattr(GradientBalance, "wants", lambda *_: False)
    assert_same_run(output, tmp_path, results, run(images, tmp_path))


def test_auto_weight_is_in_card_and_result_and_goes_on_to_the_same_bits(images, tmp_path, monkeypatch):
    keys = {"METHODS": ["ce", "kd+nst-poly"], "TRANSFER.AUTO_WEIGHT": {"nst-poly": 0.5}, "SOLVER.CHECKPOINT_PERIOD": 3}
    results = run(images, tmp_path / "whole", **keys)
    # three of the five steps are measured by then
    with stopped(monkeypatch, "kd+nst-poly", 3):
        run(images, tmp_path / "part", **keys)
    others = run(images, tmp_path / "part", **keys)
    assert_same_run(tmp_path / "whole", tmp_path / "part", results, others, keys["METHODS"])
    card = load_card(results["kd+nst-poly"]["backbone"])
    assert card.weights == results["kd+nst-poly"]["weights"] == others["kd+nst-poly"]["weights"]
    assert card.weights["kd"] == 1.0
    assert card.weights["nst-poly"] not in (10.0, 50.0)
    assert card.config["TRANSFER"]["AUTO_WEIGHT"] == {"nst-poly": 0.5}
    # it concerns the methods with that term alone
    assert run(images, tmp_path / "whole", **{**keys, "METHODS": ["ce"], "TRANSFER.AUTO_WEIGHT": {}})["ce"]
    with pytest.raises(UserError, match=r"TRANSFER.AUTO_WEIGHT.nst-poly 0.5, now it is None"):
        run(images, tmp_path / "whole", **{**keys, "TRANSFER.AUTO_WEIGHT": {}})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"TRANSFER.LEVELS": ["res9"]}, "the student has no level 'res9'; it has res2, res3, res4, res5"),
        ({"TRANSFER.LEVELS": ["res3:p3"]}, "the teacher has no level 'p3'; it has res2, res3, res4, res5"),
        ({"TRANSFER.LEVELS": ["res3:res4"], "METHODS": ["pkd"]}, "pkd.*res3:res4 has 64 in the student and 128"),
        ({"TRANSFER.AUTO_WEIGHT": {"nst": 1}}, "unknown term 'nst'; known: kd, fitnet"),
        ({"TRANSFER.AUTO_WEIGHT": {"fitnet": 0}}, "the share of 'fitnet' must be a finite number above 0"),
    ],
)
def test_wrong_levels_and_impossible_pairs_stop_before_the_teacher(images, tmp_path, keys, said):
    with pytest.raises(UserError, match=f"config: TRANSFER: .*{said}"):
        run(images, tmp_path, **keys)
    assert not (tmp_path / "teacher").exists()


def test_a_folder_with_another_run_is_refused(finished, images):
    output, _ = finished
    with pytest.raises(UserError, match="holds a run with SOLVER.BASE_LR 0.002, now it is 0.5"):
        run(images, output, **{"SOLVER.BASE_LR": 0.5})


def test_a_worse_teacher_stops_the_run(finished, images, tmp_path):
    _, results = finished
    weights = results["teacher"]["backbone"]
    top1 = results["teacher"]["top1"]
    keys = {"TEACHER.WEIGHTS": weights, "TEACHER.EXPECTED_TOP1": 1.0}
    if top1 == 1.0:
        spoiled = tmp_path / "spoiled.safetensors"
        network = networks.initial_student(load_distill_config(None, words(images, tmp_path)), 3)
        save_backbone(spoiled, network.model, load_card(weights))
        keys["TEACHER.WEIGHTS"] = str(spoiled)
    with pytest.raises(UserError, match=r"TEACHER.EXPECTED_TOP1: the teacher \S+ has top-1 0\.\d+ .* at least 1.0000"):
        run(images, tmp_path, **keys)
    assert not (tmp_path / "students").exists()
    # the measured value stays, the expectation may change
    assert run(images, tmp_path, METHODS=["kd"], **{**keys, "TEACHER.EXPECTED_TOP1": 0.0})["kd"]["steps"] == STEPS


def test_teachers_from_files(finished, images, tmp_path, monkeypatch):
    output, results = finished
    # by name from the registry
    monkeypatch.setenv("NST_DET_BACKBONES", str(output / "backbones"))
    named = run(images, tmp_path / "a", METHODS=["kd"], **{"TEACHER.WEIGHTS": "backbone://small-teacher"})
    assert named["teacher"]["top1"] == results["teacher"]["top1"]
    assert named["teacher"]["backbone"] == results["teacher"]["backbone"]
    # plain weights get a card, and teach the same
    torch.save(weights(results, "teacher"), tmp_path / "plain.pth")
    plain = run(images, tmp_path / "b", METHODS=["kd"], **{"TEACHER.WEIGHTS": str(tmp_path / "plain.pth")})
    card = load_card(plain["teacher"]["backbone"])
    assert (card.method, card.top1) == ("weights of plain.pth", results["teacher"]["top1"])
    assert plain["kd"]["sha256"] == named["kd"]["sha256"]
    with pytest.raises(UserError, match="TEACHER.WEIGHTS: .*plain.pth: these weights don't fit.*check TEACHER.ARCH"):
        run(images, tmp_path / "c", **{"TEACHER.WEIGHTS": str(tmp_path / "plain.pth"), "TEACHER.ARCH": "resnet18"})
    with pytest.raises(UserError, match=r"TEACHER.WEIGHTS: the backbone was trained with .*\(DATA.MEAN, DATA.STD\)"):
        run(images, tmp_path / "d", **{"TEACHER.WEIGHTS": "backbone://small-teacher", "DATA.MEAN": [0.5, 0.5, 0.5]})


def test_a_teacher_of_other_classes_gives_maps_but_no_logits(finished, images, tmp_path):
    _, results = finished
    other = tmp_path / "other"
    shutil.copytree(images, other)
    for part in ("train", "val"):
        (other / part / "class2").rename(other / part / "zebra")
    keys = {"TEACHER.WEIGHTS": results["teacher"]["backbone"]}
    with pytest.raises(UserError, match="METHODS: kd compares logits, but the teacher's classes are not"):
        run(other, tmp_path / "a", METHODS=["kd"], **keys)
    with pytest.raises(UserError, match="TEACHER.EXPECTED_TOP1: the teacher's classes are not those of the data"):
        run(other, tmp_path / "b", METHODS=["at"], **keys, **{"TEACHER.EXPECTED_TOP1": 0.5})
    done = run(other, tmp_path / "c", METHODS=["at"], **keys)
    assert done["teacher"]["top1"] is None
    assert done["at"]["steps"] == STEPS


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"METHODS": ["kd", "nix"]}, "METHODS: method 'nix': unknown term 'nix'; known: kd,"),
        ({"METHODS": ["kd", "kd"]}, "METHODS: kd stands there twice"),
        ({"METHODS": ["nst-poly+kd", "kd+nst-poly"]}, r"METHODS: kd\+nst-poly stands there twice"),
        ({"TRANSFER.LEVELS": ["res9"]}, "TRANSFER: fitnet: the student has no level 'res9'; it has res2, res3"),
        ({"TRANSFER.WEIGHTS": {"nix": 1.0}}, "TRANSFER: unknown term 'nix'"),
        ({"TRANSFER.OPTIONS": {"kd": {"nix": 1}}}, "TRANSFER: kd has no option 'nix'; it has temperature"),
        ({"STUDENT.ARCH": "resnet81"}, "STUDENT.ARCH: unknown architecture 'resnet81'"),
        ({"TEACHER.ARCH": "nst_resnet18_w48", "TEACHER.PRETRAINED": True}, "TEACHER.ARCH: the small networks"),
        (
            {"TEACHER.TRAIN": False},
            "TEACHER.TRAIN is False, but there are no weights; set TEACHER.WEIGHTS",
        ),
        ({"TEACHER.WEIGHTS": "backbone://../x"}, "can't name a backbone"),
        ({"TEACHER.WEIGHTS": "/nowhere/x.pth"}, "no such weights file"),
        ({"DATA.ROOT": "/nowhere"}, "/nowhere: no such folder"),
        ({"DATA.ROOT": "$NST_DET_NO_SUCH"}, "DATA.ROOT: the environment variable NST_DET_NO_SUCH is not set"),
        ({"NAME": "../x"}, "can't name a backbone"),
        ({"SOLVER.AMP.DTYPE": "fp16"}, "SOLVER.AMP.DTYPE: fp16 needs a GPU"),
    ],
)
def test_what_cant_be_used_is_said_before_training(images, tmp_path, keys, says, monkeypatch):
    monkeypatch.setattr(loop, "one_step", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=says) as caught:
        run(images, tmp_path, **keys)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_names_its_term(images, tmp_path, finished):
    _, results = finished
    keys = {"TEACHER.WEIGHTS": results["teacher"]["backbone"], "TRANSFER.WEIGHTS": {"at": 1e38}}
    with pytest.raises(UserError, match=r"at:1e38: not finite at step 0: the norm of all gradients; images train"):
        run(
            images,
            tmp_path,
            METHODS=["at:1e38"],
            **{**keys, "SOLVER.CLIP_GRADIENTS.ENABLED": False, "SOLVER.BASE_LR": 1e30},
        )


def test_the_command_prints_a_table(images, tmp_path, finished, capsys):
    from nst_det.cli import main

    _, results = finished
    (tmp_path / "c.yaml").write_text("SEED: 0\n")
    overrides = words(images, tmp_path / "out", METHODS=["ce"])
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--config-file", str(tmp_path / "c.yaml"), *overrides])
    assert stopped.value.code == 0
    line = next(line for line in capsys.readouterr().out.split("\n") if "small-ce-s0" in line)
    assert f"{100 * results['ce']['top1']:.1f} %" in line
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--config-file", str(tmp_path / "c.yaml"), *overrides, "SOLVER.NIX", "1"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("nst-det: command line: unknown key SOLVER.NIX")


def test_one_teacher_pass_feeds_all_students(images, tmp_path, monkeypatch):
    stage = StageOne(load_distill_config(None, words(images, tmp_path)))
    student = networks.initial_student(stage.config, 3)
    teacher = networks.initial_teacher(stage.config, stage.data.classes)
    losses = networks.build_losses(stage.config, stage.methods, student, teacher, True)
    calls = []
    real = Teacher(networks.copy_of(teacher, stage.device), ["res3", "res4"], None)

    def asked(batch, rows):
        calls.append(batch)
        return real(batch, rows)

    students = [stage._student(w, student, losses[w], stage.config.SOLVER, RunFolder(tmp_path / w)) for w in METHODS]
    batches = stage.data.train_steps(stage.config.DATA.AUGMENT, 7)(0, 2)
    normalize = Normalizer(stage.config.DATA.MEAN, stage.config.DATA.STD, stage.device)
    clock = Clock()
    before = {key: value.clone() for key, value in real.model.state_dict().items()}
    one_step(students, asked, batches, normalize, clock)
    assert len(calls) == 1
    one_step(students[:1], asked, batches, normalize, clock)
    assert len(calls) == 1, "a student without terms asks no teacher"
    assert all(torch.equal(before[key], value) for key, value in real.model.state_dict().items())
    assert all(parameter.grad is None for parameter in real.model.parameters())
    assert set(clock.seconds) == {"data", "teacher", "students", "optimizers"}


def test_transfer_terms_rise_over_the_warm_up(images, tmp_path, finished):
    _, results = finished
    keys = {"TEACHER.WEIGHTS": results["teacher"]["backbone"], "METHODS": ["at:1000"], "SOLVER.BASE_LR": 1e-12}
    plain = run(images, tmp_path / "a", **keys)
    rising = run(images, tmp_path / "b", **keys, **{"TRANSFER.WARMUP_ITERS": 4})
    rows = [
        [
            row["loss/at"]
            for row in read_metrics(tmp_path / name / "students" / "at:1000" / "metrics.jsonl")
            if "lr" in row
        ]
        for name in "ab"
    ]
    assert [b / a for a, b in zip(*rows)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1], rel=1e-4)
    assert plain["at:1000"]["steps"] == rising["at:1000"]["steps"]


def test_pretrained_weights_of_other_classes_are_not_taken_as_a_teacher(images, tmp_path, monkeypatch):
    real = networks.create_model
    # timm's weights would be fetched; their number of classes stands in timm's own table
    monkeypatch.setattr(networks, "create_model", lambda arch, classes, pretrained, **kw: real(arch, classes, **kw))
    keys = {"TEACHER.ARCH": "resnet18", "TEACHER.PRETRAINED": True, "TEACHER.TRAIN": False}
    with pytest.raises(UserError, match="resnet18 was pretrained on 1000 classes and the data has 3; set"):
        run(images, tmp_path, **keys)


@pytest.mark.real_data
def test_two_steps_on_real_images(real_data, tmp_path):
    config = CONFIGS / "tiny_imagenet.yaml"
    changes = {"DATA.ROOT": real_data / "tiny_imagenet_50", "OUTPUT_DIR": tmp_path, "REGISTRY": tmp_path / "b"}
    changes |= {"SOLVER.MAX_ITER": 2, "TEACHER.SOLVER.MAX_ITER": 2, "TEACHER.EXPECTED_TOP1": 0.0, "TEST.EVAL_PERIOD": 0}
    overrides = [str(word) for pair in changes.items() for word in pair]
    results = distill(load_distill_config(config, [*overrides, "METHODS", "['ce', 'kd+nst-poly']"]))
    card = load_card(results["kd+nst-poly"]["backbone"])
    assert (card.num_classes, card.data["images"], card.data["validation_images"]) == (50, 6000, 1500)
    assert all(name.startswith("n0") for name in card.classes)


def test_a_method_with_its_own_levels_equals_a_run_with_these_levels(finished, images, tmp_path):
    """Beside students with other levels, and to the same bits."""
    own = {"kd+nst-poly": {"LEVELS": ["res4"], "WEIGHTS": {"nst-poly": 2.0}}}
    teacher = {"TEACHER.WEIGHTS": finished[1]["teacher"]["backbone"]}
    beside = run(images, tmp_path / "a", METHODS=["fitnet", "kd+nst-poly"], **teacher, **{"TRANSFER.BY_METHOD": own})
    keys = {"TRANSFER.LEVELS": ["res4"], "TRANSFER.WEIGHTS": {"nst-poly": 2.0}}
    alone = run(images, tmp_path / "b", METHODS=["kd+nst-poly"], **teacher, **keys)
    assert beside["kd+nst-poly"]["sha256"] == alone["kd+nst-poly"]["sha256"]
    assert beside["kd+nst-poly"]["sha256"] != finished[1]["kd+nst-poly"]["sha256"]
    assert beside["fitnet"]["sha256"] == finished[1]["fitnet"]["sha256"]
