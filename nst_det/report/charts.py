"""The charts of a report, drawn with matplotlib at the size of a phone so that they are readable everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from nst_det.comparison.result import BASELINE, MAP, MARKS, MEASURES, TOP1, ComparisonResult
from nst_det.engine.metrics import TOTALS
from nst_det.evaluation.thresholds import SCORES
from nst_det.report.analysis import RECALLS, Precision, RowAnalysis, precision_by_class
from nst_det.report.curves import Curve, Curves
from nst_det.report.deployed import Deployed
from nst_det.report.svg import CSS_COLORS, INK, METHOD_COLORS, MUTED, STYLE, SURFACE, new_axes, to_svg
from nst_det.report.tables import fraction

# inches: the two charts that are side by side, and those of which three are
WIDE, SMALL, CURVE = 4.7, (3.5, 2.6), (3.5, 2.2)
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vP"
# COCO's name of AP by size, and the size's own
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
# what a metric is called on the page
TITLES = {
    "val/top1": "top-1 accuracy",
    "val/top5": "top-5 accuracy",
    **{f"val/{key}": measure.name for key, measure in MEASURES.items()},
    "val/map": "mAP (11-point), validation split",
    "val/map_area": "mAP (area), validation split",
    "map": "mAP (11-point), test split",
    "map_area": "mAP (area), test split",
}
AXES = {MAP: "mAP at IoU 0.5 (11-point)", TOP1: "top-1 accuracy on the validation split"}
AXES |= {measure: measure.name for measure in MEASURES.values()}


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every chart."""

    color: str
    line: str
    marker: str = ""

    @property
    def css(self) -> str:
        """The color on the page."""
        return CSS_COLORS[self.color]

    @property
    def stroke(self) -> dict[str, Any]:
        """Arguments of a line in ``axes.plot``."""
        return {"color": self.color, "ls": self.line, "lw": 1.5}


Looks = Mapping[str, Look]


def method_looks(methods: Sequence[str]) -> dict[str, Look]:
    """Return a look for each: the baseline in ink, the marks in grey, each other method in a color of its own."""
    chosen = {BASELINE: Look(INK, "-", "o")}
    lines = (":", ":", ":", "-.", "--")
    chosen |= {mark: Look(MUTED, line, marker) for mark, line, marker in zip(MARKS, lines, "vPDX^")}
    for index, method in enumerate(method for method in methods if method not in chosen):
        turn, color = divmod(index, len(METHOD_COLORS))
        line = LINES[(turn + index % 2) % len(LINES)]
        chosen[method] = Look(METHOD_COLORS[color], line, MARKERS[index % len(MARKERS)])
    return {method: chosen[method] for method in methods}


def draw_charts(
    results: ComparisonResult,
    looks: Looks,
    distill: Mapping[str, Curves],
    detect: Mapping[str, Curves],
    analyses: Mapping[str, RowAnalysis],
) -> dict[str, Any]:
    """Return all charts of the page by name; None and empty lists where nothing is known."""
    precision = precision_by_class(analyses)
    methods = dict.fromkeys(method for curves in precision.values() for method in curves)
    mean = {method: np.mean([curves[method] for curves in precision.values()], axis=0) for method in methods}
    by_class = enumerate(precision.items())
    with rc_context(fname=STYLE):
        return {
            "bars": _score_bars(results, looks),
            "scatter": _top1_scatter(results, looks),
            "precision": _precision_panel(mean, looks, "precision") if mean else None,
            "precision_by_class": [_precision_panel(one, looks, f"precision{n}", name) for n, (name, one) in by_class],
            "f1": _f1_chart(analyses, looks),
            "overlap": _overlap_chart(results, looks),
            "sizes": _size_chart(results, looks),
            "distill_terms": _term_panels(distill["loss"], "terms"),
            "levels": _term_panels(distill["level"], "levels"),
            "distill_accuracy": _panels(distill["accuracy"], looks, "accuracy"),
            "detect_losses": _panels(detect["loss"], looks, "loss", log_scale=True),
            "detect_accuracy": _panels(detect["accuracy"], looks, "detector"),
        }


def shorten(name: str, length: int = 20) -> str:
    """Return a name that fits next to a chart."""
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1] + "…"


def _score_bars(results: ComparisonResult, looks: Looks) -> Markup:
    """Draw the score of each row as a bar, its spread over seeds as a whisker, each seed as a dot."""
    axes = new_axes(WIDE, 0.9 + 0.36 * len(results.rows))
    ends = []
    for at, row in enumerate(results.rows):
        color, seeds = looks[row.method].color, [one.score for one in row.per_seed.values()]
        axes.barh(at, row.score, height=0.62, color=color, alpha=0.3, linewidth=0)
        axes.errorbar(row.score, at, xerr=row.score_std, color=color, capsize=3.5, elinewidth=1.5)
        axes.plot(seeds, [at] * len(seeds), "o", color=color, markersize=3.6, mew=0, alpha=0.9)
        ends.append(max([row.score + (row.score_std or 0), *seeds]))
        text: Any = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "weight": "bold"}
        axes.annotate(fraction(row.score), (ends[-1], at), **text)
    axes.set_yticks(range(len(results.rows)), [shorten(row.method) for row in results.rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, min(max(max(ends) * 1.16, 0.05), 1.12)), xlabel=AXES[results.measure])
    axes.spines["left"].set_visible(False)
    values = ", ".join(f"{row.method} {fraction(row.score)}" for row in results.rows)
    return to_svg(axes, "bars", f"Bar chart of {results.measure.name} by method: {values}")


