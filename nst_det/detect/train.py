"""The training loop of the torchvision engine, on one page."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from nst_det.detect.distilled import DistilledDetector
from nst_det.detect.solver import build_optimizer, clip_gradients, lr_schedule, set_learning_rate
from nst_det.detect.torchvision_engine import Detector
from nst_det.errors import UserError
from nst_det.runtime.checkpoint import load_latest_checkpoint, save_checkpoint
from nst_det.runtime.metrics import MetricsWriter
from nst_det.runtime.progress import progress
from nst_det.runtime.run import RunFolder
from nst_det.runtime.seeds import seed_everything

log = logging.getLogger(__name__)

Batch = list[dict[str, Any]]


@dataclass
class Trained:
    """What is left when the last step is done: wall time of all calls together, and the last step's losses."""

    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


def train(
    model: Detector | DistilledDetector,
    config: CfgNode,
    seed: int,
    folder: RunFolder,
    batches_from: Callable[[int], Iterable[Batch]],
    evaluate: Callable[[int], dict[str, float]],
) -> Trained:
    """Train until SOLVER.MAX_ITER, from the last checkpoint in the folder if there is one.

    Step k draws from (seed, k) alone, so that on the CPU a run that goes on ends with the bits of an undisturbed one.

    Args:
        model: gives a dict of losses for a batch, and has the state dict to save; adapters are in its ``transfer``.
        config: reads SOLVER, TEST.EVAL_PERIOD, TENSORBOARD and WANDB.
        seed: of the run.
        folder: for checkpoints and metrics.
        batches_from: the batches from a step on, without end.
        evaluate: called every TEST.EVAL_PERIOD steps with the steps done; its numbers join the metrics.

    Raises:
        UserError: a loss is not finite, or the checkpoint is of another model.
    """
    solver, last = config.SOLVER, config.SOLVER.MAX_ITER
    optimizer, schedule = build_optimizer(model, solver), lr_schedule(solver)
    start, trained = _resume(model, optimizer, folder)
    began = time.monotonic() - trained.seconds
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    model.train()
    batches = iter(batches_from(start)) if start < last else iter(())
    board = folder.path / "tensorboard" if config.TENSORBOARD else None
    writer = MetricsWriter(folder.metrics_path, start, board, config.WANDB)
    with writer as metrics, progress(folder.path.name, last) as meter:
        meter.start_at(start)
        for step in range(start, last):
            batch = next(batches)
            seed_everything(seed, "step", step)
            factor = schedule(step / last)
            set_learning_rate(optimizer, factor)
            losses: dict[str, Tensor] = model(batch)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            trained.losses = _numbers(losses, step)
            clip_gradients(parameters, solver.CLIP_GRADIENTS)
            optimizer.step()
            row = {**trained.losses, "total_loss": sum(trained.losses.values()), "lr": solver.BASE_LR * factor}
            done = step + 1
            if config.TEST.EVAL_PERIOD and done % config.TEST.EVAL_PERIOD == 0 and done < last:
                row |= evaluate(done)
                model.train()
            metrics.write(step, row)
            meter.step({"loss": row["total_loss"]})
            if done % solver.CHECKPOINT_PERIOD == 0 or done == last:
                trained.seconds = time.monotonic() - began
                save_checkpoint(folder.checkpoints, done, _state(model, optimizer, trained))
    trained.seconds = time.monotonic() - began
    return trained


def _numbers(losses: dict[str, Tensor], step: int) -> dict[str, float]:
    numbers = {name: float(value.detach()) for name, value in losses.items()}
    broken = [name for name, value in numbers.items() if not math.isfinite(value)]
    if broken:
        raise UserError(
            f"step {step}: not finite: {', '.join(broken)}; training has diverged; "
            "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        )
    return numbers


def _state(model: Detector | DistilledDetector, optimizer: torch.optim.Optimizer, trained: Trained) -> dict[str, Any]:
    adapters = model.transfer.state_dict() if isinstance(model, DistilledDetector) else {}
    return {
        "model": model.state_dict(),
        "adapters": dict(adapters),
        "optimizer": optimizer.state_dict(),
        "seconds": trained.seconds,
        "losses": trained.losses,
    }


def _resume(
    model: Detector | DistilledDetector, optimizer: torch.optim.Optimizer, folder: RunFolder
) -> tuple[int, Trained]:
    state = load_latest_checkpoint(folder.checkpoints)
    if state is None:
        return 0, Trained()
    try:
        model.load_state_dict(state["model"])
        if isinstance(model, DistilledDetector):
            model.transfer.load_state_dict(state["adapters"])
            model.iteration = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        trained = Trained(float(state["seconds"]), dict(state["losses"]))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{folder.checkpoints}: this checkpoint is not one of this run ({type(error).__name__}: {error}); "
            "name another OUTPUT_DIR or remove this one"
        ) from error
    log.info("%s: going on at step %d", folder.path, state["step"])
    return int(state["step"]), trained
