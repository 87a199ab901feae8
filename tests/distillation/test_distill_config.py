from pathlib import Path

import pytest

from nst_det.distillation.config import load_distill_config, teacher_augment, teacher_solver, transfer_of
from nst_det.distillation.fingerprint import student_claim, teacher_claim
from nst_det.engine.config import plain
from nst_det.errors import UserError
from nst_det.losses import parse_method

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "distill"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_of_the_repository(file):
    config = load_distill_config(file, ["DATA.ROOT", "somewhere"])
    # a perceptron has no maps to compare
    of_maps = [] if "mlp" in file.stem else ["at", "nst-poly", "kd+nst-poly"]
    wanted = {"ce", "kd", "fitnet", *of_maps} if config.DATA.LABELS else {"kd"}
    assert wanted <= set(config.METHODS)


# each must be named by its key; where another key is named, it is the third
BAD = [
    ("DATA.ROOT", "''"),
    ("DATA.IMAGE_SIZE", "4"),
    ("DATA.MEAN", "[124, 116, 104]"),
    ("DATA.MEAN", "[0.5]"),
    ("DATA.STD", "[0, 0.2, 0.2]"),
    ("DATA.VAL_FRACTION", "1.5"),
    ("DATA.AUGMENT.HFLIP", "2"),
    ("DATA.AUGMENT.CROP_AREA", "[1.0, 0.1]"),
    ("DATA.AUGMENT.COLOR_JITTER", "[0.4]"),
    ("TEACHER.AUGMENT.SHIFT", "-1"),
    ("TEACHER.AUGMENT.SHIFT", "224"),
    ("DATA.AUGMENT.SHIFT", "224", "DATA.AUGMENT.SHIFT"),
    ("TEACHER.AUGMENT.SHFT", "1", "SHIFT"),
    ("TEACHER.SOLVER.MAX_ITR", "3", "MAX_ITER"),
    ("TEACHER.SOLVER.OPTIMIZER", "ADAM"),
    ("TEACHER.EXPECTED_TOP1", "76.1"),
    ("SOLVER.LR_SCHEDULER_NAME", "linear"),
    ("SOLVER.AMP.DTYPE", "fp8"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"),
    ("SOLVER.CHECKPOINT_PERIOD", "0"),
    ("SOLVER.BASE_LR", "0"),
    ("SOLVER.BASE_LR", "fast"),
    ("SOLVER.IMS_PER_BATCH", "1"),
    ("SOLVER.STEPS", "[30, 20]"),
    ("SOLVER.MOMENTUM", "0", "SOLVER.NESTEROV"),
    ("SOLVER.WEIGHT_DECAY_NORM", "None"),
    ("SOLVER.EMA_DECAY", "-0.1"),
    ("SOLVER.EMA_DECAY", "1.0"),
    ("SOLVER.NON_FINITE.LIMIT", "0"),
    ("TEACHER.SOLVER", "{NON_FINITE: {LR_FACTOR: 0}}", "TEACHER.SOLVER.NON_FINITE.LR_FACTOR"),
    ("CACHE.DIR", "somewhere", "CACHE.VIEWS"),
    ("CACHE.DTYPE", "fp16", "CACHE.DIR"),
    ("METHODS", "[3]"),
    ("METHODS", "[nix]"),
    ("SOLVR.BASE_LR", "1", "SOLVR"),
    ("TRANSFER.BY_METHOD", "{nst-ploy: {LEVELS: [res3]}}", "BY_METHOD.nst-ploy"),
    ("TRANSFER.BY_METHOD", "{nst-poly+kd: {LEVELS: [res3]}}", "BY_METHOD.nst-poly+kd"),
    ("TRANSFER.BY_METHOD", "{kd: {LEVEL: [res3]}}", "BY_METHOD.kd"),
    ("TRANSFER.BY_METHOD", "{kd: {LEVELS: {a: 1}}}", "BY_METHOD.kd: LEVELS"),
]


@pytest.mark.parametrize("bad", BAD, ids=" ".join)
def test_bad_values_are_named(bad):
    with pytest.raises(UserError) as caught:
        load_distill_config(None, ["DATA.ROOT", "x", *bad[:2]])
    assert (bad[2] if len(bad) == 3 else bad[0]) in str(caught.value)


def test_the_teachers_keys_override_the_students():
    changes = ["SOLVER.MAX_ITER", "50", "TEACHER.SOLVER.MAX_ITER", "70", "TEACHER.AUGMENT.SHIFT", "4"]
    config = load_distill_config(None, ["DATA.ROOT", "x", *changes, "DATA.AUGMENT.HFLIP", "0.5"])
    assert (config.SOLVER.MAX_ITER, teacher_solver(config).MAX_ITER) == (50, 70)
    assert teacher_solver(config).BASE_LR == config.SOLVER.BASE_LR
    assert (teacher_augment(config).SHIFT, teacher_augment(config).HFLIP, config.DATA.AUGMENT.SHIFT) == (4, 0.5, 0)


def claims(changes=(), method="kd+nst-poly"):
    config = load_distill_config(None, ["DATA.ROOT", "x", *changes])
    return student_claim(config, parse_method(method), "data", "teacher"), teacher_claim(config, "data", "", True)


# key, value, whether it binds the student kd+nst-poly, whether it binds the teacher
BOUND = [
    ("METHODS", "['ce', 'at']", False, False),
    ("TRANSFER.WEIGHTS.fitnet", "3.0", False, False),
    ("TRANSFER.OPTIONS.fitnet.regressor", "conv-bn-relu", False, False),
    ("TRANSFER.TERM_LEVELS.at", "['res5']", False, False),
    ("DATA.ROOT", "elsewhere", False, False),
    ("DATA.CACHE_GIB", "0.0", False, False),
    ("REGISTRY", "r", False, False),
    ("OUTPUT_DIR", "o", False, False),
    ("SOLVER.CHECKPOINT_PERIOD", "7", False, False),
    ("DATALOADER.NUM_WORKERS", "-1", False, False),
    ("TEACHER.EXPECTED_TOP1", "0.5", False, False),
    ("TRANSFER.WEIGHTS.kd", "3.0", True, False),
    ("TRANSFER.OPTIONS.kd.temperature", "2.0", True, False),
    ("TRANSFER.LEVELS", "['res4']", True, False),
    ("SOLVER.BASE_LR", "0.2", True, True),
    ("SEED", "1", True, True),
    ("DATA.AUGMENT.SHIFT", "1", True, True),
    ("STUDENT.ARCH", "resnet18", True, False),
    ("STUDENT.ARCH_KWARGS.drop_rate", "0.1", True, False),
    ("TEACHER.SOLVER.MAX_ITER", "9", False, True),
    ("TEACHER.ARCH", "resnet18", False, True),
]


@pytest.mark.parametrize(("key", "value", "student", "teacher"), BOUND)
def test_what_binds_a_run(key, value, student, teacher):
    changed = [one != other for one, other in zip(claims([key, value]), claims())]
    assert changed == [student, teacher]


def test_a_student_without_terms_is_bound_to_no_teacher():
    assert claims(["TRANSFER.LEVELS", "['res4']"], "ce")[0] == claims((), "ce")[0]
    assert "TEACHER.SHA256" not in claims((), "ce")[0]
    assert claims()[0]["TEACHER.SHA256"] == "teacher"


def test_a_method_may_have_its_own_levels_and_weights():
    own = "{nst-poly: {LEVELS: [res4], WEIGHTS: {nst-poly: 7.0}}, kd+nst-poly: {WEIGHTS: {kd: 2.0}}}"
    config = load_distill_config(None, ["DATA.ROOT", "x", "TRANSFER.WEIGHTS.nst-poly", "3", "TRANSFER.BY_METHOD", own])
    found = {name: transfer_of(config, name) for name in ("nst-poly", "kd+nst-poly", "kd")}
    assert [node.LEVELS for node in found.values()] == [["res4"], ["res3", "res4"], ["res3", "res4"]]
    assert plain(found["nst-poly"].WEIGHTS) == {"nst-poly": 7.0}
    assert plain(found["kd+nst-poly"].WEIGHTS) == {"nst-poly": 3, "kd": 2.0}
    # the run is that which the same values would make for all methods
    change = ["TRANSFER.BY_METHOD", "{nst-poly: {LEVELS: [res4]}}"]
    assert claims(change, "nst-poly")[0] == claims(["TRANSFER.LEVELS", "[res4]"], "nst-poly")[0]
    assert claims(change, "kd")[0] == claims((), "kd")[0]
