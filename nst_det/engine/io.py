"""Files that can't be half written, and JSON that fails in one clear line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from nst_det.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where a file that is open can't be removed anyway
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".tmp"
CHECKSUM_KEY = "content_sha256"
# a temporary file is not locked in the instant in which it is made
YOUNG_SECONDS = 1.0


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; at the end of the block it takes the place of ``path``.

    The content is synced to disk before the rename, so that ``path`` holds the old content or the whole new
    one, never a part.  If the block raises, ``path`` is untouched and the temporary file is gone.

    Raises:
        UserError: the disk is full or the folder can't be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); name another output folder") from error
    temporary = Path(name)
    try:
        _lock(handle)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, str(error.strerror)) from error
    except Exception as error:
        # torch and safetensors write by themselves and have errors of their own
        reason = _write_failure(error)
        if reason is None:
            raise
        raise cannot_write(path, reason) from error
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path, remedy: str) -> Iterator[Path]:
    """Give a temporary folder beside ``folder``, which becomes it at the end of the block, or is removed.

    ``folder`` must not be there yet, or be empty; ``remedy`` is what to do where it can't be written, for the error.
    """
    folder = Path(folder)
    prefix = f".{folder.name}.{socket.gethostname()}-"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # what killed processes of this machine left
        for left in folder.parent.iterdir():
            pid = left.name.removeprefix(prefix).partition("-")[0]
            if left.name.startswith(prefix) and pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{prefix}{os.getpid()}-"))
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); {remedy}") from error
    try:
        yield made
        made.chmod(0o777 & ~_umask())
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def remove_left_over(folder: str | Path, *, shared: bool = True) -> None:
    """Remove what killed processes left behind under temporary names; files that somebody writes now stay.

    Args:
        folder: where to look; not below it.
        shared: whether other processes may begin to write there now.
    """
    for path in Path(folder).glob(f".*{SUFFIX}"):
        with contextlib.suppress(OSError):
            if shared and time.time() - path.stat().st_mtime < YOUNG_SECONDS:
                continue
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if _lock(file.fileno()):
                path.unlink()


def _lock(handle: int) -> bool:
    """Mark a file as being written by this process; whether nobody else does (or the file system can't tell)."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def cannot_write(path: str | Path, reason: str) -> UserError:
    """What to say where ``path`` can't be written, such as on a full disk."""
    return UserError(
        f"{path}: can't be written ({reason}); free some space or name another output folder, then run the same "
        "command again: what was saved before is whole"
    )


def _write_failure(error: Exception) -> str | None:
    """The reason of a failed write behind a library's own error; None for any other error."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number:
        return os.strerror(int(number[1]))
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else str(cause.strerror)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically.  NaN and infinity are refused: JSON has no word for them."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, not UTF-8, or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again with the command that made it") from error


def write_sealed_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """:func:`write_json` with one more field, :data:`CHECKSUM_KEY`: the SHA-256 of all others."""
    write_json(path, {**value, CHECKSUM_KEY: _seal(value)})


def read_sealed_json(path: str | Path, remedy: str) -> Any:
    """:func:`read_json` of what :func:`write_sealed_json` wrote, without the seal.

    Only the fields count, not their order, nor spaces and line ends.  A file without a seal, by an earlier version or
    by hand, is taken as it is.

    Args:
        path: the file.
        remedy: what to do about a damaged one, for the error.

    Raises:
        UserError: the file is missing, not JSON, or a field is not what was written.
    """
    value = read_json(path)
    if isinstance(value, dict) and CHECKSUM_KEY in value and value.pop(CHECKSUM_KEY) != _seal(value):
        raise UserError(
            f"{path}: damaged, or edited by hand (its {CHECKSUM_KEY} is not that of the other fields); {remedy}"
        )
    return value


def _seal(value: Mapping[str, Any]) -> str:
    # through JSON once, where every key is text
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
