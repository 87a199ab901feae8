from pathlib import Path

import pytest

from nst_det.distillation.config import get_defaults, load_distill_config, teacher_augment, teacher_solver, transfer_of
from nst_det.distillation.fingerprint import student_claim, teacher_claim
from nst_det.engine.config import plain
from nst_det.errors import UserError
from nst_det.losses import parse_method

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "distill"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_in_the_repository_are_valid(file):
    config = load_distill_config(file, ["DATA.ROOT", "somewhere"])
    assert config.METHODS == ["ce", "kd", "fitnet", "at", "nst-poly", "kd+nst-poly"]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("DATA.ROOT", "''", "DATA.ROOT must be the path of an image folder"),
        ("DATA.IMAGE_SIZE", "4", "DATA.IMAGE_SIZE must be at least 8"),
        ("DATA.MEAN", "[124, 116, 104]", "DATA.MEAN must be three numbers on the 0..1 scale"),
        ("DATA.MEAN", "[0.5]", "DATA.MEAN must be three numbers"),
        ("DATA.STD", "[0, 0.2, 0.2]", "DATA.STD must be above 0"),
        ("DATA.VAL_FRACTION", "1.5", "DATA.VAL_FRACTION must be a fraction"),
        ("DATA.AUGMENT.HFLIP", "2", "DATA.AUGMENT.HFLIP must be a probability"),
        ("DATA.AUGMENT.CROP_AREA", "[1.0, 0.1]", "DATA.AUGMENT.CROP_AREA must be"),
        ("DATA.AUGMENT.COLOR_JITTER", "[0.4]", "DATA.AUGMENT.COLOR_JITTER must be"),
        ("TEACHER.AUGMENT.SHIFT", "-1", "TEACHER.AUGMENT.SHIFT must be"),
        ("TEACHER.AUGMENT.SHFT", "1", "TEACHER.AUGMENT: unknown key SHFT; did you mean SHIFT?"),
        ("TEACHER.SOLVER.MAX_ITR", "3", "TEACHER.SOLVER: unknown key MAX_ITR; did you mean MAX_ITER?"),
        ("TEACHER.SOLVER.OPTIMIZER", "ADAM", "TEACHER.SOLVER.OPTIMIZER must be one of SGD, ADAMW"),
        ("TEACHER.EXPECTED_TOP1", "76.1", "TEACHER.EXPECTED_TOP1 must be a fraction from 0 to 1"),
        ("SOLVER.LR_SCHEDULER_NAME", "linear", "SOLVER.LR_SCHEDULER_NAME must be one of"),
        ("SOLVER.AMP.DTYPE", "fp8", "SOLVER.AMP.DTYPE must be one of auto, bf16, fp16"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be one of"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD must be at least 1"),
        ("SOLVER.BASE_LR", "0", "SOLVER.BASE_LR must be above 0"),
        ("SOLVER.BASE_LR", "fast", "SOLVER.BASE_LR must be of type float"),
        ("SOLVER.IMS_PER_BATCH", "1", "SOLVER.IMS_PER_BATCH must be at least 2"),
        ("SOLVER.STEPS", "[30, 20]", "SOLVER.STEPS must be rising"),
        ("SOLVER.MOMENTUM", "0", "SOLVER.NESTEROV must be False where MOMENTUM is 0"),
        ("METHODS", "[3]", "METHODS must be a list of method words"),
        ("SOLVR.BASE_LR", "1", "unknown key SOLVR"),
        ("TRANSFER.BY_METHOD", "{nst-linear: {LEVELS: [res3]}}", "BY_METHOD.nst-linear must be one of METHODS: ce, kd"),
        ("TRANSFER.BY_METHOD", "{kd: {LEVEL: [res3]}}", "BY_METHOD.kd must be a mapping with LEVELS, WEIGHTS"),
        ("TRANSFER.BY_METHOD", "{kd: {LEVELS: res3}}", "BY_METHOD.kd: LEVELS must be of type list"),
    ],
)
def test_values_out_of_range_are_named(key, value, says):
    with pytest.raises(UserError, match=says) as caught:
        load_distill_config(None, ["DATA.ROOT", "x", key, value])
    assert "\n" not in str(caught.value)


