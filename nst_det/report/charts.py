"""The charts of a report, drawn with matplotlib at the size of a phone so that they are readable everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nst_det.comparison.result import BASELINE, MARKS, ComparisonResult, RowResult
from nst_det.report.curves import RECALLS, Curve, Curves, Precision
from nst_det.report.svg import INK, MUTED, SURFACE, method_color, new_axes, to_svg
from nst_det.report.tables import fraction, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# inches: the two charts that stand side by side, and those of which three do
WIDE, SMALL, CURVE = 4.7, (3.5, 2.6), (3.5, 2.2)
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vP"
# COCO's name of AP by size, and the size's own
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
# what a metric is called on the page
TITLES = {
    "val/top1": "top-1 accuracy",
    "val/top5": "top-5 accuracy",
    "val/map": "mAP (11-point), validation split",
    "val/map_area": "mAP (area), validation split",
    "map": "mAP (11-point), test split",
    "map_area": "mAP (area), test split",
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every chart."""

    color: str
    line: str
    marker: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """Return a look for each: the baseline in ink, the marks in grey, each other method in a color of its own."""
    chosen = {BASELINE: Look(INK, "-", "o")}
    chosen |= {mark: Look(MUTED, line, marker) for mark, line, marker in zip(MARKS, (":", "-.", "--"), "vX^")}
    for index, method in enumerate(method for method in methods if method not in chosen):
        line = LINES[(index // 10 + index % 2) % len(LINES)]
        chosen[method] = Look(method_color(index), line, MARKERS[index % len(MARKERS)])
    return {method: chosen[method] for method in methods}


def shorten(name: str, length: int = 20) -> str:
    """Return a name that fits beside a chart.

    Example:
        >>> shorten("a-very-long-method-name", 10)
        'a-very-lo…'
    """
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1] + "…"


def _svg(axes: Axes, name: str, label: str) -> str:
    return to_svg(axes.figure, name, label)  # type: ignore[arg-type]


def map_bars(results: ComparisonResult, look: Mapping[str, Look]) -> str:
    """Draw mAP of each row as a bar, its spread over seeds as a whisker, each seed as a dot."""
    with new_axes(WIDE, 0.9 + 0.36 * len(results.rows)) as axes:
        ends = []
        for at, row in enumerate(results.rows):
            color, seeds = look[row.method].color, [one.map for one in row.per_seed.values()]
            axes.barh(at, row.map, height=0.62, color=color, alpha=0.3, linewidth=0)
            axes.errorbar(row.map, at, xerr=row.map_std, color=color, capsize=3.5, elinewidth=1.5)
            axes.plot(seeds, [at] * len(seeds), "o", color=color, markersize=3.6, mew=0, alpha=0.9)
            ends.append(max([row.map + (row.map_std or 0), *seeds]))
            text: Any = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "weight": "bold"}
            axes.annotate(fraction(row.map), (ends[-1], at), **text)
        axes.set_yticks(range(len(results.rows)), [shorten(row.method) for row in results.rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, min(max(max(ends) * 1.16, 0.05), 1.12))
        axes.set_xlabel("mAP at IoU 0.5 (11-point)")
        axes.spines["left"].set_visible(False)
        parts = [f"{row.method} {fraction(row.map)}" for row in results.rows]
        return _svg(axes, "bars", f"Bar chart of mAP by method: {', '.join(parts)}")


def top1_scatter(results: ComparisonResult, look: Mapping[str, Look]) -> str | None:
    """Draw stage one's top-1 against the detector's mAP; None where fewer than two rows have a top-1."""
    rows = [row for row in results.rows if row.top1 is not None]
    if len(rows) < 2:
        return None
    # below the chart there is a line of the legend for three rows
    with new_axes(WIDE, 3.3 + 0.17 * (len(rows) // 3)) as axes:
        for row in rows:
            one = look[row.method]
            if len(row.seeds) > 1:
                points = [(seed.top1, seed.map) for seed in row.per_seed.values()]
                axes.plot(*zip(*points), one.marker, color=one.color, ms=3.5, alpha=0.5, mew=0)
            mean: Any = {"ms": 8, "mec": SURFACE, "mew": 1, "label": shorten(row.method)}
            axes.plot(row.top1 or 0.0, row.map, one.marker, color=one.color, **mean)
        axes.margins(0.08)
        axes.set_xlabel("top-1 accuracy of the backbone (stage one)")
        axes.set_ylabel("mAP (11-point)")
        axes.figure.legend(loc="outside lower center", ncols=3, handletextpad=0.3)
        parts = [f"{row.method} {fraction(row.top1)} to {fraction(row.map)}" for row in rows]
        return _svg(axes, "scatter", f"Scatter plot of top-1 accuracy against mAP: {', '.join(parts)}")


def _plot_curves(axes: Axes, curves: Mapping[str, Curve], title: str, log_scale: bool) -> str:
    """Finish a chart of curves over steps; returns where each ends, in words."""
    from matplotlib.ticker import LogLocator

    if log_scale and all(np.all(curve.low > 0) for curve in curves.values()):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1.0,) if high / low > 200 else (1.0, 3.0) if high / low > 10 else (1.0, 2.0, 3.0, 5.0, 7.0)
        # matplotlib's own labels are powers of ten, with mathematics in them
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_title(shorten(title, 40))
    axes.set_xlabel("step")
    return ", ".join(f"{name} ends at {curve.mean[-1]:.3g}" for name, curve in curves.items())


def panels(curves: Curves, look: Mapping[str, Look], prefix: str, log_scale: bool) -> list[str]:
    """Draw each quantity over steps: one line a method, with a band from the lowest to the highest seed."""
    drawn = []
    for index, (quantity, methods) in enumerate(curves.items()):
        title = TITLES.get(quantity, quantity)
        with new_axes(*CURVE) as axes:
            for method, curve in methods.items():
                one = look[method]
                marker = one.marker if len(curve.steps) < 8 else ""
                axes.plot(curve.steps, curve.mean, color=one.color, ls=one.line, lw=1.5, marker=marker, ms=3.5)
                if np.any(curve.high > curve.low):
                    axes.fill_between(curve.steps, curve.low, curve.high, color=one.color, alpha=0.12, linewidth=0)
            ends = _plot_curves(axes, methods, title, log_scale)
            drawn.append(_svg(axes, f"{prefix}{index}", f"{title} over training steps: {ends}"))
    return drawn


def term_panels(curves: Curves, prefix: str) -> list[str]:
    """Draw all loss terms of each method on one logarithmic axis: their balance."""
    by_method: dict[str, dict[str, Curve]] = {}
    for term, methods in curves.items():
        for method, curve in methods.items():
            by_method.setdefault(method, {})[term] = curve
    drawn = []
    for index, (method, terms) in enumerate(by_method.items()):
        with new_axes(*CURVE) as axes:
            for number, (term, curve) in enumerate(terms.items()):
                line: Any = {"ls": LINES[number % len(LINES)], "lw": 1.5, "label": shorten(term)}
                axes.plot(curve.steps, curve.mean, color=method_color(number), **line)
            ends = _plot_curves(axes, terms, method, log_scale=True)
            axes.legend(handlelength=1.6, borderpad=0.1)
            drawn.append(_svg(axes, f"{prefix}{index}", f"Loss terms of {method} over training steps: {ends}"))
    return drawn


def forest(row: RowResult, reach: float) -> str | None:
    """Draw a row's difference to ce with its interval on an axis from ``-reach`` to ``reach``, 120 units wide.

    An end of the interval beyond the axis is drawn as an arrow.
    """
    from markupsafe import Markup

    if reach <= 0:
        return None

    def at(value: float) -> float:
        return round(60 + 54 * max(-1.0, min(1.0, value / reach)), 2)

    label = f"difference {signed(row.delta_vs_ce)}"
    parts = ['<line x1="60" y1="0" x2="60" y2="20" class="zero"/>']
    if row.delta_interval is not None:
        low, high = row.delta_interval
        label += f", interval {signed(low)} to {signed(high)}"
        parts.append(f'<line x1="{at(low)}" y1="10" x2="{at(high)}" y2="10" class="reach"/>')
        parts += ['<path d="M9 6 L4 10 L9 14" class="arrow"/>'] if low < -reach else []
        parts += ['<path d="M111 6 L116 10 L111 14" class="arrow"/>'] if high > reach else []
    parts.append(f'<circle cx="{at(row.delta_vs_ce)}" cy="10" r="4"/>')
    return Markup(f'<svg class="forest" viewBox="0 0 120 20" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def forest_reach(results: ComparisonResult) -> float:
    """Return half the axis of all forest plots: it holds every difference, and intervals up to twice the largest."""
    largest = max(abs(row.delta_vs_ce) for row in results.rows)
    ends = [abs(end) for row in results.rows for end in row.delta_interval or ()]
    return max(largest, min(max(ends, default=0.0), 2 * largest)) * 1.05


def precision_panel(curves: Mapping[str, Precision], look: Mapping[str, Look], name: str, title: str = "") -> str:
    """Draw precision over recall, one line a method."""
    with new_axes(*SMALL) as axes:
        for method, precision in curves.items():
            axes.plot(RECALLS, precision, color=look[method].color, ls=look[method].line, lw=1.5)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=shorten(title, 40))
        # what a reader of the words can use: how precise at half of the objects
        halves = [f"{method} {fraction(float(p[len(RECALLS) // 2]), 2)}" for method, p in curves.items()]
        label = f"Precision over recall, {title or 'mean over classes'}; at recall 0.5: {', '.join(halves)}"
        return _svg(axes, name, label)


def overlap_chart(results: ComparisonResult, look: Mapping[str, Look]) -> str | None:
    """Draw mAP over the overlap that a detection needs, one line a row; None where no row knows it."""
    known = {
        row.method: {float(iou): ap for iou, ap in row.map_by_iou.items() if ap is not None}
        for row in results.rows
        if len(row.map_by_iou) > 1
    }
    if not known:
        return None
    with new_axes(*SMALL) as axes:
        for method, points in known.items():
            one = look[method]
            axes.plot(list(points), list(points.values()), color=one.color, ls=one.line, marker=one.marker, ms=3.5)
        _from_zero(axes)
        axes.set(xlabel="overlap (IoU) that a detection needs", ylabel="mAP (11-point)")
        last = max(max(points) for points in known.values())
        ends = [f"{name} {fraction(points.get(0.5))} to {fraction(points.get(last))}" for name, points in known.items()]
        return _svg(axes, "overlap", f"mAP from IoU 0.5 to {last:g}: {', '.join(ends)}")


def size_chart(results: ComparisonResult, look: Mapping[str, Look]) -> str | None:
    """Draw COCO AP of small, medium and large objects, one mark a row; None where no row knows it."""
    shown = [key for key in SIZES if any(row.coco.get(key) is not None for row in results.rows)]
    rows = [row for row in results.rows if any(row.coco.get(key) is not None for key in shown)]
    if not rows:
        return None
    with new_axes(*SMALL) as axes:
        for row, place in zip(rows, np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else [0.0]):
            one = look[row.method]
            points = [(at + place, ap) for at, key in enumerate(shown) if (ap := row.coco.get(key)) is not None]
            xs, ys = zip(*points)
            axes.vlines(xs, 0, ys, color=one.color, lw=1, alpha=0.5)
            axes.plot(xs, ys, one.marker, color=one.color, ms=6, mew=0)
        counts = [rows[0].objects.get(SIZES[key]) for key in shown]
        under = ["" if n is None else f"{n} object{'' if n == 1 else 's'}" for n in counts]
        axes.set_xticks(range(len(shown)), [f"{SIZES[key]}\n{text}" for key, text in zip(shown, under)])
        axes.grid(axis="x", visible=False)
        _from_zero(axes)
        axes.set_ylabel("AP (COCO, IoU 0.5 to 0.95)")
        parts = [f"{row.method} {', '.join(f'{SIZES[k]} {fraction(row.coco.get(k))}' for k in shown)}" for row in rows]
        return _svg(axes, "sizes", f"AP by size of the objects: {'; '.join(parts)}")


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, min(1.02, max(0.05, axes.get_ylim()[1])))
