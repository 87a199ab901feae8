"""``nst-det compare``: every method and seed through both stages, then the table and the report."""

from __future__ import annotations

import argparse
import sys

from nst_det.commands import add_trust_pickle, trust_words

HELP = "run a whole comparison of transfer methods and write its report; goes on where it was stopped"
RESUMES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the word's options."""
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML of the comparison")
    parser.add_argument("--output", metavar="DIR", help="where everything is written, in place of OUTPUT_DIR")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="runs side by side (default: cores, or GPUs)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the runs and what is done of them, then their time, disk and memory by a few steps of each kind",
    )
    parser.add_argument("--plan", action="store_true", help="print the runs and what is done of them, measure nothing")
    parser.add_argument(
        "--launcher",
        choices=("local", "ray"),
        default="local",
        help="where runs are done: here, or on a Ray cluster",
    )
    parser.add_argument("--address", default="", metavar="HOST:PORT", help="of the Ray cluster (default: here)")
    add_trust_pickle(parser)
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="config values, such as SEEDS [0,1,2]; DISTILL.X and DETECT.X set X of that stage's config",
    )


def run(args: argparse.Namespace) -> int:
    """Run or show the comparison.  Codes: 0 done, 1 a run failed, 2 an input can't be used, 75 stopped, to go on."""
    from nst_det import api
    from nst_det.comparison.config import load_comparison
    from nst_det.comparison.launch_local import RunFailed
    from nst_det.comparison.launch_ray import require_ray
    from nst_det.comparison.pipeline import dry_run, plan_table, print_table
    from nst_det.comparison.plan import make_plan
    from nst_det.engine.progress import start_logging
    from nst_det.errors import UserError

    args.overrides = [*args.overrides, *trust_words(args, "DISTILL.", "DETECT.")]
    if args.jobs < 0:
        raise UserError("--jobs can't be negative; leave it out for as many as there are cores or GPUs")
    if args.dry_run or args.plan:
        comparison = load_comparison(args.config_file, args.output, args.overrides)
        if args.plan:
            print_table(plan_table(comparison, make_plan(comparison)))
        else:
            dry_run(comparison, args.jobs)
        return 0
    if args.address and args.launcher != "ray":
        raise UserError("--address is that of a Ray cluster; add --launcher ray")
    address = args.address if args.launcher == "ray" else None
    if address is not None:
        require_ray()
    start_logging()
    try:
        answer = api.compare(args.config_file, args.overrides, output=args.output, jobs=args.jobs, ray_address=address)
    except RunFailed as error:
        print(f"nst-det: {error}", file=sys.stderr)
        return error.code
    print_table(answer)
    print(f"report: {answer.report}")
    return 0
