"""``nst-det evaluate``: VOC mAP of anyone's detections."""

from __future__ import annotations

import argparse

HELP = "score detections on a VOC split: AP of each class, 11-point and area"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.add_argument(
        "--detections",
        metavar="PATH",
        required=True,
        help="a folder with comp4_det_SPLIT_CLASS.txt, our detections.json, or a COCO results file",
    )
    parser.add_argument(
        "--voc-root", "--voc", metavar="ROOT", required=True, help="the VOC folder with the annotations"
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="list in ImageSets/Main (default: test)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="default: those of the split's annotations")
    parser.add_argument(
        "--iou", nargs="+", type=float, default=[0.5], metavar="X", help="overlap thresholds; the first makes the table"
    )
    parser.add_argument("--coco", action="store_true", help="COCO AP too")
    parser.add_argument(
        "--coco-names",
        metavar="FILE",
        help="a COCO annotation file that says which image and class the numbers in COCO results mean",
    )
    parser.add_argument("--output", "--json", metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table and, if asked, write it."""
    from rich.console import Console

    from nst_det.api import check_overlaps, read_voc
    from nst_det.engine.io import write_json
    from nst_det.evaluation.coco import evaluate_coco
    from nst_det.evaluation.voc import evaluate_voc

    overlaps = check_overlaps(args.iou)
    detections, truth = read_voc(args.detections, args.voc_root, args.split, args.classes, args.coco_names)
    result = evaluate_voc(detections, truth, overlaps)
    console = Console()
    console.print(result)
    figures = result.to_dict()
    figures["by_iou"] = {}
    for threshold, by_points, by_area in zip(result.thresholds, result.map11.tolist(), result.map_area.tolist()):
        if len(result.thresholds) > 1:
            console.print(f"IoU {threshold:g}: mAP {by_points:.4f} (11-point), {by_area:.4f} (area)", highlight=False)
        part = result.to_dict(threshold)
        figures["by_iou"][f"{threshold:g}"] = {"map": part["map"], "map_area": part["map_area"]}
    if args.coco:
        coco = evaluate_coco(detections, truth)
        figures["coco"] = coco.to_dict()
        parts = ", ".join(f"{name} {value:.4f}" for name, value in coco.summary.items())
        console.print(f"COCO: {parts}", highlight=False, soft_wrap=True)
    if args.output:
        write_json(args.output, figures)
    return 0
