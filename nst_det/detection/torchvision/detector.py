"""Faster R-CNN as one module: batched inputs in, losses or detections out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.detection.config import padded_sizes
from nst_det.detection.torchvision.backbone import BackboneOnly, Fpn, build_backbone
from nst_det.detection.torchvision.batch import limits_of, read_truth, stack_images, to_device
from nst_det.detection.torchvision.roi_heads import RoiHeads
from nst_det.detection.torchvision.rpn import Rpn
from nst_det.engine.compilation import Compiled
from nst_det.engine.device import autocast
from nst_det.engine.distributed import largest_of_processes, world_size
from nst_det.engine.foreach import weights_in
from nst_det.engine.seeds import seeded
from nst_det.errors import UserError
from nst_det.models import NORM_POLICIES


class Detector(nn.Module):
    """Detectron2's GeneralizedRCNN, made of torchvision's operators."""

    # (3, 1, 1), 0..255; not saved with the weights
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: CfgNode, backbone: BackboneOnly | Fpn, rpn: Rpn, roi_heads: RoiHeads) -> None:
        super().__init__()
        self.backbone, self.proposal_generator, self.roi_heads = backbone, rpn, roi_heads
        for name, values in (("pixel_mean", config.MODEL.PIXEL_MEAN), ("pixel_std", config.MODEL.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(list(values)).view(3, 1, 1), persistent=False)
        self.input_format = config.INPUT.FORMAT
        # of training batches; none where each is as large as its largest image
        self.padded_sizes = padded_sizes(config)
        # of the forward pass in training and of that in evaluation, None for float32.  Boxes and losses are float32 in
        # either: a coordinate above 128 has steps of a whole pixel in bfloat16
        self.amp: torch.dtype | None = None
        self.test_amp: torch.dtype | None = None

    def forward(self, batch: Sequence[dict[str, Any]]) -> Any:
        """Return the losses (name to scalar) in training, else a dict of ``Instances`` an image.

        Each dict has ``image`` (3, H, W), 0..255, in ``input_format``; in training ``boxes`` (M, 4) xyxy in its pixels,
        ``labels`` (M,) from 0 and perhaps ``seed``, of the choice of anchors and proposals; else perhaps ``height`` and
        ``width`` of the original image, in whose pixels boxes are given.
        """
        images, sizes = self.preprocess([item["image"] for item in batch])
        dtype = self.amp if self.training else self.test_amp
        # a compiled pass casts by itself; where processes exchange gradients as they come, each must come by itself
        alone = world_size() > 1 or isinstance(self.backbone.forward, Compiled)
        together = images.device.type == "cuda" and not alone
        with autocast(images.device, dtype), weights_in(self, dtype if together else None):
            maps = self.backbone(images)
            if self.training:
                limits, truth = read_truth(batch, images.device)
                proposals, valid, losses = self.proposal_generator(maps, limits, truth)
                return {**self.roi_heads(maps, proposals, valid, truth), **losses}
            seen = limits_of(sizes)
            originals = [
                (item.get("height", height), item.get("width", width)) for item, (height, width) in zip(batch, sizes)
            ]
            wanted = limits_of(originals)
            limits, scales, wanted = to_device(torch.stack((seen, wanted / seen, wanted)).float(), images.device)
            proposals, valid, _ = self.proposal_generator(maps, limits)
            return [found._asdict() for found in self.roi_heads.detect(maps, proposals, valid, limits, scales, wanted)]

    def preprocess(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalize images and pad them with zeros, right and below, to one size: in training that of all processes."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        multiple = max(self.backbone.size_divisibility, 1)
        largest = [max(side) for side in zip(*sizes)]
        if self.training:
            largest = largest_of_processes(largest)
            # the configuration has one that holds all
            fitting = [size for size in self.padded_sizes if size[0] >= largest[0] and size[1] >= largest[1]]
            largest = list(min(fitting, key=math.prod, default=largest))
        height, width = (-(-side // multiple) * multiple for side in largest)
        pixels = stack_images(images, height, width, self.pixel_mean.device)
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        padding = [rows[:, h:] for rows, (h, _) in zip(pixels, sizes) if h < height]
        padding += [rows[:, :, w:] for rows, (_, w) in zip(pixels, sizes) if w < width]
        if padding:
            torch._foreach_zero_(padding)
        return pixels, sizes

    def freeze(self, at: int, norm: str) -> None:
        """Freeze what MODEL.BACKBONE.FREEZE_AT and MODEL.TIMM.NORM say; random layers are refused."""
        bottom_up = self.backbone.bottom_up
        try:
            bottom_up.set_norm(NORM_POLICIES[norm])
            bottom_up.freeze(at)
        except ValueError as error:
            raise UserError(
                f"MODEL.BACKBONE.FREEZE_AT: {error}"
                if bottom_up.loaded
                else f"MODEL.WEIGHTS is empty: {error} (set MODEL.BACKBONE.FREEZE_AT 0 and MODEL.TIMM.NORM BN)"
            ) from error


def build_detector(config: CfgNode, seed: int = 0) -> Detector:
    """Return the detector of a config, with random weights (or timm's), nothing frozen yet."""
    if config.MODEL.ROI_HEADS.NUM_CLASSES < 1:
        raise UserError("MODEL.ROI_HEADS.NUM_CLASSES is 0: the number of classes isn't known without the data")
    backbone = build_backbone(config, seed)
    shapes = backbone.output_shape()
    # each part under a seed of its own, so that detectors of one seed begin with the same heads on any backbone
    with seeded(seed, "init", "rpn"):
        rpn = Rpn(config, shapes)
    with seeded(seed, "init", "roi_heads"):
        roi_heads = RoiHeads(config, shapes)
    return Detector(config, backbone, rpn, roi_heads)
