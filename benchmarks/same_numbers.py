"""Prove that a change moved no number: run two checkouts alike and compare all that they write, float by float.

    python benchmarks/same_numbers.py OLD NEW                          about four minutes of one CPU core
    python benchmarks/same_numbers.py OLD NEW --allow nst-poly=1e-6    what has nst-poly in its place may move so far
    python benchmarks/same_numbers.py OLD NEW --times --demo           step and import times, and the whole demo, too

Everything runs by ``python -m nst_det`` in processes of their own, in float32 on one thread of the CPU, with the
configs of each checkout.  The generated data, and the teacher detector if NEW opens it, are made by OLD for both.
Compared are: every loss term of every step, accuracies and AP, every weight that is written, every detection, the
generated data, and the AP of real detections, this one with the official devkit's as well.

The exit code is 1 where something moved further than allowed, or is missing in NEW; what only NEW has is counted.  Of
this package nothing is imported: where a checkout calls a key, a config or a number otherwise, mend ``SPELLINGS``,
``CONFIGS`` or ``NAMES``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

# What a checkout may call otherwise.  A command that refuses a key is tried again with the next spelling in its line:
# "KEY VALUE", or "KEY" for any value; "" leaves the key out.
SPELLINGS = [
    ["SOLVER.AMP.ENABLED False", "SOLVER.AMP fp32"],
    ["SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR", "SOLVER.SCHEDULE step"],
    ["METHOD", "TRANSFER.METHOD"],
    ["TEACHER.CONFIG_FILE", "TRANSFER.TEACHER.CONFIG_FILE"],
    ["TEACHER.WEIGHTS", "TRANSFER.TEACHER.WEIGHTS"],
    ["TEACHER.EXPECTED_TOP1 0", ""],
]
# the first one that is there is taken
CONFIGS = {
    "distill": [
        "benchmarks/fitnet_against_nst.yaml",
        "configs/distill/shapes.yaml",
        "configs/distillation/shapes.yaml",
    ],
    "distill mlp": ["configs/distill/mlp/shapes.yaml", "configs/distillation/mlp/shapes.yaml"],
    "train-det": ["benchmarks/same_numbers_detect.yaml", "configs/detect/shapes.yaml", "configs/detection/shapes.yaml"],
    "compare": ["configs/compare/demo.yaml", "configs/comparison/demo.yaml"],
}
# of a number: (pattern, what OLD calls it), applied to the names of both
NAMES: list[tuple[str, str]] = []
# of numbers that are no result
IGNORED = r"speed[/.]|seconds|time|\beta\b|sha256|provenance|cost|commands|schema|version"

DEVKIT = {"mAP11": "map", "mAP_area": "map_area"}
DEVKIT_WITHIN = 1e-9
STEPS = 20
PAIRS = 5
PARTS = ("data", "stage-one", "torchvision", "detectron2", "golden")

DATA = {
    "--classification-images": 96,
    "--classification-val-images": 48,
    "--classification-classes": 4,
    "--detection-images": 24,
    "--detection-test-images": 12,
    "--detection-classes": 3,
    "--workers": 1,
}
STAGE_ONE = {
    "DATA.IMAGE_SIZE": 48,
    "SOLVER.AMP.ENABLED": False,
    "SOLVER.MAX_ITER": STEPS,
    "SOLVER.IMS_PER_BATCH": 8,
    "TEACHER.SOLVER.MAX_ITER": STEPS,
    "TEACHER.EXPECTED_TOP1": 0,
    "TEST.EVAL_PERIOD": STEPS // 2,
    "LOG_PERIOD": 1,
}
# what the demo's config leaves out: another solver, and all that changes a step
STAGE_ONE_OTHERWISE = {
    "TEACHER.ARCH": "nst_resnet10_w32",
    "STUDENT.ARCH_KWARGS": "{drop_rate: 0.2}",
    "METHODS": "[ce, pkd, kd+fitnet, nst-gaussian]",
    "TRANSFER.WARMUP_ITERS": 5,
    "TRANSFER.AUTO_WEIGHT": "{nst-gaussian: 1.0}",
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.STEPS": "[10, 15]",
    "SOLVER.WARMUP_ITERS": 3,
    "SOLVER.ACCUMULATE": 2,
    "SOLVER.EMA_DECAY": 0.9,
    "SOLVER.LABEL_SMOOTHING": 0.1,
    "DATA.VAL_FROM": "train",
    "DATA.AUGMENT.SHIFT": 3,
    "DATA.AUGMENT.HFLIP": 0.5,
    "DATA.AUGMENT.CROP_AREA": "[0.5, 1.0]",
    "DATA.AUGMENT.COLOR_JITTER": "[0.2, 0.2, 0.2, 0.1]",
    "CACHE.VIEWS": 2,
}
# it compares channel by channel, so it can't learn from a wider teacher
SAME_WIDTH_ONLY = "pkd"
# reads boxes, which stage two alone has
OF_DETECTORS_ONLY = "fgd"
STAGE_TWO = {
    "SOLVER.AMP.ENABLED": False,
    "SOLVER.MAX_ITER": STEPS,
    "SOLVER.IMS_PER_BATCH": 2,
    "INPUT.MIN_SIZE_TRAIN": "[96, 128]",
    "INPUT.MAX_SIZE_TRAIN": 128,
    "INPUT.MIN_SIZE_TEST": 128,
    "INPUT.MAX_SIZE_TEST": 128,
}
STAGE_TWO_OTHERWISE = {
    "METHOD": "kd+fitnet+vid",
    "TRANSFER.LEVELS": "[res4]",
    # its default was 1 once
    "TRANSFER.WEIGHTS": "{vid: 1.0}",
    "TRANSFER.WARMUP_ITERS": 5,
    "MODEL.BACKBONE.NAME": "build_timm_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.TIMM.NORM": "FrozenBN",
    "MODEL.TIMM.OUT_FEATURES": "[res4]",
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[12, 24, 48, 72]]",
    "MODEL.RPN.IN_FEATURES": "[res4]",
    "MODEL.ROI_HEADS.IN_FEATURES": "[res4]",
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.STEPS": "[10, 15]",
    "SOLVER.EMA_DECAY": 0.9,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.1,
    "DATASETS.VAL_FRACTION": 0.25,
    "TEST.EVAL_PERIOD": 10,
    "TEST.SELECT": "best",
}


class Place(NamedTuple):
    """Where a value stands; in the order in which a run makes them."""

    step: int
    run: str
    name: str

    def __str__(self) -> str:
        return f"{self.run}: {self.name}" + (f", step {self.step}" if self.step < AT_THE_END else "")


AT_THE_END = 10**9
Values = Mapping[Place, Any]


@dataclass
class Row:
    """What the comparison of one kind of values found; ``largest`` is relative, and infinite where it is no number."""

    what: str
    values: int = 0
    different: int = 0
    largest: float = 0.0
    where: str = ""
    first: str = ""
    missing: list[str] = field(default_factory=list)
    only_new: int = 0
    renamed: int = 0
    exceeds: bool = False

    def __str__(self) -> str:
        said = []
        if self.different:
            text = f"{self.different} differ, by {self.largest:.2g} at most ({self.where}), first at {self.first}"
            said.append(text if self.exceeds else f"{text}; allowed")
        if self.missing:
            said.append(f"{len(self.missing)} missing in NEW, such as {self.missing[0]}")
        if not said:
            said.append("equal" if self.values else "nothing to compare")
        said += [f"{self.only_new} in NEW only"] if self.only_new else []
        said += [f"{self.renamed} have another name"] if self.renamed else []
        return f"{self.what:<44} {self.values:>7}   {'; '.join(said)}"


def difference(old: Any, new: Any) -> float:
    """The relative difference of two numbers, or of two arrays by the largest element; 0 for equal ones."""
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        if old.dtype != new.dtype or old.shape != new.shape:
            return np.inf
        if old.tobytes() == new.tobytes():
            return 0.0
        old, new = old.astype(np.float64), new.astype(np.float64)
        size = max(np.abs(old).max(), np.abs(new).max())
        worst = float(np.abs(old - new).max() / size) if size else 0.0
        return worst if np.isfinite(worst) else np.inf
    if isinstance(old, int | float) and isinstance(new, int | float):
        return 0.0 if old == new else abs(old - new) / max(abs(old), abs(new))
    return 0.0 if old == new else np.inf


def compare(what: str, old: Values, new: Values, allow: Mapping[str, float], within: float = 0.0) -> Row:
    """One row of the table.  Arrays that have another name in NEW, but the same content, are the same."""
    row = Row(what, len(old))
    only_old, only_new = [place for place in old if place not in new], [place for place in new if place not in old]
    waiting: dict[Any, list[Place]] = {}
    for place in only_new:
        waiting.setdefault(_content(new[place]), []).append(place)
    for place in only_old:
        if isinstance(old[place], np.ndarray) and waiting.get(_content(old[place])):
            waiting[_content(old[place])].pop()
            row.renamed += 1
        else:
            row.missing.append(str(place))
            row.exceeds = row.exceeds or _allowed(place, allow, within) < np.inf
    row.only_new = sum(map(len, waiting.values()))
    found = {place: difference(old[place], new[place]) for place in old if place in new}
    found = {place: value for place, value in found.items() if value}
    if found:
        worst = max(found, key=lambda place: found[place])
        row.different, row.largest, row.where, row.first = len(found), found[worst], str(worst), str(min(found))
        row.exceeds = row.exceeds or any(value > _allowed(place, allow, within) for place, value in found.items())
    # nothing compared is no proof
    row.exceeds = row.exceeds or not old
    return row


def _content(value: Any) -> Any:
    return (value.shape, hashlib.sha256(value.tobytes()).hexdigest()) if isinstance(value, np.ndarray) else None


def _allowed(place: Place, allow: Mapping[str, float], within: float) -> float:
    return max([within, *(most for name, most in allow.items() if name in str(place))])


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of a JSON value by dotted name, those in ``IGNORED`` left out."""
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from numbers(item, f"{name}.{key}" if name else str(key))
    elif not re.search(IGNORED, name):
        for pattern, known in NAMES:
            name = re.sub(pattern, known, name)
        yield name, value


