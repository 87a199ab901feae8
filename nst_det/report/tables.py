"""The table of a comparison as CSV (every digit), Markdown and LaTeX (three digits)."""

from __future__ import annotations

import csv
import io

from nst_det.report.schema import BETTER, NOISE, REFERENCE, SINGLE, WORSE, Results, Row

MISSING = "–"
MARKS = {BETTER: "better", WORSE: "worse", NOISE: "within noise", SINGLE: "one seed", REFERENCE: "reference"}
# where a row learns from a teacher
TRANSFER = {"backbone": "backbone", "detector": "detector", "": MISSING}
# of the training of each stage
SPEEDS = ("images_per_second", "data_wait", "gpu_memory_gib")
COLUMNS = (
    "method",
    "stage",
    "weights",
    "map_11point",
    "map_std",
    "map_area",
    "delta_vs_ce",
    "delta_low",
    "delta_high",
    "verdict",
    "p_holm",
    "top1",
    "params",
    "macs",
    "flops",
    "latency_seconds",
    "seconds",
    "seconds_backbone",
    "seconds_detector",
    *(f"{name}_backbone" for name in SPEEDS),
    *(f"{name}_detector" for name in SPEEDS),
    "coco_ap",
    "coco_ap_small",
    "coco_ap_medium",
    "coco_ap_large",
    "seeds",
)


def fraction(value: float | None, digits: int = 3) -> str:
    """A fraction 0..1 with fixed digits, or a dash.

    Example:
        >>> fraction(0.84146), fraction(None)
        ('0.841', '–')
    """
    return MISSING if value is None or value != value else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign (a true minus), or a dash.

    Example:
        >>> signed(0.3424), signed(-0.02), signed(0.0)
        ('+0.342', '−0.020', '0.000')
    """
    if value is None or value != value:
        return MISSING
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def interval_text(row: Row) -> str:
    """``[+0.100, +0.200]``, or nothing where there is no interval."""
    return "" if row.interval is None else f"[{signed(row.interval[0])}, {signed(row.interval[1])}]"


def spread_text(row: Row) -> str:
    """``0.841 ± 0.014``; without a spread the mean alone."""
    return fraction(row.map) if row.map_std is None else f"{fraction(row.map)} ± {fraction(row.map_std)}"


def count_text(value: int | None) -> str:
    """A parameter count in millions.

    Example:
        >>> count_text(1934567), count_text(None)
        ('1.93 M', '–')
    """
    return MISSING if value is None else f"{value / 1e6:.2f} M"


def flops_text(value: int | None) -> str:
    """A number of operations, short to read.

    Example:
        >>> flops_text(25_174_850_560), flops_text(73_400_000), flops_text(None)
        ('25.2 G', '73.4 M', '–')
    """
    if value is None:
        return MISSING
    return f"{value / 1e9:.3g} G" if value >= 1e9 else f"{value / 1e6:.3g} M"


def latency_text(value: float | None) -> str:
    """Seconds of a forward pass as milliseconds.

    Example:
        >>> latency_text(0.0421), latency_text(1.2345), latency_text(None)
        ('42.1 ms', '1234 ms', '–')
    """
    if value is None:
        return MISSING
    return f"{1000 * value:.1f} ms" if value < 1 else f"{1000 * value:.0f} ms"


def seconds_text(value: float | None) -> str:
    """A duration that is short to read.

    Example:
        >>> seconds_text(33.61), seconds_text(5400)
        ('33.6 s', '1 h 30 min')
    """
    if value is None:
        return MISSING
    if value < 120:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def csv_table(results: Results) -> str:
    """One line a row with unrounded numbers, then one column a class (``ap_11point:NAME``, ``ap_area:NAME``)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kinds = [("ap_11point", "per_class"), ("ap_area", "per_class_area")]
    writer.writerow([*COLUMNS, *(f"{kind}:{name}" for kind, _ in kinds for name in results.classes)])
    for row in results.rows:
        low, high = row.interval or (None, None)
        numbers = [row.map, row.map_std, row.map_area, row.delta, low, high, row.verdict, row.p_holm, row.top1]
        cost = row.cost
        numbers += [row.params, *((cost.macs, cost.flops, cost.median) if cost else (None, None, None))]
        numbers += [row.seconds, row.seconds_backbone, row.seconds_detector]
        numbers += [speed.get(name) for speed in (row.speed_backbone, row.speed_detector) for name in SPEEDS]
        numbers += [row.coco.get(name) for name in ("AP", "APs", "APm", "APl")]
        seeds = " ".join(str(seed) for seed in row.seeds)
        classes = [getattr(row, key).get(name) for _, key in kinds for name in results.classes]
        writer.writerow([row.method, row.stage, row.weights, *map(_cell, numbers), seeds, *map(_cell, classes)])
    return out.getvalue()


