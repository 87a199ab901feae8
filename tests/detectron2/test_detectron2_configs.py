"""Every config of this folder is honored by both engines, and both take the same values from it."""

from pathlib import Path

import pytest

from nst_det.detect.config import load_detect_config
from nst_det.errors import UserError
from nst_det.runtime.config import flat

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "detect"
CONFIGS = sorted(path for name in ("voc", "quick", "c4") for path in (FOLDER / name).glob("*.yaml"))
TORCHVISION = ["ENGINE", "torchvision"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_torchvision_engine_honors_it(path):
    cfg = load_detect_config(path, TORCHVISION)
    if cfg.TRANSFER.METHOD != "ce":
        teacher = load_detect_config(FOLDER.parents[1] / cfg.TRANSFER.TEACHER.CONFIG_FILE, TORCHVISION)
        # the named weights are those that the teacher's own config writes
        assert Path(cfg.TRANSFER.TEACHER.WEIGHTS).parent == Path(teacher.OUTPUT_DIR)
        assert teacher.DATASETS.TRAIN == cfg.DATASETS.TRAIN
    if "voc" in path.stem:
        images = {"voc07": 5011, "voc0712": 16551}[path.stem.split("_")[0]]
        assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / images == pytest.approx(17.5, abs=0.2)


@pytest.mark.detectron2
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_detectron2_reads_the_same_values(path):
    pytest.importorskip(
        "detectron2",
        reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
    )
    from nst_det.detect.detectron2.config import load_config

    ours, theirs = flat(load_detect_config(path, TORCHVISION)), flat(load_config(path, TORCHVISION))
    # Detectron2 writes events unless it is told not to
    named = {"MODEL.ROI_HEADS.NAME", "MODEL.DEVICE", "TENSORBOARD"}
    for key, value in ours.items():
        if key not in named:
            mine, other = (list(item) if isinstance(item, tuple) else item for item in (value, theirs[key]))
            assert mine == other, key


@pytest.mark.detectron2
def test_parts_of_a_batch_are_refused_by_detectron2():
    from nst_det.detect.detectron2.config import load_config

    with pytest.raises(UserError, match="SOLVER.ACCUMULATE: Detectron2's trainer doesn't take"):
        load_config(CONFIGS[0], ["SOLVER.ACCUMULATE", "2"])
