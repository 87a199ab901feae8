"""Teacher and students as the config names them, before anything is trained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.distillation.config import transfer_of
from nst_det.engine.compilation import compiled
from nst_det.engine.config import expand_path, plain
from nst_det.engine.device import autocast, cast_frozen
from nst_det.engine.format import text_table
from nst_det.engine.io import sha256_of_file
from nst_det.engine.keys import OFF
from nst_det.engine.seeds import seeded
from nst_det.errors import UserError
from nst_det.losses import Method, ModelOutputs, TransferLoss, build_transfer, get_term, pair_shapes
from nst_det.losses.loss import HEADINGS
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
from nst_det.models.build import check_image_size, classifier_names, embedding_width, probe_outputs
from nst_det.models.card import published_card
from nst_det.models.io import trusting_pickles

log = logging.getLogger(__name__)
# classes of a teacher's head where the data aren't there yet
UNKNOWN = ("0", "1")


@dataclass
class Network:
    """A classifier on the CPU, and what is known of it."""

    model: nn.Module
    arch: str
    arch_kwargs: dict[str, Any] = field(default_factory=dict)
    # the backbone file or weights file that it was read from, and its SHA-256
    source: Path | None = None
    # of that backbone file; None for plain weights
    card: Card | None = None
    sha256: str = ""
    # it learns the data's classes before it teaches
    to_train: bool = False
    # whether the weights came without a classifier for the data's classes, so that this one has random weights
    headless: bool = False

    @property
    def num_classes(self) -> int:
        """Return K of its logits."""
        return int(self.model.num_classes)  # type: ignore[arg-type]

    @property
    def levels(self) -> dict[str, LevelInfo]:
        """Return its feature levels."""
        return feature_levels(self.model)

    def has_labels(self, classes: list[str]) -> bool:
        """Return whether its logits are about these classes, at the latest when it teaches."""
        if self.headless and not self.to_train:
            return False
        if self.card is not None and self.card.classes:
            return self.card.classes == classes
        return self.num_classes == len(classes)


def initial_student(config: CfgNode, num_classes: int) -> Network:
    """Return the network that every student starts from; the same for one SEED."""
    return _new_network(config, "STUDENT", num_classes, config.STUDENT.PRETRAINED)


def initial_teacher(config: CfgNode, classes: list[str] | None) -> Network:
    """Return the teacher as TEACHER.WEIGHTS gives it, or as its training starts; ``classes`` None aren't known yet."""
    node = config.TEACHER
    if node.WEIGHTS:
        path = resolve(expand_path(node.WEIGHTS, "TEACHER.WEIGHTS"))
        if path.suffix == ".safetensors" and (path.with_suffix(".json").exists() or not path.exists()):
            return _from_backbone_file(config, path)
        return _from_plain_weights(config, path, classes)
    network = _new_network(config, "TEACHER", len(classes or UNKNOWN), node.PRETRAINED)
    network.to_train = node.TRAIN
    if not node.TRAIN and not node.PRETRAINED:
        raise UserError("config: TEACHER.TRAIN is False, but there are no weights; set TEACHER.WEIGHTS or PRETRAINED")
    known = getattr(network.model, "pretrained_cfg", {}).get("num_classes")
    if not node.TRAIN and classes is not None and known != len(classes):
        raise UserError(
            f"config: TEACHER.TRAIN is False, but {network.arch} was pretrained on {known} classes and the data has "
            f"{len(classes)}; set TEACHER.TRAIN to True to fine-tune it first"
        )
    return network


def _new_network(config: CfgNode, key: str, num_classes: int, pretrained: bool) -> Network:
    node = config[key]
    kwargs = plain(node.ARCH_KWARGS)
    try:
        with seeded(config.SEED, key.lower()):
            model = create_model(node.ARCH, num_classes, pretrained, **kwargs)
        feature_levels(model)
        check_image_size(model, node.ARCH, config.DATA.IMAGE_SIZE, key)
    except ValueError as error:
        raise UserError(f"{key}.ARCH: {error}") from error
    if pretrained or node.get("WEIGHTS"):
        try:
            _check_pixels(
                config, published_card(model, node.ARCH), f"{key}.{'PRETRAINED' if pretrained else 'WEIGHTS'}"
            )
        except UserError as error:
            if pretrained and key == "TEACHER" and not node.TRAIN:
                raise
            log.warning("%s%s", error, "" if pretrained else ", if these are timm's published weights")
    return Network(model, node.ARCH, kwargs)


def _check_pixels(config: CfgNode, card: Card, source: str) -> None:
    try:
        check_input_contract(card, config.DATA.MEAN, config.DATA.STD, "RGB")
    except UserError as error:
        wanted = ", ".join(f"DATA.{name.upper()} {list(card.input[name])}" for name in ("mean", "std"))
        raise UserError(f"{source}: {error} ({wanted})") from error


def _from_backbone_file(config: CfgNode, path: Path) -> Network:
    state_dict, card = load_backbone(path)
    _check_pixels(config, card, "TEACHER.WEIGHTS")
    model = create_model(card.arch, card.num_classes, **card.arch_kwargs)
    load_strict(model, state_dict, str(path))
    try:
        check_image_size(model, card.arch, config.DATA.IMAGE_SIZE, "TEACHER")
    except ValueError as error:
        raise UserError(f"TEACHER.WEIGHTS: {error}") from error
    return Network(model, card.arch, card.arch_kwargs, path, card, card.sha256)


