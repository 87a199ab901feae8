"""A run is a folder: config, provenance, metrics, checkpoints, result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from fvcore.common.config import CfgNode

from nst_det.engine.config import flat, placed, places, plain
from nst_det.engine.fingerprint import RESUME, concerns
from nst_det.engine.io import read_json, remove_left_over, write_json, write_text
from nst_det.engine.machine import cuda_name
from nst_det.engine.metrics import read_metrics, speed_of
from nst_det.errors import UserError

# their versions decide numbers
PACKAGES = ("nst_det", "torch", "torchvision", "timm", "detectron2", "numpy", "opencv-python-headless")
# what a finished run of stage two leaves
WEIGHTS_FILE = "model.safetensors"
# at least one of these files is there once a run, or one in a folder below, has made a step that it can resume from
TRACES = re.compile(r"result\.json|metrics\.jsonl|step-\d+\.pt|model_\d+\.pth")


def provenance() -> dict[str, Any]:
    """Return the versions, the commit of this code, the machine and the command."""
    return {
        "versions": package_versions(),
        "commit": code_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cuda": cuda_name(),
        "command": " ".join(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of those of :data:`PACKAGES` that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def code_commit() -> str | None:
    """Return the git commit of this source, with ``+changes`` if files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class RunFolder:
    """One run: config.json, inputs.json, provenance.json, metrics.jsonl, checkpoints/; once it is done, result.json."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        # fingerprints of the data and weights that the config names by a path
        self.inputs_path = self.path / "inputs.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.result_path = self.path / "result.json"
        # the step whose loss or gradient ended the run, until it begins again
        self.not_finite_path = self.path / "nonfinite" / "ended.json"

    @contextmanager
    def opened(self, config: CfgNode | dict[str, Any], inputs: Mapping[str, str] | None = None) -> Iterator[RunFolder]:
        """Hold the folder for this process alone and write its config; one in which another run began is refused.

        ``inputs`` are the fingerprints, by key, of all that the config names by a path; None of a run that keeps none.
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
            self._claim(config, inputs)
            yield self
        finally:
            lock.release()

    def config(self) -> dict[str, Any]:
        """Return the values of its config by dotted key, data sets where they are now."""
        values: dict[str, Any] = placed(read_json(self.config_path), self.path.resolve())
        return values

    def check(self, config: CfgNode | dict[str, Any], within: str = "") -> None:
        """Refuse a folder that holds another run, by the keys that begin with ``within``; nothing is written."""
        values = _values(config)
        before = read_json(self.config_path) if self.begun else values
        self._refuse(before, values, [key for key in differing(before, values) if key.startswith(within)])

    def _refuse(self, before: Mapping[str, Any], values: Mapping[str, Any], keys: Sequence[str]) -> None:
        for key in keys:
            weights = self.path / WEIGHTS_FILE
            further = f" (MODEL.WEIGHTS {weights} begins where this run ended)" if weights.exists() else ""
            raise UserError(
                f"{self.path}: this folder holds a run with {key} {before.get(key)!r}, now it is "
                f"{values.get(key)!r}; name another folder{further} or remove this one"
            )

    def _claim(self, config: CfgNode | dict[str, Any], inputs: Mapping[str, str] | None) -> None:
        for folder in (self.path, self.checkpoints, self.path / "nonfinite"):
            remove_left_over(folder, owned=True)
        self.check(config)
        begun = self.begun
        if inputs is not None:
            kept = begun and self.inputs_path.exists()
            before = read_json(self.inputs_path) if kept else inputs
            self._refuse(before, inputs, [key for key in {**before, **inputs} if before.get(key) != inputs.get(key)])
            if not kept:
                write_json(self.inputs_path, dict(inputs))
        self.not_finite_path.unlink(missing_ok=True)
        values = {key: _portable(key, value, self.path) for key, value in _values(config).items()}
        if not begun:
            write_json(self.config_path, values)
        if isinstance(config, CfgNode):
            write_text(self.path / "config.yaml", portable(config, self.path).dump())
        history = self.path / "provenance.json"
        write_json(history, [*(read_json(history) if history.exists() else []), provenance()])

    @property
    def begun(self) -> bool:
        """Whether this run has its config and made a step, or one in a folder below did."""
        return self.config_path.exists() and any(TRACES.fullmatch(path.name) for path in self.path.rglob("*"))

    @property
    def done(self) -> bool:
        return self.result_path.exists()

    def result(self) -> dict[str, Any]:
        result = read_json(self.result_path)
        if not isinstance(result, dict):
            raise UserError(f"{self.result_path}: not a result; remove it to run this again")
        return result

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result with the run's speed; from now on the run is done."""
        rows = read_metrics(self.metrics_path, speed=True) if self.metrics_path.exists() else []
        write_json(self.result_path, result | ({"speed": speed_of(rows)} if rows else {}))


def portable(config: CfgNode, folder: Path) -> CfgNode:
    """Return a config as it is written into ``folder``: either this or the data sets of stage two may be moved."""
    config = config.clone()
    config.defrost()
    for entry in config.get("DATASETS", {}).get("VOC", {}).values():
        entry.update({key: _portable(key, value, folder) for key, value in entry.items()})
    return config


def _portable(key: str, value: Any, folder: Path) -> Any:
    of_data = key.rpartition(".")[2] == "ROOT" and isinstance(value, str) and value
    return places(value, folder) if of_data else value


def _values(config: CfgNode | dict[str, Any]) -> dict[str, Any]:
    return dict(plain(flat(config) if isinstance(config, CfgNode) else config))


def differing(before: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Return the keys by which two configs are not of one run; a comparison's have the keys of both stages."""
    keys = (key for key in sorted({*before, *values}) if before.get(key) != values.get(key))
    return [key for key in keys if concerns(key.removeprefix("DISTILL.").removeprefix("DETECT."), RESUME)]


def config_hash(config: CfgNode | dict[str, Any]) -> str:
    """Return twelve hexadecimal digits that name a config; keys that may differ when a run resumes don't count."""
    values = {key: value for key, value in _values(config).items() if concerns(key, RESUME)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
