"""What is deployed of the blood-cell detector: every format beside PyTorch, held to limits.

    NST_DET_REAL_DATA=DIR python benchmarks/exported.py [RUN] [--threads 1] [--output FOLDER]

DIR holds bccd/ in VOC layout.  RUN is the folder of a finished train-det run on it; without one, it is trained
(configs/detect/bccd.yaml with 300 steps, a minute and a half on one core).  It prints the table, writes it to
FOLDER/exported.md and .json, and exits with 1 where a limit is missed: mAP within .001 of PyTorch's in fp32 and fp16,
within .015 in int8; int8 in at most half of PyTorch's time, files called in turns with it, and at most .30 of its size.
A limit that can't hold says why: a class that lost, or what the time or the size is made of.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from nst_det.detection.config import load_detect_config
from nst_det.detection.pipeline import train_detector
from nst_det.engine.io import write_json, write_text
from nst_det.exporting.detector import DetectorExport
from nst_det.exporting.measure import measure
from nst_det.exporting.runtime import SUFFIXES
from nst_det.report.deployed import PYTORCH, Deployed, add_deployed, differences, markdown

FILES = (
    *(("onnx", precision) for precision in ("fp32", "fp16", "int8")),
    *(("openvino", precision) for precision in ("fp32", "fp16", "int8")),
    ("torch-export", "fp32"),
)
MAP_LIMIT = {"fp32": 0.001, "fp16": 0.001, "int8": 0.015}
TIME_LIMIT, SIZE_LIMIT = 0.5, 0.30
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "detect" / "bccd.yaml"
TRAINING = ["SOLVER.MAX_ITER", "300", "SOLVER.BACKBONE_MULTIPLIER", "1.0", "DATASETS.VAL_FRACTION", "0.15"]


def missed(row: Deployed, torch: Deployed, folder: Path) -> list[str]:
    """What a file misses, with the reason."""
    found, limit = [], MAP_LIMIT[row.precision]
    if abs(row.map - torch.map) > limit:
        lost = differences(row, torch)
        worst = max(lost, key=lambda name: abs(lost[name]))
        found.append(f"mAP {row.map - torch.map:+.4f} (limit {limit}), most of it {worst}: {lost[worst]:+.4f}")
    if row.precision != "int8":
        return found
    if row.ratio > TIME_LIMIT:
        found.append(f"{row.ratio:.2f} of PyTorch's time (limit {TIME_LIMIT})")
    size = row.size / torch.size
    if size > SIZE_LIMIT:
        path = folder / f"{row.precision}{SUFFIXES[row.form]}"
        graph = path.stat().st_size if row.form == "openvino" else 0
        weights = (row.size - graph) / torch.size
        reason = f"{size:.3f} of PyTorch's size (limit {SIZE_LIMIT})"
        if weights > SIZE_LIMIT:
            found.append(reason)
        else:
            # it doesn't grow with the network
            print(
                f"{row.name}: {reason}: {graph / 1e6:.2f} MB of it are the graph in XML; the weights are {weights:.3f}"
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="folder of a finished run on the blood cells (default: train one)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1, help="images a call")
    parser.add_argument("--output", type=Path, default=Path("output/exported"))
    args = parser.parse_args()
    run = args.run
    if run is None:
        run = str(args.output / "run")
        train_detector(load_detect_config(CONFIG, ["OUTPUT_DIR", run, *TRAINING]))
    export = DetectorExport(run, args.batch)
    paths = []
    for form, precision in FILES:
        paths.append(args.output / f"{precision}{SUFFIXES[form]}")
        print(f"{paths[-1]}: {export.write(paths[-1], form, precision).agreement}")
    rows = measure(paths, run, args.threads, args.repeats)
    add_deployed(Path(run), rows)
    torch = next(row for row in rows if row.form == PYTORCH)
    print(markdown(rows))
    write_text(args.output / "exported.md", markdown(rows))
    write_json(args.output / "exported.json", [asdict(row) for row in rows])
    faults = [f"{row.name}: {what}" for row in rows if row is not torch for what in missed(row, torch, args.output)]
    for fault in faults:
        print(f"MISSED {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
