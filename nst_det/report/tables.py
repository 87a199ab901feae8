"""The table of a comparison as CSV (every digit), Markdown and LaTeX (three digits)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nst_det.comparison.result import ComparisonResult, RowResult
from nst_det.comparison.statistics import BETTER, NOISE, REFERENCE, SINGLE, WORSE

MISSING = "–"
MARKS = {BETTER: "better", WORSE: "worse", NOISE: "within noise", SINGLE: "one seed", REFERENCE: "reference"}


def fraction(value: float | None, digits: int = 3) -> str:
    """Return a fraction 0..1 with fixed digits, or a dash.

    Example:
        >>> fraction(0.84146), fraction(None)
        ('0.841', '–')
    """
    return MISSING if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """Return a difference with its sign (a true minus), or a dash.

    Example:
        >>> signed(0.3424), signed(-0.02), signed(0.0)
        ('+0.342', '−0.020', '0.000')
    """
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if float(text.replace("−", "-")) else text[1:]


def interval_text(row: RowResult) -> str:
    """Return ``[+0.100, +0.200]``, or nothing where there is no interval."""
    return "" if row.delta_interval is None else f"[{', '.join(map(signed, row.delta_interval))}]"


def spread_text(row: RowResult) -> str:
    """Return ``0.841 ± 0.014``; without a spread the mean alone."""
    return fraction(row.map) if row.map_std is None else f"{fraction(row.map)} ± {fraction(row.map_std)}"


def count_text(value: int | None) -> str:
    """Return a parameter count in millions, or a dash."""
    return MISSING if value is None else f"{value / 1e6:.2f} M"


def flops_text(value: int | None) -> str:
    """Return a number of operations, short to read, or a dash.

    Example:
        >>> flops_text(25_174_850_560), flops_text(73_400_000)
        ('25.2 G', '73.4 M')
    """
    if value is None:
        return MISSING
    return f"{value / 1e9:.3g} G" if value >= 1e9 else f"{value / 1e6:.3g} M"


def latency_text(value: float | None) -> str:
    """Return seconds of a forward pass as milliseconds, or a dash."""
    return MISSING if value is None else f"{1000 * value:.{int(value < 1)}f} ms"


def seconds_text(value: float) -> str:
    """Return a duration that is short to read.

    Example:
        >>> seconds_text(33.61), seconds_text(5400)
        ('33.6 s', '1 h 30 min')
    """
    if value < 120:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# every value of a row, unrounded, by its column in the CSV file
VALUES: dict[str, Callable[[RowResult], Any]] = {
    "method": lambda row: row.method,
    "stage": lambda row: row.stage,
    "weights": lambda row: row.weights,
    "map_11point": lambda row: row.map,
    "map_std": lambda row: row.map_std,
    "map_area": lambda row: row.map_area,
    "delta_vs_ce": lambda row: row.delta_vs_ce,
    "delta_low": lambda row: row.delta_interval and row.delta_interval[0],
    "delta_high": lambda row: row.delta_interval and row.delta_interval[1],
    "verdict": lambda row: row.verdict,
    "p_holm": lambda row: row.p_holm,
    "top1": lambda row: row.top1,
    "params": lambda row: row.params,
    "macs": lambda row: row.cost and row.cost.macs,
    "flops": lambda row: row.cost and row.cost.flops,
    "latency_seconds": lambda row: row.cost and row.cost.latency.median,
    "seconds": lambda row: row.seconds,
    "seconds_backbone": lambda row: row.seconds_backbone,
    "seconds_detector": lambda row: row.seconds_detector,
    "images_per_second_backbone": lambda row: row.speed_backbone.get("images_per_second"),
    "data_wait_backbone": lambda row: row.speed_backbone.get("data_wait"),
    "gpu_memory_gib_backbone": lambda row: row.speed_backbone.get("gpu_memory_gib"),
    "images_per_second_detector": lambda row: row.speed_detector.get("images_per_second"),
    "data_wait_detector": lambda row: row.speed_detector.get("data_wait"),
    "gpu_memory_gib_detector": lambda row: row.speed_detector.get("gpu_memory_gib"),
    "coco_ap": lambda row: row.coco.get("AP"),
    "coco_ap_small": lambda row: row.coco.get("APs"),
    "coco_ap_medium": lambda row: row.coco.get("APm"),
    "coco_ap_large": lambda row: row.coco.get("APl"),
    "seeds": lambda row: " ".join(map(str, row.seeds)),
}


@dataclass(frozen=True)
class Column:
    """A column of the tables for people; ``value`` names what the page sorts by, ``title`` explains it there."""

    head: str
    text: Callable[[RowResult], str]
    value: str = ""
    title: str = ""
    align: str = "r"
    note: Callable[[RowResult], str] = lambda row: ""

    def sort_key(self, row: RowResult) -> Any:
        """Return the value behind the text, "" where it is not known."""
        value = VALUES[self.value](row)
        return "" if value is None else value


# the page's result table takes those with a title, LaTeX all but the last three
COLUMNS = (
    Column("method", lambda row: row.method, align="l"),
    Column("mAP (11-point)", spread_text),
    Column(
        "mAP (area)",
        lambda row: fraction(row.map_area),
        "map_area",
        "area under the curve, IoU 0.5, as in VOC 2010 and later",
    ),
    Column("difference to ce", lambda row: MISSING if row.verdict == REFERENCE else signed(row.delta_vs_ce)),
    Column("95 % interval", lambda row: interval_text(row) or MISSING),
    Column("verdict", lambda row: MARKS[row.verdict], align="l"),
    Column("top-1", lambda row: fraction(row.top1), "top1", "accuracy of the backbone in stage one"),
    Column("params", lambda row: count_text(row.params), "params", "parameters of the detector"),
    Column(
        "FLOPs",
        lambda row: flops_text(row.cost.flops if row.cost else None),
        "flops",
        "of one image; a multiply-add counts as two",
        note=lambda row: f"{flops_text(row.cost.macs)} multiply-adds" if row.cost else "",
    ),
    Column(
        "latency",
        lambda row: latency_text(row.cost.latency.median if row.cost else None),
        "latency_seconds",
        "median of one image at a time",
        note=lambda row: (
            f"10 to 90 % of the passes: {latency_text(row.cost.latency.p10)} to {latency_text(row.cost.latency.p90)}; "
            f"{row.cost.where}"
            if row.cost
            else ""
        ),
    ),
    Column(
        "training",
        lambda row: seconds_text(row.seconds),
        "seconds",
        "stage one's share and stage two, a mean over seeds",
        note=lambda row: (
            f"stage one {seconds_text(row.seconds_backbone)}, stage two {seconds_text(row.seconds_detector)}"
        ),
    ),
    Column("seeds", lambda row: ", ".join(map(str, row.seeds)), align="l"),
    Column("transfer", lambda row: row.stage or MISSING, align="l"),
    Column("weights", lambda row: row.weights or MISSING, align="l"),
)


def csv_table(results: ComparisonResult) -> str:
    """Return one line a row with unrounded numbers, then AP by class (``ap_11point:NAME``, ``ap_area:NAME``)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [f"{kind}:{name}" for kind in ("ap_11point", "ap_area") for name in results.classes]
    writer.writerow([*VALUES, *heads])
    for row in results.rows:
        classes = [ap.get(name) for ap in (row.per_class, row.per_class_area) for name in results.classes]
        writer.writerow([*(value(row) for value in VALUES.values()), *classes])
    return out.getvalue()


