"""Teacher and students as the config names them, before anything is trained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.data.folders import ImageFolder
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
    load_strict,
    recognize,
    resolve,
)
from nst_det.models.build import check_image_size, classifier_names, embedding_width, probe_outputs
from nst_det.models.card import published_card
from nst_det.models.io import is_backbone_file, read_any, trusting_pickles

log = logging.getLogger(__name__)
# images without labels that are held out, below which what is measured on them is chance
FEW_HELD = 10
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
    # what these weights are, for the card; empty for random ones
    start: str = ""
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
        """Return whether its logits will be about these classes by the time it teaches."""
        if self.headless and not self.to_train:
            return False
        if self.card is not None and self.card.classes:
            return self.card.classes == classes
        return self.num_classes == len(classes)

    def shares_labels(self, classes: list[str], labelled: bool) -> bool:
        """Return whether the student's logits and this teacher's are about the same classes.

        Without labels the student gets the teacher's head.
        """
        return self.has_labels(classes) if labelled else self.num_classes > 0


def initial_student(config: CfgNode, num_classes: int, classes: Sequence[str] = ()) -> Network:
    """Return the network that every student starts from, random, or as STUDENT.WEIGHTS gives it.

    ``classes`` are the names of the ``num_classes``, where they are known.
    """
    node = config.STUDENT
    if not node.WEIGHTS:
        return _new_network(config, "STUDENT", num_classes, node.PRETRAINED)
    path = resolve(expand_path(node.WEIGHTS, "STUDENT.WEIGHTS"))
    if is_backbone_file(path):
        return _student_from_backbone_file(config, path, num_classes, classes)
    network = _from_plain_weights(config, "STUDENT", path, num_classes)
    # it learns the labels from its first step on
    network.headless = False
    return network


def initial_teacher(config: CfgNode, classes: list[str] | None) -> Network:
    """Return the teacher as TEACHER.WEIGHTS gives it, or as its training starts; ``classes`` None aren't known yet."""
    network, node = _initial_teacher(config, classes), config.TEACHER
    if network.headless and not network.to_train:
        # random numbers would be written as its logits
        network = without_head(network)
    if network.to_train and classes is not None and (node.IMAGE_SIZE or node.MEAN or node.STD):
        raise UserError(
            "TEACHER.IMAGE_SIZE, MEAN and STD are for a teacher that is taken as it is, and this one is trained here; "
            "leave them out, or set TEACHER.TRAIN False"
        )
    return network


def student_classes(config: CfgNode, classes: list[str], teacher: Network | None) -> int:
    """Return the classes of a student's head: the data's, or without labels the teacher's (any, where it has none)."""
    if config.DATA.LABELS or teacher is None:
        return len(classes)
    return teacher.num_classes or len(UNKNOWN)


def without_head(network: Network) -> Network:
    """Return the network as it is for a method that reads no logits: without a classifier."""
    model = copy.deepcopy(network.model)
    model.reset_classifier(0)  # type: ignore[operator]
    return replace(network, model=model)


def _initial_teacher(config: CfgNode, classes: list[str] | None) -> Network:
    node = config.TEACHER
    if node.WEIGHTS:
        path = resolve(expand_path(node.WEIGHTS, "TEACHER.WEIGHTS"))
        if is_backbone_file(path):
            return _from_backbone_file(config, path)
        return _teacher_from_plain_weights(config, path, classes)
    if not config.DATA.LABELS:
        published = timm.get_pretrained_cfg(node.ARCH)
        return _new_network(config, "TEACHER", published.num_classes if published else 0, node.PRETRAINED)
    network = _new_network(config, "TEACHER", len(classes or UNKNOWN), node.PRETRAINED)
    network.to_train = node.TRAIN
    if not node.TRAIN and not node.PRETRAINED:
        raise UserError("config: TEACHER.TRAIN is False, but there are no weights; set TEACHER.WEIGHTS or PRETRAINED")
    known = getattr(network.model, "pretrained_cfg", {}).get("num_classes")
    # timm gives weights for another number of classes a random head
    network.headless = not node.TRAIN and known != len(classes or UNKNOWN)
    return network


