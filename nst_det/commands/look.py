"""``nst-det look``: the channel maps of a teacher and of students beside each other."""

from __future__ import annotations

import argparse

HELP = "see what a teacher and students look at: channel maps, MMD by level, PCA or t-SNE, CKA; one HTML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.epilog = "The first --weights is the teacher's, then the students': say, before and after transfer."
    parser.add_argument(
        "--weights",
        action="append",
        required=True,
        metavar="FILE",
        help="backbone://NAME or a backbone file; give it twice or more, the teacher first",
    )
    parser.add_argument("--image", nargs="+", required=True, metavar="PATH", help="images, or folders of images")
    parser.add_argument("--output", default="look.html", metavar="FILE", help="the page (default: look.html)")
    parser.add_argument(
        "--levels", nargs="+", default=[], metavar="NAME", help="of res2 .. res5 (default: all they have in common)"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=0,
        metavar="N",
        help="side of the images, pixels (default: as the teacher's card says)",
    )
    parser.add_argument("--tsne", action="store_true", help="embed by t-SNE as well (needs scikit-learn)")


def run(args: argparse.Namespace) -> int:
    """Measure, print the figures and write the page."""
    from nst_det.engine.io import write_text
    from nst_det.errors import UserError
    from nst_det.models import load_card
    from nst_det.visualize.measures import common_levels, compare_level, compare_levels, look_at, read_squares
    from nst_det.visualize.page import render

    if len(args.weights) < 2:
        raise UserError("--weights: give it twice or more: the teacher's, then each student's")
    size = args.size or int(load_card(args.weights[0]).input.get("size") or 224)
    if not 32 <= size <= 2048:
        raise UserError(f"--size: {size}; give 32 to 2048 pixels")
    names, images = read_squares(args.image, size)
    networks = [look_at(weights, images) for weights in args.weights]
    chosen = common_levels(networks, args.levels)
    levels = [compare_level(networks, level, args.tsne) for level in chosen]
    cka = [compare_levels(student, networks[0], chosen) for student in networks[1:]]
    write_text(args.output, render(networks, levels, cka, images, names))
    print(f"{len(images)} images of {size} pixels; against {networks[0].name}:")
    for row, level in enumerate(levels):
        for number, student in enumerate(networks[1:]):
            figures = f"MMD (poly) {level.mmd[number]['poly']:.4g}, nearest channel {level.nearest[number]:.3f}"
            few = "*" if cka[number].few[row, row] else ""
            print(f"{level.name}  {student.name}: {figures}, CKA {float(cka[number].values[row, row]):.3f}{few}")
    if any(bool(one.few.any()) for one in cka):
        print("* fewer positions than channels: give more images for a CKA that says something")
    print(f"page: {args.output}")
    return 0
