"""The table of a comparison as CSV (every digit), Markdown and LaTeX (three digits)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nst_det.comparison.result import BASELINE, MAP, MEASURES, TOP1, ComparisonResult, Measure, RowResult
from nst_det.comparison.statistics import BETTER, NOISE, REFERENCE, SINGLE, WORSE
from nst_det.distillation.config import AGREEMENT, CKA, KNN, LINEAR

MISSING = "–"
UNTOLD = "What these results can't tell you"
MARKS = {BETTER: "better", WORSE: "worse", NOISE: "within noise", SINGLE: "one seed", REFERENCE: "reference"}


def fraction(value: float | None, digits: int = 3) -> str:
    """Return a fraction 0..1 with fixed digits, or a dash."""
    return MISSING if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """Return a difference with its sign (a true minus, none before 0), or a dash.

    Example:
        >>> signed(0.3424), signed(-0.02), signed(0.0)
        ('+0.342', '−0.020', '0.000')
    """
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def interval_text(interval: tuple[float, float] | None) -> str:
    """Return ``[+0.100, +0.200]``, or nothing where there is no interval."""
    return "" if interval is None else f"[{', '.join(map(signed, interval))}]"


def error(top1: float) -> str:
    """Return the error that a top-1 of 0..1 leaves, in percent, such as ``4.39 %``."""
    return f"{100 * (1 - top1):.2f} %"


def operations(value: int) -> str:
    """Return a number of operations, such as ``25.2 G``."""
    return f"{value / 1e9:.3g} G" if value >= 1e9 else f"{value / 1e6:.3g} M"


def milliseconds(value: float) -> str:
    """Return seconds of a forward pass as milliseconds."""
    return f"{1000 * value:.{int(value < 1)}f} ms"


def duration(value: float) -> str:
    """Return seconds of training, such as ``33.6 s`` or ``1 h 30 min``."""
    if value < 120:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def values_of(row: RowResult) -> dict[str, Any]:
    """Return every value of a row, unrounded, by its column in the CSV file."""
    cost, (low, high), other = row.cost, row.delta_interval or (None, None), row.vs_imagenet
    other_low, other_high = (other and other.interval) or (None, None)
    sizes = {"": "AP", "_small": "APs", "_medium": "APm", "_large": "APl"}
    speeds = ("images_per_second", "data_wait", "gpu_memory_gib")
    return {
        **{name: getattr(row, name) for name in ("method", "stage")},
        "weights": row.weights_text,
        "differs": "; ".join(row.differs),
        "map_11point": row.map,
        **{name: getattr(row, name) for name in ("map_std", "map_area", "delta_vs_ce")},
        "delta_low": low,
        "delta_high": high,
        **{name: getattr(row, name) for name in ("verdict", "p_holm", "top1", "top1_std", "params")},
        **{name: (row.measured or {}).get(name) for name in MEASURES},
        "delta_vs_imagenet": other and other.mean,
        "imagenet_low": other_low,
        "imagenet_high": other_high,
        "verdict_vs_imagenet": other and other.verdict,
        "p_holm_vs_imagenet": other and other.p_holm,
        "macs": cost and cost.macs,
        "flops": cost and cost.flops,
        "latency_seconds": cost and cost.latency.median,
        **{name: getattr(row, name) for name in ("seconds", "seconds_backbone", "seconds_detector")},
        **{f"{name}_backbone": row.speed_backbone.get(name) for name in speeds},
        **{f"{name}_detector": row.speed_detector.get(name) for name in speeds},
        **{f"coco_ap{size}": row.coco.get(name) for size, name in sizes.items()},
        "seeds": " ".join(map(str, row.seeds)),
    }


@dataclass(frozen=True)
class Column:
    """A column of the tables for people; the page sorts by its ``value``, and explains it by its ``title``."""

    head: str
    text: Callable[[RowResult], str]
    title: str = ""
    value: Callable[[RowResult], Any] = lambda row: None
    note: Callable[[RowResult], str] = lambda row: ""
    align: str = "r"
    only: Measure | None = None  # of comparisons that this measure judges
    to_imagenet: bool = False  # of comparisons whose students begin from the weights of the row imagenet


def _number(
    head: str,
    name: str,
    form: Callable[[Any], str],
    title: str,
    note: Any = lambda row: "",
    only: Measure | None = None,
) -> Column:
    def value(row: RowResult) -> Any:
        return values_of(row)[name]

    def text(row: RowResult) -> str:
        return MISSING if value(row) is None else form(value(row))

    return Column(head, text, title, value, note, only=only)


def _score(measure: Measure) -> Column:
    def text(row: RowResult) -> str:
        return fraction(row.score) if row.score_std is None else f"{fraction(row.score)} ± {fraction(row.score_std)}"

    return Column(measure.head, text, only=measure)


def _latency_note(row: RowResult) -> str:
    if row.cost is None:
        return ""
    low, high = milliseconds(row.cost.latency.p10), milliseconds(row.cost.latency.p90)
    return f"10 to 90 % of the passes: {low} to {high}; of {row.cost.run}; {row.cost.where}"


def _training_note(row: RowResult) -> str:
    return f"stage one {duration(row.seconds_backbone)}, stage two {duration(row.seconds_detector)}"


def _to_imagenet(row: RowResult) -> str:
    one = row.vs_imagenet
    told = one is not None and one.verdict != REFERENCE
    return f"{signed(one.mean)} {interval_text(one.interval)}".strip() if one and told else MISSING


# LaTeX takes all but the last four
COLUMNS = (
    Column("method", lambda row: row.method, align="l"),
    *map(_score, (MAP, TOP1, *MEASURES.values())),
    _number("mAP (area)", "map_area", fraction, "area under the curve, IoU 0.5, as in VOC 2010 and later", only=MAP),
    _number("error", "top1", error, "the share of images that is not classified right, as papers print it", only=TOP1),
    Column("difference to ce", lambda row: MISSING if row.verdict == REFERENCE else signed(row.delta_vs_ce)),
    Column("95 % interval", lambda row: interval_text(row.delta_interval) or MISSING),
    Column("verdict", lambda row: MARKS[row.verdict], align="l"),
    Column(
        "difference to imagenet",
        _to_imagenet,
        "paired, to the detector on the published weights that all students begin from, with its 95 % interval",
        lambda row: row.vs_imagenet and row.vs_imagenet.mean,
        to_imagenet=True,
    ),
    Column(
        "verdict to imagenet",
        lambda row: MARKS[row.vs_imagenet.verdict] if row.vs_imagenet else MISSING,
        "of that difference",
        lambda row: row.vs_imagenet and row.vs_imagenet.mean,
        align="l",
        to_imagenet=True,
    ),
    _number("top-1", "top1", fraction, "accuracy of the backbone in stage one", only=MAP),
    _number("params", "params", lambda value: f"{value / 1e6:.2f} M", "parameters of what is judged"),
    _number(
        "FLOPs",
        "flops",
        operations,
        "of one image; a multiply-add counts as two",
        lambda row: f"{operations(row.cost.macs)} multiply-adds" if row.cost else "",
        only=MAP,
    ),
    _number("latency", "latency_seconds", milliseconds, "median of one image at a time", _latency_note, only=MAP),
    _number("training", "seconds", duration, "stage one's share and stage two, a mean over seeds", _training_note),
    Column("seeds", lambda row: ", ".join(map(str, row.seeds)), align="l"),
    Column("transfer", lambda row: row.stage or MISSING, align="l", only=MAP),
    Column("weights", lambda row: row.weights_text or MISSING, align="l"),
    Column("differs from ce in", lambda row: "; ".join(row.differs) or MISSING, align="l"),
)


def columns_of(results: ComparisonResult, columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """Return those of the columns that the comparison has, headed by its baseline, and what stage one is judged by."""
    judge, ours, compared = results.stage_one, f" {results.baseline}", results.compared_with_imagenet
    stage_one = _number(judge.head, judge.key, fraction, "of the backbone in stage one", only=MAP)
    found = [stage_one if judge is not TOP1 and column.head == TOP1.head else column for column in columns]
    return [
        replace(column, head=column.head.replace(f" {BASELINE}", ours))
        for column in found
        if column.only in (None, results.measure) and (compared or not column.to_imagenet)
    ]


def csv_table(results: ComparisonResult) -> str:
    """Return one line a row with unrounded numbers, then AP by class (``ap_11point:NAME``, ``ap_area:NAME``)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [f"{kind}:{name}" for kind in ("ap_11point", "ap_area") for name in results.classes]
    writer.writerow([*values_of(results.rows[0]), *heads])
    for row in results.rows:
        classes = [ap.get(name) for ap in (row.per_class, row.per_class_area) for name in results.classes]
        writer.writerow([*values_of(row).values(), *classes])
    return out.getvalue()


