"""``nst-det generate-data``: write the generated data set."""

from __future__ import annotations

import argparse

HELP = "write a generated data set: an image folder to distill on and a VOC folder to detect on"
COUNTS = {
    "seed": "of all draws",
    "classification-images": "images to train the classifier on",
    "classification-val-images": "images to validate it on",
    "detection-images": "images in the VOC list trainval",
    "detection-test-images": "images in the VOC list test",
    "classification-classes": "classes of the image folder",
    "detection-classes": "how many of these the VOC folder has",
}
LOOKS = {
    "rotation": "largest turn of an object, degrees",
    "contrast": "smallest RGB distance of an object from the ground, 0 to 200",
    "texture": "amplitude of the textures, grey levels",
    "noise": "largest deviation of the pixel noise, grey levels",
    "clutter": "density of distractors; 1 is dense",
    "shift": "largest distance of an object to classify from the middle, pixels",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word; one that isn't given keeps its default."""
    parser.add_argument("--output", metavar="DIR", required=True, help="the folder to make")
    for name, text in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    for name, text in LOOKS.items():
        parser.add_argument(f"--{name}", type=float, metavar="X", help=text)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0 takes all cores, at most 8")


def run(args: argparse.Namespace) -> int:
    """Generate, or keep what is there already with the same settings."""
    import time

    from nst_det.data.synthetic import CLASSIFICATION, DETECTION, generate_data, settings_from
    from nst_det.engine.progress import start_logging

    start_logging()
    given = vars(args)
    names = [name.replace("-", "_") for name in (*COUNTS, *LOOKS)]
    settings = settings_from({name: given[name] for name in names if given[name] is not None})
    start = time.monotonic()
    output = generate_data(args.output, settings, args.workers)
    print(f"{output}: {CLASSIFICATION} and {DETECTION} are there ({time.monotonic() - start:.1f} s)")
    return 0
