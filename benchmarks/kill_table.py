"""Kill training runs with SIGKILL at random moments, start them again, and compare what comes out.

    python benchmarks/kill_table.py --kills 50 --output benchmarks/results/kills.md

Each row is a run in a new folder: killed once, at a moment drawn uniformly from the time that the undisturbed run
took, or (every third) while its first to fourth checkpoint was being written; then looked through for half-written
files; then started again by the same command.  "same" means: every bit of the weights, and every
figure of results and metrics.  Stage one, stage two by the torchvision engine, and by Detectron2's where that is
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

# also what the forks need, so that each of them begins at once
import nst_det.detection.pipeline
import nst_det.distillation.pipeline  # noqa: F401
from nst_det.cli import main as nst_det_main
from nst_det.data.synthetic import CLASSIFICATION, DETECTION, GenerateSettings, generate_data
from nst_det.detection.config import engine_is_installed
from nst_det.engine.checkpoint import check_intact
from nst_det.engine.io import read_json, write_json, write_text
from nst_det.engine.machine import machine_name
from nst_det.engine.metrics import read_metrics

DISTILL = {
    "NAME": "small",
    "METHODS": ["ce", "nst-poly"],
    "DATA": {"IMAGE_SIZE": 32, "AUGMENT": {"SHIFT": 2, "HFLIP": 0.5}},
    "TEACHER": {"ARCH": "nst_resnet10_w32", "SOLVER": {"MAX_ITER": 6}},
    "STUDENT": {"ARCH_KWARGS": {"drop_rate": 0.2}},
    "SOLVER": {"OPTIMIZER": "ADAMW", "BASE_LR": 0.004, "MAX_ITER": 12, "IMS_PER_BATCH": 8, "CHECKPOINT_PERIOD": 3},
    "TEST": {"EVAL_PERIOD": 6},
    "LOG_PERIOD": 1,
}
DETECT = {
    "SEED": 0,
    "MODEL": {
        "DEVICE": "cpu",
        "TIMM": {"ARCH": "nst_resnet10_w32", "NORM": "BN"},
        "BACKBONE": {"FREEZE_AT": 0},
        "FPN": {"OUT_CHANNELS": 16},
        "ANCHOR_GENERATOR": {"SIZES": [[12], [24], [48], [72], [96]]},
        "RPN": {"PRE_NMS_TOPK_TRAIN": 100, "POST_NMS_TOPK_TRAIN": 50, "BATCH_SIZE_PER_IMAGE": 32},
        "ROI_HEADS": {"BATCH_SIZE_PER_IMAGE": 32, "SCORE_THRESH_TEST": 0.01},
        "ROI_BOX_HEAD": {"FC_DIM": 32, "POOLER_RESOLUTION": 5, "CANONICAL_BOX_SIZE": 56, "CANONICAL_LEVEL": 3},
    },
    "INPUT": {"MIN_SIZE_TRAIN": [64, 96], "MAX_SIZE_TRAIN": 96, "MIN_SIZE_TEST": 96, "MAX_SIZE_TEST": 96},
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {
        "OPTIMIZER": "ADAMW",
        "BASE_LR": 0.002,
        "WARMUP_ITERS": 2,
        "MAX_ITER": 12,
        "STEPS": [],
        "IMS_PER_BATCH": 2,
        "CHECKPOINT_PERIOD": 3,
    },
    "DATASETS": {"TRAIN": ["train"], "TEST": ["test"]},
}

Outcome = tuple[dict[str, dict[str, bytes]], Any]


@dataclass(frozen=True)
class Target:
    """A command that is killed.

    Attributes:
        name: as the table says it.
        words: of the command, for a folder.
        outcome: weights (file name to tensors' bytes by name) and figures of a finished run.
    """

    name: str
    words: Callable[[Path], list[str]]
    outcome: Callable[[Path], Outcome]


def targets(work: Path, root: Path, engines: Sequence[str]) -> list[Target]:
    """Stage one, and stage two by each engine."""
    data = generate_data(
        work / "data",
        GenerateSettings(
            classification_images=48,
            classification_val_images=24,
            classification_classes=4,
            detection_images=8,
            detection_test_images=4,
            detection_classes=3,
        ),
        workers=1,
    )
    distill = {**DISTILL, "DATA": {**DISTILL["DATA"], "ROOT": str(data / CLASSIFICATION)}}
    voc = {
        name: {"ROOT": str(data / DETECTION), "SPLIT": split}
        for name, split in (("train", "trainval"), ("test", "test"))
    }
    detect = {
        **DETECT,
        "_BASE_": str(root / "configs" / "detect" / "base_rcnn_fpn.yaml"),
        "DATASETS": {**DETECT["DATASETS"], "VOC": voc},
    }
    write_text(work / "distill.yaml", yaml.safe_dump(distill))
    write_text(work / "detect.yaml", yaml.safe_dump(detect))
    found = []
    if "distill" in engines:
        found.append(Target("stage one", lambda folder: _distill_words(work, folder), _distill_outcome))
    for engine in ("torchvision", "detectron2"):
        if engine in engines:
            found.append(Target(f"stage two, {engine}", _detect_words(work, engine), _detect_outcome))
    return found


def _distill_words(work: Path, folder: Path) -> list[str]:
    keys = ["OUTPUT_DIR", str(folder), "REGISTRY", str(folder / "backbones")]
    return ["distill", "--config-file", str(work / "distill.yaml"), *keys]


def _detect_words(work: Path, engine: str) -> Callable[[Path], list[str]]:
    config = str(work / "detect.yaml")
    return lambda folder: ["train-det", "--config-file", config, "ENGINE", engine, "OUTPUT_DIR", str(folder)]


def _tensors(path: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


def _without_time(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("seconds", "speed", "backbone")}


def _distill_outcome(folder: Path) -> Outcome:
    weights = {path.name: _tensors(path) for path in sorted((folder / "backbones").glob("*.safetensors"))}
    results = {path.parent.name: _without_time(read_json(path)) for path in sorted(folder.rglob("result.json"))}
    metrics = {str(path.parent.name): read_metrics(path) for path in sorted(folder.rglob("metrics.jsonl"))}
    return weights, (results, metrics)


def _detect_outcome(folder: Path) -> Outcome:
    weights = {"model.safetensors": _tensors(folder / "model.safetensors")}
    return weights, (_without_time(read_json(folder / "result.json")), read_metrics(folder / "metrics.jsonl"))


def in_process(words: list[str], log: Path) -> None:
    """What the killed process does: the command, with its output in a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    torch.set_num_threads(1)
    nst_det_main(words)


def start(words: list[str], log: Path) -> multiprocessing.Process:
    """Start a command.  Forked, so that it needn't import everything again."""
    process = multiprocessing.get_context("fork").Process(target=in_process, args=(words, log))
    process.start()
    return process


def half_written(folder: Path) -> list[str]:
    """Files that can't be read whole.  A name that ends in .tmp was never given to anybody."""
    broken = []
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix in (".pt", ".pth"):
                check_intact(path)
            elif path.suffix == ".json" and path.name != "metrics.json":  # lines, appended by Detectron2
                read_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(str(path), framework="pt") as file:
                    file.keys()
        except Exception as error:  # whatever makes it unreadable
            broken.append(f"{path.name}: {error}")
    return broken


def newest_step(folder: Path) -> str:
    """Steps of the newest checkpoints that there are, such as ``3`` or ``teacher 8, ce 3``."""
    found: dict[str, int] = {}
    for path in [*folder.rglob("step-*.pt"), *folder.rglob("model_0*.pth")]:
        number = int(path.stem.replace("model_", "step-").split("-")[1]) + (path.suffix == ".pth")
        name = path.parent.parent.name if path.suffix == ".pt" else ""
        found[name] = max(found.get(name, 0), number)
    if len(found) == 1:
        return str(next(iter(found.values())))
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items())) or "none"