def _from_plain_weights(config: CfgNode, path: Path, classes: list[str] | None) -> Network:
    network = _new_network(config, "TEACHER", len(classes or UNKNOWN), pretrained=False)
    own = network.model.state_dict()
    head = {name: own[name] for name in sorted(classifier_names(network.model))}
    with trusting_pickles(config.TRUST_PICKLE):
        given = load_plain(path, own)
    theirs = [given[name].shape[:1] for name in head if name in given]
    network.headless = any(name not in given or given[name].shape != value.shape for name, value in head.items())
    try:
        load_strict(network.model, given | head if network.headless else given, str(path))
    except ValueError as error:
        raise UserError(f"TEACHER.WEIGHTS: {error}; check TEACHER.ARCH") from error
    network.source, network.sha256 = path, sha256_of_file(path)
    network.to_train = network.headless and config.TEACHER.TRAIN
    if network.headless and classes is not None:
        log.info(
            "TEACHER.WEIGHTS %s: %s and the data have %d: loaded without its head; %s",
            path,
            f"its head has {theirs[0][0]} classes" if theirs and theirs[0] else "it has no head",
            len(classes),
            "a new one is trained with the rest before it teaches (TEACHER.TRAIN False takes its maps as they are)"
            if network.to_train
            else "it teaches maps and no logits (TEACHER.TRAIN True fine-tunes it first)",
        )
    return network


def build_losses(
    config: CfgNode, methods: Mapping[str, Method], student: Network, teacher: Network | None, labels_shared: bool
) -> dict[str, TransferLoss]:
    """Return the transfer loss of every method; adapters start the same for one SEED."""
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
    for name, method in methods.items():
        node = plain(transfer_of(config, name))
        keys = {key.lower(): node[key] for key in ("LEVELS", "WEIGHTS", "TERM_LEVELS", "OPTIONS", "AUTO_WEIGHT")}
        try:
            with seeded(config.SEED, "adapters"):
                losses[name] = build_transfer(method, **keys, **sizes)
        except (ValueError, TypeError) as error:
            raise UserError(f"config: TRANSFER: {error}") from error
        if config.DATA.REST == "unlabelled" and any(get_term(term).truth for term in method.names):
            raise UserError(f"DATA.REST: {name} reads the label of every image; take drop, or leave this method out")
        if "logits" in losses[name].reads("teacher") and not labels_shared:
            remedy = (
                "set TEACHER.TRAIN True to fine-tune it first" if teacher and teacher.headless else "name another one"
            )
            raise UserError(
                f"METHODS: {name} compares logits, but the teacher's classes are not those of the data; {remedy}, or "
                "leave this method out"
            )
    return losses


def log_shapes(losses: Mapping[str, TransferLoss], student: Network, teacher: Network, size: int) -> None:
    """Log a table of all pairs that the methods compare, for an image of ``size`` pixels."""
    mine, my_strides = _probe(student, {name for loss in losses.values() for name in loss.student_levels}, size)
    theirs, their_strides = _probe(teacher, {name for loss in losses.values() for name in loss.teacher_levels}, size)
    pairs = [pair_shapes(loss, mine, theirs, my_strides, their_strides) for loss in losses.values()]
    # one line for each kind of pair
    lines = dict.fromkeys(line for lines in pairs for line in lines)
    if lines:
        log.info("compared at %d x %d pixels:\n%s", size, size, text_table(HEADINGS, lines))


def _probe(network: Network, names: set[str], size: int) -> tuple[ModelOutputs, dict[str, int]]:
    levels = {name: info for name, info in network.levels.items() if name in names}
    return probe_outputs(network.model, levels, size), {name: info.stride for name, info in levels.items()}


def copy_of(network: Network, device: torch.device) -> nn.Module:
    """Return a model with the same weights on ``device``, channels last (twice as fast for convolutions)."""
    model = copy.deepcopy(network.model).to(device)
    return model.to(memory_format=torch.channels_last)


def by_positions(maps: Tensor) -> Tensor:
    """Return maps (B, C, H, W) as losses read them fastest: on the CPU one channel after the other, in float32.

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
    """A frozen classifier in evaluation mode that gives logits, embedding and the maps of the levels in ``reads``."""

    def __init__(
        self, model: nn.Module, reads: Iterable[str], precision: torch.dtype | None, compile_mode: str = OFF
    ) -> None:
        self.model, self.precision = model.eval().requires_grad_(False), precision
        cast_frozen(self.model, precision)
        self.device = next(model.parameters()).device
        names = set(reads)
        self.levels = {name: info for name, info in feature_levels(model).items() if name in names}
        self._outputs = compiled(forward_outputs, compile_mode, self.device, "the teacher's network")

    def raw(self, images: Tensor) -> ModelOutputs:
        """Return the outputs for normalized images (B, 3, H, W) as they are computed, without gradient."""
        with torch.no_grad(), autocast(self.device, self.precision):
            outputs: ModelOutputs = self._outputs(self.model, images, self.levels)
        return outputs

    def __call__(self, images: Tensor, rows: Tensor | None = None) -> ModelOutputs:
        """Return the outputs for normalized images (B, 3, H, W); ``rows`` are for a cache in the teacher's place."""
        return for_losses(self.raw(images))


def for_losses(raw: ModelOutputs) -> ModelOutputs:
    """Return a teacher's outputs as the losses read them."""
    logits = None if raw.logits is None else raw.logits.float()
    return ModelOutputs(logits, {name: by_positions(maps) for name, maps in raw.maps.items()}, raw.embedding)
