"""A long run of each stage, sampled: memory, open files and the run folder must not grow.

    python benchmarks/plateau.py --steps 1000 --output benchmarks/results/plateau.md

Tiny networks, so that a step takes milliseconds, and a checkpoint every 50 steps.  After the first third, in which
allocators and caches fill, the slope of each curve (least squares) is taken over the rest.  Grown is what would be
more than 2 % of memory, one open file, or 2 % of the folder (metrics apart) in another 1,000 steps.  Metrics are meant
to grow: a line a step.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import yaml

from nst_det.cli import main as nst_det_main
from nst_det.data.synthetic import CLASSIFICATION, DETECTION, GenerateSettings, generate_data
from nst_det.engine.io import write_json, write_text
from nst_det.engine.machine import machine_name

PAGE = os.sysconf("SC_PAGE_SIZE")
SECONDS = 0.5
GROWTH = {"rss_mib": 0.02, "folder_mib": 0.02}
BASE = Path(__file__).resolve().parents[1] / "configs" / "detect" / "base_rcnn_fpn.yaml"


def distill_config(data: Path, steps: int) -> dict[str, Any]:
    """Stage one: three students beside each other."""
    return {
        "NAME": "small",
        "METHODS": ["ce", "fitnet", "kd+nst-poly"],
        "DATA": {"ROOT": str(data / CLASSIFICATION), "IMAGE_SIZE": 32, "AUGMENT": {"SHIFT": 2}},
        "TEACHER": {"ARCH": "nst_resnet10_w32", "SOLVER": {"MAX_ITER": 4}},
        "SOLVER": {
            "OPTIMIZER": "ADAMW",
            "BASE_LR": 0.001,
            "MAX_ITER": steps,
            "IMS_PER_BATCH": 8,
            "CHECKPOINT_PERIOD": 50,
        },
        "TEST": {"EVAL_PERIOD": 100},
        "LOG_PERIOD": 1,
    }


def detect_config(data: Path, steps: int) -> dict[str, Any]:
    """Stage two, the torchvision engine."""
    voc = {"train": {"ROOT": str(data / DETECTION), "SPLIT": "trainval"}}
    return {
        "_BASE_": str(BASE),
        "ENGINE": "torchvision",
        "MODEL": {
            "DEVICE": "cpu",
            "TIMM": {"ARCH": "nst_resnet10_w32", "NORM": "BN"},
            "BACKBONE": {"FREEZE_AT": 0},
            "FPN": {"OUT_CHANNELS": 16},
            "RPN": {"PRE_NMS_TOPK_TRAIN": 100, "POST_NMS_TOPK_TRAIN": 50, "BATCH_SIZE_PER_IMAGE": 32},
            "ROI_HEADS": {"BATCH_SIZE_PER_IMAGE": 32},
            "ROI_BOX_HEAD": {"FC_DIM": 32, "POOLER_RESOLUTION": 5},
        },
        "INPUT": {"MIN_SIZE_TRAIN": [64], "MAX_SIZE_TRAIN": 64, "MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 64},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {
            "OPTIMIZER": "ADAMW",
            "BASE_LR": 0.0005,
            "MAX_ITER": steps,
            "IMS_PER_BATCH": 2,
            "STEPS": [],
            "CHECKPOINT_PERIOD": 50,
        },
        "DATASETS": {"TRAIN": ["train"], "TEST": [], "VOC": voc},
    }


def in_process(words: list[str], log: Path) -> None:
    """The command, with its output in a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    torch.set_num_threads(1)
    nst_det_main(words)


def sample(pid: int, folder: Path) -> dict[str, float] | None:
    """What a process and its run folder take now; None where it has ended.  ``steps`` are lines of metrics."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return None
    size, steps = 0, 0
    for path in folder.rglob("*"):
        try:
            if path.name == "metrics.jsonl":
                steps = max(steps, path.read_bytes().count(b"\n"))
            # a checkpoint that is being written stands beside the two that are kept
            elif path.is_file() and path.suffix != ".tmp":
                size += path.stat().st_size
        except OSError:
            continue
    return {"steps": steps, "rss_mib": resident / 2**20, "open_files": files, "folder_mib": size / 2**20}


def watch(words: list[str], folder: Path) -> list[dict[str, float]]:
    """Samples of a whole run.

    Raises:
        SystemExit: it failed.
    """
    process = multiprocessing.get_context("spawn").Process(target=in_process, args=(words, folder.with_suffix(".log")))
    process.start()
    samples = []
    while process.is_alive():
        now = sample(process.pid or 0, folder)
        if now is not None and (not samples or now["steps"] > samples[-1]["steps"]):
            samples.append(now)
        time.sleep(SECONDS)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(folder.with_suffix(".log").read_text()[-2000:])
    return samples


def slope(samples: list[dict[str, float]], name: str) -> float:
    """Growth in 1,000 steps, by least squares over the last two thirds of the steps."""
    last = [item for item in samples if item["steps"] >= samples[-1]["steps"] / 3]
    return float(1000 * np.polyfit([item["steps"] for item in last], [item[name] for item in last], 1)[0])


def main() -> None:
    """Measure both stages; exit code 1 where something grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="the table as Markdown; samples as JSON beside it")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    lines = [
        "| stage | samples | quantity | at 1/3 | at the end | growth in 1,000 steps | |",
        "|---|--:|---|--:|--:|--:|---|",
    ]
    kept, grown = {}, False
    with tempfile.TemporaryDirectory(prefix="plateau_") as name:
        work = Path(name)
        settings = GenerateSettings(
            classification_images=60,
            classification_val_images=20,
            detection_images=10,
            detection_test_images=2,
            classification_classes=4,
            detection_classes=3,
        )
        data = generate_data(work / "data", settings, workers=1)
        for stage, word, config, more in (
            ("one", "distill", distill_config, ["REGISTRY", str(work / "backbones")]),
            ("two", "train-det", detect_config, []),
        ):
            write_text(work / f"{word}.yaml", yaml.safe_dump(config(data, args.steps)))
            folder = work / word
            samples = watch(
                [word, "--config-file", str(work / f"{word}.yaml"), "OUTPUT_DIR", str(folder), *more], folder
            )
            kept[f"stage {stage}"] = samples
            # the last ones may be of the result, when checkpoints are gone
            samples = [item for item in samples if item["steps"] < args.steps]
            third = next(item for item in samples if item["steps"] >= args.steps / 3)
            for quantity in ("rss_mib", "open_files", "folder_mib"):
                more_of_it = slope(samples, quantity)
                bound = GROWTH[quantity] * third[quantity] if quantity in GROWTH else 1.0
                grows = more_of_it > bound
                grown |= grows
                lines.append(
                    f"| {stage} | {len(samples)} | {quantity} | {third[quantity]:.1f} | {samples[-1][quantity]:.1f} | "
                    f"{more_of_it:+.2f} (bound {bound:.2f}) | {'**grows**' if grows else 'plateau'} |"
                )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        about = f"torch {torch.__version__}, {machine_name('cpu')}"
        write_text(args.output, f"# Plateau\n\n`python benchmarks/plateau.py --steps {args.steps}` ({about})\n\n{text}")
        write_json(args.output.with_suffix(".json"), kept)
    if grown:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
