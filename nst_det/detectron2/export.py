"""A distilled ResNet for a plain Detectron2 that knows nothing of nst_det."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor, nn

from nst_det.engine.io import atomic_path, write_text
from nst_det.errors import UserError
from nst_det.models import Bottomup, load_backbone, load_plain
from nst_det.models.caffe import is_caffe
from nst_det.models.convert import batch_norm_eps, resnet_keys, resnet_to_detectron2

PARITY_LIMIT = 1e-4
IMAGENET = {"channel_order": "RGB", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class Exported:
    """The file for ``MODEL.WEIGHTS``, and the YAML with all keys that these weights need."""

    weights: Path
    config: Path
    # largest difference of res2 .. res5 from Detectron2's network; None where Detectron2 is not installed
    parity: float | None


def export_backbone(weights: str, output: str | Path, arch: str = "") -> Exported:
    """Write a torchvision/timm ResNet by Detectron2's names, and its config; nothing where Detectron2's maps differ.

    ``weights`` is a backbone file, or somebody's plain ResNet weights, then with the timm name ``arch``.
    """
    output = Path(output)
    if output.suffix not in (".pkl", ".pth"):
        raise UserError(f"--output {output}: the file must end in .pkl or .pth")
    if weights.startswith("backbone://") or weights.endswith(".safetensors"):
        if arch:
            raise UserError("--arch: a backbone file has its architecture in it; leave --arch out")
        state_dict, card = load_backbone(weights)
        arch, arch_kwargs, pixels = card.arch, card.arch_kwargs, card.input
        origin = f"{weights}, method {card.method or 'unknown'}"
    elif arch:
        state_dict, arch_kwargs, pixels, origin = load_plain(weights), {}, IMAGENET, weights
    else:
        raise UserError(f"{weights}: plain weights have no architecture in them; give --arch (for example resnet18)")
    resnet = resnet_keys(state_dict)
    entries = resnet_to_detectron2(state_dict, batch_norm_eps(arch, arch_kwargs))
    environment = Environment(
        loader=PackageLoader("nst_det.detectron2"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    mean, std = ([float(f"{255 * value:.6g}") for value in pixels[name]] for name in ("mean", "std"))
    text = environment.get_template("resnet_fpn.yaml").render(
        resnet=resnet,
        caffe=is_caffe(arch),
        channel_order=pixels["channel_order"],
        mean=mean,
        std=std,
        weights=output.name,
        origin=origin,
    )
    config = output.with_suffix(".yaml")
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


def _write(entries: Mapping[str, Tensor], path: Path, suffix: str) -> None:
    # with matching by the ends of names the same file fits a ResNet alone and under an FPN
    content: dict[str, Any] = {"model": dict(entries), "__author__": "nst_det", "matching_heuristics": True}
    if suffix == ".pth":
        torch.save(content, path)
        return
    content["model"] = {name: value.cpu().numpy() for name, value in entries.items()}
    with open(path, "wb") as file:
        pickle.dump(content, file)


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
    images = torch.randn(2, 3, 160, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = bottomup(images), _detectron2s_resnet(config, weights)(images)
    parity = max(float((wanted[name] - got[name]).abs().max()) for name in wanted)
    if not parity <= PARITY_LIMIT:
        raise UserError(
            f"{weights}: Detectron2's network gives maps that differ by {parity:.3g} (limit {PARITY_LIMIT:g}), so "
            "nothing was exported"
        )
    return parity


def _detectron2s_resnet(config: Path, weights: Path) -> Any:
    """Return Detectron2's own ResNet, built and filled by Detectron2's own means."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.MODEL.DEVICE = "cpu"
    detector = nn.ModuleDict({"backbone": build_backbone(cfg)}).eval()
    checkpointer = DetectionCheckpointer(detector)
    missing: list[str] = []
    checkpointer._log_incompatible_keys = lambda incompatible: missing.extend(incompatible.missing_keys)
    checkpointer.load(str(weights))
    absent = [name for name in missing if name.startswith("backbone.bottom_up.")]
    if absent:
        raise UserError(f"{weights}: {len(absent)} entries of the bottom-up are missing ({', '.join(absent[:3])})")
    backbone: Any = detector["backbone"]
    return backbone.bottom_up
