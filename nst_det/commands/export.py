"""nst-det export: a backbone or a detector for another framework."""

from __future__ import annotations

import argparse

HELP = "write a backbone for timm, torchvision or Detectron2, or a detector as ONNX or for torch.export"
BACKBONE_FORMATS = ("timm", "torchvision", "detectron2")
DETECTOR_FORMATS = ("onnx", "torch-export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nst-det export``."""
    parser.epilog = "What is written is compared with the original, and a model card goes beside it."
    parser.add_argument(
        "--format", required=True, choices=[*BACKBONE_FORMATS, *DETECTOR_FORMATS], help="whose names and files to write"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--weights", metavar="FILE", help="backbone://NAME or a backbone file; for detectron2 also plain ResNet weights"
    )
    what.add_argument("--run", dest="run_folder", metavar="DIR", help="for a detector: the folder of a train-det run")
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="onnx: FILE.onnx, torch-export: FILE.pt2, timm: a folder to make, torchvision: FILE.pth, "
        "detectron2: FILE.pkl or FILE.pth",
    )
    parser.add_argument("--arch", default="", metavar="NAME", help="timm name of plain weights, for example resnet50")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="PATH", help="compare a detector on these (default: its test images)"
    )


def run(args: argparse.Namespace) -> int:
    """Export and print where it is and how exact it is."""
    from nst_det.errors import UserError

    of_detector = args.format in DETECTOR_FORMATS
    if of_detector != bool(args.run_folder):
        wanted = "a detector: give --run DIR" if of_detector else "a backbone: give --weights FILE"
        raise UserError(f"--format {args.format} is for {wanted}")
    if args.arch and args.format != "detectron2":
        raise UserError("--arch: a backbone file says its architecture itself; leave --arch out")
    if args.images and not of_detector:
        raise UserError("--images: only detectors are compared on images; leave it out")
    if of_detector:
        _detector(args)
    elif args.format == "detectron2":
        _detectron2(args)
    else:
        _backbone(args)
    return 0


def _detector(args: argparse.Namespace) -> None:
    from nst_det.export.detector import export_detector

    exported = export_detector(args.run_folder, args.output, args.format, args.images)
    print(f"detector  {exported.file}")
    print(f"card      {exported.card}")
    print(f"compared  {exported.difference.line()}")
    if exported.ties:
        print(f"          on {exported.ties} of them anchors have equal scores, whose order PyTorch leaves open")


def _backbone(args: argparse.Namespace) -> None:
    from nst_det.export.backbone import LIMIT, export_timm, export_torchvision

    exported = (export_timm if args.format == "timm" else export_torchvision)(args.weights, args.output)
    print(f"weights   {exported.weights}")
    print(f"card      {exported.card}")
    print(f"compared  logits within {exported.parity:.2g} (limit {LIMIT:g})")


def _detectron2(args: argparse.Namespace) -> None:
    from nst_det.detectron2 import INSTALL_PAGE
    from nst_det.detectron2.export import PARITY_LIMIT, export_backbone
    from nst_det.engine.io import write_text
    from nst_det.export.modelcard import DETECTRON2_USE, backbone_card
    from nst_det.models import load_card

    exported = export_backbone(args.weights, args.output, args.arch)
    if exported.parity is None:
        parity = f"not checked: Detectron2 is not installed ({INSTALL_PAGE})"
    else:
        parity = f"{exported.parity:.2g} largest difference of res2..res5 (limit {PARITY_LIMIT:g})"
    print(f"weights  {exported.weights}")
    print(f"config   {exported.config}")
    if not args.arch:
        # somebody's plain weights say nothing of themselves, so there is nothing for a card
        beside = exported.weights.with_suffix(".md")
        use = DETECTRON2_USE.format(config=exported.config.name)
        write_text(beside, backbone_card(load_card(args.weights), beside.stem, "detectron2", parity, use))
        print(f"card     {beside}")
    print(f"parity   {parity}")
