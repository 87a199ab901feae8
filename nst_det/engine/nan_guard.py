"""A loss or a gradient that is no number: found before the optimizer takes it, named, kept for a replay, and met.

A training loop asks :func:`broken_values` after each backward pass.  Where it names something, the step is not made:
what the forward pass changed is put back, the batch is written to ``nonfinite/step-00000042.pt`` in the run folder
(``nst-det replay`` runs that step again), and the policy of SOLVER.NON_FINITE decides.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from nst_det.engine.checkpoint import load_checkpoint, write_state
from nst_det.engine.distributed import any_process, gathered, rank
from nst_det.engine.format import ReprMixin
from nst_det.errors import UserError

log = logging.getLogger(__name__)
STOP, SKIP, BACK = POLICIES = ("stop", "skip", "back")
SHOWN = 8
NORM = "the norm of all gradients"
_FIELDS = {"kind": str, "method": str, "seed": int, "not_finite": list, "images": list, "model": dict, "terms": dict}


class NotFinite(UserError):
    """Found in a pass; the message says what is no number, and is empty where the losses or another process tell."""


def raise_together(failed: bool, device: torch.device, what: str = "") -> None:
    """End the pass in all processes if it failed in one of them.

    All must come here, also those in which it didn't: one that ended alone would leave the others waiting for it.

    Args:
        failed: whether something is no number in this process.
        device: of the exchange.
        what: is no number, where it isn't a loss or a gradient.

    Raises:
        NotFinite: in all processes; the message is ``what`` in those that failed.
    """
    if any_process(failed, device):
        raise NotFinite(what if failed else "")


def non_finite_node() -> CfgNode:
    """SOLVER.NON_FINITE.

    POLICY is ``stop``, ``skip`` (the step is passed over, the schedule goes on) or ``back`` (to the last checkpoint,
    with the learning rate times LR_FACTOR from there on).  LIMIT is how often that may happen in one run.
    """
    return CfgNode({"POLICY": STOP, "LIMIT": 3, "LR_FACTOR": 0.5})


def check_non_finite(node: CfgNode, key: str, source: str = "config") -> None:
    """Refuse values that can't be followed.

    Raises:
        UserError: the line names the key.
    """
    if node.POLICY not in POLICIES:
        raise UserError(f"{source}: {key}.POLICY '{node.POLICY}' is not one of {', '.join(POLICIES)}")
    if node.LIMIT < 1:
        raise UserError(f"{source}: {key}.LIMIT is {node.LIMIT}; it must be at least 1")
    if not 0 < node.LR_FACTOR <= 1:
        raise UserError(f"{source}: {key}.LR_FACTOR is {node.LR_FACTOR}; it must be above 0 and at most 1")


def broken_values(
    terms: Mapping[str, float], parts: Mapping[str, Mapping[str, Tensor]], gradients: Mapping[str, Tensor]
) -> list[str]:
    """What is no number in a step: loss terms, those of maps with their levels; where all are, gradients.

    Args:
        terms: name to value.
        parts: transfer term to the values (scalars) of its places, see ``TransferLoss.parts``.
        gradients: parameter to gradient (...,); looked at only where all terms are finite.

    Example:
        >>> nan = torch.tensor(math.nan)
        >>> broken_values({"ce": 1.0, "at": math.nan}, {"at": {"res3": torch.ones(()), "res4": nan}}, {})
        ['at (res4)']
    """
    found = []
    for name, value in terms.items():
        if not math.isfinite(value):
            places = [place for place, part in _parts_of(name, parts).items() if not bool(part.isfinite())]
            found.append(f"{name} ({', '.join(places)})" if places else name)
    if found:
        return found
    return [f"the gradient of {name}" for name, value in gradients.items() if not bool(value.isfinite().all())]


def _parts_of(name: str, parts: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    # stage two writes loss_transfer_at for the term at
    return next((value for term, value in parts.items() if name in (term, f"loss_transfer_{term}")), {})


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """L2 norm of the gradients of parameters of any shape (...,) together, a scalar; not finite if one entry isn't."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients, foreach=True)


