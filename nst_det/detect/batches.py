"""Which images make up the batch of a step: a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from nst_det.runtime.seeds import derive_seed


class Place(NamedTuple):
    """One image of one batch: which image, at which step, as which of the batch."""

    image: int
    step: int
    slot: int


class StepBatches:
    """The batches of steps ``start``, ``start + 1``, ... without end.

    Every epoch is a permutation of all images; a batch may span two epochs.  Where ``wide`` is given, wide and tall
    images are not mixed in one batch: each kind waits until it fills one (Detectron2's aspect ratio grouping).

    Args:
        size: number of images.
        batch: images a step.
        seed: of the run.
        start: the first step to give.
        wide: for each image, whether it is wider than high; None mixes them.
        share: which of a batch's places to give, those of one process; None gives all.

    Example:
        >>> places = iter(StepBatches(size=4, batch=2, seed=0))
        >>> sorted(place.image for _ in range(2) for place in next(places))
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        size: int,
        batch: int,
        seed: int,
        start: int = 0,
        wide: Sequence[bool] | None = None,
        share: slice | None = None,
    ) -> None:
        if size < 1 or batch < 1:
            raise ValueError(f"no batches of {batch} from {size} images")
        self.size, self.batch, self.seed, self.start, self.wide = size, batch, seed, start, wide
        self.share = share or slice(None)

    def __iter__(self) -> Iterator[list[Place]]:
        for step, indices in enumerate(self._batches()):
            # passing over the steps that are done takes a microsecond an image, none is read for it
            if step >= self.start:
                yield [Place(index, step, slot) for slot, index in enumerate(indices)][self.share]

    def _batches(self) -> Iterator[list[int]]:
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for index in self._order():
            bucket = waiting[self.wide is None or self.wide[index]]
            bucket.append(index)
            if len(bucket) == self.batch:
                yield list(bucket)
                bucket.clear()

    def _order(self) -> Iterator[int]:
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            yield from torch.randperm(self.size, generator=generator).tolist()
            epoch += 1
