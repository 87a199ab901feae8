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

from nst_det.comparison.result import BASELINE, ComparisonResult
from nst_det.engine.metrics import TOTALS
from nst_det.report import charts, summary, tables
from nst_det.report.curves import read_precision, read_training
from nst_det.report.samples import SCORE_THRESHOLD, choose_samples
from nst_det.report.svg import css_color

# of the heat map from 0 to 1, and of a difference from -1 to 0 to 1
HEAT = ("#f7f9fc", "#bedbe8", "#68aecb", "#2674a0", "#0d3a63")
CHANGE = ("#9c2c1b", "#e69678", "#f8f7f5", "#78b4d7", "#125891")


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map; ``background`` and ``ink`` are CSS colors with at least 4.5:1 contrast."""

    text: str
    value: float | None
    background: str = "transparent"
    ink: str = "inherit"


def render_page(results: ComparisonResult, runs: Path) -> str:
    """Return the whole ``index.html``; run folders in ``results`` are relative to ``runs``."""
    environment = Environment(
        loader=PackageLoader("nst_det.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        {name: getattr(tables, name) for name in ("fraction", "signed", "interval_text", "MARKS")}
    )
    environment.filters.update(in_terms=in_terms, known=lambda value: "" if value is None else value)
    assert environment.loader is not None
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("style.css", "script.js"))
    look = charts.looks([row.method for row in results.rows])
    training, precision = read_training(results, runs), read_precision(results, runs)
    reach = charts.forest_reach(results)
    terms, levels = _by_own_names(training.distill_losses), _by_own_names(training.distill_levels)
    by_class = enumerate(precision.per_class.items())
    return environment.get_template("index.html").render(
        results=results,
        question=summary.QUESTION,
        conclusion=summary.conclusion(results),
        caveats=summary.caveats(results),
        paper=summary.against_paper(results),
        paper_order=summary.paper_order(results),
        columns=[column for column in tables.COLUMNS if column.title],
        legend=tables.legend(results),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        look=look,
        swatches={method: css_color(one.color) for method, one in look.items()},
        forest={row.method: charts.forest(row, reach) for row in results.rows},
        best=max((row.map for row in results.methods), default=None),
        bars=charts.map_bars(results, look),
        scatter=charts.top1_scatter(results, look),
        rank=_rank_correlation(results),
        heat=_heat(results, "per_class"),
        heat_area=_heat(results, "per_class_area"),
        changes=_changes(results),
        precision=charts.precision_panel(precision.mean, look, "precision") if precision.mean else None,
        precision_by_class=[charts.precision_panel(one, look, f"precision{n}", name) for n, (name, one) in by_class],
        overlap=charts.overlap_chart(results, look),
        sizes=charts.size_chart(results, look),
        coco=[row for row in results.rows if row.coco],
        checkpoints=summary.checkpoint_lines(results),
        balance=summary.term_shares(training),
        speeds=[
            (row.method, stage, speed)
            for row in results.rows
            for stage, speed in (("one", row.speed_backbone), ("two", row.speed_detector))
            if speed
        ],
        distill_terms=charts.term_panels(terms, "terms"),
        levels=charts.term_panels(levels, "levels"),
        distill_accuracy=charts.panels(training.distill_accuracy, look, "accuracy", log_scale=False),
        detect_losses=charts.panels(training.detect_losses, look, "loss", log_scale=True),
        detect_accuracy=charts.panels(training.detect_accuracy, look, "detector", log_scale=False),
        chosen=choose_samples(results, runs),
        threshold=SCORE_THRESHOLD,
        provenance=_flat(results.provenance),
        settings=_flat(results.settings),
    )


def in_terms(method: str) -> Markup:
    """Return a method's word, escaped, that a narrow column breaks before ``+`` or ``@`` and nowhere else.

    Example:
        >>> print(in_terms("kd@det"))
        <span class="whole">kd</span><wbr><span class="whole">@det</span>
    """
    parts = re.split(r"(?=[+@])", method)
    return Markup("<wbr>").join(Markup('<span class="whole">{}</span>').format(part) for part in parts)


def _by_own_names(curves: Mapping[str, Any]) -> dict[str, Any]:
    """Return terms without ``loss/`` or ``level/``; a sum of all of them would hide their balance."""
    named = {name.removeprefix("loss/").removeprefix("level/"): methods for name, methods in curves.items()}
    return {name: methods for name, methods in named.items() if name not in TOTALS}


def _rank_correlation(results: ComparisonResult) -> float | None:
    """Return Spearman's rank correlation of top-1 and mAP over rows; None with fewer than four or equal values."""
    from scipy import stats

    pairs = [(row.top1, row.map) for row in results.rows if row.top1 is not None]
    if len(pairs) < 4 or any(len(set(values)) < 2 for values in zip(*pairs)):
        return None
    return float(stats.spearmanr(*zip(*pairs)).statistic)


def _heat(results: ComparisonResult, key: str) -> list[tuple[str, list[Cell]]]:
    color = color_scale(HEAT)
    return [
        (name, [_cell(getattr(row, key).get(name), lambda ap: tables.fraction(ap, 2), color) for row in results.rows])
        for name in results.classes
    ]


def _changes(results: ComparisonResult) -> list[tuple[str, list[Cell]]]:
    """Return, per class, each row's AP less the baseline's; rows without the baseline itself."""
    baseline = results.row(BASELINE)
    assert baseline is not None, "every comparison has the row ce"
    others = [row.per_class for row in results.rows if row is not baseline]
    pairs = {name: [(one.get(name), baseline.per_class.get(name)) for one in others] for name in results.classes}
    values = {name: [None if a is None or b is None else a - b for a, b in line] for name, line in pairs.items()}
    largest = max((abs(value) for line in values.values() for value in line if value is not None), default=0.0) or 1.0
    color = color_scale(CHANGE)
    return [
        (
            name,
            [_cell(value, lambda v: tables.signed(v, 2), lambda v: color(0.5 + 0.5 * v / largest)) for value in line],
        )
        for name, line in values.items()
    ]


def _cell(value: float | None, text: Callable[[float], str], color: Callable[[float], tuple[str, str]]) -> Cell:
    return Cell(tables.MISSING, None) if value is None else Cell(text(value), value, *color(value))


def color_scale(colors: Sequence[str]) -> Callable[[float], tuple[str, str]]:
    """Return a function from 0..1 to a color between ``colors``, and to black or white, whichever is readable on it."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("", colors)

    def pick(value: float) -> tuple[str, str]:
        background = to_hex(scale(float(value)))
        light = luminance(background)
        return background, "#ffffff" if 1.05 / (light + 0.05) > (light + 0.05) / 0.05 else "#000000"

    return pick


def luminance(color: str) -> float:
    """Return the relative luminance of an sRGB color, 0..1 (WCAG 2).

    Example:
        >>> luminance("#ffffff"), luminance("#000000")
        (1.0, 0.0)
    """
    values = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in values)
    return round(0.2126 * red + 0.7152 * green + 0.0722 * blue, 12)


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested JSON as (dotted key, text) lines."""
    if isinstance(tree, Mapping):
        return [line for key, value in tree.items() for line in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(tree, list) and any(isinstance(item, Mapping | list) for item in tree):
        return [line for index, item in enumerate(tree) for line in _flat(item, f"{prefix}[{index}]")]
    text = ", ".join(map(str, tree)) if isinstance(tree, list) else "" if tree is None else str(tree)
    return [(prefix, text or tables.MISSING)]
