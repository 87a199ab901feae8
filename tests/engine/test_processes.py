import logging
import time

import pytest
import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch import nn

from nst_det.engine import distributed as processes
from nst_det.engine import nan_guard
from nst_det.engine.distributed import (
    average_gradients,
    broadcast_from_rank0,
    copy_from_first,
    gathered,
    largest_of_processes,
    log_batch,
    rank,
    share_of,
    speaks_of_error,
    start_processes,
    wait_for_all,
)
from nst_det.engine.nan_guard import NonFiniteGuard
from nst_det.errors import UserError
from nst_det.models.sync_norm import sync_batch_norm


def test_a_process_alone_is_the_first():
    largest = largest_of_processes([2, 1])
    assert (rank(), gathered("a"), broadcast_from_rank0(lambda: 3), largest) == (0, ["a"], 3, [2, 1])
    assert share_of(7, "IMS") == slice(0, 7)
    with pytest.raises(UserError, match="^IMS: 7 "):
        share_of(7, "IMS", accumulate=2)


def together():
    start_processes(on_cpu=True)
    mine = rank()
    used, half, never = (torch.full((2,), float(mine), requires_grad=True) for _ in range(3))
    used.grad = torch.tensor([1.0, 2.0]) * (mine + 1)
    half.grad = torch.tensor([4.0, 6.0]) if mine else None
    other = torch.tensor([10.0 * mine])
    average_gradients([used, half, never], [other])
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.weight, mine)
    copy_from_first(layer)
    return {
        "gradients": [None if item.grad is None else item.grad.tolist() for item in (used, half, never)],
        "other": other.tolist(),
        "share": share_of(8, "IMS", 2),
        "gathered": gathered(mine),
        "first": broadcast_from_rank0(lambda: mine),
        "largest": largest_of_processes([3 + mine, 9 - mine]),
        "weight": layer.weight.tolist(),
    }


def test_what_processes_do_together(in_processes):
    first, second = in_processes(together)
    shares = [found.pop("share") for found in (first, second)]
    assert shares == [slice(0, 4), slice(4, 8)]
    assert first == second
    assert first == {
        # where only one process has a gradient the other's is 0; where none has one there is none
        "gradients": [[1.5, 3.0], [2.0, 3.0], None],
        "other": [5.0],
        "gathered": [0, 1],
        "first": 0,
        "largest": [4, 9],
        "weight": [[0.0, 0.0]],
    }


def by_host_memory():
    start_processes(on_cpu=True)
    asked = []
    gathers, broadcasts = dist.all_gather_object, dist.broadcast_object_list
    dist.get_backend, backend = lambda group=None: "nccl", dist.get_backend
    dist.all_gather_object = lambda *args, group: (asked.append(group), gathers(*args, group=group))
    dist.broadcast_object_list = lambda *args, group, **rest: (
        asked.append(group),
        broadcasts(*args, group=group, **rest),
    )
    barrier = dist.barrier
    dist.barrier = lambda group=None: (asked.append(group), barrier(group=group))
    found = gathered(rank()), broadcast_from_rank0(lambda: "a")
    wait_for_all()
    return found, len(set(asked)), [backend(group) for group in asked if group is not None]


def test_objects_do_not_travel_through_gpus_nor_do_these_wait(in_processes):
    # were the processes on GPUs
    assert in_processes(by_host_memory) == [(([0, 1], "a"), 1, ["gloo"] * 3)] * 2


def not_finite(folder):
    start_processes(on_cpu=True)
    write = nan_guard.write_state

    def slow(*args):
        time.sleep(0.5)
        write(*args)

    nan_guard.write_state = slow
    node = CfgNode({"POLICY": "stop", "LIMIT": 3})
    with pytest.raises(UserError, match="not finite at step 4: loss"):
        NonFiniteGuard(node, folder, nn.Linear(1, 1)).handle(4, ["loss"] * (1 - rank()), ["image"], dict)
    # torchrun ends all processes as soon as this one ends
    return [path.name for path in folder.glob("nonfinite/*.pt")]


def test_no_process_ends_while_the_dump_of_a_step_is_written(tmp_path, in_processes):
    assert in_processes(not_finite, tmp_path) == [["step-00000004.pt"]] * 2


def failing():
    start_processes(on_cpu=True)
    spoken = speaks_of_error()
    return spoken, speaks_of_error()


def test_one_process_reports_why_all_end(in_processes, monkeypatch):
    assert speaks_of_error()
    assert sorted(in_processes(failing)) == [(False, False), (True, False)]
    # before they have met: one a machine
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert speaks_of_error()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not speaks_of_error()


def synchronized(x, target, make):
    start_processes(on_cpu=True)
    layer = sync_batch_norm(make())
    share = share_of(len(x), "B")
    mine = x[share].clone().requires_grad_()
    # a mean over all processes, as training takes it
    ((layer(mine) - target[share]) ** 2).mean().backward()
    average_gradients(list(layer.parameters()))
    gradients = [item.grad for item in layer.parameters()]
    return [mine.grad, layer.eval()(x).detach(), *gradients, layer.running_mean, layer.running_var]


@pytest.mark.parametrize("kind", ["torch's", "timm's"])
def test_synchronized_normalization_is_that_of_the_whole_batch(in_processes, kind):
    def make():
        if kind == "torch's":
            return nn.BatchNorm2d(3, momentum=0.3)
        from timm.layers import BatchNormAct2d

        return BatchNormAct2d(3)

    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(6, 3, 4, 5, generator=generator) * 2 + 7 for _ in range(2))
    plain, whole = make(), x.clone().requires_grad_()
    ((plain(whole) - target) ** 2).mean().backward()
    gradients = [item.grad for item in plain.parameters()]
    expected = [plain.eval()(x).detach(), *gradients, plain.running_mean, plain.running_var]
    found = in_processes(synchronized, x, target, make)
    for answers in found:
        for value, wanted in zip(answers[1:], expected):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    # each one's loss is a mean over half of the images
    shared = torch.cat([answers[0] for answers in found]) / 2
    torch.testing.assert_close(shared, whole.grad, rtol=1e-4, atol=1e-6)


def test_synchronized_normalization_in_one_process_is_the_plain_one():
    plain, layer = nn.BatchNorm2d(3), sync_batch_norm(nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(plain(x), layer(x))
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in layer.state_dict().items())


def test_the_parts_of_a_step_are_logged(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    log_batch(16, 1, 0.1)
    assert not caplog.text
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    log_batch(16, 2, 0.1)
    assert "4 processes x 2 images x 2 parts = 16 images" in caplog.text


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes .* 1 GPU"):
        start_processes(on_cpu=False)
