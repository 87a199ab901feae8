"""One network in training with all that its next step depends on, saved and resumed in one schema."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from nst_det.engine.checkpoint import SCHEMA, check_schema, load_latest_checkpoint, save_checkpoint
from nst_det.engine.device import is_gpu_error
from nst_det.engine.distributed import broadcast_from_rank0, is_main_process
from nst_det.engine.foreach import copy_together
from nst_det.engine.nan_guard import SKIP, NonFiniteGuard
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError

log = logging.getLogger(__name__)


class AveragedWeights:
    """An exponential moving average of the weights in training (SOLVER.EMA_DECAY), by timm's ``ModelEmaV3``.

    After optimizer step t = 1, 2, .. the average becomes ``d * average + (1 - d) * weights`` with
    ``d = min(decay, 1 - t ** (-2 / 3))``: d rises, so that a short run doesn't keep the random weights that it began
    with.  Running statistics of normalization are averaged alike; counters (``num_batches_tracked``) are copied.
    """

    def __init__(self, trained: nn.Module, decay: float, build: nn.Module | None = None) -> None:
        self._trained = trained
        # ``build`` is another network of this build, where ``trained`` has hooks that a copy must not have
        self._average = ModelEmaV3(trained if build is None else build, decay, use_warmup=True)
        self.network: nn.Module = self._average.module.requires_grad_(False)
        self.steps = 0

    @cached_property
    def _pairs(self) -> tuple[tuple[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
        """The average's tensors and those in training: of floating point, then counters."""
        both = zip(*(network.state_dict(keep_vars=True).values() for network in (self.network, self._trained)))
        found: tuple[tuple[list[Tensor], list[Tensor]], ...] = (([], []), ([], []))
        for average, trained in both:
            own, theirs = found[not average.is_floating_point()]
            own.append(average)
            theirs.append(trained)
        return found[0], found[1]

    @torch.no_grad()
    def update(self, kept: Mapping[Tensor, Tensor] = MappingProxyType({})) -> None:
        """Add the weights that an optimizer step has made; ``kept`` are copies of what has changed since."""
        self.steps += 1
        (own, trained), (own_counters, counters) = self._pairs
        weight = 1.0 - self._average.get_decay(self.steps)
        torch._foreach_lerp_(own, [kept.get(value, value) for value in trained], weight=weight)
        copy_together(own_counters, [kept.get(value, value) for value in counters])

    def restart(self) -> None:
        """Become the weights in training, as before their first step."""
        self.steps = 0
        self._average.set(self._trained)


@dataclass(eq=False, repr=False)
class TrainState:
    """A network, the adapters of its transfer terms, its non-finite guard, and the average of its weights."""

    model: nn.Module
    adapters: nn.Module | None
    guard: NonFiniteGuard
    average: AveragedWeights | None
    # that training took, in all calls together
    seconds: float = field(default=0.0, init=False)

    @property
    def eval_model(self) -> nn.Module:
        """The network that is evaluated and written: the average where there is one, else the one in training."""
        return self.model if self.average is None else self.average.network

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has besides the model, which is :attr:`eval_model`."""
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
            self.average.network.load_state_dict(self.model.state_dict())
            self.average.steps = int(state["averaged"]["steps"])
            self.model.load_state_dict(state["averaged"]["trained"])
        if self.adapters is not None:
            self.adapters.load_state_dict(state["adapters"])
        self.guard.load_state_dict(state["non_finite"])
        self.seconds = float(state["seconds"])


@dataclass(eq=False, repr=False)
class OptimizedState(TrainState):
    """A :class:`TrainState` with its optimizer and its run folder; Detectron2 has its own of both."""

    optimizer: torch.optim.Optimizer
    folder: RunFolder
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    # finished optimizer steps
    step: int = field(default=0, init=False)
    # one that wasn't finite when nobody waited for it
    suspect: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        # that of torch's fused SGD begins as memory that a first step which is passed over never fills
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group.get("momentum") else ():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @cached_property
    def parameters(self) -> list[Tensor]:
        """All that the optimizer trains."""
        return [item for group in self.optimizer.param_groups for item in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        optimizer = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return {**super().state_dict(), **optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def save(self) -> None:
        """Write a checkpoint in the main process; every process has the same bits."""
        if is_main_process():
            state = {"model": self.eval_model.state_dict(), "trainer": self.state_dict()}
            save_checkpoint(self.folder.checkpoints, self.step, state)

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
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
        log.info("%s: resumed at step %d", self.folder.path, self.step)

    @property
    def waits(self) -> bool:
        """Whether the host must know that the next step is finite before it goes on."""
        on_cpu = self.parameters[0].device.type == "cpu"
        return on_cpu or self.scaler.is_enabled() or self.suspect == self.step

    def optimizer_step(self, clip: Callable[[], None]) -> None:
        """Apply the gradients that are there; ``clip`` changes them before, at their true scale."""
        if self.suspect == self.step:
            log.warning("%s: step %d was not finite, but was finite when it was repeated", self.folder.path, self.step)
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

    def late_step(self, clip: Callable[[], None], broken: Tensor) -> None:
        """Make a step that changes nothing if ``broken``, a number on the device, is 1; then :meth:`learn` of it."""
        clip()
        self.optimizer.found_inf, self.optimizer.grad_scale = broken, None  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.found_inf, self.optimizer.grad_scale  # type: ignore[attr-defined]
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def learn(self, step: int, finite: bool) -> None:
        """Complete the :meth:`late_step` before the next one is made; one that wasn't finite is to be made again."""
        if not finite:
            self.optimizer.zero_grad(set_to_none=True)
            self.guard.restore_buffers(step)
            self.step = self.suspect = step
        elif self.average is not None:
            self.average.update(self.guard.buffers_before(step + 1))

    def skip_or_roll_back(
        self, broken: Sequence[str], images: Sequence[str], content: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Follow SOLVER.NON_FINITE after a pass that was not finite; see :meth:`NonFiniteGuard.handle`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.suspect = -1
        if self.guard.handle(self.step, broken, images, content) == SKIP:
            self.step += 1
        else:
            self.guard.roll_back(self.resume, self.save)
