"""Times and sizes in words, and the size of a folder."""

from __future__ import annotations

from pathlib import Path


def duration(seconds: float) -> str:
    """A time, given in seconds, in words.

    Example:
        >>> duration(3725), duration(95)
        ('1 h 02 min', '1 min 35 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """A number of bytes in words.

    Example:
        >>> size(3 * 2**30), size(1000)
        ('3 GiB', '1000 B')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder and its folders; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink() and path.is_file())
