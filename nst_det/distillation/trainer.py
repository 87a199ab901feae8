"""One network in training: its weights, its transfer loss, its optimizer and its run folder."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nst_det.distillation.accuracy import Accuracy
from nst_det.distillation.build import by_positions
from nst_det.distillation.cache import is_stand_in
from nst_det.engine.config import plain
from nst_det.engine.device import autocast
from nst_det.engine.distributed import average_gradients, is_main_process, rank, running_statistics
from nst_det.engine.metrics import MetricsWriter
from nst_det.engine.nan_guard import NonFiniteGuard, broken_values, gradient_norm
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.seeds import derive_seed
from nst_det.engine.solver import clip_gradients, lr_schedule, make_optimizer, set_learning_rate
from nst_det.engine.train_state import AveragedWeights, OptimizedState
from nst_det.errors import UserError
from nst_det.losses import ModelOutputs, TransferLoss
from nst_det.models import LevelInfo, forward_outputs
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
    """All that the step depends on: weights, pixels and the teacher's outputs, so that neither data nor teacher are
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
    """Name what of a teacher's outputs is not finite."""
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


class StudentTrainer(OptimizedState):
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
        seconds: its own share of the time.
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
        optimizer = build_optimizer([model, transfer], solver)
        device = next(model.parameters()).device
        super().__init__(
            model,
            transfer,
            NonFiniteGuard(solver.NON_FINITE, folder.path, model, word),
            AveragedWeights(model, solver.EMA_DECAY) if solver.EMA_DECAY else None,
            optimizer,
            folder,
            torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        )
        self.word, self.transfer, self.device = word, transfer, device
        self.levels = {name: levels[name] for name in transfer.student_levels}
        self.needs_teacher = bool(transfer.pairs)
        self.solver, self.seed, self.precision, self.warmup = solver, seed, precision, warmup
        self._schedule = lr_schedule(solver)
        self.about = dict(about or {})
        self.accuracy: Accuracy | None = None
        self.best, self.best_step = Accuracy(0.0, 0.0), 0
        self.terms: dict[str, Tensor] = {}
        self.by_level: dict[str, Tensor] = {}
        self.total = self._norm = torch.zeros(())
        self._passes: list[Pass] = []
        self._metrics: MetricsWriter | None = None
        self._trackers: tuple[bool, str] = (False, "")

    @property
    def loss_and_norm(self) -> Tensor:
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
        """Resume from the newest checkpoint, if there is one, and open the metrics."""
        self.resume()
        self._trackers = tensorboard, wandb
        self._open_metrics()

    def _open_metrics(self) -> None:
        tensorboard, wandb = self._trackers
        board = self.folder.path / "tensorboard" if tensorboard else None
        if is_main_process():
            self._metrics = MetricsWriter(self.folder.metrics_path, self.step, board, wandb)

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
            teacher: its outputs for ``images``; None where the method has no terms.
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
            self.guard.keep_buffers()
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
        self.scaler.scale(total / parts).backward()
        # its gradient is wanted alone only to tell the parts from each other
        norm = gradient_norm(self.parameters) if parts > 1 and not self.scaler.is_enabled() else total.detach()
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
        average_gradients(self.parameters, [*self.terms.values(), *self.by_level.values(), *statistics])
        self.total = torch.stack(list(self.terms.values())).sum()
        # infinite gradients are an everyday matter of fp16's scaler, which passes over such steps by itself
        self._norm = self.total if self.scaler.is_enabled() else gradient_norm(self.parameters)

    @property
    def broken_part(self) -> int:
        """The first part of the last step, in this process, whose loss or gradient is not finite; else the last."""
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
        """Make one optimizer step with the gradients that are there."""
        set_learning_rate(self.optimizer, self._rate(self.step))
        norm = None if self.scaler.is_enabled() else self._norm
        self.optimizer_step(lambda: clip_gradients(self.parameters, self.solver.CLIP_GRADIENTS, norm))

    def _rate(self, step: int) -> float:
        return self._schedule(step) * self.guard.rate

    def handle_nonfinite(
        self, images: Tensor, labels: Tensor, teacher: ModelOutputs | None, names: Sequence[str]
    ) -> None:
        """The pass that was just made is not finite: no step is made, SOLVER.NON_FINITE decides.

        Args:
            images: as :meth:`forward_backward` had them; labels and teacher too.
            labels: (B,).
            teacher: its outputs, or None.
            names: of the B images.
        """
        one = self.pass_of(self.broken_part)
        named = itertools.chain(self.model.named_parameters(), self.transfer.named_parameters())
        broken = [*broken_values(one.values, one.places, named), *broken_outputs(teacher)]
        step = self.step
        self.skip_or_roll_back(broken, names, lambda: step_content(self, images, labels, teacher))
        if self.step <= step:
            self.close()
            self._open_metrics()

    def log(self, more: Mapping[str, float]) -> None:
        """Write the terms of the step that was just done, each by its name, and what else is to be in their row."""
        levels = {f"level/{name}": float(value) for name, value in self.by_level.items()}
        last = self.step - 1
        self._write(last, {**self.losses, **levels, "lr": self.solver.BASE_LR * self._rate(last), **more})

    def record(self, accuracy: Accuracy) -> None:
        """Take note of the accuracy after the step that was just done."""
        self.accuracy = accuracy
        if accuracy.top1 > self.best.top1:
            self.best, self.best_step = accuracy, self.step
        self._write(self.step - 1, {"val/top1": accuracy.top1, "val/top5": accuracy.top5})

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(step, values)

    def state_dict(self) -> dict[str, Any]:
        accuracy = None if self.accuracy is None else asdict(self.accuracy)
        found = {"accuracy": accuracy, "best": asdict(self.best), "best_step": self.best_step}
        return {**super().state_dict(), **found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.accuracy = Accuracy(**state["accuracy"]) if state["accuracy"] else None
        self.best, self.best_step = Accuracy(**state["best"]), state["best_step"]


def build_optimizer(modules: Iterable[nn.Module], solver: CfgNode) -> torch.optim.Optimizer:
    """Scales, shifts and biases decay by WEIGHT_DECAY_NORM."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": solver.WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": solver.WEIGHT_DECAY_NORM},
    ]
    return make_optimizer([group for group in groups if group["params"]], solver)


def _tap(maps: Tensor) -> Tensor:
    """``maps`` for a transfer loss.

    Its gradient comes back channels last: one of another layout would be added to the network's own element by
    element, which takes longer than most losses.
    """
    tap = maps.view_as(maps)
    tap.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return by_positions(tap)
