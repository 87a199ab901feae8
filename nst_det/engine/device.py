"""What computes, in which precision, and the one line that reports a GPU that fails."""

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.engine.foreach import CAST_LAYERS
from nst_det.engine.keys import AMP_DTYPES, FLOAT32_PRECISIONS
from nst_det.engine.machine import core_count, machine_name
from nst_det.errors import UserError

_NAMES = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# how messages of CUDA, its libraries and NCCL begin; loader processes and threads put their own lines before
_OF_GPU = re.compile(r"(CUDA|cuDNN|CUDNN|cuBLAS|CUBLAS|NCCL|HIP|No CUDA|Unexpected error from cuda)\b")
# each loader process has memory of its own
MOST_WORKERS = 8
# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def default_device() -> torch.device:
    """Return the GPU of this process if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def named_device(name: str, key: str = "--device") -> torch.device:
    """Return the device that a user names (``cpu``, ``cuda``, ``cuda:1``); "" is :func:`default_device`."""
    if not name:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{key}: '{name}' can't be used here ({reason}); leave it out, or name cpu or cuda") from error
    return device


def loader_workers(asked: int, none: bool = False) -> int:
    """Return DATALOADER.NUM_WORKERS, where -1 is one for each core of the run, up to 8, or ``none``."""
    if asked >= 0 or none:
        return max(asked, 0)
    # a run of a comparison has as many cores as threads; torchrun sets these to 1, and its processes share the machine
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = core_count() // together if together > 1 else min(core_count(), torch.get_num_threads())
    return max(1, min(cores, MOST_WORKERS))


def amp_dtype(node: CfgNode, device: torch.device) -> torch.dtype | None:
    """Return the dtype of :func:`autocast` by SOLVER.AMP; None is float32.

    ``auto`` is bf16 where the device is fast in it, and float32 everywhere else: also on older GPUs, whose fp16 has a
    smaller range and needs a loss scale.
    """
    if node.DTYPE not in AMP_DTYPES:
        raise UserError(f"SOLVER.AMP.DTYPE: unknown precision '{node.DTYPE}'; use one of {', '.join(AMP_DTYPES)}")
    if not node.ENABLED:
        return None
    if node.DTYPE == "fp16" and device.type != "cuda":
        raise UserError("SOLVER.AMP.DTYPE: fp16 needs a GPU; use bf16, or set SOLVER.AMP.ENABLED False")
    if node.DTYPE == "auto":
        return torch.bfloat16 if _has_fast_bf16(device) else None
    return torch.bfloat16 if node.DTYPE == "bf16" else torch.float16


def _has_fast_bf16(device: torch.device) -> bool:
    # NVIDIA's GPUs since Ampere, processors with AVX512-BF16
    if device.type == "cuda":
        return bool(torch.cuda.get_device_properties(device).major >= 8)
    supported: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and bool(supported and supported())


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Return ``torch.autocast`` in ``dtype``; None switches it off."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def cast_frozen(model: nn.Module, dtype: torch.dtype | None, kinds: tuple[type[nn.Module], ...] = CAST_LAYERS) -> None:
    """Cast frozen weights once, to the bits to which :func:`autocast` would cast them anew in each pass.

    ``kinds`` are layers whose own parameters enter one convolution or product as they are; all other layers, subclasses
    among them, are left to autocast.
    """
    for layer in model.modules() if dtype is not None else ():
        if type(layer) in kinds:
            for name, parameter in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def train_depthwise_in_float32(model: nn.Module) -> None:
    """Let depthwise convolutions on the CPU be computed in float32 where :func:`autocast` would have bf16, in place.

    Only where they need gradients: with strides or 5 x 5 weights, those in bf16 take 3 to 60 times as long.
    """
    for layer in model.modules():
        depthwise = isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
        if depthwise and layer.weight.device.type == "cpu" and not isinstance(layer, _TrainedInFloat32):
            kind = type(layer)
            layer.__class__ = type(kind.__name__, (_TrainedInFloat32, kind), {})


class _TrainedInFloat32(nn.Module):
    weight: Tensor

    def forward(self, maps: Tensor) -> Tensor:
        trained = torch.is_grad_enabled() and (maps.requires_grad or self.weight.requires_grad)
        if not (trained and torch.is_autocast_enabled("cpu")):
            return cast(Tensor, super().forward(maps))
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return cast(Tensor, super().forward(maps.float())).to(dtype)


class HostCopy:
    """Numbers on their way from a device to the host, which goes on meanwhile."""

    def __init__(self, values: Tensor) -> None:
        # torch takes pinned memory for it
        self._values, self._copied = values.detach().to("cpu", non_blocking=True), None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> Any:
        """Wait until they are there; return them as ``tolist`` does."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


