"""What a detector costs at use and which of its checkpoints was tested, as typed data from ``results.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nst_det.errors import UserError


@dataclass(frozen=True)
class Cost:
    """A forward pass of batch 1: arithmetic of one image, and seconds on a named machine.

    Attributes:
        macs: multiply-adds.
        flops: single operations, a multiply-add is two.
        median: seconds; ``p10`` and ``p90`` are percentiles.
        p10: seconds.
        p90: seconds.
        size: (height, width) of the image in pixels.
        machine: name of the processor or GPU.
        device: ``cpu`` or ``cuda``.
        threads: of the CPU.
        run: the run whose detector was measured.
    """

    macs: int
    flops: int
    median: float
    p10: float
    p90: float
    size: tuple[int, int]
    machine: str
    device: str
    threads: int
    run: str

    @property
    def where(self) -> str:
        """The machine and how it was asked, in words."""
        threads = "" if self.device != "cpu" else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.machine}{threads}, {self.size[0]} × {self.size[1]} pixels"


def read_cost(tree: Any, where: str) -> Cost | None:
    """A row's ``cost``; None where it was not measured.

    Raises:
        UserError: a field is missing or wrong.
    """
    if tree is None:
        return None
    try:
        latency, (height, width) = tree["latency"], tree["size"]
        return Cost(
            macs=int(tree["macs"]),
            flops=int(tree["flops"]),
            median=_seconds(latency["median"]),
            p10=_seconds(latency["p10"]),
            p90=_seconds(latency["p90"]),
            size=(int(height), int(width)),
            machine=str(tree["machine"]),
            device=str(tree["device"]),
            threads=int(tree["threads"]),
            run=str(tree["run"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}.cost: {error!r}; make it again with nst-det compare") from error


def _seconds(value: Any) -> float:
    if not math.isfinite(float(value)) or value <= 0:
        raise ValueError(f"{value} seconds")
    return float(value)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on the validation split: steps done, and mAP (11-point, IoU 0.5, 0..1)."""

    step: int
    map: float


@dataclass(frozen=True)
class Checkpoints:
    """The best and the last checkpoint of one run, and which of them was tested (``best`` or ``last``)."""

    best: Checkpoint
    last: Checkpoint
    tested: str


def read_checkpoints(tree: Any, where: str) -> Checkpoints | None:
    """One seed's ``checkpoints``; None without a validation split, or one on which no object counts.

    Raises:
        UserError: a field is missing or wrong.
    """
    if tree is None:
        return None
    try:
        if tree["best"]["map"] is None or tree["last"]["map"] is None:
            return None
        best, last = (Checkpoint(int(tree[name]["step"]), float(tree[name]["map"])) for name in ("best", "last"))
        return Checkpoints(best, last, str(tree["tested"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}.checkpoints: {error!r}; make it again with nst-det compare") from error


def read_numbers(tree: Any, where: str) -> dict[str, float]:
    """Numbers by name, without those that are None.

    Raises:
        UserError: not such a mapping, or a number isn't finite.
    """
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise UserError(f"{where} must map names to numbers; make it again with nst-det compare")
    numbers = {str(name): value for name, value in tree.items() if value is not None}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{where}.{name} must be a finite number, but is {value!r}")
    return numbers
