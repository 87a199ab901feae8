"""The forward pass of Detectron2's detectors, as they are trained here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from nst_det.detect.detectron2.library import student_of
from nst_det.detect.distilled import DistilledDetector
from nst_det.runtime.device import autocast
from nst_det.runtime.nonfinite import raise_together


def reduce_backbones(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the backbones of student and teacher compute in lower precision on the CPU, and give float32 maps.

    Detectron2's mixed precision needs a GPU.  On the CPU the heads stay in float32, because a box coordinate above
    128 has steps of a whole pixel in bfloat16; the torchvision engine does the same.
    """
    for part in (student_of(model), *((model.teacher,) if isinstance(model, DistilledDetector) else ())):
        part.backbone.forward = partial(_reduced, part.backbone.forward, dtype)


def _reduced(forward: Callable[[Tensor], dict[str, Tensor]], dtype: torch.dtype, images: Tensor) -> dict[str, Tensor]:
    with autocast(images.device, dtype):
        maps = forward(images)
    return {name: map_.float() for name, map_ in maps.items()}


def propose_together(student: nn.Module) -> None:
    """Let proposals that are not finite end the pass in all processes, named; in Detectron2 they end it in one."""
    proposer = getattr(student, "proposal_generator", None)
    if proposer is None:
        return
    forward = proposer.forward

    def propose(images: ImageList, *args: Any, **kwargs: Any) -> Any:
        if not proposer.training:
            return forward(images, *args, **kwargs)
        found, what = None, ""
        try:
            found = forward(images, *args, **kwargs)
        except FloatingPointError as error:
            what = f"the RPN's proposals ({' '.join(str(error).split())})"
        raise_together(bool(what), images.tensor.device, what)
        return found

    proposer.forward = propose
