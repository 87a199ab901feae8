"""Files that are never half written, and JSON that fails in one clear line."""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import psutil

from nst_det.errors import UserError

CHECKSUM_KEY = "content_sha256"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give the path of a temporary file, synced and renamed to ``path`` at the end of the block; removed on errors."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        # torch and safetensors write by themselves and have errors of their own
        reason = _write_failure(error)
        if reason is None:
            raise
        raise cannot_write(path, reason) from error
    finally:
        # nothing can be there, nor be removed, where the folder can't be made
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path, remedy: str) -> Iterator[Path]:
    """Give a temporary folder, renamed to ``folder`` (absent or empty) at the end of the block, or removed on errors.

    ``remedy`` is what to do where it can't be written, for the error.
    """
    with _temporary_folder(Path(folder), remedy) as temporary:
        yield temporary
        os.replace(temporary, folder)


@contextmanager
def atomic_files(path: str | Path, remedy: str) -> Iterator[Path]:
    """Give a temporary folder whose files come beside ``path`` at the end of the block, that of its name last.

    On errors they are removed; ``remedy`` is what to do where nothing can be written, for the error.
    """
    path = Path(path)
    with _temporary_folder(path, remedy) as temporary:
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == path.name, file.name)):
            _sync(file)
            os.replace(file, path.with_name(file.name))
        _sync(path.parent)


@contextmanager
def _temporary_folder(path: Path, remedy: str) -> Iterator[Path]:
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(path.parent)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); {remedy}") from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """Return a new name in the folder of ``path`` that tells which process writes there."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_left_over(folder: Path, owned: bool = False) -> None:
    """Remove what killed processes of this machine, or of any where the folder is ``owned``, left half written."""
    here = re.compile(rf"\..*\.{re.escape(socket.gethostname())}-(\d{{1,9}})-[0-9a-f]{{8}}\.tmp")
    for path in folder.glob(".*.tmp"):
        match = here.fullmatch(path.name)
        if not psutil.pid_exists(int(match[1])) if match else owned:
            shutil.rmtree(path, ignore_errors=True)
            # rmtree is for folders alone, and what belongs to others can stay
            with contextlib.suppress(OSError):
                path.unlink()


def cannot_write(path: str | Path, reason: str) -> UserError:
    """Return the error of a file that can't be written, such as on a full disk."""
    return UserError(
        f"{path}: can't be written ({reason}); free some space or name another output folder, then run the same "
        "command again: what was saved before is whole"
    )


def _write_failure(error: Exception) -> str | None:
    """Return the reason of a failed write, also behind a library's own error; None for any other error."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number:
        return os.strerror(int(number[1]))
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else str(cause.strerror)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write readable JSON atomically; NaN and infinity, which JSON doesn't have, are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again with the command that made it") from error


def write_sealed_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write JSON with one more field, the SHA-256 of all others."""
    write_json(path, {**value, CHECKSUM_KEY: _seal(value)})


def read_sealed_json(path: str | Path, remedy: str) -> Any:
    """Read JSON and compare its seal, if it has one; ``remedy`` is what to do about a damaged file, for the error."""
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


def link_or_copy(path: Path, target: Path) -> None:
    """Make ``target`` a hard link to a file, or a copy where that can't be (another file system, or one without)."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def from_json(kind: Any, value: Any, path: str, remedy: str, key: str = "") -> Any:
    """Return parsed JSON as the type ``kind``: a dataclass, or what its fields here have; a missing key counts as null.

    The error names ``path`` and the dotted key of a value of another type, or of one that isn't finite.
    """

    def inner(kind: Any, value: Any, name: object) -> Any:
        return from_json(kind, value, path, remedy, f"{key}.{name}".lstrip("."))

    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return None if value is None else from_json(args[0], value, path, remedy, key)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        kinds = get_type_hints(kind)
        return kind(
            **{field.name: inner(kinds[field.name], value.get(field.name), field.name) for field in fields(kind)}
        )
    if origin is dict and isinstance(value, dict):
        return {name: inner(args[1], item, name) for name, item in value.items()}
    if origin is list and isinstance(value, list):
        return [inner(args[0], item, index) for index, item in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(args):
        return tuple(inner(arg, item, index) for index, (arg, item) in enumerate(zip(args, value)))
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if (origin is Literal and value in args) or (kind in (int, str) and type(value) is kind):
        return value
    wanted = "a finite number" if kind is float else str(kind) if origin else kind.__name__
    raise UserError(f"{path}: {key or 'it'} must be {wanted}, but is {value!r:.80}; {remedy}")
