"""One step of the torchvision engine, and the hooks around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nst_det.detection.distiller import DistilledDetector
from nst_det.detection.solver import build_optimizer
from nst_det.detection.torchvision import Detector
from nst_det.engine import distributed
from nst_det.engine.averaged import AveragedWeights
from nst_det.engine.config import plain
from nst_det.engine.distributed import average_gradients, log_batch, rank, running_statistics, world_size
from nst_det.engine.metrics import loss_note
from nst_det.engine.nan_guard import NonFiniteGuard, NotFinite, broken_values, gradient_norm
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.seeds import seed_everything
from nst_det.engine.solver import clip_gradients, lr_schedule, set_learning_rate
from nst_det.engine.train_state import OptimizedState
from nst_det.engine.trainer import (
    EvalHook,
    MetricsHook,
    PeriodicCheckpointer,
    ProgressHook,
    RollbackStep,
    SpeedHook,
    StopWhenAsked,
    TrainLoop,
    WallTime,
)

KIND = "stage two"
Batch = list[dict[str, Any]]


def broken_in(model: nn.Module, losses: Mapping[str, float]) -> list[str]:
    """Name what of the last pass is not finite in this process; see :func:`~nst_det.engine.nan_guard.broken_values`."""
    parts = model.transfer.parts if isinstance(model, DistilledDetector) else {}
    return broken_values(losses, parts, model.named_parameters())


def step_content(
    model: nn.Module, config: CfgNode, seed: int, batch: Sequence[Mapping[str, Any]], losses: Mapping[str, float]
) -> dict[str, Any]:
    """All that the step depends on but the teacher detector, which the config names.

    Args:
        model: as it was before the step.
        config: the resolved config.
        seed: of the run; the process's rank is kept beside it.
        batch: what the model was given; ``image`` (3, H, W), and in the torchvision engine ``boxes`` and ``labels``.
        losses: by name, as far as they are known.
    """
    transfer = model.transfer if isinstance(model, DistilledDetector) else None
    return {
        "kind": KIND,
        "method": config.METHOD,
        "config": plain(config),
        "seed": seed,
        "rank": rank(),
        "model": {name: value.detach().cpu() for name, value in model.state_dict().items()},
        "adapters": {} if transfer is None else {k: v.detach().cpu() for k, v in transfer.state_dict().items()},
        "weights": {} if transfer is None else dict(transfer.weights),
        "batch": [_plain_item(item) for item in batch],
        "terms": dict(losses),
    }


def _plain_item(item: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in item.items() if isinstance(value, Tensor | str | int | float)}
    instances = item.get("instances")
    if instances is not None:
        # Detectron2's, in the words of the torchvision engine
        values |= {"boxes": instances.gt_boxes.tensor, "labels": instances.gt_classes}
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in values.items()}


def data_parallel(model: nn.Module) -> nn.Module:
    """The model in a module whose backward pass averages the gradients of all processes, or where none can, itself."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    # DDP refuses to synchronize normalization on the CPU
    if world_size() == 1 or (on_cpu and any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules())):
        return model
    # a pyramid may have levels that nothing reads; running statistics are averaged after each step
    return DistributedDataParallel(
        model,
        device_ids=None if on_cpu else [torch.cuda.current_device()],
        broadcast_buffers=False,
        find_unused_parameters=True,
    )


