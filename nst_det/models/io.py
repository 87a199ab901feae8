"""Backbone files: ``NAME.safetensors`` with the whole classifier, ``NAME.json`` with its card."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nst_det.engine.checkpoint import check_intact
from nst_det.engine.io import (
    CHECKSUM_KEY,
    atomic_path,
    read_sealed_json,
    remove_left_over,
    sha256_of_file,
    write_sealed_json,
)
from nst_det.engine.run_dir import package_versions
from nst_det.engine.safetensors_io import load_tensors, own_memory, read_tensors
from nst_det.errors import UserError
from nst_det.models.build import count_parameters, create_model, feature_levels
from nst_det.models.card import Card, card_from_json
from nst_det.models.registry import resolve

SHOWN = 4
# a counter that old files lack and frozen layers never read
OPTIONAL_SUFFIX = "num_batches_tracked"
# that hold a weight as it is, if rounded, in torch's words and in safetensors'
FORMATS = ("float64", "float32", "float16", "bfloat16", "F64", "F32", "F16", "BF16")
# of torch.compile, FSDP and activation checkpointing, anywhere within names
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# mappings within mappings
DEEPEST = 5
LARGEST_CARD = 16 << 20
LARGEST_WEIGHTS = 16 << 30
log = logging.getLogger(__name__)
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


def load_strict(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy ``state_dict`` into ``model``; nothing is copied unless all of it fits.

    Args:
        model: any module.
        state_dict: a state dict with the names and shapes that the model has.
        source: file or architecture, named in the error.

    Raises:
        ValueError: one line with the missing names, the unexpected names and the shapes that differ.
    """
    own = model.state_dict()
    check_shapes({key: tuple(value.shape) for key, value in state_dict.items()}, own, source)
    check_formats({name: _kind(value) for name, value in state_dict.items()}, own, source)
    model.load_state_dict(dict(state_dict), strict=False)


def check_formats(kinds: Mapping[str, str], own: Mapping[str, Tensor], source: str) -> None:
    """Refuse (ValueError) weights in number formats that aren't the weights themselves, such as quantized ones."""
    for name, kind in kinds.items():
        if name in own and own[name].is_floating_point() and kind not in FORMATS:
            raise ValueError(f"{source}: {name} is written as {kind}; write these weights as float32")


def _kind(value: Tensor) -> str:
    return str(value.dtype if value.layout == torch.strided else value.layout).removeprefix("torch.")


