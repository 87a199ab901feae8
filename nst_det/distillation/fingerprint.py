"""What makes a run of stage one the run that it is: the keys that may not change when it resumes.

A student's claim leaves out all that only concerns other students, so that a method can be added to OUTPUT_DIR later.
"""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from nst_det.distillation.config import teacher_augment, teacher_solver, transfer_of
from nst_det.engine.config import flat, plain
from nst_det.engine.fingerprint import CACHE, STUDENT, TEACHER, TRAINED_TEACHER, concerns
from nst_det.losses import Method

KEYED_BY_TERM = ("WEIGHTS", "TERM_LEVELS", "OPTIONS", "AUTO_WEIGHT")


def student_claim(
    config: CfgNode, method: Method, fingerprint: str, teacher_sha256: str, start_sha256: str = "", probe: str = ""
) -> dict[str, Any]:
    """Return the resolved keys that a student's result depends on; the teacher only where the method has terms."""
    resolved = config.clone()
    resolved.defrost()
    resolved.TRANSFER = transfer_of(config, method.word)
    values = {key: value for key, value in flat(resolved).items() if _concerns_student(key, method)}
    taught = {"TEACHER.SHA256": teacher_sha256} if method.names else {}
    started = {"STUDENT.SHA256": start_sha256} if start_sha256 else {}
    judged = {"TEST.PROBE.FINGERPRINT": probe} if probe else {}
    return dict(plain(values | {"METHOD": method.word, "DATA.FINGERPRINT": fingerprint} | taught | started | judged))


def _concerns_student(key: str, method: Method) -> bool:
    if key == "CACHE.DTYPE":
        return bool(method.names)
    if not key.startswith("TRANSFER."):
        return concerns(key, STUDENT)
    group, _, rest = key.removeprefix("TRANSFER.").partition(".")
    return bool(method.names) and (group not in KEYED_BY_TERM or rest.split(".")[0] in method.names)


def teacher_claim(config: CfgNode, fingerprint: str, sha256: str, to_train: bool, probe: str = "") -> dict[str, Any]:
    """Return the resolved keys that the teacher depends on; ``sha256`` of TEACHER.WEIGHTS is "" without these."""
    resolved = config.clone()
    resolved.defrost()
    resolved.SOLVER, resolved.DATA.AUGMENT = teacher_solver(config), teacher_augment(config)
    what = (TEACHER,) if sha256 and not to_train else (TEACHER, TRAINED_TEACHER)
    values = {key: value for key, value in flat(resolved).items() if concerns(key, *what)}
    judged = {"TEST.PROBE.FINGERPRINT": probe} if probe else {}
    return dict(plain(values | {"DATA.FINGERPRINT": fingerprint, "TEACHER.SHA256": sha256} | judged))


def cache_claim(config: CfgNode, fingerprint: str, sha256: str, arch: str, precision: str) -> dict[str, Any]:
    """Return what the outputs in a cache depend on, of the teacher ``arch`` that computes in ``precision``."""
    values = {key: value for key, value in flat(config).items() if concerns(key, CACHE)}
    values |= {"DATA.FINGERPRINT": fingerprint, "TEACHER.SHA256": sha256, "TEACHER.ARCH": arch, "precision": precision}
    return dict(plain(values))
