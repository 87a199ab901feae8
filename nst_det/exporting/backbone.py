"""A backbone file for timm, torchvision or Detectron2, in their files, compared with what it was made of."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import save_for_hf
from torch import Tensor, nn

from nst_det import detectron2
from nst_det.engine.io import atomic_files, atomic_folder, atomic_path, write_text
from nst_det.errors import UserError
from nst_det.exporting import Exported
from nst_det.exporting.modelcard import backbone_card, detectron2_config
from nst_det.models import Bottomup, Card, classifier_from_file, load_backbone, load_plain
from nst_det.models.caffe import is_caffe
from nst_det.models.convert import batch_norm_eps, resnet_keys, resnet_to_detectron2
from nst_det.models.io import is_backbone_file

LIMIT = 1e-4
IMAGENET = {"channel_order": "RGB", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
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
    """Write a ResNet's weights by Detectron2's names, its config and, without ``arch``, a model card.

    ``weights`` is a backbone file, or somebody's plain ResNet weights, then with the timm name ``arch``.  A plain
    Detectron2 can read both; nothing is written where its maps differ.
    """
    output = Path(output)
    if output.suffix not in (".pkl", ".pth"):
        raise UserError(f"--output {output}: the file must end in .pkl or .pth")
    card = None
    if weights.startswith("backbone://") or is_backbone_file(Path(weights)):
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
    mean, std = ([float(f"{255 * value:.6g}") for value in pixels[name]] for name in ("mean", "std"))
    given = {"channel_order": pixels["channel_order"], "mean": mean, "std": std, "origin": origin}
    text = detectron2_config(resnet=resnet, caffe=is_caffe(arch), weights=output.name, **given)
    files = {"weights": output, "config": output.with_suffix(".yaml")}
    with atomic_files(output, "name another --output") as folder:
        written, config = folder / output.name, folder / files["config"].name
        _write(entries, written, output.suffix)
        write_text(config, text)
        try:
            agreement = _compare_with_detectron2(state_dict, arch, arch_kwargs, config, written)
        except UserError as error:
            # it is there for now alone
            raise UserError(str(error).replace(str(written), str(output))) from error
        if card is not None:
            files["card"] = output.with_suffix(".md")
            about = backbone_card(card, output.stem, "detectron2", agreement, config.name)
            write_text(folder / files["card"].name, about)
    return Exported(files, agreement)


def _write(entries: Mapping[str, Tensor], path: Path, suffix: str) -> None:
    # with matching by the ends of names the same file fits a ResNet alone and under an FPN
    content: dict[str, Any] = {"model": dict(entries), "__author__": "nst_det", "matching_heuristics": True}
    if suffix == ".pth":
        torch.save(content, path)
        return
    content["model"] = {name: value.cpu().numpy() for name, value in entries.items()}
    with open(path, "wb") as file:
        pickle.dump(content, file)


def _compare_with_detectron2(
    state_dict: Mapping[str, Tensor], arch: str, arch_kwargs: Mapping[str, Any], config: Path, weights: Path
) -> str:
    """Return how near the maps of Detectron2's own network are, which is built and filled by its own means."""
    if not detectron2.is_available():
        return f"not checked: Detectron2 is not installed ({detectron2.INSTALL_PAGE})"
    detectron2.require()
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    # the classifier's width is of no account for the maps
    classes = next((value.shape[0] for name, value in state_dict.items() if name == "fc.weight"), 0)
    try:
        bottomup = Bottomup(arch, arch_kwargs=arch_kwargs, state_dict=state_dict, num_classes=classes).eval()
    except ValueError as error:
        raise UserError(str(error)) from error
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.MODEL.DEVICE = "cpu"
    detector: Any = nn.ModuleDict({"backbone": build_backbone(cfg)}).eval()
    checkpointer = DetectionCheckpointer(detector)
    missing: list[str] = []
    checkpointer._log_incompatible_keys = lambda incompatible: missing.extend(incompatible.missing_keys)
    checkpointer.load(str(weights))
    absent = [name for name in missing if name.startswith("backbone.bottom_up.")]
    if absent:
        raise UserError(f"{weights}: {len(absent)} entries of the bottom-up are missing ({', '.join(absent[:3])})")
    images = torch.randn(2, 3, 160, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = bottomup(images), detector["backbone"].bottom_up(images)
    difference = max(float((wanted[name] - got[name]).abs().max()) for name in wanted)
    if not difference <= LIMIT:
        raise UserError(
            f"{weights}: Detectron2's network gives maps that differ by {difference:.3g} (limit {LIMIT:g}), so "
            "nothing was exported"
        )
    return f"{difference:.2g} largest difference of res2..res5 (limit {LIMIT:g})"


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
