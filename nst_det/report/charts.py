"""The charts of a report, drawn with matplotlib at the size of a phone so that they are readable everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nst_det.report.curves import Curve, Curves
from nst_det.report.precision import RECALLS, Precision
from nst_det.report.schema import BASELINE, LOWER_MARK, NO_FPN, UPPER_MARK, Results, Row
from nst_det.report.svg import INK, MUTED, STYLE, SURFACE, method_color, to_svg
from nst_det.report.tables import fraction, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.7
LABEL_LENGTH = 20
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vP"
# line and marker of the rows that no transfer method made
MARKS = {LOWER_MARK: (":", "v"), UPPER_MARK: ("--", "^"), NO_FPN: ("-.", "X")}
# inches; three stand side by side
SIZE = (3.5, 2.6)
# COCO's name of AP by size, and the size's own
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every chart."""

    color: str
    line: str
    marker: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A look for each method: the baseline in ink, the marks in grey, each other one in a color of its own."""
    chosen: dict[str, Look] = {}
    index = 0
    for method in methods:
        if method == BASELINE:
            chosen[method] = Look(INK, "-", "o")
        elif method in MARKS:
            chosen[method] = Look(MUTED, *MARKS[method])
        else:
            line = LINES[(index // 10 + index % 2) % len(LINES)]
            chosen[method] = Look(method_color(index), line, MARKERS[index % len(MARKERS)])
            index += 1
    return chosen


def shorten(name: str, length: int = LABEL_LENGTH) -> str:
    """A name that fits beside a chart.

    Example:
        >>> shorten("a-very-long-method-name", 10)
        'a-very-lo…'
    """
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1] + "…"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of ``width`` x ``height`` inches (72 units of the page each) with one empty chart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def map_bars(results: Results) -> str:
    """mAP of each row as a bar, its spread over seeds as a whisker, each seed as a dot."""
    import matplotlib

    look = looks([row.method for row in results.rows])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDTH, 0.9 + 0.36 * len(results.rows))
        for at, row in enumerate(results.rows):
            axes.barh(at, row.map, height=0.62, color=look[row.method].color, alpha=0.3, linewidth=0)
            if row.map_std is not None:
                axes.errorbar(row.map, at, xerr=row.map_std, color=look[row.method].color, capsize=3.5, elinewidth=1.5)
            seeds = [run.map for run in row.runs]
            axes.plot(seeds, [at] * len(seeds), "o", color=look[row.method].color, markersize=3.6, mew=0, alpha=0.9)
            end = max([row.map + (row.map_std or 0), *seeds])
            axes.annotate(
                fraction(row.map), (end, at), (6, 0), textcoords="offset points", va="center", weight="bold", color=INK
            )
        axes.set_yticks(range(len(results.rows)), [shorten(row.method) for row in results.rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        highest = max(row.map + (row.map_std or 0) for row in results.rows)
        axes.set_xlim(0, min(max(highest * 1.16, 0.05), 1.12))
        axes.set_xlabel("mAP at IoU 0.5 (11-point)")
        axes.spines["left"].set_visible(False)
        parts = [f"{row.method} {fraction(row.map)}" for row in results.rows]
        return to_svg(figure, "bars", f"Bar chart of mAP by method: {', '.join(parts)}")


def top1_scatter(results: Results) -> str | None:
    """Stage one's top-1 against the detector's mAP; None where fewer than two rows have a top-1."""
    import matplotlib

    rows = [row for row in results.rows if row.top1 is not None]
    if len(rows) < 2:
        return None
    look = looks([row.method for row in results.rows])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDTH, 3.4)
        for row in rows:
            one = look[row.method]
            dots = [run for run in row.runs if run.top1 is not None]
            if len(dots) > 1:
                xs = [run.top1 or 0.0 for run in dots]
                axes.plot(xs, [run.map for run in dots], one.marker, color=one.color, ms=3.5, alpha=0.5, mew=0)
            axes.plot([row.top1 or 0.0], [row.map], one.marker, color=one.color, ms=8, mec=SURFACE, mew=1)
        axes.margins(0.14)
        axes.set_xlabel("top-1 accuracy of the backbone (stage one)")
        axes.set_ylabel("mAP (11-point)")
        seeds = [(run.top1, run.map) for row in rows for run in row.runs if run.top1 is not None]
        labels = [Label(row.top1 or 0.0, row.map, shorten(row.method), look[row.method].color) for row in rows]
        _place_labels(figure, axes, labels, seeds)
        parts = [f"{row.method} {fraction(row.top1)} to {fraction(row.map)}" for row in rows]
        return to_svg(figure, "scatter", f"Scatter plot of top-1 accuracy against mAP: {', '.join(parts)}")


# where a label may stand beside its point: offset in points, and the side that it is aligned at; the best first
PLACES = (
    *((9, 0, "left"), (-9, 0, "right"), (0, 11, "center"), (0, -11, "center"), (9, 12, "left"), (9, -12, "left")),
    *((-9, 12, "right"), (-9, -12, "right"), (12, 22, "left"), (12, -22, "left"), (-12, 22, "right")),
    *((-12, -22, "right"), (16, 34, "left"), (16, -34, "left"), (-16, 34, "right"), (-16, -34, "right")),
    *((20, 48, "left"), (20, -48, "left"), (-20, 48, "right"), (24, 62, "left"), (-24, 62, "right")),
)


@dataclass(frozen=True)
class Label:
    """A name for the point (x, y) of a chart."""

    x: float
    y: float
    text: str
    color: str


def _place_labels(figure: Figure, axes: Axes, labels: Sequence[Label], others: Sequence[tuple[float, float]]) -> None:
    """Label points beside, above or below them, where the label is near no other point and covers no label."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    # the layout stays as it was when the places were chosen
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels = [axes.transData.transform(point) for point in [*((label.x, label.y) for label in labels), *others]]
    frame = axes.get_window_extent(renderer)
    taken: list[Any] = []
    for label in labels:
        best: tuple[int, Any, Any] | None = None
        for dx, dy, align in PLACES:
            text = axes.annotate(
                label.text,
                (label.x, label.y),
                (dx, dy),
                textcoords="offset points",
                ha=align,
                va="center",
                fontsize=8.5,
                color=label.color,
                arrowprops={"arrowstyle": "-", "lw": 0.7, "color": label.color} if abs(dy) > 20 else None,
            )
            text.update_positions(renderer)
            # the words alone, without the line to the point
            box = Text.get_window_extent(text, renderer)
            near = box.padded(4)
            hits = 3 * sum(box.overlaps(other) for other in taken) + sum(
                bool(near.contains(*pixel)) for pixel in pixels
            )
            hits += 2 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            if best is None or hits < best[0]:
                if best is not None:
                    best[1].remove()
                best = (hits, text, box)
            else:
                text.remove()
            if best[0] == 0:
                break
        assert best is not None
        taken.append(best[2])


