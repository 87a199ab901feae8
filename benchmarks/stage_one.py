"""What a step of stage one costs with seven methods side by side, by part.

The parts of the real loop (data, teacher, students with their losses, optimizers) are timed beside bare passes of
the same students: forward and backward with cross-entropy alone, from the same batch.  The two alternate within
one process, and medians are compared, so that a busy machine disturbs both alike.

    python benchmarks/stage_one.py [--methods ce kd ...] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from nst_det.distill.clock import Clock
from nst_det.distill.config import get_defaults
from nst_det.distill.dataset import StageOneData
from nst_det.distill.images import Normalizer
from nst_det.distill.loop import one_step
from nst_det.distill.networks import build_losses, copy_of, initial_student, initial_teacher
from nst_det.distill.stage import parse_methods
from nst_det.distill.student import Student
from nst_det.distill.teacher import Teacher
from nst_det.runtime.config import merge_tree
from nst_det.runtime.device import amp_dtype, autocast, default_device
from nst_det.runtime.run import RunFolder

METHODS = ["ce", "kd", "fitnet", "at", "nst-poly", "kd+nst-poly", "kd+fitnet"]
GOAL = 1.25


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder) / "data", args.size, args.classes, args.images)
        result = measure(Path(folder), args)
    print_table(result)
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels")
    parser.add_argument("--classes", type=int, default=12)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--student", default="nst_resnet10_w32")
    parser.add_argument("--teacher", default="nst_resnet18_w48")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--output", metavar="FILE.json")
    return parser.parse_args()


def write_noise(root: Path, size: int, classes: int, images: int) -> None:
    """Seeded noise as an image folder: what is in an image doesn't change what a step costs."""
    noise = np.random.default_rng(0)
    for part, count in (("train", images), ("val", classes)):
        for index in range(count):
            path = root / part / f"class{index % classes:02d}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path, compress_level=1)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    config = get_defaults()
    changes = {
        "METHODS": args.methods,
        "DATA": {"ROOT": str(folder / "data"), "IMAGE_SIZE": args.size, "AUGMENT": {"SHIFT": 6, "HFLIP": 0.5}},
        "STUDENT": {"ARCH": args.student},
        "TEACHER": {"ARCH": args.teacher},
        "SOLVER": {"OPTIMIZER": "ADAMW", "BASE_LR": 1e-3, "IMS_PER_BATCH": args.batch, "CLIP_GRADIENTS": 5.0},
    }
    merge_tree(config, changes, "benchmark")
    data, methods, device = StageOneData(config), parse_methods(config.METHODS), default_device()
    student, teacher = initial_student(config, args.classes), initial_teacher(config, data.classes)
    losses = build_losses(config, methods, student, teacher, labels_shared=True)
    precision = amp_dtype(config.SOLVER.AMP)

    def new_student(word: str) -> Student:
        run = RunFolder(folder / word)
        return Student(
            word, copy_of(student, device), student.levels, losses[word].to(device), config.SOLVER, 0, run, precision
        )

    students = [new_student(word) for word in methods]
    reads = {level for loss in losses.values() for level in loss.teacher_levels}
    asked = Teacher(copy_of(teacher, device), reads, precision)
    normalize = Normalizer(config.DATA.MEAN, config.DATA.STD, device)
    total = args.warm_up + args.steps
    batches = data.train_steps(config.DATA.AUGMENT, args.batch)(0, total)
    again = data.train_steps(config.DATA.AUGMENT, args.batch)(0, total)
    bare = [copy_of(student, device).train() for _ in methods]

    # one thread's CPU time doesn't count the time that other processes take from it
    timer = time.process_time if args.threads == 1 and device.type == "cpu" else time.perf_counter
    rows: dict[str, list[float]] = defaultdict(list)
    for step in range(total):
        clock = Clock(exact=True, timer=timer)
        start = clock.now()
        one_step(students, asked, batches, normalize, clock)
        whole = clock.now() - start
        batch = next(again)
        images, labels = normalize(batch.images), batch.labels.to(device)
        start = clock.now()
        for model in bare:
            with autocast(device, precision):
                logits = model(images)
            cross_entropy(logits.float(), labels).backward()
        passes = clock.now() - start
        for model in bare:
            model.zero_grad(set_to_none=True)
        if step >= args.warm_up:
            for part, seconds in clock.seconds.items():
                rows[part].append(seconds)
            rows["whole step"].append(whole)
            rows["bare passes"].append(passes)
            rows["ratio"].append(whole / passes)
    median = {part: statistics.median(values) for part, values in rows.items()}
    return {
        "milliseconds": {part: 1e3 * value for part, value in median.items() if part != "ratio"},
        "ratio": median["ratio"],
        "ratio_quartiles": statistics.quantiles(rows["ratio"], n=4)[::2],
        "methods": list(methods),
        "settings": {key: value for key, value in vars(args).items() if key not in ("output", "methods")},
        "clock": timer.__name__,
        "precision": str(precision or torch.float32).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def print_table(result: dict) -> None:
    ms = result["milliseconds"]
    losses = ms["students"] - ms["bare passes"]
    print(f"{len(result['methods'])} methods: {', '.join(result['methods'])}")
    print(
        f"{result['precision']} on {result['device']}, {result['clock']}, torch {result['torch']}, {result['settings']}"
    )
    for name, value in (
        ("data", ms["data"]),
        ("teacher", ms["teacher"]),
        ("students, forward and backward", ms["bare passes"]),
        ("losses on top of them", losses),
        ("optimizers", ms["optimizers"]),
        ("whole step", ms["whole step"]),
    ):
        print(f"  {name:32s} {value:9.2f} ms   {value / ms['bare passes']:6.3f}")
    low, high = result["ratio_quartiles"]
    print(f"whole step / students' forward and backward: {result['ratio']:.3f} (quartiles {low:.3f} .. {high:.3f})")
    print(f"goal: at most {GOAL}: {'reached' if result['ratio'] <= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
