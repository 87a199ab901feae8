"""Batches made ahead by worker processes: the same ones in the same order, whatever the number of workers."""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nst_det.engine.signals import end_with_parent

Item = TypeVar("Item")
Made = TypeVar("Made")


def load(source: Any, keys: Iterable[Any], workers: int, device: str = "cuda") -> Iterator[Any]:
    """Give ``source[key]`` for each key in turn; for a key that is a list, the list of its items.

    What ``source`` gives depends on the key alone.  With 0 workers each batch is made here, when it is asked for; with
    more they are pinned where ``device``, to which they will go, is a GPU.
    """
    batches = _Batches(source)
    if workers == 0:
        yield from map(batches.__getitem__, keys)
        return
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=Packed,
        pin_memory=device.startswith("cuda") and torch.cuda.is_available(),
        # a loader that is started draws a seed for its workers; not from the generator that the run draws from
        generator=torch.Generator(),
    )
    for packed in end_workers_with_us(loader):
        yield packed.unpack()


def together(make: Callable[[Item], Made], items: Iterable[Item], threads: int) -> list[Made]:
    """Return ``make(item)`` for each item, made by that many threads of this process while it waits."""
    if threads < 2:
        return list(map(make, items))
    todo = enumerate(list(items))

    def work(_: int) -> list[tuple[int, Made]]:
        # one task an item would cost more than a small image
        return [(place, make(item)) for place, item in todo]

    with ThreadPoolExecutor(threads) as pool:
        made = dict(pair for pairs in pool.map(work, range(threads)) for pair in pairs)
    return [made[place] for place in range(len(made))]


class _Batches(Dataset[Any]):
    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, key: Any) -> Any:
        return [self.source[one] for one in key] if isinstance(key, list) else self.source[key]


def end_workers_with_us(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the loader, whose workers will end when this process ends in any way, and get no signal to its group.

    The thread that starts the workers must live as long as they are needed: Linux takes its end for the parent's.
    """
    if loader.num_workers:
        loader.worker_init_fn = partial(_begin_worker, os.getpid(), loader.worker_init_fn)
        if sys.platform == "linux":
            # children of this very process, which share what it has decoded; no longer the default in Python 3.14
            loader.multiprocessing_context = "fork"
    return loader


def _begin_worker(parent: int, then: Callable[[int], None] | None, worker: int) -> None:
    # Windows has no process groups
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    end_with_parent(parent)
    if then is not None:
        then(worker)


class Packed:
    """A pickled batch from a worker, in one tensor a dtype, as each costs both processes a file descriptor."""

    def __init__(self, batch: Any) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(batch)
        self._rest = file.getvalue()
        self._places: list[tuple[torch.dtype, torch.Size, tuple[int, ...], int]] = []
        sizes: dict[torch.dtype, int] = {}
        for tensor in pickler.tensors:
            # with its strides, unless these leave out memory
            like = torch.empty_like(tensor, device="meta")
            start = sizes.get(like.dtype, 0)
            self._places.append((like.dtype, like.size(), like.stride(), start))
            sizes[like.dtype] = start + like.numel()
        self._flat = {dtype: torch.empty(size, dtype=dtype) for dtype, size in sizes.items()}
        for view, tensor in zip(self._views(), pickler.tensors):
            view.copy_(tensor)

    def _views(self) -> list[Tensor]:
        return [self._flat[dtype].as_strided(size, stride, start) for dtype, size, stride, start in self._places]

    def pin_memory(self) -> Packed:
        """Return the same in pinned memory; the loader calls it."""
        self._flat = {dtype: flat.pin_memory() for dtype, flat in self._flat.items()}
        return self

    def unpack(self) -> Any:
        """Return the batch; its tensors are views of this memory."""
        unpickler = pickle.Unpickler(io.BytesIO(self._rest))
        unpickler.persistent_load = self._views().__getitem__  # type: ignore[method-assign]
        return unpickler.load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if type(value) is not Tensor or value.layout != torch.strided:
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1
