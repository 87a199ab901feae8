"""One detector on two engines: how far Detectron2's and the torchvision engine's answers are apart."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fvcore.common.config import CfgNode as FvcoreNode
from torch import Tensor, nn

from nst_det.data.images import read_image
from nst_det.detection.checkpoint import load_weights, saved_classes
from nst_det.detection.config import load_detect_config, resolve_classes
from nst_det.detection.data import network_input
from nst_det.detection.torchvision import Detector, build_detector
from nst_det.detection.torchvision.roi_heads import Instances
from nst_det.detectron2.checkpoint import BackboneCheckpointer
from nst_det.detectron2.config import load_config
from nst_det.detectron2.data import ImageMapper
from nst_det.engine.run_dir import WEIGHTS_FILE
from nst_det.errors import UserError
from nst_det.models import load_plain

FEATURE_LIMIT, BOX_LIMIT, SCORE_LIMIT = 1e-4, 0.05, 1e-3


@dataclass
class Parity:
    """The largest differences between the engines."""

    images: int = 0
    # of the pixels that enter the backbones, after each engine's own resizing
    pixels: float = 0.0
    # of the maps, by level
    features: dict[str, float] = field(default_factory=dict)
    # by Detectron2; and those that only one engine has, farther from the score threshold than SCORE_LIMIT
    detections: int = 0
    unmatched: int = 0
    # of the corners of matched detections in pixels, and of their scores
    box: float = 0.0
    score: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all of it is within the limits."""
        worst = max(self.features.values(), default=0.0)
        return worst <= FEATURE_LIMIT and not self.unmatched and self.box <= BOX_LIMIT and self.score <= SCORE_LIMIT


@dataclass
class Engines:
    """The same weights in both engines, in evaluation mode on the CPU, and how each prepares an image."""

    detectron2: Any
    mapper: ImageMapper
    torchvision: Detector
    config: FvcoreNode


def load_engines(config_file: str | Path, weights: str, overrides: Sequence[str] = ()) -> Engines:
    """Build both detectors from one YAML, and fill both from one file."""
    overrides = [*overrides, "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu"]
    ours, theirs = load_detect_config(config_file, overrides), load_config(config_file, overrides)
    bias = "roi_heads.box_predictor.cls_score.bias"
    scores = load_plain(weights, [bias]).get(bias)
    if scores is None:
        raise UserError(f"--weights {weights}: the weights of a whole detector are needed")
    count = theirs.MODEL.ROI_HEADS.NUM_CLASSES or len(scores) - 1
    for config in (ours, theirs):
        resolve_classes(config, [str(index) for index in range(count)])
    detector, model = build_detector(ours).eval(), build_model(theirs).eval()
    load_weights(detector, ours)
    BackboneCheckpointer(model, whole=True).load(weights)
    return Engines(model, ImageMapper(theirs, False), detector, ours)


@torch.no_grad()
def compare(engines: Engines, images: Sequence[str | Path]) -> Parity:
    """Run both engines on image files, each with its own reading and resizing, and compare."""
    parity = Parity()
    for path in images:
        theirs = engines.mapper({"file_name": str(path)})
        ours = {**theirs, "image": network_input(read_image(Path(path)), engines.config)}
        parity.images += 1
        parity.pixels = max(parity.pixels, float((theirs["image"].float() - ours["image"].float()).abs().max()))
        their_maps = engines.detectron2.backbone(engines.detectron2.preprocess_image([theirs]).tensor)
        our_maps = engines.torchvision.backbone(engines.torchvision.preprocess([ours["image"]])[0])
        their_found = Instances(**detect(engines.detectron2, [theirs])[0])
        our_found = Instances(**engines.torchvision([ours])[0])
        for level, map_ in their_maps.items():
            difference = float((map_ - our_maps[level]).abs().max())
            parity.features[level] = max(parity.features.get(level, 0.0), difference)
        match(parity, their_found, our_found, engines.config.MODEL.ROI_HEADS.SCORE_THRESH_TEST)
    return parity


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


def load_run(folder: Path, cfg: CfgNode, device: torch.device) -> nn.Module:
    """Return the trained detector of a run, in evaluation mode."""
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE} in it; finish this run by train-det first")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.MODEL.TIMM.PRETRAINED = str(weights), str(device), False
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(saved_classes(weights)) or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    model: nn.Module = build_model(cfg).eval()
    BackboneCheckpointer(model, whole=True).load(str(weights))
    return model


def detect(model: Any, batch: list[dict[str, Any]], postprocess: bool = True) -> list[dict[str, Tensor]]:
    """Return what a Detectron2 detector finds, in the torchvision engine's form."""
    found = model.inference(batch, do_postprocess=postprocess)
    instances = [item["instances"] if postprocess else item for item in found]
    return [{"boxes": one.pred_boxes.tensor, "scores": one.scores, "labels": one.pred_classes} for one in instances]