def tf32_in() -> dict[str, bool]:
    """Return whether float32 is TF32 on a GPU, in ``convolutions`` and in ``matrix products``."""
    # older releases of torch lack some of it
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    # once a user has set these, torch 2.9 and newer refuse to read the older switches
    if hasattr(matmul, "fp32_precision"):
        found = {"convolutions": cudnn.conv.fp32_precision, "matrix products": matmul.fp32_precision}
        return {kind: precision == "tf32" for kind, precision in found.items()}
    return {"convolutions": cudnn.allow_tf32, "matrix products": matmul.allow_tf32}


# what FLOAT32_PRECISION found, for the next run in this process that leaves it ""
_found: list[dict[str, bool]] = []


def set_float32_precision(name: str, device: torch.device) -> None:
    """Set what float32 is on a GPU (FLOAT32_PRECISION), for convolutions and matrix products alike, in this process.

    ``highest`` is float32, ``high`` and ``medium`` are TF32.  "" leaves torch as it is, or as it was before a run of
    this process set another: by default convolutions are TF32, products float32.  On the CPU float32 is float32.
    """
    if name not in FLOAT32_PRECISIONS:
        known = ", ".join(FLOAT32_PRECISIONS[1:])
        raise UserError(f"FLOAT32_PRECISION: unknown precision '{name}'; use one of {known}, or \"\"")
    if device.type != "cuda" or not (name or _found):
        return
    if name and not _found:
        _found.append(tf32_in())
    convolutions, products = [name != "highest"] * 2 if name else _found.pop().values()
    # all releases of torch have these two
    torch.set_float32_matmul_precision(name or ("high" if products else "highest"))
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = convolutions
    # newer ones would then let convolutions follow a user's ``torch.backends.fp32_precision``
    for kind in (cudnn.conv, cudnn.rnn) if hasattr(cudnn, "conv") else ():
        kind.fp32_precision = "tf32" if convolutions else "ieee"


def set_cudnn_benchmark(wanted: bool, device: torch.device) -> None:
    """Set CUDNN_BENCHMARK in this process, where it computes on a GPU."""
    torch.backends.cudnn.benchmark = wanted and device.type == "cuda"


@contextmanager
def many_sizes() -> Iterator[None]:
    """Keep cuDNN from trying its kernels at each of the sizes that the images of an evaluation have."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def compute_line(
    device: torch.device, precision: torch.dtype | None, workers: int | None = None, mixed: bool = False
) -> str:
    """Return what a run computes with, for its log; ``mixed`` if bf16 was wanted where the device is fast in it."""
    parts = [f"forward pass in {_NAMES[precision]}"]
    if mixed and precision is None:
        parts[0] += " (this device is not fast in bf16)"
    if device.type == "cuda":
        parts += [f"float32 {kind} in {'TF32' if tf32 else 'float32'}" for kind, tf32 in tf32_in().items()]
        parts += ["the fastest of cuDNN's kernels"] * torch.backends.cudnn.benchmark
    if workers is not None:
        parts.append(f"{workers} loader workers")
    return f"{device} ({machine_name(str(device))}): {', '.join(parts)}"


def is_gpu_error(error: BaseException) -> bool:
    """Return whether a GPU failed: its memory is full, or it is busy, lost or broken."""
    kinds = (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError))
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and _OF_GPU.match(str(error)) is not None)


@contextmanager
def gpu_errors_in_one_line(smaller: str, resumes: Callable[[], str] | None = None) -> Iterator[None]:
    """Report a GPU that fails within the block in one line, with ``smaller``, which takes less memory, as the remedy.

    ``resumes`` tells what the same command would resume from, and is called only then.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_gpu_error(error):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        line = next((line for line in lines if _OF_GPU.match(line)), lines[0])
        fault = ". ".join(line.split(". ")[:2]).rstrip(".")
        remedy = "see nvidia-smi: free this GPU or reset it, or take another one by CUDA_VISIBLE_DEVICES"
        if "out of memory" in fault or "ALLOC_FAILED" in fault:
            remedy = f"free its memory (nvidia-smi shows who has it), or {smaller}"
        raise UserError("; ".join([fault, remedy, *([resumes()] if resumes else [])])) from error


def keep_freed_memory() -> bool:
    """Let glibc keep up to 1 GiB of freed memory; return whether the C library did.

    A training step frees and allocates the same tensors again and again; getting their pages anew from the kernel
    takes a tenth of its time on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
