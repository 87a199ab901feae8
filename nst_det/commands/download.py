"""``nst-det download``: PASCAL VOC from the net."""

from __future__ import annotations

import argparse

HELP = "get PASCAL VOC 2007 or 2012 from the net, from several mirrors, resumed and checked"
NAMES = ("voc2007", "voc2012")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.epilog = "Stopped, by whatever: the same command goes on where it was."
    parser.add_argument("name", choices=NAMES, help="voc2007: trainval and test, 0.9 GB; voc2012: trainval, 2.0 GB")
    parser.add_argument("--output", default="data", metavar="DIR", help="parent of VOCdevkit (default: data)")
    parser.add_argument(
        "--mirror", action="append", default=[], metavar="URL", help="folder with the archives, tried first; repeatable"
    )
    parser.add_argument("--keep-archives", action="store_true", help="leave the .tar files beside VOCdevkit")


def run(args: argparse.Namespace) -> int:
    """Get it, say where it is and under which terms."""
    from nst_det.data.download import RELEASES, download_voc
    from nst_det.data.safe_io import shown_path
    from nst_det.engine.progress import start_logging

    start_logging()
    release = RELEASES[args.name]
    root = download_voc(release, args.output, args.mirror, args.keep_archives)
    lists = ", ".join(f"{name} {count}" for name, count in release.splits.items())
    print(f"{shown_path(root)}: whole (images: {lists})")
    print(f"terms     {release.terms} (the images are under Flickr's)")
    print(f"next      nst-det check-data {shown_path(root)}")
    print(f"          the configs in configs/detect/voc read it by VOC_ROOT={shown_path(root.parent)}")
    return 0
