"""Videos: read frame by frame, and written as MPEG-4."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from nst_det.data.safe_io import shown_path
from nst_det.engine.io import atomic_files, cannot_write
from nst_det.errors import UserError

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
# of what is written, whatever is read; OpenCV's wheels have no encoder for H.264
SUFFIX, CODEC = ".mp4", "mp4v"
# where a file doesn't tell
FRAMES_A_SECOND = 25.0
# of the frames that a file says it has, below which it was cut off; some containers only estimate their number
WHOLE = 0.9

# FFmpeg writes to the terminal by itself what is one line of an error here
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


def read_frames(path: Path, every: int = 1) -> Iterator[tuple[int, float, np.ndarray]]:
    """Yield each ``every``-th frame of a video, beginning with the first.

    It is given as its number from 1, the frames a second that these are, and its (H, W, 3) uint8 RGB.
    """
    video = cv2.VideoCapture(str(path))
    try:
        shape, number, told = None, 0, video.get(cv2.CAP_PROP_FPS)
        rate = (told if 0 < told < 1000 else FRAMES_A_SECOND) / every
        while video.grab():
            number += 1
            if (number - 1) % every == 0:
                done, frame = video.retrieve()
                shape = shape or np.shape(frame)
                if not done or np.shape(frame) != shape:
                    why = "has another size" if done else "can't be decoded"
                    raise UserError(f"{shown_path(path)}: frame {number} {why}; convert the video again")
                yield number, rate, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not number:
            raise UserError(f"{shown_path(path)}: can't be read as a video; convert it to MP4 (H.264)")
        if number < WHOLE * (said := video.get(cv2.CAP_PROP_FRAME_COUNT)):
            raise UserError(f"{shown_path(path)}: ends after {number} of {said:.0f} frames; copy or convert it again")
    finally:
        video.release()


@contextmanager
def video_file(path: Path, rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that appends a frame, (H, W, 3) uint8 RGB, to a video of ``rate`` frames a second.

    All frames are as large as the first one.  The file is there when the block ends, and not at all on errors.
    """
    # a folder, since FFmpeg knows the container by the file's suffix
    with atomic_files(path, "name another output folder") as folder:
        writer = cv2.VideoWriter()

        def write(frame: np.ndarray) -> None:
            height, width = frame.shape[:2]
            kind = cv2.VideoWriter_fourcc(*CODEC)
            if not writer.isOpened() and not writer.open(str(folder / path.name), kind, rate, (width, height)):
                raise cannot_write(path, f"OpenCV makes no {CODEC} video of {width} x {height} pixels there")
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

        try:
            yield write
        finally:
            writer.release()