def is_writing(folder: Path) -> bool:
    """Whether a checkpoint has its temporary name now."""
    for below in (*folder.glob("checkpoints"), *folder.glob("*/checkpoints"), *folder.glob("*/*/checkpoints"), folder):
        try:
            if any(name.endswith(".tmp") and ("step-" in name or "model_" in name) for name in os.listdir(below)):
                return True
        except OSError:
            continue
    return False


def kill_once(target: Target, folder: Path, moment: float, writes: int, patience: float) -> tuple[str, float] | None:
    """Start, kill and say when; None where it ended before.

    Args:
        target: what is started.
        folder: of the run.
        moment: seconds after the start.
        writes: kill while so many checkpoints were being written instead; 0 goes by the moment.
        patience: seconds after which it is given up.
    """
    process, began = start(target.words(folder), folder.with_suffix(".log")), time.monotonic()
    seen, before = 0, False
    while process.is_alive() and (after := time.monotonic() - began) < patience:
        now = bool(writes) and is_writing(folder)
        seen, before = seen + (now and not before), now
        if seen == writes if writes else after >= moment:
            process.kill()
            process.join()
            when = f"while checkpoint {writes} was written" if writes else "at random"
            return (when, after) if process.exitcode == -9 else None
        time.sleep(0.0002 if writes else 0.002)
    process.kill()
    process.join()
    return None


