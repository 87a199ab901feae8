"""Tables and pictures of a finished comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nst_det.comparison.result import ComparisonResult

# in results, of the runs of each stage
STAGES = ("distill_run", "run")
__all__ = ["untold", "write_report"]


def untold(results: ComparisonResult, runs: str | Path) -> list[str]:
    """Return what a comparison can't tell, in short sentences, the most important first; ``runs`` is its folder."""
    from nst_det.report.curves import read_curves
    from nst_det.report.limits import limits

    return limits(results, *(read_curves(results, Path(runs), stage) for stage in STAGES))


def write_report(results: ComparisonResult, folder: str | Path, runs: str | Path) -> None:
    """Write ``results.csv``, ``table.md``, ``table.tex`` and the self-contained ``index.html`` into ``folder``.

    Equal input gives equal bytes.  Run folders in ``results`` are relative to ``runs``, the folder of the comparison;
    those that are gone cost the report its curves or sample images, never its numbers.
    """
    from nst_det.engine.io import write_text
    from nst_det.report.curves import read_curves
    from nst_det.report.limits import limits
    from nst_det.report.page import render_page
    from nst_det.report.summary import conclusion
    from nst_det.report.tables import csv_table, latex_table, markdown_table

    folder, runs, sentence = Path(folder), Path(runs), conclusion(results)
    distill, detect = (read_curves(results, runs, stage) for stage in STAGES)
    lines = limits(results, distill, detect)
    write_text(folder / "results.csv", csv_table(results))
    write_text(folder / "table.md", markdown_table(results, sentence, lines))
    write_text(folder / "table.tex", latex_table(results, sentence))
    write_text(folder / "index.html", render_page(results, runs, distill, detect, lines))
