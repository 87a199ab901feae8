"""``nst-det predict``: a finished detector on images, folders or a video."""

from __future__ import annotations

import argparse

HELP = "detect objects on images, folders or a video with a finished run; writes pictures, JSON, VOC XML or CSV"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.epilog = (
        "exit code: 0 if every image was read, 2 if one was not (the others are done all the same). "
        "To score detections.json by nst-det evaluate, take --threshold 0.02 or less: AP counts low scores too."
    )
    parser.add_argument("inputs", nargs="+", metavar="PATH", help="images, folders of images, or videos")
    parser.add_argument("--run", dest="run_folder", required=True, metavar="DIR", help="folder of a train-det run")
    parser.add_argument("--output", default="predictions", metavar="DIR", help="where to write (default: predictions)")
    parser.add_argument(
        "--format",
        default="images,json",
        metavar="LIST",
        help="what to write: images, json, voc, csv, joined by commas (default: images,json)",
    )
    parser.add_argument("--threshold", type=float, default=0.5, metavar="X", help="least score, 0 to 1 (default: 0.5)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="only these classes (default: all)")
    parser.add_argument("--device", default="", metavar="NAME", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take each N-th frame of a video")


def run(args: argparse.Namespace) -> int:
    """Predict, say what was found and what could not be read."""
    import sys

    from nst_det.cli import EXIT_BAD_INPUT
    from nst_det.detection.predict import find_sources, load_run, predict, read_sources
    from nst_det.detection.predictions import FORMATS, PredictionWriter
    from nst_det.engine.device import compute_line, gpu_errors_in_one_line, named_device
    from nst_det.errors import UserError

    formats = [word for word in args.format.split(",") if word]
    unknown = [word for word in formats if word not in FORMATS]
    if unknown or not formats:
        raise UserError(f"--format: '{args.format}': choose from {', '.join(FORMATS)}, joined by commas")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold: {args.threshold} is not a score; give a number from 0 to 1")
    if args.every < 1:
        raise UserError(f"--every: {args.every}; give 1 or more")
    sources = find_sources(args.inputs)
    device = named_device(args.device)
    failed: list[UserError] = []
    images = 0
    with gpu_errors_in_one_line("take --device cpu"):
        detector, config, classes = load_run(args.run_folder, device, args.threshold)
        kept = chosen_labels(args.classes, classes)
        print(compute_line(device, None))
        writer = PredictionWriter(args.output, formats, classes)
        for prediction in predict(detector, config, read_sources(sources, args.every, failed.append)):
            writer.add(prediction if kept is None else prediction.of_labels(kept))
            images += 1
    counts = writer.finish()
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{images} images, {sum(counts.values())} detections ({words or 'none'}) in {args.output}")
    if failed:
        print(f"nst-det: {len(failed)} of {len(sources)} files could not be read:", file=sys.stderr)
        for error in failed:
            print(f"  {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def chosen_labels(names: list[str] | None, classes: tuple[str, ...]) -> list[int] | None:
    """Labels of the classes that the user names; None for all.

    Raises:
        UserError: a class that the detector doesn't know.
    """
    from nst_det.errors import UserError

    for name in names or ():
        if name not in classes:
            raise UserError(f"--classes: this detector doesn't know '{name}'; it knows {', '.join(classes)}")
    return None if names is None else [classes.index(name) for name in names]
