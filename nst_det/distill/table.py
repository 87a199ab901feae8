"""The results of stage one as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text


def results_table(results: Mapping[str, Mapping[str, Any]], folder: str) -> Table:
    """One row for the teacher and each method.

    Args:
        results: ``result.json`` by method, ``teacher`` among them.
        folder: named in the title.
    """
    table = Table(title=Text(f"stage one in {folder}"), title_justify="left")
    table.add_column("method")
    for heading in ("top-1", "top-5", "best top-1", "steps", "seconds", "params"):
        table.add_column(heading, justify="right")
    table.add_column("backbone", overflow="fold")
    for word, result in results.items():
        table.add_row(
            Text(word),
            _percent(result["top1"]),
            _percent(result["top5"]),
            _percent(result.get("top1_best")),
            str(result["steps"]),
            f"{result['seconds']:.1f}",
            f"{result['params'] / 1e6:.2f} M",
            Text(result["name"]),
        )
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
