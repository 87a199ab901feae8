"""What the losses of a run read of a teacher, found out by trial, so that a cache keeps nothing else.

A loss reads a teacher's output itself, or only what it derives from it for all students (a Gram matrix, an attention
map).  The losses are run on a few images with NaN in the place of what might be left out: where values and gradients
stay the same, it can be.  No term has to say what it reads, and terms from outside the package are served as well.
"""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from nst_det.distillation.build import for_losses
from nst_det.engine.seeds import seeded
from nst_det.losses import ModelOutputs, TransferLoss
from nst_det.losses.ops import full_precision

# images of a trial; more than one, so that a loss over the batch shows itself
IMAGES = 4
# beside an output, what is derived from it is kept if it takes at most this part of its bytes
SMALL = 1 / 16


@dataclass(frozen=True)
class Piece:
    """A tensor on the teacher's side, for one image.

    Attributes:
        kind: ``logits``, ``maps`` or ``embedding``.
        place: the level, or the kind again.
        key: the Python literal under which losses share what they derive; "" for the output itself.
        shape: without the batch.
        dtype: in which it is kept, such as ``float32``.
        kept: False where losses read its shape at most.
    """

    kind: str
    place: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    kept: bool = True

    @property
    def name(self) -> str:
        """``res4``, or ``res4 ('nst', 'gram', (14, 14))`` for what is derived from it."""
        return f"{self.place} {self.key}" if self.key else self.place

    @property
    def shared_key(self) -> Hashable:
        """Under which :class:`ModelOutputs` keeps what losses share."""
        return (self.kind, self.place), ast.literal_eval(self.key)

    @property
    def bytes(self) -> int:
        """Of one image; 0 if it isn't kept."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize if self.kept else 0


def assemble(pieces: Sequence[Piece], values: Mapping[str, Tensor], count: int, device: torch.device) -> ModelOutputs:
    """The teacher's outputs for losses, NaN where nothing is kept.

    Args:
        pieces: all of a cache, or of a trial.
        values: by name, what is kept of ``count`` images: (count, *shape).
        count: B.
        device: of the result.
    """
    read = ModelOutputs()
    for piece in pieces:
        if piece.kept and not piece.key:
            _put(read, piece, values[piece.name].to(device, non_blocking=True))
    outputs = for_losses(read)
    for piece in pieces:
        if not piece.kept:
            # one number, whatever the shape
            _put(outputs, piece, torch.full((), math.nan, device=device).expand(count, *piece.shape))
        elif piece.key:
            value = values[piece.name].to(device, non_blocking=True)
            _put(outputs, piece, full_precision(value) if value.is_floating_point() else value)
    return outputs


def is_stand_in(value: Tensor) -> bool:
    """Whether :func:`assemble` put one NaN, seen as (B, ...), where nothing is kept since no loss reads it."""
    return value.dim() > 0 and value.numel() > 1 and not any(value.stride())


def _put(outputs: ModelOutputs, piece: Piece, value: Tensor) -> None:
    if piece.key:
        outputs.keep(piece.shared_key, value)
    elif piece.kind == "maps":
        outputs.maps[piece.place] = value
    else:
        setattr(outputs, piece.kind, value)


class Trial:
    """The losses of all methods on a few images.

    Args:
        losses: by method; copied.
        student: what a student says about :data:`IMAGES` images, as the losses read it.
        device: of all tensors.
    """

    def __init__(self, losses: Mapping[str, TransferLoss], student: ModelOutputs, device: torch.device) -> None:
        self.losses = {word: copy.deepcopy(loss).to(device) for word, loss in losses.items() if loss.pairs}
        self.student, self.device = student, device
        self.sources = tuple(
            dict.fromkeys(
                (loss.kinds[name][1], pair.teacher)
                for loss in losses.values()
                for name, pairs in loss.pairs.items()
                for pair in pairs
            )
        )

    def results(self, teacher: ModelOutputs, rows: slice = slice(None)) -> dict[str, list[Tensor]]:
        """By method, the loss (a scalar) and its gradients in the student's outputs and adapters, for some images."""
        found = {}
        for word, loss in self.losses.items():
            student, leaves = self._student(torch.arange(IMAGES)[rows])
            # mgd draws a mask
            with seeded("trial"), torch.enable_grad():
                total = torch.stack(list(loss(student, teacher).values())).sum()
            # twice, as in the steps in which the terms are measured
            wanted = [*leaves, *loss.parameters()]
            once = torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=True)
            again = torch.autograd.grad(total, wanted, allow_unused=True)
            found[word] = [total.detach(), *(gradient for gradient in (*once, *again) if gradient is not None)]
        return found

    def fill(self, teacher: ModelOutputs) -> None:
        """Let the losses derive what they share from the teacher's outputs for any number of images."""
        count = next(len(teacher.of(*source)) for source in self.sources)
        student, _ = self._student(torch.arange(count) % IMAGES)
        with torch.no_grad(), seeded("trial"):
            for loss in self.losses.values():
                loss(student, teacher)

    def _student(self, images: Tensor) -> tuple[ModelOutputs, list[Tensor]]:
        images = images.to(self.device)
        leaves: list[Tensor] = []

        def leaf(value: Tensor) -> Tensor:
            leaves.append(value.detach()[images].requires_grad_())
            return leaves[-1]

        given = self.student
        student = ModelOutputs(maps={name: leaf(value) for name, value in given.maps.items()})
        student.logits = None if given.logits is None else leaf(given.logits)
        student.embedding = None if given.embedding is None else leaf(given.embedding)
        return student, leaves


