"""Charts of AP by what is asked of a detection: precision over recall, overlap, size of the object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nst_det.report.charts import Look, new_figure, shorten
from nst_det.report.precision import RECALLS, Precision
from nst_det.report.rows import Results, Row
from nst_det.report.svg import STYLE, to_svg
from nst_det.report.tables import fraction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# inches; three stand side by side
SIZE = (3.5, 2.6)
# COCO's name of AP by size, and the size's own
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


def precision_panel(curves: Mapping[str, Precision], look: Mapping[str, Look], name: str, title: str) -> str:
    """Precision over recall, one line a method; an SVG.

    Args:
        curves: method to precision at :data:`~nst_det.report.precision.RECALLS`, (51,), 0..1.
        look: how each method is drawn.
        name: unique on the page.
        title: above the chart.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(*SIZE)
        for method, precision in curves.items():
            axes.plot(RECALLS, precision, color=look[method].color, ls=look[method].line, lw=1.5)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        if title:
            axes.set_title(shorten(title, 40))
        # what a reader of the words can use: how precise at half of the objects
        halves = [f"{method} {fraction(float(p[len(RECALLS) // 2]), 2)}" for method, p in curves.items()]
        label = f"Precision over recall, {title or 'mean over classes'}; at recall 0.5: {', '.join(halves)}"
        return to_svg(figure, name, label)


def overlap_chart(results: Results, look: Mapping[str, Look]) -> str | None:
    """mAP over the overlap that a detection needs, one line a row; an SVG, None where no row knows it."""
    import matplotlib

    rows = [row for row in results.rows if len(row.by_iou) > 1]
    if not rows:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(*SIZE)
        for row in rows:
            one = look[row.method]
            overlaps = sorted(row.by_iou)
            axes.plot(
                overlaps, [row.by_iou[iou] for iou in overlaps], color=one.color, ls=one.line, marker=one.marker, ms=3.5
            )
        _from_zero(axes)
        axes.set_xlabel("overlap (IoU) that a detection needs")
        axes.set_ylabel("mAP (11-point)")
        last = max(max(row.by_iou) for row in rows)
        parts = [f"{row.method} {fraction(row.map)} to {fraction(row.by_iou.get(last))}" for row in rows]
        return to_svg(figure, "overlap", f"mAP from IoU 0.5 to {last:g}: {', '.join(parts)}")


def size_chart(results: Results, look: Mapping[str, Look]) -> str | None:
    """COCO AP of small, medium and large objects, one mark a row; an SVG, None where no row knows it."""
    import matplotlib

    rows = [row for row in results.rows if any(key in row.coco for key in SIZES)]
    shown = [key for key in SIZES if any(key in row.coco for row in rows)]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(*SIZE)
        places = np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else np.zeros(1)
        for row, place in zip(rows, places):
            one = look[row.method]
            points = [(at + place, row.coco[key]) for at, key in enumerate(shown) if key in row.coco]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.vlines(xs, 0, ys, color=one.color, lw=1, alpha=0.5)
            axes.plot(xs, ys, one.marker, color=one.color, ms=6, mew=0)
        axes.set_xticks(range(len(shown)), [f"{SIZES[key]}\n{_count(rows, SIZES[key])}" for key in shown])
        axes.grid(axis="x", visible=False)
        _from_zero(axes)
        axes.set_ylabel("AP (COCO, IoU 0.5 to 0.95)")
        parts = [f"{row.method} {', '.join(f'{SIZES[k]} {fraction(row.coco.get(k))}' for k in shown)}" for row in rows]
        return to_svg(figure, "sizes", f"AP by size of the objects: {'; '.join(parts)}")


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, min(1.02, max(0.05, axes.get_ylim()[1])))


def _count(rows: Sequence[Row], size: str) -> str:
    count = next((int(row.objects[size]) for row in rows if size in row.objects), None)
    return "" if count is None else f"{count} object{'' if count == 1 else 's'}"
