"""A backbone file for timm, torchvision or Detectron2, in their files, compared with what it was made of."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torchvision
from timm.models import save_for_hf
from torch import nn

from nst_det.engine.io import atomic_folder, atomic_path, write_text
from nst_det.errors import UserError
from nst_det.exporting import Exported
from nst_det.exporting.modelcard import backbone_card
from nst_det.models import Card, classifier_from_file, load_card

LIMIT = 1e-4
# timm's names for what torchvision builds from the same layers under the same names
TORCHVISION_ARCHS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)


def export_timm(weights: str, output: str | Path) -> Exported:
    """Write a folder that timm reads: ``model.safetensors``, ``config.json`` and a model card ``README.md``.

    A backbone that computes other logits when timm reads it back is refused, and nothing is left behind.
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"--output {output}: is there already; name a folder to make")
    model, card = classifier_from_file(weights)
    if card.input["channel_order"] != "RGB":
        raise UserError(f"{weights}: it takes BGR images, timm's loaders give RGB; export it for another framework")
    # timm knows where the weights of its own architectures are looked for; those of this package are read by path
    own_arch = type(model).__module__.startswith("nst_det.")
    with atomic_folder(output, "name another folder") as made:
        pixels = {"input_size": (3, _size(card), _size(card)), "mean": card.input["mean"], "std": card.input["std"]}
        config = {
            "pretrained_cfg": {"architecture": card.arch.split(".")[0], **pixels},
            **({"label_names": list(card.classes)} if card.classes else {}),
        }
        save_for_hf(model, str(made), config, model_args=dict(card.arch_kwargs), safe_serialization=True)
        if own_arch:
            kwargs = {**card.arch_kwargs, "checkpoint_path": str(made / "model.safetensors")}
            again = timm.create_model(card.arch, num_classes=card.num_classes, **kwargs)
        else:
            again = timm.create_model(f"local-dir:{made}", pretrained=True)
        agreement = _compare(model, again, card, output)
        text = backbone_card(card, output.name, "timm", f"{agreement} on noise", output.name, own_arch)
        write_text(made / "README.md", text)
    return Exported({"weights": output / "model.safetensors", "card": output / "README.md"}, agreement)


def export_torchvision(weights: str, output: str | Path) -> Exported:
    """Write a state dict for one of torchvision's ResNets, classifier included, and a model card ``.md`` next to it."""
    output = Path(output)
    if output.suffix != ".pth":
        raise UserError(f"--output {output}: the file must end in .pth")
    model, card = classifier_from_file(weights)
    arch = card.arch.split(".")[0]
    if arch not in TORCHVISION_ARCHS or card.arch_kwargs:
        raise UserError(
            f"{weights}: {card.arch} is not a network of torchvision's ({', '.join(TORCHVISION_ARCHS)}); "
            "export it by --format timm"
        )
    with atomic_path(output) as temporary:
        torch.save(model.state_dict(), temporary)
        again = torchvision.models.get_model(arch, weights=None, num_classes=card.num_classes)
        if not card.num_classes:
            again.fc = nn.Identity()
        again.load_state_dict(torch.load(temporary, weights_only=True))
        agreement = _compare(model, again, card, output)
    text = backbone_card(card, output.stem, "torchvision", f"{agreement} on noise", output.name)
    write_text(output.with_suffix(".md"), text)
    return Exported({"weights": output, "card": output.with_suffix(".md")}, agreement)


def export_detectron2(weights: str, output: str | Path, arch: str = "") -> Exported:
    """Write a ResNet's weights, config and, without ``arch``, model card for a plain Detectron2."""
    from nst_det.detectron2 import INSTALL_PAGE
    from nst_det.detectron2.export import PARITY_LIMIT, export_backbone

    exported = export_backbone(weights, output, arch)
    agreement = f"not checked: Detectron2 is not installed ({INSTALL_PAGE})"
    if exported.parity is not None:
        agreement = f"{exported.parity:.2g} largest difference of res2..res5 (limit {PARITY_LIMIT:g})"
    files = {"weights": exported.weights, "config": exported.config}
    if not arch:
        path = files["card"] = exported.weights.with_suffix(".md")
        write_text(path, backbone_card(load_card(weights), path.stem, "detectron2", agreement, exported.config.name))
    return Exported(files, agreement)


def _size(card: Card) -> int:
    return int(card.input.get("size") or 224)


def _compare(model: nn.Module, again: nn.Module, card: Card, output: Path) -> str:
    """Return how near the logits of two networks are on seeded noise; refuse more than :data:`LIMIT`."""
    images = torch.randn(2, 3, _size(card), _size(card), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((model.eval()(images) - again.eval()(images)).abs().max())
    if not difference <= LIMIT:
        raise UserError(f"{output}: its logits differ by {difference:.3g} (limit {LIMIT:g}), so nothing was exported")
    return f"logits within {difference:.2g} (limit {LIMIT:g})"