class Kills:
    """The rows of one target, one after the other.

    Args:
        target: what is killed.
        work: a folder.
        draw: the moments.
    """

    def __init__(self, target: Target, work: Path, draw: random.Random) -> None:
        self.target, self.draw, self.rows = target, draw, 0
        self.whole = work / f"{target.name.replace(' ', '_').replace(',', '')}_whole"
        # once here, so that what it imports needn't be imported by each fork
        with contextlib.suppress(SystemExit):
            nst_det_main(target.words(work / f"{self.whole.name}_warm"))
        began = time.monotonic()
        process = start(target.words(self.whole), self.whole.with_suffix(".log"))
        process.join()
        self.seconds = time.monotonic() - began
        if process.exitcode != 0:
            raise SystemExit(self.whole.with_suffix(".log").read_text()[-2000:])
        self.expected = target.outcome(self.whole)

    def row(self) -> dict[str, Any]:
        """Kill one run, start it again, compare."""
        killed = None
        while killed is None:
            folder = self.whole.with_name(f"{self.whole.name}_{self.rows}_{self.draw.randrange(10**6)}")
            writes = self.draw.randint(1, 4) if self.rows % 3 == 2 else 0
            moment = self.draw.uniform(0.02, self.seconds)
            killed = kill_once(self.target, folder, moment, writes, 20 * self.seconds + 60)
        self.rows += 1
        broken, step = half_written(folder), newest_step(folder)
        again = start(self.target.words(folder), folder.with_suffix(".log"))
        again.join()
        found = self.target.outcome(folder) if again.exitcode == 0 else ({}, None)
        figures = [json.dumps(outcome[1], sort_keys=True) for outcome in (found, self.expected)]
        row = {
            "run": self.target.name,
            "killed": killed[0],
            "after_seconds": round(killed[1], 2),
            "checkpoint": step,
            "half_written": broken + half_written(folder),
            "left_over": len(list(folder.rglob("*.tmp"))),
            "weights_same": found[0] == self.expected[0],
            "figures_same": figures[0] == figures[1],
        }
        shutil.rmtree(folder)
        return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, and their sums."""
    lines = [
        "| # | run | killed | after s | newest checkpoint (steps) | half written | weights | AP, accuracy, metrics |",
        "|--:|---|---|--:|---|--:|---|---|",
    ]
    for number, row in enumerate(rows, 1):
        same = ["same" if row[key] else "**differ**" for key in ("weights_same", "figures_same")]
        lines.append(
            f"| {number} | {row['run']} | {row['killed']} | {row['after_seconds']} | {row['checkpoint']} | "
            f"{len(row['half_written'])} | {same[0]} | {same[1]} |"
        )
    good = sum(row["weights_same"] and row["figures_same"] and not row["half_written"] for row in rows)
    return (
        "\n".join([f"{len(rows)} kills, {good} resumed to the undisturbed run's bits and figures.", "", *lines]) + "\n"
    )


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="the table as Markdown; rows as JSON beside it")
    parser.add_argument("--runs", nargs="+", default=["distill", "torchvision", "detectron2"])
    args = parser.parse_args()
    names = [name for name in args.runs if name != "detectron2" or engine_is_installed()]
    torch.set_num_threads(1)
    if "detectron2" in names:
        importlib.import_module("nst_det.detectron2.train_net")
    draw = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kills_") as folder:
        found = targets(Path(folder), Path(__file__).resolve().parents[1], names)
        kills = [Kills(target, Path(folder), draw) for target in found]
        for number in range(args.kills):
            rows.append(kills[number % len(kills)].row())
            print(rows[-1], file=sys.stderr, flush=True)
            if args.output:
                about = f"torch {torch.__version__}, {machine_name('cpu')}"
                text = f"# Kills\n\n`python benchmarks/kill_table.py --kills {args.kills}` ({about})\n\n{table(rows)}"
                write_text(args.output, text)
                write_json(args.output.with_suffix(".json"), rows)
    print(table(rows))
    if not all(row["weights_same"] and row["figures_same"] and not row["half_written"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
