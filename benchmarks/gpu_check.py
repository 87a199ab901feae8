"""Proves and measures the project on a GPU with one command, for a machine without network.

    python benchmarks/gpu_check.py --output output/gpu_check.json
    python benchmarks/gpu_check.py --part versions --part stage_one        some parts
    python benchmarks/gpu_check.py --device cpu --small                    tries it where there is no GPU

Each part is a process of its own with a limit in seconds; one that takes longer is ended with all that it started, and
what it said until then is kept.  Whatever happens to a part, the next follows.  The file is written after each part.
All that is printed and written was measured by this call, on this machine.  It ends with 1 if a part failed or was not
done in time.

Images are those of ``--images``, or where that folder is absent, of 500 x 375 pixels made for this; boxes are drawn by
chance.  A step on "one batch" is given the same batch again and again, so nothing is decoded.  Rates are taken from the
times at which the rows of a run's metrics are written, after the first steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
CONFIGS = ROOT / "configs"
GIB = 2**30
# seconds of each part; the demo, which comes last, gets what the others left as well
LIMITS = {
    "versions": 20,
    "tests": 150,
    "stage_one": 60,
    "compiled": 45,
    "torchvision": 60,
    "detectron2": 70,
    "nst_loss": 25,
    "demo": 50,
}
METHOD = "kd+nst-poly"
PYRAMID = ["p2", "p3", "p4", "p5"]


class Skipped(Exception):
    """A part can't be done here; the message says why."""


class Part:
    """What a part is given: the options, and where its figures go."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.device, self.folder, self.images, self.small = args.device, folder, Path(args.images), args.small
        self.batch, self.side, self.count = (8, 64, 24) if self.small else (256, 224, 2048)
        self.detector_batch, self.pixels, self.test_images = (2, 128, 4) if self.small else (16, 800, 128)
        self.student, self.teacher = ("resnet10t", "resnet10t") if self.small else ("resnet18", "resnet50")
        self.warm_up, self.steps, self.loader_seconds = (1, 2, 0.5) if self.small else (4, 20, 5.0)
        self.files = 6 if self.small else 256
        self._figures = open(args.figures, "a", buffering=1) if args.figures else None  # noqa: SIM115 (ends with it)
        self.workers = 2 if args.small else max(min(len(os.sched_getaffinity(0)) - 2, 14), 1)

    def report(self, **figures: Any) -> None:
        """Print figures and keep them, whatever happens later."""
        for name, value in figures.items():
            print(f"  {name}: {f'{value:.4g}' if isinstance(value, float) else value}", flush=True)
        if self._figures:
            self._figures.write(json.dumps(figures) + "\n")

    def wait(self) -> None:
        """Until the device is done."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], repeats: int, warm_up: int = 3) -> float:
        """Of one call, the device waited for once."""
        for _ in range(warm_up):
            call()
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def jpegs(self) -> list[Path]:
        """The images to take."""
        found = sorted(self.images.glob("*.jpg"))[: self.files] if self.images.is_dir() else []
        self.report(images=str(self.images) if found else f"made, since there are no JPEGs in {self.images}")
        return found or make_jpegs(self.folder / "made", self.files)