def metrics(folder: Path) -> dict[Place, Any]:
    """All numbers in the metrics of all runs in a folder."""
    found = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            step = row.pop("step")
            found |= {Place(step, path.parent.name, name): value for name, value in numbers(row)}
    return found


def json_values(folder: Path, file: str, strings: bool = False) -> dict[Place, Any]:
    """All numbers in the JSON files of that name in a folder; the texts too, if asked."""
    return {
        Place(AT_THE_END, path.parent.name, name): value
        for path in sorted(folder.rglob(file))
        for name, value in numbers(json.loads(path.read_text()))
        if strings or not isinstance(value, str)
    }


def weights(folder: Path) -> dict[Place, Any]:
    """All tensors that a run leaves behind."""
    return {
        Place(AT_THE_END, path.stem, name): value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def files(folder: Path) -> dict[Place, Any]:
    """The content of all files in a folder."""
    return {
        Place(AT_THE_END, str(path.parent.relative_to(folder)), path.name): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".json"
    }


class Checkout:
    """A checkout whose commands are run.

    Args:
        root: where ``nst_det`` and ``configs`` are.
        work: a folder for its runs.
        data: of the generated data.
    """

    def __init__(self, root: Path, work: Path, data: Path) -> None:
        self.root, self.work, self.data = root.resolve(), work, data
        self.work.mkdir(parents=True, exist_ok=True)
        # (command's config, "KEY VALUE" as this script has it) -> what the checkout takes
        self._taken: dict[tuple[str, str], str] = {}
        self._done: set[Path] = set()

    def python(self, *words: str, python: str) -> subprocess.CompletedProcess[str]:
        """Run ``python ...`` with this checkout's package, on one thread and without a GPU."""
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            "PYTHONPATH": str(self.root),
            "CUDA_VISIBLE_DEVICES": "",
            "NST_DET_SHAPES": str(self.data),
            # tables are not broken into lines
            "COLUMNS": "1000",
        }
        return subprocess.run([python, *words], cwd=self.work, env=environment, text=True, capture_output=True)

    def call(self, *words: str) -> str:
        """What ``python ...`` prints; SystemExit where it fails."""
        done = self.python(*words, python=sys.executable)
        if done.returncode:
            raise self._failed(words, done.stderr)
        return done.stdout

    def _failed(self, words: Sequence[str], error: str) -> SystemExit:
        return SystemExit(f"{self.root}: {' '.join(words)}\n{error[-2000:]}")

    def package(self) -> Path:
        """Where its package is imported from."""
        return Path(self.call("-c", "import nst_det; print(nst_det.__file__)").strip()).resolve()

    def config(self, name: str) -> Path:
        """A config of this checkout."""
        paths = [self.root / path for path in CONFIGS[name]]
        return next((path for path in paths if path.exists()), paths[0])

    def methods(self) -> list[str]:
        """The terms that ``nst-det methods`` lists."""
        table = self.call("-m", "nst_det", "methods")
        found = re.findall(r"^[│|] *([a-z][\w-]*) *[│|]", table, re.MULTILINE)
        if not found:
            raise SystemExit(f"{self.root}: no terms in what `nst-det methods` prints:\n{table}")
        return found

    def run(
        self,
        name: str,
        config: str,
        settings: Mapping[str, Any],
        python: str = sys.executable,
        otherwise: Mapping[str, str] | None = None,
    ) -> Path:
        """Train by a config of ``CONFIGS``, whose first word is the command; the folder of the run, made once.

        Args:
            name: of the folder.
            config: key of ``CONFIGS``.
            settings: keys with their values.
            python: the interpreter.
            otherwise: values to take for keys whose values are refused.
        """
        folder = self.work / name
        if folder in self._done:
            return folder
        texts = [f"{key} {value}" for key, value in settings.items()]
        pairs = {text: self._taken.get((config, text), text) for text in texts}
        while True:
            keys = [word for pair in (*pairs.values(), f"OUTPUT_DIR {folder}") if pair for word in pair.split(" ", 1)]
            words = ["-m", "nst_det", config.split()[0], "--config-file", str(self.config(config)), *keys]
            done = self.python(*words, python=python)
            if not done.returncode:
                self._done.add(folder)
                return folder
            spelled = respelled(pairs, done.stderr, otherwise or {}) if done.returncode == 2 else None
            if spelled is None:
                raise self._failed(words, done.stderr)
            self._taken |= {(config, text): taken for text, taken in spelled.items() if taken != pairs[text]}
            pairs = spelled
            # what it left before it stopped is a run with the former settings
            shutil.rmtree(folder, ignore_errors=True)


