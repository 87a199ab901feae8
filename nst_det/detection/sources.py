"""What somebody names to detect on: images, folders of images, videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nst_det.data.images import EXTENSIONS, read_image
from nst_det.data.safe_io import shown_path
from nst_det.detection.video import VIDEO_EXTENSIONS, read_frames
from nst_det.errors import UserError

KINDS = (*EXTENSIONS, *VIDEO_EXTENSIONS)


@dataclass(frozen=True)
class Picture:
    """An image, or a frame of a video."""

    id: str  # stem of the file; a frame has its number after it (clip_000017)
    file: Path
    pixels: np.ndarray  # (H, W, 3) uint8, RGB
    frame: int | None = None  # its number in the video, from 1
    rate: float = 0.0  # frames of its video a second, of those that are read


def find_sources(paths: Sequence[str | Path]) -> list[Path]:
    """Return the images and videos that a user names: files, and those directly in folders, sorted by name.

    The stem of a file names what is written for it, so no two may share one, nor be named as a frame of a video.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if _is_source(file) and not file.name.startswith(".")]
            if not inside:
                raise UserError(
                    f"{shown_path(path)}: no image or video in this folder ({', '.join(KINDS)}); name another one"
                )
            found += inside
        elif not path.exists():
            raise UserError(f"{shown_path(path)}: no such file or folder; name images, folders or a video")
        elif not _is_source(path):
            raise UserError(f"{shown_path(path)}: neither an image nor a video ({', '.join(KINDS)}); convert it")
        else:
            found.append(path)
    of_stem: dict[str, Path] = {}
    for path in found:
        twin = of_stem.setdefault(path.stem, path)
        if twin != path:
            raise UserError(
                f"{shown_path(path)}: has the same name as {shown_path(twin)}, and both would be written as "
                f"{path.stem}; rename one, or predict them one after the other"
            )
    videos = {path.stem: path for path in found if is_video(path)}
    for path in found:
        stem, _, number = path.stem.rpartition("_")
        if stem in videos and number.isdecimal() and path.stem == frame_id(stem, int(number)):
            raise UserError(
                f"{shown_path(path)}: has the name of a frame of {shown_path(videos[stem])}; rename one, or predict "
                "them one after the other"
            )
    return list(of_stem.values())


def _is_source(path: Path) -> bool:
    return path.suffix.lower() in KINDS


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_EXTENSIONS


def frame_id(stem: str, number: int) -> str:
    """Return the id of a frame by the stem of its video and its number there, from 1."""
    return f"{stem}_{number:06}"


def read_sources(
    sources: Iterable[Path], every: int = 1, unusable: Callable[[UserError], None] | None = None
) -> Iterator[Picture]:
    """Yield all images, and each ``every``-th frame of the videos.

    A file that can't be read is given to ``unusable``, and the others follow; without it the error is raised.
    """
    for path in sources:
        try:
            if is_video(path):
                for number, rate, frame in read_frames(path, every):
                    yield Picture(frame_id(path.stem, number), path, frame, number, rate)
            else:
                yield Picture(path.stem, path, read_image(path))
        except UserError as error:
            if unusable is None:
                raise
            unusable(error)
