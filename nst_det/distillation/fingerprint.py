"""What makes a run of stage one the run that it is: the keys that may not change when it goes on.

A student's claim leaves out all that only concerns other students, so that a method can be added to OUTPUT_DIR
later, and whatever decides where and how fast, not what, is computed.
"""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from nst_det.distillation.config import teacher_augment, teacher_solver, transfer_of
from nst_det.engine.config import flat, plain
from nst_det.losses import Method

FREE = ("METHODS", "OUTPUT_DIR", "REGISTRY", "TENSORBOARD", "WANDB", "CHECKPOINT_PERIOD", "LOG_PERIOD", "DATALOADER")
# what is done about a step that failed, so that a run that stopped there can go on otherwise
FREE_SOLVER = ("SOLVER.NON_FINITE", "TRUST_PICKLE")
# a cache gives what the teacher would say, unless it rounds
FREE_CACHE = ("CACHE.DIR", "CACHE.MAX_GIB")
# the fingerprint speaks for the folder
FREE_DATA = ("DATA.ROOT", "DATA.CACHE_GIB")
KEYED_BY_TERM = ("WEIGHTS", "TERM_LEVELS", "OPTIONS", "AUTO_WEIGHT")


def student_claim(config: CfgNode, method: Method, fingerprint: str, teacher_sha256: str) -> dict[str, Any]:
    """The resolved keys that a student's result depends on.

    Args:
        config: the whole config.
        method: the student's.
        fingerprint: of the data.
        teacher_sha256: of the teacher's weights; not taken up where the method has no terms.
    """
    resolved = config.clone()
    resolved.defrost()
    resolved.TRANSFER = transfer_of(config, method.word)
    values = {key: value for key, value in flat(resolved).items() if _concerns_student(key, method)}
    values |= {"METHOD": method.word, "DATA.FINGERPRINT": fingerprint}
    if method.names:
        values["TEACHER.SHA256"] = teacher_sha256
    return dict(plain(values))


def teacher_claim(config: CfgNode, fingerprint: str, sha256: str) -> dict[str, Any]:
    """The resolved keys that the teacher depends on.

    Args:
        config: the whole config.
        fingerprint: of the data.
        sha256: of TEACHER.WEIGHTS; "" where there are none.
    """
    resolved = config.clone()
    resolved.defrost()
    resolved.SOLVER, resolved.DATA.AUGMENT = teacher_solver(config), teacher_augment(config)
    kept: tuple[str, ...] = ("NAME", "SEED", "DATA", "TEST")
    if not sha256:
        kept += ("SOLVER", "TEACHER.ARCH", "TEACHER.ARCH_KWARGS", "TEACHER.PRETRAINED", "TEACHER.TRAIN")
        kept += ("FLOAT32_PRECISION",)
    free = (*FREE_DATA, *FREE_SOLVER)
    values = {key: value for key, value in flat(resolved).items() if _below(key, kept) and not _below(key, free)}
    values |= {"DATA.FINGERPRINT": fingerprint, "TEACHER.SHA256": sha256}
    return dict(plain(values))


def cache_claim(config: CfgNode, fingerprint: str, sha256: str, arch: str, precision: str) -> dict[str, Any]:
    """What the teacher's outputs in a cache depend on.

    Args:
        config: the whole config.
        fingerprint: of the data.
        sha256: of the teacher's weights.
        arch: the teacher's.
        precision: in which it computes.
    """
    pixels = ("DATA.IMAGE_SIZE", "DATA.CROP_RATIO", "DATA.MEAN", "DATA.STD", "DATA.AUGMENT")
    views = ("CACHE.VIEWS", "CACHE.VIEW_SEED", "CACHE.DTYPE")
    kept = (*pixels, *views, "FLOAT32_PRECISION")
    values = {key: value for key, value in flat(config).items() if _below(key, kept)}
    values |= {"DATA.FINGERPRINT": fingerprint, "TEACHER.SHA256": sha256, "TEACHER.ARCH": arch, "precision": precision}
    return dict(plain(values))


def _concerns_student(key: str, method: Method) -> bool:
    if _below(key, (*FREE, *FREE_CACHE, *FREE_DATA, *FREE_SOLVER, "TEACHER")):
        return False
    if key == "CACHE.DTYPE":
        return bool(method.names)
    if not _below(key, ("TRANSFER",)):
        return True
    group, _, rest = key.removeprefix("TRANSFER.").partition(".")
    return bool(method.names) and (group not in KEYED_BY_TERM or rest.split(".")[0] in method.names)


def _below(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)
