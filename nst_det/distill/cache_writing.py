"""Writing the teacher cache: its size is known and allowed before a byte of it is written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from safetensors.torch import save_file
from torch import Tensor, nn

from nst_det.distill.cache import Index, TeacherCache, check_claim, check_shards, locked, read_index, shard_path
from nst_det.distill.images import Normalizer, ViewBatches
from nst_det.distill.needs import IMAGES, Piece, Trial, assemble, differing, total_bytes, what_to_keep
from nst_det.distill.teacher import Teacher, for_losses
from nst_det.distill.views import Views
from nst_det.errors import UserError
from nst_det.runtime.amounts import size
from nst_det.runtime.config import expand_path
from nst_det.runtime.files import atomic_path, sha256_of_file
from nst_det.runtime.loader import load
from nst_det.runtime.progress import progress
from nst_det.transfer import Outputs, TransferLoss

log = logging.getLogger(__name__)
GIB = 1 << 30
SHARD_BYTES = 256 << 20
MOST_SHARDS = 512
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


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


def _value(piece: Piece, raw: Outputs, shared: Mapping[Hashable, Any]) -> Tensor | None:
    """The piece's tensor; None where no loss derived it."""
    if not piece.key:
        return raw.of(piece.kind, piece.place)
    return shared.get(piece.shared_key)
