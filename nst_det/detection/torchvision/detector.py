"""Faster R-CNN as one module: batched inputs in, losses or detections out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.detection.torchvision.backbone import BackboneOnly, Fpn, build_backbone
from nst_det.detection.torchvision.roi_heads import RoiHeads, build_roi_heads, postprocess
from nst_det.detection.torchvision.rpn import Rpn, build_rpn
from nst_det.engine.device import autocast
from nst_det.engine.distributed import largest_of_processes
from nst_det.engine.seeds import seeded
from nst_det.errors import UserError
from nst_det.models import NORM_POLICIES


class Detector(nn.Module):
    """Detectron2's GeneralizedRCNN, made of torchvision's operators.

    Attributes:
        pixel_mean: (3, 1, 1), 0..255; not saved with the weights.
        pixel_std: (3, 1, 1), likewise.
        amp: dtype of the backbone's arithmetic in training, or None for float32.  Inference is in float32, and so
            are the heads: a box coordinate above 128 has steps of a whole pixel in bfloat16.

    Example:
        >>> from nst_det.detection.config import get_defaults
        >>> config = get_defaults()
        >>> config.MODEL.TIMM.ARCH, config.MODEL.TIMM.NORM = "nst_resnet10_w32", "BN"
        >>> config.MODEL.ROI_BOX_HEAD.NUM_FC = 2
        >>> detector = build_detector(config).eval()
        >>> image = torch.zeros(3, 64, 96, dtype=torch.uint8)
        >>> sorted(detector([{"image": image, "height": 64, "width": 96}])[0])
        ['boxes', 'labels', 'scores']
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: BackboneOnly | Fpn,
        proposal_generator: Rpn,
        roi_heads: RoiHeads,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        self.backbone, self.proposal_generator, self.roi_heads = backbone, proposal_generator, roi_heads
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean)).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std)).view(3, 1, 1), persistent=False)
        self.input_format = input_format
        self.amp: torch.dtype | None = None

    def forward(self, batch: Sequence[dict[str, Any]]) -> Any:
        """Losses in training, detections otherwise.

        Args:
            batch: a dict an image: ``image`` (3, H, W), uint8 or float, 0..255, in ``input_format``; ``height`` and
                ``width`` of the original image (inference; without them it is ``image``'s); ``boxes`` (M, 4) xyxy in
                pixels of ``image`` and ``labels`` (M,) from 0 (training); ``seed`` of the choice of its anchors and
                proposals (training; unless all have one, torch's own generator chooses).

        Returns:
            In training: loss_cls, loss_box_reg, loss_rpn_cls, loss_rpn_loc, scalars. Otherwise a dict an image:
            ``boxes`` (N, 4) xyxy in pixels of the original image, ``scores`` (N,), ``labels`` (N,), best first.
        """
        images, sizes = self.preprocess([item["image"] for item in batch])
        generators = self._generators(batch, images.device)
        with autocast(images.device, self.amp if self.training else None):
            maps = self.backbone(images)
        maps = {name: map_.float() for name, map_ in maps.items()}
        if self.training:
            boxes = [item["boxes"].to(images.device, torch.float32) for item in batch]
            labels = [item["labels"].to(images.device) for item in batch]
            proposals, losses = self.proposal_generator(maps, sizes, boxes, generators)
            _, own = self.roi_heads(maps, proposals, sizes, list(zip(boxes, labels)), generators)
            return {**own, **losses}
        proposals, _ = self.proposal_generator(maps, sizes)
        found, _ = self.roi_heads(maps, proposals, sizes)
        results = []
        for item, seen, image_found in zip(batch, sizes, found):
            size = (item.get("height", seen[0]), item.get("width", seen[1]))
            results.append(postprocess(image_found, seen, size)._asdict())
        return results

    @staticmethod
    def _generators(batch: Sequence[dict[str, Any]], device: torch.device) -> list[torch.Generator]:
        if not all("seed" in item for item in batch):
            return []
        return [torch.Generator(device).manual_seed(int(item["seed"])) for item in batch]

    def preprocess(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalize images and pad them with zeros, right and below, to one size: in training that of all processes."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        multiple = max(self.backbone.size_divisibility, 1)
        largest = [max(side) for side in zip(*sizes)]
        if self.training:
            largest = largest_of_processes(largest, self.pixel_mean.device)
        height, width = (-(-side // multiple) * multiple for side in largest)
        padded = [
            F.pad(
                (image.to(self.pixel_mean.device) - self.pixel_mean) / self.pixel_std,
                (0, width - image.shape[-1], 0, height - image.shape[-2]),
            )
            for image in images
        ]
        return torch.stack(padded), sizes

    def freeze(self, at: int, norm: str, allow_random: bool = False) -> None:
        """Freeze what MODEL.BACKBONE.FREEZE_AT and MODEL.TIMM.NORM say."""
        bottom_up = self.backbone.bottom_up
        try:
            bottom_up.set_norm(NORM_POLICIES[norm], allow_random)
            bottom_up.freeze(at, allow_random)
        except ValueError as error:
            raise UserError(
                f"MODEL.WEIGHTS is empty: {error} (set MODEL.BACKBONE.FREEZE_AT 0 and MODEL.TIMM.NORM BN)"
                if not bottom_up.loaded
                else f"MODEL.BACKBONE.FREEZE_AT: {error}"
            ) from error


def build_detector(config: CfgNode, seed: int = 0) -> Detector:
    """The detector of a config, with random weights (or timm's), nothing frozen yet.

    The parts are drawn under seeds of their own, so that detectors of one seed begin with the same heads, whatever
    their backbones are.
    """
    if config.MODEL.ROI_HEADS.NUM_CLASSES < 1:
        raise UserError("MODEL.ROI_HEADS.NUM_CLASSES is 0: the number of classes isn't known without the data")
    backbone = build_backbone(config, seed)
    shapes = backbone.output_shape()
    with seeded(seed, "init", "rpn"):
        rpn = build_rpn(config, shapes)
    with seeded(seed, "init", "roi_heads"):
        roi_heads = build_roi_heads(config, shapes)
    return Detector(backbone, rpn, roi_heads, config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD, config.INPUT.FORMAT)
