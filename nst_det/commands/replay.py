"""``nst-det replay``: a training step that gave something that is no number, run again."""

from __future__ import annotations

import argparse

from nst_det.commands import add_trust_pickle

HELP = "run a step again whose loss or gradient was no number, from the file that training left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.add_argument("file", metavar="FILE", help="in the folder nonfinite of the run, as the message named it")
    add_trust_pickle(parser)


def run(args: argparse.Namespace) -> int:
    """Run it and show what came out.  Codes: 0 the same as in the run, 1 something else."""
    from nst_det.comparison.pipeline import print_table
    from nst_det.detection.trainer import KIND as DETECT
    from nst_det.engine.device import gpu_errors_in_one_line
    from nst_det.engine.nan_guard import read_step, replay
    from nst_det.models.io import trusting_pickles

    content = read_step(args.file)
    if content["kind"] == DETECT:
        from nst_det.detection.replay import rebuild
    else:
        from nst_det.distillation.replay import rebuild
    with trusting_pickles(args.trust_pickle), gpu_errors_in_one_line("hide the GPU: CUDA_VISIBLE_DEVICES=''"):
        found = replay(content, args.file, rebuild)
    print_table(found)
    print("\n".join(found.lines))
    return 0 if found.same else 1
