"""Devices, processes and mixed precision, by accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator

from nst_det.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# more loader processes than this wait for each other
MOST_WORKERS = 8
_MIXED = {None: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def make_accelerator(precision: str = "auto", key: str = "SOLVER.AMP") -> Accelerator:
    """The accelerator of this process; its ``device`` and ``autocast()`` are what the stages use.

    Args:
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 where the hardware multiplies in it, else fp32.
        key: the config key that is named in the error.

    Raises:
        UserError: an unknown precision, or fp16 without a GPU.
    """
    return Accelerator(mixed_precision=_MIXED[amp_dtype(precision, key)])


def amp_dtype(precision: str = "auto", key: str = "SOLVER.AMP") -> torch.dtype | None:
    """The dtype of :func:`autocast` for a precision as :func:`make_accelerator` takes it; None is float32.

    Raises:
        UserError: an unknown precision, or fp16 without a GPU.
    """
    if precision not in PRECISIONS:
        raise UserError(f"{key}: unknown precision '{precision}'; use one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        precision = "bf16" if has_fast_bf16() else "fp32"
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError(f"{key}: fp16 needs a GPU; use bf16 or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def default_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def core_count() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers(asked: int, on_cpu: bool) -> int:
    """DATALOADER.NUM_WORKERS as it is in this run: of -1 none on a CPU, else one for each core of the run, up to 8.

    A run of a comparison has the cores that its number of threads says; processes of torchrun's, which sets that to 1,
    share those of their machine.

    Args:
        asked: the key's value.
        on_cpu: whether the run computes there: its loader processes would take the cores that the training needs.
    """
    if asked >= 0 or on_cpu:
        return max(asked, 0)
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = core_count() // together if together > 1 else min(core_count(), torch.get_num_threads())
    return max(1, min(cores, MOST_WORKERS))


def named_device(name: str, key: str = "--device") -> torch.device:
    """The device that a user names (``cpu``, ``cuda``, ``cuda:1``); "" takes :func:`default_device`.

    Raises:
        UserError: no such device, or it is not here.
    """
    if not name:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise UserError(f"{key}: '{name}' can't be used here; leave it out, or name cpu or cuda") from error
    return device


def has_fast_bf16() -> bool:
    """Whether matrix products in bf16 are faster than in fp32 on the device that will be used."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """``torch.autocast`` in ``dtype``; None switches it off."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
