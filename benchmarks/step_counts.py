"""Operators that launch something, and waits of the host, in a training step: ours, Detectron2's and torchvision's.

    python benchmarks/step_counts.py

No GPU is needed: the steps run on one that is only pretended (tests/helpers/pretended_cuda.py), which counts as torch's
dispatcher does; a fused or foreach call is one, and so is our NMS, one Triton kernel there.  Ours are steps of the
trainers, all that belongs to one.  The two libraries' detectors have the same backbone (ResNet-18 with FPN), batch (16
images) and sizes, in a plain loop with as few operators as there can be: forward, sum, backward, SGD by foreach.
Detectron2's is counted where it can be imported.

It prints the table and exits with 1 where a limit is missed: those below, and half of the operators of each library.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.device import scenarios
from tests.device.scenarios import FOUND, Folder, count_in, scenario
from tests.helpers.detection import with_instances
from tests.helpers.pretended_cuda import Counts, pretended

CE, NST, ONE = "stage two, ce, 16 images", "stage two, nst-poly@det of p2..p5, 16 images", "stage one, kd+nst-poly"
# operators and waits
LIMITS = {CE: (1100, 4), NST: (1450, 4), ONE: (420, 1)}
IMAGES = 16
# past the first steps, in which more is measured and chosen
STAGE_TWO_STEP = tuple(("nst_det.detection.trainer:Trainer.run_step", call) for call in (4, 5))
STAGE_ONE_STEP = tuple(("nst_det.distillation.loop:one_step", call) for call in (4, 5))
SGD = {"lr": 0.001, "momentum": 0.9, "weight_decay": 1e-4, "foreach": True}


def ours(folder: Folder) -> None:
    student = {"MODEL.TIMM.ARCH": "resnet18", "SOLVER.IMS_PER_BATCH": IMAGES, "SOLVER.MAX_ITER": 6}
    plain = {**student, "DATASETS.TEST": []}
    with scenario("teachers"):
        folder.detect("teacher", **{**plain, "MODEL.TIMM.ARCH": "resnet50", "SOLVER.MAX_ITER": 1})
        folder.distill("deep", METHODS=[], **{"STUDENT.ARCH": "resnet18", "TEACHER.ARCH": "resnet50"})
    with scenario(CE, STAGE_TWO_STEP):
        folder.detect("plain", **plain)
    with scenario(NST, STAGE_TWO_STEP):
        folder.detect("nst", **plain, **folder.taught("nst-poly", "teacher"))
    with scenario(ONE, STAGE_ONE_STEP):
        keys = {"STUDENT.ARCH": "resnet18", "TEACHER.ARCH": "resnet50", "SOLVER.MAX_ITER": 6}
        folder.distill("deep", METHODS=["kd+nst-poly"], **keys)


def loop(name: str, model: torch.nn.Module, batch: Any) -> None:
    """Count the third step of a plain loop."""
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    counts = Counts()
    for step in range(3):
        count_in(counts if step == 2 else None)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            losses = model(*batch())
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    count_in(None)
    FOUND[name] = {"error": "", "counted": True, **vars(counts)}


def training_batch(folder: Folder) -> tuple[Any, list[dict[str, Any]]]:
    """The config of our step and its first batch."""
    from nst_det.detection.config import load_detect_config, resolve_classes
    from nst_det.detection.data import data_classes, open_voc, training_batches

    config = load_detect_config(folder.path / "plain.yaml")
    classes = data_classes(config)
    resolve_classes(config, classes)
    return config, next(iter(training_batches(config, open_voc(config, "DATASETS.TRAIN", classes), 0, 0)))


def torchvisions(folder: Folder) -> None:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    config, batch = training_batch(folder)
    size, rpn, heads = config.INPUT.MIN_SIZE_TRAIN[0], config.MODEL.RPN, config.MODEL.ROI_HEADS
    model = FasterRCNN(
        resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=torch.nn.BatchNorm2d
        ),
        num_classes=heads.NUM_CLASSES + 1,
        min_size=size,
        max_size=config.INPUT.MAX_SIZE_TRAIN,
        rpn_pre_nms_top_n_train=rpn.PRE_NMS_TOPK_TRAIN,
        rpn_post_nms_top_n_train=rpn.POST_NMS_TOPK_TRAIN,
        rpn_batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        box_batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
    )

    def inputs() -> tuple[Any, Any]:
        # as in torchvision's references: one image and its objects after the other
        images = [item["image"].to("cuda").float() / 255 for item in batch]
        objects = [{"boxes": item["boxes"].to("cuda"), "labels": item["labels"].to("cuda") + 1} for item in batch]
        return images, objects

    loop("torchvision's FasterRCNN", model.to("cuda").train(), inputs)


def detectron2s(folder: Folder) -> None:
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    from nst_det.detectron2.config import load_config

    config, batch = training_batch(folder)
    theirs = load_config(folder.path / "plain.yaml", ["ENGINE", "detectron2"])
    theirs.defrost()
    theirs.MODEL.ROI_HEADS.NUM_CLASSES = config.MODEL.ROI_HEADS.NUM_CLASSES
    # Detectron2 has no such device, but asks torch for it
    theirs.MODEL.DEVICE = "cuda"
    model = build_model(theirs).train()
    with EventStorage(0):
        loop("Detectron2's GeneralizedRCNN", model, lambda: (with_instances(batch),))


def table() -> bool:
    """Print all counts; return whether each is within its limit."""
    totals = {
        name: tuple(sum(found[kind].values()) for kind in ("launches", "waits"))
        for name, found in FOUND.items()
        if found["counted"]
    }
    operators = totals[CE][0]
    within = True
    print(f"{'step':46} {'operators':>10} {'waits':>6}")
    for name, (launches, waits) in totals.items():
        if name in LIMITS:
            most = LIMITS[name]
            fine, note = launches <= most[0] and waits <= most[1], f"at most {most[0]} and {most[1]}"
        else:
            fine, note = (
                operators <= launches / 2,
                f"ours are {operators / launches:.2f} of these operators, at most 0.50",
            )
        within &= fine
        print(f"{name:46} {launches:10} {waits:6}   {note}: {'yes' if fine else 'NO'}")
    return within


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as path:
        folder = Folder(Path(path))
        pretended.begin()
        ours(folder)
        torchvisions(folder)
        if importlib.util.find_spec("detectron2") is None:
            print("Detectron2 is not installed: its operators are not counted", file=sys.stderr)
        else:
            detectron2s(folder)
    faults = [f"{name}: {found['error']}" for name, found in scenarios.FOUND.items() if found["error"]]
    if faults:
        print("\n".join(faults), file=sys.stderr)
        return 1
    return int(not table())


if __name__ == "__main__":
    sys.exit(main())
