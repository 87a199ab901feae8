"""The terms that a method can be made of: each file of this folder registers its own, as other packages may."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

# what a loss may ask for beside the outputs: the class of each image (of each RoI in stage two), or the objects' boxes
TRUTHS = ("", "labels", "boxes")
KINDS = ("logits", "maps", "embedding")
# in a loss's ``reads``: the teacher's output itself
OUTPUT = "output"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# modules that register terms from outside, separated by commas; imported when terms are looked up
VARIABLE = "NST_DET_TERMS"
# methods of the comparison that aren't sums of terms
RESERVED = ("ce", "scratch")
# the files of this folder that register terms, and which: known by name before torch is imported, which takes seconds;
# their order is that of a method's canonical form
OWN_TERMS = {
    "kd": ("kd",),
    "fitnet": ("fitnet",),
    "at": ("at",),
    "nst": ("nst-linear", "nst-poly", "nst-gaussian"),
    "vid": ("vid", "vid-logits"),
    "locality_preserving": ("lp",),
    "cwd": ("cwd",),
    "pkd": ("pkd",),
    "mgd": ("mgd",),
    "sp": ("sp",),
    "rkd": ("rkd",),
    "dkd": ("dkd",),
    "dist": ("dist",),
    "reviewkd": ("reviewkd",),
    "fgd": ("fgd",),
}

Build = TypeVar("Build", bound="Callable[..., nn.Module]")


@dataclass(frozen=True)
class LayerPair:
    """The two places that one module compares, and their widths.

    Attributes:
        student: the student's level, or the kind of output for logits and embedding.
        teacher: the teacher's.
        student_channels: C of the student's map, its number of classes or the length of its embedding; 0 if unknown.
        teacher_channels: the same for the teacher.
        vector: the student's level has no positions: its map is (B, C, 1, 1), a hidden layer of an MLP.
    """

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int
    vector: bool = False

    @property
    def label(self) -> str:
        """``res3``, or ``res3:res4`` where the two differ."""
        return self.student if self.student == self.teacher else f"{self.student}:{self.teacher}"


@dataclass(frozen=True)
class LossSpec:
    """One transfer loss as the methods know it: what :func:`register_term` was called with, and the class.

    Attributes:
        build: ``build(pair, **options)`` gives a module; ``module(student, teacher, shared)`` gives a scalar.
    """

    name: str
    level: str
    weight: float
    source: str
    summary: str
    build: Callable[..., nn.Module]
    student_kind: str
    vectors: bool = False
    truth: str = ""
    joint: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The options it takes and their defaults: the parameters of ``build`` after the pair."""
        _, *parameters = inspect.signature(self.build).parameters.values()
        return {parameter.name: parameter.default for parameter in parameters}


_TERMS: dict[str, LossSpec] = {}


def register_term(
    name: str,
    level: str,
    weight: float,
    source: str,
    summary: str,
    student_kind: str = "",
    vectors: bool = False,
    truth: str = "",
    joint: bool = False,
) -> Callable[[Build], Build]:
    """Decorate the class of a loss, to make it a term of methods.

    The class may declare what it ``reads`` of the teacher's output: the names (first entries of the keys) under which
    it asks ``shared`` for what each image has by itself, such as ``("attention",)``.  A teacher cache keeps these
    alone; without a declaration, or for ``"output"``, it keeps the output.

    Args:
        name: in a method: lower case, digits, hyphens.
        level: the kind of output compared: ``logits``, ``maps`` or ``embedding``.
        weight: the default weight on its value.
        source: where the default weight comes from.
        summary: what the student learns from it, in a few words.
        student_kind: the kind of output read from the student; ``level`` where it is empty.
        vectors: the class also compares a student's vector with a teacher's map (:attr:`LayerPair.vector`).
        truth: what of the annotation it is called with, as a keyword: ``labels``, ``boxes`` or nothing.
        joint: one module compares all pairs: the class and its module get lists, and the module gives one.

    Raises:
        ValueError: the name is taken, reserved or can't be part of a method; the kind or the weight isn't valid.
    """
    if not NAME.fullmatch(name) or name in RESERVED:
        raise ValueError(f"'{name}' can't name a term; use lower case, digits and hyphens, and none of {RESERVED}")
    if name in _TERMS:
        raise ValueError(f"the term '{name}' is registered already")
    student_kind = student_kind or level
    if not {level, student_kind} <= set(KINDS):
        raise ValueError(f"the term '{name}' reads '{student_kind}' and '{level}'; a term reads {', '.join(KINDS)}")
    if "maps" in (level, student_kind) and level != student_kind:
        raise ValueError(f"the term '{name}' reads '{student_kind}' and '{level}'; maps are compared with maps")
    if truth not in TRUTHS:
        raise ValueError(f"the term '{name}' asks for the truth '{truth}'; there are {', '.join(TRUTHS[1:])}")
    check_weight(name, weight)

    def register(build: Build) -> Build:
        _TERMS[name] = LossSpec(name, level, weight, source, summary, build, student_kind, vectors, truth, joint)
        return build

    return register


def unregister_term(name: str) -> None:
    """Forget a term that was registered from outside; a ValueError if there is none of that name."""
    del _TERMS[get_term(name).name]


def terms() -> dict[str, LossSpec]:
    """All terms by name, in the order in which they were registered; those of ``$NST_DET_TERMS`` are among them.

    A ValueError names a module there that can't be imported.
    """
    for file in OWN_TERMS:
        importlib.import_module(f"{__package__}.{file}")
    return {name: _TERMS[name] for name in term_names()}


def term_names() -> tuple[str, ...]:
    """Return the names of :func:`terms`, without importing those of this package."""
    for module in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"${VARIABLE}: can't import '{module}': {error}") from error
    own = tuple(name for names in OWN_TERMS.values() for name in names)
    return own + tuple(name for name in _TERMS if name not in own)


def check_term(name: str) -> None:
    """Refuse (ValueError) a name that no term has; the line lists those there are."""
    known = term_names()
    if name not in known:
        raise ValueError(f"unknown term '{name}'; known: {', '.join(known)}")


def get_term(name: str) -> LossSpec:
    """The term of that name; a ValueError lists those there are if it is none of them."""
    check_term(name)
    return terms()[name]


def check_weight(name: str, weight: float | str) -> float:
    """Return ``weight`` as a float; refuse what isn't a finite number >= 0."""
    try:
        value = float(weight)
    except (TypeError, ValueError):
        raise ValueError(f"the weight of '{name}' must be a number, not {weight!r}") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"the weight of '{name}' must be a finite number >= 0, not {weight}")
    return value