def make_jpegs(folder: Path, count: int) -> list[Path]:
    """Smooth noise with some grain, so that they are about as large as photographs."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(count):
        smooth = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), 3)
        grain = draw.normal(0, 12, (375, 500, 3))
        pixels = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=85)
    return sorted(folder.iterdir())


def versions(part: Part) -> None:
    """What is installed, and what the machine does at best."""
    import importlib.metadata

    import torch

    for name in ("torch", "torchvision", "timm", "detectron2"):
        try:
            part.report(**{name: importlib.metadata.version(name)})
        except importlib.metadata.PackageNotFoundError:
            part.report(**{name: "not installed"})
    part.report(python=sys.version.split()[0], cores=len(os.sched_getaffinity(0)))
    if part.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True) if shutil.which(query[0]) else None
        part.report(
            gpu=torch.cuda.get_device_name(),
            gpu_memory_gib=torch.cuda.get_device_properties(0).total_memory / GIB,
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            driver=asked.stdout.strip() if asked else "nvidia-smi is absent",
        )
    one = torch.zeros(1, device=part.device)
    launches = [part.seconds(lambda: one.add_(1), 2000) for _ in range(5)]
    part.report(launch_microseconds=1e6 * statistics.median(launches))
    block = torch.empty((1 if part.small else 256) * 2**20, dtype=torch.uint8)
    there = torch.empty_like(block, device=part.device)
    for name, source in {
        "pageable": block,
        **({"pinned": block.pin_memory()} if part.device == "cuda" else {}),
    }.items():
        taken = part.seconds(lambda source=source: there.copy_(source, non_blocking=True), 5)
        part.report(**{f"to_device_{name}_gb_per_second": block.numel() / taken / 1e9})
    side = 256 if part.small else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, device=part.device, dtype=dtype)
        taken = part.seconds(lambda a=a: a @ a, 10)
        part.report(**{f"matmul_{str(dtype)[6:]}_tflops": 2 * side**3 / taken / 1e12})


def tests(part: Part) -> None:
    """The tests that are meant for a GPU; on the CPU the same tests there, of which a small call takes the losses."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    environment = {**os.environ, **({"NST_DET_GPU_TESTS_ON_CPU": "1"} if part.device == "cpu" else {})}
    folder = "tests/gpu/test_gpu_losses.py" if part.small else "tests/gpu"
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", folder]
    counts, failed = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0), []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"  {line}", end="", flush=True)
            if found := re.match(r"(tests/\S+?::.*) (PASSED|FAILED|ERROR|SKIPPED)", line):
                counts[found[2]] += 1
                failed += [found[1]] if found[2] in ("FAILED", "ERROR") else []
                if part._figures:
                    part._figures.write(json.dumps({"counts": counts, "failed": failed}) + "\n")
    part.report(counts=counts, failed=failed)
    if process.returncode:
        raise RuntimeError(f"pytest ended with {process.returncode}")


Rows = list[tuple[float, int, dict[str, float]]]


@contextmanager
def timed_rows() -> Iterator[Rows]:
    """The rows of metrics that are written in the block, with the time of each and its step."""
    from nst_det.engine.metrics import MetricsWriter

    rows: Rows = []
    write = MetricsWriter.write

    def noted(self: MetricsWriter, step: int, values: Any) -> None:
        write(self, step, values)
        if "lr" in values:
            rows.append((time.perf_counter(), step, dict(values)))

    with patch.object(MetricsWriter, "write", noted):
        yield rows


def step_figures(rows: Rows, batch: int, skip: int, prefix: str) -> dict[str, float]:
    """Milliseconds and images/s of a step after the first ``skip``, and what the metrics themselves say of speed."""
    kept = [row for row in rows if row[1] >= skip]
    seconds = (kept[-1][0] - kept[0][0]) / (kept[-1][1] - kept[0][1])
    said = {name: [row[2][name] for row in kept if name in row[2]] for name in kept[-1][2] if name.startswith("speed/")}
    return {
        f"{prefix}_ms": 1e3 * seconds,
        f"{prefix}_images_per_second": batch / seconds,
        **{f"{prefix}, {name}": statistics.median(values) for name, values in said.items()},
    }


def loader_rate(batches: Iterator[Any], batch: int, skip: int, seconds: float) -> float:
    """Images/s that a loader gives by itself, after its first ``skip`` batches."""
    for _ in range(skip):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        next(batches)
        count += batch
    return count / (time.perf_counter() - start)


def peak_gib(part: Part) -> dict[str, float]:
    """The most GPU memory since the last call."""
    import torch

    if part.device == "cpu":
        return {}
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return {"peak_gib": peak}