class Buffers:
    """What a forward pass changes in a network (running statistics), to be put back where the step is not made."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self._kept: list[tuple[Tensor, Tensor]] = []

    def keep(self) -> None:
        """Remember them as they are."""
        self._kept = [(own, own.clone()) for module in self._modules if module.training for own in module.buffers()]

    def restore(self) -> None:
        """Put them back."""
        with torch.no_grad():
            for own, kept in self._kept:
                own.copy_(kept)


class NonFinite:
    """How one network meets values that are no numbers, and how often it has.

    Args:
        node: SOLVER.NON_FINITE.
        folder: of the run.
        who: named in messages, such as the student's method.

    Attributes:
        count: steps passed over, or times gone back.
        rate: on the learning rate; less than 1 after going back.
    """

    def __init__(self, node: CfgNode, folder: Path, who: str = "") -> None:
        self.node, self.folder, self.who = node, folder, who
        self.count, self.rate = 0, 1.0

    @property
    def needs_first_checkpoint(self) -> bool:
        """Whether a checkpoint before the first step is needed, to go back to."""
        return bool(self.node.POLICY == BACK)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"count": self.count, "rate": self.rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.count, self.rate = int(state.get("count", 0)), float(state.get("rate", 1.0))

    def meet(self, step: int, names: Sequence[str], images: Sequence[str], content: Mapping[str, Any]) -> str:
        """Write what a replay needs, then say ``skip`` or ``back``.

        Of several processes, all come here; the first one in which something was found writes.

        Args:
            step: in which it was found.
            names: of what is no number in this process.
            images: ids of its batch.
            content: of the file, tensors and plain values; step, names and ids are added.

        Raises:
            UserError: the policy is to stop, or LIMIT is reached; names, ids and file are in the line.
        """
        path = self.folder / "nonfinite" / f"step-{step:08d}.pt"
        everywhere = gathered((list(names), list(images)))
        # where only the mean of all gradients is none, each may be at fault
        found_in = [number for number, (broken, _) in enumerate(everywhere) if broken] or list(range(len(everywhere)))
        names = list(dict.fromkeys(itertools.chain.from_iterable(everywhere[number][0] for number in found_in)))
        names = names or [NORM]
        images = list(itertools.chain.from_iterable(everywhere[number][1] for number in found_in))
        if rank() == found_in[0]:
            write_state(path, {**content, "step": step, "not_finite": names, "images": images})
        who = f"{self.who}: " if self.who else ""
        found = f"{who}not finite at step {step}: {listed(names)}; images {listed(images)}"
        kept = f"nst-det replay {path} runs this step again"
        if self.node.POLICY == STOP or self.count >= self.node.LIMIT:
            already = f" (after {self.count} times {self.node.POLICY}, SOLVER.NON_FINITE.LIMIT)" if self.count else ""
            raise UserError(
                f"{found}{already}; {kept}; lower SOLVER.BASE_LR or the term's weight, set SOLVER.CLIP_GRADIENTS, or "
                "SOLVER.NON_FINITE.POLICY skip or back"
            )
        self.count += 1
        what = "this step is passed over" if self.node.POLICY == SKIP else "going back to the last checkpoint"
        log.warning("%s; %s (%d of %d); %s", found, what, self.count, self.node.LIMIT, kept)
        return str(self.node.POLICY)

    def gone_back(self, count: int) -> None:
        """The last checkpoint is loaded, with its own count and rate: ``count`` holds, and the rate is lowered."""
        self.count = count
        self.rate *= self.node.LR_FACTOR
        log.warning("%slearning rate times %g from here on", f"{self.who}: " if self.who else "", self.rate)


def listed(names: Iterable[str]) -> str:
    """Some names on one line: the first few, and how many there are.

    Example:
        >>> listed("abcdefghijk")
        'a, b, c, d, e, f, g, h, ... (11 in all)'
    """
    all_names = [str(name) for name in names]
    more = f", ... ({len(all_names)} in all)" if len(all_names) > SHOWN else ""
    return ", ".join(all_names[:SHOWN]) + more


@dataclass
class Replayed(ReprMixin):
    """One step, again; shows itself as a table of its loss terms.

    Attributes:
        who: stage, method and step.
        recorded: loss term to its value in the run; empty where the pass ended before.
        terms: loss term to its value now.
        broken: what is no number now.
        was_broken: what was none in the run.
        images: ids of the batch.
        first: the first layer that made something that is no number of what was finite, or "".
    """

    who: str
    recorded: dict[str, float]
    terms: dict[str, float]
    broken: list[str]
    was_broken: list[str]
    images: list[str] = field(default_factory=list)
    first: str = ""

    @property
    def same(self) -> bool:
        """Whether the same was found as in the run."""
        return self.broken == self.was_broken

    def __rich__(self) -> Table:
        table = Table(title=Text(self.who))
        table.add_column("term")
        for name in ("in the run", "now"):
            table.add_column(name, justify="right")
        for name in dict.fromkeys([*self.recorded, *self.terms]):
            table.add_row(Text(name), *(_number(values.get(name)) for values in (self.recorded, self.terms)))
        return table

    @property
    def lines(self) -> list[str]:
        """What was found, in words."""
        lines = [f"not finite now: {', '.join(self.broken) or 'nothing'}"]
        lines += ["the same as in the run"] if self.same else [f"in the run: {', '.join(self.was_broken)}"]
        lines += [f"first in the layer {self.first}"] if self.first else []
        return [*lines, f"images: {', '.join(self.images)}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.9g}"


def read_step(path: str | Path) -> dict[str, Any]:
    """The content of a file that a training loop wrote into ``nonfinite/``; no code in it is executed.

    Raises:
        UserError: missing, damaged, or not one.
    """
    content = load_checkpoint(path)
    for name, kind in _FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise UserError(f"{path}: not a step to run again ('{name}' is missing); name a file in a run's nonfinite/")
    return content


class FirstBroken:
    """The first layer whose output is not finite though all its inputs are; "" if there is none."""

    def __init__(self) -> None:
        self.name = ""


@contextmanager
def first_broken(model: nn.Module) -> Iterator[FirstBroken]:
    """Watch the layers of a model within the block.

    Example:
        >>> with first_broken(nn.Sequential(nn.ReLU(), nn.LogSoftmax(1))) as found:
        ...     found.name
        ''
    """
    found = FirstBroken()

    def look(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not found.name and not _finite(output) and _finite(inputs):
                found.name = name

        return hook

    # Detectron2's convolution has its normalization inside
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if not list(layer.children()) or list(layer.parameters(recurse=False))
    ]
    handles = [layer.register_forward_hook(look(name)) for name, layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list | tuple) else True
