"""Commands that use a trained detector: predict, score, write it for others."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from typing import TYPE_CHECKING

from nst_det.cli.command import BACKBONE, DEVICE, RUN, TRUST_PICKLE, argument, command, existing, flag, one_of

if TYPE_CHECKING:
    from nst_det.detection.predictions import PredictResult

WEIGHTS, EXPORTED = existing("a file of weights"), existing("a file that nst-det export wrote")


@command(
    argument(
        "inputs", "PATH", "images, folders of images, or videos", nargs="+", type=existing("images, folders or a video")
    ),
    one_of(
        argument("--run", "DIR", "folder of a train-det run", dest="run_folder", type=RUN),
        argument(
            "--model", "FILE", "a detector that nst-det export wrote: .onnx, .xml (openvino) or .pt2", type=EXPORTED
        ),
    ),
    argument("--output", "DIR", "where to write (default: predictions)", default="predictions"),
    argument("--format", "LIST", "images, json, voc, csv by commas (default: images,json)", default="images,json"),
    argument("--threshold", "X", "minimum score, 0 to 1 (default: of best F1 on validation; else 0.5)", type=float),
    argument("--classes", "NAME", "only these classes (default: all)", nargs="+"),
    DEVICE,
    argument("--every", "N", "take each N-th frame of a video", type=int, default=1),
    argument("--tile", "N", "look at larger images in square tiles of N pixels a side", type=int, default=0),
    argument("--overlap", "X", "part of a tile that its neighbors share, below 1 (default: 0.2)", type=float),
    epilog="exit code: 0 if every image was read, 2 if one was not (the others are processed anyway). "
    "To score detections.json by nst-det evaluate, take --threshold 0.02 or less: AP counts low scores too.",
)
def predict(args: argparse.Namespace) -> int:
    """Detect objects on images, folders or videos with a run or an exported file; writes pictures, JSON, VOC or CSV."""
    from nst_det import api
    from nst_det.engine.device import compute_line, named_device

    formats = [name for name in args.format.split(",") if name]
    given = {name: getattr(args, name) for name in ("threshold", "device", "every", "tile", "overlap")}
    print(compute_line(named_device(args.device or ("cpu" if args.model else "")), None))
    run = args.run_folder or args.model
    result = api.predict(args.inputs, run, args.output, formats=formats, classes=args.classes or (), **given)
    counts = result.detections
    if result.tile and result.tile[0] != result.tile[1]:
        print("tiles of {} pixels, seen by the network at {}: best as large as training images".format(*result.tile))
    print(_thresholds_line(result))
    by_class = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{result.images} images, {sum(counts.values())} detections ({by_class or 'none'}) in {args.output}")
    if not counts and result.images:
        print(_nothing_line(result))
    if result.unreadable:
        print(f"nst-det: {len(result.unreadable)} of {result.files} files could not be read:", file=sys.stderr)
        for error in result.unreadable:
            print(f"  {error}", file=sys.stderr)
    return 2 if result.unreadable else 0


def _thresholds_line(result: PredictResult) -> str:
    scores = {name: f"{score:.2g}" for name, score in result.thresholds.items()}
    if result.chosen == "validation":
        by_class = ", ".join(f"{name} {score}" for name, score in scores.items())
        return f"minimum scores, of best F1 on the validation split: {by_class}"
    note = "" if result.chosen == "given" else " (the run has no validation split to choose it on; --threshold sets it)"
    return f"minimum score: {next(iter(scores.values()))}{note}"


def _nothing_line(result: PredictResult) -> str:
    if result.best is None:
        return "no detection of any score"
    # below the best score, by as few digits as tell it
    digits = next(n for n in itertools.count(1) if math.floor(result.best * 10**n))
    return f"best score {result.best:.2g}, try --threshold {math.floor(result.best * 10**digits) / 10**digits:g}"


DETECTIONS = "detections.json, COCO results or a folder of comp4_det_*.txt"
COCO_NAMES = "COCO annotations: the images and categories that numbers in COCO results mean"


@command(
    argument("--detections", "PATH", DETECTIONS, required=True, type=existing(DETECTIONS)),
    argument("--voc-root --voc", "ROOT", "the VOC folder with the annotations", required=True),
    argument("--split", "NAME", "list in ImageSets/Main (default: the one to test on, or the only one)", default=""),
    argument("--classes", "NAME", "in the order of numbers in COCO results (default: those annotated)", nargs="+"),
    argument("--iou", "X", "overlap thresholds; the first makes the table", nargs="+", type=float, default=[0.5]),
    flag("--coco", "COCO AP too"),
    argument("--coco-names", "FILE", COCO_NAMES, type=existing("a COCO file with categories (id and name)")),
    argument("--output --json", "FILE", "write the figures as JSON"),
)
def evaluate(args: argparse.Namespace) -> None:
    """Score detections on a VOC split: AP of each class, 11-point and area."""
    from nst_det.engine.format import print_table
    from nst_det.engine.io import write_json
    from nst_det.evaluation.coco import evaluate_coco
    from nst_det.evaluation.io import overlap_thresholds, read_voc
    from nst_det.evaluation.voc import evaluate_voc

    thresholds = overlap_thresholds(args.iou)
    detections, truth = read_voc(args.detections, args.voc_root, args.split, args.classes, args.coco_names)
    result = evaluate_voc(detections, truth, thresholds)
    print_table(result)
    parts = {f"{threshold:g}": result.to_dict(threshold) for threshold in thresholds}
    by_iou = {iou: {name: part[name] for name in ("map", "map_area")} for iou, part in parts.items()}
    figures = {**result.to_dict(), "by_iou": by_iou}
    if len(thresholds) > 1:
        for threshold, by_points, by_area in zip(thresholds, result.map11, result.map_area):
            print(f"IoU {threshold:g}: mAP {by_points:.4f} (11-point), {by_area:.4f} (area)")
    if args.coco:
        coco = evaluate_coco(detections, truth)
        figures["coco"] = coco.to_dict()
        print("COCO:", ", ".join(f"{name} {value:.4f}" for name, value in coco.summary.items()))
    if args.output:
        write_json(args.output, figures)


FORMATS = ["timm", "torchvision", "detectron2", "onnx", "openvino", "torch-export"]
PLAIN = "backbone://NAME or a backbone file; for detectron2 also plain ResNet weights"
EXPORT_IMAGES = "compare a detector on these (default: its test images)"
EXPORT_OUTPUT = "FILE.onnx, .xml (openvino), .pt2 (torch-export), .pth, .pkl (detectron2 alone), or a folder (timm)"


@command(
    argument("--format", None, "whose names and files to write", required=True, choices=FORMATS),
    one_of(
        argument("--weights", "FILE", PLAIN, type=BACKBONE),
        argument("--run", "DIR", "for a detector: the folder of a train-det run", dest="run_folder", type=RUN),
    ),
    argument("--output", "PATH", EXPORT_OUTPUT, required=True),
    argument("--arch", "NAME", "timm name of plain weights, for example resnet50", default=""),
    argument("--images", "PATH", EXPORT_IMAGES, nargs="+", default=[], type=existing("images or folders of images")),
    argument("--precision", None, "of a detector (default: fp32)", choices=["fp32", "fp16", "int8"], default="fp32"),
    argument("--batch", "N", "images that a detector takes at once (default: 1)", type=int, default=1),
    flag("--measure", "measure a detector's mAP on its test images, latency, size and memory, beside PyTorch"),
    argument(
        "--calibration",
        "PATH",
        "images for int8 (default: of the training split)",
        nargs="+",
        default=[],
        type=existing("images or folders of images"),
    ),
    epilog="What is written is compared with the original, and a model card is written next to it.",
)
def export(args: argparse.Namespace) -> None:
    """Write a backbone for timm, torchvision or Detectron2, or a detector for ONNX, OpenVINO or torch.export."""
    from nst_det import api

    given = {"run": args.run_folder or "", "weights": args.weights or "", "arch": args.arch, "images": args.images}
    of_detector = {
        "precision": args.precision,
        "batch": args.batch,
        "calibration": args.calibration,
        "measure": args.measure,
    }
    written = api.export(args.output, args.format, **given, **of_detector)
    for name, path in written.files.items():
        print(f"{name:9} {path}")
    print(f"compared  {written.agreement}")
    if written.deployed:
        from nst_det.engine.format import print_table
        from nst_det.report.deployed import table

        print_table(table(written.deployed, args.run_folder))


CONVERT_TO = "timm: both engines here; detectron2: build_resnet_fpn_backbone; torchvision: its own Faster R-CNN"


@command(
    argument("--weights", "FILE", "of a whole detector; its form is recognized", required=True, type=WEIGHTS),
    argument("--to", None, CONVERT_TO, required=True, choices=["timm", "detectron2", "torchvision"]),
    argument("--output", "FILE", "ends in .pth", required=True),
    TRUST_PICKLE,
)
def convert(args: argparse.Namespace) -> None:
    """Write a trained detector's weights for the other engine, a plain Detectron2, or torchvision."""
    from nst_det.models.convert import convert_file
    from nst_det.models.io import trusting_pickles

    with trusting_pickles(args.trust_pickle):
        form, entries = convert_file(args.weights, args.to, args.output)
    print(f"{args.output}: {entries} entries, from {form} to {args.to}")


@command(
    argument("--config-file", "FILE", "YAML that both engines honor", required=True, type=existing("a YAML")),
    argument("--weights", "FILE", "of a whole detector, by either engine", required=True, type=WEIGHTS),
    argument("--image", "FILE", "images to run on", required=True, nargs="+", type=existing("images")),
    argument("--opts", "KEY VALUE", "config values", nargs="+", default=[]),
)
def parity(args: argparse.Namespace) -> int:
    """Compare both engines on the same config, weights and images."""
    from nst_det import detectron2

    detectron2.require()
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
