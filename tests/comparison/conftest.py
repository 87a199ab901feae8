import multiprocessing
import sys
from pathlib import Path

import pytest
import yaml

from nst_det.cli import main
from nst_det.comparison.config import load_comparison

FAKE_STAGE = Path(__file__).with_name("fake_stage.py")
# what Detectron2's defaults leave to the user
DETECT = {
    "ENGINE": "torchvision",
    "MODEL": {
        "BACKBONE": {"NAME": "build_timm_fpn_backbone"},
        "TIMM": {"ARCH": "nst_resnet10_w32", "NORM": "BN"},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"]},
        "PIXEL_MEAN": [123.675, 116.28, 103.53],
        "PIXEL_STD": [58.395, 57.12, 57.375],
        "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"]},
        "ROI_HEADS": {"NAME": "StandardROIHeads", "NUM_CLASSES": 0, "IN_FEATURES": ["p2", "p3", "p4", "p5"]},
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7},
    },
    "INPUT": {"FORMAT": "RGB"},
    "DATASETS": {"TRAIN": ["own_train"], "TEST": ["own_test"]},
    "SOLVER": {"MAX_ITER": 8},
}
DETECT["DATASETS"]["VOC"] = {name: {"ROOT": "FOLDER/voc", "SPLIT": name[4:]} for name in ("own_train", "own_test")}
DISTILL = {"DATA": {"ROOT": "FOLDER/images"}, "SOLVER": {"MAX_ITER": 6}, "TEACHER": {"SOLVER": {"MAX_ITER": 5}}}
COMPARE = {
    "NAME": "small",
    "METHODS": ["kd", "nst-poly+kd"],
    "SEEDS": [0, 1],
    "THREADS": 2,
    "DISTILL": {"CONFIG": "distill.yaml"},
    "DETECT": {"CONFIG": "detect.yaml", "SCRATCH_OPTS": ["SOLVER.BACKBONE_MULTIPLIER", 0.5]},
}


@pytest.fixture
def config_file(tmp_path):
    """The YAML of a small comparison, with those of both stages beside it."""
    for name, tree in (("distill", DISTILL), ("detect", DETECT), ("compare", COMPARE)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree).replace("FOLDER", str(tmp_path)))
    for name in ("images", "voc"):
        (tmp_path / name).mkdir()
    return tmp_path / "compare.yaml"


@pytest.fixture
def forked(tmp_path):
    """``forked(words)``: ``nst-det`` with these words in a process of its own, which adds what it says to said.txt.

    It is forked, because importing torch takes its time; ``first`` is called in it before.
    """
    started = []

    def begin(words, first=lambda: None):
        process = multiprocessing.get_context("fork").Process(target=call, args=(words, first))
        process.start()
        started.append(process)
        return process

    def call(words, first):
        with open(tmp_path / "said.txt", "a", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            first()
            main([str(word) for word in words])

    yield begin
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def comparison(config_file, tmp_path):
    return load_comparison(config_file, tmp_path / "out")


@pytest.fixture
def fake_command():
    """Command lines that start the stage that trains nothing."""
    return lambda run, folder: [sys.executable, str(FAKE_STAGE), *run.command(folder)]
