import itertools
import os
import time

import psutil
import pytest
import torch

from nst_det.engine.loader import Packed, load
from nst_det.errors import UserError


class Squares:
    """Item k is k squared; item 7 is the user's fault."""

    def __getitem__(self, key):
        if key == 7:
            raise UserError("seven.txt: not a square; take it out")
        return {"square": torch.tensor(key**2), "worker": os.getpid() if key == 100 else None}


def same(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(one, other)


def storages(items):
    return {value.untyped_storage().data_ptr() for item in items for value in item.values() if torch.is_tensor(value)}


def test_a_packed_batch_has_a_tensor_a_dtype_and_comes_out_as_it_was(monkeypatch):
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8).to(memory_format=torch.channels_last)
    flipped, expanded = images[0, :, ::2].flip(2), torch.arange(3, dtype=torch.uint8)[:, None].expand(3, 4)
    batch = [
        {"image": images, "boxes": torch.rand(2, 4), "labels": torch.arange(2), "id": "a", "seed": 2**62},
        {"image": flipped, "boxes": torch.zeros(0, 4), "labels": torch.tensor(5), "more": ("x", None)},
        {"image": expanded, "masks": torch.rand(3, 3) > 0.5},
    ]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    for packed in (Packed(batch), Packed(batch).pin_memory()):
        found = packed.unpack()
        assert [list(item) for item in found] == [list(item) for item in batch]
        for item, wanted in zip(found, batch):
            for name, value in wanted.items():
                if isinstance(value, torch.Tensor):
                    same(item[name], value)
                else:
                    assert item[name] == value
        assert len(storages(found)) == 4
        assert found[0]["image"].stride() == images.stride()
        found[0]["image"].zero_()
        same(found[1]["image"], flipped)
    assert storages(found) == storages([dict(enumerate(pinned))])
    (sparse,) = Packed([torch.eye(3).to_sparse()]).unpack()
    same(sparse.to_dense(), torch.eye(3))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_come_in_order(workers):
    keys = [3, [1, 2], 5, [6], 9, 8, 11]
    found = list(load(Squares(), keys, workers))
    assert [
        [int(one["square"]) for one in item] if isinstance(item, list) else int(item["square"]) for item in found
    ] == [[1, 4] if key == [1, 2] else [36] if key == [6] else key**2 for key in keys]
    assert list(load(Squares(), [], workers)) == []
    endless = load(Squares(), itertools.count(20), workers)
    assert [int(next(endless)["square"]) for _ in range(5)] == [400, 441, 484, 529, 576]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_user_comes_out_as_it_is(workers):
    with pytest.raises(UserError) as caught:
        list(load(Squares(), range(20), workers))
    assert str(caught.value) == "seven.txt: not a square; take it out"


def test_a_loader_leaves_the_random_state_alone():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    list(load(Squares(), range(3), 2))
    assert torch.equal(torch.rand(2), wanted)


def test_workers_end_when_nobody_listens_any_more():
    others = psutil.Process().children()
    batches = load(Squares(), itertools.repeat(100), 3)
    worker = psutil.Process(next(batches)["worker"])
    assert worker.ppid() == os.getpid()
    # of a group of their own: the terminal's signals are for the command alone
    assert os.getpgid(worker.pid) != os.getpgrp()
    workers = [child for child in psutil.Process().children() if child not in others]
    assert worker in workers
    del batches
    latest = time.monotonic() + 60
    while any(child in psutil.Process().children() for child in workers):
        assert time.monotonic() < latest, "a worker is still there"
        time.sleep(0.05)
