"""timm bottom-ups in Detectron2's registry: ``build_timm_backbone`` and ``build_timm_fpn_backbone``."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    ROI_HEADS_REGISTRY,
    Backbone,
    StandardROIHeads,
)
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn

from nst_det.detection import box_head
from nst_det.errors import UserError
from nst_det.models import NORM_POLICIES, Bottomup
from nst_det.models.card import check_pixels, published_card


class TimmBackbone(Bottomup, Backbone):
    """A :class:`~nst_det.models.Bottomup` that speaks Detectron2's backbone interface.

    It assumes normalized images, as Detectron2's meta-architectures give them.  Weights arrive later, through a
    checkpointer; one that brings a part of them only is refused.

    Example:
        >>> backbone = TimmBackbone("resnet18", ["res3", "res4"])
        >>> backbone.output_shape()["res4"].stride
        16
    """

    def __init__(
        self,
        arch: str,
        levels: Sequence[str] = ("res2", "res3", "res4", "res5"),
        arch_kwargs: Mapping[str, Any] | None = None,
        pretrained: bool = False,
    ) -> None:
        super().__init__(arch, levels, arch_kwargs, pretrained=pretrained)
        self.register_load_state_dict_post_hook(_refuse_part)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=self.channels[name], stride=self.strides[name]) for name in self.channels}


def _refuse_part(module: Any, incompatible: Any) -> None:
    own = [key for key in module.state_dict() if not key.endswith("num_batches_tracked")]
    missing = [key for key in own if any(name == key or name.endswith(f".{key}") for name in incompatible.missing_keys)]
    if len(missing) < len(own):
        module.loaded = True
        if missing:
            raise UserError(
                f"the weights don't fit {module.arch}: {len(missing)} of {len(own)} entries of the bottom-up are "
                f"missing or of another shape ({', '.join(missing[:3])}); name weights of this architecture"
            )


def _build(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    timm = cfg.MODEL.TIMM
    if input_shape.channels != 3:
        raise UserError(f"MODEL.PIXEL_MEAN: {input_shape.channels} channels, the timm backbones take 3")
    if timm.NORM not in NORM_POLICIES:
        raise UserError(f"MODEL.TIMM.NORM: '{timm.NORM}' is not one of {', '.join(NORM_POLICIES)}")
    # weights named in the config come after the model is built: the guard is for those that never come, and timm's
    # are not fetched for nothing
    weights_to_come = bool(cfg.MODEL.WEIGHTS)
    try:
        backbone = TimmBackbone(
            timm.ARCH, timm.OUT_FEATURES, dict(timm.KWARGS), pretrained=timm.PRETRAINED and not weights_to_come
        )
        fpn = cfg.MODEL.BACKBONE.NAME == "build_timm_fpn_backbone"
        known = [backbone.strides[name] for name in cfg.MODEL.FPN.IN_FEATURES if name in backbone.strides]
        backbone.check_map_sizes(max(known) if fpn and known else 1)
        if timm.PRETRAINED and not weights_to_come:
            card, pixels = published_card(backbone.model, timm.ARCH), cfg.MODEL
            check_pixels(card, pixels.PIXEL_MEAN, pixels.PIXEL_STD, cfg.INPUT.FORMAT, "MODEL.TIMM.PRETRAINED")
        backbone.set_norm(NORM_POLICIES[timm.NORM], allow_random=weights_to_come)
        backbone.freeze(cfg.MODEL.BACKBONE.FREEZE_AT, allow_random=weights_to_come)
    except ValueError as error:
        raise UserError(f"MODEL.TIMM: {error}") from error
    return backbone


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the network of ``MODEL.TIMM`` alone: its levels ``MODEL.TIMM.OUT_FEATURES``."""
    return _build(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the network of ``MODEL.TIMM`` under Detectron2's FPN: ``p2`` .. ``p6``."""
    bottom_up = _build(cfg, input_shape)
    for name in cfg.MODEL.FPN.IN_FEATURES:
        if name not in bottom_up.channels:
            raise UserError(f"MODEL.FPN.IN_FEATURES: '{name}' is not among MODEL.TIMM.OUT_FEATURES")
    fpn, strides = cfg.MODEL.FPN, [bottom_up.strides[name] for name in cfg.MODEL.FPN.IN_FEATURES]
    if not strides or any(below * 2 != above for below, above in itertools.pairwise(strides)):
        raise UserError(
            f"MODEL.FPN.IN_FEATURES {list(fpn.IN_FEATURES)}: name levels, each of twice the stride of the one before"
        )
    return FPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM, LastLevelMaxPool(), fpn.FUSE_TYPE)


