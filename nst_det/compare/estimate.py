"""What a comparison will take, measured on a few steps of each kind of run before anything is started.

Each distinct kind of run is tried once in a folder of its own that is removed again: the same command with
:data:`STEPS` steps, on a part of the data.  The steps are timed from outside, by the lines of
``metrics.jsonl``, so that both engines are measured the same way.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from fvcore.common.config import CfgNode

from nst_det.compare.config import Comparison
from nst_det.compare.plan import DATA, DETECTOR, STUDENTS, TEACHER, TEACHER_DETECTOR, Run
from nst_det.compare.run import Command, Machine, stage_command
from nst_det.compare.stages import total_steps
from nst_det.compare.trial_data import Parts, copy_parts
from nst_det.errors import UserError
from nst_det.runtime.amounts import bytes_below, duration, size
from nst_det.runtime.clock import GIB
from nst_det.runtime.config import flat, plain
from nst_det.runtime.files import write_text
from nst_det.runtime.metrics import read_metrics, speed_of
from nst_det.runtime.run import config_hash

STEPS = 8
# the first ones find the fastest kernels and fill caches
WARM_UP = 2
POLL_SECONDS, MEMORY_SECONDS = 0.01, 0.05
# what a process has on a GPU beside its tensors: the driver's context and the kernels, roughly
GPU_CONTEXT = GIB // 2
# what differs between two runs of one kind without changing what they take
_FREE = ("OUTPUT_DIR", "REGISTRY", "NAME", "SEED", "MODEL.WEIGHTS", "TEACHER.WEIGHTS", "TRANSFER.TEACHER.WEIGHTS")
_FREE_RATES = ("SOLVER.BASE_LR", "SOLVER.BACKBONE_MULTIPLIER")


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