def curve_panel(curves: Mapping[str, Curve], look: Mapping[str, Look], name: str, title: str, log_scale: bool) -> str:
    """One quantity over steps: one line a method, with a band from the lowest to the highest seed."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.5, 2.2)
        for method, curve in curves.items():
            color = look[method].color
            marker = look[method].marker if len(curve.steps) < 8 else ""
            axes.plot(curve.steps, curve.mean, color=color, ls=look[method].line, lw=1.5, marker=marker, ms=3.5)
            if np.any(curve.high > curve.low):
                axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
        if log_scale and all(np.all(curve.low > 0) for curve in curves.values()):
            axes.set_yscale("log")
            _plain_log_ticks(axes)
        axes.set_title(shorten(title, 40))
        axes.set_xlabel("step")
        ends = [f"{method} ends at {curve.mean[-1]:.3g}" for method, curve in curves.items()]
        return to_svg(figure, name, f"{title} over training steps: {', '.join(ends)}")


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    subs = (1.0,) if high / low > 200 else (1.0, 3.0) if high / low > 10 else (1.0, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def term_panel(terms: Mapping[str, Curve], name: str, method: str) -> str:
    """All loss terms of one method on one logarithmic axis: their balance."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.5, 2.2)
        for index, (term, curve) in enumerate(terms.items()):
            color = method_color(index)
            axes.plot(curve.steps, curve.mean, color=color, lw=1.5, ls=LINES[index % len(LINES)], label=shorten(term))
        if all(np.all(curve.mean > 0) for curve in terms.values()):
            axes.set_yscale("log")
            _plain_log_ticks(axes)
        axes.set_title(shorten(method, 40))
        axes.set_xlabel("step")
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, handlelength=1.6, borderpad=0.1)
        ends = [f"{term} ends at {curve.mean[-1]:.3g}" for term, curve in terms.items()]
        return to_svg(figure, name, f"Loss terms of {method} over training steps: {', '.join(ends)}")


