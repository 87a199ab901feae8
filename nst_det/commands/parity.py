"""nst-det parity: the same detector on both engines."""

from __future__ import annotations

import argparse

HELP = "compare both engines on the same config, weights and images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nst-det parity``."""
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML that both engines honor")
    parser.add_argument("--weights", required=True, metavar="FILE", help="of a whole detector, by either engine")
    parser.add_argument("--image", required=True, nargs="+", metavar="FILE", help="images to run on")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config values")


def run(args: argparse.Namespace) -> int:
    """Compare and print; the code is 1 where a difference is above its limit."""
    from nst_det import detectron2 as engine

    engine.require()
    from nst_det.detectron2 import parity

    engines = parity.load_engines(args.config_file, args.weights, args.opts)
    found = parity.compare(engines, args.image)
    print(f"images      {found.images}")
    print(f"pixels      {found.pixels:.3g} largest difference after resizing")
    for level, value in found.features.items():
        print(f"{level:11s} {value:.3g} largest difference (limit {parity.FEATURE_LIMIT:g})")
    print(f"detections  {found.detections}, only on one engine: {found.unmatched} (limit 0)")
    print(f"boxes       {found.box:.3g} pixels largest difference (limit {parity.BOX_LIMIT:g})")
    print(f"scores      {found.score:.3g} largest difference (limit {parity.SCORE_LIMIT:g})")
    print("the same detector" if found.passed else "NOT the same detector")
    return 0 if found.passed else 1
