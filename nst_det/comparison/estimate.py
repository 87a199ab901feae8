"""What a comparison will take, measured on a few steps of each kind of run before anything is started.

One run of each distinct kind is done in a temporary folder, timed from outside: so both engines are measured alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import psutil
import torch
from fvcore.common.config import CfgNode

from nst_det.comparison.config import Comparison
from nst_det.comparison.display import steps_done
from nst_det.comparison.launch_local import KILL, Command, LocalLauncher, Machine, Process
from nst_det.comparison.plan import DATA, TEACHER, Run, make_plan, run_config, total_steps
from nst_det.data.voc import VocDataset
from nst_det.detection.config import voc_roots
from nst_det.distillation.dataloader import read_data
from nst_det.engine.config import flat, plain
from nst_det.engine.fingerprint import RATE, RUN, concerns
from nst_det.engine.format import GIB, bytes_below, duration, size
from nst_det.engine.io import write_text
from nst_det.engine.metrics import read_metrics, speed_of
from nst_det.engine.run_dir import config_hash
from nst_det.errors import UserError

STEPS = 8
# the first ones find the fastest kernels and fill caches
WARM_UP = 2
POLL_SECONDS, MEMORY_SECONDS = 0.01, 0.05
# what a process has on a GPU beside its tensors: the driver's context and the kernels, roughly
GPU_CONTEXT = GIB // 2


@dataclass(frozen=True)
class Estimate:
    """What one run will take."""

    seconds: float = 0.0  # on an otherwise idle machine
    disk: int = 0  # bytes that it leaves behind
    memory: int = 0  # bytes, the most that its processes have at a time; 0 where not known
    gpu_memory: int = 0  # bytes, the most that it allocates on its GPU at a time


def estimate(
    comparison: Comparison, runs: Sequence[Run], machine: Machine, command: Command | None = None
) -> dict[str, Estimate]:
    """Try one run of each kind; return what every run of the plan will take, by its name."""
    found: dict[str, Estimate] = {}
    tried: dict[str, Estimate] = {}
    with tempfile.TemporaryDirectory(prefix="nst-det-dry-run-") as name:
        folder = Path(name)
        # generated data that isn't there yet is made here, too
        missing = any(run.kind == DATA and not run.done for run in runs)
        trial_of = replace(comparison, folder=folder, data_root=folder / "data" if missing else comparison.data_root)
        launcher = LocalLauncher(folder, machine, command)
        for run in make_plan(trial_of):
            if run.kind == DATA:
                found[run.name] = _try(run, None, launcher, folder) if missing else Estimate()
                continue
            config = run_config(trial_of, run)
            # what differs between two runs of one kind without changing what they take is left out
            values = {key: value for key, value in plain(flat(config)).items() if not concerns(key, RUN, RATE)}
            kind = f"{run.kind}-{config_hash(values)}"
            if kind not in tried:
                write_text(run.config_path(folder), _shortened(run, config).dump())
                tried[kind] = _try(run, config, launcher, folder)
            found[run.name] = tried[kind]
    return found


def _shortened(run: Run, config: CfgNode) -> CfgNode:
    config = config.clone()
    config.defrost()
    config.TENSORBOARD, config.WANDB = False, ""
    config.SOLVER.MAX_ITER, config.SOLVER.STEPS = STEPS, type(config.SOLVER.STEPS)()
    config.SOLVER.WARMUP_ITERS = min(config.SOLVER.WARMUP_ITERS, STEPS)
    config.TEST.EVAL_PERIOD = 0
    config.SOLVER.CHECKPOINT_PERIOD = STEPS // 2
    if run.detects:
        config.TEST.SELECT, config.TEST.PATIENCE = "last", 0
        return config
    config.LOG_PERIOD = 1
    config.TEACHER.EXPECTED_TOP1, config.CACHE.DIR, config.CACHE.DTYPE = 0.0, "", "auto"
    for key in ("STEPS", "WARMUP_ITERS"):
        config.TEACHER.SOLVER.pop(key, None)
    config.TEACHER.SOLVER.MAX_ITER = STEPS
    return config


def _try(run: Run, config: CfgNode | None, launcher: LocalLauncher, folder: Path) -> Estimate:
    """Do a run of :data:`STEPS` steps; return what it takes with the steps of ``config`` (None: it has no steps)."""
    before, began = bytes_below(folder), time.monotonic()
    process = launcher.start(run)
    # steps done -> when that was seen first
    seen: dict[int, float] = {}
    looked, memory, ended = 0.0, 0, False
    try:
        while not ended:
            ended, now = not process.running, time.monotonic()
            seen.setdefault(steps_done(run)[0], now)
            if now - looked > MEMORY_SECONDS:
                looked, memory = now, max(memory, _memory(process))
            time.sleep(POLL_SECONDS)
    except BaseException:
        process.signal(KILL)
        process.outcome()
        raise
    code, output = process.outcome()
    # a teacher that is taken as it is
    taken = run.kind == TEACHER and not any(seen)
    if code or not (config is None or taken or STEPS in seen):
        lines = output.strip().splitlines() or ["it wrote nothing"]
        raise UserError(f"--dry-run: the trial of {run.name} failed: {lines[-1].removeprefix('nst-det: ')}")
    disk = bytes_below(folder) - before
    if config is None or taken:
        return Estimate(now - began, disk, memory)
    first, last = min(count for count in seen if count >= WARM_UP), seen[STEPS]
    step = (last - seen[first]) / max(STEPS - first, 1)
    # what comes after the last step is an evaluation
    start, evaluation = max(last - began - STEPS * step, 0.0), now - last
    steps, period = total_steps(run, config), config.TEST.EVAL_PERIOD
    evaluations = 1 + ((steps - 1) // period if period else 0)
    speed = speed_of(read_metrics(run.folders[0] / "metrics.jsonl", speed=True))
    return Estimate(
        seconds=start + steps * step + evaluations * evaluation,
        disk=disk,
        memory=memory + images_kept(run, config),
        gpu_memory=round(speed.get("gpu_memory_gib", 0) * GIB),
    )


def _memory(process: Process) -> int:
    # not the kernel's maximum, which starts with the memory of the process that started it
    try:
        one = psutil.Process(process.pid)
        return sum(int(each.memory_info().rss) for each in (one, *one.children(recursive=True)))
    except psutil.Error:
        # it ended meanwhile
        return 0


def images_kept(run: Run, config: CfgNode) -> int:
    """Return the bytes of decoded images that a whole run keeps in memory beyond those of its trial's steps."""
    if run.detects:
        roots = voc_roots(config, [name for name in config.DATASETS.TRAIN if name in config.DATASETS.VOC], "DATASETS")
        sizes = [3 * item.height * item.width for data in roots for item in VocDataset(*data).annotations()]
        images, kept = len(sizes), sum(sizes) if sum(sizes) <= config.DATALOADER.CACHE_IMAGES_MB * 2**20 else 0
    else:
        data = config.DATA
        images = len(read_data(config).train)
        kept = min(images * 3 * data.IMAGE_SIZE**2, int(data.CACHE_GIB * GIB))
    return round(kept * max(0.0, 1 - STEPS * config.SOLVER.IMS_PER_BATCH / max(images, 1)))


