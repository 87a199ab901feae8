"""RoI heads whose boxes are dealt to FPN levels by another canonical size than 224 pixels on level 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes
from torch import Tensor

from nst_det.detect import box_head
from nst_det.errors import UserError

# the constants in Detectron2's ROIPooler, for which it has no config key
CANONICAL_BOX_SIZE = 224
CANONICAL_LEVEL = 4


@ROI_HEADS_REGISTRY.register()
class CanonicalROIHeads(StandardROIHeads):
    """Detectron2's StandardROIHeads with ``MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE`` and ``CANONICAL_LEVEL``.

    On small images every box is far below 224 pixels and would be pooled from ``p2``.  The weights have the same
    names as those of StandardROIHeads.
    """

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts: dict[str, Any] = super()._init_box_head(cfg, input_shape)
        parts["box_pooler"].canonical_box_size = cfg.MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE
        parts["box_pooler"].canonical_level = cfg.MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL
        return parts


def choose_roi_heads(cfg: CfgNode) -> None:
    """Put :class:`CanonicalROIHeads` in place of StandardROIHeads where the canonical keys ask for it.

    Raises:
        UserError: they ask for it, and the config names RoI heads that don't read them.
    """
    box = cfg.MODEL.ROI_BOX_HEAD
    if (box.CANONICAL_BOX_SIZE, box.CANONICAL_LEVEL) == (CANONICAL_BOX_SIZE, CANONICAL_LEVEL):
        return
    if cfg.MODEL.ROI_HEADS.NAME not in ("StandardROIHeads", "CanonicalROIHeads"):
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE and CANONICAL_LEVEL: {cfg.MODEL.ROI_HEADS.NAME} doesn't read "
            "them; use StandardROIHeads, or leave them at 224 and 4"
        )
    cfg.MODEL.ROI_HEADS.NAME = "CanonicalROIHeads"


def box_outputs(heads: Any, maps: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What Detectron2's RoI heads, or this project's, say about boxes; see :func:`nst_det.detect.box_head.box_outputs`.

    Args:
        heads: Detectron2's StandardROIHeads or Res5ROIHeads, or a class of these.
        maps: level -> (B, C, H, W), float32.
        boxes: (N, 4) of each image, xyxy in pixels of the network's input.

    Returns:
        What enters the predictor (R, D) and the logits (R, K + 1), background last.
    """
    own = [Boxes(of_image) for of_image in boxes]
    if isinstance(heads, Res5ROIHeads):
        features = heads._shared_roi_transform([maps[name] for name in heads.in_features], own).mean(dim=(2, 3))
    elif isinstance(heads, StandardROIHeads):
        features = heads.box_head(heads.box_pooler([maps[name] for name in heads.box_in_features], own))
    else:
        return box_head.box_outputs(heads, maps, boxes)
    logits, _ = heads.box_predictor(features)
    return features.flatten(1), logits
