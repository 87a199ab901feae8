"""Figures as SVG that lives inside a page: it takes the page's colors and font, and has names of its own.

A figure is drawn with placeholder colors; in the SVG they become CSS variables, so that one figure is readable
in dark and in light.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
_NAMED = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", SURFACE: "var(--surface)"}
# as many as style.css has --m0, --m1, ...
METHOD_COLORS = 10

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "axes.unicode_minus": True,
}


def method_color(index: int) -> str:
    """Return the placeholder color of the method at ``index``; the page decides how it looks."""
    return f"#0200{index % METHOD_COLORS:02x}"


def css_color(placeholder: str) -> str:
    """Return what the page makes of a placeholder color.

    Example:
        >>> css_color("#020003")
        'var(--m3)'
    """
    return _NAMED.get(placeholder) or f"var(--m{int(placeholder[5:], 16)})"


@contextmanager
def new_axes(width: float, height: float) -> Iterator[Axes]:
    """Give an empty chart of ``width`` x ``height`` inches (72 units of the page each), to be drawn on in the block."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height)).add_subplot()


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an ``<svg>`` element.

    Args:
        figure: drawn with the placeholder colors of this module under :data:`STYLE`.
        name: unique on the page; all ids in the SVG begin with it.
        label: what the figure shows, in words, for screen readers.
    """
    import matplotlib
    from markupsafe import Markup, escape

    out = io.StringIO()
    context: Any = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(context):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # matplotlib writes names of glyph-less text as comments, and ids that are those of every other figure
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = re.sub(r'(?<= )(d|transform|x|y|points)="[^"]*"', _shorten, svg)
    svg = re.sub(r"#01010[1-4]|#0200[0-9a-f]{2}", lambda match: css_color(match[0]), svg)
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view, "matplotlib writes a viewBox"
    head = f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(label)}" class="figure">'
    return Markup(head + svg[svg.index(">") + 1 :].strip())


def _shorten(attribute: re.Match[str]) -> str:
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", attribute[0])
