"""A step of the torchvision engine, run again from its dump and the teacher detector that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from nst_det.detection.config import get_defaults
from nst_det.detection.distiller import DistilledDetector, distill, wants_teacher
from nst_det.detection.pipeline import place_detector, teacher_of
from nst_det.detection.torchvision import Detector, build_detector
from nst_det.detection.trainer import Trainer, broken_in
from nst_det.engine.config import merge_tree
from nst_det.engine.device import amp_dtype
from nst_det.engine.nan_guard import Step
from nst_det.engine.run_dir import RunFolder


def rebuild(content: dict[str, Any]) -> Step:
    """Return the model of a dumped step, and a call that makes the step."""
    config = get_defaults()
    merge_tree(config, content["config"], "the dump")
    # the weights are those in the file
    config.MODEL.TIMM.PRETRAINED = False
    student = build_detector(config, content["seed"])
    student.load_state_dict(content["model"])
    student.backbone.bottom_up.loaded = True
    student.freeze(config.MODEL.BACKBONE.FREEZE_AT, config.MODEL.TIMM.NORM)
    place_detector(student, config)
    student.amp = amp_dtype(config.SOLVER.AMP, student.pixel_mean.device)
    model: Detector | DistilledDetector = student
    if wants_teacher(config):
        model = distill(student, teacher_of(config)[0], config.METHOD, config.TRANSFER)
        model.transfer.load_state_dict(content["adapters"])
        model.transfer.weights.update(content["weights"])
        model.to(student.pixel_mean.device)
    model.train()
    trainer = Trainer(model, config, content["seed"], RunFolder(Path()), lambda _: ())
    trainer.iter, trainer.rank = content["step"], content["rank"]
    batch = [
        {key: value.to(trainer.device) if isinstance(value, Tensor) else value for key, value in item.items()}
        for item in content["batch"]
    ]

    def run_step() -> tuple[dict[str, float], list[str]]:
        losses = {name: float(value) for name, value in trainer.backward(batch).items()}
        return losses, broken_in(model, losses)

    return model, run_step
