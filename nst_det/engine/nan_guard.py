"""A loss or a gradient that is not finite: found before the optimizer takes it, named, dumped and handled.

A trainer asks for the loss and the norm of all gradients after each backward pass.  Where one is not finite the step is
not made: :class:`NonFiniteGuard` restores what the forward pass changed, dumps all that the step depends on to
``nonfinite/step-00000042.pt`` in the run folder, and follows SOLVER.NON_FINITE.  :func:`replay` runs the step again.

On a GPU the trainer goes on without the answer.  There the optimizer itself passes over a step that :func:`not_finite`
marks, and the host, which reads the answer during the next step, then makes the first one again and waits for it.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor, nn

from nst_det.engine.checkpoint import SCHEMA, check_schema, load_checkpoint, write_state
from nst_det.engine.device import is_gpu_error
from nst_det.engine.distributed import gathered, largest_of_processes, rank, wait_for_all, world_size
from nst_det.engine.foreach import copy_together
from nst_det.engine.io import write_json
from nst_det.engine.keys import BACK, SKIP, STOP
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError

log = logging.getLogger(__name__)
SHOWN = 8
NORM = "the norm of all gradients"


class NotFinite(UserError):
    """A pass gave something that is not finite.

    The message names it, and is empty where the losses or another process already do.
    """


def raise_together(failed: bool, what: str = "") -> None:
    """Raise :class:`NotFinite` in all processes if a pass failed in one, with the message ``what`` where it failed.

    All must come here: one that ended alone would leave the others waiting for it.
    """
    if largest_of_processes([int(failed)])[0]:
        raise NotFinite(what if failed else "")


# flags on the device that nobody waits for; None where each is read at once
_flags: list[Tensor] | None = None


@contextmanager
def late_checks() -> Iterator[list[Tensor]]:
    """Within the block :func:`require_finite` waits for nothing; the list that is given gets its flags."""
    global _flags
    found: list[Tensor] = []
    _flags = found
    try:
        yield found
    finally:
        _flags = None


def require_finite(finite: Tensor, what: Callable[[], str]) -> None:
    """End the pass in all processes if ``finite``, a bool on the device, is False in one, where ``what()`` names it.

    Within :func:`late_checks` the pass goes on, and the trainer that asked for it throws its step away.
    """
    if _flags is not None:
        _flags.append(finite)
        return
    failed = not bool(finite)
    raise_together(failed, what() if failed else "")


def not_finite(values: Tensor) -> Tensor:
    """Return, for each row of (..., N), 1 where one of its numbers is not finite, else 0, on the device in float32."""
    total = values.sum(-1)
    # infinity less infinity is no number, and no number equals 0
    return (total - total).ne_(0)


def broken_values(
    terms: Mapping[str, float],
    parts: Mapping[str, Mapping[str, Tensor]],
    parameters: Iterable[tuple[str, Tensor]] = (),
) -> list[str]:
    """Name what is not finite in a pass of this process: loss terms, those of maps with their levels; else gradients.

    ``parts`` are the values of transfer terms at each place, see ``TransferLoss.parts``.
    """
    found = []
    for name, value in terms.items():
        if not math.isfinite(value):
            # stage two writes loss_transfer_at for the term at
            at = parts.get(name.removeprefix("loss_transfer_"), {})
            places = [place for place, part in at.items() if not _finite(part)]
            found.append(f"{name} ({', '.join(places)})" if places else name)
    if found or world_size() > 1:
        # gradients that several processes have averaged tell nothing of this one
        return found
    return [f"the gradient of {name}" for name, value in parameters if not _finite(value.grad)]


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, a scalar; not finite if one entry isn't."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients, foreach=True)


class NonFiniteGuard:
    """Follows SOLVER.NON_FINITE in the run of one network, ``who`` in its messages."""

    def __init__(self, node: CfgNode, folder: Path, model: nn.Module, who: str = "") -> None:
        self.node, self.folder, self.model, self.who = node, folder, model, f"{who}: " if who else ""
        # steps skipped or times rolled back; on the learning rate, less than 1 after rolling back
        self.count, self.rate = 0, 1.0
        # step to each buffer's copy before it
        self._kept: dict[int, dict[Tensor, Tensor]] = {}

    @property
    def needs_first_checkpoint(self) -> bool:
        """Whether a checkpoint before the first step is needed, to roll back to."""
        return bool(self.node.POLICY == BACK)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "rate": self.rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.rate = int(state["count"]), float(state["rate"])

    def keep_buffers(self, step: int) -> None:
        """Keep the buffers as they are before a step, beside those before the last one."""
        if not self.model.training:
            self._kept = {}
            return
        last = {number: kept for number, kept in self._kept.items() if number == step - 1}
        spare = [kept for number, kept in self._kept.items() if number not in last]
        kept = spare[0] if spare else {own: torch.empty_like(own) for own in self.model.buffers()}
        copy_together(list(kept.values()), list(kept))
        self._kept = {**last, step: kept}

    def buffers_before(self, step: int) -> Mapping[Tensor, Tensor]:
        """Return each buffer's copy before a step; nothing where the step hasn't begun."""
        return self._kept.get(step, {})

    def restore_buffers(self, step: int) -> None:
        """Make the buffers what they were before a step."""
        kept = self.buffers_before(step)
        copy_together(list(kept), list(kept.values()))
        self._kept = {}

    def handle(
        self, step: int, names: Sequence[str], images: Sequence[str], content: Callable[[], Mapping[str, Any]]
    ) -> str:
        """Restore buffers and dump the step; then stop, or return the policy, ``skip`` or ``back``.

        ``names`` are what is not finite in this process and ``images`` the ids of its batch; ``content`` gives the rest
        of the dump.  Of several processes, all come here; the first one in which something was found writes.
        """
        self.restore_buffers(step)
        path = self.folder / "nonfinite" / f"step-{step:08d}.pt"
        everywhere = gathered((list(names), list(images)))
        # where only the mean of all gradients is not finite, each process may be at fault
        found_in = [number for number, (broken, _) in enumerate(everywhere) if broken] or list(range(len(everywhere)))
        names = list(dict.fromkeys(itertools.chain.from_iterable(everywhere[number][0] for number in found_in)))
        names = names or [NORM]
        images = list(itertools.chain.from_iterable(everywhere[number][1] for number in found_in))
        policy = str(self.node.POLICY)
        ends = policy == STOP or self.count >= self.node.LIMIT
        if rank() == found_in[0]:
            write_state(path, {"schema": SCHEMA, **content(), "step": step, "not_finite": names, "images": images})
            if ends:
                write_json(RunFolder(self.folder).not_finite_path, {"step": step, "not_finite": names})
        # as soon as one process has ended the others are ended, also one that is still writing
        wait_for_all()
        found = f"{self.who}not finite at step {step}: {_first(names)}; images {_first(images)}"
        kept_in = f"nst-det replay {path} runs this step again"
        if ends:
            already = f" (after {self.count} times {policy}, SOLVER.NON_FINITE.LIMIT)" if self.count else ""
            raise UserError(
                f"{found}{already}; {kept_in}; lower SOLVER.BASE_LR or the term's weight, set SOLVER.CLIP_GRADIENTS, "
                "or SOLVER.NON_FINITE.POLICY skip or back"
            )
        self.count += 1
        what = "this step is skipped" if policy == SKIP else "rolling back to the last checkpoint"
        log.warning("%s; %s (%d of %d); %s", found, what, self.count, self.node.LIMIT, kept_in)
        return policy

    def roll_back(self, load: Callable[[], None], save: Callable[[], None]) -> None:
        """Load the last checkpoint and lower the learning rate from there on."""
        count = self.count
        load()
        # the checkpoint has its own count
        self.count = count
        self.rate *= self.node.LR_FACTOR
        # saved at once, so that a kill doesn't bring the former rate back
        save()
        log.warning("%slearning rate times %g from here on", self.who, self.rate)


def _first(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@dataclass
class Replayed:
    """One step, again: loss terms and what is not finite, now and in the run; the first layer with such an output."""

    who: str
    terms: dict[str, float]
    recorded: dict[str, float]
    broken: list[str]
    was_broken: list[str]
    images: list[str]
    first: str

    @property
    def same(self) -> bool:
        return self.broken == self.was_broken

    def __rich__(self) -> Table:
        table = Table("term", *(Column(name, justify="right") for name in ("in the run", "now")), title=Text(self.who))
        for name in dict.fromkeys([*self.recorded, *self.terms]):
            values = (self.recorded.get(name), self.terms.get(name))
            table.add_row(Text(name), *("-" if value is None else f"{value:.9g}" for value in values))
        return table

    @property
    def lines(self) -> list[str]:
        lines = [f"not finite now: {', '.join(self.broken) or 'nothing'}"]
        lines += ["the same as in the run"] if self.same else [f"in the run: {', '.join(self.was_broken)}"]
        lines += [f"first in the layer {self.first}"] if self.first else []
        return [*lines, f"images: {', '.join(self.images)}"]


def read_step(path: str | Path) -> dict[str, Any]:
    """Read the dump of a step; no code in it is executed."""
    content = load_checkpoint(path)
    check_schema(content, path)
    for name in ("kind", "not_finite"):
        if name not in content:
            raise UserError(f"{path}: not a step to run again ('{name}' is missing); name a file in a run's nonfinite/")
    return content


# what a dump is made into: the network to watch, and a call that makes the pass: loss terms, what is not finite
Step = tuple[nn.Module, Callable[[], tuple[dict[str, float], list[str]]]]


def replay(content: dict[str, Any], path: str | Path, rebuild: Callable[[dict[str, Any]], Step]) -> Replayed:
    """Run forward and backward of a dumped step again and find the first layer that was not finite."""
    first: list[str] = []

    def look(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not _finite(output) and _finite(inputs):
            first.append(name)

    try:
        model, run_step = rebuild(content)
        for name, layer in model.named_modules():
            # Detectron2's convolution has its normalization inside
            if not list(layer.children()) or list(layer.parameters(recurse=False)):
                layer.register_forward_hook(partial(look, name))
        try:
            terms, broken = run_step()
        except NotFinite as error:
            terms, broken = {}, [str(error)]
        who = f"{content['kind']}, {content['method']}, step {content['step']}"
        images, was_broken = (list(map(str, content[name])) for name in ("images", "not_finite"))
        return Replayed(who, terms, dict(content["terms"]), broken, was_broken, images, first[0] if first else "")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        if is_gpu_error(error):
            raise
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: can't be run again ({reason}); use the version that wrote it") from error


def _finite(value: Any) -> bool:
    """Return whether all floating point numbers in a nest of tensors are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list | tuple) else True
