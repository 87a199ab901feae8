"""What a finished network leaves behind: its backbone file and its result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nst_det.backbones import Card, count_parameters, input_contract, save_backbone
from nst_det.distill.dataset import StageOneData
from nst_det.distill.networks import Network
from nst_det.distill.student import Student
from nst_det.runtime.checkpoint import checkpoints

log = logging.getLogger(__name__)


def card_of(network: Network, data: StageOneData, **fields: Any) -> Card:
    """The card of a network that was trained on ``data``."""
    node = data.config.DATA
    return Card(
        arch=network.arch,
        num_classes=len(data.classes),
        arch_kwargs=network.arch_kwargs,
        classes=data.classes,
        input=input_contract(node.MEAN, node.STD, "RGB", node.IMAGE_SIZE),
        data=data.description(),
        seed=data.config.SEED,
        **fields,
    )


def finish(student: Student, network: Network, data: StageOneData, path: Path, **fields: Any) -> dict[str, Any]:
    """Write the backbone file of a student that did all its steps, then its result; drop its checkpoints.

    Args:
        student: evaluated after its last step.
        network: arch and arguments of its model.
        data: what it was trained on.
        path: of the backbone file.
        fields: further fields of the card.

    Returns:
        The result, as it stands in ``result.json``.
    """
    accuracy = student.accuracy
    assert accuracy is not None, "a student is evaluated before it is finished"
    card = card_of(network, data, method=student.word, weights=dict(student.transfer.weights), **fields)
    card.top1, card.top5, card.steps = accuracy.top1, accuracy.top5, student.step
    card = save_backbone(path, student.kept, card)
    result = {
        "method": student.word,
        "weights": card.weights,
        "backbone": str(path),
        "sha256": card.sha256,
        "name": path.stem,
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "top1_best": student.best.top1,
        "step_best": student.best_step,
        "seconds": student.seconds,
        "steps": student.step,
        "seed": data.config.SEED,
        "params": count_parameters(student.model),
    }
    student.folder.finish(result)
    for checkpoint in checkpoints(student.folder.checkpoints):
        checkpoint.unlink(missing_ok=True)
    return result
