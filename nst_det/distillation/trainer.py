"""One network in training: its weights, its transfer loss, its optimizer and its run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nst_det.distillation.accuracy import Accuracy
from nst_det.distillation.build import by_positions
from nst_det.distillation.cache import is_stand_in
from nst_det.distillation.solver import build_optimizer, clip_gradients, lr_factor
from nst_det.engine.checkpoint import load_latest_checkpoint, save_checkpoint
from nst_det.engine.config import plain
from nst_det.engine.device import autocast, is_gpu_error
from nst_det.engine.distributed import (
    average_gradients,
    broadcast_from_rank0,
    is_main_process,
    rank,
    running_statistics,
    world_size,
)
from nst_det.engine.metrics import MetricsWriter, NoMetrics
from nst_det.engine.nan_guard import SKIP, Buffers, NonFinite, broken_values, gradient_norm
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.seeds import derive_seed
from nst_det.errors import UserError
from nst_det.losses import ModelOutputs, TransferLoss
from nst_det.models import LevelInfo, forward_outputs
from nst_det.models.averaged import AveragedWeights
from nst_det.models.build import backbone_parameters

KIND = "stage one"


@dataclass(frozen=True)
class Pass:
    """What one part of a step gave, in this process.

    Attributes:
        terms: loss term to its value, a scalar.
        places: transfer term to its value at each of its places, before its weight; see ``TransferLoss.parts``.
        norm: of the gradients so far, a scalar, where a step has several parts; else the loss.
    """

    terms: dict[str, Tensor]
    places: dict[str, dict[str, Tensor]]
    norm: Tensor

    @property
    def values(self) -> dict[str, float]:
        """The terms as numbers."""
        return {name: float(value) for name, value in self.terms.items()}


def mean(passes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each named scalar over the parts of a step, which all have the same names."""
    return {name: torch.stack([one[name] for one in passes]).mean() for name in passes[0]}


def step_content(
    student: StudentTrainer, images: Tensor, labels: Tensor, teacher: ModelOutputs | None
) -> dict[str, Any]:
    """All that the step depends on: weights, pixels and what the teacher said, so that neither data nor teacher are
    needed again.

    Args:
        student: as it was before the step.
        images: (B, 3, H, W), normalized.
        labels: (B,).
        teacher: None where the method has no terms.
    """
    transfer, part = student.transfer, student.broken_part
    return {
        "kind": KIND,
        "method": student.word,
        "about": plain(student.about),
        "solver": plain(student.solver),
        "seed": student.seed,
        # which of the parts that all processes took of the step's images
        "piece": rank() * student.solver.ACCUMULATE + part,
        "warmup": student.warmup,
        "precision": str(student.precision or torch.float32).removeprefix("torch."),
        "model": _on_cpu(student.model.state_dict()),
        "transfer": {
            # the teacher's own training has a word, but no method of that name
            "method": transfer.method.word,
            "weights": dict(transfer.weights),
            "options": plain(transfer.options),
            "pairs": {name: [list(astuple(pair)) for pair in pairs] for name, pairs in transfer.pairs.items()},
            "state": _on_cpu(transfer.terms.state_dict()),
        },
        "pixels": images.cpu(),
        "labels": labels.cpu(),
        "teacher": None if teacher is None else outputs_content(teacher),
        "terms": student.pass_of(part).values,
    }


def outputs_content(outputs: ModelOutputs) -> dict[str, Any]:
    """Outputs of a network, with what losses derived from them, as plain values and tensors."""
    return {
        "logits": _on_cpu(outputs.logits),
        "maps": _on_cpu(outputs.maps),
        "embedding": _on_cpu(outputs.embedding),
        "shared": [(key, _on_cpu(value)) for key, value in outputs.shared_so_far().items()],
    }


def outputs_from(content: dict[str, Any], device: torch.device) -> ModelOutputs:
    """The reverse of :func:`outputs_content`."""
    outputs = ModelOutputs(*(_moved(content[name], device) for name in ("logits", "maps", "embedding")))
    for key, value in content["shared"]:
        outputs.keep(key, _moved(value, device))
    return outputs