def _top1_scatter(results: ComparisonResult, looks: Looks) -> Markup | None:
    """Draw stage one's top-1 against the detector's mAP; None where fewer than two rows have both."""
    rows = [row for row in results.rows if row.top1 is not None and row.map is not None]
    if len(rows) < 2:
        return None
    # below the chart there is a line of the legend for three rows
    axes = new_axes(WIDE, 3.3 + 0.17 * (len(rows) // 3))
    for row in rows:
        look = looks[row.method]
        if len(row.seeds) > 1:
            points = [(seed.top1, seed.map) for seed in row.per_seed.values()]
            axes.plot(*zip(*points), look.marker, color=look.color, ms=3.5, alpha=0.5, mew=0)
        mean: Any = {"ms": 8, "mec": SURFACE, "mew": 1, "label": shorten(row.method)}
        axes.plot(row.top1 or 0.0, row.score, look.marker, color=look.color, **mean)
    axes.margins(0.08)
    axes.set(xlabel="top-1 accuracy of the backbone (stage one)", ylabel="mAP (11-point)")
    axes.figure.legend(loc="outside lower center", ncols=3, handletextpad=0.3)
    values = ", ".join(f"{row.method} {fraction(row.top1)} to {fraction(row.score)}" for row in rows)
    return to_svg(axes, "scatter", f"Scatter plot of top-1 accuracy against mAP: {values}")


def _panels(curves: Curves, looks: Looks, prefix: str, log_scale: bool = False) -> list[Markup]:
    """Draw each quantity over steps: one line a method, with a band from the lowest to the highest seed."""
    drawn = []
    for index, (quantity, methods) in enumerate(curves.items()):
        title = TITLES.get(quantity, quantity)
        axes = new_axes(*CURVE)
        for method, curve in methods.items():
            look = looks[method]
            marker = look.marker if len(curve.steps) < 8 else ""
            axes.plot(curve.steps, curve.mean, marker=marker, ms=3.5, **look.stroke)
            if np.any(curve.high > curve.low):
                axes.fill_between(curve.steps, curve.low, curve.high, color=look.color, alpha=0.12, linewidth=0)
        drawn.append(_finish_curves(axes, methods, f"{prefix}{index}", title, title, log_scale))
    return drawn


def _term_panels(curves: Curves, prefix: str) -> list[Markup]:
    """Draw all loss terms of each method on one logarithmic axis: their balance, which a sum of them would hide."""
    by_method: Curves = {}
    for name, methods in curves.items():
        if (term := name.removeprefix("loss/").removeprefix("level/")) not in TOTALS:
            for method, curve in methods.items():
                by_method.setdefault(method, {})[term] = curve
    drawn = []
    for index, (method, terms) in enumerate(by_method.items()):
        axes = new_axes(*CURVE)
        for number, (term, curve) in enumerate(terms.items()):
            look = Look(METHOD_COLORS[number % len(METHOD_COLORS)], LINES[number % len(LINES)])
            axes.plot(curve.steps, curve.mean, label=shorten(term), **look.stroke)
        axes.legend(handlelength=1.6, borderpad=0.1)
        drawn.append(_finish_curves(axes, terms, f"{prefix}{index}", method, f"Loss terms of {method}", True))
    return drawn


def _finish_curves(
    axes: Axes, curves: Mapping[str, Curve], name: str, title: str, what: str, log_scale: bool
) -> Markup:
    """Return a chart over steps, whose axis is logarithmic if it is wanted and all curves are above zero."""
    if log_scale and all(np.all(curve.low > 0) for curve in curves.values()):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1.0,) if high / low > 200 else (1.0, 3.0) if high / low > 10 else (1.0, 2.0, 3.0, 5.0, 7.0)
        # matplotlib's own labels are powers of ten, with mathematics in them
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("")
    axes.set(title=shorten(title, 40), xlabel="step")
    ends = ", ".join(f"{curve_name} ends at {curve.mean[-1]:.3g}" for curve_name, curve in curves.items())
    return to_svg(axes, name, f"{what} over training steps: {ends}")


def _precision_panel(curves: Mapping[str, Precision], looks: Looks, name: str, title: str = "") -> Markup:
    """Draw precision over recall, one line a method."""
    axes = new_axes(*SMALL)
    for method, precision in curves.items():
        axes.plot(RECALLS, precision, **looks[method].stroke)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=shorten(title, 40))
    # what a reader of the words can use: how precise at half of the objects
    halves = ", ".join(f"{method} {fraction(float(p[len(RECALLS) // 2]), 2)}" for method, p in curves.items())
    return to_svg(axes, name, f"Precision over recall, {title or 'mean over classes'}; at recall 0.5: {halves}")


