"""What importing the package, and being refused by it, needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# what Windows and macOS lack of Linux
ABSENT = """
import importlib, importlib.util, os, pkgutil, signal, sys
# libraries know by themselves which system they are on
import cv2, fvcore.common.config, iopath.common.file_io, filelock, jinja2, multiprocessing.pool, psutil, rich.jupyter
import safetensors.torch, timm, torch, torch._dynamo, torch.export, torch.utils.data, torchvision, yaml
import concurrent.futures, subprocess, tempfile, urllib.request
for name in ("fcntl", "resource", "grp", "pwd", "termios", "syslog"):
    sys.modules[name] = None
gone = ("sched_getaffinity", "setpgrp", "killpg", "getpgid", "setsid", "fork", "wait4", "geteuid", "getuid", "uname",
        "statvfs", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "posix_fadvise", "mkfifo", "pread", "getloadavg")
for name in gone:
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGCHLD"):
    delattr(signal, name)
import nst_det
skipped = () if importlib.util.find_spec("detectron2") else ("nst_det.detectron2.",)
for module in pkgutil.walk_packages(nst_det.__path__, "nst_det.", onerror=print):
    if module.name != "nst_det.__main__" and not module.name.startswith(skipped):
        try:
            importlib.import_module(module.name)
        except Exception as error:
            print(f"{module.name}: {type(error).__name__}: {error}")
"""


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_every_module_is_imported_without_what_other_systems_lack():
    done = python("-c", ABSENT)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["train-det", "--config-file", "configs/detect/shapes.yaml", "SOLVER.MAX_ITR", "3"],
        ["train-det", "--config-file", "/nowhere.yaml"],
        ["distill", "--config-file", "configs/distill/shapes.yaml", "METHODS", "[nix]"],
        ["distill", "--config-file", "configs/distill/shapes.yaml", "SOLVER.BASE_LR", "-1"],
        ["compare", "--config-file", "configs/compare/demo.yaml", "SEDS", "[0]"],
        ["compare", "--config-file", "configs/compare/demo.yaml", "METHODS", "[nix]"],
        ["tune", "--config-file", "/nowhere.yaml"],
        ["check-data", "/nowhere"],
        ["init", "project", "--voc", "/nowhere"],
        ["predict", "/nowhere", "--run", "/nowhere"],
        ["export", "--format", "onnx", "--run", "/nowhere", "--output", "detector.onnx"],
        ["export", "--format", "timm", "--weights", "backbone://nobody", "--output", "x"],
        ["evaluate", "--voc-root", "/nowhere", "--detections", "x.json"],
        ["evaluate", "--voc-root", "/nowhere", "--detections", "README.md"],
        ["backbones", "--check", "nobody"],
        ["look", "--weights", "/nowhere.safetensors", "--image", "docs"],
        ["convert", "--weights", "/nowhere.pth", "--to", "timm", "--output", "x.pth"],
        ["parity", "--config-file", "/nowhere.yaml", "--weights", "x", "--image", "x"],
        ["benchmark", "--run", "/nowhere"],
        ["replay", "/nowhere.pt"],
        ["methods", "nix"],
        ["keys", "NIX"],
        ["distill", "--config-file", "configs/distill/shapes.yaml", "DATA.ROOT", "/nowhere"],
        ["train-det", "--config-file", "configs/detect/shapes.yaml"],
    ],
    ids=" ".join,
)
def test_a_refused_command_imports_nothing_heavy(words):
    done = python("-X", "importtime", "-m", "nst_det", *words)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "nst_det.cli" in imported
    assert imported.isdisjoint({"torch", "torchvision", "timm", "scipy", "detectron2"})
    assert done.returncode == 2
    assert "nst-det: " in done.stderr.splitlines()[-1]


def test_all_that_is_not_python_is_installed():
    tomllib = pytest.importorskip("tomllib")
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["nst_det"]
    package = ROOT / "nst_det"
    there = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there == {path for one in globs for path in package.glob(one)}