def _new_network(config: CfgNode, key: str, num_classes: int, pretrained: bool = False) -> Network:
    node = config[key]
    kwargs = plain(node.ARCH_KWARGS)
    try:
        with seeded(config.SEED, key.lower()):
            model = create_model(node.ARCH, num_classes, pretrained, **kwargs)
        feature_levels(model)
        check_image_size(model, node.ARCH, image_size(config, key), key)
    except ValueError as error:
        raise UserError(f"{key}.ARCH: {error}") from error
    if pretrained:
        _check_pixels(
            config,
            published_card(model, ""),
            f"{key}.PRETRAINED",
            key == "TEACHER" and node.TRAIN and config.DATA.LABELS,
        )
    network = Network(model, node.ARCH, kwargs)
    if pretrained:
        published: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        known = published["num_classes"]
        left_out = "" if known == num_classes else f", head of {known} classes left out"
        network.start = f"timm's published {node.ARCH.split('.')[0]}.{published.get('tag')}{left_out}"
        log.info("%s.PRETRAINED: %s", key, network.start)
    return network


def _check_pixels(config: CfgNode, card: Card, source: str, learns: bool = False) -> None:
    """Refuse weights for other images; a teacher that ``learns`` from the students' before it teaches is warned of."""
    try:
        of_teacher = source.startswith("TEACHER")
        mean, std = teacher_pixels(config) if of_teacher else (config.DATA.MEAN, config.DATA.STD)
        check_input_contract(card, mean, std, "RGB")
    except UserError as error:
        wanted = ", ".join(f"DATA.{name.upper()} {list(card.input[name])}" for name in ("mean", "std"))
        alone = "; TEACHER.MEAN and STD for the teacher alone" if of_teacher else ""
        line = UserError(f"{source}: {error} ({wanted}{alone})")
        if not learns:
            raise line from error
        log.warning("%s", line)


def teacher_pixels(config: CfgNode) -> tuple[list[float], list[float]]:
    """Return mean and std of a teacher's images, RGB, 0..1."""
    return list(config.TEACHER.MEAN or config.DATA.MEAN), list(config.TEACHER.STD or config.DATA.STD)


def image_size(config: CfgNode, key: str) -> int:
    """Return the side of the images of the TEACHER or STUDENT, in pixels."""
    return int((key == "TEACHER" and config.TEACHER.IMAGE_SIZE) or config.DATA.IMAGE_SIZE)


def _from_backbone_file(config: CfgNode, path: Path) -> Network:
    state_dict, card = load_backbone(path)
    _check_pixels(config, card, "TEACHER.WEIGHTS")
    model = create_model(card.arch, card.num_classes, **card.arch_kwargs)
    load_strict(model, state_dict, str(path))
    try:
        check_image_size(model, card.arch, image_size(config, "TEACHER"), "TEACHER")
    except ValueError as error:
        raise UserError(f"TEACHER.WEIGHTS: {error}") from error
    return Network(model, card.arch, card.arch_kwargs, path, card, card.sha256)


def _student_from_backbone_file(config: CfgNode, path: Path, num_classes: int, classes: Sequence[str]) -> Network:
    network, (state_dict, card) = _new_network(config, "STUDENT", num_classes), load_backbone(path)
    _check_pixels(config, card, "STUDENT.WEIGHTS")
    own, as_many = network.model.state_dict(), card.num_classes == num_classes
    kept = as_many and (not card.classes or not classes or card.classes == list(classes))
    head = {} if kept else {name: own[name] for name in classifier_names(network.model)}
    try:
        load_strict(network.model, state_dict | head, str(path))
    except ValueError as error:
        raise UserError(f"STUDENT.WEIGHTS: {error}; it holds {card.arch}, set STUDENT.ARCH to that") from error
    others = f"{card.num_classes} classes{' of other names' if as_many else ''}"
    network.start = f"{path.name}{'' if kept else f', its head of {others} left out'}"
    log.info("STUDENT.WEIGHTS: %s", network.start)
    network.source, network.sha256 = path, card.sha256
    return network


