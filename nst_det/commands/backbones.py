"""``nst-det backbones``: what is in the registry, and whether a detector computes what stage one trained."""

from __future__ import annotations

import argparse

HELP = "list the backbones in the registry, or check one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.add_argument("--root", metavar="DIR", help="a folder with backbone files instead of $NST_DET_BACKBONES")
    parser.add_argument(
        "--check",
        metavar="NAME",
        help="load NAME (or a path) strictly and print the largest difference between the maps of the classifier "
        "and of the detector's bottom-up on the same image",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, or the result of the check."""
    import sys
    from pathlib import Path

    from rich.console import Console

    from nst_det.errors import UserError
    from nst_det.models.bottomup import prove_parity
    from nst_det.models.io import backbones_table, list_backbones
    from nst_det.models.registry import PREFIX, registry_folders

    folders = [Path(args.root).expanduser()] if args.root else registry_folders()
    # into a file or a pipe: as wide as the table needs
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.check:
        name = args.check.removeprefix(PREFIX)
        if args.root and "/" not in name:
            path: str | Path = folders[0] / f"{name.removesuffix('.safetensors')}.safetensors"
        else:
            path = name if "/" in name else f"{PREFIX}{name}"
        difference = prove_parity(path)
        console.print(f"{name}: classifier and bottom-up differ by at most {difference:.3g}", markup=False)
        if difference > 0:
            raise UserError(f"{name}: the bottom-up doesn't compute what the classifier computes")
        return 0
    if args.root and not folders[0].is_dir():
        raise UserError(f"--root {args.root}: no such folder")
    entries, faults = list_backbones(folders)
    where = ", ".join(str(folder) for folder in folders)
    if entries:
        console.print(backbones_table(entries, f"backbones in {where}"))
    else:
        console.print(f"no backbones in {where} yet; nst-det distill makes them", markup=False)
    for fault in faults:
        console.print(fault, style="yellow", markup=False)
    return 0
