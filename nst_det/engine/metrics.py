"""Metrics of a run as JSON lines and, if asked, TensorBoard events and at Weights & Biases."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nst_det.engine.io import cannot_write, read_json, write_text
from nst_det.errors import UserError

# names of the sum of all terms, without loss/ before them
TOTALS = ("total", "loss", "total_loss")
# before the names of what two equal runs don't share
SPEED = "speed/"


def check_wandb(project: str, source: str) -> None:
    """Refuse a WANDB that can't be followed, before anything is started.

    Args:
        project: value of the key WANDB; "" asks for nothing.
        source: named in the error.

    Raises:
        UserError: wandb is not installed.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"{source}: WANDB '{project}': wandb is not installed; pip install wandb, or set WANDB ''")


class WandbRun:
    """One run folder as one run at Weights & Biases: its config and the scalars of each step.

    Where it is sent is decided by wandb's own environment (``WANDB_MODE=offline`` keeps it on this machine,
    ``WANDB_ENTITY`` names the team).  A run that resumes after a stop resumes there too; steps that it has already are
    not sent again.

    Args:
        project: its name there.
        folder: the run folder; its last three parts name the run, its whole path identifies it.

    Raises:
        UserError: wandb is not installed, or refuses.
    """

    def __init__(self, project: str, folder: Path) -> None:
        check_wandb(project, str(folder))
        import wandb

        folder = folder.resolve()
        config = folder / "config.json"
        try:
            self._run: Any = wandb.init(
                project=project,
                name="/".join(folder.parts[-3:]),
                id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
                resume="allow",
                # students of stage one train side by side in one process
                reinit="create_new",
                dir=str(folder),
                config=read_json(config) if config.exists() else None,
            )
        except wandb.Error as error:
            raise UserError(f"WANDB '{project}': {error}; set WANDB_MODE=offline, or WANDB ''") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of one step; values that are not finite are left out."""
        self._run.log({key: value for key, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Send or write what is left."""
        self._run.finish()


def loss_note(row: Mapping[str, Any], most: int | None = None) -> str:
    """The losses in a row of metrics as text, their sum first.

    Args:
        row: by the names that the stages write.
        most: leave out what comes after so many.

    Example:
        >>> loss_note({"step": 3, "loss/ce": 1.5, "loss/kd": 0.25, "level/at@res4": 3.0, "loss/total": 1.75, "lr": 0.1})
        'total 1.75  ce 1.5  kd 0.25'
    """
    named = [(name, value) for name, value in row.items() if "loss" in name and isinstance(value, float)]
    losses = {name.removeprefix("loss/"): value for name, value in named}
    first = sorted(losses, key=lambda name: name not in TOTALS)[:most]
    return "  ".join(f"{name} {losses[name]:.4g}" for name in first)


class MetricsWriter:
    """Append one JSON object a step to ``metrics.jsonl``; each loss term keeps its own name.

    A run that resumes at step k first drops the lines from step k on, so that the file of a run that was
    stopped ends equal to an undisturbed run's, but for its speed.

    Args:
        path: the ``metrics.jsonl`` file.
        start_step: the first step that will be written.
        tensorboard: a folder for TensorBoard events, or None.
        wandb: a project at Weights & Biases, or "".

    Raises:
        UserError: a damaged file, or wandb is asked for and not installed.
    """

    def __init__(
        self, path: str | Path, start_step: int = 0, tensorboard: str | Path | None = None, wandb: str = ""
    ) -> None:
        path = Path(path)
        kept = [row for row in read_metrics(path, speed=True) if row["step"] < start_step] if path.exists() else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path = path
        # unbuffered: what a full disk refuses isn't tried again when the file is closed
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._board: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard), purge_step=start_step)
        self._wandb = WandbRun(wandb, path.parent) if wandb else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of one step; a value that is not finite is written as null.

        Raises:
            UserError: the disk is full.
        """
        row = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = (json.dumps({"step": step, **row}) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self._path, str(error.strerror)) from error
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.write(step, values)

    def close(self) -> None:
        """Flush and close all of them."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path, speed: bool = False) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl``; a last line cut off by a kill is left out.

    Args:
        path: the file.
        speed: with what a run's speed was; without it, two equal runs have equal rows.

    Raises:
        UserError: a line before the last is not a JSON object with a step.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not JSON; remove that line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}: line {number} has no step; remove that line")
        rows.append(row if speed else {key: value for key, value in row.items() if not key.startswith(SPEED)})
    return rows


def speed_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How fast a run was: medians of its readings, and the peak of the GPU's memory where it had one.

    Args:
        rows: of its metrics, read with their speed.

    Example:
        >>> speed_of([{"step": 9, "speed/images_per_second": 80.0, "speed/data_wait": 0.5}, {"step": 10, "loss": 1.0}])
        {'images_per_second': 80.0, 'data_wait': 0.5}
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(SPEED):
                found.setdefault(key.removeprefix(SPEED), []).append(value)
    return {name: max(values) if name == "gpu_memory_gib" else median(values) for name, values in found.items()}


def last_losses(path: str | Path) -> dict[str, float]:
    """Return the loss terms of the last step that was made, by their names in a ``metrics.jsonl``."""
    for row in reversed(read_metrics(path) if Path(path).exists() else []):
        losses = {key: value for key, value in row.items() if "loss" in key and key not in TOTALS}
        if losses and None not in losses.values():
            return losses
    return {}
