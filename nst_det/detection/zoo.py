"""Detectors of torchvision's and Detectron2's zoos: what they are here, and how they begin another one."""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from nst_det.engine.config import flat, plain
from nst_det.errors import UserError
from nst_det.models import Card, input_contract
from nst_det.models.caffe import check_stride, is_resnext, stride_in_1x1
from nst_det.models.card import check_pixels
from nst_det.models.convert import CONSTANTS, HEADS, convert, detect_form, resnet_keys, with_usual_eps
from nst_det.models.io import below_prefix, first_names, read_any

log = logging.getLogger(__name__)
# of the entries of a detector that depend on its classes
PREDICTOR = "roi_heads.box_predictor."
# mean, std (0..255) and channel order
Pixels = tuple[Sequence[float], Sequence[float], str]
# what Mask R-CNN and Keypoint R-CNN have beside the boxes, and what are no weights
OTHERS = re.compile(rf"roi_heads\.(mask|keypoint)_|({CONSTANTS.pattern})$")
ANY_IMAGES = "; if it was trained on other images, write it by timm's names first: nst-det convert --to timm"
# names of Detectron2's MODEL.RESNETS.DEPTH, NUM_GROUPS and WIDTH_PER_GROUP in timm
ARCHS = {
    **{(depth, 1, 64): f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    (50, 32, 4): "resnext50_32x4d",
    (101, 32, 8): "resnext101_32x8d",
    (50, 1, 128): "wide_resnet50_2",
    (101, 1, 128): "wide_resnet101_2",
}
# VOC's names of COCO's classes, where more than spaces differ
ALIASES = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}
# what torchvision's list has for a number that COCO left out
UNUSED = "N/A"


def coco_classes(count: int) -> list[str]:
    """Return COCO's classes: 80, or 90 by torchvision's numbers, some of which are unused; [] for another count."""
    numbered = [str(name) for name in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]]
    known = [numbered, [name for name in numbered if name != UNUSED]]
    return next((names for names in known if len(names) == count), [])


@dataclass(frozen=True)
class ClassNames:
    """MODEL.KEEP_CLASSES, CLASS_ALIASES and WEIGHTS_CLASSES."""

    keep: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    listed: Sequence[str] = ()

    @staticmethod
    def of(model: CfgNode) -> ClassNames:
        aliases = {str(own): str(theirs) for own, theirs in plain(model.CLASS_ALIASES).items()}
        return ClassNames(model.KEEP_CLASSES, aliases, [str(name) for name in model.WEIGHTS_CLASSES])

    def shared(self, classes: Sequence[str], theirs: Sequence[str], source: str) -> dict[int, int]:
        """Return the label among ``theirs`` of each label of ``classes`` whose name both have."""
        known = {name: label for label, name in enumerate(theirs) if name != UNUSED}
        for own, name in self.aliases.items():
            side, wrong, names = ("data", own, classes) if own not in classes else ("weights", name, list(known))
            if wrong not in names:
                near = difflib.get_close_matches(wrong, names, n=3, cutoff=0.4) or list(names)
                raise UserError(f"MODEL.CLASS_ALIASES: no class '{wrong}' in the {side}; near it: {first_names(near)}")
        loosely = {_loosely(name): label for name, label in known.items()}
        found = {own: known.get(self.aliases.get(own, own), loosely.get(_loosely(own))) for own in classes}
        shared = {label: found[own] for label, own in enumerate(classes) if found[own] is not None}
        if not shared:
            raise UserError(
                f"MODEL.KEEP_CLASSES: {source} has none of the classes {first_names(classes)}; map them by "
                "MODEL.CLASS_ALIASES, or set KEEP_CLASSES False"
            )
        return shared  # type: ignore[return-value]


def _loosely(name: str) -> str:
    letters = re.sub(r"[\s_-]", "", name.casefold())
    return ALIASES.get(letters, letters)


def form_of(names: Mapping[str, Any]) -> str:
    """Return whose names these are, see :data:`~nst_det.models.convert.FORMS`; "" if unknown."""
    try:
        return detect_form(names)
    except UserError:
        return ""


