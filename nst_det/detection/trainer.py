"""The training loop of the torchvision engine, on one page."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nst_det.detection.distiller import DistilledDetector
from nst_det.detection.solver import build_optimizer, clip_gradients, lr_schedule, set_learning_rate
from nst_det.detection.torchvision import Detector
from nst_det.engine.checkpoint import load_latest_checkpoint, save_checkpoint
from nst_det.engine.clock import SPEED_PERIOD, Clock, Speed
from nst_det.engine.config import plain
from nst_det.engine.device import is_gpu_error
from nst_det.engine.distributed import (
    asked_to_stop,
    average,
    average_gradients,
    broadcast_from_rank0,
    is_main_process,
    log_batch,
    rank,
    running_statistics,
    stop_together,
    world_size,
)
from nst_det.engine.metrics import MetricsWriter, NoMetrics, loss_note
from nst_det.engine.nan_guard import SKIP, Buffers, NonFinite, NotFinite, broken_values, gradient_norm
from nst_det.engine.progress import progress
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.seeds import seed_everything
from nst_det.engine.signals import whole_steps
from nst_det.errors import UserError
from nst_det.models.averaged import AveragedWeights

KIND = "stage two"
log = logging.getLogger(__name__)
Batch = list[dict[str, Any]]


def broken_in(model: nn.Module, losses: Mapping[str, float]) -> list[str]:
    """What of the last pass is no number in this process: losses, those of maps with their levels, else gradients.

    Args:
        model: after its backward pass; gradients that several processes have averaged tell nothing of this one.
        losses: this process's, by name.
    """
    parts = model.transfer.parts if isinstance(model, DistilledDetector) else {}
    alone = world_size() == 1
    gradients = {name: item.grad for name, item in model.named_parameters() if alone and item.grad is not None}
    return broken_values(losses, parts, gradients)


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
        "method": config.TRANSFER.METHOD,
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


@dataclass
class TrainResult:
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
    average: AveragedWeights | None = None,
) -> TrainResult:
    """Train until SOLVER.MAX_ITER, from the last checkpoint in the folder if there is one.

    Step k draws from (seed, k) alone, so that on the CPU a run that goes on ends with the bits of an undisturbed one.

    Args:
        model: gives a dict of losses for a batch, and has the state dict to save; adapters are in its ``transfer``.
        config: reads SOLVER, TEST.EVAL_PERIOD, TENSORBOARD and WANDB.
        seed: of the run.
        folder: for checkpoints and metrics.
        batches_from: the batches from a step on, without end.
        evaluate: called every TEST.EVAL_PERIOD steps with the steps done; its numbers join the metrics.
        average: of the student's weights; brought along, saved and taken up again.

    In several processes every one holds the same bits after each step; the first one writes.

    Raises:
        UserError: a loss is not finite, or the checkpoint is of another model.
    """
    last, test = config.SOLVER.MAX_ITER, config.TEST
    training = Trainer(model, config, seed, folder, average)
    training.resume()
    log_batch(config.SOLVER.IMS_PER_BATCH, config.SOLVER.ACCUMULATE, config.SOLVER.BASE_LR)
    board = folder.path / "tensorboard" if config.TENSORBOARD else None
    model.train()
    clock = Clock()
    speed = Speed(config.SOLVER.IMS_PER_BATCH, training.device, clock)
    with progress(folder.path.name, last) as meter, whole_steps() as stop:
        # once more from an earlier step, where it went back to its last checkpoint
        while training.done < last:
            start = training.done
            batches = iter(batches_from(start))
            meter.start_at(start)
            writer = (
                MetricsWriter(folder.metrics_path, start, board, config.WANDB) if is_main_process() else NoMetrics()
            )
            with writer as metrics:
                for done in range(start + 1, last + 1):
                    with clock("data"):
                        batch = next(batches)
                    with clock("step"):
                        row = training.step(batch)
                    speed.steps += 1
                    if training.done < done:
                        break
                    if test.EVAL_PERIOD and done % test.EVAL_PERIOD == 0 and done < last:
                        row |= evaluate(done)
                        model.train()
                    if done % SPEED_PERIOD == 0 or done == last:
                        row |= speed.read()
                    metrics.write(done - 1, row)
                    meter.step({"loss": row["total_loss"]}, partial(loss_note, row))
                    leaving = asked_to_stop(stop, training.device)
                    if done % config.SOLVER.CHECKPOINT_PERIOD == 0 or done == last or leaving:
                        training.save()
                    if leaving:
                        stop_together(stop)
    return training.trained


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


class Trainer:
    """A model with its optimizer: one step after the other, saved and taken up again.

    Args:
        model: as :func:`train` has it; so are the others.
        config: SOLVER is read here, all of it goes into the file of a step that failed.
        seed: of the run.
        folder: for checkpoints.
        average: of the student's weights.

    Attributes:
        done: finished steps.
        trained: what is known of them.
        device: the model's.
    """

    def __init__(
        self,
        model: Detector | DistilledDetector,
        config: CfgNode,
        seed: int,
        folder: RunFolder,
        average: AveragedWeights | None = None,
    ) -> None:
        self.model, self.config, self.seed, self.folder, self.average = model, config, seed, folder, average
        self.solver = config.SOLVER
        self.done, self.trained = 0, TrainResult()
        self.optimizer, self.schedule = build_optimizer(model, self.solver), lr_schedule(self.solver)
        self.non_finite = NonFinite(self.solver.NON_FINITE, folder.path)
        self._parameters = [item for group in self.optimizer.param_groups for item in group["params"]]
        self._buffers = Buffers(model)
        self.device = next(model.parameters()).device
        self._parallel = data_parallel(model)
        self._began = time.monotonic()

    def step(self, batch: Batch) -> dict[str, float]:
        """Make the next step; the numbers of its row in the metrics.

        One whose loss or gradient is no number isn't made: SOLVER.NON_FINITE passes over it or goes back, which
        :attr:`done` shows.

        Raises:
            UserError: the policy is to stop; the line names losses, levels and images.
        """
        factor = self.schedule(self.done / self.solver.MAX_ITER) * self.non_finite.rate
        set_learning_rate(self.optimizer, factor)
        self.optimizer.zero_grad(set_to_none=True)
        self._buffers.keep()
        losses: dict[str, float] = {}
        try:
            own = self.backward(batch)
            values = {name: value.clone() for name, value in own.items()}
            average([*values.values(), *running_statistics(self.model)])
            losses = {name: float(value) for name, value in values.items()}
            norm = gradient_norm(self._parameters)
            sound = all(map(math.isfinite, losses.values())) and bool(norm.isfinite())
            broken = [] if sound else broken_in(self.model, {name: float(value) for name, value in own.items()})
        except NotFinite as error:
            sound, broken = False, [str(error)] if str(error) else []
        if not sound:
            self._meet(broken, batch, losses)
        else:
            clip_gradients(self._parameters, self.solver.CLIP_GRADIENTS)
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            self.trained.losses = losses
            self.done += 1
        return {**losses, "total_loss": sum(losses.values()), "lr": self.solver.BASE_LR * factor}

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of all processes' images, in SOLVER.ACCUMULATE parts; this one's losses, scalars."""
        parts, totals = self.solver.ACCUMULATE, dict[str, Tensor]()
        parallel, size = self._parallel, len(batch) // parts
        for part in range(parts):
            # dropout and the like; the choice of anchors and proposals is seeded by image
            piece = rank() * parts + part
            seed_everything(self.seed, "step", self.done, *([piece] if piece else []))
            if isinstance(self.model, DistilledDetector):
                self.model.iteration = self.done
            waits = isinstance(parallel, DistributedDataParallel) and part < parts - 1
            with parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
                losses: dict[str, Tensor] = parallel(batch[part * size : (part + 1) * size])
                (torch.stack(list(losses.values())).sum() / parts).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / parts
        if parallel is self.model:
            average_gradients(self._parameters)
        return totals

    def _meet(self, broken: list[str], batch: Batch, losses: dict[str, float]) -> None:
        self._buffers.restore()
        self.optimizer.zero_grad(set_to_none=True)
        content = step_content(self.model, self.config, self.seed, batch, losses)
        images = [str(item["image_id"]) for item in batch]
        if self.non_finite.meet(self.done, broken, images, content) == SKIP:
            self.done += 1
            return
        count = self.non_finite.count
        self.resume()
        self.non_finite.gone_back(count)
        # kept at once, so that a kill doesn't bring the former rate back
        self.save()

    def save(self) -> None:
        """Write a checkpoint of all that the next step depends on; every process has the same, the first one writes."""
        if not is_main_process():
            return
        adapters = self.model.transfer.state_dict() if isinstance(self.model, DistilledDetector) else {}
        self.trained.seconds = time.monotonic() - self._began
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "adapters": dict(adapters),
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.trained.seconds,
            "losses": self.trained.losses,
            "non_finite": self.non_finite.state_dict(),
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        save_checkpoint(self.folder.checkpoints, self.done, state)

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one.

        Raises:
            UserError: it is of another run.
        """
        state = broadcast_from_rank0(lambda: load_latest_checkpoint(self.folder.checkpoints))
        if state is None:
            if self.non_finite.needs_first_checkpoint:
                self.save()
            return
        try:
            self.model.load_state_dict(state["model"])
            if isinstance(self.model, DistilledDetector):
                self.model.transfer.load_state_dict(state["adapters"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.non_finite.load_state_dict(state.get("non_finite", {}))
            self.trained = TrainResult(float(state["seconds"]), dict(state["losses"]))
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            if is_gpu_error(error):
                raise
            raise UserError(
                f"{self.folder.checkpoints}: this checkpoint is not one of this run ({type(error).__name__}: {error}); "
                "name another OUTPUT_DIR or remove this one"
            ) from error
        self.done, self._began = int(state["step"]), time.monotonic() - self.trained.seconds
        log.info("%s: going on at step %d", self.folder.path, self.done)
