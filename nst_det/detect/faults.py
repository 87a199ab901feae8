"""A step of stage two that gave something that is no number, as a file from which it can be run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.detect.distilled import DistilledDetector
from nst_det.runtime.config import plain

KIND = "stage two"


def step_content(
    model: nn.Module, config: CfgNode, seed: int, batch: Sequence[Mapping[str, Any]], losses: Mapping[str, float]
) -> dict[str, Any]:
    """All that the step depends on but the teacher detector, which the config names.

    Args:
        model: as it was before the step.
        config: the resolved config.
        seed: of the run.
        batch: what the model was given; ``image`` (3, H, W), and in the torchvision engine ``boxes`` and ``labels``.
        losses: by name, as far as they are known.
    """
    transfer = model.transfer if isinstance(model, DistilledDetector) else None
    return {
        "kind": KIND,
        "method": config.TRANSFER.METHOD,
        "config": plain(config),
        "seed": seed,
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
