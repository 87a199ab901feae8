"""What an exported file does: its mAP on the run's test images, its latency, size and memory, beside PyTorch's."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from nst_det.data.voc import VocDataset
from nst_det.detection.data import open_voc
from nst_det.detection.predict import find_by_run, load_run
from nst_det.engine.machine import machine_name
from nst_det.engine.run_dir import WEIGHTS_FILE
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections, GroundTruth
from nst_det.evaluation.voc import evaluate_voc
from nst_det.exporting.agreement import detect
from nst_det.exporting.runtime import SUFFIXES, ExportedDetector, load_exported
from nst_det.report.deployed import PYTORCH, Deployed

# images that are timed, one after the other, and calls for each
TIMED_IMAGES, REPEATS = 16, 5
# calls before those that are timed
WARMUP = 3
STATUS = Path("/proc/self/status")
# the largest resident memory since the program began; a child's ru_maxrss would hold that of its parent
PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
IN_PYTORCH = """
import sys
from nst_det.detection.predict import load_detector
load_detector(sys.argv[1])(sys.argv[2])
"""


@dataclass(frozen=True)
class Candidate:
    """A file, or PyTorch, as it is measured."""

    form: str
    precision: str
    batch: int
    # of (batch, 3, H, W) uint8 RGB
    call: Callable[[np.ndarray], Any]
    # boxes, labels and scores of images (H, W, 3) uint8 RGB
    find: Callable[[Iterable[np.ndarray]], Iterator[Sequence[np.ndarray]]]
    # what is shipped
    files: Sequence[Path]
    # a program that detects on one image, and its arguments before it; () where there is none
    program: Sequence[str]


def measure(
    files: Sequence[str | Path], run: str | Path = "", threads: int = 0, repeats: int = REPEATS
) -> list[Deployed]:
    """Measure exported files, and PyTorch's detector of their ``run`` in turns with them.

    Without ``run`` there is neither mAP nor PyTorch, and images are noise.  0 ``threads`` takes torch's number;
    ``repeats`` are the calls for each of :data:`TIMED_IMAGES` images.
    """
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    exported = sorted((load_exported(path, threads) for path in files), key=lambda one: one.contract.batch)
    if not run:
        return [row for one in exported for row in _measure([_of_file(one)], None, _noise(one), threads, repeats)]
    detector, config, classes = load_run(run)
    for one in exported:
        if one.contract.classes != tuple(classes):
            theirs = ", ".join(one.contract.classes)
            raise UserError(f"{one.path}: finds {theirs}; the run {run} finds {', '.join(classes)}: name its own files")
    data = open_voc(config, "DATASETS.TEST", classes)[0]
    with TemporaryDirectory() as folder:
        program = Path(folder) / "in_pytorch.py"
        program.write_text(IN_PYTORCH)
        rows: list[Deployed] = []
        for batch in dict.fromkeys(one.contract.batch for one in exported):
            group = [one for one in exported if one.contract.batch == batch]
            in_torch = Candidate(
                PYTORCH,
                "fp32",
                batch,
                partial(detect, detector),
                partial(find_by_run, detector, config),
                [Path(run) / WEIGHTS_FILE],
                [str(program), str(Path(run).resolve())],
            )
            images = _timed_images(group[0], data)
            rows += _measure([in_torch, *map(_of_file, group)], data, images, threads, repeats)
    return rows


def _of_file(one: ExportedDetector) -> Candidate:
    form = next(form for form, suffix in SUFFIXES.items() if suffix == one.path.suffix)
    files = [one.path, *([one.path.with_suffix(".bin")] if form == "openvino" else [])]
    script = one.path.with_name(f"{one.path.name}.py")
    program = [str(script.resolve())] if script.exists() else []
    return Candidate(form, one.contract.precision, one.contract.batch, one.detect, one.find, files, program)


def _noise(one: ExportedDetector) -> list[np.ndarray]:
    draw, side = np.random.default_rng(0), one.contract.min_size or 224
    return [draw.integers(0, 256, (3, side, round(4 / 3 * side)), dtype=np.uint8) for _ in range(TIMED_IMAGES)]


def _timed_images(one: ExportedDetector, data: VocDataset) -> list[np.ndarray]:
    """Return the first test images, resized, that have the size of the very first: a batch has one size."""
    images = [one.resized(data.image(id_)) for id_ in data.ids[:TIMED_IMAGES]]
    return [image for image in images if image.shape == images[0].shape]


def _measure(
    candidates: Sequence[Candidate], data: VocDataset | None, images: Sequence[np.ndarray], threads: int, repeats: int
) -> list[Deployed]:
    seconds = in_turns([one.call for one in candidates], images, candidates[0].batch, repeats)
    first = seconds[0] if candidates[0].form == PYTORCH else None
    rows = []
    for one, of_one in zip(candidates, seconds):
        accuracy = {"map": None, "per_class": {}} if data is None else _accuracy(one, data)
        percentiles = dict(zip(("p10", "median", "p90", "p99"), np.percentile(of_one, (10, 50, 90, 99)).tolist()))
        rows.append(
            Deployed(
                form=one.form,
                precision=one.precision,
                batch=one.batch,
                **accuracy,
                latency=percentiles,
                ratio=None if first is None else float(np.median(of_one / first)),
                size=sum(path.stat().st_size for path in one.files),
                memory=peak_memory(one.program, images[0]) if one.program and STATUS.exists() else None,
                threads=threads,
                machine=machine_name("cpu"),
            )
        )
    return rows


def in_turns(
    calls: Sequence[Callable[[np.ndarray], Any]], images: Sequence[np.ndarray], batch: int, repeats: int
) -> np.ndarray:
    """Return the seconds of each call, (calls, repeats * images), each on a batch that begins with the next image.

    What else the machine does meets all of them alike.
    """
    seconds = np.zeros((len(calls), repeats, len(images)))
    for turn in range(-1, repeats):
        for index in range(len(images) if turn >= 0 else WARMUP):
            given = np.stack([images[(index + place) % len(images)] for place in range(batch)])
            for row, call in enumerate(calls):
                start = time.perf_counter()
                call(given)
                seconds[row, turn, index % len(images)] = time.perf_counter() - start
    return seconds.reshape(len(calls), -1)


def _accuracy(one: Candidate, data: VocDataset) -> dict[str, Any]:
    found = one.find(data.image(id_) for id_ in data.ids)
    images = [(id_, boxes, labels, scores) for id_, (boxes, labels, scores) in zip(data.ids, found)]
    detections = Detections.from_images(images, data.classes)
    result = evaluate_voc(detections, GroundTruth.from_annotations(data.annotations(), data.classes)).to_dict()
    return {"map": result["map"], "per_class": {name: one["ap11"] for name, one in result["per_class"].items()}}


def peak_memory(program: Sequence[str], image: np.ndarray) -> int:
    """Return the largest resident memory, in bytes, of a Python program that detects on an image (3, H, W) uint8."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
        package = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", f"import sys; sys.path.append({package!r})\n{PEAK}", *program, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{program[0]}: {(done.stderr.strip() or 'it ended without a word').splitlines()[-1]}")
    return 1024 * int(done.stdout.split()[-1])