def respelled(pairs: Mapping[str, str], error: str, otherwise: Mapping[str, str]) -> dict[str, str] | None:
    """``pairs`` with another spelling of what the last line of an error names first; None where there is none."""
    line = (error.strip().splitlines() or [""])[-1]
    found = []
    for text, taken in pairs.items():
        key, _, value = taken.partition(" ")
        # an older checkout may have a value where the key is a group now
        names = [name for name in (key, key.rpartition(".")[0]) if name]
        named = [match.start() for name in names for match in re.finditer(rf"(?<![\w.]){re.escape(name)}(?!\w)", line)]
        # a file may be named by itself, or by what stands beside it
        if key in otherwise and str(Path(value).with_suffix("")) in line:
            named.append(0)
        if named:
            found.append((min(named), text, key, value))
    for _, text, key, value in sorted(found):
        if otherwise.get(key, value) != value:
            return {**pairs, text: f"{key} {otherwise[key]}"}
        for spellings in SPELLINGS:
            for this, other in itertools.pairwise(spellings):
                if this in (key, f"{key} {value}"):
                    return {**pairs, text: other if " " in other or not other else f"{other} {value}"}
    return None


class Proof:
    """All comparisons of two checkouts; every method adds its rows.

    Args:
        old: what the numbers are to be equal to.
        new: the other.
        allow: parts of places, with the relative difference that is allowed there.
    """

    def __init__(self, old: Checkout, new: Checkout, allow: Mapping[str, float]) -> None:
        self.old, self.new, self.allow = old, new, allow
        self.both = (old, new)
        self.rows: list[Row] = []
        self.times: dict[str, Any] = {}

    def add(self, what: str, old: Values, new: Values, within: float = 0.0) -> None:
        """Compare two sets of values."""
        self.rows.append(compare(what, old, new, self.allow, within))
        print(self.rows[-1], flush=True)

    def add_runs(self, what: str, folders: Sequence[Path], readers: Mapping[str, Callable[[Path], Values]]) -> None:
        """Compare all that two runs left."""
        for kind, read in readers.items():
            old, new = (read(folder) for folder in folders)
            self.add(f"{what}: {kind}", old, new)

    def data(self) -> None:
        """The generated data."""
        generate(self.new, self.new.work / "data")
        self.add("generated data: files", files(self.old.data), files(self.new.work / "data"))

    def stage_one(self) -> None:
        """All methods with two seeds, then other settings, then students without maps."""
        terms = self.old.methods()
        methods = ["ce", *(name for name in terms if name not in (SAME_WIDTH_ONLY, OF_DETECTORS_ONLY)), "kd+nst-poly"]
        for seed in (0, 1):
            settings = {"METHODS": f"[{', '.join(methods)}]", "SEED": seed}
            self._distill(f"stage one, seed {seed}", "distill", settings)
        self._distill("stage one, otherwise", "distill", STAGE_ONE_OTHERWISE)
        self._distill("stage one, MLP", "distill mlp", {})

    def _distill(self, what: str, config: str, settings: Mapping[str, Any]) -> None:
        folders = [distill(checkout, folder_name(what), config, settings) for checkout in self.both]
        readers = {
            "loss terms, accuracy": metrics,
            "results": lambda folder: json_values(folder, "result.json"),
            "weights": weights,
        }
        self.add_runs(what, folders, readers)

    def stage_two(self, engine: str, python: str = sys.executable) -> None:
        """Plain, from a teacher detector by two methods, and with other settings."""
        settings = {"ENGINE": engine}
        self._detect(f"{engine}, plain", settings, python)
        for method in ("nst-poly", "cwd"):
            self._detect(f"{engine}, {method}@det", {**settings, "METHOD": method}, python)
        more = {} if engine == "detectron2" else {"SOLVER.ACCUMULATE": 2}
        self._detect(
            f"{engine}, otherwise", {**settings, **STAGE_TWO_OTHERWISE, **more}, python, {"MODEL.WEIGHTS": backbone}
        )

    def _detect(
        self,
        what: str,
        settings: Mapping[str, Any],
        python: str,
        makers: Mapping[str, Callable[[Checkout], Path]] | None = None,
    ) -> None:
        readers = {
            "loss terms": metrics,
            "results": lambda folder: json_values(folder, "result.json"),
            "weights": weights,
            "detections": lambda folder: json_values(folder, "detections.json", strings=True),
        }
        makers = {**(makers or {}), **({"TEACHER.WEIGHTS": teacher} if "METHOD" in settings else {})}
        folders = []
        for checkout in self.both:
            made = {key: [make(self.old), make(checkout)] for key, make in makers.items()}
            folders.append(detect(checkout, folder_name(what), settings, python, made))
        self.add_runs(what, folders, readers)

    def golden(self, real: Path) -> None:
        """AP of real detections, against the other checkout's and the official devkit's."""
        folder = real / "voc2007_golden_small"
        if not folder.is_dir():
            print(f"{'golden AP':<44} skipped: no {folder}; name its parent by NST_DET_REAL_DATA", flush=True)
            return
        found = []
        for checkout in self.both:
            output = checkout.work / "golden" / "ap.json"
            voc = ["--voc-root", str(folder / "VOC2007"), "--split", "test", "--detections", str(folder / "dets")]
            checkout.call("-m", "nst_det", "evaluate", *voc, "--coco", "--output", str(output))
            found.append(json_values(output.parent, output.name))
        self.add("golden AP, old and new", *found, within=DEVKIT_WITHIN)
        expected = {
            Place(AT_THE_END, "golden", DEVKIT.get(name, name)): value
            for name, value in numbers(json.loads((folder / "expected.json").read_text()))
            if name in DEVKIT or re.search(r"per_class\..*\.(ap11|ap_area)$", name)
        }
        for label, values in zip(("old", "new"), found):
            values = {place: value for place, value in values.items() if place in expected}
            self.add(f"golden AP, devkit and {label}", expected, values, within=DEVKIT_WITHIN)

    def demo(self) -> None:
        """The demo with one seed, by each checkout from its own data."""
        folders = []
        for checkout in self.both:
            folders.append(checkout.work / "demo")
            words = ["--config-file", str(checkout.config("compare")), "--output", str(folders[-1])]
            checkout.call("-m", "nst_det", "compare", *words)
        self.add_runs("demo", folders, {"results": lambda folder: json_values(folder, "results.json", strings=True)})

    def measure_times(self) -> None:
        """Seconds of a step and of an import, in pairs that alternate, so that a busy machine disturbs both alike."""
        longer = {"SOLVER.MAX_ITER": 60, "SOLVER.IMS_PER_BATCH": 32}
        one = {**longer, "METHODS": "[kd+nst-poly]", "TEACHER.SOLVER.MAX_ITER": 1}
        two = {**longer, "ENGINE": "torchvision", "METHOD": "nst-poly", "SOLVER.IMS_PER_BATCH": 8}

        def stage_one(checkout: Checkout, name: str) -> float:
            return step_seconds(checkout, name, lambda: distill(checkout, name, "distill", one))

        def stage_two(checkout: Checkout, name: str) -> float:
            made = {"TEACHER.WEIGHTS": [teacher(self.old), teacher(checkout)]}
            return step_seconds(checkout, name, lambda: detect(checkout, name, two, files=made))

        def seconds(*words: str) -> Callable[[Checkout, str], float]:
            return lambda checkout, name: wall_seconds(lambda: checkout.call(*words))

        measured = {
            "step of stage one": stage_one,
            "step of stage two, torchvision": stage_two,
            "import torch": seconds("-c", "import torch"),
            "import nst_det": seconds("-c", "import nst_det"),
            "nst-det --help": seconds("-m", "nst_det", "--help"),
        }
        print(f"\n{'median seconds':<44}     old     new   new / old, median and range of {PAIRS} pairs")
        for what, measure in measured.items():
            pairs = []
            for number in range(PAIRS):
                order = self.both if number % 2 == 0 else self.both[::-1]
                taken = {id(checkout): measure(checkout, f"times_{len(self.times)}_{number}") for checkout in order}
                pairs.append([taken[id(self.old)], taken[id(self.new)]])
            ratios = [new / old for old, new in pairs]
            old, new = (statistics.median(column) for column in zip(*pairs))
            self.times[what] = {"pairs": pairs, "ratio": statistics.median(ratios)}
            text = f"{statistics.median(ratios):.3f}   {min(ratios):.3f} .. {max(ratios):.3f}"
            print(f"{what:<44} {old:>7.4f} {new:>7.4f}   {text}", flush=True)


