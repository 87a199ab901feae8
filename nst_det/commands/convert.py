"""nst-det convert: a detector's weights under other names."""

from __future__ import annotations

import argparse

from nst_det.commands import add_trust_pickle

HELP = "write a trained detector's weights for the other engine, a plain Detectron2, or torchvision"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nst-det convert``."""
    parser.add_argument("--weights", required=True, metavar="FILE", help="of a whole detector; its form is recognized")
    parser.add_argument(
        "--to",
        required=True,
        choices=["timm", "detectron2", "torchvision"],
        help="timm: both engines here; detectron2: build_resnet_fpn_backbone; torchvision: its own Faster R-CNN",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="ends in .pth")
    add_trust_pickle(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was made of what."""
    from nst_det.detectron2.convert import convert_file
    from nst_det.models.io import trusting_pickles

    with trusting_pickles(args.trust_pickle):
        form, entries = convert_file(args.weights, args.to, args.output)
    print(f"{args.output}: {entries} entries, from {form} to {args.to}")
    return 0
