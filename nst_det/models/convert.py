"""Weights under other names: a ResNet's, and a whole detector's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
)

from nst_det.engine.io import atomic_path, sha256_of_file
from nst_det.errors import UserError
from nst_det.models.build import batch_norms, create_model
from nst_det.models.io import load_plain

# of a Faster R-CNN: this project's with a timm bottom-up; a plain Detectron2's with its own ResNet, which differs in
# the bottom-up's names; torchvision's own, which has other names above it too, the background as the first class
# instead of the last, and box deltas for it
FORMS = ("timm", "detectron2", "torchvision")
Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
# epsilon of every batch normalization that Detectron2 builds, FrozenBN too
DETECTRON2_EPS = 1e-5
DEPTHS = {
    ("basic", 2, 2, 2, 2): 18,
    ("basic", 3, 4, 6, 3): 34,
    ("bottleneck", 3, 4, 6, 3): 50,
    ("bottleneck", 3, 4, 23, 3): 101,
    ("bottleneck", 3, 8, 36, 3): 152,
}


def _resnet_layers() -> Iterator[tuple[str, str]]:
    yield from (("conv1", "stem.conv1"), ("bn1", "stem.conv1.norm"))
    for stage, block in product((1, 2, 3, 4), range(36)):
        ours, theirs = f"layer{stage}.{block}", f"res{stage + 1}.{block}"
        for conv in (1, 2, 3):
            yield f"{ours}.conv{conv}", f"{theirs}.conv{conv}"
            yield f"{ours}.bn{conv}", f"{theirs}.conv{conv}.norm"
        yield f"{ours}.downsample.0", f"{theirs}.shortcut"
        yield f"{ours}.downsample.1", f"{theirs}.shortcut.norm"


def _head_layers() -> Iterator[tuple[str, str]]:
    for level in range(4):
        yield f"backbone.fpn_lateral{level + 2}", f"backbone.fpn.inner_blocks.{level}.0"
        yield f"backbone.fpn_output{level + 2}", f"backbone.fpn.layer_blocks.{level}.0"
    yield "proposal_generator.rpn_head.conv", "rpn.head.conv.0.0"
    yield "proposal_generator.rpn_head.objectness_logits", "rpn.head.cls_logits"
    yield "proposal_generator.rpn_head.anchor_deltas", "rpn.head.bbox_pred"
    yield "roi_heads.box_head.fc1", "roi_heads.box_head.fc6"
    yield "roi_heads.box_head.fc2", "roi_heads.box_head.fc7"
    for layer in ("cls_score", "bbox_pred"):
        yield f"roi_heads.box_predictor.{layer}", f"roi_heads.box_predictor.{layer}"


_NORM = ("weight", "bias", "running_mean", "running_var")
# timm's and torchvision's name of each entry of a ResNet -> Detectron2's
RESNET = {
    f"{ours}.{entry}": f"{theirs}.{entry}"
    for ours, theirs in _resnet_layers()
    for entry in (_NORM if theirs.endswith("norm") else ("weight",))
}
# the same in a detector, below an FPN or without one
BOTTOM_UP = {
    f"{prefix}model.{ours}": f"{prefix}{theirs}"
    for prefix in ("backbone.bottom_up.", "backbone.")
    for ours, theirs in RESNET.items()
}
HEADS_PREFIXES = ("backbone.fpn_", "proposal_generator.", "roi_heads.")
# Detectron2's and this project's name of each entry of a detector above its bottom-up -> torchvision's
HEADS = {f"{ours}.{entry}": f"{theirs}.{entry}" for ours, theirs in _head_layers() for entry in ("weight", "bias")}
# classifiers, and the batch counters that Detectron2's frozen layers don't have
_LEFT_OUT = re.compile(r"(.*\.)?((fc|linear)\.(weight|bias)|num_batches_tracked)")


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def resnet_to_detectron2(state_dict: Mapping[str, Tensor], eps: float = DETECTRON2_EPS) -> dict[str, Tensor]:
    """Return a torchvision/timm ResNet by Detectron2's names, without its classifier.

    Where the network's batch normalization has another epsilon than Detectron2's, the difference goes into the running
    variance, so that the function computed in evaluation stays the same.
    """
    out = _renamed(state_dict, RESNET, "a plain ResNet, so Detectron2's ResNet has no place for it")
    if eps != DETECTRON2_EPS:
        for name in out:
            if name.endswith("running_var"):
                out[name] += eps - DETECTRON2_EPS
    return out


def resnet_from_detectron2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Detectron2's ResNet by torchvision's and timm's names, with batch counters set to 0."""
    return _with_counters(_renamed(state_dict, _inverse(RESNET), "Detectron2's ResNet"))


