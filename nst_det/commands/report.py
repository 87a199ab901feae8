"""``nst-det report``: the report of a finished comparison, made again."""

from __future__ import annotations

import argparse

HELP = "make the tables and the page of a finished comparison again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.add_argument("folder", metavar="DIR", help="the folder of the comparison; DIR/report/results.json is read")
    parser.add_argument("--output", metavar="DIR", help="where the report goes instead of DIR/report")


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    from pathlib import Path

    from nst_det.comparison.result import ComparisonResult
    from nst_det.errors import UserError
    from nst_det.report import write_report

    folder = Path(args.folder).expanduser()
    source = folder / "report" / "results.json"
    if not source.exists():
        raise UserError(f"{source}: no such file; finish this comparison with nst-det compare first")
    results = ComparisonResult.load(source)
    output = Path(args.output).expanduser() if args.output else folder / "report"
    write_report(results, output, folder)
    print(output / "index.html")
    return 0