def stage_one(part: Part) -> None:
    """A student of stage one: loader, step on one batch, both, and bare passes of the same networks."""
    from safetensors.torch import save_file

    from nst_det.distillation.config import load_distill_config
    from nst_det.distillation.dataloader import StageOneData, TrainingBatches
    from nst_det.distillation.pipeline import distill
    from nst_det.engine.loader import load
    from nst_det.models import create_model

    files = part.jpegs()
    data = part.folder / "data"
    for name, count in (("train", part.count), ("val", 20)):
        for index in range(count):
            file = data / name / f"class{index % 10:02d}" / f"{index}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            take(files[index % len(files)], file)
    teacher = part.folder / "teacher.safetensors"
    save_file(create_model(part.teacher, 10).state_dict(), teacher)

    def config(name: str, workers: int, steps: int) -> Any:
        keys = {
            "DATA.ROOT": data,
            "DATA.IMAGE_SIZE": part.side,
            "METHODS": [METHOD],
            "TEACHER.ARCH": part.teacher,
            "TEACHER.PRETRAINED": False,
            "TEACHER.WEIGHTS": teacher,
            "TEACHER.EXPECTED_TOP1": 0,
            "STUDENT.ARCH": part.student,
            "SOLVER.AMP.ENABLED": part.device == "cuda",
            "SOLVER.IMS_PER_BATCH": part.batch,
            "SOLVER.BASE_LR": 0.001,
            "SOLVER.STEPS": [],
            "SOLVER.MAX_ITER": steps,
            "TEST.EVAL_PERIOD": 0,
            "SOLVER.CHECKPOINT_PERIOD": 100000,
            "LOG_PERIOD": 1 if part.small else 4,
            "TENSORBOARD": False,
            "DATALOADER.NUM_WORKERS": workers,
            "OUTPUT_DIR": part.folder / name,
            "REGISTRY": part.folder / name / "backbones",
        }
        words = [str(word) for pair in keys.items() for word in pair]
        return load_distill_config(CONFIGS / "distill" / "imagenet_r50_to_r18.yaml", words)

    part.report(student=part.student, teacher=part.teacher, method=METHOD, batch=part.batch, workers=part.workers)
    for name, layout in (("eager", "contiguous"), ("channels_last", "channels_last")):
        part.report(**bare_passes(part, name, layout, compiled=False))
    fixed = config("fixed", 0, part.steps + part.warm_up)
    batch = StageOneData(fixed).training(fixed.DATA.AUGMENT, fixed.SOLVER)[0]
    peak_gib(part)
    with timed_rows() as rows, patch.object(TrainingBatches, "__getitem__", lambda *_: batch):
        distill(fixed)
    part.report(**step_figures(rows, part.batch, part.warm_up, "one_batch"), **peak_gib(part))
    skip = max(part.workers, part.warm_up)
    loaded = config("loaded", part.workers, part.steps + skip)
    steps = load(StageOneData(loaded).training(loaded.DATA.AUGMENT, loaded.SOLVER), range(100000), part.workers)
    part.report(loader_images_per_second=loader_rate(steps, part.batch, skip, part.loader_seconds))
    steps.close()  # type: ignore[attr-defined]
    with timed_rows() as rows:
        distill(loaded)
    part.report(**step_figures(rows, part.batch, skip, "together"))


def take(source: Path, target: Path) -> None:
    """A copy beside the others; a second one of the same file takes no room."""
    kept = target.parents[1] / ".copies" / source.name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, kept)
    os.link(kept, target)


def bare_passes(part: Part, name: str, layout: str, compiled: bool) -> dict[str, float]:
    """Teacher forward, student forward and backward with the labels' loss, and nothing else."""
    import torch
    from torch.nn.functional import cross_entropy

    from nst_det.models import create_model

    memory = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    student, teacher = (
        create_model(arch, 10).to(part.device, memory_format=memory) for arch in (part.student, part.teacher)
    )
    teacher.eval().requires_grad_(False)
    images = torch.randn(part.batch, 3, part.side, part.side, device=part.device).to(memory_format=memory)
    labels = torch.randint(0, 10, (part.batch,), device=part.device)
    if compiled:
        student, teacher = torch.compile(student), torch.compile(teacher)

    def passes() -> None:
        with torch.autocast(part.device, torch.bfloat16, enabled=part.device == "cuda"):
            with torch.no_grad():
                teacher(images)
            logits = student(images)
        cross_entropy(logits.float(), labels).backward()
        student.zero_grad(set_to_none=True)

    seconds = part.seconds(passes, 2 if part.small else 10)
    return {f"bare_{name}_ms": 1e3 * seconds, f"bare_{name}_images_per_second": part.batch / seconds}


def compiled(part: Part) -> None:
    """The bare passes of stage one's networks by torch.compile; an installation without a compiler can't."""
    begin = time.perf_counter()
    part.report(**bare_passes(part, "compiled", "channels_last", compiled=True))
    part.report(seconds_with_compilation=time.perf_counter() - begin)


