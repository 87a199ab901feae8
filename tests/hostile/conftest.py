import contextlib
import io
import itertools
import json
import logging
import re
import shutil

import pytest
import torch

from nst_det.cli import main
from nst_det.engine.checkpoint import save_checkpoint
from nst_det.models import Card, create_model, input_contract, save_backbone
from tests.helpers.voc import jpeg, make, obj, write, xml

LARGE = 64 << 20
DETECT = """\
_BASE_: {base}
ENGINE: torchvision
MODEL:
  DEVICE: cpu
  TIMM: {{ARCH: nst_resnet10_w32, NORM: BN}}
  BACKBONE: {{FREEZE_AT: 0}}
  FPN: {{OUT_CHANNELS: 16}}
  ROI_BOX_HEAD: {{FC_DIM: 32}}
INPUT: {{MIN_SIZE_TRAIN: [32], MAX_SIZE_TRAIN: 48, MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 48}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{MAX_ITER: 1, IMS_PER_BATCH: 2, STEPS: []}}
DATASETS:
  TRAIN: [a]
  TEST: []
  VOC: {{a: {{ROOT: {root}/voc, SPLIT: train}}}}
"""
DISTILL = """\
NAME: t
METHODS: [ce]
DATA: {{ROOT: {root}/images, IMAGE_SIZE: 16}}
STUDENT: {{ARCH: nst_resnet10_w32}}
TEACHER: {{ARCH: nst_resnet10_w32, WEIGHTS: {root}/backbones/b.safetensors}}
SOLVER: {{MAX_ITER: 1, IMS_PER_BATCH: 4, AMP: {{ENABLED: False}}}}
"""


@pytest.fixture(scope="session")
def good(tmp_path_factory, pytestconfig):
    """Inputs that can all be used: a VOC folder, an image folder, a backbone, configs, detections, a checkpoint."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("good")
    make(root / "voc", {id_: xml(obj("cup", (2, 2, 20, 20))) for id_ in "ab"})
    for part, label, index in itertools.product(("train", "val"), "xy", range(2)):
        write(root / "images" / part / label / f"{index}.jpg", jpeg(16, 16, index))
    torch.manual_seed(0)
    card = Card(
        "nst_resnet10_w32",
        2,
        classes=["x", "y"],
        input=input_contract([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "RGB", 16),
    )
    save_backbone(root / "backbones" / "b.safetensors", create_model("nst_resnet10_w32", 2), card)
    base = pytestconfig.rootpath / "configs" / "detect" / "base_rcnn_fpn.yaml"
    (root / "detect.yaml").write_text(DETECT.format(base=base, root="ROOT"))
    (root / "distill.yaml").write_text(DISTILL.format(root="ROOT"))
    (root / "compare.yaml").write_text(
        "NAME: t\nMETHODS: [ce]\nENGINE: torchvision\nDISTILL: {CONFIG: distill.yaml}\nDETECT: {CONFIG: detect.yaml}\n"
    )
    entry = {"image_id": "a", "category": "cup", "bbox": [1, 1, 5, 5], "score": 0.5}
    (root / "detections.json").write_text(json.dumps([entry]))
    (root / "results").mkdir()
    (root / "results" / "comp4_det_train_cup.txt").write_text("a 0.5 1 1 5 5\n")
    save_checkpoint(root / "checkpoints", 3, {"model": {"w": torch.ones(4)}})
    return root


@pytest.fixture
def tree(good, tmp_path, monkeypatch):
    """A copy of its own, whose backbones are the registry."""
    root = tmp_path / "in"
    shutil.copytree(good, root)
    for name in ("detect.yaml", "distill.yaml"):
        (root / name).write_text((root / name).read_text().replace("ROOT/", f"{root}/"))
    monkeypatch.setenv("NST_DET_BACKBONES", str(root / "backbones"))
    return root


def snapshot(root):
    """Every path below a folder with its bytes, or where a link points; of very large files size and time."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file() and status.st_size < LARGE:
            content = path.read_bytes()
        else:
            content = (status.st_size, status.st_mtime_ns) if path.is_file() else None
        found[path.relative_to(root)] = content
    return found


# TREE is the folder of the inputs, OUT one beside it
COMMANDS = {
    "evaluate": "evaluate --voc-root TREE/voc --split train --detections TREE/detections.json",
    "results": "evaluate --voc-root TREE/voc --split train --detections TREE/results",
    "check": "backbones --check b",
    "registry": "backbones --check",
    "root": "backbones --root TREE/nowhere",
    "replay": "replay TREE/checkpoints/step-00000003.pt",
    "convert": "convert --weights TREE/w.pth --to detectron2 --output OUT/c.pth",
    "zoo": "convert --weights TREE/w.pkl --to detectron2 --output TREE/c.pth",
    "detect": "train-det --config-file TREE/detect.yaml OUTPUT_DIR OUT",
    "distill": "distill --config-file TREE/distill.yaml OUTPUT_DIR OUT REGISTRY OUT/backbones",
    "compare": "compare --config-file TREE/compare.yaml --output OUT",
    "report": "report TREE",
    "init": "init OUT/project --voc TREE/voc",
}


@pytest.fixture
def refused(tmp_path):
    """Run a command that can't use its input, and return the one line that it prints about that."""

    def call(root, name, *more):
        before = snapshot(root)
        places = {"TREE": str(root), "OUT": str(root.parent / "out")}
        words = [re.sub(r"^(TREE|OUT)\b", lambda found: places[found[0]], word) for word in COMMANDS[name].split()]
        errors, output = io.StringIO(), io.StringIO()
        logging.getLogger().handlers.clear()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output), pytest.raises(SystemExit) as stop:
            main([*words, *more])
        printed = errors.getvalue() + output.getvalue()
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("nst-det: ")]
        assert stop.value.code == 2, printed
        assert "Traceback" not in printed
        assert len(lines) == 1, printed
        assert lines[0].isprintable()
        assert len(lines[0]) < 1500
        assert snapshot(root) == before, lines[0]
        assert not list((tmp_path / "out").rglob("*.safetensors"))
        return lines[0]

    return call
