"""A step of stage one, run again from its file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nst_det.distillation.build import Network
from nst_det.distillation.config import get_defaults
from nst_det.distillation.trainer import StudentTrainer, moved
from nst_det.engine.config import merge_tree
from nst_det.engine.device import default_device, set_float32_precision
from nst_det.engine.keys import OFF
from nst_det.engine.nan_guard import NORM, Step, gradient_norm
from nst_det.engine.run_dir import RunFolder
from nst_det.losses import ModelOutputs, TransferLoss, parse_method
from nst_det.losses.registry import LayerPair
from nst_det.models import create_model


def rebuild(content: dict[str, Any]) -> Step:
    """Return the student of a dumped step, and a call that makes the step by the code that trains."""
    student = _student(content)
    content = moved(content, student.device)
    images, labels, teacher = content["pixels"], content["labels"], None
    if content["teacher"] is not None:
        teacher = ModelOutputs(*(content["teacher"][kind] for kind in ("logits", "maps", "embedding")))
        for key, value in content["teacher"]["shared"]:
            teacher.keep(key, value)

    def run_step() -> tuple[dict[str, float], list[str]]:
        student.forward_backward(images, labels, teacher, int(content["piece"]))
        one = student.passes[-1]
        broken = student.broken_in(one, teacher)
        if not broken and not bool(gradient_norm(student.parameters).isfinite()):
            broken = [NORM]
        return one.values, broken

    return student.model, run_step


def _student(content: dict[str, Any]) -> StudentTrainer:
    arch, num_classes, arch_kwargs = content["network"]
    network = Network(create_model(arch, num_classes, **arch_kwargs), arch, arch_kwargs)
    network.model.load_state_dict(content["model"])
    given = content["transfer"]
    pairs = {name: [LayerPair(*values) for values in pairs] for name, pairs in given["pairs"].items()}
    transfer = TransferLoss(parse_method(given["method"]), given["weights"], pairs, given["options"])
    transfer.terms.load_state_dict(given["state"])
    config = get_defaults()
    merge_tree(config, content["config"], "the step's file")
    solver = config.SOLVER.clone()
    merge_tree(solver, content["solver"], "the step's file")
    # the file has one part of the step's images
    solver.ACCUMULATE, solver.SYNC_BN, solver.COMPILE = 1, False, OFF
    set_float32_precision(config.FLOAT32_PRECISION, default_device())
    precision = getattr(torch, content["precision"])
    precision = None if precision == torch.float32 else precision
    student = StudentTrainer(content["method"], network, transfer, config, solver, precision, RunFolder(Path()))
    student.step = content["step"]
    return student
