"""Our VOC evaluator against Detectron2's, on the 4,952 test images of VOC 2007 with 100 detections each.

    python benchmarks/detectron2_evaluator.py --voc-root ROOT [--detections 100]

ROOT holds Annotations and ImageSets/Main/test.txt.  The detections are drawn near the objects and elsewhere; both
evaluators are fed image by image in the same process.  Detectron2 writes scores with 3 and boxes with 1 decimals, and
takes a strict > where the devkit takes >=; for the comparison ours gets its detections in that form.  It exits with 1
if an AP differs by more than 1e-6, or ours is less than 30 times faster.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch


def draw_detections(data, count: int, seed: int = 0):
    """For each image: id, boxes (count, 4) xyxy 0-based, scores (count,), labels (count,)."""
    draw = np.random.default_rng(seed)
    for annotation in data.annotations():
        size = (annotation.width, annotation.height)
        corners = np.sort(draw.uniform(0, 1, (count, 2, 2)), axis=1) * size
        boxes = corners.reshape(count, 4)
        labels = draw.integers(0, len(data.classes), count)
        near = draw.integers(0, len(annotation.objects), count // 2)
        boxes[: count // 2] = annotation.boxes[near] + draw.normal(0, 8, (count // 2, 4))
        labels[: count // 2] = data.labels(annotation)[near]
        scores = np.where(np.arange(count) < count // 2, draw.beta(3, 2, count), draw.beta(1, 4, count))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        yield annotation.id, boxes, scores, labels


def instances(boxes, scores, labels):
    from detectron2.structures import Boxes, Instances

    found = Instances((1000, 1000))
    found.pred_boxes, found.scores = Boxes(torch.from_numpy(boxes)), torch.from_numpy(scores)
    found.pred_classes = torch.from_numpy(labels)
    return {"instances": found}


def as_detectron2_writes(found, classes):
    """Detections as Detectron2's evaluator sees them after its text files, ties in its order."""
    from nst_det.evaluation.boxes import Detections

    ids = np.repeat([item[0] for item in found], [len(item[2]) for item in found])
    boxes = np.concatenate([item[1] for item in found]).astype(np.float32)
    scores = np.concatenate([item[2] for item in found])
    labels = np.concatenate([item[3] for item in found])
    boxes[:, :2] += 1
    scores = np.array([float(f"{value:.3f}") for value in scores.tolist()])
    boxes = np.array([[float(f"{value:.1f}") for value in row] for row in boxes])
    order = []
    for label in range(len(classes)):
        own = np.flatnonzero(labels == label)
        # not a stable sort: this is Detectron2's
        order.append(own[np.argsort(-scores[own])])
    order = np.concatenate(order)
    return Detections(ids[order].tolist(), tuple(classes), labels[order], boxes[order], scores[order])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--voc-root", required=True)
    parser.add_argument("--detections", type=int, default=100, help="on each image")
    args = parser.parse_args()
    torch.set_num_threads(1)

    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import PascalVOCDetectionEvaluator

    from nst_det.detectron2 import VocEvaluator, register_voc
    from nst_det.detectron2.evaluator import THRESHOLDS
    from nst_det.evaluation.boxes import GroundTruth
    from nst_det.evaluation.voc import evaluate_voc

    data = register_voc("benchmark_voc", args.voc_root, "test")
    MetadataCatalog.get("benchmark_voc").set(year=2007)
    found = [
        (id_, boxes.astype(np.float32), scores.astype(np.float32), labels)
        for id_, boxes, scores, labels in draw_detections(data, args.detections)
    ]
    seconds, results = {}, {}
    for name, evaluator in (
        ("ours", VocEvaluator("benchmark_voc", coco=False)),
        ("detectron2", PascalVOCDetectionEvaluator("benchmark_voc")),
    ):
        evaluator.reset()
        start = time.perf_counter()
        for id_, boxes, scores, labels in found:
            evaluator.process([{"image_id": id_}], [instances(boxes, scores, labels)])
        middle = time.perf_counter()
        results[name] = evaluator.evaluate()
        seconds[name] = (middle - start, time.perf_counter() - middle)

    theirs = results["detectron2"]["bbox"]
    truth = GroundTruth.from_annotations(data.annotations(), data.classes)
    # > at a threshold is >= at the next number
    strict = [float(np.nextafter(value / 100, 1)) for value in range(50, 100, 5)]
    rounded = evaluate_voc(as_detectron2_writes(found, data.classes), truth, strict)
    same = {
        "AP": 100 * float(rounded.map11.mean()),
        "AP50": 100 * float(rounded.map11[0]),
        "AP75": 100 * float(rounded.map11[5]),
    }
    worst = max(abs(theirs[name] - value) for name, value in same.items()) / 100
    total = {name: sum(parts) for name, parts in seconds.items()}
    ratio = total["detectron2"] / total["ours"]
    print(f"{len(found)} images, {sum(len(item[2]) for item in found)} detections, {len(THRESHOLDS)} overlaps")
    for name, (process, evaluate) in seconds.items():
        print(f"  {name:10s} process {process:7.2f} s, evaluate {evaluate:7.2f} s")
    alone = seconds["detectron2"][1] / seconds["ours"][1]
    print(f"faster by a factor of {ratio:.1f} (limit 30), evaluate alone {alone:.1f}")
    for name in ("AP", "AP50", "AP75"):
        exact = results["ours"]["voc"][name]
        print(f"  {name:5s} Detectron2 {theirs[name]:.6f}, ours rounded alike {same[name]:.6f}, unrounded {exact:.6f}")
    print(f"largest difference {worst:.2g} (limit 1e-6)")
    return int(worst > 1e-6 or ratio < 30)


if __name__ == "__main__":
    sys.exit(main())
