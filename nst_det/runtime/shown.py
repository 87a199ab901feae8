"""Results that show themselves as a table, on a terminal and in a notebook."""

from __future__ import annotations

from html import escape

from rich.table import Table
from rich.text import Text


class Shown:
    """Base of a result with one table: ``rich.print(result)``, or the result as the last line of a notebook cell."""

    def __rich__(self) -> Table:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return table_html(self.__rich__())


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