class Trainer(TrainLoop):
    """The torchvision engine's: one detector, whose steps are made in :meth:`run_step`.

    In several processes every one holds the same bits after each step.

    Args:
        model: gives a dict of losses for a batch, and has the state dict to save; adapters are in its ``transfer``.
        config: SOLVER is read here, all of it goes into the dump of a step that failed.
        seed: of the run.
        folder: for checkpoints.
        batches_from: the batches from a step on, without end.
        average: of the student's weights.
    """

    def __init__(
        self,
        model: Detector | DistilledDetector,
        config: CfgNode,
        seed: int,
        folder: RunFolder,
        batches_from: Callable[[int], Iterable[Batch]],
        average: AveragedWeights | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.seed, self.batches_from = model, config, seed, batches_from
        self.solver, self.max_iter = config.SOLVER, config.SOLVER.MAX_ITER
        self.schedule = lr_schedule(self.solver)
        self.device = next(model.parameters()).device
        self.losses: dict[str, float] = {}
        transfer = model.transfer if isinstance(model, DistilledDetector) else None
        guard = NonFiniteGuard(self.solver.NON_FINITE, folder.path, model)
        self.state = OptimizedState(model, transfer, guard, average, build_optimizer(model, self.solver), folder)
        self._parallel = data_parallel(model)

    def before_train(self) -> None:
        """Begin at ``iter``."""
        self.model.train()
        self._batches = iter(self.batches_from(self.iter))
        super().before_train()

    def run_step(self) -> None:
        """Make the next step; one whose loss or gradient is not finite is handled as SOLVER.NON_FINITE says."""
        start = time.perf_counter()
        batch = next(self._batches)
        self._data_seconds = time.perf_counter() - start
        state = self.state
        factor = self.schedule(self.iter) * state.guard.rate
        set_learning_rate(state.optimizer, factor)
        state.guard.keep_buffers()
        self.losses, broken = {}, None
        try:
            own = self.backward(batch)
            values = {name: value.clone() for name, value in own.items()}
            distributed.average([*values.values(), *running_statistics(self.model)])
            self.losses = {name: float(value) for name, value in values.items()}
            norm = gradient_norm(state.parameters)
            if not (all(map(math.isfinite, self.losses.values())) and norm.isfinite()):
                broken = broken_in(self.model, {name: float(value) for name, value in own.items()})
        except NotFinite as error:
            broken = [str(error)] if str(error) else []
        if broken is None:
            state.optimizer_step(lambda: clip_gradients(state.parameters, self.solver.CLIP_GRADIENTS))
        else:
            content = partial(step_content, self.model, self.config, self.seed, batch, self.losses)
            state.skip_or_roll_back(broken, [str(item["image_id"]) for item in batch], content)
        if state.step <= self.iter:
            self.iter = state.step
            raise RollbackStep
        total = sum(self.losses.values())
        self.put_scalars(**self.losses, total_loss=total, lr=self.solver.BASE_LR * factor)

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of all processes' images, in SOLVER.ACCUMULATE parts; this one's losses, scalars."""
        parts, totals = self.solver.ACCUMULATE, dict[str, Tensor]()
        parallel, size = self._parallel, len(batch) // parts
        for part in range(parts):
            # dropout and the like; the choice of anchors and proposals is seeded by image
            piece = rank() * parts + part
            seed_everything(self.seed, "step", self.iter, *([piece] if piece else []))
            if isinstance(self.model, DistilledDetector):
                self.model.iteration = self.iter
            waits = isinstance(parallel, DistributedDataParallel) and part < parts - 1
            with parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
                losses: dict[str, Tensor] = parallel(batch[part * size : (part + 1) * size])
                (torch.stack(list(losses.values())).sum() / parts).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / parts
        if parallel is self.model:
            average_gradients(self.state.parameters)
        return totals

    def save_step(self) -> None:
        """Save the step that was just made."""
        self.state.save()


def train(trainer: Trainer, folder: RunFolder, evaluate: Callable[[int], dict[str, float]]) -> None:
    """Train until SOLVER.MAX_ITER, from the last checkpoint in the folder if there is one.

    Args:
        trainer: as built.
        folder: for metrics.
        evaluate: called every TEST.EVAL_PERIOD steps with the steps done; its numbers join the metrics.
    """
    config, solver = trainer.config, trainer.solver

    def evaluate_step() -> None:
        trainer.put_scalars(**evaluate(trainer.iter + 1))
        trainer.model.train()

    trainer.state.resume()
    trainer.start_iter = trainer.state.step
    log_batch(solver.IMS_PER_BATCH, solver.ACCUMULATE, solver.BASE_LR)
    trainer.register_hooks(
        [
            SpeedHook(solver.IMS_PER_BATCH, trainer.device),
            EvalHook(config.TEST.EVAL_PERIOD, evaluate_step),
            MetricsHook(folder, config.TENSORBOARD, config.WANDB),
            ProgressHook(
                folder.path.name,
                lambda: {"loss": trainer.scalars["total_loss"]},
                lambda: loss_note(trainer.scalars),
            ),
            WallTime(trainer.state),
            PeriodicCheckpointer(solver.CHECKPOINT_PERIOD),
            StopWhenAsked(trainer.device),
        ]
    )
    trainer.train()
