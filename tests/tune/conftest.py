import importlib.util
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml

from nst_det.tune.config import load_tuning
from nst_det.tune.run import tune

_SPEC = importlib.util.spec_from_file_location("tune_fake_stage", Path(__file__).with_name("fake_stage.py"))
fake_stage = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fake_stage)
DETECT = {
    "ENGINE": "torchvision",
    "MODEL": {
        "BACKBONE": {"NAME": "build_timm_fpn_backbone"},
        "TIMM": {"ARCH": "nst_resnet10_w32", "NORM": "BN"},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 16},
        "PIXEL_MEAN": [123.675, 116.28, 103.53],
        "PIXEL_STD": [58.395, 57.12, 57.375],
        "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"]},
        "ROI_HEADS": {"NAME": "StandardROIHeads", "NUM_CLASSES": 0, "IN_FEATURES": ["p2", "p3", "p4", "p5"]},
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "FC_DIM": 16},
    },
    "INPUT": {"FORMAT": "RGB"},
    "DATASETS": {
        "TRAIN": ["own_train"],
        "TEST": ["own_test"],
        "VOC": {
            "own_train": {"ROOT": "FOLDER/voc", "SPLIT": "train"},
            # a test set that isn't there: whoever opens it fails
            "own_test": {"ROOT": "FOLDER/gone", "SPLIT": "test"},
        },
    },
    "SOLVER": {"MAX_ITER": 8},
}
DISTILL = {
    "DATA": {"ROOT": "FOLDER/images"},
    "TEACHER": {"ARCH": "nst_resnet10_w32"},
    "SOLVER": {"MAX_ITER": 6},
    "TRANSFER": {"LEVELS": ["res3"], "WEIGHTS": {"at": 10, "nst-poly": 10.0}},
}
COMPARE = {
    "NAME": "small",
    "METHODS": ["kd", "at", "kd+nst-poly", "cwd@det"],
    "THREADS": 1,
    "DISTILL": {"CONFIG": "distill.yaml"},
    "DETECT": {"CONFIG": "detect.yaml"},
}
TUNE = {
    "COMPARE": "compare.yaml",
    "TRIALS": 4,
    "SEEDS": [0, 1],
    "VAL_FRACTION": 0.25,
    "LEVELS": [["res4"], ["res3", "res4"]],
    "DET_LEVELS": [["p4"]],
}


def write_configs(folder):
    """The YAML of a small search, with the comparison and both stages beside it."""
    for name, tree in (("distill", DISTILL), ("detect", DETECT), ("compare", COMPARE), ("tune", TUNE)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree).replace("FOLDER", str(folder)))
    for name in ("images", "voc"):
        (folder / name).mkdir()
    return folder / "tune.yaml"


class RunsHere:
    """A launcher that does one run after another in this process, by the fake stage."""

    errors, hint = (), ""

    def __init__(self, folder, *_):
        self.folder = folder

    def fitting(self, ready, running):
        return ready[:1]

    def submit(self, run):
        future = Future()
        fake_stage.do(run.command(self.folder), run.config_path(self.folder))
        future.set_result((0, ""))
        return future

    def stop(self):
        pass


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished search: its folder, what was asked, what was found and the file."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nst_det.tune.run.LocalLauncher", RunsHere)
        tuning = load_tuning(write_configs(folder), folder / "out")
        return folder, tuning, *tune(tuning)


@pytest.fixture
def tune_file(tmp_path, monkeypatch):
    """The YAML of a search whose runs train nothing."""
    monkeypatch.setattr("nst_det.tune.run.LocalLauncher", RunsHere)
    return write_configs(tmp_path)