def markdown_table(results: ComparisonResult, sentence: str, untold: Sequence[str] = ()) -> str:
    """Return GitHub's Markdown: the result in one sentence above, below what the columns mean and what isn't told."""
    columns = columns_of(results)
    lines = [[column.head for column in columns], ["---:" if column.align == "r" else "---" for column in columns]]
    for row in results.rows:
        # names are the user's, figures are our own
        lines.append([_markdown_escape(c.text(row)) if c.align == "l" else c.text(row) for c in columns])
    table = [f"| {' | '.join(line)} |" for line in lines]
    box = [f"{UNTOLD}:", "", *(f"- {_markdown_escape(line)}" for line in untold), ""] if untold else []
    return "\n".join([_markdown_escape(sentence), "", *table, "", _markdown_escape(legend(results)), "", *box])


def _markdown_escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(text.split()).translate({ord(character): f"\\{character}" for character in "\\`*_[]|"})


# by the keys of the measures
LEGENDS = {
    "map": "mAP is the mean over classes of AP at IoU 0.5: 11-point as in VOC 2007, area as in VOC 2010 and later. ",
    "top1": "top-1 is the share of the validation images whose most certain class is right, after the last step. ",
    KNN: "k-NN is the share of a labelled folder's validation images whose class the nearest features of its "
    "training images have, after the last step. ",
    LINEAR: "linear probe is the share of a labelled folder's validation images that a linear classifier of "
    "the features, trained on its training images, has right, after the last step. ",
    AGREEMENT: "agreement is the share of the validation images whose most certain class is the teacher's, "
    "after the last step. ",
    CKA: "CKA is the linear centered kernel alignment of the students' pooled features with the teacher's, on "
    "the validation images, after the last step. ",
}


