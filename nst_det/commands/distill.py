"""``nst-det distill``: stage one, a backbone file for each transfer method."""

from __future__ import annotations

import argparse

from nst_det.commands import add_trust_pickle, trust_words

HELP = "stage one: train students by several transfer methods side by side"
RESUMES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.add_argument("--config-file", metavar="FILE", required=True, help="YAML of stage one, see configs/distill")
    add_trust_pickle(parser)
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="keys of the config with other values"
    )


def run(args: argparse.Namespace) -> int:
    """Train, then print a table of the results."""
    import sys

    args.overrides = [*args.overrides, *trust_words(args, "")]
    from rich.console import Console

    from nst_det.api import distill
    from nst_det.engine.device import keep_freed_memory
    from nst_det.engine.distributed import is_main_process, stop_processes
    from nst_det.engine.progress import start_logging

    start_logging()
    keep_freed_memory()
    answer = distill(args.config_file, args.overrides)
    # into a file or a pipe: as wide as the table needs
    console = Console(width=None if sys.stdout.isatty() else 160)
    if is_main_process():
        console.print(answer)
    stop_processes()
    return 0
