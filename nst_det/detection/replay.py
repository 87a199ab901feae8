"""A step of stage two, run again from its file and, where it has one, the teacher detector that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nst_det import detectron2
from nst_det.detection.config import get_defaults
from nst_det.detection.distiller import DistilledDetector, distill, wants_teacher
from nst_det.detection.pipeline import place_detector, teacher_of
from nst_det.detection.torchvision import Detector, build_detector
from nst_det.detection.trainer import Trainer, broken_in
from nst_det.engine.config import merge_tree
from nst_det.engine.device import amp_dtype, is_gpu_error
from nst_det.engine.nan_guard import NotFinite, Replayed, first_broken
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError


def replay(content: dict[str, Any], path: str | Path) -> Replayed:
    """Forward and backward of the step, by the engine that it was made with.

    Args:
        content: of the file, see :func:`nst_det.detection.trainer.step_content`.
        path: of the file, for errors.

    Raises:
        UserError: the file is not whole, of the Detectron2 engine where Detectron2 is not installed, or its teacher is
            no longer there.
    """
    try:
        if content["config"]["ENGINE"] == "torchvision":
            losses, broken, first = run_again(content)
        elif detectron2.is_available():
            losses, broken, first = detectron2.run_again(content)
        else:
            raise UserError(f"{path}: a step of Detectron2's, which is not installed; see {detectron2.INSTALL_PAGE}")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        if is_gpu_error(error):
            raise
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: can't be run again ({reason}); use the version that wrote it") from error
    recorded, names = dict(content["terms"]), [str(name) for name in content["images"]]
    who = f"stage two, {content['method']}, step {content['step']}"
    return Replayed(who, recorded, losses, broken, list(content["not_finite"]), names, first)


def run_again(content: dict[str, Any]) -> tuple[dict[str, float], list[str], str]:
    """The torchvision engine's step: losses by name, what is no number, and the first layer that made it, or ""."""
    training = _training(content)
    batch = [_on(training.device, item) for item in content["batch"]]
    losses: dict[str, float] = {}
    broken: list[str] = []
    with first_broken(training.model) as found:
        try:
            losses = {name: float(value) for name, value in training.backward(batch).items()}
        except NotFinite as error:
            broken = [str(error)]
    return losses, broken or broken_in(training.model, losses), found.name


def _training(content: dict[str, Any]) -> Trainer:
    config = get_defaults()
    merge_tree(config, content["config"], "the step's file")
    student = build_detector(config, content["seed"])
    student.load_state_dict(content["model"])
    student.freeze(config.MODEL.BACKBONE.FREEZE_AT, config.MODEL.TIMM.NORM)
    place_detector(student, config)
    if config.SOLVER.AMP.ENABLED:
        student.amp = amp_dtype("auto", student.pixel_mean.device)
    model: Detector | DistilledDetector = student
    if wants_teacher(config.TRANSFER):
        model = distill(student, teacher_of(config)[0], config.TRANSFER)
        model.transfer.load_state_dict(content["adapters"])
        model.transfer.weights.update(content["weights"])
        model.to(student.pixel_mean.device)
    model.train()
    training = Trainer(model, config, content["seed"], RunFolder(Path()))
    training.done = content["step"]
    return training


def _on(device: torch.device, item: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in item.items()}
