"""The sum of a method's terms, built for the levels and widths of one student and one teacher."""

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from nst_det.losses.loss_balance import GradientBalance
from nst_det.losses.method import Method, parse_method
from nst_det.losses.ops import common_size
from nst_det.losses.outputs import ModelOutputs
from nst_det.losses.registry import LayerPair, LossSpec, check_weight, get_term, terms

Level = str | tuple[str, str]
# the name of what compares all pairs of a term at once; no level has it
JOINT = "all levels"
HEADINGS = ("term", "student", "teacher", "alignment")


class TransferLoss(nn.Module):
    """The weighted terms of one method, with their adapters (FitNet's regressor, VID's networks).

    The adapters' parameters belong to the student's training: give ``parameters()`` to its optimizer and keep
    ``state_dict()`` in its checkpoint; none of it is part of the student.

    Attributes:
        method: the method that it was built from.
        weights: term to weight; may be changed between steps.
        options: term to its options.
        pairs: term to the pairs of places it compares; a term's value is the sum over its pairs.
        kinds: term to the kinds of output that it reads from student and teacher.
        balance: measures the terms in the first steps, and sets the weights that are chosen there.
        parts: of the last forward pass, term to the value of each pair by its label, unweighted scalars.
    """

    def __init__(
        self,
        method: Method,
        weights: Mapping[str, float],
        pairs: Mapping[str, Sequence[LayerPair]],
        options: Mapping[str, Mapping[str, Any]],
        shares: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.weights = dict(weights)
        self.options = {name: dict(options[name]) for name in pairs}
        self.balance = GradientBalance(self.weights, shares or {})
        self.pairs = {name: tuple(places) for name, places in pairs.items()}
        self.kinds = {name: (get_term(name).student_kind, get_term(name).level) for name in pairs}
        self._truths = {name: get_term(name).truth for name in pairs}
        self.terms = nn.ModuleDict(
            {
                name: nn.ModuleDict(_modules(get_term(name), places, options[name]))
                for name, places in self.pairs.items()
            }
        )
        self.parts: dict[str, dict[str, Tensor]] = {}

    @property
    def student_levels(self) -> tuple[str, ...]:
        """The levels whose maps are read from the student."""
        read = [pair.student for name, pairs in self.pairs.items() if self.kinds[name][0] == "maps" for pair in pairs]
        return tuple(dict.fromkeys(read))

    @property
    def teacher_levels(self) -> tuple[str, ...]:
        """The levels whose maps are read from the teacher."""
        read = [pair.teacher for name, pairs in self.pairs.items() if self.kinds[name][1] == "maps" for pair in pairs]
        return tuple(dict.fromkeys(read))

    def reads(self, who: str) -> frozenset[str]:
        """The kinds of output (``logits``, ``maps``, ``embedding``) read from ``student`` or ``teacher``."""
        return frozenset(kinds[who == "teacher"] for kinds in self.kinds.values())

    def module(self, term: str, pair: LayerPair) -> nn.Module:
        """What compares one of a term's pairs, alone or with the others."""
        modules = cast(nn.ModuleDict, self.terms[term])
        return modules[pair.label if pair.label in modules else JOINT]

    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> dict[str, Tensor]:
        """Each term by name: its weight times its value, a scalar in float32 even under autocast.

        Gradient goes to the student's outputs and the adapters, never to the teacher's.

        Raises:
            ValueError: an output that a term reads isn't there, or has a shape that can't be compared.
        """
        values: dict[str, Tensor] = {}
        for name, pairs in self.pairs.items():
            student_kind, teacher_kind = self.kinds[name]
            truth = student.truth(self._truths[name])
            mine = [student.of(student_kind, pair.student) for pair in pairs]
            theirs = [teacher.of(teacher_kind, pair.teacher) for pair in pairs]
            shared = [partial(_shared, teacher, (teacher_kind, pair.teacher)) for pair in pairs]
            modules = [self.module(name, pair) for pair in pairs]
            with torch.autocast(theirs[0].device.type, enabled=False):
                if JOINT in cast(nn.ModuleDict, self.terms[name]):
                    parts = modules[0](mine, theirs, shared, **truth)
                else:
                    each = zip(modules, mine, theirs, shared)
                    parts = [module(*given, **truth) for module, *given in each]
            value, weight = torch.stack(parts).sum() if len(parts) > 1 else parts[0], self.weights[name]
            values[name] = value if weight == 1 else weight * value
            self.parts[name] = {pair.label: value.detach() for pair, value in zip(pairs, parts)}
        return values

    def extra_repr(self) -> str:
        """The method and its weights."""
        return f"{self.method}, weights={self.weights}"


def _modules(term: LossSpec, pairs: Sequence[LayerPair], options: Mapping[str, Any]) -> dict[str, nn.Module]:
    if term.joint:
        return {JOINT: term.build(pairs, **options)}
    return {pair.label: term.build(pair, **options) for pair in pairs}


def _shared(teacher: ModelOutputs, place: tuple[str, str], key: Hashable, compute: Any) -> Any:
    return teacher.shared((place, key), compute)


def build_transfer(
    method: str | Method,
    *,
    levels: Sequence[Level] = (),
    student_channels: Mapping[str, int] | None = None,
    teacher_channels: Mapping[str, int] | None = None,
    num_classes: int | None = None,
    student_embedding: int | None = None,
    teacher_embedding: int | None = None,
    student_vectors: Collection[str] = (),
    weights: Mapping[str, float] | None = None,
    term_levels: Mapping[str, Sequence[Level]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    auto_weight: Mapping[str, float] | None = None,
) -> TransferLoss:
    """The losses of ``method`` for one student and one teacher.

    Args:
        method: such as ``kd+nst-poly:50``, or a parsed one; ``ce`` gives no terms.
        levels: where maps are compared: a level's name if both have it, ``(student's, teacher's)`` or
            ``"student:teacher"`` where they differ.
        student_channels: the student's levels and their channel counts.
        teacher_channels: the teacher's.
        num_classes: K of the logits.
        student_embedding: length of the student's embedding, for terms that have parameters there.
        teacher_embedding: the teacher's.
        student_vectors: those of the student's levels that have no positions.
        weights: term to weight, used where the method has none; the term's default comes last.
        term_levels: term to its own levels instead of ``levels``; a student's level that is in ``levels`` keeps
            its partner there.
        options: term to its options (``{"kd": {"temperature": 2.0}}``).
        auto_weight: term to the share of the task's gradient norm at the student's backbone that its weight is to
            give it (see ``GradientBalance``); takes precedence over ``weights``, not over a weight in the method.
            These four may name terms that this method lacks, so that one configuration serves several methods.

    Returns:
        The module; its adapters are drawn from torch's global generator on the CPU.

    Raises:
        ValueError: an unknown term, level or option, or a term without what it reads; one line, listing what there is.

    Example:
        >>> loss = build_transfer("nst-poly", levels=["res4"], student_channels={"res4": 8},
        ...                       teacher_channels={"res4": 16})
        >>> student = ModelOutputs(maps={"res4": torch.rand(2, 8, 7, 7)})
        >>> teacher = ModelOutputs(maps={"res4": torch.rand(2, 16, 7, 7)})
        >>> sorted(loss(student, teacher))
        ['nst-poly']
    """
    method = parse_method(method)
    weights, options, term_levels, auto_weight = weights or {}, options or {}, term_levels or {}, auto_weight or {}
    for name in (*weights, *options, *term_levels, *auto_weight):
        get_term(name)
    partners = _level_pairs(levels, {})
    widths = {"logits": (num_classes, num_classes), "embedding": (student_embedding, teacher_embedding)}
    chosen: dict[str, float] = {}
    shares: dict[str, float] = {}
    pairs: dict[str, list[LayerPair]] = {}
    all_options: dict[str, dict[str, Any]] = {}
    for name, weight in method:
        term = get_term(name)
        in_config = check_weight(name, weights.get(name, term.weight))
        chosen[name] = in_config if weight is None else weight
        if weight is None and name in auto_weight:
            # until the first step is measured it has the weight that it would have had, but something to scale
            shares[name], chosen[name] = _checked_share(name, auto_weight[name]), in_config or 1.0
        if term.level == "maps":
            places = _level_pairs(term_levels[name], dict(partners)) if term_levels.get(name) else partners
            pairs[name] = _map_pairs(term, places, student_channels or {}, teacher_channels or {}, student_vectors)
        else:
            student, teacher = widths[term.student_kind][0], widths[term.level][1]
            pairs[name] = [LayerPair(term.student_kind, term.level, student or 0, teacher or 0)]
        all_options[name] = {**term.options, **_checked_options(term, options.get(name) or {})}
    return TransferLoss(method, chosen, pairs, all_options, shares)


def _checked_options(term: LossSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"OPTIONS: {term.name} must be a mapping such as {{temperature: 2.0}}, not {given!r}")
    for key in given:
        if key not in term.options:
            raise ValueError(f"{term.name} has no option '{key}'; it has {_listed(term.options)}")
    return {key: _of_its_kind(f"{term.name}: {key}", value, term.options[key]) for key, value in given.items()}


def _of_its_kind(name: str, value: Any, default: Any) -> Any:
    """Return the value of an option; refuse a flag, a count or a number that isn't one."""
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "True or False"
    elif isinstance(default, int | float):
        value = _number(value)
        kind, wanted = (int, "a whole number") if isinstance(default, int) else (int | float, "a finite number")
        fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    else:
        return value
    if not fits:
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
    return value


def _number(value: Any) -> Any:
    """Return as a number what YAML 1.1 reads as text, such as 5e-5."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _checked_share(name: str, share: Any) -> float:
    share = _number(share)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
        raise ValueError(f"AUTO_WEIGHT: the share of '{name}' must be a finite number above 0, not {share!r}")
    return float(share)


def _level_pairs(levels: Iterable[Level], partners: Mapping[str, str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if isinstance(levels, str | Mapping):
        raise ValueError(f"levels must be a list such as [res3, res4], not {levels!r}")
    for level in levels:
        if isinstance(level, str):
            student, colon, teacher = (part.strip() for part in level.partition(":"))
            pair = (student, teacher if colon else partners.get(student, student))
        elif isinstance(level, list | tuple) and len(level) == 2:
            pair = (str(level[0]), str(level[1]))
        else:
            raise ValueError(f"the level {level!r} must be a name such as res3, or a pair such as res3:res4")
        if pair in found:
            raise ValueError(f"the level {level} is named twice")
        found.append(pair)
    return found


def _map_pairs(
    term: LossSpec,
    places: Sequence[tuple[str, str]],
    student: Mapping[str, int],
    teacher: Mapping[str, int],
    vectors: Collection[str],
) -> list[LayerPair]:
    if not term.vectors and vectors and set(student) <= set(vectors):
        fitting = [other.name for other in terms().values() if other.vectors or other.student_kind != "maps"]
        raise ValueError(
            f"{term.name} compares maps, but the student has vectors only ({_listed(vectors)}); for it there are "
            f"{_listed(fitting)}"
        )
    if not places:
        raise ValueError(f"{term.name} compares maps, but no level is named; the student has {_listed(student)}")
    for who, there, names in zip(("student", "teacher"), (student, teacher), zip(*places)):
        for name in names:
            if name not in there:
                raise ValueError(f"{term.name}: the {who} has no level '{name}'; it has {_listed(there)}")
    return [LayerPair(s, t, student[s], teacher[t], s in vectors) for s, t in places]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def pair_shapes(
    loss: TransferLoss,
    student: ModelOutputs,
    teacher: ModelOutputs,
    student_strides: Mapping[str, int],
    teacher_strides: Mapping[str, int],
) -> list[tuple[str, str, str, str]]:
    """The pairs that ``loss`` compares in outputs of one image, as rows of a table with :data:`HEADINGS`.

    A row is term, place and shape (without the batch) of student and teacher, and what is done where sizes differ;
    ``student_strides`` and ``teacher_strides`` are by level.  A ValueError names an output that isn't there.
    """

    def place(name: str, output: Tensor, strides: Mapping[str, int]) -> str:
        stride = f", stride {strides[name]}" if strides.get(name) else ""
        return f"{name}: {' x '.join(map(str, output.shape[1:]))}{stride}"

    rows = []
    for name, pairs in loss.pairs.items():
        student_kind, teacher_kind = loss.kinds[name]
        for pair in pairs:
            mine, theirs = student.of(student_kind, pair.student), teacher.of(teacher_kind, pair.teacher)
            alignment, grid = "none", getattr(loss.module(name, pair), "grid", 0)
            if grid:
                alignment = f"student spread over, teacher averaged to {grid} x {grid}"
            elif student_kind == "maps" and mine.shape[2:] != theirs.shape[2:]:
                height, width = common_size(mine, theirs)
                sides = [who for who, x in (("student", mine), ("teacher", theirs)) if x.shape[2:] != (height, width)]
                alignment = f"{' and '.join(sides)} averaged down to {height} x {width}"
            mine_at, theirs_at = (
                place(pair.student, mine, student_strides),
                place(pair.teacher, theirs, teacher_strides),
            )
            rows.append((name, mine_at, theirs_at, alignment))
    return rows
