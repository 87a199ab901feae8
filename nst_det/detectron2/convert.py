"""Weights under other names: a ResNet's, and a whole detector's.

Three forms of one Faster R-CNN with FPN (or without, for the first two)::

    timm         both engines of this project with build_timm_fpn_backbone or build_timm_backbone
    detectron2   a plain Detectron2 with build_resnet_fpn_backbone or build_resnet_backbone
    torchvision  torchvision.models.detection.FasterRCNN on resnet_fpn_backbone

The first two differ in the bottom-up's names.  torchvision's also has other names for the rest, the background as
the first class instead of the last, and one set of box deltas for it.  Values are copied, never computed; only the
batch normalization's epsilon may go into the variances.  Nothing here needs Detectron2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nst_det.engine.io import atomic_path
from nst_det.errors import UserError
from nst_det.models import create_model, load_plain
from nst_det.models.build import batch_norms

FORMS = ("timm", "detectron2", "torchvision")
# epsilon of every batch normalization that Detectron2 builds, FrozenBN too
DETECTRON2_EPS = 1e-5

# what may stand in the places of the tables below, left and right; digits that differ count the same from elsewhere
_PLACES = {
    "layer": ("1234", "2345"),
    "level": ("2345", "0123"),
    "conv": ("123", "123"),
    "block": r"\d+",
    "leaf": "weight|bias",
    "stat": "weight|bias|running_mean|running_var",
    "rest": ".+",
}
Table = tuple[tuple[str, str], ...]
# a ResNet of torchvision's and timm's, Detectron2's
RESNET: Table = (
    ("conv1.weight", "stem.conv1.weight"),
    ("bn1.{stat}", "stem.conv1.norm.{stat}"),
    ("layer{layer}.{block}.conv{conv}.weight", "res{layer}.{block}.conv{conv}.weight"),
    ("layer{layer}.{block}.bn{conv}.{stat}", "res{layer}.{block}.conv{conv}.norm.{stat}"),
    ("layer{layer}.{block}.downsample.0.weight", "res{layer}.{block}.shortcut.weight"),
    ("layer{layer}.{block}.downsample.1.{stat}", "res{layer}.{block}.shortcut.norm.{stat}"),
)
# a detector of this project, torchvision's; of two rows with one left side the second is of torchvision before 0.13
DETECTOR: Table = (
    ("backbone.bottom_up.model.{rest}", "backbone.body.{rest}"),
    ("backbone.fpn_lateral{level}.{leaf}", "backbone.fpn.inner_blocks.{level}.0.{leaf}"),
    ("backbone.fpn_lateral{level}.{leaf}", "backbone.fpn.inner_blocks.{level}.{leaf}"),
    ("backbone.fpn_output{level}.{leaf}", "backbone.fpn.layer_blocks.{level}.0.{leaf}"),
    ("backbone.fpn_output{level}.{leaf}", "backbone.fpn.layer_blocks.{level}.{leaf}"),
    ("proposal_generator.rpn_head.conv.{leaf}", "rpn.head.conv.0.0.{leaf}"),
    ("proposal_generator.rpn_head.conv.{leaf}", "rpn.head.conv.{leaf}"),
    ("proposal_generator.rpn_head.objectness_logits.{leaf}", "rpn.head.cls_logits.{leaf}"),
    ("proposal_generator.rpn_head.anchor_deltas.{leaf}", "rpn.head.bbox_pred.{leaf}"),
    ("roi_heads.box_head.fc1.{leaf}", "roi_heads.box_head.fc6.{leaf}"),
    ("roi_heads.box_head.fc2.{leaf}", "roi_heads.box_head.fc7.{leaf}"),
    ("roi_heads.box_predictor.cls_score.{leaf}", "roi_heads.box_predictor.cls_score.{leaf}"),
    ("roi_heads.box_predictor.bbox_pred.{leaf}", "roi_heads.box_predictor.bbox_pred.{leaf}"),
)
# classifiers, and the batch counters that Detectron2's frozen layers don't have
_LEFT_OUT = re.compile(r"(fc|linear|stem\.fc)\..*|(.*\.)?num_batches_tracked")
_BOTTOM_UP = re.compile(r"(?P<prefix>backbone\.(?:bottom_up\.)?)(?P<rest>.+)")
_HEADS = ("backbone.fpn_", "proposal_generator.", "roi_heads.")
_DEPTHS = {
    ("basic", 2, 2, 2, 2): 18,
    ("basic", 3, 4, 6, 3): 34,
    ("bottleneck", 3, 4, 6, 3): 50,
    ("bottleneck", 3, 4, 23, 3): 101,
    ("bottleneck", 3, 8, 36, 3): 152,
}


def renamed(name: str, table: Table, back: bool = False) -> str | None:
    """Return the name on the other side of a table (``back``: on its left side), or None where it has none.

    Example:
        >>> renamed("layer1.0.downsample.1.running_var", RESNET)
        'res2.0.shortcut.norm.running_var'
    """
    for row in table:
        source, target = reversed(row) if back else row
        if found := _pattern(source, back).fullmatch(name):
            return target.format(**{place: _recounted(place, text, back) for place, text in found.groupdict().items()})
    return None


@cache
def _pattern(template: str, back: bool) -> re.Pattern[str]:
    def group(place: re.Match[str]) -> str:
        content = _PLACES[place[1]]
        return f"(?P<{place[1]}>{content if isinstance(content, str) else f'[{content[back]}]'})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(template)))


def _recounted(place: str, text: str, back: bool) -> str:
    content = _PLACES[place]
    return text if isinstance(content, str) else text.translate(str.maketrans(content[back], content[not back]))


def resnet_to_detectron2(state_dict: Mapping[str, Tensor], eps: float = DETECTRON2_EPS) -> dict[str, Tensor]:
    """Return a torchvision/timm ResNet by Detectron2's names; the classifier is left out.

    Where the network's batch normalization has another epsilon than Detectron2's 1e-5, the difference goes into
    the running variance, so that the function computed in evaluation stays the same.
    """
    out: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if _LEFT_OUT.fullmatch(name):
            continue
        target = renamed(name, RESNET)
        if target is None:
            raise UserError(f"'{name}' is not a layer of a plain ResNet, so Detectron2's ResNet has no place for it")
        if name.endswith("running_var") and eps != DETECTRON2_EPS:
            value = value + (eps - DETECTRON2_EPS)
        out[target] = value.detach().clone()
    return out


def resnet_from_detectron2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Detectron2's ResNet by torchvision's and timm's names, with batch counters set to 0."""
    out: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if _LEFT_OUT.fullmatch(name):
            continue
        target = renamed(name, RESNET, back=True)
        if target is None:
            raise UserError(f"'{name}' is not a layer of Detectron2's ResNet")
        out[target] = value.detach().clone()
        if target.endswith("running_var"):
            out[f"{target.removesuffix('running_var')}num_batches_tracked"] = torch.tensor(0)
    return out


