"""``nst-det benchmark``: what a backbone or a detector costs."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

HELP = "parameters, arithmetic, latency and throughput of a backbone or a detector"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--arch", metavar="NAME", help="a timm architecture, with its classifier of 1000 classes")
    what.add_argument("--weights", metavar="FILE", help="a backbone file, or backbone://NAME")
    what.add_argument("--run", dest="run_folder", metavar="DIR", help="the detector of a finished train-det run")
    what.add_argument("--config-file", metavar="FILE", help="the detector of a stage-two YAML, with random weights")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="N", help="batch sizes (default: 1 8)")
    parser.add_argument(
        "--size", default="", metavar="S", help="224, or HEIGHTxWIDTH (default: 224; a detector's own test size)"
    )
    parser.add_argument("--device", default="", metavar="NAME", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed passes a batch size (default: 20)")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config values, with --config-file")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    import torch

    from nst_det.benchmark import benchmark
    from nst_det.engine.device import compute_line, gpu_errors_in_one_line, named_device
    from nst_det.engine.io import write_json
    from nst_det.engine.run_dir import provenance
    from nst_det.errors import UserError

    if min(args.batch) < 1 or args.repeats < 1 or args.threads < 0:
        raise UserError("--batch and --repeats must be at least 1, --threads at least 0")
    if args.opts and not args.config_file:
        raise UserError(f"command line: '{args.opts[0]}': KEY VALUE pairs go with --config-file")
    size, device = parse_size(args.size), named_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    with gpu_errors_in_one_line("lower --batch or --size"):
        name, model, parameters, own_size = load(args, device)
        print(compute_line(device, None))
        figures = {
            "name": name,
            "size": list(size or own_size),
            "device": str(device),
            "threads": torch.get_num_threads(),
            **benchmark(model, size or own_size, args.batch, args.repeats, device, parameters),
            "provenance": provenance(),
        }
    print_figures(figures)
    if args.json:
        write_json(args.json, figures)
    return 0


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) of ``224`` or ``240x320``; None for "".

    Raises:
        UserError: anything else.
    """
    from nst_det.errors import UserError

    if not text:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not found or not 8 <= int(found[1]) <= 8192 or not 8 <= int(found[2] or found[1]) <= 8192:
        raise UserError(f"--size: '{text}'; give pixels such as 224, or HEIGHTxWIDTH such as 240x320, from 8 to 8192")
    return int(found[1]), int(found[2] or found[1])


def load(args: argparse.Namespace, device: torch.device) -> tuple[str, nn.Module, int, tuple[int, int]]:
    """Name, network, parameters and default image size of what the command line names.

    Raises:
        UserError: it can't be built.
    """
    from nst_det.benchmark import BACKBONE_SIZE
    from nst_det.errors import UserError
    from nst_det.models import count_parameters, create_model, load_backbone, load_strict

    if args.arch:
        try:
            model = create_model(args.arch, 1000)
        except ValueError as error:
            raise UserError(f"--arch: {error}") from error
        return args.arch, model, count_parameters(model), BACKBONE_SIZE
    if args.weights:
        state_dict, card = load_backbone(args.weights)
        model = create_model(card.arch, card.num_classes, **card.arch_kwargs)
        load_strict(model, state_dict, args.weights)
        side = int(card.input.get("size", BACKBONE_SIZE[0]))
        return f"{card.arch} ({args.weights})", model, count_parameters(model), (side, side)
    return load_detector(args, device)


def load_detector(args: argparse.Namespace, device: torch.device) -> tuple[str, nn.Module, int, tuple[int, int]]:
    """The same of a detector."""
    from nst_det.benchmark import Pixels, photo_size
    from nst_det.detection.config import load_detect_config, resolve_classes
    from nst_det.detection.data import data_classes
    from nst_det.detection.predict import load_run
    from nst_det.detection.torchvision import Detector, build_detector
    from nst_det.engine.device import set_float32_precision
    from nst_det.models import count_parameters

    detector: Detector
    if args.run_folder:
        detector, config, _ = load_run(args.run_folder, device)
    else:
        config = load_detect_config(args.config_file, args.opts)
        if not config.MODEL.ROI_HEADS.NUM_CLASSES:
            resolve_classes(config, data_classes(config))
        set_float32_precision(config.FLOAT32_PRECISION, device)
        detector = build_detector(config)
    return args.run_folder or args.config_file, Pixels(detector), count_parameters(detector), photo_size(config)


def print_figures(figures: dict[str, Any]) -> None:
    """Print the table of latencies and the counts above it."""
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    height, width = figures["size"]
    where = f"{height}x{width} pixels, {figures['device']}, {figures['threads']} threads"
    table = Table(title=escape(f"{figures['name']}, {where}"))
    for column in ("batch", "median ms", "p10 ms", "p90 ms", "images/s"):
        table.add_column(column, justify="right")
    for row in figures["latency"]:
        cells = [f"{1000 * row[key]:.1f}" for key in ("median", "p10", "p90")]
        table.add_row(str(row["batch"]), *cells, f"{row['images_per_second']:.1f}")
    console.print(table)
    console.print(f"parameters {figures['parameters'] / 1e6:.3f} M", highlight=False)
    console.print(
        f"one image  {figures['macs'] / 1e9:.3f} GMACs, {figures['flops'] / 1e9:.3f} GFLOPs "
        "(a multiply-add is 1 MAC = 2 FLOPs; papers often print MACs as FLOPs)",
        highlight=False,
        soft_wrap=True,
    )
    if figures["uncounted"]:
        names = ", ".join(name.removeprefix("aten::") for name in figures["uncounted"])
        console.print(f"uncounted  {names}", highlight=False, soft_wrap=True)