@ANCHOR_GENERATOR_REGISTRY.register()
class RoundedAnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchors with corners in whole pixels from those of a cell, as torchvision's detectors have them."""

    def generate_cell_anchors(self, *args: Any, **kwargs: Any) -> Tensor:
        anchors: Tensor = super().generate_cell_anchors(*args, **kwargs)
        return anchors.round()


def bottom_up_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the prefix and the module of a detector's bottom-up, below an FPN or alone."""
    backbone = model.backbone
    if isinstance(backbone, FPN):
        return "backbone.bottom_up.", backbone.bottom_up
    return "backbone.", backbone  # type: ignore[return-value]


def check_frozen_random(model: nn.Module, filled: bool = False) -> None:
    """Refuse a detector that would be trained with frozen layers that no weights were ever loaded into."""
    _, bottom_up = bottom_up_of(model)
    # a bottom-up of Detectron2's doesn't know itself whether weights were loaded
    if bottom_up.loaded if isinstance(bottom_up, TimmBackbone) else filled:
        return
    unused = getattr(bottom_up, "unused", ())
    named = bottom_up.named_parameters()
    frozen = [name for name, parameter in named if not parameter.requires_grad and name not in unused]
    if frozen:
        raise UserError(
            f"MODEL.WEIGHTS brought nothing for the bottom-up, so its {len(frozen)} frozen layers ({frozen[0]}, ...) "
            "would stay random; name backbone weights, or set MODEL.BACKBONE.FREEZE_AT 0 and train the normalization"
        )


@ROI_HEADS_REGISTRY.register()
class CanonicalROIHeads(StandardROIHeads):
    """Detectron2's StandardROIHeads with ``MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE`` and ``CANONICAL_LEVEL``."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts: dict[str, Any] = super()._init_box_head(cfg, input_shape)
        parts["box_pooler"].canonical_box_size = cfg.MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE
        parts["box_pooler"].canonical_level = cfg.MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL
        return parts


def roi_heads(cfg: CfgNode) -> str:
    """Return ``MODEL.ROI_HEADS.NAME``, or :class:`CanonicalROIHeads` where the canonical keys ask for it."""
    box, name = cfg.MODEL.ROI_BOX_HEAD, str(cfg.MODEL.ROI_HEADS.NAME)
    # the constants in Detectron2's ROIPooler, for which it has no config key
    if (box.CANONICAL_BOX_SIZE, box.CANONICAL_LEVEL) == (224, 4):
        return name
    if name not in ("StandardROIHeads", "CanonicalROIHeads"):
        raise UserError(
            f"MODEL.ROI_BOX_HEAD: {name} doesn't read CANONICAL_BOX_SIZE and CANONICAL_LEVEL; use StandardROIHeads, or "
            "leave them at 224 and 4"
        )
    return "CanonicalROIHeads"


def box_outputs(heads: Any, maps: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Run Detectron2's RoI heads, or this project's, on boxes; see :func:`nst_det.detection.box_head.box_outputs`."""
    own = [Boxes(of_image) for of_image in boxes]
    if isinstance(heads, Res5ROIHeads):
        features = heads._shared_roi_transform([maps[name] for name in heads.in_features], own).mean(dim=(2, 3))
    elif isinstance(heads, StandardROIHeads):
        features = heads.box_head(heads.box_pooler([maps[name] for name in heads.box_in_features], own))
    else:
        return box_head.box_outputs(heads, maps, boxes)
    logits, _ = heads.box_predictor(features)
    return features.flatten(1), logits
