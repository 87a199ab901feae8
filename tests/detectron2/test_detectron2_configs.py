"""Both engines take the same values from every config of this folder."""

from pathlib import Path

import pytest

from nst_det.detection.config import load_detect_config
from nst_det.engine.config import flat

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from nst_det.detectron2.config import load_config

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "detect"
CONFIGS = sorted(path for name in ("voc", "quick", "c4") for path in (FOLDER / name).glob("*.yaml"))
TORCHVISION = ["ENGINE", "torchvision"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_detectron2_reads_the_same_values(path):
    ours, theirs = flat(load_detect_config(path, TORCHVISION)), flat(load_config(path, TORCHVISION))
    # Detectron2 writes events unless it is told not to; its config is one of this machine at once
    named = {"MODEL.ROI_HEADS.NAME", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "TENSORBOARD"}
    for key, value in ours.items():
        if key not in named:
            mine, other = (list(item) if isinstance(item, tuple) else item for item in (value, theirs[key]))
            assert mine == other, key
