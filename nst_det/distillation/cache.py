"""The teacher cache: what the losses read of a teacher about every view of every image, as files.

A folder with ``index.json`` and shards ``00000.safetensors``, ...  Each shard has the same rows of all pieces and is
read through a memory map, so that a batch costs no more than its own rows.  A piece is an output of the teacher, or
what a loss computes of it for all students (a Gram matrix, an attention map), as the loss's ``reads`` declares.
"""

from __future__ import annotations

import ast
import copy
import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from fvcore.common.config import CfgNode
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nst_det.distillation.augment import Views
from nst_det.distillation.build import Teacher, for_losses
from nst_det.distillation.dataloader import Normalizer, load_images
from nst_det.engine.config import expand_path
from nst_det.engine.format import size
from nst_det.engine.io import atomic_path, read_sealed_json, sha256_of_file, write_sealed_json
from nst_det.engine.progress import progress
from nst_det.engine.seeds import seeded
from nst_det.errors import UserError
from nst_det.losses import ModelOutputs, TransferLoss
from nst_det.losses.ops import full_precision
from nst_det.losses.registry import KINDS, OUTPUT

log = logging.getLogger(__name__)
INDEX = "index.json"
VERSION = 4
GIB = 1 << 30
SHARD_BYTES = 256 << 20
MOST_SHARDS = 512
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
# images on which the losses are tried; in two parts, so that what is of the batch and not of an image shows itself
IMAGES = 4


@dataclass(frozen=True)
class Piece:
    """A tensor of one image on the teacher's side."""

    # logits, maps or embedding
    kind: str
    # the level, or the kind again
    place: str
    # the Python literal under which losses share what they compute of the output; "" for the output itself
    key: str
    shape: tuple[int, ...]
    dtype: str
    # False for an output that losses read only through what they compute of it
    kept: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not isinstance(getattr(torch, self.dtype), torch.dtype):
            raise ValueError(f"{self.kind} in {self.dtype}")
        hash(ast.literal_eval(self.key or "''"))

    @property
    def name(self) -> str:
        """Return ``res4``, or ``res4 ('nst-gram', (14, 14))`` for what is computed of it."""
        return f"{self.place} {self.key}" if self.key else self.place

    @property
    def shared_key(self) -> Hashable:
        """Return the key in :class:`ModelOutputs` of what losses share."""
        return (self.kind, self.place), ast.literal_eval(self.key)

    @property
    def bytes(self) -> int:
        """Return the bytes that are kept of one image."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize if self.kept else 0


class Reading(NamedTuple):
    """What losses read of one output of the teacher: all of it, or what is computed of it."""

    output: Piece
    all_of_it: bool
    computed: list[Piece]


def total_bytes(pieces: Iterable[Piece]) -> int:
    """Return the bytes that are kept of one image."""
    return sum(piece.bytes for piece in pieces)


def assemble(pieces: Sequence[Piece], values: Mapping[str, Tensor], count: int, device: torch.device) -> ModelOutputs:
    """Return the teacher's outputs for ``count`` images as losses read them, NaN where nothing is kept."""
    raw = ModelOutputs()
    moved = {name: value.to(device, non_blocking=True) for name, value in values.items()}
    for piece in pieces:
        if piece.kept and not piece.key:
            _put(raw, piece, moved[piece.name])
    outputs = for_losses(raw)
    for piece in pieces:
        if piece.key:
            value = moved[piece.name]
            outputs.keep(piece.shared_key, full_precision(value) if value.is_floating_point() else value)
        elif not piece.kept:
            # one number, whatever the shape
            _put(outputs, piece, torch.full((), math.nan, device=device).expand(count, *piece.shape))
    return outputs


def is_stand_in(value: Tensor) -> bool:
    """Return whether :func:`assemble` put one NaN, seen as (B, ...), where nothing is kept since no loss reads it."""
    return value.dim() > 0 and value.numel() > 1 and not any(value.stride())