def legend(results: ComparisonResult) -> str:
    """Return what the columns mean and where latency was measured."""
    text = LEGENDS[results.measure.key]
    if results.measure is MAP and results.stage_one is not TOP1:
        text += f"Stage one learned without labels: {LEGENDS[results.stage_one.key]}"
    if any(row.stage == "detector" for row in results.rows):
        text += "A term with @det teaches the neck or heads of the detector; all others teach the backbone. "
    if len(results.seeds) > 1:
        text += (
            "± is the standard deviation over seeds (n − 1). "
            "A difference is taken within each seed; its interval is a two-sided 95 % t-interval. "
            "better, worse: the interval leaves out 0; within noise: it holds 0; not corrected for the number of rows."
        )
    else:
        text += "There is one seed, so there is no spread: a difference can't be told from noise."
    parts = "stage one's share and stage two together" if results.measure is MAP else "a student's share of stage one"
    text += f" Training time is {parts}, as measured."
    if places := list(dict.fromkeys(row.cost.where for row in results.rows if row.cost)):
        text += f" FLOPs count a multiply-add as two. Latency is the median of one image at a time on {places[0]}"
        text += f" (other rows: {'; '.join(places[1:])})" if len(places) > 1 else ""
        runs = ", ".join(dict.fromkeys(row.cost.run for row in results.rows if row.cost))
        text += f", measured once for each architecture, on {runs}: it varies with the number of boxes that are kept."
    return text


LATEX: dict[str, int | str | None] = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "–": "--"},
    **{"−": "$-$", "±": r"$\pm$", "≈": r"$\approx$", "×": r"$\times$"},
}


def latex_escape(text: str) -> str:
    r"""Return text that LaTeX prints unchanged, such as ``a\_b`` for ``a_b``."""
    return " ".join(text.split()).translate(str.maketrans(LATEX))


def latex_table(results: ComparisonResult, sentence: str) -> str:
    """Return a ``table`` environment for the booktabs package; the highest score of a transfer method is bold."""
    columns = columns_of(results, COLUMNS[:-4])
    best = max((row.score for row in results.methods), default=None)
    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering"]
    lines += [f"\\caption{{{latex_escape(sentence)} {latex_escape(legend(results))}}}"]
    lines += [f"\\begin{{tabular}}{{{''.join(column.align for column in columns)}}}", r"\toprule"]
    lines += [" & ".join(latex_escape(column.head) for column in columns) + r" \\", r"\midrule"]
    for row in results.rows:
        cells = [latex_escape(column.text(row)) for column in columns]
        if row.is_method and row.score == best:
            cells[1] = f"\\textbf{{{cells[1]}}}"
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])