def _from_plain_weights(config: CfgNode, key: str, path: Path, num_classes: int, known: bool = True) -> Network:
    """Return the network of ``key`` with weights from elsewhere; ``known`` classes are those of the data."""
    network = _new_network(config, key, num_classes)
    try:
        with trusting_pickles(config.TRUST_PICKLE):
            tensors = read_any(path)
            found = recognize(path, network.arch, network.arch_kwargs, num_classes, tensors)
            if key == "TEACHER" and not config.DATA.LABELS and found.head is not None:
                # what it teaches needn't be about the data's classes
                network = _new_network(config, key, found.head)
                found = recognize(path, network.arch, network.arch_kwargs, found.head, tensors)
    except UserError as error:
        raise UserError(f"{key}.WEIGHTS: {error} ({key}.ARCH)") from error
    own, head = network.model.state_dict(), classifier_names(network.model)
    mean, std = teacher_pixels(config) if key == "TEACHER" else (config.DATA.MEAN, config.DATA.STD)
    taken = f"RGB with mean {list(mean)}, std {list(std)}"
    network.headless = found.head is not None
    learns = key == "TEACHER" and config.TEACHER.TRAIN and config.DATA.LABELS and network.headless
    found.check_input(
        lambda card: _check_pixels(config, card, f"{key}.WEIGHTS", learns), taken, f"{key}.WEIGHTS {path}"
    )
    load_strict(
        network.model, found.tensors | ({name: own[name] for name in head} if network.headless else {}), str(path)
    )
    network.source, network.sha256, network.start = path, sha256_of_file(path), f"{path.name}, {found.says}"
    if known:
        log.info("%s.WEIGHTS %s: %s", key, path, found.says)
    return network