@dataclass(frozen=True)
class ResNetShape:
    """What Detectron2's ``MODEL.RESNETS`` must say for a state dict to fit."""

    depth: int
    groups: int
    width_per_group: int
    res2_channels: int
    stem_channels: int


def resnet_shape(state_dict: Mapping[str, Tensor]) -> ResNetShape:
    """Read depth, groups and widths off the state dict of a torchvision/timm ResNet that Detectron2 can build."""
    remedy = "use build_timm_fpn_backbone, which takes any timm network"
    if "conv1.weight" not in state_dict or "layer1.0.conv1.weight" not in state_dict:
        raise UserError(f"not a plain ResNet (no conv1 and layer1), so Detectron2's ResNet can't hold it; {remedy}")
    blocks = {tuple(name.split(".")[:2]) for name in state_dict if name.startswith("layer")}
    counts = [sum(layer == f"layer{number}" for layer, _ in blocks) for number in (1, 2, 3, 4)]
    kind = "bottleneck" if "layer1.0.conv3.weight" in state_dict else "basic"
    depth = _DEPTHS.get((kind, *counts))  # type: ignore[arg-type]
    if depth is None:
        raise UserError(
            f"a ResNet of {kind} blocks {counts} can't be built by Detectron2's MODEL.RESNETS; its depths are 18, 34, "
            f"50, 101 and 152; {remedy}"
        )
    second = state_dict["layer1.0.conv2.weight"]
    last = state_dict["layer1.0.conv3.weight"] if kind == "bottleneck" else second
    stem = tuple(state_dict["conv1.weight"].shape)
    if stem[1:] != (3, 7, 7):
        raise UserError(f"the stem's convolution is {stem[1:]}, Detectron2's is (3, 7, 7); {remedy}")
    if kind == "basic" and (len(last), stem[0]) != (64, 64):
        raise UserError(f"Detectron2 builds R-18 and R-34 64 channels wide, this one has {len(last)}; {remedy}")
    groups = second.shape[0] // second.shape[1] if kind == "bottleneck" else 1
    return ResNetShape(depth, groups, len(second) // groups, len(last), stem[0])


def batch_norm_eps(arch: str, arch_kwargs: Mapping[str, Any]) -> float:
    """Return the one epsilon of the batch normalization of a timm architecture."""
    try:
        with torch.device("meta"):
            model = create_model(arch, 1, **arch_kwargs)
    except ValueError as error:
        raise UserError(f"--arch: {error}") from error
    found = {layer.eps for _, layer in batch_norms(model)}
    if len(found) != 1:
        raise UserError(f"{arch}: batch normalization of one epsilon is needed, it has {sorted(found) or 'none'}")
    return float(found.pop())


def detect_form(names: Mapping[str, Tensor]) -> str:
    """Return which of :data:`FORMS` a state dict has."""
    if any(name.startswith("backbone.body.") for name in names):
        return "torchvision"
    if any(name.startswith(("backbone.bottom_up.model.", "backbone.model.")) for name in names):
        return "timm"
    if any(re.match(r"backbone\.(bottom_up\.)?(stem|res2)\.", name) for name in names):
        return "detectron2"
    raise UserError(
        f"not the weights of a detector in a known form ({', '.join(list(names)[:2])}, ...); the forms are "
        f"{', '.join(FORMS)}"
    )


def convert(state_dict: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """Return a detector's state dict in another form; every entry is carried over or the conversion is refused.

    Example:
        >>> weights = {"backbone.bottom_up.model.conv1.weight": torch.zeros(64, 3, 7, 7)}
        >>> list(convert(weights, "torchvision"))
        ['backbone.body.conv1.weight']
    """
    if form not in FORMS:
        raise UserError(f"unknown form '{form}'; there are {', '.join(FORMS)}")
    return _TO[form](_FROM[detect_form(state_dict)](state_dict))


def convert_file(weights: str | Path, form: str, output: str | Path) -> tuple[str, int]:
    """Write a file's weights in another form; return the form that they had, and the number of entries written.

    The output is a ``.pth`` that holds ``{"model": state dict}``.
    """
    output = Path(output)
    if output.suffix != ".pth":
        raise UserError(f"--output {output}: the file must end in .pth")
    state_dict = load_plain(weights)
    try:
        given = detect_form(state_dict)
        converted = convert(state_dict, form)
    except UserError as error:
        raise UserError(f"{weights}: {error}") from error
    with atomic_path(output) as temporary:
        torch.save({"model": converted, "__author__": "nst_det"}, temporary)
    return given, len(converted)


def _split(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """Return the bottom-up's prefix, its entries without it, and all other entries."""
    prefixes: set[str] = set()
    below: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.startswith(_HEADS):
            rest[name] = value
            continue
        found = _BOTTOM_UP.fullmatch(name)
        if found is None:
            raise UserError(f"'{name}' is no part of a Faster R-CNN of this project or of Detectron2")
        prefixes.add(found["prefix"])
        below[found["rest"]] = value
    if len(prefixes) != 1:
        raise UserError("these weights have bottom-ups of two kinds")
    return prefixes.pop(), below, rest


def _timm_from_detectron2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix, below, rest = _split(state_dict)
    return {f"{prefix}model.{name}": value for name, value in resnet_from_detectron2(below).items()} | rest


def _timm_to_detectron2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix, below, rest = _split(state_dict)
    network = {name.removeprefix("model."): value for name, value in below.items()}
    if any(name.startswith("layer4.") for name in network):
        resnet_shape(network)
    return {f"{prefix}{name}": value for name, value in resnet_to_detectron2(network).items()} | rest


def _timm_to_torchvision(state_dict: Mapping[str, Tensor], back: bool = False) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        target = renamed(name, DETECTOR, back)
        if target is None:
            raise UserError(
                f"'{name}' has no place in the other form; convertible are Faster R-CNNs with a two-layer box head and "
                "an FPN of four levels without normalization"
            )
        if "box_predictor.cls_score" in name:
            # the background is torchvision's first class
            value = torch.roll(value, -1 if back else 1, dims=0)
        elif "box_predictor.bbox_pred" in name:
            # it has deltas there, which are never read
            value = value[4:] if back else torch.cat((value.new_zeros(4, *value.shape[1:]), value))
        out[target] = value.clone()
    return out


def _timm_from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _timm_to_torchvision(state_dict, back=True)


Names = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
_FROM: dict[str, Names] = {
    "timm": dict,
    "detectron2": _timm_from_detectron2,
    "torchvision": _timm_from_torchvision,
}
_TO: dict[str, Names] = {"timm": dict, "detectron2": _timm_to_detectron2, "torchvision": _timm_to_torchvision}
