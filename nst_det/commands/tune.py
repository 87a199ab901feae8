"""``nst-det tune``: the same search of weights and levels for every method of a comparison."""

from __future__ import annotations

import argparse
import sys

HELP = "search weight and levels of each method with the same budget, on images kept from training; needs Optuna"
RESUMES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the word's options."""
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML of the search")
    parser.add_argument("--output", metavar="DIR", help="where everything is written, in place of OUTPUT_DIR")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="runs side by side (default: cores, or GPUs)")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="values, such as TRIALS 16")


def run(args: argparse.Namespace) -> int:
    """Search.  Codes: 0 done, 1 a run failed, 2 an input can't be used, 75 stopped, to go on."""
    from nst_det.comparison.launch_local import RunFailed
    from nst_det.comparison.pipeline import print_table
    from nst_det.engine.progress import start_logging
    from nst_det.errors import UserError
    from nst_det.tune.config import load_tuning
    from nst_det.tune.run import tune, tuning_table

    if args.jobs < 0:
        raise UserError("--jobs can't be negative; leave it out for as many as there are cores or GPUs")
    start_logging()
    try:
        tuning = load_tuning(args.config_file, args.output, args.overrides)
        found, path = tune(tuning, args.jobs)
    except RunFailed as error:
        print(f"nst-det: {error}", file=sys.stderr)
        return error.code
    print_table(tuning_table(tuning, found))
    print(f"found: {path}")
    return 0
