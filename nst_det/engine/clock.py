"""Where the time of a step goes, and how fast a training is."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

GIB = 2**30
# steps between two readings of the speed where no key says it; Detectron2 writes its own figures as often
SPEED_PERIOD = 20
# parts of a clock in which no step is made
BESIDE = ("evaluation", "checkpoints")


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


class Speed:
    """How fast a training is, over the steps since it was last asked.  The GPU is never waited for.

    Args:
        images: of a step, of all processes.
        device: what computes; the peak of its memory is taken from now on.
        clock: takes the time of the steps; of its parts, ``data`` is what they wait for.

    Attributes:
        steps: made since the last reading; the loop counts them.
    """

    def __init__(self, images: int, device: torch.device, clock: Clock) -> None:
        self.steps = 0
        self._images, self._device, self._clock = images, device, clock
        self._waited, self._spent = self._seconds()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def _seconds(self) -> tuple[float, float]:
        """What the clock has: waiting for data, and steps altogether."""
        seconds = self._clock.seconds
        return seconds["data"], self._clock.total() - sum(seconds.get(part, 0.0) for part in BESIDE)

    def read(self) -> dict[str, float]:
        """``speed/images_per_second``; ``speed/data_wait``, the share of the steps' time that they waited for data,
        0..1; on a GPU ``speed/gpu_memory_gib``, the most that was allocated at a time.
        """
        waited, spent = self._seconds()
        took = spent - self._spent
        row = {
            "speed/images_per_second": self._images * self.steps / took,
            "speed/data_wait": (waited - self._waited) / took,
        }
        if self._device.type == "cuda":
            row["speed/gpu_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / GIB
        self.steps, self._waited, self._spent = 0, waited, spent
        return row
