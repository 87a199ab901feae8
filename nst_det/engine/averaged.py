"""An exponential moving average of the weights in training (SOLVER.EMA_DECAY): what a run evaluates and writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.utils import ModelEmaV3
from torch import nn


class AveragedWeights:
    """A network beside the one in training, whose weights follow it as an exponential moving average.

    After optimizer step t = 1, 2, .. the average becomes ``d * average + (1 - d) * weights`` with
    ``d = min(decay, 1 - t ** (-2 / 3))``: it begins as the weights of the first step, and d rises, so that a short run
    doesn't keep the random weights that it began with.  Running means and variances of normalization are averaged
    alike; counters (``num_batches_tracked``) are copied.  A step that the optimizer didn't make is not counted.

    It costs one pass over the weights a step, and the memory of one more network.

    Args:
        trained: the network in training, on its device.
        decay: above 0 and below 1, such as 0.999.
        beside: a network of the same build to copy, where ``trained`` has hooks that a copy must not have.

    Attributes:
        network: the average, in evaluation mode; never trained.
        steps: optimizer steps in it.

    Source: timm's ``ModelEmaV3``, with its warm-up of the decay.

    Example:
        >>> import torch
        >>> trained = nn.Linear(1, 1, bias=False)
        >>> average = AveragedWeights(trained, 0.9)
        >>> for value in (8.0, 0.0):
        ...     _ = trained.weight.data.fill_(value)
        ...     average.update()
        >>> round(average.network.weight.item(), 4)  # 8 * (1 - 2 ** (-2 / 3))
        2.9603
    """

    def __init__(self, trained: nn.Module, decay: float, beside: nn.Module | None = None) -> None:
        self._trained = trained
        self._average = ModelEmaV3(trained if beside is None else beside, decay, use_warmup=True)
        self.network: nn.Module = self._average.module.requires_grad_(False)
        self.steps = 0

    def update(self) -> None:
        """Take in the weights that an optimizer step has just made."""
        self.steps += 1
        self._average.update(self._trained, self.steps)

    def restart(self) -> None:
        """Become the weights in training, as before their first step."""
        self.steps = 0
        self._average.set(self._trained)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: ``network``, its state dict, and ``steps``."""
        return {"network": self.network.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`state_dict`.

        Raises:
            KeyError: an entry is missing.
            RuntimeError: it is of another network.
        """
        self.network.load_state_dict(state["network"])
        self.steps = int(state["steps"])
