"""What the parts of a step gave, where SOLVER.ACCUMULATE splits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """What one part of a step gave, in this process.

    Attributes:
        terms: loss term to its value, a scalar.
        places: transfer term to its value at each of its places, before its weight; see ``TransferLoss.parts``.
        norm: of the gradients so far, a scalar, where a step has several parts; else the loss.
    """

    terms: dict[str, Tensor]
    places: dict[str, dict[str, Tensor]]
    norm: Tensor

    @property
    def values(self) -> dict[str, float]:
        """The terms as numbers."""
        return {name: float(value) for name, value in self.terms.items()}


def mean(passes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each named scalar over the parts of a step, which all have the same names."""
    return {name: torch.stack([one[name] for one in passes]).mean() for name in passes[0]}
