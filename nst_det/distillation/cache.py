"""The teacher cache: what the losses read of a teacher about every view of every image, as files.

A folder with ``index.json`` and shards ``00000.safetensors``, ...  Each shard has the same rows of all pieces (see
:mod:`nst_det.distillation.needs`) and is read through a memory map, so that a batch costs no more than its own rows.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nst_det.distillation.augment import Views
from nst_det.distillation.build import Teacher, for_losses
from nst_det.distillation.dataloader import Normalizer, ViewBatches
from nst_det.distillation.needs import IMAGES, Piece, Trial, assemble, differing, total_bytes, what_to_keep
from nst_det.engine.config import expand_path
from nst_det.engine.format import size
from nst_det.engine.io import atomic_path, read_sealed_json, sha256_of_file, write_sealed_json
from nst_det.engine.loader import load
from nst_det.engine.progress import progress
from nst_det.errors import UserError
from nst_det.losses import ModelOutputs, TransferLoss

log = logging.getLogger(__name__)
INDEX = "index.json"
VERSION = 1
GIB = 1 << 30
SHARD_BYTES = 256 << 20
MOST_SHARDS = 512
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass
class Index:
    """What stands in ``index.json``.

    Attributes:
        claim: the keys that the outputs depend on.
        pieces: what is kept for each row.
        rows: views of all images.
        shard_rows: rows of a shard; the last one may have fewer.
        shards: the finished ones, number to SHA-256 of the file.
    """

    claim: dict[str, Any]
    pieces: list[Piece]
    rows: int
    shard_rows: int
    shards: dict[int, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def count(self) -> int:
        """Number of shards when all are written."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def save(self, folder: Path) -> None:
        """Write it, atomically."""
        write_sealed_json(folder / INDEX, asdict(self))


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard stands."""
    return folder / f"{shard:05d}.safetensors"


def read_index(folder: Path) -> Index | None:
    """The index of a cache; None where there is none yet.

    Raises:
        UserError: it is damaged, or of another version.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    values = read_sealed_json(path, "remove the folder to write the cache anew")
    try:
        if values["version"] != VERSION:
            raise UserError(f"{path}: a teacher cache of version {values['version']}; remove the folder")
        pieces = [_piece(**piece) for piece in values["pieces"]]
        shards = {int(shard): str(sha256) for shard, sha256 in values["shards"].items()}
        return Index(dict(values["claim"]), pieces, int(values["rows"]), int(values["shard_rows"]), shards)
    except (KeyError, TypeError, ValueError, AttributeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{path}: not the index of a teacher cache; remove the folder to write it anew") from error


def _piece(shape: Sequence[int], **values: Any) -> Piece:
    piece = Piece(**values, shape=tuple(map(int, shape)))
    if piece.kind not in ("logits", "maps", "embedding") or not isinstance(getattr(torch, piece.dtype), torch.dtype):
        raise ValueError(f"{piece.kind} in {piece.dtype}")
    if piece.key:
        hash(piece.shared_key)
    return piece


def check_claim(index: Index, claim: Mapping[str, Any], folder: Path) -> None:
    """Refuse a cache that speaks of something else.

    Raises:
        UserError: the line names every key that differs.
    """
    stale = [
        f"{key} {index.claim.get(key)!r}, now {claim.get(key)!r}"
        for key in sorted({*index.claim, *claim})
        if index.claim.get(key) != claim.get(key)
    ]
    if stale:
        raise UserError(
            f"{folder}: this teacher cache was written with {'; '.join(stale)}; name another CACHE.DIR or "
            "remove this one"
        )


def check_shards(index: Index, folder: Path, shards: Sequence[int]) -> None:
    """Compare the checksums of shards.

    Raises:
        UserError: one is damaged; the line names its file.
    """

    def intact(shard: int) -> bool:
        return sha256_of_file(shard_path(folder, shard)) == index.shards[shard]

    # hashing leaves Python's lock, so two threads are twice as fast
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        for shard, fits in zip(shards, pool.map(intact, shards)):
            if not fits:
                raise UserError(
                    f"{shard_path(folder, shard)}: damaged (its SHA-256 is not the one in {INDEX}); remove this file, "
                    "and the next run writes it again"
                )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a cache while it is written; another process waits.

    Raises:
        UserError: the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); name another CACHE.DIR") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another process that writes this teacher cache", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class TeacherCache:
    """A finished cache in the teacher's place.

    Args:
        folder: where it stands.
        index: all of its shards are written and intact.
        device: of the outputs.

    Raises:
        UserError: a shard can't be read.
    """

    def __init__(self, folder: Path, index: Index, device: torch.device) -> None:
        self.index, self.device = index, device
        self._kept = [piece for piece in index.pieces if piece.kept]
        self._shards = [self._mapped(shard_path(folder, shard)) for shard in range(index.count)]

    def _mapped(self, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(str(path), framework="pt") as file:
                return {piece.name: file.get_tensor(piece.name) for piece in self._kept}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged ({error}); remove this file, and the next run writes it again") from error

    def __call__(self, images: Tensor, rows: Tensor | None) -> ModelOutputs:
        """What the teacher said about views ``rows`` (B,); ``images``, which show them, are not looked at."""
        assert rows is not None, "batches of views come with their rows"
        values = {piece.name: self._gather(piece.name, rows) for piece in self._kept}
        return assemble(self.index.pieces, values, len(rows), self.device)

    def _gather(self, name: str, rows: Tensor) -> Tensor:
        shards, within = rows // self.index.shard_rows, rows % self.index.shard_rows
        first = self._shards[0][name]
        found = torch.empty((len(rows), *first.shape[1:]), dtype=first.dtype)
        for shard in shards.unique().tolist():
            here = (shards == shard).nonzero()[:, 0]
            found[here] = self._shards[shard][name][within[here]]
        return found


class CacheWriter:
    """Opens the cache of a run, and writes what of it isn't there yet.

    Args:
        config: the whole config; CACHE.DIR is set.
        views: of the students' images.
        teacher: asked where the cache has no answer.
        student: as all students start, on the teacher's device.
        losses: of all methods.
        claim: the keys that the teacher's outputs depend on.
    """

    def __init__(
        self,
        config: CfgNode,
        views: Views,
        teacher: Teacher,
        student: nn.Module,
        losses: Mapping[str, TransferLoss],
        claim: Mapping[str, Any],
    ) -> None:
        self.config, self.views, self.teacher, self.claim = config, views, teacher, dict(claim)
        self.folder = Path(expand_path(config.CACHE.DIR, "CACHE.DIR"))
        self.normalize = Normalizer(config.DATA.MEAN, config.DATA.STD, teacher.device)
        self._images = self.normalize(views.images(torch.arange(IMAGES) % len(views)))
        reads = {level for loss in losses.values() for level in loss.student_levels}
        self.trial = Trial(losses, Teacher(student, reads, teacher.precision)(self._images), teacher.device)

    def open(self) -> TeacherCache:
        """The finished cache.

        Raises:
            UserError: it is of something else, lacks what a method reads, is damaged, or is larger than allowed.
        """
        with locked(self.folder):
            index = read_index(self.folder)
            if index is None:
                index = self._new_index()
                self._allow(index)
                index.save(self.folder)
            check_claim(index, self.claim, self.folder)
            there = [shard for shard in index.shards if shard_path(self.folder, shard).exists()]
            missing = [shard for shard in range(index.count) if shard not in there]
            self._check_needs(index, bool(missing))
            check_shards(index, self.folder, there)
            if missing:
                self._write(index, missing)
        if self.config.CACHE.DTYPE != "auto":
            log.warning(
                "CACHE.DTYPE %s: the teacher's outputs are rounded, so the students differ from those of an uncached "
                "run",
                self.config.CACHE.DTYPE,
            )
        return TeacherCache(self.folder, index, self.teacher.device)

    def _new_index(self) -> Index:
        pieces = [self._rounded(piece) for piece in what_to_keep(self.trial, self.teacher.raw(self._images))]
        batch, rows = self.config.SOLVER.IMS_PER_BATCH, len(self.views)
        each = max(total_bytes(pieces), 1)
        wanted = max(SHARD_BYTES, each * rows // MOST_SHARDS)
        # whole batches: the teacher is asked in batches of the size that students see
        return Index(self.claim, pieces, rows, max(wanted // (each * batch), 1) * batch)

    def _rounded(self, piece: Piece) -> Piece:
        """The piece as CACHE.DTYPE wants it; a single number for an image stays as it is."""
        dtype = DTYPES.get(self.config.CACHE.DTYPE)
        return replace(piece, dtype=dtype) if dtype and piece.shape and piece.dtype == "float32" else piece

    def _allow(self, index: Index) -> None:
        """Say how large the cache will be, and refuse one that is too large."""
        each, count = total_bytes(index.pieces), len(self.views.store)
        parts = ", ".join(f"{piece.name} {size(piece.bytes)}" for piece in index.pieces if piece.kept)
        takes = f"{self.views.count} views of {count} images take {size(each * index.rows)} ({parts} each)"
        log.info("teacher cache %s: %s", self.folder, takes)
        reads = self.config.SOLVER.MAX_ITER * self.config.SOLVER.IMS_PER_BATCH
        if reads < index.rows:
            log.warning(
                "teacher cache: this run alone asks for %d views and would be faster without; a cache is for several "
                "runs, or for more epochs than CACHE.VIEWS",
                reads,
            )
        remedy = "take fewer CACHE.VIEWS, fewer or smaller TRANSFER.LEVELS, or CACHE.DTYPE fp16"
        limit = self.config.CACHE.MAX_GIB
        if each * index.rows > limit * GIB:
            raise UserError(f"CACHE.MAX_GIB: {takes}, more than {limit:g} GiB; raise it, or {remedy}")
        free = shutil.disk_usage(self.folder).free
        if each * index.rows > free:
            raise UserError(
                f"CACHE.DIR: {self.folder}: {takes}, but {size(free)} are free; name another folder, or {remedy}"
            )

    def _check_needs(self, index: Index, unfinished: bool) -> None:
        """Try the losses with what the cache keeps."""
        raw = self.teacher.raw(self._images)
        whole = for_losses(raw)
        expected = self.trial.results(whole)
        shared, kept = whole.shared_so_far(), [piece for piece in index.pieces if piece.kept]
        has = f"it has {', '.join(piece.name for piece in kept)}; name another CACHE.DIR or remove this one"
        outputs = {(piece.kind, piece.place) for piece in index.pieces}
        unknown = [place for kind, place in self.trial.sources if (kind, place) not in outputs]
        if unknown:
            raise UserError(
                f"{self.folder}: this teacher cache has no {', '.join(unknown)}, but METHODS read it; {has}"
            )
        found = {piece.name: _value(piece, raw, shared) for piece in kept}
        values = {name: value for name, value in found.items() if value is not None}
        underived = [name for name in found if name not in values]
        if underived and unfinished:
            raise UserError(
                f"{self.folder}: this teacher cache is unfinished, and only other METHODS derive its "
                f"{', '.join(underived)}; finish it with them, or remove it"
            )
        pieces = [piece for piece in index.pieces if not piece.kept or piece.name in values]
        lacking = differing(expected, self.trial.results(assemble(pieces, values, IMAGES, self.trial.device)))
        if lacking:
            raise UserError(f"{self.folder}: this teacher cache has not all that {', '.join(lacking)} reads; {has}")

    def _write(self, index: Index, missing: list[int]) -> None:
        batch = self.config.SOLVER.IMS_PER_BATCH
        starts = [row for shard in missing for row in index.rows_of(shard)[::batch]]
        source = load(ViewBatches(self.views, batch), starts, self.config.DATALOADER.NUM_WORKERS)
        with progress("teacher cache", len(starts)) as meter:
            for shard in missing:
                rows = index.rows_of(shard)
                parts: list[dict[str, Tensor]] = []
                for _ in rows[::batch]:
                    parts.append(self._ask(next(source).images, index.pieces))
                    meter.step()
                tensors = {name: torch.cat([part[name] for part in parts])[: len(rows)] for name in parts[0]}
                path = shard_path(self.folder, shard)
                with atomic_path(path) as temporary:
                    save_file(tensors, str(temporary))
                index.shards[shard] = sha256_of_file(path)
                index.save(self.folder)

    def _ask(self, images: Tensor, pieces: list[Piece]) -> dict[str, Tensor]:
        raw = self.teacher.raw(self.normalize(images))
        whole = for_losses(raw)
        self.trial.fill(whole)
        shared, found = whole.shared_so_far(), {}
        for piece in pieces:
            if piece.kept:
                value = _value(piece, raw, shared)
                assert value is not None, "what the losses derive is known since the trial"
                stored = value.to("cpu", getattr(torch, piece.dtype)).contiguous()
                if stored.dtype == torch.float16 and value.dtype != torch.float16 and not stored.isfinite().all():
                    raise UserError(f"CACHE.DTYPE: {piece.name} has values too large for fp16; take bf16 or auto")
                found[piece.name] = stored
        return found


def _value(piece: Piece, raw: ModelOutputs, shared: Mapping[Hashable, Any]) -> Tensor | None:
    """The piece's tensor; None where no loss derived it."""
    if not piece.key:
        return raw.of(piece.kind, piece.place)
    return shared.get(piece.shared_key)
