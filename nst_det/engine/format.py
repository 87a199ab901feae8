"""Times and sizes in words, the size of a folder, and tables."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def duration(seconds: float) -> str:
    """A time, given in seconds, in words.

    Example:
        >>> duration(3725), duration(95)
        ('1 h 02 min', '1 min 35 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """A number of bytes in words.

    Example:
        >>> size(3 * 2**30), size(1000)
        ('3 GiB', '1000 B')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder and its folders; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink() and path.is_file())


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


class ReprMixin:
    """Base of a result with one table: ``rich.print(result)``, or the result as the last line of a notebook cell."""

    def __rich__(self) -> Table:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return table_html(self.__rich__())


# of a table that goes to a file or pipe: no cell is broken
PLAIN_WIDTH = 160


def print_table(table: Table | ReprMixin) -> None:
    """Print to standard output, as wide as the terminal, or as the table needs where that is none."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    console.print(table)


def table_html(table: Table) -> str:
    """A rich table of words and numbers as an HTML table.

    Example:
        >>> table = Table("row", title="mAP")
        >>> table.add_row("kd+nst-poly")
        >>> print(table_html(table))
        <table><caption>mAP</caption><thead><tr><th style="text-align:left">row</th></tr></thead><tbody>
        <tr><td style="text-align:left">kd+nst-poly</td></tr>
        </tbody></table>
    """
    aligned = [f' style="text-align:{column.justify}"' for column in table.columns]
    head = "".join(f"<th{style}>{_cell(column.header)}</th>" for style, column in zip(aligned, table.columns))
    rows = [
        "<tr>" + "".join(f"<td{style}>{_cell(cell)}</td>" for style, cell in zip(aligned, cells)) + "</tr>"
        for cells in zip(*(column.cells for column in table.columns))
    ]
    notes = [_cell(note) for note in (table.title, table.caption) if note]
    caption = f"<caption>{'<br>'.join(notes)}</caption>" if notes else ""
    return "\n".join([f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>", *rows, "</tbody></table>"])


def _cell(content: object) -> str:
    return escape(content.plain if isinstance(content, Text) else Text.from_markup(str(content)).plain)
