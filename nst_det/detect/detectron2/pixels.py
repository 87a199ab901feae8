"""A detector of Detectron2 as a network on pixels, as a tracer and a stopwatch want it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from nst_det.detect.detectron2.checkpoint import BackboneCheckpointer
from nst_det.detect.stage import WEIGHTS_FILE
from nst_det.detect.weights import saved_classes
from nst_det.errors import UserError


class Pixels(nn.Module):
    """Takes a batch as one tensor and gives plain tensors.

    Args:
        detector: a GeneralizedRCNN in evaluation mode.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), 0..255, to boxes, scores and labels, image after image."""
        found = self.detector.inference([{"image": image} for image in images], do_postprocess=False)
        return tuple(part for item in found for part in (item.pred_boxes.tensor, item.scores, item.pred_classes))


def load_pixels(folder: Path, cfg: CfgNode, device: torch.device) -> tuple[Pixels, int]:
    """The trained detector of a run, and the number of its parameters.

    Args:
        folder: a finished run's.
        cfg: of the run.
        device: where it computes.

    Raises:
        UserError: the run has no weights, or they don't fill the detector.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE} in it; finish this run by train-det first")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.MODEL.TIMM.PRETRAINED = str(weights), str(device), False
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(saved_classes(weights)) or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    model = build_model(cfg)
    BackboneCheckpointer(model, complete=[name for name, _ in model.named_children()]).load(str(weights))
    return Pixels(model.eval()), sum(parameter.numel() for parameter in model.parameters())
