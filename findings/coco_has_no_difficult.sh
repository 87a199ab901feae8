#!/usr/bin/env bash
# pycocotools has no equivalent of VOC's difficult: it overwrites "ignore", and a crowd forgives more than an ignored object.
#
# pycocotools 2.0.11: converters write VOC's difficult objects as "ignore": 1 or as "iscrowd": 1.  COCOeval overwrites the
# first by the second before it reads it: they count like all others, and AP is that of a harder data set.  Crowds are left
# out, but overlap with a crowd is measured in parts of the detection alone: a box anywhere inside a difficult object, which
# is a false positive to the devkit (IoU 0.16 here), costs nothing.
# Seen (AP at IoU 0.5 of one object found with a score of 0.8, with a box of a higher score inside a difficult object, and
# with none but itself):
#   plain 0.252 0.505, ignore 0.252 0.505, iscrowd 1.000 1.000; the devkit: 0.500 1.000
# Exit code 1 if "ignore" begins to count, or a crowd no longer forgives the box inside.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "pycocotools==2.0.11" "numpy<3"
"$folder/env/bin/python" - <<'PYTHON'
import contextlib
import io
import sys
from importlib.metadata import version

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

EASY, DIFFICULT, INSIDE = [10, 10, 60, 60], [200, 200, 150, 150], [210, 210, 60, 60]


def average_precision(flag, detections):
    boxes = [(EASY, {"iscrowd": 0}), (DIFFICULT, {"iscrowd": 0, **flag})]
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": 1, "width": 400, "height": 400}],
        "categories": [{"id": 1, "name": "horse"}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], **flags}
            for number, (box, flags) in enumerate(boxes, 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(np.array([[1, *box, score, 1] for box, score in detections], dtype=float))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    return round(float(evaluation.eval["precision"][0, :, 0, 0, -1].mean()), 3)


print("pycocotools", version("pycocotools"))
seen = {}
for name, flag in (("plain", {}), ("ignore", {"ignore": 1}), ("iscrowd", {"iscrowd": 1})):
    seen[name] = average_precision(flag, [(INSIDE, 0.9), (EASY, 0.8)]), average_precision(flag, [(EASY, 0.8)])
    print(name, *seen[name])
expected = {"plain": (0.252, 0.505), "ignore": (0.252, 0.505), "iscrowd": (1.0, 1.0)}
sys.exit(0 if seen == expected else f"changed: {seen}")
PYTHON
