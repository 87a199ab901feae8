"""The YAML of a small comparison with both stages, and how its runs are done by the stage that trains nothing."""

import sys
from concurrent.futures import Future

import yaml

from tests.helpers import fake_stage
from tests.helpers.voc import jpeg, make, obj, write, xml

# what Detectron2's defaults leave to the user
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
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "FC_DIM": 16, "POOLER_RESOLUTION": 7},
    },
    "INPUT": {"FORMAT": "RGB"},
    "DATASETS": {
        "TRAIN": ["own_train"],
        "TEST": ["own_test"],
        "VOC": {name: {"ROOT": "FOLDER/voc", "SPLIT": name[4:]} for name in ("own_train", "own_test")},
    },
    "SOLVER": {"MAX_ITER": 8},
}
DISTILL = {"DATA": {"ROOT": "FOLDER/images"}, "SOLVER": {"MAX_ITER": 6}, "TEACHER": {"SOLVER": {"MAX_ITER": 5}}}
COMPARE = {
    "NAME": "small",
    "METHODS": ["kd", "nst-poly+kd"],
    "SEEDS": [0, 1],
    "THREADS": 2,
    "DISTILL": {"CONFIG": "distill.yaml"},
    "DETECT": {"CONFIG": "detect.yaml", "SCRATCH_OPTS": ["SOLVER.BACKBONE_MULTIPLIER", 0.5]},
}


def write_comparison(folder, compare=COMPARE, distill=DISTILL, detect=DETECT):
    """Write compare.yaml, with the configs of both stages and a little data beside it."""
    for name, tree in (("distill", distill), ("detect", detect), ("compare", compare)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree).replace("FOLDER", str(folder)))
    for name in "abcdef":
        write(folder / "images" / "cat" / f"{name}.jpg", jpeg(8, 8))
    for split in ("train", "test"):
        make(folder / "voc", {split: xml(obj())}, split)
    return folder / "compare.yaml"


def change(file, **changes):
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


def fake_command(run, folder):
    return [sys.executable, fake_stage.__file__, *run.command(folder)]


def starts(folder):
    return (folder / "starts.log").read_text().splitlines()


class RunsHere:
    """A launcher that does one run after another in this process."""

    errors, hint = (), ""

    def __init__(self, folder, *_):
        self.folder = folder

    def fitting(self, ready, running):
        return ready[:1]

    def submit(self, run):
        future = Future()
        try:
            fake_stage.do(run.command(self.folder))
            future.set_result((0, ""))
        except SystemExit as left:
            future.set_result((left.code, "nst-det: the images are gone; bring them back"))
        return future

    def stop(self):
        pass
