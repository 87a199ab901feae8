"""What comes out when a step that gave something that is no number is run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from nst_det.errors import UserError
from nst_det.runtime.checkpoint import load_checkpoint
from nst_det.runtime.shown import Shown

_FIELDS = {"kind": str, "method": str, "seed": int, "not_finite": list, "images": list, "model": dict, "terms": dict}


@dataclass
class Replayed(Shown):
    """One step, again; shows itself as a table of its loss terms.

    Attributes:
        who: stage, method and step.
        recorded: loss term to its value in the run; empty where the pass ended before.
        terms: loss term to its value now.
        broken: what is no number now.
        was_broken: what was none in the run.
        images: ids of the batch.
        first: the first layer that made something that is no number of what was finite, or "".
    """

    who: str
    recorded: dict[str, float]
    terms: dict[str, float]
    broken: list[str]
    was_broken: list[str]
    images: list[str] = field(default_factory=list)
    first: str = ""

    @property
    def same(self) -> bool:
        """Whether the same was found as in the run."""
        return self.broken == self.was_broken

    def __rich__(self) -> Table:
        table = Table(title=Text(self.who))
        table.add_column("term")
        for name in ("in the run", "now"):
            table.add_column(name, justify="right")
        for name in dict.fromkeys([*self.recorded, *self.terms]):
            table.add_row(Text(name), *(_number(values.get(name)) for values in (self.recorded, self.terms)))
        return table

    @property
    def lines(self) -> list[str]:
        """What was found, in words."""
        lines = [f"not finite now: {', '.join(self.broken) or 'nothing'}"]
        lines += ["the same as in the run"] if self.same else [f"in the run: {', '.join(self.was_broken)}"]
        lines += [f"first in the layer {self.first}"] if self.first else []
        return [*lines, f"images: {', '.join(self.images)}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.9g}"


def read_step(path: str | Path) -> dict[str, Any]:
    """The content of a file that a training loop wrote into ``nonfinite/``; no code in it is executed.

    Raises:
        UserError: missing, damaged, or not one.
    """
    content = load_checkpoint(path)
    for name, kind in _FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise UserError(f"{path}: not a step to run again ('{name}' is missing); name a file in a run's nonfinite/")
    return content


class FirstBroken:
    """The first layer whose output is not finite though all its inputs are; "" if there is none."""

    def __init__(self) -> None:
        self.name = ""


@contextmanager
def first_broken(model: nn.Module) -> Iterator[FirstBroken]:
    """Watch the layers of a model within the block.

    Example:
        >>> with first_broken(nn.Sequential(nn.ReLU(), nn.LogSoftmax(1))) as found:
        ...     found.name
        ''
    """
    found = FirstBroken()

    def look(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not found.name and not _finite(output) and _finite(inputs):
                found.name = name

        return hook

    # Detectron2's convolution has its normalization inside
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if not list(layer.children()) or list(layer.parameters(recurse=False))
    ]
    handles = [layer.register_forward_hook(look(name)) for name, layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list | tuple) else True
