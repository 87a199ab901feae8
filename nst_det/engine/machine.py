"""What the machine has: cores, processor and GPU by name."""

import os
import platform
from pathlib import Path


def core_count() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_name(device: str) -> str:
    """Return the name of the GPU for ``cuda`` and ``cuda:1``, of the processor for ``cpu``."""
    if device.startswith("cuda"):
        return cuda_name(device) or device
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cuda_name(device: str | None = None) -> str | None:
    """Return the name of a GPU, of the current one by default; None without GPUs."""
    # torch takes seconds to import
    import torch

    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else None
