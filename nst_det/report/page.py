"""The page: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nst_det.engine.metrics import TOTALS
from nst_det.report import charts, tables
from nst_det.report import charts as ap_charts
from nst_det.report import summary as sentences
from nst_det.report.curves import read_training
from nst_det.report.precision import read_precision
from nst_det.report.samples import SCORE_THRESHOLD, choose_samples
from nst_det.report.schema import BASELINE, Results, Row
from nst_det.report.summary import term_shares

# (red, green, blue) of the heat map from 0 to 1, and of a difference from -1 to 0 to 1
HEAT = ((247, 249, 252), (190, 219, 232), (104, 174, 203), (38, 116, 160), (13, 58, 99))
CHANGE = ((156, 44, 27), (230, 150, 120), (248, 247, 245), (120, 180, 215), (18, 88, 145))


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map; ``background`` and ``ink`` are CSS colors with at least 4.5:1 contrast."""

    text: str
    value: float | None
    background: str
    ink: str


def render_page(results: Results) -> str:
    """The whole ``index.html``."""
    environment = Environment(
        loader=PackageLoader("nst_det.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    environment.globals.update(
        fraction=tables.fraction,
        signed=tables.signed,
        interval=tables.interval_text,
        count=tables.count_text,
        flops=tables.flops_text,
        latency=tables.latency_text,
        seconds=tables.seconds_text,
        marks=tables.MARKS,
    )
    environment.filters["in_terms"] = in_terms
    style, script = (_source(environment, name) for name in ("style.css", "script.js"))
    look = charts.looks([row.method for row in results.rows])
    training = read_training(results)
    reach = charts.forest_reach(results)
    scatter = charts.top1_scatter(results)
    precision = read_precision(results)
    return environment.get_template("index.html").render(
        results=results,
        question=sentences.QUESTION,
        conclusion=sentences.conclusion(results),
        caveats=sentences.caveats(results),
        paper=sentences.against_paper(results),
        paper_order=sentences.paper_order(results),
        legend=tables.legend(results),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        look=look,
        swatches={method: _css(one.color) for method, one in look.items()},
        forest={row.method: charts.forest(row, reach) for row in results.rows},
        best=max((row.map for row in results.rows if row.is_method), default=None),
        bars=Markup(charts.map_bars(results)),
        scatter=_optional(scatter),
        rank=_rank_correlation(results),
        heat=_heat(results, "per_class"),
        heat_area=_heat(results, "per_class_area"),
        changes=_changes(results),
        precision=_optional(
            ap_charts.precision_panel(precision.mean, look, "precision", "") if precision.mean else None
        ),
        precision_reason=precision.reason,
        precision_by_class=_markup(
            [
                ap_charts.precision_panel(curves, look, f"precision{index}", name)
                for index, (name, curves) in enumerate(precision.per_class.items())
            ]
        ),
        overlap=_optional(ap_charts.overlap_chart(results, look)),
        sizes=_optional(ap_charts.size_chart(results, look)),
        coco=[row for row in results.rows if row.coco],
        checkpoints=sentences.checkpoint_lines(results),
        balance=term_shares(training),
        speeds=[
            (row.method, stage, speed)
            for row in results.rows
            for stage, speed in (("one", row.speed_backbone), ("two", row.speed_detector))
            if speed
        ],
        distill_terms=_markup(charts.term_panels(_without_totals(training.distill_losses), "terms")),
        levels=_markup(charts.term_panels(_without_prefix(training.distill_levels), "levels")),
        distill_accuracy=_markup(charts.panels(training.distill_accuracy, look, "accuracy", log_scale=False)),
        detect_losses=_markup(charts.panels(training.detect_losses, look, "loss", log_scale=True)),
        detect_accuracy=_markup(charts.panels(training.detect_accuracy, look, "detector", log_scale=False)),
        chosen=choose_samples(results),
        threshold=SCORE_THRESHOLD,
        provenance=_flat(results.provenance),
        settings=_flat(results.settings),
    )


def in_terms(method: str) -> Markup:
    """A method's word, escaped, that a narrow column breaks before ``+`` or ``@`` and nowhere else.

    Example:
        >>> print(in_terms("kd@det"))
        <span class="whole">kd</span><wbr><span class="whole">@det</span>
    """
    parts = re.split(r"(?=[+@])", method)
    return Markup("<wbr>").join(Markup('<span class="whole">{}</span>').format(part) for part in parts)


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _markup(figures: Sequence[str]) -> list[Markup]:
    return [Markup(figure) for figure in figures]


def _optional(figure: str | None) -> Markup | None:
    return None if figure is None else Markup(figure)


def _css(color: str) -> str:
    from nst_det.report.svg import css_color

    return css_color(color)


def _without_totals(losses: Mapping[str, Any]) -> dict[str, Any]:
    """Loss terms by their own names; a sum of all of them would hide their balance."""
    return {name: methods for name, methods in _without_prefix(losses).items() if name not in TOTALS}


def _without_prefix(curves: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("loss/").removeprefix("level/"): methods for name, methods in curves.items()}


def _rank_correlation(results: Results) -> float | None:
    """Spearman's rank correlation of top-1 and mAP over rows; None with fewer than four rows or equal values."""
    from scipy import stats

    pairs = [(row.top1, row.map) for row in results.rows if row.top1 is not None]
    if len(pairs) < 4 or len({x for x, _ in pairs}) < 2 or len({y for _, y in pairs}) < 2:
        return None
    value = float(stats.spearmanr(*zip(*pairs)).statistic)
    return value if math.isfinite(value) else None


def _heat(results: Results, key: str) -> list[tuple[str, list[Cell]]]:
    if not any(getattr(row, key) for row in results.rows):
        return []
    return [(name, [_heat_cell(getattr(row, key).get(name)) for row in results.rows]) for name in results.classes]


def _heat_cell(value: float | None) -> Cell:
    if value is None or math.isnan(value):
        return Cell(tables.MISSING, None, "transparent", "inherit")
    background = _blend(HEAT, value)
    return Cell(tables.fraction(value, 2), value, *_on(background))


def _changes(results: Results) -> list[tuple[str, list[Cell]]]:
    """Per class, each row's AP less the baseline's; rows without the baseline itself."""
    baseline = results.row(BASELINE)
    if baseline is None or not baseline.per_class:
        return []
    others = [row for row in results.rows if row is not baseline]
    values = {name: [_minus(row, baseline, name) for row in others] for name in results.classes}
    largest = max((abs(v) for line in values.values() for v in line if v is not None), default=0.0) or 1.0
    return [(name, [_change_cell(value, largest) for value in line]) for name, line in values.items()]


def _minus(row: Row, baseline: Row, name: str) -> float | None:
    first, second = row.per_class.get(name), baseline.per_class.get(name)
    if first is None or second is None or math.isnan(first) or math.isnan(second):
        return None
    return first - second


def _change_cell(value: float | None, largest: float) -> Cell:
    if value is None:
        return Cell(tables.MISSING, None, "transparent", "inherit")
    return Cell(tables.signed(value, 2), value, *_on(_blend(CHANGE, 0.5 + 0.5 * value / largest)))


def _blend(scale: Sequence[tuple[int, int, int]], value: float) -> tuple[int, int, int]:
    place = min(max(value, 0.0), 1.0) * (len(scale) - 1)
    below = min(int(place), len(scale) - 2)
    part = place - below
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(scale[below], scale[below + 1]))
    return red, green, blue


def _on(background: tuple[int, int, int]) -> tuple[str, str]:
    """The background as CSS, and of black and white the one that is easier to read on it."""
    light = luminance(background)
    ink = "#fff" if 1.05 / (light + 0.05) > (light + 0.05) / 0.05 else "#000"
    return "#{:02x}{:02x}{:02x}".format(*background), ink


def luminance(color: tuple[int, int, int]) -> float:
    """Relative luminance of an sRGB color, 0..1 (WCAG 2).

    Example:
        >>> luminance((255, 255, 255)), luminance((0, 0, 0))
        (1.0, 0.0)
    """
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return round(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2], 12)


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, text) lines."""
    if isinstance(tree, Mapping):
        return [line for key, value in tree.items() for line in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(tree, list) and any(isinstance(item, Mapping | list) for item in tree):
        return [line for index, item in enumerate(tree) for line in _flat(item, f"{prefix}[{index}]")]
    text = ", ".join(str(item) for item in tree) if isinstance(tree, list) else "–" if tree is None else str(tree)
    return [(prefix, text or "–")]