def generate(checkout: Checkout, folder: Path) -> Path:
    """The generated data, by one checkout."""
    words = [str(word) for pair in DATA.items() for word in pair]
    checkout.call("-m", "nst_det", "generate-data", "--output", str(folder), *words)
    return folder


def distill(checkout: Checkout, name: str, config: str, settings: Mapping[str, Any]) -> Path:
    """A run of stage one."""
    own = {"DATA.ROOT": checkout.data / "shapes_cls", "REGISTRY": checkout.work / name / "backbones"}
    return checkout.run(name, config, {**STAGE_ONE, **own, **settings})


def detect(
    checkout: Checkout,
    name: str,
    settings: Mapping[str, Any],
    python: str = sys.executable,
    files: Mapping[str, Sequence[Path]] | None = None,
) -> Path:
    """A run of stage two; of the files given for a key, the first one is taken that the checkout opens."""
    named = {key: [str(path) for path in paths] for key, paths in (files or {}).items()}
    values = {**STAGE_TWO, **settings, **{key: paths[0] for key, paths in named.items()}}
    if "TEACHER.WEIGHTS" in named:
        values["TEACHER.CONFIG_FILE"] = checkout.config("train-det")
    return checkout.run(name, "train-det", values, python, {key: paths[-1] for key, paths in named.items()})


