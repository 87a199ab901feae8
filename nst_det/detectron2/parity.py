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
from torch import Tensor, nn

from nst_det.data.images import read_image
from nst_det.detection.checkpoint import load_weights, saved_classes
from nst_det.detection.config import load_detect_config, resolve_classes
from nst_det.detection.data import resize, resized_shape
from nst_det.detection.pipeline import WEIGHTS_FILE
from nst_det.detection.torchvision import Detector, build_detector
from nst_det.detectron2.checkpoint import BackboneCheckpointer
from nst_det.detectron2.config import load_config
from nst_det.errors import UserError

FEATURE_LIMIT, BOX_LIMIT, SCORE_LIMIT = 1e-4, 0.05, 1e-3
# boxes (N, 4) xyxy in pixels of the image, scores (N,), labels (N,)
Found = tuple[Tensor, Tensor, Tensor]


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
    """The same weights in both engines, in evaluation mode on the CPU."""

    detectron2: nn.Module
    torchvision: Detector
    threshold: float
    min_size: int
    max_size: int
    order: str


def load_engines(config_file: str | Path, weights: str, overrides: Sequence[str] = (), classes: int = 0) -> Engines:
    """Build both detectors from one YAML and fill both from one file."""
    overrides = [*overrides, "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu"]
    ours, theirs = load_detect_config(config_file, overrides), load_config(config_file, overrides)
    count = classes or theirs.MODEL.ROI_HEADS.NUM_CLASSES or _classes(weights)
    for config in (ours, theirs):
        resolve_classes(config, [str(index) for index in range(count)])
    detector = build_detector(ours).eval()
    if load_weights(detector, ours) != "detector":
        raise UserError(f"--weights {weights}: the weights of a whole detector are needed")
    model = build_model(theirs).eval()
    BackboneCheckpointer(model, complete=[name for name, _ in model.named_children()]).load(weights)
    sizes = (theirs.INPUT.MIN_SIZE_TEST, theirs.INPUT.MAX_SIZE_TEST)
    return Engines(model, detector, theirs.MODEL.ROI_HEADS.SCORE_THRESH_TEST, *sizes, theirs.INPUT.FORMAT)


def _classes(weights: str) -> int:
    from nst_det.models import load_plain

    scores = load_plain(weights).get("roi_heads.box_predictor.cls_score.bias")
    if scores is None:
        raise UserError(f"--weights {weights}: the weights of a whole detector are needed")
    return len(scores) - 1


@torch.no_grad()
def compare(engines: Engines, images: Sequence[str | Path]) -> Parity:
    """Run both engines on image files, each with its own reading and resizing, and compare."""
    parity = Parity()
    for path in images:
        theirs, ours = _pixels_detectron2(engines, path), _pixels_torchvision(engines, path)
        height, width = read_image(Path(path)).shape[:2]
        parity.images += 1
        parity.pixels = max(parity.pixels, float((theirs.float() - ours.float()).abs().max()))
        given = {"height": height, "width": width}
        their_maps, their_found = _run_detectron2(engines.detectron2, {"image": theirs, **given})
        our_maps, our_found = _run_torchvision(engines.torchvision, {"image": ours, **given})
        for level, map_ in their_maps.items():
            difference = float((map_ - our_maps[level]).abs().max())
            parity.features[level] = max(parity.features.get(level, 0.0), difference)
        _match(parity, their_found, our_found, engines.threshold)
    return parity


def _pixels_detectron2(engines: Engines, path: str | Path) -> Tensor:
    image = detection_utils.read_image(str(path), format=engines.order)
    short = engines.min_size
    image = T.ResizeShortestEdge([short, short], engines.max_size).get_transform(image).apply_image(image)
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _pixels_torchvision(engines: Engines, path: str | Path) -> Tensor:
    image = read_image(Path(path))
    image = image[:, :, ::-1] if engines.order == "BGR" else image
    height, width = image.shape[:2]
    shape = resized_shape(height, width, engines.min_size, engines.max_size)
    return torch.as_tensor(np.ascontiguousarray(resize(image, *shape).transpose(2, 0, 1)))


def _run_detectron2(model: nn.Module, item: dict[str, object]) -> tuple[dict[str, Tensor], Found]:
    maps = model.backbone(model.preprocess_image([item]).tensor)  # type: ignore[operator]
    found = model([item])[0]["instances"]
    return maps, (found.pred_boxes.tensor, found.scores, found.pred_classes)


def _run_torchvision(detector: Detector, item: dict[str, object]) -> tuple[dict[str, Tensor], Found]:
    maps = detector.backbone(detector.preprocess([item["image"]])[0])  # type: ignore[list-item]
    found = detector([item])[0]
    return maps, (found["boxes"], found["scores"], found["labels"])


def _match(parity: Parity, theirs: Found, ours: Found, threshold: float) -> None:
    """Pair each of their detections with the nearest of ours of the same class that is still free."""
    boxes, scores, labels = theirs
    free = torch.ones(len(ours[0]), dtype=torch.bool)
    parity.detections += len(boxes)
    for box, score, label in zip(boxes, scores, labels):
        distance = (ours[0] - box).abs().amax(dim=1) if len(free) else ours[1]
        distance = torch.where(free & (ours[2] == label), distance, torch.inf)
        best = int(distance.argmin()) if len(free) else -1
        if best < 0 or not torch.isfinite(distance[best]) or distance[best] > 1:
            parity.unmatched += int(score > threshold + SCORE_LIMIT)
            continue
        free[best] = False
        parity.box = max(parity.box, float(distance[best]))
        parity.score = max(parity.score, float((ours[1][best] - score).abs()))
    parity.unmatched += int((free & (ours[1] > threshold + SCORE_LIMIT)).sum())


class Pixels(nn.Module):
    """Takes a batch as one tensor and gives plain tensors."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), 0..255, to boxes, scores and labels, image after image."""
        found = self.detector.inference([{"image": image} for image in images], do_postprocess=False)
        return tuple(part for item in found for part in (item.pred_boxes.tensor, item.scores, item.pred_classes))


def load_pixels(folder: Path, cfg: CfgNode, device: torch.device) -> tuple[Pixels, int]:
    """The trained detector of a run, and the number of its parameters."""
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


class _Holder(nn.Module):
    """A backbone in the place where a detector has it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


def plain_maps(config: Path, weights: Path, images: Tensor) -> dict[str, Tensor]:
    """``res2`` .. ``res5`` of Detectron2's own ResNet, built and filled by Detectron2's own means."""
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