def test_the_teachers_keys_go_over_the_students():
    words = ["DATA.ROOT", "x", "SOLVER.MAX_ITER", "50", "TEACHER.SOLVER.MAX_ITER", "70", "TEACHER.AUGMENT.SHIFT", "4"]
    config = load_distill_config(None, [*words, "DATA.AUGMENT.HFLIP", "0.5"])
    assert (config.SOLVER.MAX_ITER, teacher_solver(config).MAX_ITER) == (50, 70)
    assert teacher_solver(config).BASE_LR == config.SOLVER.BASE_LR
    assert (teacher_augment(config).SHIFT, teacher_augment(config).HFLIP, config.DATA.AUGMENT.SHIFT) == (4, 0.5, 0)


def claims(overrides=(), method="kd+nst-poly"):
    config = load_distill_config(None, ["DATA.ROOT", "x", *overrides])
    return student_claim(config, parse_method(method), "data", "teacher"), teacher_claim(config, "data", "")


@pytest.mark.parametrize(
    "change",
    [
        ["METHODS", "['ce', 'at']"],
        ["TRANSFER.WEIGHTS.fitnet", "3.0"],
        ["TRANSFER.OPTIONS.fitnet.regressor", "conv-bn-relu"],
        ["TRANSFER.TERM_LEVELS.at", "['res5']"],
        ["DATA.ROOT", "elsewhere"],
        ["DATA.CACHE_GIB", "0.0"],
        ["REGISTRY", "r"],
        ["OUTPUT_DIR", "o"],
        ["SOLVER.CHECKPOINT_PERIOD", "7"],
        ["DATALOADER.NUM_WORKERS", "3"],
        ["DATALOADER.NUM_WORKERS", "-1"],
        ["TEACHER.EXPECTED_TOP1", "0.5"],
    ],
)
def test_what_concerns_others_doesnt_bind_a_student(change):
    assert claims(change) == claims()


@pytest.mark.parametrize(
    "change",
    [
        ["TRANSFER.WEIGHTS.kd", "3.0"],
        ["TRANSFER.OPTIONS.kd.temperature", "2.0"],
        ["TRANSFER.LEVELS", "['res4']"],
        ["SOLVER.BASE_LR", "0.2"],
        ["SEED", "1"],
        ["DATA.AUGMENT.SHIFT", "1"],
        ["STUDENT.ARCH", "resnet18"],
        ["STUDENT.ARCH_KWARGS.drop_rate", "0.1"],
    ],
)
def test_what_changes_a_student_binds_it(change):
    assert claims(change)[0] != claims()[0]


def test_a_method_may_have_its_own_levels_and_weights():
    own = "{nst-poly: {LEVELS: [res4], WEIGHTS: {nst-poly: 7.0}}, kd+nst-poly: {WEIGHTS: {kd: 2.0}}}"
    config = load_distill_config(None, ["DATA.ROOT", "x", "TRANSFER.WEIGHTS.nst-poly", "3", "TRANSFER.BY_METHOD", own])
    node = transfer_of(config, "nst-poly")
    assert (node.LEVELS, plain(node.WEIGHTS)) == (["res4"], {"nst-poly": 7.0})
    node = transfer_of(config, "kd+nst-poly")
    assert (node.LEVELS, plain(node.WEIGHTS)) == (["res3", "res4"], {"nst-poly": 3, "kd": 2.0})
    assert transfer_of(config, "kd").LEVELS == ["res3", "res4"]
    # the run is that which the same values would make for all methods
    change = ["TRANSFER.BY_METHOD", "{nst-poly: {LEVELS: [res4]}}"]
    assert claims(change, "nst-poly")[0] == claims(["TRANSFER.LEVELS", "[res4]"], "nst-poly")[0]
    assert claims(change, "kd")[0] == claims((), "kd")[0]


def test_a_student_without_terms_isnt_bound_to_teacher_or_transfer():
    assert claims(["TRANSFER.LEVELS", "['res4']"], "ce")[0] == claims((), "ce")[0]
    assert "TEACHER.SHA256" not in claims((), "ce")[0]
    assert claims()[0]["TEACHER.SHA256"] == "teacher"


def test_the_teacher_is_bound_to_its_own_solver():
    assert claims(["TEACHER.SOLVER.MAX_ITER", "9"])[1] != claims()[1]
    assert claims(["TEACHER.ARCH", "resnet18"])[1] != claims()[1]
    assert claims(["TEACHER.SOLVER.MAX_ITER", "9"])[0] == claims()[0]
    assert claims(["TRANSFER.LEVELS", "['res4']"])[1] == claims()[1]


def test_defaults_are_complete():
    assert get_defaults().TRANSFER.LEVELS == ["res3", "res4"]
