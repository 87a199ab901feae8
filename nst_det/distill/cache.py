"""The teacher cache: what the losses read of a teacher about every view of every image, as files.

A folder with ``index.json`` and shards ``00000.safetensors``, ...  Each shard has the same rows of all pieces (see
:mod:`nst_det.distill.needs`) and is read through a memory map, so that a batch costs no more than its own rows.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nst_det.distill.needs import Piece, assemble
from nst_det.errors import UserError
from nst_det.runtime.files import read_sealed_json, sha256_of_file, write_sealed_json
from nst_det.transfer import Outputs

log = logging.getLogger(__name__)
INDEX = "index.json"
VERSION = 1


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

    def __call__(self, images: Tensor, rows: Tensor | None) -> Outputs:
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