def wall_seconds(runs: Sequence[Run], found: Mapping[str, Estimate], machine: Machine) -> float:
    """Return the seconds until all runs that are not done are, when each starts as soon as there is room for it."""
    waiting = [run for run in runs if not run.done]
    left = {run.name for run in waiting}
    running: list[tuple[float, Run]] = []
    now = 0.0
    while left:
        ready = [run for run in waiting if left.isdisjoint(run.needs)]
        for run in machine.fitting(ready, [run for _, run in running]):
            waiting.remove(run)
            running.append((now + found[run.name].seconds, run))
        now, ended = min(running, key=lambda item: item[0])
        running.remove((now, ended))
        left.remove(ended.name)
    return now


def total(found: Mapping[str, Estimate], runs: Sequence[Run]) -> Estimate:
    """Return the sum of what all runs that are not done take; of memory the most."""
    left = [astuple(found[run.name]) for run in runs if not run.done] or [astuple(Estimate())]
    seconds, disk, memory, gpu_memory = zip(*left)
    return Estimate(sum(seconds), sum(disk), max(memory), max(gpu_memory))


def cells(one: Estimate) -> tuple[str, ...]:
    """Return time, disk, memory and the GPU's memory as a table shows them."""
    memory, gpu_memory = (size(count) if count else "-" for count in (one.memory, one.gpu_memory))
    return duration(one.seconds), size(one.disk), memory, gpu_memory


def gpu_shortage(one: Estimate, machine: Machine) -> str:
    """Return a line where runs like the largest ``one`` need more on a GPU, side by side, than it has free; else ""."""
    if not one.gpu_memory:
        return ""
    beside = -(-machine.gpu_jobs // len(machine.gpus))
    needed = one.gpu_memory + GPU_CONTEXT
    free = min(torch.cuda.mem_get_info(index)[0] for index in range(len(machine.gpus)))
    if beside * needed <= free:
        return ""
    fits = free // needed * len(machine.gpus)
    remedy = f"take --jobs {fits}" if fits else "lower SOLVER.IMS_PER_BATCH or the size of the images"
    return f"GPU memory: runs side by side on a GPU take {beside} x {size(needed)}, {size(free)} is free; {remedy}"
