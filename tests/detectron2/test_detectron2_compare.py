"""A whole comparison with the detectors trained by Detectron2."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = [pytest.mark.detectron2, pytest.mark.slow]

from nst_det.cli import main  # noqa: E402


def test_the_report_is_whole(tiny_yaml, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, brightness in (("dark", 60), ("bright", 190)):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(8):
                pixels = draw.integers(brightness - 40, brightness + 40, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    (tmp_path / "distill.yaml").write_text(
        f"""\
DATA: {{ROOT: {tmp_path / "images"}, IMAGE_SIZE: 64}}
DATALOADER: {{NUM_WORKERS: 0}}
TEACHER: {{ARCH: nst_resnet18_w48, EXPECTED_TOP1: 0.0, SOLVER: {{MAX_ITER: 2}}}}
STUDENT: {{ARCH: nst_resnet10_w32}}
SOLVER: {{MAX_ITER: 2, IMS_PER_BATCH: 4}}
TRANSFER: {{LEVELS: [res3, res4]}}
"""
    )
    (tmp_path / "compare.yaml").write_text(
        f"""\
NAME: tiny
ENGINE: detectron2
METHODS: [ce]
DISTILL: {{CONFIG: distill.yaml}}
DETECT: {{CONFIG: {tiny_yaml}, OPTS: [SOLVER.MAX_ITER, 2]}}
"""
    )
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as left:
        main(["compare", "--config-file", str(tmp_path / "compare.yaml"), "--output", str(out), "--jobs", "2"])
    assert left.value.code == 0
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
