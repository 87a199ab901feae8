"""``nst-det check-data``: everything that is wrong with a data set."""

from __future__ import annotations

import argparse

HELP = "list everything that is wrong with a VOC folder or an image folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.epilog = "exit code: 0 if nothing is wrong, 2 if something is"
    parser.add_argument("path", metavar="PATH", help="a VOC folder, or a folder with one folder of images a class")
    parser.add_argument("--split", nargs="+", metavar="NAME", help="look at these VOC lists only (default: everything)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="the only class names that are right")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads that decode; 0 takes all cores")
    parser.add_argument("--output", metavar="FILE", help="write the problems as JSON")


def run(args: argparse.Namespace) -> int:
    """One line a problem, then how many of each kind, then what was looked at."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from nst_det.data.check import check_data
    from nst_det.data.safe_io import shown_path
    from nst_det.engine.io import write_json

    report = check_data(args.path, args.split, args.classes, max(args.workers, 0))
    for problem in report.problems:
        print(f"{problem.kind}: {problem.line()}")
    if report.problems:
        table = Table("problem")
        table.add_column("times", justify="right")
        for kind, count in report.by_kind().items():
            table.add_row(kind, str(count))
        Console().print(table)
    print(f"{shown_path(report.root)}: {report.summary()}")
    if report.counts.get("lists") == 0:
        print("no lists in ImageSets/Main: nst-det init cuts them, or write ids into trainval.txt and test.txt")
    if args.output:
        problems = [asdict(problem) for problem in report.problems]
        tree = {"root": shown_path(report.root), "layout": report.layout, "counts": report.counts, "problems": problems}
        write_json(args.output, tree)
    return 2 if report.problems else 0
