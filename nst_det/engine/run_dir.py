"""A run is a folder: config, provenance, metrics, checkpoints, result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from fvcore.common.config import CfgNode

from nst_det.engine.config import flat, plain
from nst_det.engine.fingerprint import RESUME, concerns
from nst_det.engine.io import read_json, remove_left_over, write_json, write_text
from nst_det.engine.metrics import read_metrics, speed_of
from nst_det.errors import UserError

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


class RunFolder:
    """One run on disk.

    ``config.json`` (resolved), ``provenance.json`` (one entry a start), ``metrics.jsonl``, ``checkpoints/`` and,
    once the run is done, ``result.json``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.result_path = self.path / "result.json"

    @contextmanager
    def opened(self, config: CfgNode | dict[str, Any]) -> Iterator[RunFolder]:
        """Hold the folder for this process and write its config; a second process is refused.

        Raises:
            UserError: another process writes here, or the folder holds a run with another config.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"{self.path}: another process is writing this run; wait for it or name another folder"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path}: can't be written ({error.strerror}); name another folder") from error
        try:
            self._claim(config)
            yield self
        finally:
            lock.release()

    def _claim(self, config: CfgNode | dict[str, Any]) -> None:
        for folder in (self.path, self.checkpoints, self.path / "nonfinite"):
            remove_left_over(folder, shared=False)
        values = plain(flat(config) if isinstance(config, CfgNode) else config)
        if self.config_path.exists():
            before = read_json(self.config_path)
            for key in sorted({*before, *values}):
                if not _is_free(key) and before.get(key) != values.get(key):
                    raise UserError(
                        f"{self.path}: this folder holds a run with {key} {before.get(key)!r}, now it is "
                        f"{values.get(key)!r}; name another folder or remove this one"
                    )
        else:
            write_json(self.config_path, values)
        if isinstance(config, CfgNode):
            write_text(self.path / "config.yaml", config.dump())
        starts = read_json(self.path / "provenance.json") if (self.path / "provenance.json").exists() else []
        write_json(self.path / "provenance.json", [*starts, provenance()])

    @property
    def done(self) -> bool:
        """Whether the run has its result."""
        return self.result_path.exists()

    def result(self) -> dict[str, Any]:
        """The result of a finished run.

        Raises:
            UserError: it is not finished, or its result file is damaged.
        """
        result = read_json(self.result_path)
        if not isinstance(result, dict):
            raise UserError(f"{self.result_path}: not a result; remove it to run this again")
        return result

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, and under ``speed`` how fast it was; from now on the run is done."""
        rows = read_metrics(self.metrics_path, speed=True) if self.metrics_path.exists() else []
        write_json(self.result_path, result | ({"speed": speed_of(rows)} if rows else {}))


def _is_free(key: str) -> bool:
    # a comparison's claim holds the keys of both stages
    return not concerns(key.removeprefix("DISTILL.").removeprefix("DETECT."), RESUME)


def config_hash(config: CfgNode | dict[str, Any]) -> str:
    """Twelve hexadecimal digits that name a resolved config; keys that may differ when a run resumes don't count."""
    values = plain(flat(config) if isinstance(config, CfgNode) else config)
    text = json.dumps({key: value for key, value in values.items() if concerns(key, RESUME)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
