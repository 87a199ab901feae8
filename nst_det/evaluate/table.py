"""A result as a table for the terminal."""

from __future__ import annotations

import numpy as np
from rich.markup import escape
from rich.table import Table

from nst_det.evaluate.voc import VocResult


def voc_table(result: VocResult, threshold: float | None = None) -> Table:
    """AP of each class and the means, at one of the result's overlap thresholds (None: the first)."""
    t = 0 if threshold is None else result.thresholds.index(threshold)
    table = Table(title=f"VOC AP at IoU {result.thresholds[t]:g}")
    table.add_column("class")
    for column in ("AP 11-point", "AP area", "objects", "difficult", "detections"):
        table.add_column(column, justify="right")
    counts = zip(result.positives.tolist(), result.difficult.tolist(), result.detections.tolist())
    for k, (name, numbers) in enumerate(zip(result.classes, counts)):
        table.add_row(escape(name), _cell(result.ap11[t, k]), _cell(result.ap_area[t, k]), *map(str, numbers))
    table.add_section()
    totals = (result.positives.sum(), result.difficult.sum(), result.detections.sum())
    table.add_row("mean", _cell(result.map11[t]), _cell(result.map_area[t]), *map(str, totals), style="bold")
    without = int((result.positives == 0).sum())
    if without:
        table.caption = f"{without} of {len(result.classes)} classes have no object that counts, and no AP"
    return table


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"
