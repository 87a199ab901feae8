"""Keep the result of a comparison: results.json without what a reader of its table doesn't need.

    python benchmarks/keep_results.py output/voc07_256 benchmarks/results/voc07_256.json

It prints the table for README.md and docs/results.md with the comment that is to stand above it there;
tests/test_kept_results.py holds the two pages to the file.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nst_det.comparison.result import TEACHER, ComparisonResult, RowResult
from nst_det.comparison.statistics import Difference
from nst_det.engine.io import read_json, write_json
from nst_det.engine.machine import machine_name
from nst_det.report import tables
from nst_det.report.summary import conclusion

MARK = "<!-- table: benchmarks/results/{} -->"


def kept(results: ComparisonResult) -> dict[str, Any]:
    """Return what is kept of a comparison: rows, config, versions, machine and hours."""
    provenance = results.provenance
    seeds = [seed for row in results.rows for seed in row.per_seed.values()]
    # rows with terms of stage two share the backbone of another row
    stages = {
        seed.distill_run: seed.seconds_backbone
        for row in results.rows
        for seed in row.per_seed.values()
        # the row teacher's is counted below
        if seed.distill_run and row.method != TEACHER
    }
    teacher, gpu = results.teacher, provenance["cuda"]
    return {
        "name": results.name,
        "measure": results.measure.head,
        "conclusion": conclusion(results),
        "rows": [_row(row) for row in results.rows],
        "teacher": {"name": teacher.name, "top1": teacher.top1, "steps": teacher.steps} if teacher else None,
        "student_weights": results.student_weights,
        "hours": round(
            (sum(stages.values()) + sum(seed.seconds_detector for seed in seeds) + ((teacher and teacher.seconds) or 0))
            / 3600,
            2,
        ),
        # the file may be made on another machine than the GPU's
        "machine": f"{provenance['cpu_count']} cores" + (f", {gpu}" if gpu else f" of {machine_name('cpu')}"),
        **{key: provenance[key] for key in ("command", "commit", "versions", "platform", "python")},
        "settings": {key: value for key, value in results.settings.items() if key != "statistics"},
    }


def _row(row: RowResult) -> dict[str, Any]:
    to_ce = Difference(row.delta_vs_ce, row.delta_interval, row.p_value, row.verdict, row.p_holm)
    return {
        "method": row.method,
        "score": row.score,
        "std": row.score_std,
        "per_seed": {seed: one.score for seed, one in row.per_seed.items()},
        "top1": row.top1,
        "vs_ce": _difference(to_ce),
        "vs_imagenet": row.vs_imagenet and _difference(row.vs_imagenet),
        "weights": row.weights_text,
        "differs": row.differs,
    }


def _difference(one: Difference) -> dict[str, Any]:
    return {"mean": one.mean, "interval": one.interval, "p_holm": one.p_holm, "verdict": one.verdict}


def markdown(kept: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table that README.md and docs/results.md show."""
    others = [key for key in ("vs_ce", "vs_imagenet") if any(row[key] for row in kept["rows"])]
    heads = ["row", kept["measure"]]
    for key in others:
        heads += [f"difference to {key[3:]}", "verdict"]
    lines = [heads, ["---", "---:", *["---:", "---"] * len(others)]]
    for row in kept["rows"]:
        std = "" if row["std"] is None else f" ± {tables.fraction(row['std'])}"
        cells = [row["method"], tables.fraction(row["score"]) + std]
        for key in others:
            cells += _cells(row[key])
        lines.append(cells)
    return [f"| {' | '.join(line)} |" for line in lines]


def _cells(one: Mapping[str, Any]) -> list[str]:
    if one["verdict"] == tables.REFERENCE:
        return [tables.MISSING, tables.MISSING]
    return [
        f"{tables.signed(one['mean'])} {tables.interval_text(one['interval'])}".strip(),
        tables.MARKS[one["verdict"]],
    ]


def tables_in(text: str) -> dict[str, list[str]]:
    """Return the lines of each table of a page that is below a mark, by the name of its file."""
    found = re.finditer(MARK.replace("{}", r"(\S+)") + r"\n+((?:\|.*\n?)+)", text)
    return {match[1]: match[2].splitlines() for match in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished comparison")
    parser.add_argument("output", type=Path, help="file to write, in benchmarks/results")
    args = parser.parse_args()
    write_json(args.output, kept(ComparisonResult.load(args.run / "report" / "results.json")))
    # as it is read back
    print("\n".join([MARK.format(args.output.name), "", *markdown(read_json(args.output))]))


if __name__ == "__main__":
    main()
