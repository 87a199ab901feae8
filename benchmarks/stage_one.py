"""What a step of stage one costs with seven methods side by side, by part.

The parts of the real loop (data, teacher, students with their losses, optimizers) are timed beside bare passes of
the same students: forward and backward with cross-entropy alone, from the same batch.  The two alternate within
one process, and medians are compared, so that a busy machine disturbs both alike; the first decile of each is what
the machine does when nobody disturbs it.

    python benchmarks/stage_one.py            ResNet-50 to ResNet-18 at 224 x 224
    python benchmarks/stage_one.py demo       the demo's networks at 64 x 64, where what isn't a student weighs most
    python benchmarks/stage_one.py --ratios kd+nst-poly
                                              one method alone: its whole step against the bare passes of teacher and
                                              student, and with the teacher cache against a step with labels alone
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nst_det.distillation.build import Teacher, build_losses, copy_of, initial_student, initial_teacher
from nst_det.distillation.cache import CacheWriter, total_bytes
from nst_det.distillation.config import get_defaults
from nst_det.distillation.dataloader import Batch, StageOneData
from nst_det.distillation.loop import Teaching, Unread, one_step
from nst_det.distillation.pipeline import parse_methods
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine.config import merge_tree
from nst_det.engine.device import amp_dtype, autocast, default_device, keep_freed_memory
from nst_det.engine.loader import load
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.trainer import Clock

METHODS = ["ce", "kd", "fitnet", "at", "nst-linear", "nst-poly", "kd+nst-poly"]
# as in configs/distill/{imagenet_r50_to_r18,shapes}.yaml
PAIRS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "student": "resnet18",
        "teacher": "resnet50",
        "size": 224,
        "batch": 64,
        "classes": 1000,
        "images": 1000,
        "steps": 5,
        "levels": ["res5"],
        "solver": {"OPTIMIZER": "SGD"},
    },
    "demo": {
        "student": "nst_resnet10_w32",
        "teacher": "nst_resnet18_w48",
        "size": 64,
        "batch": 64,
        "classes": 12,
        "images": 1200,
        "steps": 50,
        "levels": ["res3", "res4"],
        "solver": {"OPTIMIZER": "ADAMW", "CLIP_GRADIENTS": {"ENABLED": True, "CLIP_VALUE": 5.0}},
    },
}
GOAL, GOAL_LIVE, GOAL_CACHED = 1.25, 1.03, 1.1


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command does
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder) / "data", args.size, args.classes, args.images)
        result = (measure_ratios if args.ratios else measure)(Path(folder), args)
    (print_ratios if args.ratios else print_table)(result)
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pair", nargs="?", choices=list(PAIRS), default="imagenet", help="student and teacher")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--ratios", metavar="METHOD", default="", help="one method alone, against bare passes")
    parser.add_argument("--levels", nargs="+", help="instead of the pair's")
    parser.add_argument("--output", metavar="FILE.json")
    for name, default in PAIRS["demo"].items():
        if name in ("levels", "solver"):
            continue
        parser.add_argument(f"--{name}", type=type(default), help="instead of the pair's")
    args = parser.parse_args()
    for name, value in PAIRS[args.pair].items():
        if name != "solver" and getattr(args, name) is None:
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


class Setup:
    """Networks, data and losses of a run of stage one, without its folders."""

    def __init__(self, folder: Path, args: argparse.Namespace, methods: list[str]) -> None:
        config = get_defaults()
        changes = {
            "METHODS": methods,
            "DATA": {"ROOT": str(folder / "data"), "IMAGE_SIZE": args.size, "AUGMENT": {"SHIFT": 6, "HFLIP": 0.5}},
            "STUDENT": {"ARCH": args.student},
            "TEACHER": {"ARCH": args.teacher},
            "TRANSFER": {"LEVELS": args.levels},
            "CACHE": {"VIEWS": 1, "DIR": str(folder / "cache")},
            "SOLVER": {**PAIRS[args.pair]["solver"], "BASE_LR": 1e-3, "IMS_PER_BATCH": args.batch},
        }
        merge_tree(config, changes, "benchmark")
        self.config, self.folder = config, folder
        self.data, self.methods, self.device = StageOneData(config), parse_methods(methods), default_device()
        self.student, teacher = initial_student(config, args.classes), initial_teacher(config, self.data.classes)
        self.losses = build_losses(config, self.methods, self.student, teacher, labels_shared=True)
        self.precision = amp_dtype(config.SOLVER.AMP, self.device)
        reads = {level for loss in self.losses.values() for level in loss.teacher_levels}
        self.teacher = Teacher(copy_of(teacher, self.device), reads, self.precision)
        self.normalize = self.data.normalize
        # one thread's CPU time doesn't count the time that other processes take from it
        own = args.threads == 1 and self.device.type == "cpu"
        self.timer = time.process_time if own else time.perf_counter

    def new_student(self, word: str) -> StudentTrainer:
        """A student that starts as all others."""
        config, run = self.config, RunFolder(self.folder / word)
        return StudentTrainer(word, self.student, self.losses[word], config, config.SOLVER, self.precision, run)

    def batches(self, steps: int) -> Iterator[Batch]:
        """Training batches."""
        return load(
            self.data.training(self.config.DATA.AUGMENT, self.config.SOLVER, self.data.views()), range(steps), 0
        )

    def bare_pass(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Forward and backward with cross-entropy alone."""
        with autocast(self.device, self.precision):
            logits = model(images)
        cross_entropy(logits.float(), labels).backward()
        model.zero_grad(set_to_none=True)

    def now(self) -> float:
        """Seconds on the timer, once the GPU's work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.timer()

    def facts(self, args: argparse.Namespace) -> dict[str, object]:
        """What a number must be read with."""
        cuda = self.device.type == "cuda"
        return {
            "methods": list(self.methods),
            "settings": {key: value for key, value in vars(args).items() if key not in ("output", "methods")},
            "clock": self.timer.__name__,
            "precision": str(self.precision or torch.float32).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }


def measure(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """The parts of a step with all methods side by side."""
    setup = Setup(folder, args, args.methods)
    students = [setup.new_student(word) for word in setup.methods]
    total = args.warm_up + args.steps
    batches, again = setup.batches(total), setup.batches(total)
    bare = [copy_of(setup.student, setup.device).train() for _ in students]
    rows: dict[str, list[float]] = defaultdict(list)
    unread = Unread()
    for step in range(total):
        clock = Clock(setup.now)
        start = clock.now()
        one_step(students, setup.teacher, batches, setup.normalize, clock, unread)
        whole = clock.now() - start
        batch = next(again)
        images, labels = setup.normalize(batch.images), batch.labels.to(setup.device)
        start = clock.now()
        for model in bare:
            setup.bare_pass(model, images, labels)
        passes = clock.now() - start
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
        **setup.facts(args),
    }


def measure_ratios(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """What transfer adds to the passes that it can't do without, one student at a time."""
    setup = Setup(folder, args, ["ce", args.ratios])
    cache = CacheWriter(
        setup.config, setup.data.views(), setup.teacher, copy_of(setup.student, setup.device), setup.losses, {}
    ).open()
    bare, total = copy_of(setup.student, setup.device).train(), args.warm_up + args.steps
    whole, alone, cached = (setup.new_student(word) for word in (args.ratios, "ce", args.ratios))
    sources = {name: setup.batches(total) for name in ("step", "passes", "cached", "alone")}
    clocks, unread = {name: Clock(setup.now) for name in sources}, {name: Unread() for name in sources}

    def passes() -> None:
        clock, batch = clocks["passes"], next(sources["passes"])
        images, labels = setup.normalize(batch.images), batch.labels.to(setup.device)
        with clock("teacher"), torch.no_grad(), autocast(setup.device, setup.precision):
            setup.teacher.model(images)
        with clock("student"):
            setup.bare_pass(bare, images, labels)

    def step(name: str, student: StudentTrainer, teacher: Teaching | None) -> None:
        one_step([student], teacher, sources[name], setup.normalize, clocks[name], unread[name])

    order: list[tuple[str, Callable[[], None]]] = [
        ("step", lambda: step("step", whole, setup.teacher)),
        ("passes", passes),
        ("cached", lambda: step("cached", cached, cache)),
        ("alone", lambda: step("alone", alone, None)),
    ]
    rows: dict[str, list[float]] = defaultdict(list)
    for number in range(total):
        # each goes first in turn, so that none is always behind the one that empties the processor's cache
        order = order[1:] + order[:1]
        for name, run in order:
            before = dict(clocks[name].seconds)
            run()
            spent = {part: seconds - before.get(part, 0.0) for part, seconds in clocks[name].seconds.items()}
            if number >= args.warm_up:
                rows[name].append(sum(spent.values()))
                for part, seconds in spent.items():
                    rows[f"{name}, {part}"].append(seconds)
    pairs = {"live": ("step", "passes"), "cached": ("cached", "alone")}
    ratios = {key: [a / b for a, b in zip(rows[above], rows[below])] for key, (above, below) in pairs.items()}
    return {
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in rows.items()},
        "ratios": {key: statistics.median(values) for key, values in ratios.items()},
        "ratio_quartiles": {key: statistics.quantiles(values, n=4)[::2] for key, values in ratios.items()},
        "cache_bytes_an_image": total_bytes(cache.index.pieces),
        "cache_pieces": [piece.name for piece in cache.index.pieces if piece.kept],
        **setup.facts(args),
    }


