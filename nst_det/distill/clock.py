"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up seconds by part.

    Args:
        waits_for: a GPU, to wait for it at each reading; slower, and right there.
        timer: gives seconds.

    Example:
        >>> clock = Clock()
        >>> with clock("data"):
        ...     pass
        >>> sorted(clock.seconds)
        ['data']
    """

    def __init__(self, waits_for: torch.device | None = None, timer: Callable[[], float] = time.perf_counter) -> None:
        self.timer = timer
        self.waits_for = waits_for
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time of a block under ``part``."""
        start = self.now()
        yield
        self.seconds[part] += self.now() - start

    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def now(self) -> float:
        """Seconds on the timer; the GPU's work is done before, if the clock waits for it."""
        if self.waits_for is not None and self.waits_for.type == "cuda":
            torch.cuda.synchronize(self.waits_for)
        return self.timer()
