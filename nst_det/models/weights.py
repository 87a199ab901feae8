"""Weights of other programs for a classifier: recognized by their names, returned by the model's own."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from nst_det.errors import UserError
from nst_det.models.build import classifier_names, create_model
from nst_det.models.caffe import check_stride
from nst_det.models.card import Card, input_contract
from nst_det.models.convert import batch_norm_eps, resnet_from_detectron2
from nst_det.models.hub import described
from nst_det.models.io import OPTIONAL_SUFFIX, below_prefix, check_shapes, first_names, read_any

# of torchvision's networks that have other names than timm's, but the same layers in the same order: the epsilon of
# torchvision's batch normalization, None where there is none
TORCHVISION = {
    r"convnext_(tiny|small|base|large)": None,
    r"efficientnet_b[0-4]|mnasnet_100|mobilenetv2_100": 1e-5,
    r"efficientnet_b[5-7]|mobilenetv3_(large|small)_100": 1e-3,
}
# torchvision's networks that have timm's names
ALIKE = r"(wide_)?resnet\d+(_2)?|resnext\d+_\d+x\d+d|densenet\d+"
# the ends of names that say what a tensor is
ROLES = ("weight", "bias", "running_mean", "running_var")
# names that only a whole detector's file has
ABOVE = re.compile(r"(^|\.)(fpn_output\d|proposal_generator|rpn|roi_heads)\.")
Named = dict[str, Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recognized:
    """A file's weights by the names of the model that they are for, all of which they fit."""

    tensors: Named  # without the head where that is of other classes, or isn't in the file
    origin: str  # whose names the file has, and of what network; where it is published
    head: int | None  # classes of the head that was left out, 0 where the file has none; None where it fits
    contract: dict[str, Any] | None  # the ``input`` of a card: what images must be; None where that isn't known

    @property
    def says(self) -> str:
        """What was taken, for a log line: ``torchvision mobilenetv2_100, head of 1000 classes left out``."""
        left_out = {None: "", 0: ", without a head"}.get(self.head, f", head of {self.head} classes left out")
        return f"{self.origin}{left_out}"

    def check_input(self, check: Callable[[Card], None], taken: str, source: str) -> None:
        """Compare what images must be by ``check``; a warning asks for it, and says what is ``taken``, if unknown."""
        if self.contract is not None:
            check(Card("", 1, input=self.contract))
            return
        log.warning(
            "%s: %s; it doesn't say how its images were normalized; assuming %s; set what its training had",
            source,
            self.origin,
            taken,
        )


def are_of_detector(names: Iterable[str]) -> bool:
    """Return whether a file with these names holds a detector, rather than a classifier."""
    return any(ABOVE.search(name) for name in names)


@dataclass(frozen=True)
class _Asked:
    arch: str
    arch_kwargs: Mapping[str, Any]
    own: Mapping[str, Tensor]
    head: frozenset[str]
    model: torch.nn.Module  # on the meta device

    def is_one_of(self, *patterns: str) -> bool:
        return any(re.fullmatch(pattern, self.arch.split(".")[0]) for pattern in patterns)


def _in_order(given: Named, asked: _Asked) -> Named:
    """Pair the tensors one by one; a ValueError where that isn't possible."""
    theirs = [name for name in given if not name.endswith(OPTIONAL_SUFFIX)]
    ours = [name for name in asked.own if not name.endswith(OPTIONAL_SUFFIX)]
    if len(theirs) < len(ours):
        ours = [name for name in ours if name not in asked.head]
    if len(theirs) != len(ours):
        raise ValueError(f"{len(theirs)} tensors, where {asked.arch} has {len(ours)}")
    paired = {}
    for name, mine in zip(theirs, ours):
        roles, value, shape = {name.split(".")[-1], mine.split(".")[-1]}, given[name], asked.own[mine].shape
        same = value.numel() == shape.numel() or mine in asked.head
        if not same or (len(roles) > 1 and roles <= {*ROLES}):
            raise ValueError(f"{name} has no place where {asked.arch} has {mine}")
        paired[mine] = value if mine in asked.head else value.reshape(shape)
    return paired


def _from_torchvision(given: Named, asked: _Asked) -> Named:
    eps = next((eps for pattern, eps in TORCHVISION.items() if asked.is_one_of(pattern)), "unknown")
    if eps == "unknown":
        raise ValueError(f"they are torchvision's, and how they fit {asked.arch} isn't known")
    paired = _in_order(given, asked)
    if isinstance(eps, float):
        shift = eps - batch_norm_eps(asked.arch, asked.arch_kwargs)
        for name in paired if shift else ():
            if name.endswith("running_var"):
                paired[name] = paired[name] + shift
    return paired


def _from_lukemelas(given: Named, asked: _Asked) -> Named:
    if not asked.is_one_of(r"tf_efficientnet_\w+"):
        raise ValueError(
            f"they are an EfficientNet's with TensorFlow's padding; name tf_efficientnet_.., not {asked.arch}"
        )
    return _in_order(given, asked)


def _from_detectron2(given: Named, asked: _Asked) -> Named:
    check_stride(given, asked.model)
    return resnet_from_detectron2(given)


@dataclass(frozen=True)
class _Family:
    mark: str  # a name that these files alone have, at the end of what may be before it
    rename: Callable[[Named, _Asked], Named]  # to timm's
    # of the networks (a pattern) of which all published weights want the same mean and std
    known: str = ""
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD


