"""One network in training with all that its next step depends on, saved and resumed in one schema."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nst_det.engine.averaged import AveragedWeights
from nst_det.engine.checkpoint import SCHEMA, check_schema, load_latest_checkpoint, save_checkpoint
from nst_det.engine.device import is_gpu_error
from nst_det.engine.distributed import broadcast_from_rank0, is_main_process
from nst_det.engine.nan_guard import SKIP, NonFiniteGuard
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError

log = logging.getLogger(__name__)


class TrainState:
    """A network, the adapters of its transfer terms, the average of its weights, and its non-finite guard.

    Args:
        model: what is trained and written.
        adapters: the transfer loss, whose parameters are trained too; None without one.
        guard: see :class:`~nst_det.engine.nan_guard.NonFiniteGuard`.
        average: of the model's weights, where SOLVER.EMA_DECAY is set.

    Attributes:
        seconds: that training took, in all calls together.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: nn.Module | None,
        guard: NonFiniteGuard,
        average: AveragedWeights | None = None,
    ) -> None:
        self.model, self.adapters, self.guard, self.average = model, adapters, guard, average
        self.seconds = 0.0

    @property
    def eval_model(self) -> nn.Module:
        """The network that is evaluated and written: the average where there is one, else the one in training."""
        return self.model if self.average is None else self.average.network

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has beside the model, which is :attr:`eval_model`."""
        state = {
            "schema": SCHEMA,
            "seconds": self.seconds,
            "non_finite": self.guard.state_dict(),
            "adapters": {} if self.adapters is None else dict(self.adapters.state_dict()),
        }
        if self.average is not None:
            state["averaged"] = {"trained": self.model.state_dict(), "steps": self.average.steps}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load :meth:`state_dict`; the checkpoint's model is in :attr:`model` already."""
        check_schema(state, "checkpoint")
        if ("averaged" in state) != (self.average is not None):
            raise UserError("SOLVER.EMA_DECAY: the checkpoint is of another run; set what it was trained with")
        if self.average is not None:
            averaged = state["averaged"]
            self.average.load_state_dict({"network": self.model.state_dict(), "steps": averaged["steps"]})
            self.model.load_state_dict(averaged["trained"])
        if self.adapters is not None:
            self.adapters.load_state_dict(state["adapters"])
        self.guard.load_state_dict(state["non_finite"])
        self.seconds = float(state["seconds"])


class OptimizedState(TrainState):
    """A :class:`TrainState` with its optimizer and its run folder; Detectron2 has its own of both.

    Attributes:
        step: finished optimizer steps.
        parameters: all that the optimizer trains.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: nn.Module | None,
        guard: NonFiniteGuard,
        average: AveragedWeights | None,
        optimizer: torch.optim.Optimizer,
        folder: RunFolder,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(model, adapters, guard, average)
        self.optimizer, self.folder = optimizer, folder
        self.scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler
        self.parameters: list[Tensor] = [item for group in optimizer.param_groups for item in group["params"]]
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        optimizer = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return {**super().state_dict(), **optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def save(self) -> None:
        """Write a checkpoint; every process has the same bits, the main process writes."""
        if is_main_process():
            state = {"model": self.eval_model.state_dict(), "trainer": self.state_dict()}
            save_checkpoint(self.folder.checkpoints, self.step, state)

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one.

        Raises:
            UserError: it is of another run, or of another version.
        """
        state = broadcast_from_rank0(lambda: load_latest_checkpoint(self.folder.checkpoints))
        if state is None:
            if self.guard.needs_first_checkpoint:
                self.save()
            return
        try:
            self.model.load_state_dict(state["model"])
            self.load_state_dict(state["trainer"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if is_gpu_error(error):
                raise
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{self.folder.checkpoints}: the checkpoint is of another network ({reason}); name another OUTPUT_DIR "
                "or remove this one"
            ) from error
        self.step = int(state["iteration"]) + 1
        log.info("%s: resumes at step %d", self.folder.path, self.step)

    def optimizer_step(self, clip: Callable[[], None]) -> None:
        """Take the gradients that are there; ``clip`` changes them before, at their true scale."""
        scale = self.scaler.get_scale() if self.average is not None else 0.0
        self.scaler.unscale_(self.optimizer)
        clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # a scaler that found infinite gradients has skipped the step and lowered its scale
        if self.average is not None and self.scaler.get_scale() >= scale:
            self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def skip_or_roll_back(
        self, broken: Sequence[str], images: Sequence[str], content: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Do as SOLVER.NON_FINITE says about a pass that was not finite; see :meth:`NonFiniteGuard.handle`."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.guard.handle(self.step, broken, images, content) == SKIP:
            self.step += 1
        else:
            self.guard.roll_back(self.resume, self.save)
