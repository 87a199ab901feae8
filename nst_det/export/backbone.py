"""A backbone file for timm or torchvision: their names, their files, and the proof that they compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from timm.models import save_for_hf
from torch import Tensor, nn

from nst_det.engine.io import atomic_folder, atomic_path, write_text
from nst_det.errors import UserError
from nst_det.export.modelcard import OWN_ARCH_USE, TIMM_USE, TORCHVISION_USE, backbone_card
from nst_det.models import Card, create_model, load_backbone, load_strict

LIMIT = 1e-4
# timm's names for what torchvision builds from the same layers under the same names
TORCHVISION_ARCHS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)


@dataclass(frozen=True)
class ExportedBackbone:
    """What was written, and the largest difference of a logit between the original and what was read back."""

    weights: Path
    card: Path
    parity: float


def export_timm(weights: str, output: str | Path) -> ExportedBackbone:
    """Write a folder that timm reads: ``model.safetensors``, ``config.json`` and a model card ``README.md``.

    Args:
        weights: ``backbone://NAME`` or a backbone file.
        output: the folder to make.

    Raises:
        UserError: the folder is there, the backbone can't be read, takes BGR images, or computes other logits when
            timm reads it back (nothing is left behind then).
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"--output {output}: is there already; name a folder to make")
    state_dict, card = load_backbone(weights)
    if card.input["channel_order"] != "RGB":
        raise UserError(f"{weights}: it takes BGR images, timm's loaders give RGB; export it for another framework")
    model = _classifier(state_dict, card, weights)
    # timm knows where the weights of its own architectures are looked for; those of this package are read by path
    own = type(model).__module__.startswith("nst_det.")
    with atomic_folder(output, "name another folder") as made:
        size = int(card.input.get("size") or 224)
        pixels = {"input_size": (3, size, size), "mean": card.input["mean"], "std": card.input["std"]}
        model_config = {
            "pretrained_cfg": {"architecture": card.arch.split(".")[0], **pixels},
            **({"label_names": list(card.classes)} if card.classes else {}),
        }
        save_for_hf(model, str(made), model_config, model_args=dict(card.arch_kwargs), safe_serialization=True)
        if own:
            kwargs = {**card.arch_kwargs, "checkpoint_path": str(made / "model.safetensors")}
            again = timm.create_model(card.arch, num_classes=card.num_classes, **kwargs)
        else:
            again = timm.create_model(f"local-dir:{made}", pretrained=True)
        parity = _check(model, again, size, str(output))
        use = (OWN_ARCH_USE if own else TIMM_USE).format(name=output.name, arch=card.arch, num_classes=card.num_classes)
        write_text(made / "README.md", backbone_card(card, output.name, "timm", _agreement(parity), use))
    return ExportedBackbone(output / "model.safetensors", output / "README.md", parity)


def export_torchvision(weights: str, output: str | Path) -> ExportedBackbone:
    """Write a state dict for one of torchvision's ResNets, classifier included, and a model card beside it.

    Args:
        weights: ``backbone://NAME`` or a backbone file.
        output: ends in ``.pth``; the card goes beside it, with ``.md``.

    Raises:
        UserError: torchvision has no such network, the backbone can't be read, or torchvision's network computes other
            logits (nothing is left behind then).
    """
    output = Path(output)
    if output.suffix != ".pth":
        raise UserError(f"--output {output}: the file must end in .pth")
    state_dict, card = load_backbone(weights)
    arch = card.arch.split(".")[0]
    if arch not in TORCHVISION_ARCHS or card.arch_kwargs:
        raise UserError(
            f"{weights}: {card.arch} is not a network of torchvision's ({', '.join(TORCHVISION_ARCHS)}); "
            "export it by --format timm"
        )
    model = _classifier(state_dict, card, weights)
    with atomic_path(output) as temporary:
        torch.save(state_dict, temporary)
        again = torchvision.models.get_model(arch, weights=None, num_classes=card.num_classes)
        again.load_state_dict(torch.load(temporary, weights_only=True))
        parity = _check(model, again, int(card.input.get("size") or 224), str(output))
    beside = output.with_suffix(".md")
    use = TORCHVISION_USE.format(arch=arch, name=output.name, num_classes=card.num_classes)
    write_text(beside, backbone_card(card, output.stem, "torchvision", _agreement(parity), use))
    return ExportedBackbone(output, beside, parity)


def _classifier(state_dict: Mapping[str, Tensor], card: Card, weights: str) -> nn.Module:
    try:
        model = create_model(card.arch, card.num_classes, **card.arch_kwargs)
        load_strict(model, state_dict, weights)
    except ValueError as error:
        raise UserError(f"{weights}: {error}") from error
    return model


def _check(model: nn.Module, again: nn.Module, size: int, name: str) -> float:
    """The largest difference of a logit on images of seeded noise; refused above :data:`LIMIT`."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parity = float((model.eval()(images) - again.eval()(images)).abs().max())
    if not parity <= LIMIT:
        raise UserError(f"{name}: its logits differ by {parity:.3g} (limit {LIMIT:g}), so nothing was exported")
    return parity


def _agreement(parity: float) -> str:
    return f"logits within {parity:.2g} on noise (limit {LIMIT:g})"