def voc_folder(part: Part, files: list[Path]) -> Path:
    """The images in VOC layout, three boxes drawn by chance in each."""
    import numpy as np

    from nst_det.data.annotation import VocAnnotation, VocObject
    from nst_det.data.images import image_size
    from nst_det.data.synthetic import voc_xml

    root, draw = part.folder / "voc", np.random.default_rng(0)
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for index, file in enumerate(files):
        shutil.copyfile(file, root / "JPEGImages" / f"{index:05d}.jpg")
        width, height = image_size(file.read_bytes(), str(file))
        objects = []
        for label in range(3):
            x, y = draw.uniform(1, 0.6 * width), draw.uniform(1, 0.6 * height)
            box = (round(x), round(y), round(x + 0.1 * width + draw.uniform(0, 0.3) * width), round(y + 0.3 * height))
            objects.append(VocObject(f"class{label}", box))
        annotation = VocAnnotation(f"{index:05d}", width, height, tuple(objects))
        (root / "Annotations" / f"{index:05d}.xml").write_text(voc_xml(annotation, "voc"))
    ids = [f"{index:05d}" for index in range(len(files))]
    for split, chosen in (("trainval", ids), ("test", ids[: part.test_images])):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(chosen) + "\n")
    return root


class Watch:
    """Milliseconds of methods while a detector is trained: of the host, and on a GPU by CUDA events too.

    The GPU's time of a method goes from its first kernel to its last, waiting for the host in between included.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.taken: dict[str, list[tuple[float, Any, Any]]] = {}

    def over(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, watched; its calls outside of training don't count."""
        import torch

        def watched(module: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return method(module, *args, **kwargs)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.device == "cuda" else [None] * 2
            start = time.perf_counter()
            if events[0] is not None:
                events[0].record()
            value = method(module, *args, **kwargs)
            if events[1] is not None:
                events[1].record()
            self.taken.setdefault(name, []).append((time.perf_counter() - start, *events))
            return value

        return watched

    def figures(self, skip: int) -> dict[str, float]:
        """Medians of what came after the first ``skip`` steps."""
        found = {}
        for name, calls in self.taken.items():
            kept = calls[skip:]
            found[f"{name}_host_ms"] = 1e3 * statistics.median(seconds for seconds, _, _ in kept)
            if self.device == "cuda":
                found[f"{name}_gpu_ms"] = statistics.median(first.elapsed_time(last) for _, first, last in kept)
        return found


def torchvision(part: Part) -> None:
    """Stage two by the torchvision engine."""
    import nst_det.detection.pipeline as stage
    from nst_det.detection.config import load_detect_config
    from nst_det.detection.data import data_classes, open_voc, training_batches
    from nst_det.detection.torchvision.roi_heads import RoiHeads
    from nst_det.detection.torchvision.rpn import Rpn

    def loader(words: list[str]) -> Iterator[Any]:
        config = load_detect_config(DETECTOR, words)
        return training_batches(config, open_voc(config, "DATASETS.TRAIN", data_classes(config)), 0, 0)

    detector_part(
        part,
        "torchvision",
        loader,
        lambda batch: patch.object(stage, "training_batches", lambda *_: itertools.repeat(batch)),
        {"rpn": (Rpn, "forward"), "roi_heads": (RoiHeads, "forward")},
        (stage, "detect"),
    )


def detectron2(part: Part) -> None:
    """Stage two by the Detectron2 engine, and by Detectron2's own trainer with its own loader."""
    if importlib.util.find_spec("detectron2") is None:
        raise Skipped("Detectron2 is not installed")
    from detectron2.engine import DefaultTrainer, defaults
    from detectron2.modeling import StandardROIHeads
    from detectron2.modeling.proposal_generator import RPN
    from detectron2_step import build, step

    from nst_det.detectron2.config import load_config, register_datasets
    from nst_det.detectron2.data import build_train_loader
    from nst_det.detectron2.trainer import DistillTrainer

    def loader(words: list[str]) -> Iterator[Any]:
        config = load_config(DETECTOR, words)
        register_datasets(config)
        return iter(build_train_loader(config))

    class Same:
        def __init__(self, batch: Any) -> None:
            self.batch = batch

        def __iter__(self) -> Iterator[Any]:
            return itertools.repeat(self.batch)

    words = detector_part(
        part,
        "detectron2",
        loader,
        lambda batch: patch.object(DistillTrainer, "build_train_loader", classmethod(lambda *_: Same(batch))),
        {"rpn": (RPN, "forward"), "roi_heads": (StandardROIHeads, "forward")},
        (defaults, "inference_on_dataset"),
    )

    class Plain(DefaultTrainer):
        """Detectron2's trainer as it is; SimpleTrainer, or AMPTrainer where AMP is on."""

    config = load_config(DETECTOR, [*words, "OUTPUT_DIR", str(part.folder / "plain")])
    register_datasets(config)
    trainer = build(Plain, config)
    for hook in trainer._hooks:
        hook.before_train()
    skip = max(part.workers, part.warm_up)
    taken = part.seconds(lambda: step(trainer, time.perf_counter), part.steps, warm_up=skip)
    part.report(detectron2s_own_together_ms=1e3 * taken, detectron2s_own_trainer=type(trainer._trainer).__name__)
    part.report(detectron2s_own_together_images_per_second=part.detector_batch / taken)


DETECTOR = CONFIGS / "detect" / "voc" / "base_fpn.yaml"


def detector_part(
    part: Part,
    engine: str,
    loader: Callable[[list[str]], Iterator[Any]],
    one_batch: Callable[[Any], Any],
    heads: dict[str, tuple[type, str]],
    evaluation: tuple[Any, str],
) -> list[str]:
    """The figures that both engines have; the ``KEY VALUE`` pairs of a plain run with workers."""
    from nst_det.cli import main
    from nst_det.detection.checkpoint import save_weights
    from nst_det.detection.config import load_detect_config
    from nst_det.detection.distiller import DistilledDetector
    from nst_det.detection.torchvision import build_detector
    from nst_det.losses import TransferLoss

    root = voc_folder(part, part.jpegs())
    skip = max(part.workers, part.warm_up)
    classes = [f"class{label}" for label in range(3)]
    keys = {
        "ENGINE": engine,
        "DATASETS.VOC": {split: {"ROOT": str(root), "SPLIT": split} for split in ("trainval", "test")},
        "DATASETS.TRAIN": ["trainval"],
        "DATASETS.TEST": [],
        "DATASETS.CLASSES": classes,
        "MODEL.DEVICE": part.device,
        "MODEL.TIMM.ARCH": part.student,
        "MODEL.TIMM.PRETRAINED": False,
        # random weights must not be frozen
        "MODEL.TIMM.NORM": "BN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.ROI_HEADS.NUM_CLASSES": len(classes),
        "INPUT.MIN_SIZE_TRAIN": [part.pixels],
        "INPUT.MIN_SIZE_TEST": part.pixels,
        # nothing is kept in memory, as with a data set of the usual size
        "DATALOADER.CACHE_IMAGES_MB": 0,
        "SOLVER.AMP.ENABLED": part.device == "cuda",
        "SOLVER.IMS_PER_BATCH": part.detector_batch,
        "SOLVER.BASE_LR": 0.00001,
        "SOLVER.STEPS": [],
        "SOLVER.CHECKPOINT_PERIOD": 100000,
    }
    if part.small:
        keys |= {"MODEL.FPN.OUT_CHANNELS": 16, "MODEL.ROI_BOX_HEAD.FC_DIM": 16, "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20}
        keys |= {"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16, "MODEL.RPN.POST_NMS_TOPK_TEST": 20}
    plain = [str(word) for pair in keys.items() for word in pair]
    teacher = [*plain, "ENGINE", "torchvision", "MODEL.TIMM.ARCH", part.teacher]
    config = load_detect_config(DETECTOR, teacher)
    save_weights(part.folder / "teacher.safetensors", build_detector(config, 7), classes)
    (part.folder / "teacher.yaml").write_text(config.dump())
    nst = ["METHOD", "nst-poly:1", "TRANSFER.LEVELS", str(PYRAMID)]
    nst += ["TEACHER.CONFIG_FILE", str(part.folder / "teacher.yaml")]
    nst += ["TEACHER.WEIGHTS", str(part.folder / "teacher.safetensors")]
    with_workers = [*plain, "DATALOADER.NUM_WORKERS", str(part.workers)]
    alone = [*plain, "DATALOADER.NUM_WORKERS", "0"]

    def train(name: str, words: list[str], first: int, prefix: str) -> None:
        steps = ["SOLVER.MAX_ITER", str(first + part.steps), "OUTPUT_DIR", str(part.folder / name)]
        peak_gib(part)
        with timed_rows() as rows:
            try:
                main(["train-det", "--config-file", str(DETECTOR), *words, *steps])
            except SystemExit as left:
                if left.code:
                    raise RuntimeError(f"train-det ended with {left.code}") from left
        part.report(**step_figures(rows, part.detector_batch, first, prefix))
        part.report(**{f"{prefix}_{key}": value for key, value in peak_gib(part).items()})

    part.report(student=part.student, teacher=part.teacher, levels=PYRAMID, workers=part.workers)
    part.report(batch=part.detector_batch, pixels=part.pixels)
    batches = loader([*alone, "OUTPUT_DIR", str(part.folder / "batch")])
    batch = next(batches)
    watch = Watch(part.device)
    methods = {"transfer_forward": (TransferLoss, "forward"), **heads}
    with one_batch(batch), ExitStack() as stack:
        train("ce", alone, part.warm_up, "ce_one_batch")
        # the teacher's forward runs without gradient
        asked = DistilledDetector._run_teacher
        stack.enter_context(patch.object(DistilledDetector, "_run_teacher", watch.over("teacher_forward", asked)))
        for name, (owner, method) in methods.items():
            stack.enter_context(patch.object(owner, method, watch.over(name, getattr(owner, method))))
        train("nst", [*alone, *nst], part.warm_up, "nst_one_batch")
    part.wait()
    part.report(**watch.figures(part.warm_up))
    batches = loader([*with_workers, "OUTPUT_DIR", str(part.folder / "batches")])
    part.report(loader_images_per_second=loader_rate(batches, part.detector_batch, skip, part.loader_seconds))
    del batches
    train("ce_loaded", with_workers, skip, "ce_together")
    taken: list[float] = []
    owner, name = evaluation
    evaluate = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = evaluate(*args, **kwargs)
        taken.append(time.perf_counter() - start)
        return found

    with patch.object(owner, name, timed):
        train("nst_loaded", [*with_workers, *nst, "DATASETS.TEST", "[test]"], skip, "nst_together")
    part.report(evaluation_images_per_second=part.test_images / taken[-1])
    return with_workers


def nst_loss(part: Part) -> None:
    """The NST losses against the bare products, as benchmarks/nst_loss.py measures them."""
    import nst_loss as bench

    ratios = []
    for shape in [bench.CLAIM] if part.small else bench.SHAPES:
        for kernel in bench.KERNELS:
            times = bench.measure_times(shape, kernel, ("ours", "bare"), part.device, 1, 0.05 if part.small else 0.2)
            ratios.append(times["ours"] / times["bare"])
            part.report(**{f"{shape.name}, {kernel}": {"ms": times["ours"], "times_the_bare_products": ratios[-1]}})
    part.report(median_times_the_bare_products=statistics.median(ratios))


def demo(part: Part) -> None:
    """The demo, and the seconds of its runs as they end."""
    words = ["--config-file", str(CONFIGS / "compare" / "demo.yaml"), "--output", str(part.folder / "demo")]
    if part.small:
        made = {"classification_images": 40, "classification_val_images": 20, "detection_images": 8}
        small = {**{f"DATA.GENERATE.{name}": count for name, count in made.items()}, "METHODS": ["ce"]}
        small |= {"DATA.GENERATE.detection_test_images": 4, "DISTILL.TEACHER.EXPECTED_TOP1": 0.0}
        small |= {"DISTILL.SOLVER.MAX_ITER": 2, "DISTILL.TEACHER.SOLVER": {"MAX_ITER": 2}, "DETECT.SOLVER.MAX_ITER": 2}
        small |= {"DETECT.SOLVER.WARMUP_ITERS": 0}
        words += [str(word) for pair in small.items() for word in pair]
    command, start, told = [sys.executable, "-m", "nst_det", "compare", *words], time.perf_counter(), set()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            time.sleep(0.5)
            tell_seconds(part, told)
    tell_seconds(part, told)
    part.report(seconds_in_all=time.perf_counter() - start)
    if process.returncode:
        raise RuntimeError(f"the demo ended with {process.returncode}")


def tell_seconds(part: Part, told: set[Path]) -> None:
    """The seconds of the runs of the demo that have ended since."""
    for file in sorted({*(part.folder / "demo").rglob("result.json")} - told):
        told.add(file)
        found = json.loads(file.read_text())
        if found.get("seconds"):
            part.report(**{f"{file.parent.relative_to(part.folder / 'demo')}": {"seconds": found["seconds"]}})


PARTS: dict[str, Callable[[Part], None]] = {
    "versions": versions,
    "tests": tests,
    "stage_one": stage_one,
    "compiled": compiled,
    "torchvision": torchvision,
    "detectron2": detectron2,
    "nst_loss": nst_loss,
    "demo": demo,
}


def run_part(args: argparse.Namespace) -> int:
    """What the process of a part does."""
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("nst_det: no GPU to be seen here; try it by --device cpu --small", file=sys.stderr)
        return 2
    # figures are what is wanted here
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        part = Part(args, Path(folder))
        try:
            PARTS[args.run_part](part)
        except Skipped as reason:
            print(f"  SKIPPED: {reason}", flush=True)
            part.report(skipped=str(reason))
    return 0


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started; loader workers and runs have groups of their own."""
    first = psutil.Process(process.pid)
    for member in [*first.children(recursive=True), first]:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def call_part(name: str, limit: float, args: argparse.Namespace) -> dict[str, Any]:
    """Start the process of a part, pass on what it says, end it in time; what is known of it then."""
    with tempfile.TemporaryDirectory() as folder:
        said, figures = Path(folder) / "said", Path(folder) / "figures"
        figures.touch()
        command = [sys.executable, "-u", __file__, "--run-part", name, "--figures", str(figures)]
        command += ["--device", args.device, "--images", args.images, *(["--small"] if args.small else [])]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        start, state = time.monotonic(), ""
        # into a file: a worker that is left over would keep a pipe open
        with open(said, "wb") as sink, open(said, "rb") as source:
            process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                while process.poll() is None and not state:
                    time.sleep(0.1)
                    state = "timed out" if time.monotonic() - start > limit else ""
                    pass_on(source)
            finally:
                if process.poll() is None:
                    end(process)
            pass_on(source)
        known: dict[str, Any] = {}
        for line in figures.read_text().splitlines(keepends=True):
            # a last line may be cut off
            known |= json.loads(line) if line.endswith("\n") else {}
        state = state or ("failed" if process.returncode else "skipped" if "skipped" in known else "done")
        seconds = time.monotonic() - start
        print(f"{name}: {state} after {seconds:.1f} s", flush=True)
        return {
            "state": state,
            "seconds": round(seconds, 1),
            "limit": round(limit, 1),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "device": args.device,
            "small": args.small,
            "figures": known,
            "said": said.read_text(errors="replace").splitlines()[-200:],
        }


def pass_on(source: Iterable[bytes]) -> None:
    """Print what has come since."""
    for text in source:
        sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this one; may be given again")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks and images: does it work")
    parser.add_argument("--limit", type=float, default=480, help="seconds of all parts (default: 480), shared out")
    data = os.environ.get("NST_DET_REAL_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--images", metavar="FOLDER", default=f"{data}/VOC2007/JPEGImages", help="JPEGs")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSON; parts that it has and that aren't run stay")
    parser.add_argument("--run-part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--figures", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_part:
        return run_part(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = json.loads(args.output.read_text()) if args.output and args.output.exists() else {"parts": {}}
    begin, states = time.monotonic(), []
    for name in args.part or PARTS:
        left = args.limit - (time.monotonic() - begin)
        limit = left if name == "demo" else min(LIMITS[name] * args.limit / sum(LIMITS.values()), left)
        print(f"\n== {name}, at most {max(limit, 0):.0f} s", flush=True)
        if limit < 1:
            print(f"{name}: no time left", flush=True)
            states.append("no time left")
            continue
        found["parts"][name] = call_part(name, limit, args)
        states.append(found["parts"][name]["state"])
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    return int(not set(states) <= {"done", "skipped"})


if __name__ == "__main__":
    sys.exit(main())