def print_ratios(result: dict) -> None:
    ms, method = result["milliseconds"], result["settings"]["ratios"]
    print(f"{method} at {', '.join(result['settings']['levels'])}; cached of each image: ", end="")
    print(f"{', '.join(result['cache_pieces'])}: {result['cache_bytes_an_image'] / 1024:.1f} KiB")
    print(f"{result['precision']} on {result['device']}, torch {result['torch']}, times by {result['clock']}")
    print(", ".join(f"{key} {value}" for key, value in result["settings"].items()))
    titles = {
        "step": f"step with {method}, teacher asked",
        "passes": "teacher forward + student forward and backward",
        "cached": f"step with {method}, teacher cached",
        "alone": "step with labels alone",
    }
    print(f"{'ms':52s}{'median':>9s}   parts")
    for name, title in titles.items():
        parts = {key.removeprefix(f"{name}, "): value for key, value in ms.items() if key.startswith(f"{name}, ")}
        print(f"  {title:50s}{ms[name]:9.1f}   {', '.join(f'{key} {value:.1f}' for key, value in parts.items())}")
    for key, text, goal in (
        ("live", "step / (teacher forward + student forward and backward)", GOAL_LIVE),
        ("cached", "step with the cache / step with labels alone", GOAL_CACHED),
    ):
        low, high = result["ratio_quartiles"][key]
        # of networks as small as the demo's a loss is a larger part
        wanted = f"; goal: at most {goal}" if result["settings"]["pair"] == "imagenet" else ""
        print(f"{text}: {result['ratios'][key]:.3f} (quartiles {low:.3f} .. {high:.3f}){wanted}")


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