def check_shapes(given: Mapping[str, Sequence[int]], own: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes with a model's own, as :func:`load_strict` does, before any weight is read."""

    def size(shape: Sequence[int]) -> str:
        return "x".join(map(str, shape)) or "scalar"

    faults = {
        "missing": [key for key in own if key not in given and not key.endswith(OPTIONAL_SUFFIX)],
        "unexpected": [key for key in given if key not in own],
        "other shapes": [
            f"{key} {size(given[key])} for {size(own[key].shape)}"
            for key in own
            if key in given and tuple(given[key]) != tuple(own[key].shape)
        ],
    }
    parts = [f"{len(names)} {what} ({first_names(names)})" for what, names in faults.items() if names]
    if parts:
        raise ValueError(f"{source}: these weights don't fit the model: {'; '.join(parts)}")


def first_names(names: Sequence[str]) -> str:
    """Return the first few names, and how many there are beyond."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@contextmanager
def trusting_pickles(trust: bool = True) -> Iterator[None]:
    """Open any pickle within the block (TRUST_PICKLE, ``--trust-pickle``); False changes nothing."""
    token = _trusted.set(trust or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def pickles_are_trusted() -> bool:
    """Return whether this is within :func:`trusting_pickles`."""
    return _trusted.get()


def load_pickled(path: str | Path) -> Any:
    """Read a ``.pth``, ``.pt``, ``.pyth`` or ``.pkl`` file, tensors on the CPU.

    Plain tensors, numbers, text and containers of them are read by ``torch.load(weights_only=True)``, which runs
    nothing.  A pickle with anything else in it (Detectron2's ``.pkl`` files have NumPy arrays) is opened only where
    pickles are trusted.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f"{path}: weights can't be read ({error.strerror}); correct the path") from error
    zipped = start == b"PK"
    if not zipped and start[:1] != b"\x80":
        raise UserError(f"{path}: not a weights file (neither torch's nor a pickle); get it again, or correct the path")
    if zipped:
        check_intact(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever it stumbles over
        if zipped and not any(name.endswith("data.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise UserError(f"{path}: not a weights file of torch ({type(error).__name__}); get it again") from error
        if not _trusted.get():
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise UserError(
                f"{path}: not opened: it is a pickle that holds more than weights{f' ({found[1]})' if found else ''}, "
                "and opening such a file runs whatever code its author put there; take weights as .safetensors, or if "
                "you trust where it is from, add --trust-pickle (in a config: TRUST_PICKLE True)"
            ) from error
    log.warning("%s: a pickle, opened because TRUST_PICKLE says so", path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=False)
        except Exception:  # a plain pickle then, as in Detectron2's model zoo
            if zipped:
                raise
            with open(path, "rb") as file:
                return pickle.load(file, encoding="latin1")
    except Exception as error:  # a pickle raises whatever its author wants
        raise UserError(f"{path}: damaged, or not a weights file ({type(error).__name__}); get it again") from error


def save_backbone(path: str | Path, model: nn.Module, card: Card) -> Card:
    """Write a classifier and its card, both atomically; the card goes last, so a file without one is unfinished.

    Args:
        path: ends in ``.safetensors``; the card is written next to it.
        model: the whole timm classifier, head included.
        card: levels, params, versions, date and sha256 are filled in where they are empty.

    Returns:
        The card as written.

    Raises:
        UserError: the folder can't be written or the disk is full.
        ValueError: the path doesn't end in ``.safetensors``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a backbone file ends in .safetensors")
    tensors = own_memory(model.state_dict())
    remove_left_over(path.parent)
    card_path(path).unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        # one entry alone: safetensors writes several in any order, and equal backbones are equal files
        save_file(tensors, str(temporary), metadata={"format": "pt"})
    levels = {name: {"stride": info.stride, "channels": info.channels} for name, info in feature_levels(model).items()}
    card = replace(
        card,
        levels=card.levels or levels,
        params=card.params or count_parameters(model),
        versions=card.versions or package_versions(),
        date=card.date or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        sha256=sha256_of_file(path),
    )
    write_sealed_json(card_path(path), asdict(card))
    return card


def card_path(path: str | Path) -> Path:
    """Return the card's path of a backbone file."""
    return Path(path).with_name(Path(path).name.removesuffix(".safetensors") + ".json")


def is_backbone_file(path: Path) -> bool:
    """Return whether this is a file of :func:`save_backbone`, with its card, rather than plain weights."""
    return path.suffix == ".safetensors" and (card_path(path).exists() or not path.exists())


def load_card(path: str | Path) -> Card:
    """Read and check the card of the backbone file ``path``, which may be ``backbone://NAME``.

    A card without its checksum (``content_sha256``), written by hand, is read as well.

    Raises:
        UserError: missing, too large, not a card, or not as it was written.
    """
    path = resolve(path)
    beside = card_path(path)
    if not beside.exists():
        if path.exists():
            raise UserError(f"{path}: its card {beside.name} is missing; put it beside the weights")
        raise UserError(f"{path}: no such backbone file; nst-det backbones lists those there are")
    if beside.stat().st_size > LARGEST_CARD:
        raise UserError(f"{beside}: {beside.stat().st_size} bytes is too large for a card")
    remedy = f"get it again, or if you edited it, remove the field '{CHECKSUM_KEY}'"
    return card_from_json(read_sealed_json(beside, remedy), str(beside))


def load_backbone(path: str | Path) -> tuple[dict[str, Tensor], Card]:
    """Read a backbone file; names, shapes and checksum are compared before a tensor is believed.

    Args:
        path: a ``.safetensors`` path or ``backbone://NAME``.

    Returns:
        The state dict of the whole classifier (on the CPU), and the card.

    Raises:
        UserError: no such file, damaged, not what its card says, or weights that don't fit the architecture.
    """
    path = resolve(path)
    card = load_card(path)
    if not path.exists():
        raise UserError(f"{path}: its card is here, the weights are not; put them beside the card")
    header = _header(path)
    try:
        with torch.device("meta"):
            own = create_model(card.arch, card.num_classes, **card.arch_kwargs).state_dict()
        check_formats({name: kind for name, (_, kind) in header.items()}, own, str(path))
        check_shapes({name: shape for name, (shape, _) in header.items()}, own, str(path))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    if sha256_of_file(path) != card.sha256:
        raise UserError(f"{path}: the weights are not those of the card (sha256 differs); get both files again")
    return load_tensors(path), card


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and the number format of each tensor."""
    if path.stat().st_size > LARGEST_WEIGHTS:
        raise UserError(f"{path}: {path.stat().st_size} bytes is too large for weights; correct the path")
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file ({error}); get it again") from error


def load_plain(path: str | Path, names: Collection[str] = ()) -> dict[str, Tensor]:
    """A bare state dict from somebody else's file, by an architecture that the user names.

    Nothing in the file is executed, unless it is a pickle that is trusted.  torchvision's ResNet files fit timm's
    ResNets as they are; :func:`~nst_det.models.weights.recognize` knows other names as well.

    Args:
        path: ``.safetensors``, or a file of ``torch.save``, in which the state dict may be an entry among others.
        names: those of the model that it is for.  What the file has before them (``module.``, ``state_dict.model.``)
            is taken off and logged, and entries without that beginning are left out; of several state dicts the moving
            average is taken, as timm does.  Without names the entry ``state_dict`` or ``model`` is taken,
            without ``module.``.

    Raises:
        UserError: no such file, damaged, not a state dict, or several of which none is an average.
    """
    if names:
        return below_prefix(read_any(path), set(names), path)
    return {name.removeprefix("module."): value for name, value in read_any(path, ("state_dict", "model")).items()}


def read_any(path: str | Path, entries: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return all tensors in a file by their dotted names, of ``entries`` that are mappings alone what is in them."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; correct the path")
    if path.suffix == ".safetensors":
        _header(path)
        return named_tensors(read_tensors(path), path)
    value: Any = load_pickled(path)
    for key in entries:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    return named_tensors(value, path)


def named_tensors(tree: Any, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of what was read from ``path`` by their dotted names."""
    tensors = dict(_tensors(tree))
    if not tensors:
        raise UserError(f"{path}: not a state dict (a mapping of names to tensors); name a file of weights")
    wrappers = {found for name in tensors for found in WRAPPERS.findall(name)}
    if wrappers:
        log.info("%s: taken without '%s' within its names", path, "', '".join(sorted(wrappers)))
        tensors = {WRAPPERS.sub("", name): value for name, value in tensors.items()}
    return tensors


def _tensors(tree: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested mappings, and of modules, by their dotted names."""
    if isinstance(tree, nn.Module):
        tree = tree.state_dict()
    for key, value in tree.items() if isinstance(tree, Mapping) and depth < DEEPEST else ():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        else:
            yield from _tensors(value, f"{prefix}{key}.", depth + 1)


def below_prefix(tensors: dict[str, Tensor], names: set[str], path: str | Path) -> dict[str, Tensor]:
    """Return the tensors below the prefix under which most of ``names`` are found."""
    counts: Counter[str] = Counter()
    for name in tensors:
        places = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        counts.update(name[:place] for place in places if name[place:] in names)
    most = max(counts.values(), default=0)
    if 2 * most < len(names) or counts[""] == most:
        return tensors
    best = [prefix for prefix, count in counts.items() if count == most]
    averages = [prefix for prefix in best if "ema" in prefix.lower()]
    if len(best) > 1 and len(averages) != 1:
        raise UserError(
            f"{path}: holds several state dicts for this network ({', '.join(sorted(best))}); write the one that you "
            "mean into a file of its own"
        )
    prefix = (averages if len(best) > 1 else best)[0]
    taken = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    log.info("%s: taken without '%s' before its names; %d others left out", path, prefix, len(tensors) - len(taken))
    return taken


def list_backbones(folders: Sequence[Path]) -> tuple[list[tuple[str, Card]], list[str]]:
    """Return names and cards of all backbones in ``folders``, and one line for each file that can't be used."""
    found: dict[str, Card] = {}
    faults = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        try:
            if path.stem not in found:
                found[path.stem] = load_card(path)
        except UserError as error:
            faults.append(str(error))
    return sorted(found.items()), faults


def backbones_table(entries: Sequence[tuple[str, Card]], title: str) -> Table:
    """Return a table of name, architecture, method, accuracy, size, teacher, data and date."""
    table = Table(title=title, title_justify="left")
    for heading in ("name", "arch", "method", "measured", "params", "teacher", "data", "date"):
        right = heading in ("measured", "params")
        table.add_column(heading, justify="right" if right else "left", overflow="ellipsis" if right else "fold")
    for name, card in entries:
        scores = card.measured if card.top1 is None else {"top-1": card.top1}
        measured = next((f"{name} {100 * value:.1f} %" for name, value in scores.items()), "")
        params = "" if card.params is None else f"{card.params / 1e6:.2f} M"
        teacher, data = str(card.teacher.get("name", "")), str(card.data.get("name", ""))
        data += "" if card.data.get("labels", True) else ", without labels"
        cells = (name, card.arch, card.method, measured, params, teacher, data, card.date[:10])
        # not markup: names come from files
        table.add_row(*(Text("".join(c if c.isprintable() else "?" for c in cell)) for cell in cells))
    return table
