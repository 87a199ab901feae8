"""The teacher: frozen, asked once a step for all students."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nst_det.backbones import LevelInfo, feature_levels, forward_outputs
from nst_det.distill.layout import by_positions
from nst_det.runtime.device import autocast, cast_frozen
from nst_det.transfer import Outputs


class Teacher:
    """A frozen classifier in evaluation mode.

    Args:
        model: the timm classifier, on its device.
        reads: levels whose maps the students' losses read.
        precision: of the forward pass; None is float32.
    """

    def __init__(self, model: nn.Module, reads: Iterable[str], precision: torch.dtype | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.precision = precision
        cast_frozen(self.model, precision)
        self.device = next(model.parameters()).device
        names = set(reads)
        self.levels: dict[str, LevelInfo] = {
            name: info for name, info in feature_levels(model).items() if name in names
        }

    def raw(self, images: Tensor) -> Outputs:
        """What the teacher says about normalized images (B, 3, H, W), as it computes it, without gradient."""
        with torch.no_grad(), autocast(self.device, self.precision):
            return forward_outputs(self.model, images, self.levels)

    def __call__(self, images: Tensor, rows: Tensor | None = None) -> Outputs:
        """What the teacher says about normalized images (B, 3, H, W), without gradient.

        ``rows`` (B,), the views that these are, is for a cache, which takes the teacher's place.
        """
        return for_losses(self.raw(images))


def for_losses(raw: Outputs) -> Outputs:
    """A teacher's outputs as the losses read them."""
    return Outputs(
        None if raw.logits is None else raw.logits.float(),
        {name: by_positions(maps) for name, maps in raw.maps.items()},
        raw.embedding,
    )