def read_detector(path: str | Path, own: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a file without what is before the names of a detector, of this project's or another's."""
    return without_prefix(read_any(path), own, path)


def without_prefix(tensors: dict[str, Tensor], own: Iterable[str], path: str | Path) -> dict[str, Tensor]:
    """Return :func:`read_detector` of what is read already."""
    for names in (set(own), set(HEADS.values()), set(HEADS)):
        tensors = below_prefix(tensors, names, path)
    return tensors


def by_own_names(
    path: Path, given: Mapping[str, Tensor], own: Iterable[str], bottom_up: nn.Module, pixels: Pixels, source: str
) -> dict[str, Tensor]:
    """Return a detector's weights by the names of another one, which computes the same with them.

    Args:
        path: their file.
        own: the names.
        bottom_up: of the detector with these names.
        pixels: its images, compared with those that the file's detector was trained on, as far as these are known.

    Raises:
        UserError: that isn't so, or isn't known; in one line that begins with ``source``.
    """
    names = dict.fromkeys(own)
    form, wanted = form_of(given), form_of(names)
    left_out = [name for name in given if OTHERS.match(name) and name not in names]
    if heads := [name for name in left_out if name.startswith("roi_heads.")]:
        log.info("%s: left out: %d entries of its mask or keypoint heads", path, len(heads))
    weights = {name: value for name, value in given.items() if name not in left_out}
    if not form or not wanted or form == "timm" or form == wanted:
        return weights
    try:
        if form == "detectron2":
            check_stride(weights, bottom_up)
        elif stride_in_1x1(bottom_up):
            raise ValueError("torchvision's bottlenecks have their stride in the 3 x 3 convolution, this ResNet hasn't")
        check_pixels(Card("", 1, input=_input(form, given)), *pixels, source)
        return convert(with_usual_eps(path, weights), wanted)
    except (UserError, ValueError) as error:
        line = str(error).removeprefix(f"{source}: ")
        known = form == "torchvision" or "pixel_mean" in given or "PIXEL_MEAN" not in line
        raise UserError(f"{source}: {line}{'' if known else ANY_IMAGES}") from error


def _input(form: str, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the images of a detector: those that its file names, or of the zoo that has these names."""
    if form == "torchvision":
        return input_contract(list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD), "RGB", 0)
    # its ResNeXts alone have a std
    mean, std = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395] if is_resnext(given) else [1.0, 1.0, 1.0]
    if "pixel_mean" in given:
        mean, std = (given[name].flatten().tolist() for name in ("pixel_mean", "pixel_std"))
    # of photographs, red has the highest mean
    order = "RGB" if mean[0] > mean[-1] else "BGR"
    return input_contract([value / 255 for value in mean], [value / 255 for value in std], order, 0)


def new_predictor(
    given: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    classes: Sequence[str],
    theirs: Sequence[str],
    names: ClassNames,
    source: str,
) -> tuple[dict[str, Tensor], str]:
    """Return the box predictor of ``own`` for ``classes``, and what it keeps of a detector of other classes.

    Kept are, where asked, the rows of the classes that both have, those of the boxes too, and of the background.
    """
    fresh = {name: value for name, value in own.items() if name.startswith(PREDICTOR)}
    if not names.keep:
        return fresh, ""
    scores = given.get(f"{PREDICTOR}cls_score.weight")
    count = 0 if scores is None else len(scores) - 1
    theirs = theirs or coco_classes(count)
    if len(theirs) != count or scores is None:
        raise UserError(
            f"MODEL.KEEP_CLASSES: {source} has a box predictor of {count} classes, of which {len(theirs)} names are "
            "known; list them in MODEL.WEIGHTS_CLASSES, in the order of their labels, or set KEEP_CLASSES False"
        )
    shared = names.shared(classes, theirs, source)
    kept = {name: value.detach().cpu().clone() for name, value in fresh.items()}
    for name, value in kept.items():
        rows, width = given.get(name), 1 if "cls_score" in name else 4
        by_class = len(value) >= width * len(classes)
        wanted = count + 1 if width == 1 else 4 * count if by_class else 4
        if rows is None or rows.shape != (wanted, *value.shape[1:]):
            raise UserError(f"MODEL.KEEP_CLASSES: {source}: its {name} doesn't fit this box head; set it False")
        # boxes of no class in particular are the same for all
        for mine, other in (shared if by_class else {0: 0}).items():
            value[width * mine : width * (mine + 1)] = rows[width * other : width * (other + 1)]
        if width == 1:
            value[-1] = rows[-1]
    return kept, ", ".join([*(classes[label] for label in shared), "the background"])


