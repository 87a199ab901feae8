"""The terms that a method can be made of.

A term is one transfer loss at one kind of output.  Each file of this folder registers its own; code outside the
package does the same with :func:`register_term` and may then use its name in any method.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

KINDS = ("logits", "maps", "embedding")
# in a loss's ``reads``: the teacher's output itself
OUTPUT = "output"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# modules that register terms from outside, separated by commas; imported when terms are first looked up
VARIABLE = "NST_DET_TERMS"
# words of the comparison that aren't sums of terms
RESERVED = ("ce", "scratch")


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
    """One transfer loss as the methods know it.

    Attributes:
        name: its word in a method: lower case, digits, hyphens.
        level: the kind of output compared: ``logits``, ``maps`` or ``embedding``.
        weight: the default weight on its value.
        source: where the default weight comes from.
        summary: what is handed over, in a few words.
        build: ``build(pair, **options)`` gives a module; ``module(student, teacher, shared)`` gives a scalar.
            Its class may declare ``reads``: what it reads of the teacher's output, ``"output"`` for all of it, or the
            names (first entries of the keys) under which it asks ``shared`` for what each image has by itself, such
            as ``("attention",)``.  A teacher cache keeps these alone; without a declaration it keeps the output.
        options: the names it takes and their defaults.
        student_level: the student's kind of output where it isn't ``level``.
        needs_widths: the module has parameters shaped by the pair's channels, so these must be known.
        vectors: the module also compares a student's vector with a teacher's map (:attr:`LayerPair.vector`).
    """

    name: str
    level: str
    weight: float
    source: str
    summary: str
    build: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    student_level: str | None = None
    needs_widths: bool = False
    vectors: bool = False

    @property
    def student_kind(self) -> str:
        """The kind of output read from the student."""
        return self.student_level or self.level


_TERMS: dict[str, LossSpec] = {}
_IMPORTED: set[str] = set()


def register_term(term: LossSpec) -> LossSpec:
    """Make ``term`` usable in methods, after all others in a method's canonical word.

    Raises:
        ValueError: the name is taken, reserved or can't stand in a word; the kind or the weight isn't valid.
    """
    if not NAME.fullmatch(term.name) or term.name in RESERVED:
        raise ValueError(f"'{term.name}' can't name a term; use lower case, digits and hyphens, and none of {RESERVED}")
    if term.name in _TERMS:
        raise ValueError(f"the term '{term.name}' is registered already")
    for kind in (term.level, term.student_kind):
        if kind not in KINDS:
            raise ValueError(f"the term '{term.name}' reads '{kind}'; a term reads one of {', '.join(KINDS)}")
    check_weight(term.name, term.weight)
    _TERMS[term.name] = term
    return term


def unregister_term(name: str) -> None:
    """Forget a term that was registered from outside (for tests and notebooks).

    Raises:
        ValueError: there is none of that name.
    """
    get_term(name)
    del _TERMS[name]


def terms() -> dict[str, LossSpec]:
    """All terms by name, in the order in which they were registered; those of ``$NST_DET_TERMS`` are among them.

    Raises:
        ValueError: a module named there can't be imported.
    """
    _import_outside()
    return dict(_TERMS)


def get_term(name: str) -> LossSpec:
    """The term of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    _import_outside()
    if name not in _TERMS:
        raise ValueError(f"unknown term '{name}'; known: {', '.join(_TERMS)}")
    return _TERMS[name]


def _import_outside() -> None:
    named = [part.strip() for part in os.environ.get(VARIABLE, "").split(",") if part.strip()]
    for module in named:
        if module in _IMPORTED:
            continue
        # before the import, since the module itself may look terms up
        _IMPORTED.add(module)
        try:
            importlib.import_module(module)
        except ImportError as error:
            _IMPORTED.discard(module)
            raise ValueError(f"${VARIABLE}: can't import '{module}': {error}") from error


def check_weight(name: str, weight: float | str) -> float:
    """``weight`` as a float.

    Raises:
        ValueError: it isn't a finite number >= 0.
    """
    try:
        value = float(weight)
    except (TypeError, ValueError):
        raise ValueError(f"the weight of '{name}' must be a number, not {weight!r}") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"the weight of '{name}' must be a finite number >= 0, not {weight}")
    return value
