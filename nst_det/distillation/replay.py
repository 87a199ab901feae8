"""A step of stage one, run again from its dump alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from nst_det.distillation.config import get_defaults
from nst_det.distillation.trainer import StudentTrainer, broken_outputs, outputs_from
from nst_det.engine.config import merge_tree
from nst_det.engine.device import default_device, set_float32_precision
from nst_det.engine.nan_guard import NORM, Step, broken_values, gradient_norm
from nst_det.engine.run_dir import RunFolder
from nst_det.losses import TransferLoss, parse_method
from nst_det.losses.registry import LayerPair
from nst_det.models import create_model, feature_levels


def rebuild(content: dict[str, Any]) -> Step:
    """Return the student of a dumped step, and a call that makes the step by the code that trains."""
    about, given = content["about"], content["transfer"]
    model = create_model(about["arch"], about["num_classes"], **about["arch_kwargs"])
    model.load_state_dict(content["model"])
    pairs = {name: [LayerPair(*values) for values in pairs] for name, pairs in given["pairs"].items()}
    transfer = TransferLoss(parse_method(given["method"]), given["weights"], pairs, given["options"])
    transfer.terms.load_state_dict(given["state"])
    solver: CfgNode = get_defaults().SOLVER
    merge_tree(solver, content["solver"], "the dump")
    # the dump has one part of the step's images
    solver.ACCUMULATE = 1
    precision = getattr(torch, content["precision"])
    device = default_device()
    set_float32_precision(about["float32_precision"], device)
    student = StudentTrainer(
        content["method"],
        model.to(device).to(memory_format=torch.channels_last),
        feature_levels(model),
        transfer.to(device),
        solver,
        content["seed"],
        RunFolder(Path()),
        None if precision == torch.float32 else precision,
        content["warmup"],
        about,
    )
    student.step = content["step"]
    images, labels = content["pixels"].to(student.device), content["labels"].to(student.device)
    teacher = None if content["teacher"] is None else outputs_from(content["teacher"], student.device)

    def run_step() -> tuple[dict[str, float], list[str]]:
        student.forward_backward(images, labels, teacher, int(content["piece"]))
        one = student.pass_of(-1)
        named = [*student.model.named_parameters(), *student.transfer.named_parameters()]
        broken = [*broken_values(one.values, one.places, named), *broken_outputs(teacher)]
        if not broken and not bool(gradient_norm([value for _, value in named]).isfinite()):
            broken = [NORM]
        return one.values, broken

    return student.model, run_step
