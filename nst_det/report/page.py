"""The page: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap, to_hex
from scipy import stats

from nst_det.comparison.result import TEACHER, ComparisonResult, RowResult
from nst_det.evaluation.errors import KINDS
from nst_det.evaluation.thresholds import DEFAULT
from nst_det.report import charts, deployed, summary, tables
from nst_det.report.analysis import RowAnalysis, count_data, read_analyses
from nst_det.report.curves import Curves
from nst_det.report.samples import choose_samples

# of the heat map from 0 to 1, and of a difference from -1 to 0 to 1
HEAT = ("#f7f9fc", "#bedbe8", "#68aecb", "#2674a0", "#0d3a63")
CHANGE = ("#9c2c1b", "#e69678", "#f8f7f5", "#78b4d7", "#125891")


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map; ``background`` and ``ink`` are CSS colors with at least 4.5:1 contrast."""

    text: str = tables.MISSING
    value: float | str = ""
    background: str = "transparent"
    ink: str = "inherit"


def render_page(
    results: ComparisonResult, runs: Path, distill: dict[str, Curves], detect: dict[str, Curves], untold: Sequence[str]
) -> str:
    """Return the whole ``index.html``; run folders in ``results`` are relative to ``runs``."""
    environment = Environment(
        loader=PackageLoader("nst_det.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        {name: getattr(tables, name) for name in ("fraction", "signed", "interval_text", "legend", "MARKS", "UNTOLD")}
    )
    environment.filters.update(in_terms=in_terms, flat=flat, count=count)
    environment.filters["known"] = lambda value: "" if value is None else value
    assert environment.loader is not None
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("style.css", "script.js"))
    looks = charts.method_looks([row.method for row in results.rows])
    analyses, files = read_analyses(results, runs), deployed.deployed_rows(results, runs)
    leader = results.leader.method if results.leader else results.baseline
    return environment.get_template("index.html").render(
        results=results,
        summary=summary,
        untold=untold,
        columns=sorted((one for one in tables.columns_of(results) if one.title), key=lambda one: not one.to_imagenet),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        looks=looks,
        reach=_forest_reach(results),
        best=max((row.score for row in results.rows if row.method != TEACHER), default=None),
        rank=_rank_correlation(results),
        ap_cell=lambda row, name: _heat_cell(row.per_class.get(name)),
        area_cell=lambda row, name: _heat_cell(row.per_class_area.get(name)),
        change_cell=_change_cells(results),
        coco=[row for row in results.rows if row.coco],
        checkpoints=summary.checkpoint_lines(results),
        balance=summary.term_shares(distill["loss"], detect["loss"]),
        speeds=[
            (row.method, stage, speed)
            for row in results.rows
            for stage, speed in (("one", row.speed_backbone), ("two", row.speed_detector))
            if speed
        ],
        chosen=choose_samples(results, runs),
        threshold=DEFAULT,
        analyses=analyses,
        kinds=KINDS,
        shown=[row for row in dict.fromkeys((leader, results.baseline)) if row in analyses],
        confusion_cell=_confusion_cell,
        thresholds=_threshold_lines(analyses.get(leader)),
        data=count_data(results, runs),
        deployed=files,
        deployed_columns=deployed.COLUMNS,
        deployed_lines=deployed.lines,
        deployed_conditions=deployed.conditions,
        trade=charts.trade_chart(files, looks),
        **charts.draw_charts(results, looks, distill, detect, analyses),
    )


def in_terms(method: str) -> Markup:
    """Return a method's name, escaped, that a narrow column breaks before ``+`` or ``@`` and nowhere else.

    Example:
        >>> print(in_terms("kd@det"))
        <span class="whole">kd</span><wbr><span class="whole">@det</span>
    """
    parts = re.split(r"(?=[+@])", method)
    return Markup("<wbr>").join(Markup('<span class="whole">{}</span>').format(part) for part in parts)


