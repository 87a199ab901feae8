"""The gradient norm of each term at the student's backbone, measured in the first steps, and weights chosen from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn

# steps whose median decides a weight; without weights to choose, the first step is measured alone
STEPS = 5
# a term that pulls more than this many times as hard as the task, or as little, is worth a warning
LIMIT = 10.0
# in fp16 the gradient of a small loss would vanish; a power of two changes no other bit
SCALE = 1024.0

HEADINGS = ("term", "weight", "value", "gradient norm at the backbone", "/ task's", "target")


@dataclass(frozen=True)
class TermBalance:
    """One line of a balance report.

    Attributes:
        term: the term's name.
        weight: on its value.
        value: weighted, in the last step that was measured.
        norm: L2 norm of its weighted gradient in the backbone's parameters, a median over the measured steps.
        ratio: of this norm to that of the task's gradient, a median too; None where the task has no finite gradient.
        share: what the ratio was to be by AUTO_WEIGHT; None where the weight was given.
    """

    term: str
    weight: float
    value: float
    norm: float
    ratio: float | None
    share: float | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        """The row under :data:`HEADINGS`."""
        target = "" if self.share is None else f"{self.share:.3g}"
        ratio = "?" if self.ratio is None else f"{self.ratio:.3g}"
        return self.term, f"{self.weight:.4g}", f"{self.value:.4g}", f"{self.norm:.3g}", ratio, target

    @property
    def one_sided(self) -> bool:
        """Whether the gradients of term and task are more than 10:1 apart, in either direction."""
        return self.weight > 0 and self.ratio is not None and not 1 / LIMIT <= self.ratio <= LIMIT

    @property
    def warning(self) -> str:
        """One line on a term that is one-sided."""
        ratio = self.ratio or 0.0
        times = f"{ratio:.3g} times" if ratio > 1 or not ratio else f"1/{1 / ratio:.3g} of"
        return (
            f"the gradient of {self.term} at the student's backbone has {times} the task's norm; change its weight "
            f"{self.weight:.4g}, or let TRANSFER.AUTO_WEIGHT choose it, for example {{{self.term}: 1.0}}"
        )


def gradient_norms(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """The L2 norms (L,) of the gradients that L ``losses``, scalars of one forward pass, have in all ``parameters``.

    In float32: 0 where a loss depends on none of the parameters, inf where it isn't finite.  The graph stays, so that
    the losses can still go backward; no ``.grad`` is touched and nothing is drawn.
    """
    norms = []
    with torch.autocast(losses[0].device.type, enabled=False):
        for loss in losses:
            found: Sequence[Tensor | None] = ()
            if loss.requires_grad:
                found = torch.autograd.grad(loss * SCALE, parameters, retain_graph=True, allow_unused=True)
            squares = [gradient.float().square().sum() for gradient in found if gradient is not None]
            norms.append(torch.stack(squares).sum().sqrt() / SCALE if squares else loss.new_zeros(()).float())
    return torch.nan_to_num(torch.stack(norms).detach(), nan=math.inf, posinf=math.inf)


class GradientBalance(nn.Module):
    """Measure the terms of one method against the task in the first steps, and set the weights that are to be chosen.

    A term with a share (the target ratio of gradient norms, term / task) gets the weight at which it has that share: in
    each of the first :data:`STEPS` steps by the median of what was measured so far, then for good.  What was measured
    is in the state dict, so that a resumed run has the same weights.  Several processes measure their own images and
    take the mean of the norms.  ``weights`` are changed in place; ``lines`` is the report, after the last step.
    """

    norms: Tensor

    def __init__(self, weights: dict[str, float], shares: Mapping[str, float]) -> None:
        super().__init__()
        self.weights, self.shares = weights, dict(shares)
        self.measured = 0
        self.lines: list[TermBalance] = []
        # a row a step: the task's norm, then that of each term at weight 1; NaN is not measured
        empty = torch.full((STEPS if shares else 1, 1 + len(weights)), math.nan)
        self.register_buffer("norms", empty, persistent=bool(shares))
        self.register_load_state_dict_post_hook(lambda module, _: module._resume())

    def wants(self, step: int) -> bool:
        """Return whether a step is measured: the first, or as many as it takes to choose weights; each once."""
        due = step >= self.measured if self.shares else step == 0
        return bool(self.weights) and self.measured < len(self.norms) and due

    def forward(self, task: Tensor, terms: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Measure one step; return the terms by the weights that hold now.

        ``task`` is the student's loss without a teacher, ``terms`` are this step's, ``parameters`` the trainable ones
        of the student's backbone.  A ValueError says that a term to be weighed has no gradient there.
        """
        before = dict(self.weights)
        norms = gradient_norms([task, *terms.values()], parameters)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(norms)
            norms /= dist.get_world_size()
        scale = norms.new_tensor([1.0, *(before[name] or 1.0 for name in terms)])
        self.norms[self.measured] = norms / scale
        self.measured += 1
        self._choose()
        values = {
            name: value * (self.weights[name] / before[name]) if name in self.shares else value
            for name, value in terms.items()
        }
        if self.measured == len(self.norms):
            self.lines = [self._line(name, float(value.detach())) for name, value in values.items()]
        return values

    def _resume(self) -> None:
        self.measured = int((~self.norms[:, 0].isnan()).sum())
        self._choose()

    def _choose(self) -> None:
        for name, share in self.shares.items():
            ratios = [ratio for ratio in self._ratios(name) if ratio > 0]
            if ratios:
                self.weights[name] = share / median(ratios)
            elif self.measured == len(self.norms):
                raise ValueError(
                    f"AUTO_WEIGHT: {name} or the task has no finite gradient at the student's backbone in the first "
                    f"{self.measured} steps, so no weight gives it a share; give it a weight"
                )

    def _norms(self, name: str) -> list[tuple[float, float]]:
        """Return the norms of task and term, at weight 1, of each measured step."""
        column = 1 + list(self.weights).index(name)
        return [(row[0], row[column]) for row in self.norms[: self.measured].tolist()]

    def _ratios(self, name: str) -> list[float]:
        """Return term / task of each step in which both are finite."""
        return [term / task for task, term in self._norms(name) if 0 < task < math.inf and term < math.inf]

    def _line(self, name: str, value: float) -> TermBalance:
        weight, ratios = self.weights[name], self._ratios(name)
        norm = weight * median(term for _, term in self._norms(name))
        ratio = weight * median(ratios) if ratios else None
        return TermBalance(name, weight, value, norm, ratio, self.shares.get(name))
