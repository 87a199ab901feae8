"""Where a result comes from: versions, commit, machine, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = ("nst_det", "torch", "torchvision", "timm", "detectron2", "numpy", "opencv-python-headless")


def provenance() -> dict[str, Any]:
    """Versions of the packages that decide numbers, the commit of this code, the machine and the command."""
    return {
        "versions": package_versions(),
        "commit": code_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cuda": _cuda_name(),
        "command": " ".join(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of :data:`PACKAGES`; a package that is not installed is left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def code_commit() -> str | None:
    """The git commit of this package's source, with ``+changes`` if files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return f"{commit}+changes" if _git(root, "status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def machine_name(device: str) -> str:
    """What computes: the name of the GPU for ``cuda`` and ``cuda:1``, of the processor for ``cpu``."""
    if device.startswith("cuda"):
        return _cuda_name(device) or device
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _cuda_name(device: str | None = None) -> str | None:
    import torch

    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else None
