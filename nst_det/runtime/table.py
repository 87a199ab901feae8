"""A table as lines of plain text, for a log."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def text_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns side by side under their headings, as wide as their words.

    Example:
        >>> print(text_table(("term", "weight"), [("kd", "1"), ("nst-poly", "50")]))
         term       weight
        ───────────────────
         kd         1
         nst-poly   50
    """
    table = Table(*headings, box=SIMPLE_HEAD, show_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    # wider than any line, so that nothing is cut or folded
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))
