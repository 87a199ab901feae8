"""Teacher and students as the config names them, before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.distillation.config import transfer_of
from nst_det.engine.config import expand_path, plain
from nst_det.engine.device import autocast, cast_frozen
from nst_det.engine.io import sha256_of_file
from nst_det.engine.seeds import seeded
from nst_det.errors import UserError
from nst_det.losses import Method, ModelOutputs, TransferLoss, build_transfer
from nst_det.models import (
    Card,
    LevelInfo,
    check_input_contract,
    create_model,
    feature_levels,
    forward_outputs,
    load_backbone,
    load_plain,
    load_strict,
    resolve,
)
from nst_det.models.build import embedding_width
from nst_det.models.io import trusting_pickles


@dataclass
class Network:
    """A classifier and what is known of it.

    Attributes:
        model: on the CPU.
        arch: timm name.
        arch_kwargs: further arguments of the timm model.
        source: the backbone file or weights file it was read from; None if it wasn't.
        card: of that backbone file; None for plain weights.
        sha256: of that file.
    """

    model: nn.Module
    arch: str
    arch_kwargs: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None
    card: Card | None = None
    sha256: str = ""

    @property
    def num_classes(self) -> int:
        """Number of its logits."""
        return int(self.model.num_classes)  # type: ignore[arg-type]

    @property
    def levels(self) -> dict[str, LevelInfo]:
        """Its feature levels."""
        return feature_levels(self.model)


def initial_student(config: CfgNode, num_classes: int) -> Network:
    """The network that every student starts from; the same for one SEED.

    Raises:
        UserError: an architecture that can't be built, or pretrained weights that can't be had.
    """
    return _new_network(config.STUDENT, "STUDENT", num_classes, config.SEED, "student")


def initial_teacher(config: CfgNode, classes: list[str]) -> Network:
    """The teacher as TEACHER.WEIGHTS gives it, or as its training starts.

    Raises:
        UserError: weights that can't be read or don't fit, another input contract, or an architecture that can't
            be built.
    """
    if not config.TEACHER.WEIGHTS:
        network = _new_network(config.TEACHER, "TEACHER", len(classes), config.SEED, "teacher")
        if not config.TEACHER.TRAIN:
            _check_untrained(network, config, len(classes))
        return network
    path = resolve(expand_path(config.TEACHER.WEIGHTS, "TEACHER.WEIGHTS"))
    beside = path.with_suffix(".json")
    if path.suffix != ".safetensors" or (path.exists() and not beside.exists()):
        network = _new_network(config.TEACHER, "TEACHER", len(classes), config.SEED, "teacher", pretrained=False)
        try:
            with trusting_pickles(config.TRUST_PICKLE):
                load_strict(network.model, load_plain(path), str(path))
        except ValueError as error:
            raise UserError(f"TEACHER.WEIGHTS: {error}; check TEACHER.ARCH") from error
        network.source, network.sha256 = path, sha256_of_file(path)
        return network
    state_dict, card = load_backbone(path)
    try:
        check_input_contract(card, config.DATA.MEAN, config.DATA.STD, "RGB")
    except UserError as error:
        raise UserError(f"TEACHER.WEIGHTS: {error} (DATA.MEAN, DATA.STD)") from error
    model = create_model(card.arch, card.num_classes, **card.arch_kwargs)
    load_strict(model, state_dict, str(path))
    return Network(model, card.arch, card.arch_kwargs, path, card, card.sha256)


def _check_untrained(network: Network, config: CfgNode, num_classes: int) -> None:
    """A teacher that is taken as it is must have learned these classes."""
    if not config.TEACHER.PRETRAINED:
        raise UserError("config: TEACHER.TRAIN is False, but there are no weights; set TEACHER.WEIGHTS or PRETRAINED")
    known = getattr(network.model, "pretrained_cfg", {}).get("num_classes")
    if known != num_classes:
        raise UserError(
            f"config: TEACHER.TRAIN is False, but {network.arch} was pretrained on {known} classes and the data has "
            f"{num_classes}; set TEACHER.TRAIN to True to fine-tune it first"
        )


def _new_network(
    node: CfgNode, key: str, num_classes: int, seed: int, purpose: str, pretrained: bool | None = None
) -> Network:
    kwargs = plain(node.ARCH_KWARGS)
    wanted = node.PRETRAINED if pretrained is None else pretrained
    try:
        with seeded(seed, purpose):
            model = create_model(node.ARCH, num_classes, wanted, **kwargs)
        feature_levels(model)
    except ValueError as error:
        raise UserError(f"{key}.ARCH: {error}") from error
    return Network(model, node.ARCH, kwargs)


def same_labels(network: Network, classes: list[str]) -> bool:
    """Whether the network's logits are about these classes."""
    if network.card is not None and network.card.classes:
        return network.card.classes == classes
    return network.num_classes == len(classes)


