"""A whole comparison with the detectors trained by Detectron2."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")
pytestmark = [pytest.mark.detectron2, pytest.mark.slow]

from nst_det.comparison.config import load_comparison
from nst_det.comparison.estimate import estimate
from nst_det.comparison.launch_local import Machine
from nst_det.comparison.plan import make_plan


@pytest.fixture(scope="module")
def tiny(cli, tiny_yaml, tmp_path_factory):
    """The config of a comparison, and the folder in which it was made."""
    folder = tmp_path_factory.mktemp("tiny")
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, brightness in (("dark", 60), ("bright", 190)):
            images = folder / "images" / split / label
            images.mkdir(parents=True)
            for index in range(8):
                pixels = draw.integers(brightness - 40, brightness + 40, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / f"{index}.jpg")
    (folder / "distill.yaml").write_text(
        f"""\
DATA: {{ROOT: {folder / "images"}, IMAGE_SIZE: 64}}
DATALOADER: {{NUM_WORKERS: 0}}
TEACHER: {{ARCH: nst_resnet18_w48, EXPECTED_TOP1: 0.0, SOLVER: {{MAX_ITER: 2}}}}
STUDENT: {{ARCH: nst_resnet10_w32}}
SOLVER: {{MAX_ITER: 2, IMS_PER_BATCH: 4}}
TRANSFER: {{LEVELS: [res3, res4]}}
"""
    )
    (folder / "compare.yaml").write_text(
        f"""\
NAME: tiny
ENGINE: detectron2
OUTPUT_DIR: {folder / "out"}
METHODS: [ce]
DISTILL: {{CONFIG: distill.yaml}}
DETECT: {{CONFIG: {tiny_yaml}, OPTS: [SOLVER.MAX_ITER, 12]}}
"""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert cli("compare", "--config-file", folder / "compare.yaml", "--jobs", "2") == 0
    return folder / "compare.yaml", folder / "out"


def test_the_report_is_whole(tiny):
    _, out = tiny
    results = json.loads((out / "report" / "results.json").read_text())
    assert results["engine"] == "detectron2"
    assert [row["method"] for row in results["rows"]] == ["scratch", "ce"]
    assert all(set(row["per_class"]) == {"bar", "square"} for row in results["rows"])
    costs = [row["cost"] for row in results["rows"]]
    assert costs[0] == costs[1]
    assert costs[0]["macs"] > 1e6
    assert costs[0]["parameters"] == results["rows"][0]["params"]
    page = (out / "report" / "index.html").read_text()
    # the curves of Detectron2's losses are in it
    assert "loss_rpn_cls" in page
    assert {"results.csv", "table.md"} <= {path.name for path in (out / "report").iterdir()}


def test_what_a_detector_takes_is_measured(tiny):
    config, out = tiny
    comparison = load_comparison(config)
    runs = make_plan(comparison)
    run = next(run for run in runs if run.name == "detect/seed0/scratch")
    found = estimate(comparison, runs, Machine(1))[run.name]
    files = [path for path in (out / run.name).rglob("*") if path.is_file()]
    # it keeps two checkpoints and the last one, as a run of any length
    assert found.disk == pytest.approx(sum(path.stat().st_size for path in files), rel=0.02)
    assert len([path for path in files if path.suffix == ".pth"]) == 3
    # an interpreter with torch and Detectron2 needs that much
    assert 200 << 20 < found.memory < 4 << 30
    assert 1 < found.seconds < 120
