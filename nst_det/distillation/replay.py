"""A step of stage one, run again from its file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from nst_det.distillation.config import get_defaults
from nst_det.distillation.trainer import StudentTrainer, broken_outputs, outputs_from
from nst_det.engine.config import merge_tree
from nst_det.engine.device import default_device, is_gpu_error, set_float32_precision
from nst_det.engine.nan_guard import NORM, Replayed, broken_values, first_broken, gradient_norm
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.losses import TransferLoss, parse_method
from nst_det.losses.registry import LayerPair
from nst_det.models import create_model, feature_levels


def replay(content: dict[str, Any], path: str | Path) -> Replayed:
    """Forward and backward of the step, by the code that trains.

    Args:
        content: of the file, see :func:`nst_det.distillation.trainer.step_content`.
        path: of the file, for errors.

    Raises:
        UserError: the file is not whole, or the network can't be built.
    """
    try:
        student = _student(content)
        images, labels = content["pixels"].to(student.device), content["labels"].to(student.device)
        teacher = None if content["teacher"] is None else outputs_from(content["teacher"], student.device)
        with first_broken(student.model) as found:
            student.forward_backward(images, labels, teacher, int(content["piece"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_gpu_error(error):
            raise
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: can't be run again ({reason}); use the version that wrote it") from error
    one = student.pass_of(-1)
    terms = one.values
    named = [*student.model.named_parameters(), *student.transfer.named_parameters()]
    gradients = {name: value.grad for name, value in named if value.grad is not None}
    broken = [*broken_values(terms, one.places, gradients), *broken_outputs(teacher)]
    if not broken and not bool(gradient_norm([value for _, value in named]).isfinite()):
        broken = [NORM]
    recorded, names = dict(content["terms"]), [str(name) for name in content["images"]]
    who = f"stage one, {content['method']}, step {content['step']}"
    return Replayed(who, recorded, terms, broken, list(content["not_finite"]), names, found.name)


def _student(content: dict[str, Any]) -> StudentTrainer:
    about, given = content["about"], content["transfer"]
    model = create_model(about["arch"], about["num_classes"], **about["arch_kwargs"])
    model.load_state_dict(content["model"])
    pairs = {name: [LayerPair(*values) for values in pairs] for name, pairs in given["pairs"].items()}
    transfer = TransferLoss(parse_method(given["method"]), given["weights"], pairs, given["options"])
    transfer.terms.load_state_dict(given["state"])
    solver: CfgNode = get_defaults().SOLVER
    merge_tree(solver, content["solver"], "the step's file")
    # the file has one part of the step's images
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
    return student