def markdown_table(results: ComparisonResult, sentence: str) -> str:
    """Return GitHub's Markdown, with the result in one sentence above and what the columns mean below."""
    align = ["---:" if column.align == "r" else "---" for column in COLUMNS]
    # names are the user's, figures are our own
    cells = [
        [_markdown_escape(column.text(row)) if column.align == "l" else column.text(row) for column in COLUMNS]
        for row in results.rows
    ]
    table = [f"| {' | '.join(line)} |" for line in ([column.head for column in COLUMNS], align, *cells)]
    return "\n".join([_markdown_escape(sentence), "", *table, "", _markdown_escape(legend(results)), ""])


def _markdown_escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def legend(results: ComparisonResult) -> str:
    """Return what the columns mean, in words, and where latency was measured."""
    text = "mAP is the mean over classes of AP at IoU 0.5: 11-point as in VOC 2007, area as in VOC 2010 and later. "
    if any(row.stage == "detector" for row in results.rows):
        text += "A term with @det teaches the neck or heads of the detector; all others teach the backbone. "
    if len(results.seeds) > 1:
        text += "± is the standard deviation over seeds (n − 1). "
        text += "The difference to ce is taken within each seed; its interval is a two-sided 95 % t-interval. "
        text += (
            "better, worse: the interval leaves out 0; within noise: it holds 0; not corrected for the number of rows."
        )
    else:
        text += "There is one seed, so there is no spread: a difference can't be told from noise."
    text += " Training is stage one's share and stage two together, as the runs took it."
    places = list(dict.fromkeys(row.cost.where for row in results.rows if row.cost))
    if places:
        text += f" FLOPs count a multiply-add as two. Latency is the median of one image at a time on {places[0]}"
        text += f" (other rows: {'; '.join(places[1:])})." if len(places) > 1 else "."
    return text


_LATEX: dict[str, str | int | None] = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "±": r"$\pm$",
    "–": "--",
    "≈": r"$\approx$",
    "×": r"$\times$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex_escape(text: str) -> str:
    r"""Return text that LaTeX prints as it stands.

    Example:
        >>> latex_escape("a_b & 5 %")
        'a\\_b \\& 5 \\%'
    """
    return " ".join(text.split()).translate(str.maketrans(_LATEX))


def latex_table(results: ComparisonResult, sentence: str) -> str:
    """Return a ``table`` environment for the booktabs package; the highest mAP of a transfer method is bold."""
    columns = COLUMNS[:-3]
    best = max((row.map for row in results.methods), default=None)
    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering"]
    lines += [f"\\caption{{{latex_escape(sentence)} {latex_escape(legend(results))}}}"]
    lines += [f"\\begin{{tabular}}{{{''.join(column.align for column in columns)}}}", r"\toprule"]
    lines += [" & ".join(latex_escape(column.head) for column in columns) + r" \\", r"\midrule"]
    for row in results.rows:
        cells = [latex_escape(column.text(row)) for column in columns]
        if row.is_method and row.map == best:
            cells[1] = f"\\textbf{{{cells[1]}}}"
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])