def _teacher_from_plain_weights(config: CfgNode, path: Path, classes: list[str] | None) -> Network:
    network = _from_plain_weights(config, "TEACHER", path, len(classes or UNKNOWN), classes is not None)
    network.to_train = network.headless and config.TEACHER.TRAIN and config.DATA.LABELS
    if network.headless and classes is not None:
        log.info(
            "TEACHER.WEIGHTS %s: the data have %d classes; %s",
            path,
            len(classes),
            "a new head is trained with the rest before it teaches (TEACHER.TRAIN False takes its maps as they are)"
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
        boxed = [term for term in method.names if get_term(term).truth == "boxes"]
        if boxed:
            raise UserError(
                f"METHODS: {boxed[0]} reads the boxes of objects, which stage two alone has; write {boxed[0]}@det"
            )
        if not config.DATA.LABELS:
            _check_unlabelled(name, losses[name])
        if config.DATA.REST == "unlabelled" and any(get_term(term).truth for term in method.names):
            raise UserError(f"DATA.REST: {name} reads the label of every image; take drop, or leave this method out")
        if "logits" in losses[name].reads("teacher") and not labels_shared:
            remedy = (
                "set TEACHER.TRAIN True to fine-tune it first" if teacher and teacher.headless else "name another one"
            )
            lacks = "'s classes are not those of the data" if config.DATA.LABELS else " has no classes"
            raise UserError(
                f"METHODS: {name} compares logits, but the teacher{lacks}; {remedy}, or leave this method out"
            )
    return losses


def _check_unlabelled(name: str, loss: TransferLoss) -> None:
    wanting = [term for term in loss.method.names if get_term(term).truth]
    if wanting or not loss.pairs:
        raise UserError(
            f"METHODS: {wanting[0] if wanting else name} learns from labels, and DATA.LABELS is False; leave it out"
        )
    if loss.balance.shares:
        raise UserError(
            f"TRANSFER.AUTO_WEIGHT: {', '.join(loss.balance.shares)} of {name} would be measured against the labels' "
            "loss, and DATA.LABELS is False; give WEIGHTS"
        )


def warn_of_few(folder: ImageFolder) -> None:
    """Warn where so few images are held out that agreement and CKA are chance; CKA of one is 0, of two is 1."""
    if len(folder.val) < FEW_HELD:
        log.warning(
            "%s: %d of %d images held out; agreement and CKA on so few say nothing; raise DATA.VAL_FRACTION, or add "
            "images",
            folder.root,
            len(folder.val),
            len(folder.train) + len(folder.val),
        )


def warn_of_unread(losses: Mapping[str, TransferLoss], student: Network) -> None:
    """Warn where no term reads what the last maps of the student become: these layers would stay as they began."""
    last = max(student.levels.values(), key=lambda info: info.index).index
    for name, loss in losses.items():
        deepest = max((student.levels[level].index for level in loss.student_levels), default=-1)
        if deepest < last and loss.reads("student") <= {"maps"}:
            log.warning(
                "%s: without labels nothing trains the student's layers after %s, nor the embedding behind them; add a "
                "later level to TRANSFER.LEVELS, or a term on logits or embedding",
                name,
                ", ".join(loss.student_levels),
            )


def log_shapes(
    losses: Mapping[str, TransferLoss], student: Network, teacher: Network, size: int, teacher_size: int
) -> None:
    """Log a table of all pairs that the methods compare, for images of ``size`` and ``teacher_size`` pixels."""
    mine, my_strides = _probe(student, {name for loss in losses.values() for name in loss.student_levels}, size)
    theirs, their_strides = _probe(
        teacher, {name for loss in losses.values() for name in loss.teacher_levels}, teacher_size
    )
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


class TeacherView(nn.Module):
    """From the students' normalized images (B, 3, H, W) to a teacher's of another size, mean and std."""

    # (3, 1, 1)
    factor: Tensor
    offset: Tensor

    def __init__(self, config: CfgNode) -> None:
        super().__init__()
        self.size = config.TEACHER.IMAGE_SIZE
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.DATA.MEAN, config.DATA.STD))
        its_mean, its_std = (torch.tensor(values).view(3, 1, 1) for values in teacher_pixels(config))
        self.changes = not (torch.equal(mean, its_mean) and torch.equal(std, its_std))
        self.register_buffer("factor", std / its_std)
        self.register_buffer("offset", (mean - its_mean) / its_std)

    def forward(self, images: Tensor) -> Tensor:
        if self.size and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return torch.addcmul(self.offset, images, self.factor) if self.changes else images


class Teacher:
    """A frozen classifier in evaluation mode that gives logits, embedding and the maps of the levels in ``reads``.

    ``view`` makes its images of the students'.
    """

    def __init__(
        self,
        model: nn.Module,
        reads: Iterable[str],
        precision: torch.dtype | None,
        view: Callable[[Tensor], Tensor] | None = None,
        compile_mode: str = OFF,
    ) -> None:
        self.model, self.precision, self.view = model.eval().requires_grad_(False), precision, view
        # found by a forward pass, which wants all weights in one precision
        names = set(reads)
        self.levels = {name: info for name, info in feature_levels(model).items() if name in names}
        cast_frozen(self.model, precision)
        self.device = next(model.parameters()).device
        self._outputs = compiled(forward_outputs, compile_mode, self.device, "the teacher's network")

    def raw(self, images: Tensor) -> ModelOutputs:
        """Return the outputs for normalized images (B, 3, H, W) as they are computed, without gradient."""
        with torch.no_grad():
            seen = images if self.view is None else self.view(images)
            with autocast(self.device, self.precision):
                outputs: ModelOutputs = self._outputs(self.model, seen, self.levels)
        return outputs

    def __call__(self, images: Tensor, rows: Tensor | None = None) -> ModelOutputs:
        """Return the outputs for normalized images (B, 3, H, W); ``rows`` are for a cache in the teacher's place."""
        return for_losses(self.raw(images))


def for_losses(raw: ModelOutputs) -> ModelOutputs:
    """Return a teacher's outputs as the losses read them."""
    logits = None if raw.logits is None else raw.logits.float()
    return ModelOutputs(logits, {name: by_positions(maps) for name, maps in raw.maps.items()}, raw.embedding)