def _forest_reach(results: ComparisonResult) -> float:
    """Return half the axis of all forest plots: it holds every difference, and intervals up to twice the largest."""
    largest = max(abs(row.delta_vs_ce) for row in results.rows)
    ends = [abs(end) for row in results.rows for end in row.delta_interval or ()]
    return max(largest, min(max(ends, default=0.0), 2 * largest)) * 1.05


def _rank_correlation(results: ComparisonResult) -> float | None:
    """Return Spearman's rank correlation of top-1 and mAP over rows; None with fewer than four or equal values."""
    pairs = [(row.top1, row.map) for row in results.rows if row.top1 is not None and row.map is not None]
    if len(pairs) < 4 or any(len(set(values)) < 2 for values in zip(*pairs)):
        return None
    return float(stats.spearmanr(*zip(*pairs)).statistic)


def _heat_cell(ap: float | None) -> Cell:
    return Cell() if ap is None else Cell(tables.fraction(ap, 2), ap, *readable(ap, HEAT))


def _confusion_cell(row: RowAnalysis, true: int, predicted: int) -> Cell:
    """Return a cell of the confusion matrix, colored by its share of its line."""
    value, whole = float(row.confusion[true, predicted]), float(row.confusion[true].sum())
    return Cell(count(value), value, *readable(value / whole, HEAT)) if value else Cell("·", 0.0)


def _threshold_lines(row: RowAnalysis | None) -> list[tuple[str, list[str], float]]:
    """Return (class, least score of each seed, mean F1 there) of the classes that all seeds know."""
    seeds = row.thresholds if row else []
    names = [name for name in seeds[0] if all(name in seed for seed in seeds)] if seeds else []
    by_class = {name: [seed[name] for seed in seeds] for name in names}
    return [
        (name, [f"{one.score:.2f}" for one in known], sum(one.f1 for one in known) / len(known))
        for name, known in by_class.items()
    ]


def count(value: float) -> str:
    """Return a number of things, or a mean of such numbers.

    Example:
        >>> count(12.0), count(12.345)
        ('12', '12.3')
    """
    return f"{value:.1f}".removesuffix(".0")


def _change_cells(results: ComparisonResult) -> Callable[[RowResult, str], Cell]:
    """Return what makes the cell of a row and a class: the row's AP less the baseline's."""
    baseline = results.row(results.baseline)
    assert baseline is not None, "every comparison has a row that the others are compared with"

    def change(row: RowResult, name: str) -> float | None:
        ap, ap_of_baseline = row.per_class.get(name), baseline.per_class.get(name)
        return None if ap is None or ap_of_baseline is None else ap - ap_of_baseline

    changes = [change(row, name) for row in results.rows for name in results.classes]
    largest = max((abs(value) for value in changes if value is not None), default=0.0) or 1.0

    def cell(row: RowResult, name: str) -> Cell:
        value = change(row, name)
        if value is None:
            return Cell()
        return Cell(tables.signed(value, 2), value, *readable(0.5 + 0.5 * value / largest, CHANGE))

    return cell


def readable(value: float, colors: Sequence[str]) -> tuple[str, str]:
    """Return the color at 0..1 between ``colors``, and black or white, whichever is readable on it."""
    background = to_hex(LinearSegmentedColormap.from_list("", colors)(float(value)))
    light = luminance(background)
    return background, "#ffffff" if 1.05 / (light + 0.05) > (light + 0.05) / 0.05 else "#000000"


def luminance(color: str) -> float:
    """Return the relative luminance of an sRGB color, 0..1 (WCAG 2)."""
    values = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in values)
    return round(0.2126 * red + 0.7152 * green + 0.0722 * blue, 12)


def flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested JSON as (dotted key, text) lines."""
    if isinstance(tree, Mapping):
        return [line for key, value in tree.items() for line in flat(value, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(tree, list) and any(isinstance(item, Mapping | list) for item in tree):
        return [line for index, item in enumerate(tree) for line in flat(item, f"{prefix}[{index}]")]
    text = ", ".join(map(str, tree)) if isinstance(tree, list) else "" if tree is None else str(tree)
    return [(prefix, text or tables.MISSING)]
