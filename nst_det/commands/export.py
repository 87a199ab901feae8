"""nst-det export: a distilled backbone for another framework."""

from __future__ import annotations

import argparse

HELP = "write a distilled backbone for another framework"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nst-det export``."""
    parser.add_argument("--format", required=True, choices=["detectron2"], help="whose names and files to write")
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="backbone://NAME, a backbone file, or plain ResNet weights"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="ends in .pkl or .pth; a .yaml goes beside it")
    parser.add_argument("--arch", default="", metavar="NAME", help="timm name of plain weights, for example resnet50")


def run(args: argparse.Namespace) -> int:
    """Export and print where it is and how exact it is."""
    from nst_det.detect.detectron2 import INSTALL_PAGE
    from nst_det.detect.detectron2.export import PARITY_LIMIT, export_backbone

    exported = export_backbone(args.weights, args.output, args.arch)
    print(f"weights  {exported.weights}")
    print(f"config   {exported.config}")
    if exported.parity is None:
        print(f"parity   not checked: Detectron2 is not installed ({INSTALL_PAGE})")
    else:
        print(f"parity   {exported.parity:.2g} largest difference of res2..res5 (limit {PARITY_LIMIT:g})")
    return 0
