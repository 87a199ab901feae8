"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


class Clock:
    """Adds up seconds by part.

    Args:
        exact: the GPU to wait for at each reading, slower, and right there; None waits for none.
        timer: gives seconds.

    Example:
        >>> clock = Clock()
        >>> with clock("data"):
        ...     pass
        >>> sorted(clock.seconds)
        ['data']
    """

    def __init__(self, exact: torch.device | None = None, timer: Callable[[], float] = time.perf_counter) -> None:
        self.timer = timer
        self.exact = exact if exact is not None and exact.type == "cuda" else None
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
        if self.exact is not None:
            torch.cuda.synchronize(self.exact)
        return self.timer()