def zoo_keys(path: str | Path) -> dict[str, Any]:
    """Return the config keys of a detector that computes the same as the zoo's detector with these weights.

    They are {} for this project's own files.

    Raises:
        UserError: no detector, or one that can't be built here.
    """
    return keys_of(read_detector(path), path)


def unlike(given: Mapping[str, Tensor], path: Path, config: CfgNode) -> str:
    """Return which keys of a config aren't those of the detector whose weights these are, with that one's values."""
    try:
        wanted, values = keys_of(given, path), flat(config)
    except UserError:
        return ""
    own = {key: values.get(key, {}) for key in wanted if key != "MODEL.TIMM.NORM"}
    words = [f"{key} {wanted[key]}" for key, value in own.items() if plain(value) != wanted[key]]
    return f"; its own detector has {', '.join(words)}" if words else ""


def keys_of(given: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Return :func:`zoo_keys` of the weights that are read already."""
    try:
        form = detect_form(given)
        if form == "timm":
            return {}
        weights = convert({name: value for name, value in given.items() if not OTHERS.match(name)}, "timm")
        below = "backbone.bottom_up.model."
        network = {name.removeprefix(below): value for name, value in weights.items() if name.startswith(below)}
        resnet = resnet_keys(network)
        arch = ARCHS[resnet["DEPTH"], resnet["NUM_GROUPS"], resnet["WIDTH_PER_GROUP"]]
        fc, channels = weights["roi_heads.box_head.fc1.weight"], len(weights["backbone.fpn_lateral2.weight"])
    except KeyError as error:
        raise UserError(f"{path}: not a Faster R-CNN with FPN on a ResNet (no {error.args[0]})") from error
    except UserError as error:
        raise UserError(f"{path}: {str(error).partition('; use ')[0]}") from error
    images, detectron2s = _input(form, given), form == "detectron2"
    if detectron2s and "layer1.0.conv3.weight" in network and resnet["NUM_GROUPS"] == 1:
        arch = f"nst_{arch}_caffe"
    keys = {
        "BACKBONE.NAME": "build_timm_fpn_backbone",
        "TIMM.ARCH": arch,
        "TIMM.KWARGS": {},
        "TIMM.NORM": "FrozenBN",
        "TIMM.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "FPN.OUT_CHANNELS": channels,
        "FPN.FUSE_TYPE": "sum",
        "ANCHOR_GENERATOR.NAME": "DefaultAnchorGenerator" if detectron2s else "RoundedAnchorGenerator",
        "ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "ANCHOR_GENERATOR.OFFSET": 0.0,
        "RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "RPN.CONV_DIMS": [-1],
        "RPN.BBOX_REG_WEIGHTS": [1.0, 1.0, 1.0, 1.0],
        "ROI_HEADS.NAME": "StandardROIHeads",
        "ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "ROI_BOX_HEAD.NUM_FC": 2,
        "ROI_BOX_HEAD.FC_DIM": len(fc),
        "ROI_BOX_HEAD.NUM_CONV": 0,
        "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": len(weights[f"{PREDICTOR}bbox_pred.bias"]) == 4,
        "ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
        "ROI_BOX_HEAD.POOLER_RESOLUTION": math.isqrt(fc.shape[1] // channels),
        "ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2" if detectron2s else "ROIAlign",
        "ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0 if detectron2s else 2,
        "ROI_BOX_HEAD.CANONICAL_BOX_SIZE": 224,
        "ROI_BOX_HEAD.CANONICAL_LEVEL": 4,
        "PIXEL_MEAN": [round(255 * value, 3) for value in images["mean"]],
        "PIXEL_STD": [round(255 * value, 3) for value in images["std"]],
    }
    return {f"MODEL.{key}": value for key, value in keys.items()} | {"INPUT.FORMAT": images["channel_order"]}
