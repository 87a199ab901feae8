"""What tiles are worth on big images: a scene of 4,000 x 3,000 pixels made of a run's test images.

    NST_DET_REAL_DATA=path/to/data python benchmarks/tiles.py --run RUN --tile 480

The images lie side by side on gray, with their objects.  Recall is that of all objects at IoU 0.5 with the scores
that predict takes: on the single images, on the scene as a whole, and on the scene in tiles.  It exits with 1 where
tiles find less than 0.9 of what is found on the single images, where the whole scene isn't below that, or where one
of two detections of a class lies in the other and no tile holds both: an object that is found twice across a seam.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch

import nst_det
from nst_det.data.annotation import VocAnnotation, VocObject
from nst_det.detection.tiles import Tiles
from nst_det.evaluation.boxes import Detections, GroundTruth
from nst_det.evaluation.errors import KINDS, analyze_errors
from nst_det.report.samples import open_data

SIZE = (3000, 4000)
GRAY = 128
LEAST, TWICE = 0.9, 0.7


def lay_out(pictures: list[tuple[np.ndarray, VocAnnotation]]) -> tuple[np.ndarray, VocAnnotation, int]:
    """Put as many images as fit into rows on a gray scene, with even gaps; return it, its objects and their number."""
    scene, objects, count = np.full((*SIZE, 3), GRAY, np.uint8), [], 0
    height, width = (max(picture.shape[axis] for picture, _ in pictures) for axis in (0, 1))
    rows, columns = SIZE[0] // height, SIZE[1] // width
    tops, lefts = ((np.arange(n) * (whole / n)).astype(int) for n, whole in ((rows, SIZE[0]), (columns, SIZE[1])))
    for (top, left), (picture, annotation) in zip(itertools.product(tops.tolist(), lefts.tolist()), pictures):
        scene[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        for item in annotation.objects:
            objects.append(VocObject(item.name, tuple(np.add(item.box, (left, top) * 2).tolist()), item.difficult))
        count += 1
    return scene, VocAnnotation("scene", SIZE[1], SIZE[0], tuple(objects)), count


def judge(detector, images, annotations, tiles=()):
    """Return recall, precision, objects found twice by TIDE, and across a seam of the tiles (T, 4), and CPU seconds."""
    start = time.process_time()
    found = [detector(image) for image in images]
    seconds = time.process_time() - start
    parts = [(a.id, one.boxes, one.labels, one.scores) for a, one in zip(annotations, found)]
    analysis = analyze_errors(
        Detections.from_images(parts, detector.classes),
        GroundTruth.from_annotations(annotations, detector.classes),
        detector.least_scores(),
    )
    hits = np.trace(analysis.confusion)
    objects, answers = analysis.confusion[:-1].sum(), analysis.confusion[:, :-1].sum()
    duplicates = dict(zip(KINDS, analysis.kinds))["duplicate"]
    return hits / objects, hits / max(answers, 1), duplicates, sum(across_seams(one, tiles) for one in found), seconds


def across_seams(found, tiles):
    """Count the pairs of a class of which the smaller box lies in the larger one by more than TWICE, in no one tile."""
    first, second = np.triu_indices(len(found.boxes), 1)
    same = found.labels[first] == found.labels[second]
    a, b = found.boxes[first[same]], found.boxes[second[same]]
    both = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None).prod(1)
    smaller = np.minimum((a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1))
    around = np.hstack((np.minimum(a[:, :2], b[:, :2]), np.maximum(a[:, 2:], b[:, 2:])))[:, None]
    held = ((around[..., :2] >= tiles[:, :2]) & (around[..., 2:] <= tiles[:, 2:])).all(2).any(1) if len(tiles) else True
    return int(((both > TWICE * smaller) & ~np.asarray(held)).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run, of the torchvision engine")
    parser.add_argument("--tile", type=int, default=480)
    parser.add_argument("--overlap", type=float, default=0.2)
    parser.add_argument("--threshold", type=float, help="least score (default: of best F1 on validation, or 0.5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = {"threshold": args.threshold, "device": "cpu"}
    whole = nst_det.load_detector(args.run, **given)
    in_tiles = nst_det.load_detector(args.run, **given, tile=args.tile, overlap=args.overlap)
    pictures = [
        (data.image(annotation.id), annotation)
        for data in open_data(args.run, whole.classes)
        for annotation in data.annotations()
    ]
    scene, objects, count = lay_out(pictures)
    images, annotations = zip(*pictures[:count])
    print(f"{count} test images, {len(objects.objects)} objects; tiles of {args.tile}, overlap {args.overlap:g}\n")
    cases = {
        "single images": judge(whole, images, annotations),
        "scene, whole": judge(whole, [scene], [objects]),
        "scene, in tiles": judge(in_tiles, [scene], [objects], Tiles(args.tile, args.overlap).places(*SIZE)),
    }
    print("| | recall | precision | found twice (TIDE) | across a seam | CPU seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (recall, precision, duplicates, pairs, seconds) in cases.items():
        print(f"| {name} | {recall:.3f} | {precision:.3f} | {duplicates} | {pairs} | {seconds:.1f} |")
    single, without, tiled = cases.values()
    limits = {
        f"tiles find {tiled[0] / single[0]:.3f} of what single images give": tiled[0] < LEAST * single[0],
        f"the whole scene has a recall of {without[0]:.3f}, not below that of tiles": without[0] >= tiled[0],
        f"{tiled[3]} objects are found twice across a seam": tiled[3] > 0,
    }
    missed = [line for line, wrong in limits.items() if wrong]
    print("\n" + ("\n".join(f"MISSED: {line}" for line in missed) or "all limits are kept"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
