"""Files, names and numbers that came from somebody else: bounded before they are read, checked before use."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

from nst_det.errors import UserError, printable

MAX_NAME_BYTES = 200


def shown(text: str, length: int = 120) -> str:
    """Make ``text`` fit for one line on any terminal: control characters escaped, long text cut.

    Example:
        >>> shown("a\\nb")
        'a\\\\nb'
    """
    return printable(text if len(text) <= length else f"{text[:length]}...")


def shown_path(path: str | Path) -> str:
    """Make a path fit for one line on any terminal."""
    return shown(str(path), 4096)


def read_bytes(path: Path, limit: int, what: str, remedy: str = "add the file or take it out of the list") -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    ``what`` is the kind of file for the error ("annotation"), ``remedy`` what to do where it is missing.
    """
    name = shown_path(path)
    too_large = UserError(f"{name}: {what} of more than {limit} bytes; split it or remove it")
    try:
        status = os.stat(path)
        # a pipe would block for ever
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name}: not a regular file; put the {what} itself there")
        if status.st_size > limit:
            raise too_large
        with open(path, "rb") as file:
            # not ``limit`` bytes at once, whose buffer costs more than to read a small file
            data = file.read(status.st_size + 1)
            # it may have grown
            if len(data) > status.st_size:
                data += file.read(limit + 1 - len(data))
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such {what}; {remedy}") from error
    except OSError as error:
        raise UserError(f"{name}: {what} can't be read ({error.strerror}); correct its permissions") from error
    except ValueError as error:
        raise UserError(f"{name}: not the name of a file ({error})") from error
    if len(data) > limit:
        raise too_large
    return data


def read_text(path: Path, limit: int, what: str) -> str:
    """Read UTF-8 text, see :func:`read_bytes`."""
    data = read_bytes(path, limit, what)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{shown_path(path)}: line {line} is not UTF-8; save the {what} as UTF-8 text") from error


def name_problem(name: str) -> str | None:
    """Return why ``name`` can't name one file inside a folder, or None if it can."""
    if not name:
        return "is empty"
    if name in (".", "..") or "/" in name or "\\" in name:
        return "could lead to another folder"
    if not name.isprintable():
        return "has characters that can't be printed"
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    return None


def leads_outside(path: Path, root: Path) -> bool:
    """Return whether ``path``, its links followed, lies outside ``root`` (which must be resolved already)."""
    try:
        return not path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):
        return True  # links in a circle lead nowhere


def is_number(value: Any, limit: float = sys.float_info.max) -> bool:
    """Return whether a value out of a file is a finite number of at most ``limit``; NaN compares as false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= limit
