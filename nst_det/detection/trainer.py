"""One step of the torchvision engine, and the hooks around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nst_det.detection.box_head import objects_of
from nst_det.detection.distiller import DistilledDetector
from nst_det.detection.solver import build_optimizer
from nst_det.detection.torchvision import Detector
from nst_det.engine import distributed
from nst_det.engine.compilation import begin_step
from nst_det.engine.config import plain
from nst_det.engine.device import HostCopy
from nst_det.engine.distributed import average_gradients, log_batch, rank, running_statistics, world_size
from nst_det.engine.foreach import counted_together
from nst_det.engine.keys import OFF
from nst_det.engine.metrics import loss_note
from nst_det.engine.nan_guard import (
    NonFiniteGuard,
    NotFinite,
    broken_values,
    gradient_norm,
    late_checks,
    not_finite,
)
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.seeds import seed_everything
from nst_det.engine.solver import clip_gradients, lr_schedule, set_learning_rate
from nst_det.engine.train_state import AveragedWeights, OptimizedState
from nst_det.engine.trainer import (
    MetricsHook,
    PeriodicCheckpointer,
    PeriodicHook,
    ProgressHook,
    RollbackStep,
    SpeedHook,
    StopWhenAsked,
    TrainLoop,
    WallTime,
)
from nst_det.losses import TransferLoss

KIND = "stage two"
Batch = list[dict[str, Any]]


def transfer_of(model: nn.Module) -> TransferLoss | None:
    """Return the transfer terms of a :class:`DistilledDetector`; None for any other model."""
    return model.transfer if isinstance(model, DistilledDetector) else None


def broken_in(model: nn.Module, losses: Mapping[str, float]) -> list[str]:
    """Name what of the last pass is not finite in this process; see :func:`~nst_det.engine.nan_guard.broken_values`."""
    transfer = transfer_of(model)
    return broken_values(losses, {} if transfer is None else transfer.parts, model.named_parameters())


def step_content(
    model: nn.Module, config: CfgNode, seed: int, batch: Sequence[Mapping[str, Any]], losses: Mapping[str, float]
) -> dict[str, Any]:
    """Return all that a step depends on but the teacher, which the config names; the model is as before the step."""
    transfer = transfer_of(model)
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
    # Detectron2's objects too, by the torchvision engine's names
    values["boxes"], values["labels"] = objects_of(item)
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in values.items()}


def data_parallel(model: nn.Module) -> nn.Module:
    """Return the model in DistributedDataParallel; or itself in one process, or where DDP can't."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    # DDP refuses to synchronize normalization on the CPU
    if world_size() == 1 or (on_cpu and any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules())):
        return model
    # a pyramid may have levels that nothing reads; running statistics are averaged after each step
    # with device_ids it would move each tensor of a batch by itself, and wait for it
    return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)


@dataclass
class Unread:
    """The last step's losses by name, norm and flags, which the host hasn't read yet, and its scalars so far."""

    step: int
    names: list[str]
    values: HostCopy
    scalars: dict[str, float]


