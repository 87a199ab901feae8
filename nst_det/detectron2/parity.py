"""One detector on two engines: how far Detectron2's and the torchvision engine's answers are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import build_backbone, build_model
from fvcore.common.config import CfgNode as FvcoreNode
from torch import Tensor, nn

from nst_det.data.images import read_image
from nst_det.detection.checkpoint import load_weights, saved_classes
from nst_det.detection.config import load_detect_config, resolve_classes
from nst_det.detection.data import network_input
from nst_det.detection.pipeline import WEIGHTS_FILE
from nst_det.detection.torchvision import Detector, build_detector
from nst_det.detection.torchvision.roi_heads import Instances
from nst_det.detectron2.checkpoint import load_whole
from nst_det.detectron2.config import load_config
from nst_det.errors import UserError
from nst_det.models import count_parameters, load_plain

FEATURE_LIMIT, BOX_LIMIT, SCORE_LIMIT = 1e-4, 0.05, 1e-3


@dataclass
class Parity:
    """What was compared, and the largest differences.

    Attributes:
        images: number of images.
        features: level -> largest absolute difference of the maps.
        pixels: largest difference of the pixels that enter the backbones, after each engine's own resizing.
        detections: number of detections by Detectron2.
        unmatched: detections that only one engine has, farther from the score threshold than :data:`SCORE_LIMIT`.
        box: largest difference of a corner between matched detections, in pixels.
        score: largest difference of scores.
    """

    images: int = 0
    pixels: float = 0.0
    features: dict[str, float] = field(default_factory=dict)
    detections: int = 0
    unmatched: int = 0
    box: float = 0.0
    score: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all of it is within the limits."""
        worst = max(self.features.values(), default=0.0)
        return worst <= FEATURE_LIMIT and not self.unmatched and self.box <= BOX_LIMIT and self.score <= SCORE_LIMIT


@dataclass
class Engines:
    """The same weights in both engines, in evaluation mode on the CPU, and the torchvision engine's config."""

    detectron2: nn.Module
    torchvision: Detector
    config: FvcoreNode


def load_engines(config_file: str | Path, weights: str, overrides: Sequence[str] = ()) -> Engines:
    """Build both detectors from one YAML, and fill both from one file, which may tell NUM_CLASSES too."""
    overrides = [*overrides, "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu"]
    ours, theirs = load_detect_config(config_file, overrides), load_config(config_file, overrides)
    scores = load_plain(weights).get("roi_heads.box_predictor.cls_score.bias")
    if scores is None:
        raise UserError(f"--weights {weights}: the weights of a whole detector are needed")
    count = theirs.MODEL.ROI_HEADS.NUM_CLASSES or len(scores) - 1
    for config in (ours, theirs):
        resolve_classes(config, [str(index) for index in range(count)])
    detector, model = build_detector(ours).eval(), build_model(theirs).eval()
    load_weights(detector, ours)
    load_whole(model, weights)
    return Engines(model, detector, ours)


@torch.no_grad()
def compare(engines: Engines, images: Sequence[str | Path]) -> Parity:
    """Run both engines on image files, each with its own reading and resizing, and compare."""
    parity = Parity()
    for path in images:
        pixels = read_image(Path(path))
        given = {"height": pixels.shape[0], "width": pixels.shape[1]}
        theirs, ours = _pixels_of_detectron2(path, engines.config.INPUT), network_input(pixels, engines.config)
        parity.images += 1
        parity.pixels = max(parity.pixels, float((theirs.float() - ours.float()).abs().max()))
        their_maps, their_found = _run_detectron2(engines.detectron2, {"image": theirs, **given})
        our_maps, our_found = _run_torchvision(engines.torchvision, {"image": ours, **given})
        for level, map_ in their_maps.items():
            difference = float((map_ - our_maps[level]).abs().max())
            parity.features[level] = max(parity.features.get(level, 0.0), difference)
        match(parity, their_found, our_found, engines.config.MODEL.ROI_HEADS.SCORE_THRESH_TEST)
    return parity


def _pixels_of_detectron2(path: str | Path, given: FvcoreNode) -> Tensor:
    image = detection_utils.read_image(str(path), format=given.FORMAT)
    resize = T.ResizeShortestEdge([given.MIN_SIZE_TEST, given.MIN_SIZE_TEST], given.MAX_SIZE_TEST)
    image = resize.get_transform(image).apply_image(image)
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _run_detectron2(model: Any, item: dict[str, Any]) -> tuple[dict[str, Tensor], Instances]:
    maps = model.backbone(model.preprocess_image([item]).tensor)
    found = model([item])[0]["instances"]
    return maps, Instances(found.pred_boxes.tensor, found.scores, found.pred_classes)


def _run_torchvision(detector: Detector, item: dict[str, Any]) -> tuple[dict[str, Tensor], Instances]:
    maps = detector.backbone(detector.preprocess([item["image"]])[0])
    return maps, Instances(**detector([item])[0])


def match(parity: Parity, theirs: Instances, ours: Instances, threshold: float) -> None:
    """Pair each of their detections with the nearest of ours of the same class that is still free."""
    free = torch.ones(len(ours.boxes), dtype=torch.bool)
    parity.detections += len(theirs.boxes)
    for box, score, label in zip(*theirs):
        distance = (ours.boxes - box).abs().amax(dim=1)
        distance = torch.where(free & (ours.labels == label), distance, torch.inf)
        best = int(distance.argmin()) if len(free) else -1
        if best < 0 or not distance[best] <= 1:
            parity.unmatched += int(score > threshold + SCORE_LIMIT)
            continue
        free[best] = False
        parity.box = max(parity.box, float(distance[best]))
        parity.score = max(parity.score, float((ours.scores[best] - score).abs()))
    parity.unmatched += int((free & (ours.scores > threshold + SCORE_LIMIT)).sum())


class Pixels(nn.Module):
    """A GeneralizedRCNN in evaluation mode that takes a batch as one tensor and gives plain tensors."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return boxes, scores and labels, image after image, of (B, 3, H, W) pixels 0..255."""
        found = self.detector.inference([{"image": image} for image in images], do_postprocess=False)
        return tuple(part for item in found for part in (item.pred_boxes.tensor, item.scores, item.pred_classes))


def load_pixels(folder: Path, cfg: CfgNode, device: torch.device) -> tuple[Pixels, int]:
    """Return the trained detector of a run, and the number of its parameters."""
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE} in it; finish this run by train-det first")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.MODEL.TIMM.PRETRAINED = str(weights), str(device), False
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(saved_classes(weights)) or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    model = build_model(cfg)
    load_whole(model, str(weights))
    return Pixels(model.eval()), count_parameters(model)


class _Holder(nn.Module):
    """A backbone in the place where a detector has it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


def plain_maps(config: Path, weights: Path, images: Tensor) -> dict[str, Tensor]:
    """Return ``res2`` .. ``res5`` of Detectron2's own ResNet, built and filled by Detectron2's own means."""
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
