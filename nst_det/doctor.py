"""What this machine has, whether its parts fit together, and for each fault the remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

DETECTRON2_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
OK, WARNING, FAULT = "ok", "warning", "FAULT"
GIB = 1 << 30
ENOUGH_MEMORY = 4 * GIB
ENOUGH_DISK = 5 * GIB
IMPORT_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        state: ``ok``, ``warning`` (works, but less than it could) or ``FAULT`` (something will fail).
        found: what was seen.
        remedy: what to do; "" where nothing is wrong.
    """

    what: str
    state: str
    found: str
    remedy: str = ""


def examine(data: Sequence[Path] = (), output: Path = Path()) -> list[Finding]:
    """Look at everything.

    Args:
        data: folders of data sets to check.
        output: where runs would be written.
    """
    looks: list[Callable[[], Finding]] = [
        _python,
        _torch,
        _torchvision,
        _timm,
        _accelerator,
        _detectron2,
        _cores,
        _memory,
        lambda: _disk(output),
        _registry,
    ]
    return [look() for look in looks] + [_data_set(path) for path in data]


def _python() -> Finding:
    return Finding("Python", OK, ".".join(map(str, sys.version_info[:3])))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    """The last line of what importing a module says when it fails; in a process of its own, for it may crash."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {IMPORT_SECONDS} s"
    if answer.returncode == 0:
        return None
    lines = answer.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {answer.returncode}"


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("torch", FAULT, "not installed", "pip install torch torchvision")
    error = _import_error("torch")
    if error:
        return Finding("torch", FAULT, f"{version} can't be imported: {error}", "pip install --force-reinstall torch")
    return Finding("torch", OK, version)


def wanted_torch(requirements: Sequence[str]) -> str | None:
    """The torch version that an installed torchvision pins.

    Example:
        >>> wanted_torch(["numpy", "torch==2.14.1", "pillow>=5"])
        '2.14.1'
    """
    for requirement in requirements:
        pinned = re.match(r"torch\s*\(?==\s*([^\s;)]+)", requirement)
        if pinned:
            return pinned[1]
    return None


def _torchvision() -> Finding:
    version, torch = _version("torchvision"), _version("torch")
    if version is None:
        return Finding("torchvision", FAULT, "not installed", "pip install torchvision")
    wanted = wanted_torch(importlib.metadata.requires("torchvision") or [])
    if wanted and torch and torch.split("+")[0] != wanted.split("+")[0]:
        remedy = f"pip install torch=={wanted} torchvision=={version}"
        return Finding("torchvision", FAULT, f"{version} was built for torch {wanted}, not {torch}", remedy)
    error = _import_error("torchvision.ops")
    if error:
        remedy = "pip install --force-reinstall torchvision"
        return Finding("torchvision", FAULT, f"{version} can't be imported: {error}", remedy)
    return Finding("torchvision", OK, f"{version}, built for torch {wanted or torch}")


def _timm() -> Finding:
    version = _version("timm")
    if version is None:
        return Finding("timm", FAULT, "not installed", "pip install timm")
    return Finding("timm", OK, version)


def _accelerator() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("accelerator", FAULT, f"unknown: torch can't be imported ({error})", "mend torch first")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding("accelerator", OK, f"{names}; CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi"):
        return Finding(
            "accelerator",
            WARNING,
            f"nvidia-smi is here, but torch (CUDA {torch.version.cuda}) sees no GPU",
            "install a torch built for this driver: https://pytorch.org/get-started/locally",
        )
    return Finding("accelerator", OK, "none; runs go on the CPU")


def _detectron2() -> Finding:
    if importlib.util.find_spec("detectron2") is None:
        return Finding(
            "Detectron2", OK, f"not installed; ENGINE torchvision does without. To install: {DETECTRON2_PAGE}"
        )
    error = _import_error("detectron2._C")
    if error:
        return Finding(
            "Detectron2",
            FAULT,
            f"its compiled part can't be imported: {error}",
            f"build it again with the torch that is installed now: {DETECTRON2_PAGE}",
        )
    return Finding("Detectron2", OK, f"{_version('detectron2')}, fits torch {_version('torch')}")


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("CPU cores", OK, str(count))


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{total / GIB:.1f} GiB"
    if total < ENOUGH_MEMORY:
        return Finding("memory", WARNING, found, "run with --jobs 1; the demo needs about 1 GiB a job")
    return Finding("memory", OK, found)


def _disk(output: Path) -> Finding:
    folder = output.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free at {folder}"
    if free < ENOUGH_DISK:
        return Finding("disk", WARNING, found, "free some space or name another output folder by --output")
    return Finding("disk", OK, found)


def _registry() -> Finding:
    from nst_det.models.registry import registry_folders

    folders = registry_folders()
    count = sum(len(list(folder.glob("*.safetensors"))) for folder in folders if folder.is_dir())
    return Finding("backbones", OK, f"{count} in {', '.join(map(str, folders))}")


def _data_set(path: Path) -> Finding:
    from nst_det.data.check import check_data

    report = check_data(path)
    if report.problems:
        return Finding(f"data {path}", WARNING, report.summary(), f"nst-det check-data {path} lists them")
    return Finding(f"data {path}", OK, report.summary())
