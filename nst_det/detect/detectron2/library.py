"""Three lines for somebody's own Detectron2 project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from nst_det.backbones.pickles import trusting_pickles
from nst_det.detect import distilled
from nst_det.detect.box_head import check_class_names, reads_box_head
from nst_det.detect.config import detector_transfer_node
from nst_det.detect.detectron2.config import class_list
from nst_det.detect.detectron2.heads import box_outputs
from nst_det.detect.detectron2.teacher import build_teacher, teacher_classes
from nst_det.detect.distilled import DistilledDetector
from nst_det.detect.opening import log_shapes
from nst_det.errors import UserError
from nst_det.runtime.seeds import seeded
from nst_det.transfer import TransferLoss, parse_method


def distill(
    student: nn.Module,
    teacher: nn.Module | str,
    method: str = "nst-poly",
    levels: Sequence[str] = ("p2", "p3", "p4", "p5"),
    *,
    teacher_weights: str = "",
    weights: Mapping[str, float] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    auto_weight: Mapping[str, float] | None = None,
    warmup_iters: int = 0,
    seed: int = 0,
    trust_pickle: bool = False,
) -> DistilledDetector:
    """Any Detectron2 detector, made to learn from a teacher detector while it trains.

    The result trains, evaluates and is saved like ``student``: its losses get a ``loss_transfer_<term>`` a term, and
    its state dict is the student's, by the student's names.  Give its ``parameters()`` to the optimizer, since some
    terms have adapters; to keep these over a restart, add
    ``checkpointer.add_checkpointable("adapters", model.transfer)``.

    Args:
        student: the detector that is trained, from ``build_model(cfg)``, ``instantiate(cfg.model)`` or anywhere.
        teacher: a trained detector, or its config: a YAML, a Python LazyConfig, or a name in Detectron2's model zoo.
        method: a method's word, such as ``nst-poly``, ``at+nst-poly`` or ``nst-poly:20``.
        levels: what is compared: names that the backbones give, ``student:teacher`` where they differ.
        teacher_weights: the teacher's checkpoint if ``teacher`` is a config; "" takes those that it names.
        weights: term to weight, where the word has none.
        options: term to its options; ``kd`` has the temperature 1 here.
        auto_weight: term to the share of the gradient norm at the student's backbone, 1.0 as much as the student's own
            losses, that its weight is to give it; chosen in the first five steps, instead of ``weights``.
        warmup_iters: the weights rise linearly from 0 over that many steps.
        seed: of the adapters.
        trust_pickle: open the teacher's checkpoint also where it is a pickle with more than tensors in it (``.pkl``, as
            the model zoo has them), which can run any code.

    Raises:
        UserError: no such teacher, weights that don't fit it, or a method that these two can't be compared by.

    Example::

        class Trainer(DefaultTrainer):
            @classmethod
            def build_model(cls, cfg):
                return distill(super().build_model(cfg), "teacher.yaml", "nst-poly")
    """
    node = detector_transfer_node()
    node.METHOD, node.LEVELS, node.WARMUP_ITERS = method, list(levels), warmup_iters
    for name, values in (("WEIGHTS", weights), ("OPTIONS", options), ("AUTO_WEIGHT", auto_weight)):
        for term, value in dict(values or {}).items():
            node[name][term] = dict(value) if isinstance(value, Mapping) else value
    if isinstance(teacher, str):
        with trusting_pickles(trust_pickle):
            teacher = build_teacher(
                teacher, teacher_weights, str(_device(student)), levels=node.LEVELS, box_head=_reads_box_head(node)
            )
    return _wrap(student, teacher, node, seed)


def distill_from_config(student: nn.Module, cfg: CfgNode) -> nn.Module:
    """The same from the ``TRANSFER`` node of a config; the student itself where ``METHOD`` is ``ce``.

    Raises:
        UserError: see :func:`distill`.
    """
    node = cfg.TRANSFER
    if not distilled.wants_teacher(node):
        return student
    named, device = node.TEACHER, str(_device(student))
    with trusting_pickles(cfg.TRUST_PICKLE):
        teacher = build_teacher(
            named.CONFIG_FILE, named.WEIGHTS, device, levels=_levels(node), box_head=_reads_box_head(node)
        )
        classes = teacher_classes(named.CONFIG_FILE, named.WEIGHTS)
    model = _wrap(student, teacher, node, max(cfg.SEED, 0))
    check_class_names(model.transfer, class_list(cfg), classes)
    return model


def _levels(node: CfgNode) -> list[str]:
    return [*node.LEVELS, *(level for levels in node.TERM_LEVELS.values() for level in levels)]


def _reads_box_head(node: CfgNode) -> bool:
    try:
        return reads_box_head(parse_method(node.METHOD))
    except ValueError as error:
        raise UserError(f"TRANSFER.METHOD: {error}") from error


def _wrap(student: nn.Module, teacher: nn.Module, node: CfgNode, seed: int) -> DistilledDetector:
    with seeded(seed, "adapters"):
        model = distilled.distill(student, teacher, node, box_outputs)
    model.to(_device(student))
    log_shapes(model)
    model.register_forward_pre_hook(_follow_iteration)
    return model


def _follow_iteration(model: nn.Module, _: Any) -> None:
    # a run that goes on doesn't warm up again, whoever's trainer it is
    if model.training and has_event_storage():
        model.iteration = get_event_storage().iter


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def student_of(model: nn.Module) -> nn.Module:
    """The student in a :class:`DistilledDetector`; any other model itself."""
    return model.student if isinstance(model, DistilledDetector) else model


def transfer_of(model: nn.Module) -> TransferLoss | None:
    """The transfer terms of a :class:`DistilledDetector`; None for any other model."""
    return model.transfer if isinstance(model, DistilledDetector) else None