# by whose names they are; lukemelas' other networks are published with two normalizations, by the same names
FAMILIES = {
    "Detectron2": _Family(r"(?:^|\.)(res2\.0\.conv1\.weight)$", _from_detectron2),
    "lukemelas": _Family(
        r"(?:^|\.)(_blocks\.0\._bn1\.weight)$", _from_lukemelas, r".*_lite\d", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    ),
    "torchvision": _Family(r"(?:^|\.)(features\.0\.0\.weight|layers\.0\.weight)$", _from_torchvision, ".*"),
}


def recognize(
    path: str | Path,
    arch: str,
    arch_kwargs: Mapping[str, Any],
    num_classes: int,
    tensors: Mapping[str, Tensor] | None = None,
) -> Recognized:
    """Read the weights of a classifier from somebody else's file, whole or not at all.

    Known are timm's names, which torchvision's ResNets and DenseNets, mmpretrain and mmdet have too below their
    prefixes; those that timm converts for this architecture (such as those of ConvNeXt's and DINO's authors);
    torchvision's EfficientNet, MobileNet, ConvNeXt and MnasNet; Detectron2's ResNets; and the EfficientNets of
    lukemelas.  A detector's backbone is taken from its file.

    Args:
        path: as :func:`~nst_det.models.io.load_plain` takes it.
        arch: timm name; with ``arch_kwargs`` and ``num_classes`` it is the model that the weights are for.
        tensors: the file's state dict, where it is read already.

    Raises:
        UserError: no such file, or these weights don't fit; in one line, with the other size of ``arch`` that they are.
    """
    given = read_any(path) if tensors is None else dict(tensors)
    try:
        return _recognize(path, arch, arch_kwargs, num_classes, given)
    except (ValueError, UserError) as error:
        line = str(error).removeprefix(f"{path}: ")
        of = [name for name in _other_sizes(arch) if _fits(path, name, num_classes, given)]
        remedy = f"they are of {' or '.join(of)}" if of else f"check that it is of {arch}"
        raise UserError(f"{path}: {line}; {remedy}") from error


def _other_sizes(arch: str) -> list[str]:
    size = r"\d+|atto|femto|pico|nano|micro|tiny|small|medium|base|large|huge"
    base = arch.split(".")[0]
    like = re.compile(
        "".join(f"({size})" if re.fullmatch(size, part) else part for part in re.split(f"({size})", base))
    )
    return [name for name in timm.list_models() if name != base and like.fullmatch(name)]


def _fits(path: str | Path, arch: str, num_classes: int, given: Named) -> bool:
    try:
        return bool(_recognize(path, arch, {}, num_classes, given).tensors)
    except (ValueError, UserError):
        return False


def _recognize(
    path: str | Path, arch: str, arch_kwargs: Mapping[str, Any], num_classes: int, given: Named
) -> Recognized:
    with torch.device("meta"):
        model = create_model(arch, num_classes, **arch_kwargs)
    own = model.state_dict()
    asked = _Asked(arch, arch_kwargs, own, frozenset(classifier_names(model)), model)
    origin, contract = ("timm or torchvision" if asked.is_one_of(ALIKE) else "timm"), None
    for name, family in FAMILIES.items():
        found = next((match for entry in given if (match := re.search(family.mark, entry))), None)
        # a network of timm's may have such a name itself
        if found and found[1] not in own:
            prefix = found.string[: found.start(1)]
            inner = {entry[len(prefix) :]: value for entry, value in given.items() if entry.startswith(prefix)}
            given, origin = family.rename(inner, asked), name
            if asked.is_one_of(family.known):
                contract = input_contract(family.mean, family.std, "RGB", 0)
            break
    else:
        given = below_prefix(given, set(own), path)
        if not {*own} - asked.head - {*given} <= {name for name in own if name.endswith(OPTIONAL_SUFFIX)}:
            given, converted = _by_timm(given, asked)
            origin = "the authors'" if converted else "timm"
    head, given = _head(given, asked)
    own_rest = {name: value for name, value in own.items() if head is None or name not in asked.head}
    check_shapes({name: tuple(value.shape) for name, value in given.items()}, own_rest, str(path))
    broken = [name for name, value in given.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{first_names(broken)}: not a number, or infinite; get the file again")
    repo, published = described(path)
    if published:
        size = published["input_size"][-1]
        contract = input_contract(published["mean"], published["std"], "RGB", size)
        repo += f", for {size} pixels, {published.get('interpolation') or 'bilinear'}"
    return Recognized(given, f"{origin} {arch}{repo and f' ({repo})'}", head, contract)


def _by_timm(given: Named, asked: _Asked) -> tuple[Named, bool]:
    """Convert by timm's own function for the architecture; return whether it has one for these names."""
    convert = getattr(sys.modules[type(asked.model).__module__], "checkpoint_filter_fn", None)
    try:
        found = convert(dict(given), asked.model) if convert else {}
    except Exception:  # it raises whatever names it doesn't know make it stumble over
        found = {}
    rest = {*asked.own} - asked.head
    if len(rest & {*found}) > len(rest & {*given}):
        return found, True
    return given, False


def _head(given: Named, asked: _Asked) -> tuple[int | None, Named]:
    """Return the classes of a head that doesn't fit (0: there is none; None: it fits), and what goes in."""
    if all(name in given and given[name].shape == asked.own[name].shape for name in asked.head):
        return None, given
    # a head may begin with a normalization, whose width says nothing of classes
    of_classes = [name for name in sorted(asked.head) if asked.own[name].shape[:1] == (asked.model.num_classes,)]
    theirs = [len(given[name]) for name in of_classes if name in given and given[name].dim()]
    # a head with layers of its own, as behind mmpretrain's "head.", isn't the network's
    rest = {name: value for name, value in given.items() if name not in asked.head}
    return (theirs[0] if theirs else 0), rest