def teacher(checkout: Checkout) -> Path:
    """The weights of the detector that teaches others."""
    return detect(checkout, "torchvision_plain", {"ENGINE": "torchvision"}) / "model.safetensors"


def backbone(checkout: Checkout) -> Path:
    """A backbone file of stage one."""
    folder = distill(checkout, "stage_one_otherwise", "distill", STAGE_ONE_OTHERWISE)
    return next(folder.rglob("*kd+fitnet*.safetensors"))


def folder_name(what: str) -> str:
    """A heading as the name of a folder."""
    return what.replace(",", "").replace(" ", "_")


def wall_seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def step_seconds(checkout: Checkout, name: str, train: Callable[[], Any]) -> float:
    """Seconds a step of a training that writes a row of metrics at each, looked at from outside."""
    seen: list[tuple[float, int]] = []
    over = Event()

    def watch() -> None:
        while not over.wait(0.01):
            paths = [path for path in (checkout.work / name).rglob("metrics.jsonl") if path.parent.name != "teacher"]
            rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
            count = len({row["step"] for row in rows})
            if count and (not seen or count > seen[-1][1]):
                seen.append((time.perf_counter(), count))

    watcher = Thread(target=watch)
    watcher.start()
    train()
    over.set()
    watcher.join()
    # the first steps allocate memory and choose algorithms
    settled = [moment for moment in seen if moment[1] > 10]
    (began, first), (ended, last) = settled[0], settled[-1]
    return (ended - began) / (last - first)


