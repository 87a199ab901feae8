"""Several processes that train one run together, as torchrun starts them; all of it works in a single process too.

Every process holds the same weights, optimizer state and running statistics, to the bit, after each step: gradients
and statistics are averaged over all, everything else is drawn from (seed, step, image).  The main process alone owns
the run folder; the others are sent what they need of it, so that no other machine needs the folder.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nst_det.engine.device import gpu_errors_in_one_line
from nst_det.errors import UserError

log = logging.getLogger(__name__)
# while the main process writes, evaluates or draws a report, the others wait
TIMEOUT = timedelta(hours=12)

T = TypeVar("T")


def started_together() -> int:
    """Return how many processes torchrun started with this one, whether or not they are connected yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_processes(on_cpu: bool) -> None:
    """Connect the processes that torchrun started, by NCCL with a GPU each, or by gloo on the CPU."""
    if started_together() == 1 or dist.is_initialized():
        return
    on_cpu = on_cpu or not torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and here > torch.cuda.device_count():
        raise UserError(
            f"torchrun started {here} processes here, but there are {torch.cuda.device_count()} GPUs; take as many as "
            "there are GPUs"
        )
    with gpu_errors_in_one_line("take fewer processes"):
        if not on_cpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo" if on_cpu else "nccl", timeout=TIMEOUT)


def stop_processes() -> None:
    """Disconnect at the end of a command that ended well; a process that fails is ended by torchrun, with all."""
    if dist.is_initialized() and started_together() > 1:
        wait_for_all()
        dist.destroy_process_group()
        _host_group.cache_clear()


def speaks_of_error() -> bool:
    """Return whether this process reports why all of them end: of several that fail, the first to ask."""
    if started_together() == 1:
        return True
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        asked: int = dist.distributed_c10d._get_default_store().add("nst_det/speaks_of_error", 1)
    except RuntimeError:
        # rank 0, which keeps the store, exited after reporting the error
        return False
    return asked == 1


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0, also before they are connected."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if started_together() > 1 else 0


def is_main_process() -> bool:
    """Return whether this process is rank 0, which owns the run folder and logs."""
    return rank() == 0


@cache
def _host_group() -> Any:
    # NCCL would take a pickled checkpoint through the memory of every GPU
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.get_backend() == "nccl" else None


def broadcast_from_rank0(compute: Callable[[], T]) -> T:
    """Return what ``compute`` gives in the main process, in all of them; the others don't call it."""
    if world_size() == 1:
        return compute()
    values: list[Any] = [compute() if is_main_process() else None]
    dist.broadcast_object_list(values, src=0, group=_host_group())
    found: T = values[0]
    return found


def gathered(value: T) -> list[T]:
    """Return the value of every process, by rank, in all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group())
    return values


def largest_of_processes(sizes: Sequence[int]) -> list[int]:
    """Return the largest of each number over all processes, which no GPU is asked for or waited for."""
    if world_size() == 1:
        return list(sizes)
    found = torch.tensor(list(sizes))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_host_group())
    return list(map(int, found.tolist()))


def wait_for_all() -> None:
    """Wait until all processes come here, on the host: GPUs go on, and none is kept busy by it."""
    if world_size() > 1:
        dist.barrier(group=_host_group())


def copy_from_first(*modules: nn.Module) -> None:
    if world_size() > 1:
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), src=0)


def mean_of_processes(values: Tensor) -> Tensor:
    """Return the mean over all processes, without gradient; ``values`` are changed."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def average(tensors: Iterable[Tensor]) -> None:
    """Change floating point tensors to their means over all processes, in one exchange."""
    tensors = list(tensors)
    if world_size() == 1 or not tensors:
        return
    flat = mean_of_processes(torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors]))
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.detach().copy_(mean.view(tensor.shape))


def average_gradients(parameters: Iterable[Tensor], others: Iterable[Tensor] = ()) -> None:
    """Change gradients, and other floating point tensors, to their means over all processes, in one exchange.

    A parameter without a gradient in all processes keeps none; where only some have one, the others' is 0.
    """
    if world_size() == 1:
        return
    parameters = list(parameters)
    there = largest_of_processes([int(item.grad is not None) for item in parameters])
    gradients = [torch.zeros_like(item) if item.grad is None else item.grad for item in parameters]
    average([*gradients, *others])
    for item, mean, used in zip(parameters, gradients, there):
        item.grad = mean if used else None


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Return the running means and variances that training changes: those of layers in training mode."""
    return [
        statistic
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
        for statistic in (layer.running_mean, layer.running_var)
        if statistic is not None
    ]


def share_of(images: int, key: str, accumulate: int = 1) -> slice:
    """Return this process's part of a batch, which it cuts into ``accumulate`` parts; ``key`` is named in errors."""
    parts = world_size() * accumulate
    if images % parts:
        into = [f"{world_size()} processes"] * (world_size() > 1) + [f"{accumulate} parts each"] * (accumulate > 1)
        raise UserError(f"{key}: {images} images a step can't be shared out to {' of '.join(into)}; use a multiple")
    share = images // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def log_batch(images: int, accumulate: int, rate: float) -> None:
    """Log what a step is made of, where it has several processes or parts, and what the learning rate belongs to."""
    processes = world_size()
    if processes * accumulate == 1 or not is_main_process():
        return
    each = images // (processes * accumulate)
    parts = f"{processes} processes x {each} images" + (f" x {accumulate} parts" if accumulate > 1 else "")
    log.info(
        f"{parts} = {images} images a step (SOLVER.IMS_PER_BATCH); BASE_LR {rate:g}, MAX_ITER and the schedule are for "
        f"steps of {images} images, and stay as they are with any number of processes"
    )
