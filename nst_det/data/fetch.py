"""One large file over HTTP: from several mirrors, resumed where it stopped, believed only by its checksum."""

from __future__ import annotations

import fcntl
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nst_det.data.reading import shown, shown_path
from nst_det.errors import UserError
from nst_det.runtime.files import sha256_of_file
from nst_det.runtime.progress import progress

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0
# tries at one mirror that bring no byte before the next one is taken
TRIES = 3
# before the next try, times the tries so far
PAUSE_SECONDS = 2.0
BLOCK = 1 << 20
# bytes that stay free on the disk
RESERVE = 64 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file on the net.

    Attributes:
        name: of the file, the last part of its URLs.
        size: bytes.
        sha256: of its content, hexadecimal.
        mirrors: URLs of the folders that hold it, ``http`` or ``https``; the first that works is taken.
    """

    name: str
    size: int
    sha256: str
    mirrors: tuple[str, ...]


class _MirrorError(Exception):
    """This mirror doesn't give the file; the next one may."""


def fetch(file: RemoteFile, folder: str | Path, mirrors: Sequence[str] = ()) -> Path:
    """Get a file, or go on where a former call stopped.

    What has come so far stands in ``NAME.part``; it becomes ``NAME`` when size and checksum are right.  A part whose
    checksum is wrong is thrown away and the file is got once more from the start.

    Args:
        file: what to get.
        folder: where to put it; it is made if it isn't there.
        mirrors: URLs of folders to try before the file's own.

    Returns:
        ``folder/NAME``.

    Raises:
        UserError: no mirror gives the file (each one's reason is named), a mirror that is no HTTP URL, the disk is
            full, or another process is getting it.
    """
    folder = Path(folder)
    path = folder / file.name
    bases = [*mirrors, *file.mirrors]
    for base in bases:
        if not re.match(r"https?://[^/\s]+", base):
            raise UserError(f"--mirror {shown(base)}: not an http or https URL of a folder")
    if path.is_file() and path.stat().st_size == file.size and sha256_of_file(path) == file.sha256:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _opened_part(folder / f"{file.name}.part") as part:
            _refuse_full_disk(folder, file.size - _length(part))
            _from_any(file, part, bases)
            os.replace(part.name, path)
    except OSError as error:
        raise UserError(
            f"{shown_path(path)}: can't be written ({error.strerror}); free some space or name another folder, then "
            "run the same command again"
        ) from error
    return path


@contextmanager
def _opened_part(path: Path) -> Iterator[BinaryIO]:
    with open(path, "ab+") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{shown_path(path)}: another process is getting this file; wait for it") from error
        yield part


def _refuse_full_disk(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted + RESERVE:
        raise UserError(
            f"{shown_path(folder)}: {wanted / 1e6:.0f} MB are still to come and {free / 1e6:.0f} MB are free; name "
            "another folder"
        )


def _from_any(file: RemoteFile, part: BinaryIO, bases: Sequence[str]) -> None:
    reasons = []
    for base in bases:
        url = f"{base.rstrip('/')}/{file.name}"
        try:
            resumed = _length(part) > 0
            _complete(file, part, url)
            if resumed and sha256_of_file(part.name) != file.sha256:
                log.warning("%s: what was there before is not of this file; getting all of it again", file.name)
                part.truncate(0)
                _complete(file, part, url)
            found = sha256_of_file(part.name)
            if found == file.sha256:
                return
            part.truncate(0)
            raise _MirrorError(f"another file (SHA-256 {found[:12]}..., not {file.sha256[:12]}...)")
        except _MirrorError as error:
            log.warning("%s: %s", url, error)
            reasons.append(f"{url}: {error}")
    raise UserError(
        f"{file.name}: no mirror gives it: {'; '.join(reasons)}; what has come is kept, so that the same command goes "
        "on; or name a mirror by --mirror, or get the file by a browser and put it there"
    )


def _complete(file: RemoteFile, part: BinaryIO, url: str) -> None:
    """Get what is missing of the file; a connection that is cut is taken up again as long as it brings something."""
    idle = 0
    with progress(f"{file.name} (MiB)", -(-file.size // BLOCK)) as meter:
        while (start := _length(part)) < file.size:
            meter.start_at(start // BLOCK)
            reason = "the connection was cut"
            try:
                shown_blocks = start // BLOCK
                for done in _append(file, part, url):
                    for _ in range(shown_blocks, done // BLOCK):
                        meter.step()
                    shown_blocks = done // BLOCK
            except (OSError, http.client.HTTPException) as error:
                reason = _reason(error)
                if isinstance(error, urllib.error.HTTPError):
                    raise _MirrorError(reason) from error
            if _length(part) < file.size:
                log.info("%s: %s after %d of %d bytes", url, reason, _length(part), file.size)
                idle = 0 if _length(part) > start else idle + 1
                if idle == TRIES:
                    raise _MirrorError(reason)
                time.sleep(idle * PAUSE_SECONDS)


def _append(file: RemoteFile, part: BinaryIO, url: str) -> Iterator[int]:
    """One request for the bytes that are missing; gives the length of the part after each block."""
    start = _length(part)
    headers = {"User-Agent": "nst_det"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        total = _total(answer, start)
        if total is not None and total != file.size:
            raise _MirrorError(f"its file has {total} bytes, not {file.size}")
        if start and answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            # this server sends whole files only
            part.truncate(0)
            start = 0
        while block := answer.read(min(BLOCK, file.size - start + 1)):
            start += len(block)
            if start > file.size:
                part.truncate(0)
                raise _MirrorError(f"it sends more than {file.size} bytes")
            part.write(block)
            part.flush()
            yield start


def _total(answer: http.client.HTTPResponse, start: int) -> int | None:
    """Bytes of the whole file as the server says; None if it doesn't."""
    if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if not found or int(found[1]) != start:
            raise _MirrorError("it sends another part than was asked for")
        return None if found[2] == "*" else int(found[2])
    length = answer.headers.get("Content-Length")
    return int(length) if length is not None and length.isdecimal() else None


def _length(part: BinaryIO) -> int:
    return os.fstat(part.fileno()).st_size


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return shown(str(getattr(cause, "strerror", None) or cause) or type(cause).__name__)