def _cell(value: float | int | str | None) -> str:
    if value is None or value != value:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def markdown_table(results: Results, sentence: str) -> str:
    """The table in GitHub's Markdown, with the result in one sentence above and what the columns mean below."""
    head = ["method", "mAP (11-point)", "mAP (area)", "difference to ce", "95 % interval", "", "top-1", "parameters"]
    head += ["FLOPs", "latency", "training", "seeds", "transfer", "weights"]
    align = ["---", *["---:"] * 4, "---", *["---:"] * 5, *["---"] * 3]
    lines = [_markdown_escape(sentence), "", _pipe(head), _pipe(align)]
    for row in results.rows:
        cells = [spread_text(row), fraction(row.map_area), _delta(row), interval_text(row) or MISSING]
        cells += [MARKS[row.verdict], fraction(row.top1), *cost_cells(row)]
        cells += [", ".join(str(seed) for seed in row.seeds), TRANSFER[row.stage], row.weights or MISSING]
        lines.append(_pipe([_markdown_escape(row.method), *cells]))
    return "\n".join([*lines, "", _markdown_escape(legend(results)), ""])


def cost_cells(row: Row) -> list[str]:
    """Parameters, arithmetic and latency of the detector, and the time of its training, as text."""
    flops, latency = (row.cost.flops, row.cost.median) if row.cost else (None, None)
    return [count_text(row.params), flops_text(flops), latency_text(latency), seconds_text(row.seconds)]


def _pipe(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _delta(row: Row) -> str:
    return MISSING if row.verdict == REFERENCE else signed(row.delta)


def _markdown_escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def legend(results: Results) -> str:
    """What the columns mean, in words."""
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
    return f"{text} {cost_legend(results)}".rstrip()


def cost_legend(results: Results) -> str:
    """What the columns of cost mean, and where latency was measured."""
    text = "Training is stage one's share and stage two together, as the runs took it."
    places = list(dict.fromkeys(row.cost.where for row in results.rows if row.cost))
    if places:
        text += f" FLOPs count a multiply-add as two. Latency is the median of one image at a time on {places[0]}"
        text += f" (other rows: {'; '.join(places[1:])})." if len(places) > 1 else "."
    return text


_LATEX = {
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
    r"""Text that LaTeX prints as it stands.

    Example:
        >>> latex_escape("a_b & 5 %")
        'a\\_b \\& 5 \\%'
    """
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def latex_table(results: Results, sentence: str) -> str:
    """A ``table`` environment for the booktabs package; the highest mAP of a transfer method is bold."""
    head = [
        "Method",
        "mAP (11-point)",
        "mAP (area)",
        r"$\Delta$ to ce",
        r"95\,\% interval",
        "",
        "Top-1",
        "Params",
        "FLOPs",
        "Latency",
        "Training",
    ]
    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering"]
    lines += [f"\\caption{{{latex_escape(sentence)} {latex_escape(legend(results))}}}", r"\begin{tabular}{lrrrrlrrrrr}"]
    lines += [r"\toprule", " & ".join(head) + r" \\", r"\midrule"]
    best = max((row.map for row in results.rows if row.is_method), default=None)
    for row in results.rows:
        mean = latex_escape(spread_text(row))
        mean = f"\\textbf{{{mean}}}" if row.is_method and row.map == best else mean
        cells = [fraction(row.map_area), _delta(row), interval_text(row) or MISSING, MARKS[row.verdict]]
        cells += [fraction(row.top1), *cost_cells(row)]
        lines.append(" & ".join([latex_escape(row.method), mean, *map(latex_escape, cells)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])
