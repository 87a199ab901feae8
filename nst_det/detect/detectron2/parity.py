"""One detector on two engines: how far Detectron2's and the torchvision engine's answers are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from torch import Tensor, nn

from nst_det.data.images import read_image
from nst_det.detect.config import load_detect_config, resolve_classes
from nst_det.detect.dataset import resize, resized_shape
from nst_det.detect.detectron2.checkpoint import BackboneCheckpointer
from nst_det.detect.detectron2.config import load_config
from nst_det.detect.torchvision_engine import Detector, build_detector
from nst_det.detect.weights import load_weights
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
    """Build both detectors from one YAML and fill both from one file.

    Args:
        config_file: honored by both engines.
        weights: of a whole detector, by either engine.
        overrides: ``KEY VALUE`` pairs.
        classes: their number, where the config says 0 and the weights are to decide, leave it 0.

    Raises:
        UserError: a key that an engine can't honor, or weights that don't fit.
    """
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
    from nst_det.backbones import load_plain

    scores = load_plain(weights).get("roi_heads.box_predictor.cls_score.bias")
    if scores is None:
        raise UserError(f"--weights {weights}: the weights of a whole detector are needed")
    return len(scores) - 1


@torch.no_grad()
def compare(engines: Engines, images: Sequence[str | Path]) -> Parity:
    """Run both engines on image files, each with its own reading and resizing, and compare.

    Raises:
        UserError: an image can't be read.
    """
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
