"""Full detector weights from one set of names to another.

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
from pathlib import Path

import torch
from torch import Tensor

from nst_det.detectron2.resnet_key_map import resnet_from_detectron2, resnet_shape, resnet_to_detectron2
from nst_det.engine.io import atomic_path
from nst_det.errors import UserError
from nst_det.models import load_plain

FORMS = ("timm", "detectron2", "torchvision")
# (this project's pattern, torchvision's form), in both directions by exchange of the two
_TORCHVISION = (
    (r"backbone\.bottom_up\.model\.(?P<rest>.+)", "backbone.body.{rest}"),
    (r"backbone\.fpn_lateral(?P<level>[2-5])\.(?P<leaf>weight|bias)", "backbone.fpn.inner_blocks.{level}.0.{leaf}"),
    (r"backbone\.fpn_output(?P<level>[2-5])\.(?P<leaf>weight|bias)", "backbone.fpn.layer_blocks.{level}.0.{leaf}"),
    (r"proposal_generator\.rpn_head\.conv\.(?P<leaf>weight|bias)", "rpn.head.conv.0.0.{leaf}"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(?P<leaf>weight|bias)", "rpn.head.cls_logits.{leaf}"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(?P<leaf>weight|bias)", "rpn.head.bbox_pred.{leaf}"),
    (r"roi_heads\.box_head\.fc1\.(?P<leaf>weight|bias)", "roi_heads.box_head.fc6.{leaf}"),
    (r"roi_heads\.box_head\.fc2\.(?P<leaf>weight|bias)", "roi_heads.box_head.fc7.{leaf}"),
    (r"(?P<rest>roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(weight|bias))", "{rest}"),
)
_BACK = (
    (r"backbone\.body\.(?P<rest>.+)", "backbone.bottom_up.model.{rest}"),
    # the names before torchvision 0.13 lack the inner index
    (
        r"backbone\.fpn\.inner_blocks\.(?P<level>[0-3])\.(0\.)?(?P<leaf>weight|bias)",
        "backbone.fpn_lateral{level}.{leaf}",
    ),
    (
        r"backbone\.fpn\.layer_blocks\.(?P<level>[0-3])\.(0\.)?(?P<leaf>weight|bias)",
        "backbone.fpn_output{level}.{leaf}",
    ),
    (r"rpn\.head\.conv\.(0\.0\.)?(?P<leaf>weight|bias)", "proposal_generator.rpn_head.conv.{leaf}"),
    (r"rpn\.head\.cls_logits\.(?P<leaf>weight|bias)", "proposal_generator.rpn_head.objectness_logits.{leaf}"),
    (r"rpn\.head\.bbox_pred\.(?P<leaf>weight|bias)", "proposal_generator.rpn_head.anchor_deltas.{leaf}"),
    (r"roi_heads\.box_head\.fc6\.(?P<leaf>weight|bias)", "roi_heads.box_head.fc1.{leaf}"),
    (r"roi_heads\.box_head\.fc7\.(?P<leaf>weight|bias)", "roi_heads.box_head.fc2.{leaf}"),
    (r"(?P<rest>roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(weight|bias))", "{rest}"),
)
_BOTTOM_UP = re.compile(r"(?P<prefix>backbone\.(?:bottom_up\.)?)(?P<rest>.+)")
_HEADS = ("backbone.fpn_", "proposal_generator.", "roi_heads.")


def detect_form(names: Mapping[str, Tensor]) -> str:
    """Which of :data:`FORMS` a state dict has.

    Raises:
        UserError: none of them.
    """
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
    """A detector's state dict in another form; every entry is carried over or the conversion is refused.

    Args:
        state_dict: in any of :data:`FORMS`.
        form: the wanted one.

    Raises:
        UserError: an entry that the wanted form has no place for.

    Example:
        >>> weights = {"backbone.bottom_up.model.conv1.weight": torch.zeros(64, 3, 7, 7)}
        >>> list(convert(weights, "torchvision"))
        ['backbone.body.conv1.weight']
    """
    if form not in FORMS:
        raise UserError(f"unknown form '{form}'; there are {', '.join(FORMS)}")
    given = detect_form(state_dict)
    return _TO[form](_FROM[given](state_dict))


def convert_file(weights: str | Path, form: str, output: str | Path) -> tuple[str, int]:
    """Convert a file; the output is a ``.pth`` that holds ``{"model": state dict}``.

    Returns:
        The form of the input, and the number of entries written.

    Raises:
        UserError: see :func:`convert`; or a file that can't be read or written.
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
    """The bottom-up's prefix, its entries without it, and all other entries."""
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


def _timm_to_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        # torchvision counts FPN blocks from 0, the levels begin at 2
        target = _rename(name, _TORCHVISION, shift=-2)
        if target.endswith(("cls_score.weight", "cls_score.bias")):
            value = torch.roll(value, 1, dims=0)
        elif "box_predictor.bbox_pred" in target:
            # deltas of the background are never read
            value = torch.cat((value.new_zeros(4, *value.shape[1:]), value))
        out[target] = value.clone()
    return out


def _timm_from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        target = _rename(name, _BACK, shift=2)
        if target.endswith(("cls_score.weight", "cls_score.bias")):
            value = torch.roll(value, -1, dims=0)
        elif "box_predictor.bbox_pred" in target:
            value = value[4:]
        out[target] = value.clone()
    return out


def _rename(name: str, table: tuple[tuple[str, str], ...], shift: int) -> str:
    for pattern, form in table:
        if found := re.fullmatch(pattern, name):
            parts = {key: value for key, value in found.groupdict().items() if value is not None}
            if "level" in parts:
                parts["level"] = str(int(parts["level"]) + shift)
            return form.format(**parts)
    raise UserError(
        f"'{name}' has no place in the other form; convertible are Faster R-CNNs with a two-layer box head and an FPN "
        "of four levels without normalization"
    )


Names = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
_FROM: dict[str, Names] = {"timm": dict, "detectron2": _timm_from_detectron2, "torchvision": _timm_from_torchvision}
_TO: dict[str, Names] = {"timm": dict, "detectron2": _timm_to_detectron2, "torchvision": _timm_to_torchvision}