def _put(outputs: ModelOutputs, piece: Piece, value: Tensor) -> None:
    if piece.kind == "maps":
        outputs.maps[piece.place] = value
    else:
        setattr(outputs, piece.kind, value)


class Trial:
    """Copies of all losses, tried on some images: what they share, and whether they read no more than they declare."""

    def __init__(self, losses: Mapping[str, TransferLoss], student: ModelOutputs, device: torch.device) -> None:
        self.losses = [copy.deepcopy(loss).to(device) for loss in losses.values() if loss.pairs]
        for layer in (layer for loss in self.losses for layer in loss.modules()):
            if isinstance(layer, nn.SyncBatchNorm):
                # in training mode it would wait for processes that make no trial
                layer.eval()
        self.student, self.device = student, device
        if student.labels is None and student.logits is not None:
            # any will do
            student.labels = student.logits.argmax(1)
        # kind and place of the teacher's outputs, and what the losses declare to read of it
        self.reads: dict[tuple[str, str], set[str]] = defaultdict(set)
        for loss in self.losses:
            for name, pairs in loss.pairs.items():
                for pair in pairs:
                    declared = getattr(loss.module(name, pair), "reads", (OUTPUT,))
                    self.reads[loss.kinds[name][1], pair.teacher].update(declared)

    def share(self, teacher: ModelOutputs) -> dict[Any, Any]:
        """Return what the losses compute of the teacher's outputs for any number of images, and share."""
        rows = torch.arange(len(teacher.of(*next(iter(self.reads)))), device=self.device) % IMAGES
        with torch.no_grad(), seeded("trial"):
            for loss in self.losses:
                loss(self.student.images(rows), teacher)
        return teacher.shared_so_far()

    def read(self, raw: ModelOutputs) -> list[Reading]:
        """Return what the losses read of each output of the trial's images."""
        whole, found = for_losses(raw), []
        shared = self.share(whole)
        for source, reads in self.reads.items():
            output, all_of_it, computed = raw.of(*source), OUTPUT in reads, []
            storage = whole.of(*source).untyped_storage().data_ptr()
            for (place, key), value in shared.items():
                if place == source and (key[0] if isinstance(key, tuple) else key) in reads:
                    if _can_be_kept(key, value) and value.untyped_storage().data_ptr() != storage:
                        computed.append(_piece(source, repr(key), value))
                    else:
                        all_of_it = True
            found.append(Reading(_piece(source, "", output), all_of_it, computed))
        return found

    def values(self, raw: ModelOutputs, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        """Return what is kept of the teacher's outputs for some images."""
        shared = self.share(for_losses(raw))
        return {
            piece.name: shared[piece.shared_key] if piece.key else raw.of(piece.kind, piece.place)
            for piece in pieces
            if piece.kept
        }

    def check(self, raw: ModelOutputs, pieces: Sequence[Piece]) -> None:
        """Compare the losses and their gradients with what they are where nothing else of the teacher is there."""
        parts = [self.values(raw.images(rows), pieces) for rows in (slice(0, 2), slice(2, IMAGES))]
        kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        expected = self._results(for_losses(raw))
        for name, found in self._results(assemble(pieces, kept, IMAGES, self.device)).items():
            if not all(torch.allclose(a, b, 1e-3, 1e-7, equal_nan=True) for a, b in zip(expected[name], found)):
                raise UserError(
                    f"CACHE.DIR: the term {name} reads more of a teacher than its class declares in `reads`; declare "
                    "it there, or leave `reads` out and all of the output is kept"
                )

    def _results(self, teacher: ModelOutputs) -> dict[str, list[Tensor]]:
        """Return by term its value and the gradients in the student's outputs and the adapters."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for loss in self.losses:
            student = self.student.images(torch.arange(IMAGES, device=self.device))
            leaves = [*(value.requires_grad_() for value in student.tensors()), *loss.parameters()]
            # mgd draws a mask
            with seeded("trial"), torch.enable_grad():
                values = loss(student, teacher)
            for name, value in values.items():
                gradients = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
                found[name] += [value.detach(), *(part for part in gradients if part is not None)]
        return found


def _can_be_kept(key: Hashable, value: Any) -> bool:
    """Return whether it is a tensor with a row an image, under a key that can be written to a file."""
    try:
        return isinstance(value, Tensor) and len(value) == IMAGES and bool(ast.literal_eval(repr(key)) == key)
    except (TypeError, ValueError, SyntaxError):
        return False


def _piece(source: tuple[str, str], key: str, value: Tensor) -> Piece:
    return Piece(*source, key, tuple(value.shape[1:]), str(value.dtype).removeprefix("torch."))


def what_to_keep(read: Sequence[Reading]) -> list[Piece]:
    """Return the pieces that take the fewest bytes."""
    chosen: list[Piece] = []
    for output, all_of_it, computed in read:
        whole = all_of_it or total_bytes(computed) >= output.bytes
        chosen += [output] if whole else [replace(output, kept=False), *computed]
    return chosen


@dataclass
class Index:
    """The content of ``index.json``; a row is a view of an image."""

    # the keys that the outputs depend on
    claim: dict[str, Any]
    pieces: list[Piece]
    rows: int
    # the last shard may have fewer
    shard_rows: int
    # the finished ones and the SHA-256 of their files
    shards: dict[int, str] = field(default_factory=dict)

    @property
    def spans(self) -> list[range]:
        """Return the rows of each shard."""
        firsts = range(0, self.rows, self.shard_rows)
        return [range(first, min(first + self.shard_rows, self.rows)) for first in firsts]


def shard_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard."""
    return folder / f"{shard:05d}.safetensors"


def read_index(folder: Path) -> Index | None:
    """Read the index of a cache; None where there is none yet."""
    path = folder / INDEX
    if not path.exists():
        return None
    values = read_sealed_json(path, "remove the folder to write the cache anew")
    try:
        pieces = [Piece(**{**piece, "shape": tuple(map(int, piece["shape"]))}) for piece in values["pieces"]]
        shards = {int(shard): str(sha256) for shard, sha256 in values["shards"].items()}
        return Index(dict(values["claim"]), pieces, int(values["rows"]), int(values["shard_rows"]), shards)
    except (KeyError, TypeError, ValueError, AttributeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{path}: not the index of a teacher cache; remove the folder to write it anew") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a cache while it is written; another process waits."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: waiting for another process that writes this teacher cache", folder)
            held = lock.acquire()
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); name another CACHE.DIR") from error
    with held:
        yield


class TeacherCache:
    """A finished cache in the teacher's place."""

    def __init__(self, folder: Path, index: Index, device: torch.device) -> None:
        self.index, self.device = index, device
        self._kept = [piece.name for piece in index.pieces if piece.kept]
        self._shards: list[dict[str, Tensor]] = []
        for path in (shard_path(folder, shard) for shard in range(len(index.spans))):
            try:
                with safe_open(str(path), framework="pt") as file:
                    self._shards.append({name: file.get_tensor(name) for name in self._kept})
            except (SafetensorError, OSError) as error:
                remedy = "remove this file, and the next run writes it again"
                raise UserError(f"{path}: damaged ({error}); {remedy}") from error

    def __call__(self, images: Tensor, rows: Tensor | None) -> ModelOutputs:
        """Return the teacher's outputs for views ``rows`` (B,); ``images``, which show them, are not looked at."""
        assert rows is not None, "batches of views come with their rows"
        shards, within = rows // self.index.shard_rows, rows % self.index.shard_rows
        values = {}
        for name in self._kept:
            first = self._shards[0][name]
            # from other memory the host would wait for the copy
            pinned = self.device.type == "cuda"
            values[name] = torch.empty((len(rows), *first.shape[1:]), dtype=first.dtype, pin_memory=pinned)
            for shard in shards.unique().tolist():
                here = (shards == shard).nonzero()[:, 0]
                values[name][here] = self._shards[shard][name][within[here]]
        return assemble(self.index.pieces, values, len(rows), self.device)


class CacheWriter:
    """Opens the cache of a run, and writes what of it isn't there yet."""

    def __init__(
        self,
        config: CfgNode,
        views: Views,
        teacher: Teacher,
        student: nn.Module,
        losses: Mapping[str, TransferLoss],
        claim: Mapping[str, Any],
    ) -> None:
        self.config, self.views, self.teacher = config, views, teacher
        self.claim = {**claim, "version": VERSION}
        self.folder = Path(expand_path(config.CACHE.DIR, "CACHE.DIR"))
        self.normalize = Normalizer(config.DATA.MEAN, config.DATA.STD, teacher.device)
        images = self.normalize(*views[range(IMAGES)])
        levels = {level for loss in losses.values() for level in loss.student_levels}
        outputs = Teacher(student, levels, teacher.precision)(images)
        self.trial, self.raw = Trial(losses, outputs, teacher.device), teacher.raw(images)

    def open(self) -> TeacherCache:
        """Return the finished cache."""
        read = self.trial.read(self.raw)
        pieces = what_to_keep(read)
        self.trial.check(self.raw, pieces)
        with locked(self.folder):
            index = read_index(self.folder)
            if index is None:
                index = self._new_index(pieces)
                self._check_size(index)
                self._save(index)
            self._check_claim(index)
            there = [shard for shard in index.shards if shard_path(self.folder, shard).exists()]
            missing = [shard for shard in range(len(index.spans)) if shard not in there]
            self._check_pieces(index, read, unfinished=bool(missing))
            self._check_shards(index, there)
            if missing:
                self._write(index, missing)
        dtype = self.config.CACHE.DTYPE
        if dtype != "auto":
            text = "CACHE.DTYPE %s: the teacher's outputs are rounded, so the students differ from an uncached run's"
            log.warning(text, dtype)
        return TeacherCache(self.folder, index, self.teacher.device)

    def _save(self, index: Index) -> None:
        write_sealed_json(self.folder / INDEX, asdict(index))

    def _new_index(self, pieces: Sequence[Piece]) -> Index:
        dtype = DTYPES.get(self.config.CACHE.DTYPE)
        # a single number for an image stays as it is
        rounded = [
            replace(piece, dtype=dtype) if dtype and piece.shape and piece.dtype == "float32" else piece
            for piece in pieces
        ]
        batch, rows, each = self.config.SOLVER.IMS_PER_BATCH, len(self.views), max(total_bytes(rounded), 1)
        wanted = max(SHARD_BYTES, each * rows // MOST_SHARDS)
        # whole batches: the teacher is asked in batches of the size that students see
        return Index(self.claim, rounded, rows, max(wanted // (each * batch), 1) * batch)

    def _check_size(self, index: Index) -> None:
        """Log how large the cache will be, and refuse one that is too large."""
        solver, count, limit = self.config.SOLVER, len(self.views.store), self.config.CACHE.MAX_GIB
        parts = ", ".join(f"{piece.name} {size(piece.bytes)}" for piece in index.pieces if piece.kept)
        needed, free = total_bytes(index.pieces) * index.rows, shutil.disk_usage(self.folder).free
        takes = f"{self.views.count} views of {count} images take {size(needed)} ({parts} each)"
        log.info("teacher cache %s: %s", self.folder, takes)
        reads = solver.MAX_ITER * solver.IMS_PER_BATCH
        if reads < index.rows:
            log.warning(
                "teacher cache: this run reads only %d views and would be faster without a cache; a cache is for "
                "several runs, or for more epochs than CACHE.VIEWS",
                reads,
            )
        remedy = "take fewer CACHE.VIEWS, fewer or smaller TRANSFER.LEVELS, or CACHE.DTYPE fp16"
        if needed > limit * GIB:
            raise UserError(f"CACHE.MAX_GIB: {takes}, more than {limit:g} GiB; raise it, or {remedy}")
        if needed > free:
            raise UserError(
                f"CACHE.DIR: {self.folder}: {takes}, but {size(free)} are free; name another folder, or {remedy}"
            )

    def _refuse(self, reason: str) -> None:
        raise UserError(f"{self.folder}: this teacher cache {reason}; name another CACHE.DIR or remove this one")

    def _check_claim(self, index: Index) -> None:
        """Refuse a cache of another teacher or other data."""
        before, now = index.claim, self.claim
        keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if keys:
            changes = "; ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in keys)
            self._refuse(f"was written with {changes}")

    def _check_pieces(self, index: Index, read: Sequence[Reading], unfinished: bool) -> None:
        """Refuse a cache without what the losses read."""
        kept = {piece.name: piece for piece in index.pieces if piece.kept}
        places, lacking = {piece.place for piece in index.pieces}, list[str]()
        for output, all_of_it, computed in read:
            if output.name not in kept:
                needed = [output] if all_of_it or output.place not in places else computed
                lacking += [piece.name for piece in needed if piece.name not in kept]
        if lacking:
            self._refuse(f"has no {', '.join(lacking)}, but METHODS read it; it has {', '.join(kept)}")
        if unfinished:
            shared, places = self.trial.share(for_losses(self.raw)), {*self.raw.maps, "logits", "embedding"}
            others = [
                name
                for name, piece in kept.items()
                if (piece.shared_key not in shared if piece.key else piece.place not in places)
            ]
            if others:
                self._refuse(
                    f"is unfinished, and these METHODS don't compute its {', '.join(others)}; finish it with others"
                )

    def _check_shards(self, index: Index, shards: Sequence[int]) -> None:
        paths = [shard_path(self.folder, shard) for shard in shards]
        # hashing leaves Python's lock, so two threads are twice as fast
        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
            for shard, path, sha256 in zip(shards, paths, pool.map(sha256_of_file, paths)):
                if sha256 != index.shards[shard]:
                    raise UserError(
                        f"{path}: damaged (its SHA-256 is not the one in {INDEX}); remove this file, and the next run "
                        "writes it again"
                    )

    def _write(self, index: Index, missing: list[int]) -> None:
        batch, spans = self.config.SOLVER.IMS_PER_BATCH, index.spans
        # whole batches, the first rows again after the last
        asked = [range(first, first + batch) for shard in missing for first in spans[shard][::batch]]
        source = load_images(self.views, asked, self.config, self.normalize.device)
        with progress("teacher cache", len(asked)) as meter:
            for shard in missing:
                parts: list[dict[str, Tensor]] = []
                for _ in spans[shard][::batch]:
                    parts.append(self._ask(self.normalize(*next(source)), index.pieces))
                    meter.step()
                tensors = {name: torch.cat([part[name] for part in parts])[: len(spans[shard])] for name in parts[0]}
                path = shard_path(self.folder, shard)
                with atomic_path(path) as temporary:
                    save_file(tensors, str(temporary))
                index.shards[shard] = sha256_of_file(path)
                self._save(index)

    def _ask(self, images: Tensor, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        values = self.trial.values(self.teacher.raw(images), pieces)
        for piece in pieces:
            if piece.kept:
                value = values[piece.name]
                stored = value.to("cpu", getattr(torch, piece.dtype)).contiguous()
                if stored.dtype == torch.float16 and value.dtype != torch.float16 and not stored.isfinite().all():
                    raise UserError(f"CACHE.DTYPE: {piece.name} has values too large for fp16; take bf16 or auto")
                values[piece.name] = stored
        return values
