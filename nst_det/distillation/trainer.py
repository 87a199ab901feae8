"""One network in training: its weights, its transfer loss, its optimizer and its run folder."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple
from typing import Any, NamedTuple, cast

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nst_det.distillation.accuracy import Scores
from nst_det.distillation.build import Network, by_positions, copy_of
from nst_det.distillation.cache import is_stand_in
from nst_det.engine.compilation import compiled
from nst_det.engine.config import plain
from nst_det.engine.device import autocast, default_device, train_depthwise_in_float32
from nst_det.engine.distributed import (
    average_gradients,
    copy_from_first,
    is_main_process,
    mean_of_processes,
    rank,
    running_statistics,
    world_size,
)
from nst_det.engine.foreach import counted_together, weights_in
from nst_det.engine.keys import OFF
from nst_det.engine.metrics import MetricsWriter
from nst_det.engine.nan_guard import NonFiniteGuard, broken_values, gradient_norm
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.seeds import derive_seed
from nst_det.engine.solver import clip_gradients, lr_schedule, make_optimizer, set_learning_rate
from nst_det.engine.train_state import AveragedWeights, OptimizedState
from nst_det.errors import UserError
from nst_det.losses import ModelOutputs, TransferLoss
from nst_det.models import forward_outputs
from nst_det.models.build import backbone_parameters
from nst_det.models.sync_norm import sync_batch_norm


class Pass(NamedTuple):
    """The losses of one part of a step, in this process."""

    # loss term to its value, a scalar
    terms: dict[str, Tensor]
    # transfer term to its value at each of its places, before its weight
    places: dict[str, dict[str, Tensor]]
    # of the gradients so far where a step has several parts, else the loss
    norm: Tensor

    @property
    def values(self) -> dict[str, float]:
        """Return the terms as numbers."""
        return {name: float(value) for name, value in self.terms.items()}


class StudentTrainer(OptimizedState):
    """A classifier that learns from labels, where there are some, and by its method from a teacher.

    What it computes at a step depends on its own state, the batch and the step alone, not on the students that train
    with it: random numbers are drawn under a seed of their own for each step.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        transfer: TransferLoss,
        config: CfgNode,
        solver: CfgNode,
        precision: torch.dtype | None,
        folder: RunFolder,
    ) -> None:
        self.device = default_device()
        model = copy_of(network, self.device)
        train_depthwise_in_float32(model)
        if solver.SYNC_BN:
            model, transfer = sync_batch_norm(model), cast(TransferLoss, sync_batch_norm(transfer))
        copy_from_first(model, transfer.to(self.device))
        super().__init__(
            model,
            transfer,
            NonFiniteGuard(solver.NON_FINITE, folder.path, model, name),
            AveragedWeights(model, solver.EMA_DECAY) if solver.EMA_DECAY else None,
            build_optimizer([model, transfer], solver),
            folder,
            torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16),
        )
        self.name, self.network, self.transfer, self.precision = name, network, transfer, precision
        self.config, self.solver = config, solver
        self._outputs = compiled(forward_outputs, solver.COMPILE, self.device, f"{name}'s network")
        self._schedule = lr_schedule(solver)
        self.levels = {level: info for level, info in network.levels.items() if level in transfer.student_levels}
        self.needs_teacher = bool(transfer.pairs)
        # as it began (measured without labels alone), last and best, by the first of the scores
        self.start: Scores = {}
        self.scores: Scores = {}
        self.best, self.best_step = Scores(), 0
        self.passes: list[Pass] = []
        # of the last step: loss terms, those on maps at each pair of levels before their weights, and their sum
        self.terms: dict[str, Tensor] = {}
        self.by_level: dict[str, Tensor] = {}
        self.total = self._norm = torch.zeros(())
        self._metrics: MetricsWriter | None = None

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one, and open the metrics there."""
        super().resume()
        self.close()
        board = self.folder.path / "tensorboard" if self.config.TENSORBOARD else None
        if is_main_process():
            self._metrics = MetricsWriter(self.folder.metrics_path, self.step, board, self.config.WANDB)

    def close(self) -> None:
        """Close the metrics."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def forward_backward(self, images: Tensor, labels: Tensor, teacher: ModelOutputs | None, part: int = 0) -> None:
        """Make the pass of one of SOLVER.ACCUMULATE parts; gradients stay in the parameters.

        After the last part, gradients and losses are means over the parts and over all processes.
        """
        parts = self.solver.ACCUMULATE
        piece = rank() * parts + part
        # dropout and the like: the same draws at this step whoever trains with it
        torch.manual_seed(derive_seed(self.config.SEED, "forward", self.step, *([piece] if piece else [])))
        self.model.train()
        if part == 0:
            self.guard.keep_buffers(self.step)
            self.passes = []
        with autocast(self.device, self.precision), ExitStack() as together:
            if self.device.type != "cpu" and self.solver.COMPILE == OFF:
                together.enter_context(weights_in(self.model, self.precision))
                together.enter_context(counted_together(self.model))
            outputs = self._outputs(self.model, images, self.levels)
        outputs.maps = {level: _tap(maps) for level, maps in outputs.maps.items()}
        if outputs.logits is not None:
            outputs.logits = outputs.logits.float()
        terms = {}
        if self.config.DATA.LABELS:
            assert outputs.logits is not None
            outputs.labels = labels
            terms["ce"] = _times(self.solver.CE_WEIGHT, self._cross_entropy(outputs.logits, labels))
        if teacher is not None:
            warmup = self.config.TRANSFER.WARMUP_ITERS
            rise = min(1.0, (self.step + 1) / warmup) if warmup else 1.0
            weighted = self.transfer(outputs, teacher)
            if terms:
                weighted = self._balanced(terms["ce"], weighted)
            terms |= {term: _times(rise, value) for term, value in weighted.items()}
        total = _sum(terms)
        self.scaler.scale(total / parts if parts > 1 else total).backward()
        # its gradient is wanted alone only to tell the parts from each other
        norm = gradient_norm(self.parameters) if parts > 1 and not self.scaler.is_enabled() else total.detach()
        places = {} if teacher is None else dict(self.transfer.parts)
        self.passes.append(Pass({term: value.detach() for term, value in terms.items()}, places, norm))
        if part == parts - 1:
            self._join()

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the labelled images of a part; 0 where it has none.

        Of several processes the values are such that their mean is the one over the labelled images of all.
        """
        smoothing, data = self.solver.LABEL_SMOOTHING, self.config.DATA
        if not (data.PER_CLASS and data.REST == "unlabelled"):
            return cross_entropy(logits, labels, label_smoothing=smoothing)
        total = cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=-1, reduction="sum")
        count = mean_of_processes((labels >= 0).sum().to(total.dtype))
        return total / count.clamp(min=1 / world_size())

    def _balanced(self, task: Tensor, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms by the weights that the first steps choose, in which they are measured against the task."""
        balance = self.transfer.balance
        if not balance.wants(self.step):
            return terms
        try:
            return balance(task, terms, backbone_parameters(self.model))
        except ValueError as error:
            raise UserError(f"{self.name}: TRANSFER.{error}") from error

    def _join(self) -> None:
        """Average gradients, terms and running statistics over all parts and processes."""
        by_level = [
            {
                f"{term}@{label}": value
                for term, values in one.places.items()
                if "maps" in self.transfer.kinds[term]
                for label, value in values.items()
            }
            for one in self.passes
        ]
        self.terms, self.by_level = _mean([one.terms for one in self.passes]), _mean(by_level)
        if world_size() > 1:
            statistics = [*running_statistics(self.model), *running_statistics(self.transfer)]
            average_gradients(self.parameters, [*self.terms.values(), *self.by_level.values(), *statistics])
        self.total = _sum(self.terms)
        # infinite gradients are an everyday matter of fp16's scaler, which passes over such steps by itself; but not
        # those that stay infinite where it makes them smaller
        everyday = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        self._norm = self.total if everyday else gradient_norm(self.parameters)

    @property
    def waits(self) -> bool:
        # the weights that the first steps choose are chosen on the host
        return super().waits or self.transfer.balance.wants(self.step)

    @property
    def loss_and_norm(self) -> tuple[Tensor, Tensor]:
        """The loss of the step and the norm of its gradient, scalars; finite in a sound step."""
        return self.total, self._norm

    def update(self, broken: Tensor | None = None) -> None:
        """Make one optimizer step with the gradients that are there; see ``late_step`` for ``broken``."""
        set_learning_rate(self.optimizer, self._rate(self.step))
        norm = None if self.scaler.is_enabled() else self._norm

        def clip() -> None:
            clip_gradients(self.parameters, self.solver.CLIP_GRADIENTS, norm)

        if broken is None:
            self.optimizer_step(clip)
        else:
            self.late_step(clip, broken)

    def _rate(self, step: int) -> float:
        return self._schedule(step) * self.guard.rate

    @property
    def broken_part(self) -> int:
        """Return the first part of this process's step whose loss or gradient is not finite; else the last."""
        finite = [bool(torch.stack([*one.terms.values(), one.norm]).isfinite().all()) for one in self.passes]
        return finite.index(False) if False in finite else len(finite) - 1

    def handle_nonfinite(
        self, images: Tensor, labels: Tensor, teacher: ModelOutputs | None, names: Sequence[str]
    ) -> None:
        """Skip the step or roll back, by SOLVER.NON_FINITE; the inputs are those of :attr:`broken_part`."""
        teacher = teacher if self.needs_teacher else None
        broken = self.broken_in(self.passes[self.broken_part], teacher)
        self.skip_or_roll_back(broken, names, lambda: self._dump(images, labels, teacher))

    def broken_in(self, one: Pass, teacher: ModelOutputs | None) -> list[str]:
        """Name what is not finite in a pass and in the teacher's outputs for it."""
        named = itertools.chain(self.model.named_parameters(), self.transfer.named_parameters())
        return [*broken_values(one.values, one.places, named), *broken_outputs(teacher)]

    def _dump(self, images: Tensor, labels: Tensor, teacher: ModelOutputs | None) -> dict[str, Any]:
        """Return all that a replay of :attr:`broken_part` needs, so that it asks for neither data nor teacher."""
        network, transfer, part = self.network, self.transfer, self.broken_part
        content = {
            "kind": "stage one",
            "method": self.name,
            "network": [network.arch, network.num_classes, network.arch_kwargs],
            "config": plain(self.config),
            "solver": plain(self.solver),
            "seed": self.config.SEED,
            # which of the parts that all processes took of the step's images
            "piece": rank() * self.solver.ACCUMULATE + part,
            "precision": str(self.precision or torch.float32).removeprefix("torch."),
            "model": self.model.state_dict(),
            "transfer": {
                # the teacher's own training has a name, but no method of that name
                "method": transfer.method.word,
                "weights": dict(transfer.weights),
                "options": plain(transfer.options),
                "pairs": {term: [list(astuple(pair)) for pair in pairs] for term, pairs in transfer.pairs.items()},
                "state": transfer.terms.state_dict(),
            },
            "pixels": images,
            "labels": labels,
            "teacher": teacher
            and {
                "logits": teacher.logits,
                "maps": teacher.maps,
                "embedding": teacher.embedding,
                "shared": list(teacher.shared_so_far().items()),
            },
            "terms": self.passes[part].values,
        }
        return dict(moved(content, torch.device("cpu")))

    @property
    def losses(self) -> dict[str, float]:
        """Return the terms of the last step, their sum, and those on maps by level, by their names in the metrics."""
        values = {f"loss/{term}": value for term, value in self.terms.items()} | {"loss/total": self.total}
        values |= {f"level/{term}": value for term, value in self.by_level.items()}
        # a GPU is waited for once
        return dict(zip(values, torch.stack(list(values.values())).tolist()))

    def log(self, more: Mapping[str, float]) -> None:
        """Write the losses of the step that was just done, and what else is to be in their row."""
        self._write({**self.losses, "lr": self.solver.BASE_LR * self._rate(self.step - 1), **more})

    def record(self, scores: Scores) -> None:
        """Take note of the scores after the step that was just done; before the first, of how it began."""
        if not self.step:
            self.start = scores
            return
        self.scores, judge = scores, next(iter(scores))
        if scores[judge] > self.best.get(judge, 0.0):
            self.best, self.best_step = scores, self.step
        self._write({f"val/{name}": value for name, value in scores.items()})

    def _write(self, values: dict[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(self.step - 1, values)

    def state_dict(self) -> dict[str, Any]:
        found = {"start": self.start, "scores": self.scores, "best": self.best, "best_step": self.best_step}
        return {**super().state_dict(), **found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.start, self.scores = state["start"], state["scores"]
        self.best, self.best_step = state["best"], state["best_step"]


def build_optimizer(modules: Iterable[nn.Module], solver: CfgNode) -> torch.optim.Optimizer:
    """Return the optimizer in which scales, shifts and biases decay by WEIGHT_DECAY_NORM."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": solver.WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": solver.WEIGHT_DECAY_NORM},
    ]
    return make_optimizer([group for group in groups if group["params"]], solver)


def _times(factor: float, value: Tensor) -> Tensor:
    return value if factor == 1 else factor * value


def _sum(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum() if len(terms) > 1 else next(iter(terms.values()))


def _mean(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == world_size() == 1:
        return dict(parts[0])
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


def _tap(maps: Tensor) -> Tensor:
    """Return ``maps`` for a transfer loss.

    Its gradient comes back channels last: one of another layout would be added to the network's own element by
    element, which takes longer than most losses.
    """
    tap = maps.view_as(maps)
    tap.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return by_positions(tap)


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


def moved(value: Any, device: torch.device) -> Any:
    """Return a tree of dicts and lists with its tensors on a device."""
    if isinstance(value, Tensor):
        value = value.detach()
        # one number seen as many stays one
        return value[(0,) * value.dim()].to(device).expand(value.shape) if is_stand_in(value) else value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return value
