"""The check of a GPU, tried on the CPU: every part gives its figures, and none can stop the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_check.py"
STEP = ["one_batch_ms", "together_ms", "together_images_per_second"]
DETECTOR = ["loader_images_per_second", "ce_one_batch_ms", "nst_one_batch_ms", "nst_together_images_per_second"]
DETECTOR += ["evaluation_images_per_second", "teacher_forward_host_ms", "transfer_forward_host_ms", "rpn_host_ms"]
DETECTOR += ["roi_heads_host_ms"]
# torch.compile is left out: its compiler alone takes minutes on a CPU
FIGURES = {
    "versions": ["torch", "cores", "launch_microseconds", "to_device_pageable_gb_per_second", "matmul_bfloat16_tflops"],
    "tests": ["counts", "failed"],
    "stage_one": ["images", "bare_eager_ms", "bare_channels_last_ms", "loader_images_per_second", *STEP],
    "torchvision": DETECTOR,
    "detectron2": [*DETECTOR, "detectron2s_own_together_ms"],
    "nst_loss": ["published code's case, poly", "median_times_the_bare_products"],
    "demo": ["detect/seed0/ce", "teacher/teacher", "seconds_in_all"],
}


def check(folder, *words):
    """Exit code, what is printed, and the parts in the file."""
    command = [sys.executable, str(CHECK), "--device", "cpu", "--small", "--output", str(folder / "out.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr, json.loads((folder / "out.json").read_text())["parts"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FIGURES))
def test_a_part_gives_its_figures(name, tmp_path):
    # a folder that isn't there: images are made
    code, said, parts = check(tmp_path, "--part", name, "--limit", "4000", "--images", str(tmp_path / "none"))
    assert code == 0, said[-3000:]
    if parts[name]["state"] == "skipped":
        pytest.skip(parts[name]["figures"]["skipped"])
    assert parts[name]["state"] == "done"
    found = parts[name]["figures"]
    assert set(FIGURES[name]) <= found.keys()
    assert all(found[figure] > 0 for figure in FIGURES[name] if isinstance(found[figure], float))
    if name == "tests":
        assert found["counts"]["PASSED"] >= 12
        assert found["failed"] == []


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_and_the_next_one_is_started(tmp_path):
    # a twentieth of the limits: not enough for either
    code, said, parts = check(tmp_path, "--part", "torchvision", "--part", "versions", "--limit", "24")
    assert code == 1
    assert [parts[name]["state"] for name in ("torchvision", "versions")] == ["timed out", "timed out"], said
    assert parts["torchvision"]["seconds"] < 30


def test_no_test_sees_a_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
