"""Metrics of a run at Weights & Biases, if asked; the package wandb is an extra."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nst_det.errors import UserError
from nst_det.runtime.files import read_json


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
    ``WANDB_ENTITY`` names the team).  A run that goes on after a stop goes on there too; steps that it has already are
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
