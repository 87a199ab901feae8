"""What a step of stage one costs with seven methods side by side, by part.

The parts of the real loop (data, teacher, students with their losses, optimizers) are timed beside bare passes of
the same students: forward and backward with cross-entropy alone, from the same batch.  The two alternate within
one process, and medians are compared, so that a busy machine disturbs both alike; the first decile of each is what
the machine does when nobody disturbs it.

    python benchmarks/stage_one.py            ResNet-50 to ResNet-18 at 224 x 224
    python benchmarks/stage_one.py demo       the demo's networks at 64 x 64, where what isn't a student weighs most
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
from nst_det.runtime.memory import keep_freed_memory
from nst_det.runtime.run import RunFolder

METHODS = ["ce", "kd", "fitnet", "at", "nst-linear", "nst-poly", "kd+nst-poly"]
PAIRS: dict[str, dict[str, object]] = {
    "imagenet": {
        "student": "resnet18",
        "teacher": "resnet50",
        "size": 224,
        "batch": 32,
        "classes": 1000,
        "images": 1000,
        "steps": 5,
    },
    "demo": {
        "student": "nst_resnet10_w32",
        "teacher": "nst_resnet18_w48",
        "size": 64,
        "batch": 64,
        "classes": 12,
        "images": 1200,
        "steps": 50,
    },
}
GOAL = 1.25


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command does
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder) / "data", args.size, args.classes, args.images)
        result = measure(Path(folder), args)
    print_table(result)
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pair", nargs="?", choices=list(PAIRS), default="imagenet", help="student and teacher")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--output", metavar="FILE.json")
    for name, default in PAIRS["demo"].items():
        parser.add_argument(f"--{name}", type=type(default), help="instead of the pair's")
    args = parser.parse_args()
    for name, value in PAIRS[args.pair].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


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
    least = {part: statistics.quantiles(values, n=10)[0] for part, values in rows.items()}
    return {
        "milliseconds": {part: 1e3 * value for part, value in median.items() if part != "ratio"},
        "milliseconds_undisturbed": {part: 1e3 * value for part, value in least.items() if part != "ratio"},
        "ratio": median["ratio"],
        "ratio_undisturbed": least["whole step"] / least["bare passes"],
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
    ms, least = result["milliseconds"], result["milliseconds_undisturbed"]
    print(f"{len(result['methods'])} methods: {', '.join(result['methods'])}")
    print(f"{result['precision']} on {result['device']}, torch {result['torch']}, times by {result['clock']}")
    print(", ".join(f"{key} {value}" for key, value in result["settings"].items()))
    for times in (ms, least):
        times["losses"] = times["students"] - times["bare passes"]
    print(f"{'ms a step':34s}{'median':>9s}{'part':>8s}{'1st decile':>12s}{'part':>8s}")
    for name, key in (
        ("data", "data"),
        ("teacher", "teacher"),
        ("students, forward and backward", "bare passes"),
        ("losses on top of them", "losses"),
        ("optimizers", "optimizers"),
        ("whole step", "whole step"),
    ):
        columns = [
            f"{times[key]:{width}.2f}{times[key] / times['bare passes']:8.3f}"
            for times, width in ((ms, 9), (least, 12))
        ]
        print(f"  {name:32s}{columns[0]}{columns[1]}")
    low, high = result["ratio_quartiles"]
    print(
        f"whole step / students' forward and backward: {result['ratio']:.3f} (quartiles {low:.3f} .. {high:.3f}), "
        f"by the first deciles {result['ratio_undisturbed']:.3f}; goal: at most {GOAL}"
    )


if __name__ == "__main__":
    main()