def _f1_chart(analyses: Mapping[str, RowAnalysis], looks: Looks) -> Markup | None:
    """Draw F1 on the validation split over the score that a detection needs, one line a row; None without any."""
    curves = {method: row.f1 for method, row in analyses.items() if row.f1 is not None}
    if not curves:
        return None
    axes = new_axes(*SMALL)
    for method, f1 in curves.items():
        axes.plot(SCORES, f1, **looks[method].stroke)
    axes.set(xlim=(0, 1), xlabel="minimum score", ylabel="F1, mean over classes")
    _start_at_zero(axes)
    tops = [f"{name} {fraction(float(f1.max()), 2)} at {SCORES[f1.argmax()]:.2f}" for name, f1 in curves.items()]
    return to_svg(axes, "f1", f"F1 over the minimum score; the highest: {', '.join(tops)}")


def trade_chart(files: Mapping[str, Sequence[Deployed]], looks: Looks) -> Markup | None:
    """Draw mAP against the time an image, one mark a file in the color of its row; None where nothing was measured."""
    points = [
        (method, row, 1000 * row.latency["median"] / row.batch, row.map)
        for method, rows in files.items()
        for row in rows
        if row.map is not None
    ]
    if not points:
        return None
    with rc_context(fname=STYLE):
        axes = new_axes(WIDE, 3.3 + 0.17 * (len(points) // 2))
        for index, (method, row, milliseconds, ap) in enumerate(points):
            label = shorten(f"{row.name}{f', {row.batch} images' if row.batch > 1 else ''}", 26)
            name = f"{shorten(method, 12)}: {label}" if len(files) > 1 else label
            style: Any = {"color": looks[method].color, "ms": 7, "mec": SURFACE, "mew": 1, "label": name}
            axes.plot(milliseconds, ap, MARKERS[index % len(MARKERS)], **style)
        axes.margins(0.1)
        axes.set_xlim(left=0)
        axes.set(xlabel="milliseconds an image", ylabel="mAP (11-point)")
        axes.figure.legend(loc="outside lower center", ncols=2, handletextpad=0.3)
    values = ", ".join(f"{method} {row.name} {fraction(ap)} in {time:.1f} ms" for method, row, time, ap in points)
    return to_svg(axes, "trade", f"Scatter plot of milliseconds an image against mAP: {values}")


def _overlap_chart(results: ComparisonResult, looks: Looks) -> Markup | None:
    """Draw mAP over the overlap that a detection needs, one line a row; None where no row knows it."""
    known = {
        row.method: {float(iou): ap for iou, ap in row.map_by_iou.items() if ap is not None}
        for row in results.rows
        if len(row.map_by_iou) > 1
    }
    if not known:
        return None
    axes = new_axes(*SMALL)
    for method, points in known.items():
        axes.plot(list(points), list(points.values()), marker=looks[method].marker, ms=3.5, **looks[method].stroke)
    _start_at_zero(axes)
    axes.set(xlabel="overlap (IoU) that a detection needs", ylabel="mAP (11-point)")
    last = max(max(points) for points in known.values())
    ends = [f"{name} {fraction(points.get(0.5))} to {fraction(points.get(last))}" for name, points in known.items()]
    return to_svg(axes, "overlap", f"mAP from IoU 0.5 to {last:g}: {', '.join(ends)}")


def _size_chart(results: ComparisonResult, looks: Looks) -> Markup | None:
    """Draw COCO AP of small, medium and large objects, one mark a row; None where no row knows it."""
    shown = [key for key in SIZES if any(row.coco.get(key) is not None for row in results.rows)]
    rows = [row for row in results.rows if any(row.coco.get(key) is not None for key in shown)]
    if not rows:
        return None
    axes = new_axes(*SMALL)
    for row, place in zip(rows, np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else [0.0]):
        look = looks[row.method]
        xs, ys = zip(*[(at + place, ap) for at, key in enumerate(shown) if (ap := row.coco.get(key)) is not None])
        axes.vlines(xs, 0, ys, color=look.color, lw=1, alpha=0.5)
        axes.plot(xs, ys, look.marker, color=look.color, ms=6, mew=0)
    counts = [rows[0].objects.get(SIZES[key]) for key in shown]
    under = ["" if n is None else f"{n} object{'' if n == 1 else 's'}" for n in counts]
    axes.set_xticks(range(len(shown)), [f"{SIZES[key]}\n{text}" for key, text in zip(shown, under)])
    axes.grid(axis="x", visible=False)
    _start_at_zero(axes)
    axes.set_ylabel("AP (COCO, IoU 0.5 to 0.95)")
    values = [", ".join(f"{SIZES[key]} {fraction(row.coco.get(key))}" for key in shown) for row in rows]
    parts = "; ".join(f"{row.method} {text}" for row, text in zip(rows, values))
    return to_svg(axes, "sizes", f"AP by size of the objects: {parts}")


def _start_at_zero(axes: Axes) -> None:
    axes.set_ylim(0, min(1.02, max(0.05, axes.get_ylim()[1])))