# what a metric is called on the page
TITLES = {
    "val/top1": "top-1 accuracy",
    "val/top5": "top-5 accuracy",
    "val/map": "mAP (11-point), validation split",
    "val/map_area": "mAP (area), validation split",
    "map": "mAP (11-point), test split",
    "map_area": "mAP (area), test split",
}


def panels(curves: Curves, look: Mapping[str, Look], prefix: str, log_scale: bool) -> list[str]:
    """A :func:`curve_panel` for each quantity."""
    return [
        curve_panel(methods, look, f"{prefix}{index}", TITLES.get(quantity, quantity), log_scale)
        for index, (quantity, methods) in enumerate(curves.items())
    ]


def term_panels(curves: Curves, prefix: str) -> list[str]:
    """A :func:`term_panel` for each method, in the order in which methods first appear."""
    by_method: dict[str, dict[str, Curve]] = {}
    for term, methods in curves.items():
        for method, curve in methods.items():
            by_method.setdefault(method, {})[term] = curve
    return [term_panel(terms, f"{prefix}{index}", method) for index, (method, terms) in enumerate(by_method.items())]


def forest(row: Row, reach: float) -> str | None:
    """A row's difference to ce with its interval on an axis from ``-reach`` to ``reach``; an SVG 120 units wide.

    An end of the interval beyond the axis is drawn as an arrow.
    """
    from markupsafe import Markup, escape

    if row.delta is None or reach <= 0:
        return None

    def at(value: float) -> float:
        return round(60 + 54 * max(-1.0, min(1.0, value / reach)), 2)

    middle = at(row.delta)
    label = f"difference {signed(row.delta)}"
    parts = ['<line x1="60" y1="0" x2="60" y2="20" class="zero"/>']
    if row.interval is not None:
        low, high = row.interval
        label += f", interval {signed(low)} to {signed(high)}"
        parts.append(f'<line x1="{at(low)}" y1="10" x2="{at(high)}" y2="10" class="reach"/>')
        if low < -reach:
            parts.append('<path d="M9 6 L4 10 L9 14" class="arrow"/>')
        if high > reach:
            parts.append('<path d="M111 6 L116 10 L111 14" class="arrow"/>')
    parts.append(f'<circle cx="{middle}" cy="10" r="4"/>')
    body = Markup("".join(parts))
    return Markup(f'<svg class="forest" viewBox="0 0 120 20" role="img" aria-label="{escape(label)}">{body}</svg>')


def forest_reach(results: Results) -> float:
    """Half the axis of all :func:`forest` plots: it holds every difference, and intervals up to twice the largest."""
    deltas = [abs(row.delta) for row in results.rows if row.delta is not None]
    ends = [abs(end) for row in results.rows if row.interval for end in row.interval]
    largest = max(deltas, default=0.0)
    return max(largest, min(max(ends, default=0.0), 2 * largest)) * 1.05


if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