def _renamed(
    state_dict: Mapping[str, Tensor], names: Mapping[str, str], network: str, kept: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.startswith(kept):
            out[name] = value
        elif name in names:
            out[names[name]] = value.detach().clone()
        elif not _LEFT_OUT.fullmatch(name):
            raise UserError(f"'{name}' is not a layer of {network}")
    return out


def _with_counters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    below = [name for name in state_dict if name.endswith("running_var") and not name.startswith(HEADS_PREFIXES)]
    counters = {name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in below}
    return {**state_dict, **counters}


def resnet_keys(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the keys of Detectron2's ``MODEL.RESNETS`` for the state dict of a torchvision/timm ResNet."""
    remedy = "use build_timm_fpn_backbone, which takes any timm network"
    if "conv1.weight" not in state_dict or "layer1.0.conv1.weight" not in state_dict:
        raise UserError(f"not a plain ResNet (no conv1 and layer1), so Detectron2's ResNet can't hold it; {remedy}")
    blocks = {tuple(name.split(".")[:2]) for name in state_dict if name.startswith("layer")}
    counts = [sum(layer == f"layer{number}" for layer, _ in blocks) for number in (1, 2, 3, 4)]
    kind = "bottleneck" if "layer1.0.conv3.weight" in state_dict else "basic"
    depth = DEPTHS.get((kind, *counts))  # type: ignore[arg-type]
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
    return {
        "DEPTH": depth,
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": len(second) // groups,
        "STEM_OUT_CHANNELS": stem[0],
        "RES2_OUT_CHANNELS": len(last),
    }


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


# what Detectron2 wrote into its files at first, beside the weights
CONSTANTS = re.compile(r"pixel_(mean|std)|proposal_generator\.anchor_generator\..*")


def detect_form(names: Mapping[str, Tensor]) -> str:
    """Return which of :data:`FORMS` a state dict has."""
    marks = {
        "torchvision": r"backbone\.body\.",
        "timm": r"backbone\.(bottom_up\.)?model\.",
        "detectron2": r"backbone\.(bottom_up\.)?(stem|res2)\.",
    }
    for form, mark in marks.items():
        if any(re.match(mark, name) for name in names):
            return form
    raise UserError(
        f"not the weights of a detector in a known form ({', '.join(list(names)[:2])}, ...); the forms are "
        f"{', '.join(FORMS)}"
    )


def convert(state_dict: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """Return a detector's state dict in another form; every weight is carried over or the conversion is refused.

    Example:
        >>> weights = {"backbone.bottom_up.model.conv1.weight": torch.zeros(64, 3, 7, 7)}
        >>> list(convert(weights, "torchvision"))
        ['backbone.body.conv1.weight']
    """
    read: dict[str, Rename] = {"timm": dict, "detectron2": _timm_from_detectron2, "torchvision": _timm_from_torchvision}
    write: dict[str, Rename] = {"timm": dict, "detectron2": _timm_to_detectron2, "torchvision": _timm_to_torchvision}
    if form not in FORMS:
        raise UserError(f"unknown form '{form}'; there are {', '.join(FORMS)}")
    state_dict = {name: value for name, value in state_dict.items() if not CONSTANTS.fullmatch(name)}
    return write[form](read[detect_form(state_dict)](state_dict))


def with_usual_eps(path: str | Path, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return what computes the same with an epsilon of 1e-5, where the file is one of torchvision's that has 0."""
    published = (FasterRCNN_ResNet50_FPN_Weights, MaskRCNN_ResNet50_FPN_Weights, KeypointRCNN_ResNet50_FPN_Weights)
    # torchvision sets it when it builds these by name; the files are known by the hash in their names
    if "backbone.body.conv1.weight" not in state_dict or not any(
        sha256_of_file(path).startswith(re.findall(r"-(\w+)\.pth$", kind.COCO_V1.url)[0]) for kind in published
    ):
        return state_dict
    # a little more than 0 is left of a variance of 0
    least = -DETECTRON2_EPS * (1 - 1e-6)
    return {
        name: (value - DETECTRON2_EPS).clamp(min=least) if name.endswith("running_var") else value
        for name, value in state_dict.items()
    }


def convert_file(weights: str | Path, form: str, output: str | Path) -> tuple[str, int]:
    """Write a file's weights in another form as a ``.pth``; return their former form and the number of entries."""
    output = Path(output)
    if output.suffix != ".pth":
        raise UserError(f"--output {output}: the file must end in .pth")
    state_dict = with_usual_eps(weights, load_plain(weights))
    try:
        given = detect_form(state_dict)
        converted = convert(state_dict, form)
    except UserError as error:
        raise UserError(f"{weights}: {error}") from error
    with atomic_path(output) as temporary:
        torch.save({"model": converted, "__author__": "nst_det"}, temporary)
    return given, len(converted)


def _timm_from_detectron2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _with_counters(_renamed(state_dict, _inverse(BOTTOM_UP), "Detectron2's ResNet", HEADS_PREFIXES))


def _timm_to_detectron2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    network = {name.partition(".model.")[2]: value for name, value in state_dict.items() if ".model." in name}
    if any(name.startswith("layer4.") for name in network):
        resnet_keys(network)
    return _renamed(state_dict, BOTTOM_UP, "a plain ResNet", HEADS_PREFIXES)


def _timm_to_torchvision(state_dict: Mapping[str, Tensor], back: bool = False) -> dict[str, Tensor]:
    names, source, target = HEADS, "backbone.bottom_up.model.", "backbone.body."
    if back:
        names, source, target = _inverse(names), target, source
    out: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.startswith(source):
            out[target + name.removeprefix(source)] = value.clone()
            continue
        if name not in names:
            raise UserError(
                f"'{name}' has no place in the other form; convertible are Faster R-CNNs with a two-layer box head and "
                "an FPN of four levels without normalization"
            )
        if "box_predictor.cls_score" in name:
            # the background is torchvision's first class
            value = torch.roll(value, -1 if back else 1, dims=0)
        elif "box_predictor.bbox_pred" in name:
            # torchvision has deltas for the background, which are never read
            value = value[4:] if back else torch.cat((value.new_zeros(4, *value.shape[1:]), value))
        out[names[name]] = value.clone()
    return out


def _timm_from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # before torchvision 0.13 the convolutions of the FPN and of the RPN's head were in no sequence
    since = {re.sub(r"(_blocks\.\d)(\.\w+)$", r"\1.0\2", name): value for name, value in state_dict.items()}
    since = {re.sub(r"(rpn\.head\.conv)(\.\w+)$", r"\1.0.0\2", name): value for name, value in since.items()}
    return _timm_to_torchvision(since, back=True)
