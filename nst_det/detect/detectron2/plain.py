"""What a plain Detectron2 computes from an exported config and weights."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import Tensor, nn

from nst_det.errors import UserError


class _Holder(nn.Module):
    """A backbone in the place where a detector has it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


def plain_maps(config: Path, weights: Path, images: Tensor) -> dict[str, Tensor]:
    """``res2`` .. ``res5`` of Detectron2's own ResNet, built and filled by Detectron2's own means.

    Args:
        config: an exported YAML.
        weights: the exported file.
        images: (B, 3, H, W), normalized.

    Raises:
        UserError: an entry of the bottom-up is missing in the weights.
    """
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.MODEL.DEVICE = "cpu"
    holder = _Holder(build_backbone(cfg)).eval()
    checkpointer = DetectionCheckpointer(holder)
    missing: list[str] = []
    checkpointer._log_incompatible_keys = lambda incompatible: missing.extend(incompatible.missing_keys)
    checkpointer.load(str(weights))
    absent = [name for name in missing if name.startswith("backbone.bottom_up.")]
    if absent:
        raise UserError(f"{weights}: {len(absent)} entries of the bottom-up are missing ({', '.join(absent[:3])})")
    with torch.no_grad():
        maps: dict[str, Tensor] = holder.backbone.bottom_up(images)  # type: ignore[operator]
    return maps
