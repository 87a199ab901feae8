"""Commands on what was trained on a GPU; the slowest tests come last."""

import os
import subprocess
import sys

import pytest
import yaml

from nst_det import doctor
from nst_det.cli import main
from nst_det.engine.io import read_json

pytestmark = pytest.mark.gpu


@pytest.fixture
def command(capsys):
    """``command("predict", ...)``: what ``nst-det`` prints."""

    def run(*words):
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        assert left.value.code == 0, printed.err
        return printed.out

    return run


def test_commands_on_a_detector(command, detectors, generated, tmp_path, gpu_device):
    images, run = generated / "shapes_voc" / "JPEGImages", ["--run", detectors("torchvision")]
    on = ["--device", gpu_device]
    predicted = command("predict", images, *run, "--output", tmp_path, "--threshold", 0.0, *on, "--format", "json")
    assert "16 images" in predicted
    command("export", "--format", "torch-export", *run, "--output", tmp_path / "detector.pt2")
    assert (tmp_path / "detector.pt2").stat().st_size > 1e6
    command("benchmark", *run, "--batch", 1, 2, "--repeats", 2, *on, "--json", tmp_path / "out.json")
    figures = read_json(tmp_path / "out.json")
    assert figures["device"] == gpu_device
    assert all(0 < row["p10"] <= row["median"] for row in figures["latency"])


def test_look(command, backbones, generated, tmp_path):
    files = [backbones[word]["backbone"] for word in ("teacher", "ce", "kd+nst-poly")]
    words = [word for file in files for word in ("--weights", file)]
    images = sorted((generated / "shapes_voc" / "JPEGImages").iterdir())[:2]
    command("look", *words, "--levels", "res4", "--image", *images, "--output", tmp_path / "look.html")
    assert (tmp_path / "look.html").stat().st_size > 1e4


def test_doctor_names_the_gpu(gpu_device):
    found = doctor.accelerator()
    assert found.state != doctor.FAULT
    assert ("CUDA" in found.found) == (gpu_device == "cuda")


def test_runs_of_a_comparison_side_by_side_on_one_gpu(detector_config, tmp_path, gpu_device):
    solver = {"OPTIMIZER": "ADAMW", "BASE_LR": 0.001, "MAX_ITER": 4, "IMS_PER_BATCH": 8}
    distill = {
        "DATA": {"ROOT": "generated", "IMAGE_SIZE": 64},
        "TEACHER": {"ARCH": "nst_resnet10_w32"},
        "SOLVER": solver,
    }
    opts = ["MODEL.DEVICE", gpu_device, "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2]
    images = {"classification_images": 24, "classification_val_images": 8, "detection_images": 8}
    images |= {"detection_test_images": 2, "classification_classes": 3, "detection_classes": 3}
    compare = {
        "NAME": "tiny",
        "METHODS": ["ce"],
        "ENGINE": "torchvision",
        "DATA": {"GENERATE": images},
        "DISTILL": {"CONFIG": "distill.yaml"},
        "DETECT": {"CONFIG": str(detector_config), "OPTS": opts},
    }
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(distill))
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(compare))
    words = ["--config-file", tmp_path / "compare.yaml", "--output", tmp_path / "out", "--jobs", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "nst_det", "compare", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = read_json(tmp_path / "out" / "report" / "results.json")["rows"]
    assert [row["method"] for row in rows] == ["scratch", "ce"]
