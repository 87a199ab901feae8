"""The result of a detector as a table for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_result(result: Mapping[str, Any], folder: str) -> None:
    """Print AP a class and the means.

    Args:
        result: the content of ``result.json``; without ``map`` nothing was evaluated.
        folder: where it stands.
    """
    # into a file or a pipe: as wide as the table needs
    console = Console(width=None if sys.stdout.isatty() else 160)
    if "map" not in result:
        console.print(f"trained, not evaluated (DATASETS.TEST is empty); see {folder}", markup=False)
        return
    table = Table(title=escape(f"VOC AP at IoU 0.5, {folder}"))
    table.add_column("class")
    for column in ("AP 11-point", "AP area"):
        table.add_column(column, justify="right")
    for name, ap in result["per_class"].items():
        table.add_row(escape(name), _cell(ap), _cell(result["per_class_area"][name]))
    table.add_section()
    table.add_row("mean", _cell(result["map"]), _cell(result["map_area"]), style="bold")
    console.print(table)
    coco = ", ".join(f"{name} {_cell(value)}" for name, value in result["coco"].items())
    console.print(f"COCO: {coco}", highlight=False)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