class Trainer(TrainLoop):
    """The torchvision engine's; ``batches_from(step)`` gives the batches from there on, without end.

    In several processes every one holds the same bits after each step.
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
        self.device, self.rank = next(model.parameters()).device, rank()
        guard = NonFiniteGuard(self.solver.NON_FINITE, folder.path, model)
        optimizer = build_optimizer(model, self.solver)
        self.state = OptimizedState(model, transfer_of(model), guard, average, optimizer, folder)
        self._parallel = data_parallel(model)
        self._unread: Unread | None = None
        # steps and scalars for the metrics, and the losses that are known last
        self._rows: list[tuple[int, Mapping[str, float]]] = []
        self.losses: dict[str, float] = {}

    def before_train(self) -> None:
        self.model.train()
        self._batches = iter(self.batches_from(self.iter))
        self._rows = [(step, scalars) for step, scalars in self._rows if step < self.iter]
        super().before_train()

    def run_step(self) -> None:
        """Make the next step; one whose loss or gradient is not finite is handled as SOLVER.NON_FINITE says."""
        start = time.perf_counter()
        batch = next(self._batches)
        self._data_seconds = time.perf_counter() - start
        state, transfer = self.state, transfer_of(self.model)
        factor = self.schedule(self.iter) * state.guard.rate
        set_learning_rate(state.optimizer, factor)
        state.guard.keep_buffers(self.iter)
        begin_step(self.solver.COMPILE)
        # the weights that the first steps choose are chosen on the host
        if state.waits or (transfer is not None and transfer.balance.wants(self.iter)):
            self._make_step(batch)
        else:
            self._make_late_step(batch)
        self.put_scalars(lr=self.solver.BASE_LR * factor)
        if self.is_due():
            self._settle()

    def _make_step(self, batch: Batch) -> None:
        self._settle()
        state, losses = self.state, dict[str, float]()
        broken: list[str] | None = None
        try:
            own = self.backward(batch)
            values, norm = self._averaged(own)
            losses = {name: float(value) for name, value in values.items()}
            if not (all(map(math.isfinite, losses.values())) and norm.isfinite()):
                broken = broken_in(self.model, {name: float(value) for name, value in own.items()})
        except NotFinite as error:
            broken = [str(error)] if str(error) else []
        if broken is None:
            state.optimizer_step(partial(self._clip, norm))
        else:
            content = partial(step_content, self.model, self.config, self.seed, batch, losses)
            state.skip_or_roll_back(broken, [str(item["image_id"]) for item in batch], content)
        if state.step <= self.iter:
            self.iter = state.step
            raise RollbackStep
        self._finish(self.iter, losses, self._scalars)

    def _make_late_step(self, batch: Batch) -> None:
        with late_checks() as flags:
            own = self.backward(batch)
        # 1 or infinite
        checked = {str(number): flag.reciprocal() for number, flag in enumerate(flags)}
        values, norm = self._averaged(own | checked)
        seen = torch.stack([*values.values(), norm])
        self._settle()
        self.state.late_step(partial(self._clip, norm), not_finite(seen))
        self._unread = Unread(self.iter, list(own), HostCopy(seen), self._scalars)

    def _averaged(self, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return means over all processes, and the norm of all gradients."""
        values = dict(own)
        if world_size() > 1:
            values = {name: value.clone() for name, value in own.items()}
            distributed.average([*values.values(), *running_statistics(self.model)])
        return values, gradient_norm(self.state.parameters)

    def _clip(self, norm: Tensor) -> None:
        clip_gradients(self.state.parameters, self.solver.CLIP_GRADIENTS, norm)

    def _settle(self) -> None:
        """Read how the last step ended, if it isn't known; go back to it where it wasn't finite."""
        if self._unread is None:
            return
        last, self._unread = self._unread, None
        numbers = last.values.read()
        finite = all(map(math.isfinite, numbers))
        self.state.learn(last.step, finite)
        if not finite:
            self.iter = last.step
            raise RollbackStep
        self._finish(last.step, dict(zip(last.names, numbers)), last.scalars)

    def _finish(self, step: int, losses: dict[str, float], scalars: dict[str, float]) -> None:
        self.losses = {**losses, "total_loss": sum(losses.values())}
        scalars |= self.losses
        self._rows.append((step, scalars))

    @property
    def settled(self) -> bool:
        return self._unread is None

    def finished_rows(self) -> list[tuple[int, Mapping[str, float]]]:
        rows, self._rows = self._rows, []
        return rows

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute gradients of all processes' images, in SOLVER.ACCUMULATE parts; return this process's losses."""
        parts, totals = self.solver.ACCUMULATE, dict[str, Tensor]()
        parallel, size = self._parallel, len(batch) // parts
        # a compiled pass counts by itself
        lists = self.device.type != "cpu" and self.solver.COMPILE == OFF
        for part in range(parts):
            # dropout and the like; the choice of anchors and proposals is seeded by image
            piece = self.rank * parts + part
            seed_everything(self.seed, "step", self.iter, *([piece] if piece else []))
            if isinstance(self.model, DistilledDetector):
                self.model.iteration = self.iter
            alone = isinstance(parallel, DistributedDataParallel) and part < parts - 1
            together = counted_together(self.model) if lists else nullcontext()
            with parallel.no_sync() if alone else nullcontext():  # type: ignore[operator]
                with together:
                    losses: dict[str, Tensor] = parallel(batch[part * size : (part + 1) * size])
                total = torch.stack(list(losses.values())).sum()
                (total / parts if parts > 1 else total).backward()
            for name, value in losses.items():
                own = value.detach()
                totals[name] = own if parts == 1 else totals.get(name, 0) + own / parts
        if parallel is self.model:
            average_gradients(self.state.parameters)
        return totals

    def save_step(self) -> None:
        self.state.save()


def train(
    trainer: Trainer, folder: RunFolder, evaluate: Callable[[int], dict[str, float]], is_over: Callable[[int], bool]
) -> None:
    """Train until SOLVER.MAX_ITER, from the last checkpoint in the folder if there is one.

    ``evaluate`` is called every TEST.EVAL_PERIOD steps with the steps done; its numbers join the metrics.  Then
    ``is_over`` is asked whether training stops early; ``max_iter`` is lowered to that step.
    """
    config, solver = trainer.config, trainer.solver

    def evaluate_step() -> None:
        trainer.put_scalars(**evaluate(trainer.iter + 1))
        trainer.model.train()
        if is_over(trainer.iter + 1):
            trainer.max_iter = trainer.iter + 1

    trainer.state.resume()
    trainer.start_iter = trainer.state.step
    if is_over(trainer.start_iter):
        trainer.max_iter = trainer.start_iter
    log_batch(solver.IMS_PER_BATCH, solver.ACCUMULATE, solver.BASE_LR)

    def losses() -> dict[str, float]:
        return {"loss": trainer.losses["total_loss"]} if trainer.losses else {}

    trainer.register_hooks(
        [
            SpeedHook(solver.IMS_PER_BATCH, trainer.device),
            PeriodicHook(config.TEST.EVAL_PERIOD, evaluate_step),
            MetricsHook(folder, config.TENSORBOARD, config.WANDB),
            ProgressHook(folder.path.name, losses, lambda: loss_note(trainer.losses)),
            WallTime(trainer.state),
            PeriodicCheckpointer(solver.CHECKPOINT_PERIOD),
            StopWhenAsked(),
        ]
    )
    trainer.train()
