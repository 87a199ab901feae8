"""A step of the Detectron2 engine, run again from its dump."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from nst_det.detection.config import resolve_device
from nst_det.detection.trainer import broken_in, transfer_of
from nst_det.detectron2.api import student_of
from nst_det.detectron2.config import add_config
from nst_det.detectron2.trainer import DistillTrainer, propose_together, reduce_backbones
from nst_det.engine.config import merge_tree
from nst_det.engine.device import amp_dtype, autocast
from nst_det.engine.nan_guard import Step
from nst_det.engine.seeds import seed_everything
from nst_det.errors import UserError
from nst_det.models.io import pickles_are_trusted


def rebuild(content: Mapping[str, Any]) -> Step:
    """Return the model that Detectron2 builds from a dumped step's config, and a call that makes the step."""
    cfg = _config(content["config"])
    model = DistillTrainer.build_model(cfg)
    student, transfer = student_of(model), transfer_of(model)
    student.load_state_dict(content["model"])
    propose_together(student)
    if transfer is not None:
        transfer.load_state_dict(content["adapters"])
        transfer.weights.update(content["weights"])
    device = next(model.parameters()).device
    dtype = amp_dtype(cfg.SOLVER.AMP, device)
    if dtype is not None and device.type == "cpu":
        reduce_backbones(model, dtype, test=False)
    model.train()
    batch = []
    for item in content["batch"]:
        instances = Instances(tuple(item["image"].shape[-2:]))
        instances.gt_boxes, instances.gt_classes = Boxes(item["boxes"]), item["labels"]
        batch.append({**item, "instances": instances})
    seed, step, rank = content["seed"], content["step"], content["rank"]

    def run_step() -> tuple[dict[str, float], list[str]]:
        if seed >= 0:
            seed_everything(seed, "step", step, rank)
        with EventStorage(step):
            with autocast(device, dtype if device.type == "cuda" else None):
                losses = model(batch)
            torch.stack(list(losses.values())).sum().backward()
        values = {name: float(value.detach()) for name, value in losses.items()}
        return values, broken_in(model, values)

    return model, run_step


def _config(tree: dict[str, Any]) -> CfgNode:
    cfg = get_cfg()
    add_config(cfg)
    merge_tree(cfg, tree, "the dump")
    if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
        raise UserError("a step with masks, keypoints or loaded proposals can't be run again: its file has boxes alone")
    teacher = cfg.TEACHER.CONFIG_FILE
    if teacher.endswith(".py") and not pickles_are_trusted():
        raise UserError(
            f"{teacher}: the teacher's config is Python code; if you trust this step's file, --trust-pickle"
        )
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    # the weights are those in the file, and what may be opened for the teacher is not the file's to say
    cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED, cfg.TRUST_PICKLE = "the step's", False, False
    return cfg
