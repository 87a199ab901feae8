"""Time of VOC evaluation on the whole VOC 2007 test set, after the files are read.

python benchmarks/voc_eval.py --voc-root ROOT --detections FOLDER [--repeat 7]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nst_det.data.voc import VocDataset
from nst_det.evaluation.boxes import GroundTruth
from nst_det.evaluation.io import read_detections
from nst_det.evaluation.voc import evaluate_voc


def seconds(function: Callable[[], Any], repeat: int) -> str:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return f"{statistics.median(times):7.3f} s  (best {min(times):.3f}, worst {max(times):.3f}, of {repeat})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voc-root", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--detections", required=True)
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()

    data = VocDataset(args.voc_root, args.split)
    annotations = data.annotations()
    detections = read_detections(args.detections, data.ids, data.classes, args.split)
    truth = GroundTruth.from_annotations(annotations, data.classes)
    many = np.arange(0.5, 1.0, 0.05).tolist()
    print(f"{len(data)} images, {len(truth.box)} objects, {len(detections)} detections, {len(data.classes)} classes")
    read = seconds(lambda: VocDataset(args.voc_root, args.split, data.classes).annotations(), 1)
    print(f"read annotations                 {read}")
    found = seconds(lambda: read_detections(args.detections, data.ids, data.classes, args.split), args.repeat)
    print(f"read detections                  {found}")
    whole = seconds(
        lambda: evaluate_voc(detections, GroundTruth.from_annotations(annotations, data.classes)), args.repeat
    )
    print(f"evaluate at IoU 0.5              {whole}")
    print(f"evaluate at 10 thresholds        {seconds(lambda: evaluate_voc(detections, truth, many), args.repeat)}")
    result = evaluate_voc(detections, truth)
    print(f"mAP {result.map11[0]:.6f} (11-point), {result.map_area[0]:.6f} (area)")


if __name__ == "__main__":
    main()
