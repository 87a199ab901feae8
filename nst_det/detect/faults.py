"""A step of stage two that gave something that is no number: what that is, and a file to run the step again from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.detect.distilled import DistilledDetector
from nst_det.runtime.config import plain
from nst_det.runtime.nonfinite import broken_values
from nst_det.runtime.processes import rank, world_size

KIND = "stage two"


def broken_in(model: nn.Module, losses: Mapping[str, float]) -> list[str]:
    """What of the last pass is no number in this process: losses, those of maps with their levels, else gradients.

    Args:
        model: after its backward pass; gradients that several processes have averaged tell nothing of this one.
        losses: this process's, by name.
    """
    parts = model.transfer.parts if isinstance(model, DistilledDetector) else {}
    alone = world_size() == 1
    gradients = {name: item.grad for name, item in model.named_parameters() if alone and item.grad is not None}
    return broken_values(losses, parts, gradients)


def step_content(
    model: nn.Module, config: CfgNode, seed: int, batch: Sequence[Mapping[str, Any]], losses: Mapping[str, float]
) -> dict[str, Any]:
    """All that the step depends on but the teacher detector, which the config names.

    Args:
        model: as it was before the step.
        config: the resolved config.
        seed: of the run; the process's rank is kept beside it.
        batch: what the model was given; ``image`` (3, H, W), and in the torchvision engine ``boxes`` and ``labels``.
        losses: by name, as far as they are known.
    """
    transfer = model.transfer if isinstance(model, DistilledDetector) else None
    return {
        "kind": KIND,
        "method": config.TRANSFER.METHOD,
        "config": plain(config),
        "seed": seed,
        "rank": rank(),
        "model": {name: value.detach().cpu() for name, value in model.state_dict().items()},
        "adapters": {} if transfer is None else {k: v.detach().cpu() for k, v in transfer.state_dict().items()},
        "weights": {} if transfer is None else dict(transfer.weights),
        "batch": [_plain_item(item) for item in batch],
        "terms": dict(losses),
    }


def _plain_item(item: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in item.items() if isinstance(value, Tensor | str | int | float)}
    instances = item.get("instances")
    if instances is not None:
        # Detectron2's, in the words of the torchvision engine
        values |= {"boxes": instances.gt_boxes.tensor, "labels": instances.gt_classes}
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in values.items()}
