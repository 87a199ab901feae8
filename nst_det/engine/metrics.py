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
    """Refuse WANDB where wandb is not installed, before anything is started."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"{source}: WANDB '{project}': wandb is not installed; pip install wandb, or set WANDB ''")


def start_wandb(project: str, folder: Path) -> Any:
    """Begin or resume the run of a run folder at Weights & Biases; wandb's own environment decides where it is sent."""
    check_wandb(project, str(folder))
    import wandb

    folder = folder.resolve()
    config = folder / "config.json"
    try:
        return wandb.init(
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


class MetricsWriter:
    """Appends one JSON object a step to ``metrics.jsonl``.

    A run that resumes first drops the lines from ``start_step`` on, so that the file of a run that was stopped ends
    equal to an undisturbed run's, but for its speed.
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
        self._wandb = start_wandb(wandb, path.parent) if wandb else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of one step; a value that is not finite is null in the file."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        line = (json.dumps({"step": step, **dict.fromkeys(values), **finite}) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self._path, str(error.strerror)) from error
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            # steps that it has already are not sent again
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path, speed: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, their speed if asked; a last line cut off by a kill is left out."""
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
    """Return the medians of a run's readings of its speed, and the peak of its GPU's memory."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(SPEED):
                found.setdefault(key.removeprefix(SPEED), []).append(value)
    return {name: max(values) if name == "gpu_memory_gib" else median(values) for name, values in found.items()}


def loss_note(row: Mapping[str, Any], most: int | None = None) -> str:
    """Return the losses in a row as text, their sum first, such as ``total 1.75  ce 1.5  kd 0.25``."""
    named = [(name, value) for name, value in row.items() if "loss" in name and isinstance(value, float)]
    losses = {name.removeprefix("loss/"): value for name, value in named}
    first = sorted(losses, key=lambda name: name not in TOTALS)[:most]
    return "  ".join(f"{name} {losses[name]:.4g}" for name in first)


def last_losses(path: str | Path) -> dict[str, float]:
    """Return the loss terms of the last step that was made."""
    for row in reversed(read_metrics(path) if Path(path).exists() else []):
        losses = {key: value for key, value in row.items() if "loss" in key and key not in TOTALS}
        if losses and None not in losses.values():
            return losses
    return {}
