"""A distilled ResNet for a plain Detectron2 that knows nothing of nst_det."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nst_det.detectron2.convert import (
    DETECTRON2_EPS,
    ResNetShape,
    batch_norm_eps,
    resnet_shape,
    resnet_to_detectron2,
)
from nst_det.engine.io import atomic_path, write_text
from nst_det.errors import UserError
from nst_det.models import Bottomup, load_backbone, load_plain

PARITY_LIMIT = 1e-4
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".pkl", ".pth")


@dataclass(frozen=True)
class Exported:
    """What was written: the file for ``MODEL.WEIGHTS``, and the YAML with all keys that these weights need.

    ``parity`` is the largest absolute difference of ``res2`` .. ``res5`` between the network that was exported and
    Detectron2's, on normalized images; None where Detectron2 is not installed.
    """

    weights: Path
    config: Path
    parity: float | None


def export_backbone(weights: str, output: str | Path, arch: str = "") -> Exported:
    """Write a torchvision/timm ResNet by Detectron2's names, and the config that goes with it beside it.

    ``weights`` is a backbone file, or somebody's plain ResNet weights, then with the timm name ``arch``.  A network
    that computes other maps in Detectron2 is refused, and nothing is left behind.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output {output}: the file must end in {' or '.join(SUFFIXES)}")
    state_dict, arch, arch_kwargs, pixels, origin = _read(weights, arch)
    shape = resnet_shape(state_dict)
    entries = resnet_to_detectron2(state_dict, batch_norm_eps(arch, arch_kwargs))
    config = output.with_suffix(".yaml")
    text = config_text(shape, pixels, output.name, origin)
    with atomic_path(output) as temporary:
        _write(entries, temporary, output.suffix)
    write_text(config, text)
    try:
        parity = _measure(state_dict, arch, arch_kwargs, config, output)
    except UserError:
        output.unlink(missing_ok=True)
        config.unlink(missing_ok=True)
        raise
    return Exported(output, config, parity)


def _read(weights: str, arch: str) -> tuple[dict[str, Tensor], str, dict[str, Any], dict[str, Any], str]:
    if weights.startswith("backbone://") or weights.endswith(".safetensors"):
        if arch:
            raise UserError("--arch: a backbone file says its architecture itself; leave --arch out")
        state_dict, card = load_backbone(weights)
        return state_dict, card.arch, card.arch_kwargs, card.input, f"{weights}, method {card.method or 'unknown'}"
    if not arch:
        raise UserError(
            f"{weights}: plain weights don't say what network they are of; give --arch (for example resnet18)"
        )
    pixels = {"channel_order": "RGB", "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return load_plain(weights), arch, {}, pixels, weights


def _write(entries: Mapping[str, Tensor], path: Path, suffix: str) -> None:
    # with matching by the ends of names the same file fits a ResNet alone and under an FPN
    content: dict[str, Any] = {"model": dict(entries), "__author__": "nst_det", "matching_heuristics": True}
    if suffix == ".pth":
        torch.save(content, path)
        return
    content["model"] = {name: value.cpu().numpy() for name, value in entries.items()}
    with open(path, "wb") as file:
        pickle.dump(content, file)


def config_text(shape: ResNetShape, pixels: Mapping[str, Any], weights: str, origin: str) -> str:
    """Return the YAML for a plain Detectron2: a Faster R-CNN with FPN on these weights, without data and schedule."""
    mean, std = (_numbers(255 * value for value in pixels[name]) for name in ("mean", "std"))
    return f"""\
# Written by nst-det export from {origin}.
# For a plain Detectron2: add DATASETS, SOLVER and MODEL.ROI_HEADS.NUM_CLASSES. What these weights depend on:
# - INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD are the pixels that the network was trained on (Detectron2's defaults
#   are other ones: BGR, std 1)
# - STRIDE_IN_1X1 False: torchvision and timm put a bottleneck's stride into its 3 x 3 convolution
# - batch normalization: Detectron2 computes with epsilon {DETECTRON2_EPS:g}; running variances are written so that
#   this epsilon gives the values of the original
INPUT:
  FORMAT: "{pixels["channel_order"]}"
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  WEIGHTS: "{weights}"
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  BACKBONE:
    NAME: "build_resnet_fpn_backbone"
  RESNETS:
    DEPTH: {shape.depth}
    NUM_GROUPS: {shape.groups}
    WIDTH_PER_GROUP: {shape.width_per_group}
    STEM_OUT_CHANNELS: {shape.stem_channels}
    RES2_OUT_CHANNELS: {shape.res2_channels}
    STRIDE_IN_1X1: False
    NORM: "FrozenBN"
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  FPN:
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
  ANCHOR_GENERATOR:
    SIZES: [[32], [64], [128], [256], [512]]
    ASPECT_RATIOS: [[0.5, 1.0, 2.0]]
  RPN:
    IN_FEATURES: ["p2", "p3", "p4", "p5", "p6"]
    PRE_NMS_TOPK_TRAIN: 2000
    PRE_NMS_TOPK_TEST: 1000
    POST_NMS_TOPK_TRAIN: 1000
    POST_NMS_TOPK_TEST: 1000
  ROI_HEADS:
    NAME: "StandardROIHeads"
    IN_FEATURES: ["p2", "p3", "p4", "p5"]
  ROI_BOX_HEAD:
    NAME: "FastRCNNConvFCHead"
    NUM_FC: 2
    POOLER_RESOLUTION: 7
VERSION: 2
"""


def _numbers(values: Any) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"


def _measure(
    state_dict: Mapping[str, Tensor], arch: str, arch_kwargs: Mapping[str, Any], config: Path, weights: Path
) -> float | None:
    from nst_det import detectron2 as engine

    if not engine.is_available():
        return None
    engine.require()
    # the classifier's width is of no account for the maps
    classes = next((value.shape[0] for name, value in state_dict.items() if name == "fc.weight"), 1000)
    try:
        bottomup = Bottomup(arch, arch_kwargs=arch_kwargs, state_dict=state_dict, num_classes=classes).eval()
    except ValueError as error:
        raise UserError(str(error)) from error
    from nst_det.detectron2.parity import plain_maps

    images = torch.randn(2, 3, 160, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = bottomup(images)
    got = plain_maps(config, weights, images)
    parity = max(float((wanted[name] - got[name]).abs().max()) for name in wanted)
    if not parity <= PARITY_LIMIT:
        raise UserError(
            f"{weights}: Detectron2's network gives maps that differ by {parity:.3g} (limit {PARITY_LIMIT:g}), so "
            "nothing was exported"
        )
    return parity
