"""``nst-det doctor``: what this machine has, whether it fits together, and how to mend what doesn't."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "look at versions, hardware, disk, data sets and backbones; say how to mend each fault"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the word."""
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders of data sets to check as well")
    parser.add_argument("--output", type=Path, default=Path("output"), help="where runs would be written")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0, or 2 if one of them is a fault."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from nst_det.doctor import FAULT, OK, examine

    findings = examine(args.data, args.output)
    table = Table("what", "state", "found", "remedy")
    for finding in findings:
        color = {OK: "green", FAULT: "red"}.get(finding.state, "yellow")
        cells = (finding.what, f"[{color}]{finding.state}[/]", escape(finding.found), escape(finding.remedy))
        table.add_row(*cells)
    Console().print(table)
    return 2 if any(finding.state == FAULT for finding in findings) else 0
