"""Times, sizes and tables as text."""

import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

GIB = 2**30
# of a table that goes to a file or pipe: no cell is broken
PLAIN_WIDTH = 160


def duration(seconds: float) -> str:
    """Return a time as ``1 h 02 min``, ``1 min 35 s`` or ``5 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """Return a number of bytes in its unit, such as ``3 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def bytes_below(folder: Path) -> int:
    """Return the bytes of all files in a folder and its folders; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink() and path.is_file())


def text_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return columns side by side under their headings, none cut or folded."""
    table = Table(*headings, box=SIMPLE_HEAD, show_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    file = io.StringIO()
    Console(file=file, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().split("\n"))


def print_table(table: RenderableType) -> None:
    """Print to standard output, as wide as the terminal, or as the table needs where that is none."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    console.print(table)