def build_losses(
    config: CfgNode, methods: Mapping[str, Method], student: Network, teacher: Network | None, labels_shared: bool
) -> dict[str, TransferLoss]:
    """The transfer loss of every method; adapters start the same for one SEED.

    Args:
        config: the whole config.
        methods: by word.
        student: as all students start.
        teacher: None if no method needs one.
        labels_shared: whether teacher and data have the same classes.

    Raises:
        UserError: TRANSFER names levels, terms or options that there are not, or a method compares logits of
            different classes.
    """
    sizes: dict[str, Any] = {}
    if teacher is not None:
        sizes = {
            "student_channels": {name: info.channels for name, info in student.levels.items()},
            # a vector of the teacher is no map to learn
            "teacher_channels": {name: info.channels for name, info in teacher.levels.items() if info.stride},
            "student_vectors": [name for name, info in student.levels.items() if not info.stride],
            "num_classes": student.num_classes,
            "student_embedding": embedding_width(student.model),
            "teacher_embedding": embedding_width(teacher.model),
        }
    losses = {}
    for word, method in methods.items():
        node = transfer_of(config, word)
        try:
            with seeded(config.SEED, "adapters"):
                losses[word] = build_transfer(
                    method,
                    levels=list(node.LEVELS),
                    weights=plain(node.WEIGHTS),
                    term_levels=plain(node.TERM_LEVELS),
                    options=plain(node.OPTIONS),
                    auto_weight=plain(node.AUTO_WEIGHT),
                    **sizes,
                )
        except (ValueError, TypeError) as error:
            raise UserError(f"config: TRANSFER: {error}") from error
        if "logits" in losses[word].reads("teacher") and not labels_shared:
            raise UserError(f"METHODS: {word} compares logits, but the teacher's classes are not those of the data")
    return losses


def copy_of(network: Network, device: torch.device) -> nn.Module:
    """A model of its own with the same weights, on ``device``, channels last (twice as fast for convolutions)."""
    model = copy.deepcopy(network.model).to(device)
    return model.to(memory_format=torch.channels_last)


def by_positions(maps: Tensor) -> Tensor:
    """Maps (B, C, H, W) as losses read them fastest: on the CPU one channel after the other, in float32.

    Networks run channels last and in bf16; one copy here costs less than the strided reads of the losses.  On a
    GPU the maps stay as they are: there the copy is what would cost.
    """
    if maps.device.type != "cpu":
        return maps
    if maps.requires_grad or maps.is_contiguous():
        return maps.to(torch.float32, memory_format=torch.contiguous_format)
    # a teacher's many channels: image by image what is transposed stays in the processor's cache
    return torch.stack([image.contiguous() for image in maps]).float()


class Teacher:
    """A frozen classifier in evaluation mode.

    Args:
        model: the timm classifier, on its device.
        reads: levels whose maps the students' losses read.
        precision: of the forward pass; None is float32.
    """

    def __init__(self, model: nn.Module, reads: Iterable[str], precision: torch.dtype | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.precision = precision
        cast_frozen(self.model, precision)
        self.device = next(model.parameters()).device
        names = set(reads)
        self.levels: dict[str, LevelInfo] = {
            name: info for name, info in feature_levels(model).items() if name in names
        }

    def raw(self, images: Tensor) -> ModelOutputs:
        """What the teacher says about normalized images (B, 3, H, W), as it computes it, without gradient."""
        with torch.no_grad(), autocast(self.device, self.precision):
            return forward_outputs(self.model, images, self.levels)

    def __call__(self, images: Tensor, rows: Tensor | None = None) -> ModelOutputs:
        """What the teacher says about normalized images (B, 3, H, W), without gradient.

        ``rows`` (B,), the views that these are, is for a cache, which takes the teacher's place.
        """
        return for_losses(self.raw(images))


def for_losses(raw: ModelOutputs) -> ModelOutputs:
    """A teacher's outputs as the losses read them."""
    return ModelOutputs(
        None if raw.logits is None else raw.logits.float(),
        {name: by_positions(maps) for name, maps in raw.maps.items()},
        raw.embedding,
    )
