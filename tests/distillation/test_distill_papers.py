"""Every config of the papers' experiments on CIFAR and MNIST makes two steps."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nst_det.distillation.config import load_distill_config
from nst_det.distillation.pipeline import distill

PAPERS = Path(__file__).resolve().parents[2] / "configs" / "distill" / "paper"
FILES = sorted(file for name in ("cifar10_*", "cifar100_*", "mnist_*") for file in PAPERS.glob(f"{name}.yaml"))
SMALL = {
    "DATA.VAL_FRACTION": 0.5,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.STEPS": [1],
    "TEACHER.SOLVER": {"MAX_ITER": 2, "STEPS": [1]},
    "TEST.EVAL_PERIOD": 0,
    "DATALOADER.NUM_WORKERS": 0,
}


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """Four images in each of two classes."""
    root = tmp_path_factory.mktemp("images")
    for index in range(8):
        path = root / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_starts(few_images, tmp_path, file):
    keys = {"DATA.ROOT": few_images, "OUTPUT_DIR": tmp_path, "REGISTRY": tmp_path / "backbones", **SMALL}
    config = load_distill_config(file)
    if config.DATA.PER_CLASS:
        keys["DATA.PER_CLASS"] = 1
    if "1001" in config.TEACHER.ARCH:
        # two minutes; tests/models has the network itself
        keys["TEACHER.ARCH"] = "nst_preact_resnet110"
    results = distill(load_distill_config(file, [str(word) for pair in keys.items() for word in pair]))
    assert list(results) == ["teacher", *config.METHODS]
    assert {result["steps"] for result in results.values()} == {2}