def what_to_keep(trial: Trial, raw: ModelOutputs) -> list[Piece]:
    """The pieces that take the fewest bytes.

    Args:
        trial: the losses.
        raw: what the teacher says about the trial's images, as it computes it.
    """
    whole = for_losses(raw)
    expected = trial.results(whole)
    outputs = [
        Piece(kind, place, "", tuple(value.shape[1:]), _dtype(value))
        for kind, place in trial.sources
        for value in [raw.of(kind, place)]
    ]
    derived = _derived(trial, whole)
    values = {piece.name: raw.of(piece.kind, piece.place) for piece in outputs}
    values |= {piece.name: value for piece, value in derived.items()}

    def works(pieces: Sequence[Piece]) -> bool:
        """Whether the losses are the same with these pieces, and all outputs of other places."""
        others = [piece for piece in outputs if piece.place != pieces[0].place]
        return not differing(expected, trial.results(assemble([*others, *pieces], values, IMAGES, trial.device)))

    chosen: list[Piece] = []
    for output in outputs:
        mine = [piece for piece in derived if (piece.kind, piece.place) == (output.kind, output.place)]
        with_output = [output, *(piece for piece in mine if piece.bytes <= SMALL * output.bytes)]
        without = _without_output(replace(output, kept=False), mine, works)
        chosen += without if without and total_bytes(without) < output.bytes else with_output
    return chosen


def _without_output(output: Piece, derived: list[Piece], works: Callable[[Sequence[Piece]], bool]) -> list[Piece]:
    """What of the derived pieces is needed where the output itself isn't kept; [] if that can't be."""
    pieces = [output, *sorted(derived, key=lambda piece: -piece.bytes)]
    if not works(pieces):
        return []
    for position in range(1, len(pieces)):
        fewer = [*pieces[:position], replace(pieces[position], kept=False), *pieces[position + 1 :]]
        pieces = fewer if works(fewer) else pieces
    return pieces


def _derived(trial: Trial, whole: ModelOutputs) -> dict[Piece, Tensor]:
    """What the losses share of each image by itself, not of the batch: the same among fewer images."""
    some = slice(1, None)
    fewer = ModelOutputs(
        None if whole.logits is None else whole.logits[some],
        {name: value[some] for name, value in whole.maps.items()},
        None if whole.embedding is None else whole.embedding[some],
    )
    trial.results(fewer, some)
    among_fewer = fewer.shared_so_far()
    found = {}
    for place_and_key, value in whole.shared_so_far().items():
        # losses share under ((kind, place), key)
        (kind, place), key = cast(tuple[tuple[str, str], Hashable], place_and_key)
        other = among_fewer.get(place_and_key)
        if not isinstance(value, Tensor) or not isinstance(other, Tensor) or not _is_literal(key):
            continue
        alias = value.untyped_storage().data_ptr() == whole.of(kind, place).untyped_storage().data_ptr()
        rows = value.dim() and len(value) == IMAGES and len(other) == IMAGES - 1
        if rows and not alias and torch.allclose(value[some].double(), other.double(), rtol=1e-4, atol=1e-6):
            found[Piece(kind, place, repr(key), tuple(value.shape[1:]), _dtype(value))] = value
    return found


def _is_literal(key: Hashable) -> bool:
    try:
        return bool(ast.literal_eval(repr(key)) == key)
    except (ValueError, SyntaxError):
        return False


def differing(expected: Mapping[str, list[Tensor]], found: Mapping[str, list[Tensor]]) -> list[str]:
    """The methods whose loss or gradients, a list of tensors of any shapes (...,) each, aren't the same."""
    return [
        word
        for word, tensors in expected.items()
        if len(tensors) != len(found[word])
        or not all(torch.allclose(a, b, rtol=1e-3, atol=1e-7) for a, b in zip(tensors, found[word]))
    ]


def total_bytes(pieces: Sequence[Piece]) -> int:
    """Of one image."""
    return sum(piece.bytes for piece in pieces)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