def can_import(python: str, module: str) -> bool:
    """Whether an interpreter has a module."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def main() -> None:
    """Compare, print the table, and exit with 1 where something moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="checkout whose numbers are right")
    parser.add_argument("new", type=Path, metavar="NEW", help="checkout to compare with it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all of them")
    parser.add_argument("--detectron2-python", default=sys.executable, help="interpreter that has Detectron2")
    parser.add_argument("--allow", action="append", default=[], metavar="NAME=1e-6", help="inf: may be missing too")
    parser.add_argument("--demo", action="store_true", help="the whole demo too")
    parser.add_argument("--times", action="store_true", help="times of steps and imports too")
    parser.add_argument("--output", type=Path, help="the table as JSON")
    args = parser.parse_args()
    allow = {name: float(most) for name, _, most in (text.rpartition("=") for text in args.allow)}
    real = Path(os.environ.get("NST_DET_REAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="same_numbers_") as folder:
        work = Path(folder)
        old, new = Checkout(args.old, work / "old", work / "data"), Checkout(args.new, work / "new", work / "data")
        for checkout in (old, new):
            if checkout.root not in checkout.package().parents:
                raise SystemExit(f"{checkout.root}: nst_det is imported from {checkout.package()}; name a checkout")
        generate(old, old.data)
        proof = Proof(old, new, allow)
        print(f"old {old.root}\nnew {new.root}\n\n{'what':<44} {'values':>7}   found")
        if "data" in args.parts:
            proof.data()
        if "stage-one" in args.parts:
            proof.stage_one()
        if "torchvision" in args.parts:
            proof.stage_two("torchvision")
        if "detectron2" in args.parts:
            if can_import(args.detectron2_python, "detectron2"):
                proof.stage_two("detectron2", args.detectron2_python)
            else:
                said = f"{args.detectron2_python} has no detectron2; name one that has by --detectron2-python"
                print(f"{'detectron2':<44} skipped: {said}", flush=True)
        if "golden" in args.parts:
            proof.golden(real)
        if args.demo:
            proof.demo()
        if args.times:
            proof.measure_times()
    bad = [row for row in proof.rows if row.exceeds]
    total = sum(row.values for row in proof.rows)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{total} values compared in {minutes:.1f} minutes: " + (f"{len(bad)} rows differ" if bad else "equal"))
    if args.output:
        content = {"rows": [asdict(row) for row in proof.rows], "times": proof.times, "equal": not bad}
        args.output.write_text(json.dumps(content, indent=1) + "\n")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
