#!/usr/bin/env python3
"""VOC mAP of anyone's detections: eval_voc.py --voc-root ROOT --split test --detections DIR_OR_FILE [--output F]."""

import sys

from nst_det.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
