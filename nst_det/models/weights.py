"""Weights of other programs for a classifier: recognized by their names, returned by the model's own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nst_det.errors import UserError
from nst_det.models.build import classifier_names, create_model
from nst_det.models.caffe import check_stride
from nst_det.models.convert import batch_norm_eps, resnet_from_detectron2
from nst_det.models.io import OPTIONAL_SUFFIX, below_prefix, check_shapes, read_any

# of torchvision's networks that have other names than timm's, but the same layers in the same order: the epsilon of
# torchvision's batch normalization, None where there is none
TORCHVISION = {
    r"convnext_(tiny|small|base|large)": None,
    r"efficientnet_b[0-4]|mnasnet_100|mobilenetv2_100": 1e-5,
    r"efficientnet_b[5-7]|mobilenetv3_(large|small)_100": 1e-3,
}
# the ends of names that say what a tensor is
ROLES = ("weight", "bias", "running_mean", "running_var")
# names that only a whole detector's file has
ABOVE = re.compile(r"(^|\.)(fpn_output\d|proposal_generator|rpn|roi_heads)\.")
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Recognized:
    """A file's weights by the names of the model that they are for, all of which they fit."""

    tensors: Named  # without the head where that is of other classes, or isn't in the file
    origin: str  # whose names the file has
    head: int | None  # classes of the head that was left out, 0 where the file has none; None where it fits
    contract: bool  # whether images are known to be those of timm's published weights of the architecture

    @property
    def says(self) -> str:
        """What was taken, for a log line."""
        left_out = {None: "", 0: ", without a head"}.get(self.head, f", its head of {self.head} classes left out")
        return f"weights by {self.origin} names{left_out}"


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


# whose names -> a name that they alone have, at the end of what may be before it; how they become timm's; whether the
# images are known to be those of timm's published weights
FAMILIES: dict[str, tuple[str, Callable[[Named, _Asked], Named], bool]] = {
    "Detectron2's": (r"(?:^|\.)(res2\.0\.conv1\.weight)$", _from_detectron2, False),
    "lukemelas'": (r"(?:^|\.)(_blocks\.0\._bn1\.weight)$", _from_lukemelas, True),
    "torchvision's": (r"(?:^|\.)(features\.0\.0\.weight|layers\.0\.weight)$", _from_torchvision, True),
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
        UserError: no such file, or these weights don't fit; in one line.
        ValueError: unknown architecture.
    """
    with torch.device("meta"):
        model = create_model(arch, num_classes, **arch_kwargs)
    own = model.state_dict()
    asked = _Asked(arch, arch_kwargs, own, frozenset(classifier_names(model)), model)
    given = read_any(path) if tensors is None else dict(tensors)
    origin, contract = "timm's", False
    try:
        for family, (mark, rename, known) in FAMILIES.items():
            found = next((match for entry in given if (match := re.search(mark, entry))), None)
            # a network of timm's may have such a name itself
            if found and found[1] not in own:
                prefix = found.string[: found.start(1)]
                inner = {name[len(prefix) :]: value for name, value in given.items() if name.startswith(prefix)}
                given, origin, contract = rename(inner, asked), family, known
                break
        else:
            given = below_prefix(given, set(own), path)
            if not {*own} - asked.head - {*given} <= {name for name in own if name.endswith(OPTIONAL_SUFFIX)}:
                given, origin = _by_timm(given, asked)
        head, given = _head(given, asked)
        own_rest = {name: value for name, value in own.items() if head is None or name not in asked.head}
        check_shapes({name: tuple(value.shape) for name, value in given.items()}, own_rest, str(path))
    except (ValueError, UserError) as error:
        line = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: {line}; check that it is of {arch}") from error
    return Recognized(given, origin, head, contract)


def _by_timm(given: Named, asked: _Asked) -> tuple[Named, str]:
    """Convert by timm's own function for the architecture, if it has one for these names."""
    convert = getattr(sys.modules[type(asked.model).__module__], "checkpoint_filter_fn", None)
    try:
        found = convert(dict(given), asked.model) if convert else {}
    except Exception:  # it raises whatever names it doesn't know make it stumble over
        found = {}
    rest = {*asked.own} - asked.head
    if len(rest & {*found}) > len(rest & {*given}):
        return found, "the authors'"
    return given, "timm's"


def _head(given: Named, asked: _Asked) -> tuple[int | None, Named]:
    """Return the classes of a head that doesn't fit (0: there is none; None: it fits), and what goes in."""
    if all(name in given and given[name].shape == asked.own[name].shape for name in asked.head):
        return None, given
    theirs = [len(given[name]) for name in sorted(asked.head) if name in given and given[name].dim()]
    # a head with layers of its own, as behind mmpretrain's "head.", isn't the network's
    rest = {name: value for name, value in given.items() if name not in asked.head}
    return (theirs[0] if theirs else 0), rest