def broken_outputs(teacher: ModelOutputs | None) -> list[str]:
    """What of a teacher's outputs is no number, each named."""
    if teacher is None:
        return []
    named = {"logits": teacher.logits, "embedding": teacher.embedding}
    named |= {f"map {level}": value for level, value in teacher.maps.items()}
    return [
        f"the teacher's {name}"
        for name, value in named.items()
        if value is not None and not is_stand_in(value) and not bool(value.isfinite().all())
    ]


def _on_cpu(value: Any) -> Any:
    return _moved(value, torch.device("cpu"))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


class StudentTrainer:
    """A classifier that learns from labels and, by its method, from a teacher.

    What it computes at a step depends on its own state, the batch and the step, never on the students beside it:
    random numbers are drawn under a seed of their own for each step.

    Args:
        word: the method's word.
        model: the timm classifier, on its device.
        levels: all levels of the model, from ``feature_levels``.
        transfer: the transfer loss with its adapters, on the same device.
        solver: the SOLVER node.
        seed: of the run.
        folder: its run folder.
        precision: of the forward pass; None is float32.
        warmup: steps over which the transfer terms rise to their weights.
        about: ``arch``, ``num_classes`` and ``arch_kwargs`` of the model, and ``float32_precision``, for a replay.

    Attributes:
        step: finished optimizer steps.
        average: of the weights, where SOLVER.EMA_DECAY is set.
        terms: values of the last step's loss terms, by name; :attr:`total` is their sum.
        by_level: values of the terms on maps at each pair of levels, before their weights; of NST the squared MMD.
    """

    def __init__(
        self,
        word: str,
        model: nn.Module,
        levels: Mapping[str, LevelInfo],
        transfer: TransferLoss,
        solver: CfgNode,
        seed: int,
        folder: RunFolder,
        precision: torch.dtype | None = None,
        warmup: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.word, self.model, self.transfer = word, model, transfer
        self.levels = {name: levels[name] for name in transfer.student_levels}
        self.needs_teacher = bool(transfer.pairs)
        self.solver, self.seed, self.folder, self.precision, self.warmup = solver, seed, folder, precision, warmup
        self.device = next(model.parameters()).device
        self.about = dict(about or {})
        self.step = 0
        self.seconds = 0.0
        self.accuracy: Accuracy | None = None
        self.best = Accuracy(0.0, 0.0)
        self.best_step = 0
        self.terms: dict[str, Tensor] = {}
        self.by_level: dict[str, Tensor] = {}
        self.total = torch.zeros(())
        self._passes: list[Pass] = []
        self._optimizer = build_optimizer([model, transfer], solver)
        self._parameters = [item for group in self._optimizer.param_groups for item in group["params"]]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self._metrics: MetricsWriter | None = None
        self._trackers: tuple[bool, str] = (False, "")
        self.average = AveragedWeights(model, solver.EMA_DECAY) if solver.EMA_DECAY else None
        self.non_finite = NonFinite(solver.NON_FINITE, folder.path, word)
        self._buffers = Buffers(model)
        self._norm = torch.zeros(())

    @property
    def kept(self) -> nn.Module:
        """The network that is evaluated and written: the average where there is one, else the one in training."""
        return self.model if self.average is None else self.average.network

    @property
    def health(self) -> Tensor:
        """(2,): the loss of the pass that was just made, and the norm of its gradient; finite in a sound step."""
        return torch.stack([self.total, self._norm])

    @property
    def losses(self) -> dict[str, float]:
        """The terms of the last step and their sum, by their names in the metrics."""
        terms = {f"loss/{name}": float(value) for name, value in self.terms.items()}
        return {**terms, "loss/total": float(self.total)}

    @property
    def just_measured(self) -> bool:
        """Whether the step that was just done is the last one in which the terms were measured."""
        balance = self.transfer.balance
        return bool(balance.lines) and self.step == balance.measured

    def start(self, tensorboard: bool, wandb: str = "") -> None:
        """Load the newest checkpoint, if there is one, and open the metrics.

        Args:
            tensorboard: write TensorBoard events too.
            wandb: a project at Weights & Biases, or "".

        Raises:
            UserError: the checkpoint is of another run.
        """
        state = broadcast_from_rank0(lambda: load_latest_checkpoint(self.folder.checkpoints))
        if state is not None:
            self._load(state)
        elif self.non_finite.needs_first_checkpoint:
            self.save()
        self._trackers = tensorboard, wandb
        self._open_metrics()

    def _open_metrics(self) -> None:
        tensorboard, wandb = self._trackers
        board = self.folder.path / "tensorboard" if tensorboard else None
        writes = is_main_process()
        self._metrics = MetricsWriter(self.folder.metrics_path, self.step, board, wandb) if writes else NoMetrics()

    def close(self) -> None:
        """Close the metrics."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def forward_backward(self, images: Tensor, labels: Tensor, teacher: ModelOutputs | None, part: int = 0) -> None:
        """One pass; gradients stay in the parameters, loss terms in :attr:`terms`.

        After the last of SOLVER.ACCUMULATE parts both are means over the parts, and over all processes.

        Args:
            images: (B, 3, H, W), normalized.
            labels: (B,).
            teacher: what the teacher said about ``images``; None where the method has no terms.
            part: of this process's images of the step, from 0.

        Raises:
            UserError: AUTO_WEIGHT names a term that doesn't reach the backbone.
        """
        parts = self.solver.ACCUMULATE
        # dropout and the like: the same draws at this step whoever trains beside
        piece = rank() * parts + part
        torch.manual_seed(derive_seed(self.seed, "forward", self.step, *([piece] if piece else [])))
        self.model.train()
        if part == 0:
            self._buffers.keep()
            self._passes = []
        with autocast(self.device, self.precision):
            outputs = forward_outputs(self.model, images, self.levels)
        outputs.maps = {name: _tap(maps) for name, maps in outputs.maps.items()}
        logits = outputs.logits
        assert logits is not None
        outputs.logits = logits = logits.float()
        ce = cross_entropy(logits, labels, label_smoothing=self.solver.LABEL_SMOOTHING)
        terms = {"ce": self.solver.CE_WEIGHT * ce}
        if teacher is not None:
            rise = min(1.0, (self.step + 1) / self.warmup) if self.warmup else 1.0
            weighted = self._balanced(terms["ce"], self.transfer(outputs, teacher))
            terms |= {name: rise * value for name, value in weighted.items()}
        total = torch.stack(list(terms.values())).sum()
        self._scaler.scale(total / parts).backward()
        # its gradient is wanted alone only to tell the parts from each other
        norm = gradient_norm(self._parameters) if parts > 1 and not self._scaler.is_enabled() else total.detach()
        values = {name: value.detach() for name, value in terms.items()}
        self._passes.append(Pass(values, {} if teacher is None else dict(self.transfer.parts), norm))
        if part == parts - 1:
            self._join()

    def _by_level(self, places: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The values of the terms on maps at each pair of levels, before their weights."""
        return {
            f"{name}@{label}": value
            for name, values in places.items()
            if "maps" in self.transfer.kinds[name]
            for label, value in values.items()
        }

    def _join(self) -> None:
        """Gradients, terms and running statistics become those of all parts and processes."""
        self.terms = mean([one.terms for one in self._passes])
        self.by_level = mean([self._by_level(one.places) for one in self._passes])
        statistics = [*running_statistics(self.model), *running_statistics(self.transfer)]
        average_gradients(self._parameters, [*self.terms.values(), *self.by_level.values(), *statistics])
        self.total = torch.stack(list(self.terms.values())).sum()
        # infinite gradients are an everyday matter of fp16's scaler, which passes over such steps by itself
        self._norm = self.total if self._scaler.is_enabled() else gradient_norm(self._parameters)

    @property
    def broken_part(self) -> int:
        """The first part of the last step, in this process, whose loss or gradient is no number; else the last."""
        finite = [bool(torch.stack([*one.terms.values(), one.norm]).isfinite().all()) for one in self._passes]
        return finite.index(False) if False in finite else len(finite) - 1

    def pass_of(self, part: int) -> Pass:
        """What a part of the last step gave; :attr:`terms` are those of all parts and processes."""
        return self._passes[part]

    def _balanced(self, task: Tensor, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms, measured against the task in the first steps, by the weights that are chosen there."""
        balance = self.transfer.balance
        if not balance.wants(self.step):
            return terms
        try:
            return balance(task, terms, backbone_parameters(self.model))
        except ValueError as error:
            raise UserError(f"{self.word}: TRANSFER.{error}") from error

    def update(self) -> None:
        """One optimizer step with the gradients that are there."""
        rate = self._rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        scale = self._scaler.get_scale() if self.average is not None else 0.0
        self._scaler.unscale_(self._optimizer)
        clip_gradients(self._parameters, self.solver.CLIP_GRADIENTS, None if self._scaler.is_enabled() else self._norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        # a scaler that found infinite gradients has passed over the step and lowered its scale
        if self.average is not None and self._scaler.get_scale() >= scale:
            self.average.update()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _rate(self, step: int) -> float:
        return float(self.solver.BASE_LR * lr_factor(step, self.solver) * self.non_finite.rate)

    def meet(self, images: Tensor, labels: Tensor, teacher: ModelOutputs | None, names: Sequence[str]) -> None:
        """The pass that was just made gave something that is no number: no step is made, SOLVER.NON_FINITE decides.

        Args:
            images: as :meth:`forward_backward` had them; labels and teacher too.
            labels: (B,).
            teacher: what it said, or None.
            names: of the B images.

        Raises:
            UserError: the policy is to stop, or has had its limit; the line names terms, levels and images.
        """
        named = [*self.model.named_parameters(), *self.transfer.named_parameters()]
        alone = world_size() == 1
        gradients = {name: value.grad for name, value in named if value.grad is not None and alone}
        one = self.pass_of(self.broken_part)
        broken = [*broken_values(one.values, one.places, gradients), *broken_outputs(teacher)]
        self._buffers.restore()
        self._optimizer.zero_grad(set_to_none=True)
        content = step_content(self, images, labels, teacher)
        if self.non_finite.meet(self.step, broken, names, content) == SKIP:
            self.step += 1
        else:
            self._go_back()

    def _go_back(self) -> None:
        count = self.non_finite.count
        state = broadcast_from_rank0(lambda: load_latest_checkpoint(self.folder.checkpoints))
        if state is None:
            raise UserError(
                f"{self.folder.checkpoints}: no checkpoint to go back to; set SOLVER.NON_FINITE.POLICY stop"
            )
        self._load(state)
        self.non_finite.gone_back(count)
        # kept at once, so that a kill doesn't bring the former rate back
        self.save()
        self.close()
        self._open_metrics()

    def log(self, more: Mapping[str, float] | None = None) -> None:
        """Write the terms of the step that was just done, each by its name, and what else is to stand in their row."""
        levels = {f"level/{name}": float(value) for name, value in self.by_level.items()}
        last = self.step - 1
        self._write(last, {**self.losses, **levels, "lr": self._rate(last), **(more or {})})

    def record(self, accuracy: Accuracy) -> None:
        """Take note of the accuracy after the step that was just done."""
        self.accuracy = accuracy
        if accuracy.top1 > self.best.top1:
            self.best, self.best_step = accuracy, self.step
        self._write(self.step - 1, {"val/top1": accuracy.top1, "val/top5": accuracy.top5})

    def _write(self, step: int, values: dict[str, float]) -> None:
        assert self._metrics is not None, "start() opens the metrics"
        self._metrics.write(step, values)

    def save(self) -> None:
        """Write a checkpoint of all that the next step depends on; every process has the same, the first one writes."""
        if not is_main_process():
            return
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "transfer": self.transfer.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "seconds": self.seconds,
            "accuracy": asdict(self.accuracy) if self.accuracy else None,
            "best": asdict(self.best),
            "best_step": self.best_step,
            "non_finite": self.non_finite.state_dict(),
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        save_checkpoint(self.folder.checkpoints, self.step, state)

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.transfer.load_state_dict(state["transfer"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._scaler.load_state_dict(state["scaler"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.accuracy = Accuracy(**state["accuracy"]) if state["accuracy"] else None
            self.best, self.best_step = Accuracy(**state["best"]), state["best_step"]
            self.non_finite.load_state_dict(state.get("non_finite", {}))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if is_gpu_error(error):
                raise
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{self.folder.checkpoints}: the checkpoint is of another network ({reason}); remove this folder"
            ) from error


def _tap(maps: Tensor) -> Tensor:
    """``maps`` for a transfer loss.

    Its gradient comes back channels last: one of another layout would be added to the network's own element by
    element, which takes longer than most losses.
    """
    tap = maps.view_as(maps)
    tap.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return by_positions(tap)
