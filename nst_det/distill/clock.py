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
        exact: wait for the GPU at each reading; slower, and right there.
        timer: gives seconds.

    Example:
        >>> clock = Clock()
        >>> with clock("data"):
        ...     pass
        >>> sorted(clock.seconds)
        ['data']
    """

    def __init__(self, exact: bool = False, timer: Callable[[], float] = time.perf_counter) -> None:
        self.timer = timer
        self.exact = exact and torch.cuda.is_available()
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
        """Seconds on the timer; the GPU's work is done before, if the clock is exact."""
        if self.exact:
            torch.cuda.synchronize()
        return self.timer()
