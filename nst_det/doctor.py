"""What this machine has, whether its parts fit together, and for each fault the remedy."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

DETECTRON2_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
# a warning works, but less than it could; a fault will fail
OK, WARNING, FAULT = "ok", "warning", "FAULT"
GIB = 1 << 30
ENOUGH_MEMORY = 4 * GIB
ENOUGH_DISK = 5 * GIB
IMPORT_SECONDS = 120
TORCH_PIN = re.compile(r"torch\s*\(?==\s*([^\s;)]+)")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, ``ok``, ``warning`` or ``FAULT``, what was found, and what to do."""

    what: str
    state: str
    found: str
    remedy: str = ""


def examine(data: Sequence[Path] = (), output: Path = Path()) -> list[Finding]:
    """Look at everything: with data sets in ``data``, and the disk where runs would be written."""
    python = Finding("Python", OK, ".".join(map(str, sys.version_info[:3])))
    torch = package("torch")
    found = [python, torch, torchvision(), package("timm"), detectron2(), memory(), disk(output)]
    if torch.state == OK:
        # the rest of this package needs torch
        from nst_det.engine.machine import core_count

        found += [accelerator(), Finding("CPU cores", OK, str(core_count())), backbones(), *map(data_set, data)]
    return found


def version(name: str) -> str | None:
    """Return the installed version of a package; nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_error(module: str) -> str | None:
    """Return the last line of what a failing import prints; in a process of its own, for it may crash."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {IMPORT_SECONDS} s"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1] if done.returncode else None


def package(name: str) -> Finding:
    """Look whether a package is installed and can be imported."""
    installed = version(name)
    if installed is None:
        return Finding(name, FAULT, "not installed", f"pip install {name}")
    if error := import_error(name):
        return Finding(name, FAULT, f"{installed} can't be imported: {error}", f"pip install --force-reinstall {name}")
    return Finding(name, OK, installed)


def torchvision() -> Finding:
    """Look whether torchvision was built for the torch that is installed; it pins it to the patch."""
    installed, torch = version("torchvision"), version("torch")
    requirements = metadata.requires("torchvision") or [] if installed else []
    wanted = next((pin[1] for pin in map(TORCH_PIN.match, requirements) if pin), None)
    if wanted and torch and torch.split("+")[0] != wanted.split("+")[0]:
        remedy = f"pip install torch=={wanted} torchvision=={installed}"
        return Finding("torchvision", FAULT, f"{installed} was built for torch {wanted}, not {torch}", remedy)
    return package("torchvision")


def accelerator() -> Finding:
    """Look whether torch sees the GPU that the machine has."""
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding("accelerator", OK, f"{names}; CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi"):
        found = f"nvidia-smi is here, but torch (CUDA {torch.version.cuda}) sees no GPU"
        remedy = "install a torch built for this driver: https://pytorch.org/get-started/locally"
        return Finding("accelerator", WARNING, found, remedy)
    return Finding("accelerator", OK, "none; runs use the CPU")


def detectron2() -> Finding:
    """Look whether Detectron2, which may be absent, fits the torch that is installed."""
    if importlib.util.find_spec("detectron2") is None:
        found = f"not installed; ENGINE torchvision does without. To install: {DETECTRON2_PAGE}"
        return Finding("Detectron2", OK, found)
    if error := import_error("detectron2._C"):
        remedy = f"build it again with the torch that is installed now: {DETECTRON2_PAGE}"
        return Finding("Detectron2", FAULT, f"its compiled part can't be imported: {error}", remedy)
    return Finding("Detectron2", OK, f"{version('detectron2')}, fits torch {version('torch')}")


def memory() -> Finding:
    """Look at the memory of the machine."""
    total = psutil.virtual_memory().total
    remedy = "run with --jobs 1; the demo needs about 1 GiB a job" if total < ENOUGH_MEMORY else ""
    return Finding("memory", WARNING if remedy else OK, f"{total / GIB:.1f} GiB", remedy)


def disk(output: Path) -> Finding:
    """Look at the room where ``output`` is, or would be."""
    folder = output.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    remedy = "free some space or name another output folder by --output" if free < ENOUGH_DISK else ""
    return Finding("disk", WARNING if remedy else OK, f"{free / GIB:.1f} GiB free at {folder}", remedy)


def backbones() -> Finding:
    """Count the backbones in the registry."""
    from nst_det.models.registry import registry_folders

    folders = registry_folders()
    count = sum(len(list(folder.glob("*.safetensors"))) for folder in folders if folder.is_dir())
    return Finding("backbones", OK, f"{count} in {', '.join(map(str, folders))}")


def data_set(path: Path) -> Finding:
    """Check a data set."""
    from nst_det.data.check import check_data

    report = check_data(path)
    remedy = f"nst-det check-data {path} lists them" if report.problems else ""
    return Finding(f"data {path}", WARNING if remedy else OK, report.summary(), remedy)
