"""Batches made ahead by worker processes: the same ones in the same order, whatever the number of workers.

A :class:`~nst_det.errors.UserError` in a worker comes out as it is: the error itself knows its line in the traceback
that a loader hands over.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nst_det.engine.signals import end_with_parent


def load(source: Any, keys: Iterable[Any], workers: int, device: str = "cuda") -> Iterator[Any]:
    """``source[key]`` for each key in turn; for a key that is a list, the list of its items.

    Args:
        source: anything with ``[]``; what it gives depends on the key alone.
        keys: may be without end.
        workers: processes that work ahead; 0 makes each batch here, when it is asked for.
        device: to which the batches will go; copies from workers to a GPU of this machine needn't wait.

    Example:
        >>> list(load({1: "one", 2: "two"}, [2, [1, 2]], workers=0))
        ['two', ['one', 'two']]
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


class _Batches(Dataset[Any]):
    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, key: Any) -> Any:
        return [self.source[one] for one in key] if isinstance(key, list) else self.source[key]


def end_workers_with_us(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader, whose workers will end when this process ends, however that ends; a signal to its group is its alone.

    The workers must be started by a thread that lives as long as they are needed: Linux takes its end for the parent's.
    """
    if loader.num_workers:
        loader.worker_init_fn = partial(_begin_worker, os.getpid(), loader.worker_init_fn)
        if sys.platform == "linux":
            # children of this very process, which share what it has decoded; no longer the default in Python 3.14
            loader.multiprocessing_context = "fork"
    return loader


def _begin_worker(parent: int, then: Callable[[int], None] | None, worker: int) -> None:
    os.setpgrp()
    end_with_parent(parent)
    if then is not None:
        then(worker)


class Packed:
    """A batch on its way from a worker: its tensors in one a dtype, as each costs both processes a file descriptor.

    Args:
        batch: tensors (...,) in anything that can be pickled.

    Example:
        >>> Packed([{"image": torch.ones(3, 2, 2), "id": "a"}, {"boxes": torch.zeros(0, 4)}]).unpack()[0]["id"]
        'a'
    """

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
        """The same in pinned memory, as a loader asks for it."""
        self._flat = {dtype: flat.pin_memory() for dtype, flat in self._flat.items()}
        return self

    def unpack(self) -> Any:
        """The batch; its tensors (...,) are views of this memory."""
        return _Unpickler(io.BytesIO(self._rest), self._views()).load()


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


class _Unpickler(pickle.Unpickler):
    """Puts tensors in."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]
