"""Files and names that came from somebody else: bounded before they are read, checked before they are followed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nst_det.errors import UserError

MAX_NAME_BYTES = 200


def shown(text: str, length: int = 120) -> str:
    """``text`` fit for one line on any terminal: control characters escaped, long text cut.

    Example:
        >>> shown("a\\nb")
        'a\\\\nb'
    """
    cut = text if len(text) <= length else f"{text[:length]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def shown_path(path: str | Path) -> str:
    """A path fit for one line on any terminal."""
    return shown(str(path), 4096)


def read_bytes(path: Path, limit: int, what: str) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Args:
        path: the file.
        limit: bytes; a larger file is refused before any of it is read.
        what: the kind of file, for the error ("annotation").

    Raises:
        UserError: missing, not a regular file (a pipe would block for ever), larger than ``limit``, unreadable.
    """
    name = shown_path(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name}: not a regular file; put the {what} itself there")
        if status.st_size > limit:
            raise UserError(f"{name}: {status.st_size} bytes, but an {what} may have {limit}; split it or remove it")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such {what}; add the file or take it out of the list") from error
    except OSError as error:
        raise UserError(f"{name}: {what} can't be read ({error.strerror}); correct its permissions") from error
    except ValueError as error:
        raise UserError(f"{name}: not the name of a file ({error})") from error
    if len(data) > limit:
        raise UserError(f"{name}: grew beyond the {limit} bytes that an {what} may have while it was read")
    return data


def name_problem(name: str) -> str | None:
    """Why ``name`` can't name one file inside a folder, or None if it can."""
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
    """Whether ``path``, its links followed, lies outside ``root`` (which must be resolved already)."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError):
        return True  # links in a circle lead nowhere
    return resolved != root and root not in resolved.parents


def read_names(path: Path, limit: int = 64 << 20) -> tuple[list[tuple[int, str]], list[str]]:
    """The lines of a list file that name something, and what is wrong with the others.

    Args:
        path: the list file.
        limit: largest size in bytes.

    Returns:
        (line number, name) of every usable line, blank lines left out; and problems as text
        (``line 3: '../x' could lead to another folder``).

    Raises:
        UserError: the file is missing, unreadable, too large, or not UTF-8.
    """
    data = read_bytes(path, limit, "image list")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{shown_path(path)}: line {line} is not UTF-8; save the list as UTF-8 text") from error
    names: list[tuple[int, str]] = []
    problems: list[str] = []
    for number, content in enumerate(text.split("\n"), 1):
        name = content.strip(" \t\r\f\v")
        if not name:
            continue
        problem = name_problem(name)
        if problem:
            problems.append(f"line {number}: '{shown(name)}' {problem}")
        else:
            names.append((number, name))
    return names, problems
