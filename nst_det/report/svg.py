"""Figures as SVG inside a page, in the page's colors and font, with ids of their own."""

from __future__ import annotations

import io
import re
from pathlib import Path

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# drawn with these, shown in the page's variables: one figure is readable in dark and in light
INK, MUTED, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
METHOD_COLORS = [f"#0200{index:02x}" for index in range(10)]
CSS_COLORS = {
    **{INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", SURFACE: "var(--surface)"},
    **{color: f"var(--m{index})" for index, color in enumerate(METHOD_COLORS)},
}
STYLE = Path(__file__).parent / "templates" / "chart.mplstyle"


def new_axes(width: float, height: float) -> Axes:
    """Return an empty chart of ``width`` x ``height`` inches, 72 units of the page each; to be called in the style."""
    return Figure(figsize=(width, height)).add_subplot()


def to_svg(axes: Axes, name: str, label: str) -> Markup:
    """Return a chart as an ``<svg>`` element; ``name`` is unique on the page, ``label`` is for screen readers."""
    out = io.StringIO()
    # what one element refers to has an id made of its content and this salt
    with rc_context({"svg.hashsalt": name}):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        axes.figure.savefig(out, format="svg", metadata=no_metadata)  # type: ignore[union-attr]
    svg = out.getvalue()
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view, "matplotlib writes a viewBox"
    svg = svg[svg.index(">", view.end()) + 1 :].strip()
    # all other ids (axes_1) are those of every figure
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(?<= )(d|transform|x|y|points)="[^"]*"', _two_decimals, svg)
    svg = re.sub("|".join(CSS_COLORS), lambda match: CSS_COLORS[match[0]], svg)
    return Markup(f'<svg {view[0]} role="img" aria-label="{escape(label)}" class="figure">{svg}')


def _two_decimals(attribute: re.Match[str]) -> str:
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", attribute[0])
