"""What a comparison will take, measured on a few steps of each kind of run before anything is started.

Each distinct kind of run is tried once in a folder of its own that is removed again: the same command with
:data:`STEPS` steps, on a part of the data.  The steps are timed from outside, by the lines of
``metrics.jsonl``, so that both engines are measured the same way.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
from fvcore.common.config import CfgNode

from nst_det.comparison.config import Comparison
from nst_det.comparison.launch_local import Command, Machine, stage_command
from nst_det.comparison.plan import DATA, DETECTOR, STUDENTS, TEACHER, TEACHER_DETECTOR, Run
from nst_det.comparison.stages import total_steps
from nst_det.data.folders import ImageSplit, read_image_folder
from nst_det.data.voc import VocDataset
from nst_det.detection.config import voc_roots
from nst_det.engine.clock import GIB
from nst_det.engine.config import expand_path, flat, plain
from nst_det.engine.format import bytes_below, duration, size
from nst_det.engine.io import write_text
from nst_det.engine.metrics import read_metrics, speed_of
from nst_det.engine.run_dir import config_hash
from nst_det.errors import UserError

# of the image folder, and of a VOC folder
TRAIN_IMAGES, VAL_IMAGES = 512, 128
TRAIN_SCENES, TEST_SCENES = 64, 16
STEPS = 8
# the first ones find the fastest kernels and fill caches
WARM_UP = 2
POLL_SECONDS, MEMORY_SECONDS = 0.01, 0.05
# what a process has on a GPU beside its tensors: the driver's context and the kernels, roughly
GPU_CONTEXT = GIB // 2
# what differs between two runs of one kind without changing what they take
_FREE = ("OUTPUT_DIR", "REGISTRY", "NAME", "SEED", "MODEL.WEIGHTS", "TEACHER.WEIGHTS", "TRANSFER.TEACHER.WEIGHTS")
_FREE_RATES = ("SOLVER.BASE_LR", "SOLVER.BACKBONE_MULTIPLIER")


@dataclass
class Parts:
    """Where the parts are, and how large they are beside the whole.

    Attributes:
        images: the image folder.
        voc: name of DATASETS.VOC -> root.
        val_share: of the images that stage one validates on, those in the trial.
        test_share: of the images that stage two tests on, those in the trial.
        distill_cache: bytes of decoded images that stage one will keep beyond those of the trial.
        detect_cache: the same of stage two.
        generate_seconds: what generating the data set will take; 0 where it is there, or is the user's.
        generate_bytes: its size on disk.
    """

    images: Path
    voc: dict[str, Path] = field(default_factory=dict)
    val_share: float = 1.0
    test_share: float = 1.0
    distill_cache: int = 0
    detect_cache: int = 0
    generate_seconds: float = 0.0
    generate_bytes: int = 0


def copy_parts(comparison: Comparison, folder: Path) -> Parts:
    """Make the parts below ``folder``.

    Raises:
        UserError: the data can't be read.
    """
    if comparison.generate and comparison.data_root is not None and not comparison.data_root.exists():
        return _generated(comparison, folder)
    config = comparison.distill
    root = Path(expand_path(config.DATA.ROOT, "DISTILL.DATA.ROOT"))
    if comparison.generate and comparison.data_root is not None:
        from nst_det.data.synthetic import CLASSIFICATION

        root = comparison.data_root / CLASSIFICATION
    whole = read_image_folder(root, config.DATA.VAL_FRACTION, config.DATA.VAL_SEED)
    parts = Parts(folder / "images")
    copied = [
        _copy_images(whole.train, whole.classes, parts.images / "train", TRAIN_IMAGES),
        _copy_images(whole.val, whole.classes, parts.images / "val", VAL_IMAGES),
    ]
    parts.val_share = copied[1] / max(len(whole.val), 1)
    parts.distill_cache = _kept(comparison, len(whole.train) + len(whole.val) - sum(copied))
    _copy_voc(comparison, folder / "voc", parts)
    return parts


def _kept(comparison: Comparison, more: int) -> int:
    data = comparison.distill.DATA
    return min(more * 3 * data.IMAGE_SIZE**2, int(data.CACHE_GIB * 2**30))


def _copy_images(split: ImageSplit, classes: Sequence[str], folder: Path, most: int) -> int:
    """Every n-th image, at least one of each class; how many."""
    chosen = set(range(0, len(split), max(1, len(split) // most)))
    labels = [int(label) for label in split.labels]
    chosen |= {labels.index(label) for label in set(labels)}
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in sorted(chosen):
        source = Path(split.root) / split.paths[index]
        shutil.copyfile(source, folder / classes[labels[index]] / f"{index:08d}{source.suffix}")
    return len(chosen)


def _copy_voc(comparison: Comparison, folder: Path, parts: Parts) -> None:
    config = comparison.detect
    roots = dict(config.DATASETS.VOC)
    if comparison.generate and comparison.data_root is not None:
        from nst_det.data.synthetic import DETECTION

        own = dict.fromkeys(roots, comparison.data_root / DETECTION)
    else:
        own = {name: root for name in roots for root, _ in voc_roots(config, [name], "DATASETS")}
    counts = {"whole": 0, "part": 0}
    for name in (*config.DATASETS.TRAIN, *config.DATASETS.TEST):
        if name not in roots:
            continue
        data = VocDataset(own[name], roots[name]["SPLIT"])
        tests = name in config.DATASETS.TEST
        ids = data.ids[:: max(1, len(data.ids) // (TEST_SCENES if tests else TRAIN_SCENES))]
        if tests:
            counts["whole"] += len(data.ids)
            counts["part"] += len(ids)
        else:
            parts.detect_cache += _decoded(data)
        place = folder / name
        for inner in ("ImageSets/Main", "JPEGImages", "Annotations"):
            (place / inner).mkdir(parents=True)
        for id_ in ids:
            for source in (data.image_path(id_), data.annotation_path(id_)):
                shutil.copyfile(source, place / source.parent.name / source.name)
        (place / "ImageSets" / "Main" / f"{roots[name]['SPLIT']}.txt").write_text("\n".join(ids) + "\n")
        parts.voc[name] = place
    parts.test_share = counts["part"] / counts["whole"] if counts["whole"] else 1.0
    if parts.detect_cache > config.DATALOADER.CACHE_IMAGES_MB * 2**20:
        parts.detect_cache = 0


def _decoded(data: VocDataset) -> int:
    return int(sum(3 * np.prod((item.height, item.width)) for item in data.annotations()))


def _generated(comparison: Comparison, folder: Path) -> Parts:
    """A small data set of the same look, and from it what the whole one takes."""
    from nst_det.data.synthetic import CLASSIFICATION, DETECTION, generate_data, settings_from

    whole = settings_from(comparison.generate)
    small = replace(
        whole,
        classification_images=min(whole.classification_images, TRAIN_IMAGES // 4),
        classification_val_images=min(whole.classification_val_images, VAL_IMAGES // 2),
        detection_images=min(whole.detection_images, TRAIN_SCENES),
        detection_test_images=min(whole.detection_test_images, TEST_SCENES),
    )
    began = time.monotonic()
    root = generate_data(folder / "generated", small)
    seconds = time.monotonic() - began
    fields = ("classification_images", "classification_val_images", "detection_images", "detection_test_images")
    ratio = sum(getattr(whole, name) for name in fields) / sum(getattr(small, name) for name in fields)
    more = whole.classification_images + whole.classification_val_images
    return Parts(
        root / CLASSIFICATION,
        dict.fromkeys(comparison.detect.DATASETS.VOC, root / DETECTION),
        val_share=small.classification_val_images / whole.classification_val_images,
        test_share=small.detection_test_images / whole.detection_test_images,
        distill_cache=_kept(comparison, more - small.classification_images - small.classification_val_images),
        generate_seconds=seconds * ratio,
        generate_bytes=int(bytes_below(root) * ratio),
    )


@dataclass(frozen=True)
class Estimate:
    """What one run will take.

    Attributes:
        seconds: from its start to its end, on an otherwise idle machine.
        disk: bytes that it leaves behind.
        memory: bytes, the most that its processes have at a time.  0 is not known.
        gpu_memory: bytes, the most that it allocates on its GPU at a time; 0 without one.
    """

    seconds: float
    disk: int
    memory: int
    gpu_memory: int = 0


@dataclass(frozen=True)
class Trial:
    """A run of :data:`STEPS` steps: seconds before the first, of each, and after the last; bytes."""

    start: float
    step: float
    end: float
    disk: int
    memory: int
    gpu_memory: int


def estimate(
    comparison: Comparison,
    runs: Sequence[Run],
    configs: Mapping[str, CfgNode],
    machine: Machine,
    command: Command | None = None,
) -> dict[str, Estimate]:
    """Try one run of each kind; what every run of the plan will take, by its name.

    Args:
        comparison: whose plan this is.
        runs: the plan.
        configs: the config of each run, by name; none for the data.
        machine: where they will run.
        command: gives the command line of a run, in place of this package's own.

    Raises:
        UserError: a trial ended with an error; the line is the run's own.
    """
    found: dict[str, Estimate] = {}
    tried: dict[str, Trial] = {}
    with tempfile.TemporaryDirectory(prefix="nst-det-dry-run-") as name:
        folder = Path(name)
        parts = copy_parts(comparison, folder / "data")
        for run in runs:
            if run.kind == DATA:
                found[run.name] = Estimate(parts.generate_seconds, parts.generate_bytes, 0)
                continue
            kind = _kind(run, configs[run.name])
            if kind not in tried:
                config = _trial_config(comparison, run, configs[run.name], folder, parts)
                tried[kind] = _try(run, config, folder, machine, command or stage_command)
            found[run.name] = _scaled(run, configs[run.name], tried[kind], parts)
    return found


def wall_seconds(runs: Sequence[Run], found: Mapping[str, Estimate], machine: Machine) -> float:
    """Seconds until all runs that are not done are, when a run starts as soon as there is room for it."""
    done = {run.name for run in runs if run.done}
    waiting = [run for run in runs if run.name not in done]
    running: list[tuple[float, Run]] = []
    now = 0.0
    while waiting or running:
        for run in list(waiting):
            used = sum(machine.weight(other) for _, other in running if machine.on_gpu(other) == machine.on_gpu(run))
            if done.issuperset(run.needs) and used + machine.weight(run) <= machine.room(run):
                waiting.remove(run)
                running.append((now + found[run.name].seconds, run))
        now, ended = min(running, key=lambda item: item[0])
        running.remove((now, ended))
        done.add(ended.name)
    return now


def _kind(run: Run, config: CfgNode) -> str:
    values = {key: value for key, value in plain(flat(config)).items() if key not in (*_FREE, *_FREE_RATES)}
    return f"{run.kind}-{config_hash(values)}"


def _trial_config(comparison: Comparison, run: Run, config: CfgNode, folder: Path, parts: Parts) -> CfgNode:
    config = config.clone()
    config.defrost()
    backbones = folder / "backbones"
    config.TENSORBOARD, config.WANDB = False, ""
    config.SOLVER.MAX_ITER, config.SOLVER.STEPS = STEPS, type(config.SOLVER.STEPS)()
    config.SOLVER.WARMUP_ITERS = min(config.SOLVER.WARMUP_ITERS, STEPS)
    config.TEST.EVAL_PERIOD = 0
    if run.kind in (DETECTOR, TEACHER_DETECTOR):
        config.OUTPUT_DIR = str(folder / run.name)
        config.SOLVER.CHECKPOINT_PERIOD, config.TEST.SELECT = STEPS // 2, "last"
        config.MODEL.WEIGHTS = _moved(config.MODEL.WEIGHTS, comparison.folder / "backbones", backbones)
        teacher = config.TRANSFER.TEACHER
        teacher.WEIGHTS = _moved(teacher.WEIGHTS, comparison.folder, folder)
        teacher.CONFIG_FILE = _moved(teacher.CONFIG_FILE, comparison.folder, folder)
        for name, root in parts.voc.items():
            config.DATASETS.VOC[name].ROOT = str(root)
        return config
    config.OUTPUT_DIR, config.REGISTRY = str(folder / run.name), str(backbones)
    config.DATA.ROOT, config.DATA.VAL_FROM = str(parts.images), "auto"  # has a val folder
    config.CHECKPOINT_PERIOD, config.LOG_PERIOD = STEPS // 2, 1
    config.TEACHER.EXPECTED_TOP1, config.CACHE.DIR, config.CACHE.DTYPE = 0.0, "", "auto"
    config.TEACHER.WEIGHTS = _moved(config.TEACHER.WEIGHTS, comparison.folder / "backbones", backbones)
    for key in ("STEPS", "WARMUP_ITERS"):
        config.TEACHER.SOLVER.pop(key, None)
    config.TEACHER.SOLVER.MAX_ITER = STEPS
    return config


def _moved(path: str, before: Path, after: Path) -> str:
    """A path below one folder, as it is called below the other; others stay."""
    return str(after / Path(path).relative_to(before)) if path and Path(path).is_relative_to(before) else path


def _try(run: Run, config: CfgNode, folder: Path, machine: Machine, command: Command) -> Trial:
    path = run.config_path(folder)
    write_text(path, config.dump())
    output = Path(config.OUTPUT_DIR)
    inner = {TEACHER: "teacher", STUDENTS: "students/" + (run.folders[0].name if run.folders else "")}
    metrics = output / inner.get(run.kind, "") / "metrics.jsonl"
    log = folder / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before = bytes_below(folder)
    began, times = time.monotonic(), list[float]()
    looked, memory = began, 0
    with open(log, "wb") as said:
        words = command(run, folder)
        environment = machine.environment(run, machine.gpus[0] if machine.on_gpu(run) else "")
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)
        try:
            while True:
                ended = process.poll() is not None
                if time.monotonic() - looked > MEMORY_SECONDS:
                    looked, memory = time.monotonic(), max(memory, _memory(process.pid))
                times += [time.monotonic()] * (_steps_in(metrics) - len(times))
                if ended:
                    break
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode or len(times) < STEPS:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise UserError(f"--dry-run: the trial of {run.name} failed: {lines[-1].removeprefix('nst-det: ')}")
    step = (times[-1] - times[WARM_UP - 1]) / (STEPS - WARM_UP)
    now = time.monotonic()
    return Trial(
        start=max(times[0] - began - step, 0.0),
        step=step,
        end=now - times[-1],
        disk=bytes_below(folder) - before,
        memory=memory,
        gpu_memory=round(speed_of(read_metrics(metrics, speed=True)).get("gpu_memory_gib", 0) * GIB),
    )


def _memory(pid: int) -> int:
    """Bytes that a process and its loader processes have now; not what the kernel says at its end, which starts with
    the memory of the process that started it.
    """
    try:
        process = psutil.Process(pid)
        return sum(int(one.memory_info().rss) for one in (process, *process.children(recursive=True)))
    except psutil.Error:
        # it ended meanwhile
        return 0


def _steps_in(metrics: Path) -> int:
    """Steps with a loss in a ``metrics.jsonl``; evaluations have rows of their own in stage one."""
    if not metrics.exists():
        return 0
    return len({row["step"] for row in read_metrics(metrics) if any("loss" in name for name in row)})


def _scaled(run: Run, config: CfgNode, trial: Trial, parts: Parts) -> Estimate:
    detects = run.kind in (DETECTOR, TEACHER_DETECTOR)
    steps, period = total_steps(run.kind, config), config.TEST.EVAL_PERIOD
    evaluations = 1 + ((steps - 1) // period if period else 0)
    share = parts.test_share if detects else parts.val_share
    seconds = trial.start + steps * trial.step + evaluations * trial.end / share
    memory = trial.memory + (parts.detect_cache if detects else parts.distill_cache)
    return Estimate(seconds, trial.disk, memory, trial.gpu_memory)


def total(found: Mapping[str, Estimate], runs: Sequence[Run]) -> Estimate:
    """Seconds of machine time and bytes of all runs that are not done; of memory the largest one's."""
    left = [found[run.name] for run in runs if not run.done]
    if not left:
        return Estimate(0.0, 0, 0)
    return replace(
        left[0],
        seconds=sum(one.seconds for one in left),
        disk=sum(one.disk for one in left),
        memory=max(one.memory for one in left),
        gpu_memory=max(one.gpu_memory for one in left),
    )


def cells(one: Estimate) -> tuple[str, ...]:
    """Time, disk, memory and the GPU's memory as a table shows them."""
    memory, gpu_memory = (size(count) if count else "-" for count in (one.memory, one.gpu_memory))
    return duration(one.seconds), size(one.disk), memory, gpu_memory


def gpu_shortage(one: Estimate, machine: Machine) -> str:
    """A line where the runs that share a GPU need more than it has free; else "".

    Args:
        one: the largest run's.
        machine: how many go side by side.
    """
    if not one.gpu_memory:
        return ""
    import torch

    beside = -(-machine.gpu_jobs // len(machine.gpus))
    needed = one.gpu_memory + GPU_CONTEXT
    free = min(torch.cuda.mem_get_info(index)[0] for index in range(len(machine.gpus)))
    if beside * needed <= free:
        return ""
    fits = free // needed * len(machine.gpus)
    remedy = f"take --jobs {fits}" if fits else "lower SOLVER.IMS_PER_BATCH or the size of the images"
    return f"GPU memory: runs side by side on a GPU take {beside} x {size(needed)}, {size(free)} are free; {remedy}"
