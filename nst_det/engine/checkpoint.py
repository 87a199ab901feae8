"""Checkpoints of a run: never half written, their checksums compared before they are read, the last two kept."""

import contextlib
import logging
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from nst_det.engine.io import atomic_path
from nst_det.engine.progress import waiting
from nst_det.errors import UserError

log = logging.getLogger(__name__)
KEPT = 2
# of checkpoints: {"schema", "model", "trainer": {name: state}, "iteration": the last step that was made, from 0}, where
# Detectron2's checkpointer has the same but the schema, which is in "trainer" too; and of the dumps of nan_guard
SCHEMA = 2


def save_checkpoint(folder: str | Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``folder/step-00000042.pt``, after ``step`` optimizer steps, and drop all but the newest :data:`KEPT`."""
    path = Path(folder) / f"step-{step:08d}.pt"
    write_state(path, {"schema": SCHEMA, "iteration": step - 1, **state})
    for old in checkpoints(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def check_schema(state: Any, source: str | Path) -> None:
    found = state.get("schema") if isinstance(state, dict) else None
    if found != SCHEMA:
        raise UserError(f"{source}: of schema {found}, this version reads {SCHEMA}; remove it to start again")


def write_state(path: str | Path, state: dict[str, Any]) -> None:
    # through a file of Python's: where the disk is full, torch's own writer forgets the reason
    with waiting("checkpoint"), atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(path for path in Path(folder).glob("step-*.pt") if re.fullmatch(r"step-\d{8,}\.pt", path.name))


def step_of(path: Path) -> int:
    """Return the finished steps of a checkpoint, by its name."""
    return int(path.stem.removeprefix("step-"))


def would_resume(runs: Iterable[Sequence[Path]], step: Callable[[Path], int] = step_of) -> str:
    """Return what the same command would resume from; ``runs`` has the checkpoints of each network, oldest first."""
    nothing = "there is no checkpoint yet, so that the same command begins this training again"
    found: list[Path] = []
    for paths in runs:
        for path in reversed(paths):
            with contextlib.suppress(UserError):
                check_intact(path)
                found.append(path)
                break
        else:
            return nothing
    if not found:
        return nothing
    behind = min(found, key=step)
    return f"the same command resumes from step {step(behind)}, {behind}"


def load_latest_checkpoint(folder: str | Path) -> dict[str, Any] | None:
    """Read the newest undamaged checkpoint; None where there is none at all, an error where every one is damaged."""
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            state = load_checkpoint(path)
        except UserError as error:
            log.warning("%s; taking the one before it", error)
            continue
        check_schema(state, path)
        return state
    if paths:
        raise UserError(f"{folder}: every checkpoint here is damaged; remove the folder to start this run again")
    return None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; no code in it is executed."""
    check_intact(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever it stumbles over
        raise UserError(f"{path}: damaged checkpoint, or not one ({type(error).__name__}); remove it") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of nst_det; remove it")
    return state


def check_intact(path: str | Path) -> None:
    """Compare the checksums in a file that torch wrote; none of it is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        raise UserError(f"{path}: damaged checkpoint, or not one ({type(error).__name__}); remove it") from error
    if damaged:
        raise UserError(f"{path}: damaged checkpoint (checksum of {damaged} differs); remove it")
