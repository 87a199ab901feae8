"""A step of stage one that gave something that is no number, as a file from which it can be run again."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nst_det.distill.needs import is_stand_in
from nst_det.runtime.config import plain
from nst_det.runtime.processes import rank
from nst_det.transfer import Outputs

if TYPE_CHECKING:
    from nst_det.distill.student import Student

KIND = "stage one"


def step_content(student: Student, images: Tensor, labels: Tensor, teacher: Outputs | None) -> dict[str, Any]:
    """All that the step depends on: weights, pixels and what the teacher said, so that neither data nor teacher are
    needed again.

    Args:
        student: as it was before the step.
        images: (B, 3, H, W), normalized.
        labels: (B,).
        teacher: None where the method has no terms.
    """
    transfer, part = student.transfer, student.broken_part
    return {
        "kind": KIND,
        "method": student.word,
        "about": plain(student.about),
        "solver": plain(student.solver),
        "seed": student.seed,
        # which of the parts that all processes took of the step's images
        "piece": rank() * student.solver.ACCUMULATE + part,
        "warmup": student.warmup,
        "precision": str(student.precision or torch.float32).removeprefix("torch."),
        "model": _on_cpu(student.model.state_dict()),
        "transfer": {
            # the teacher's own training has a word, but no method of that name
            "method": transfer.method.word,
            "weights": dict(transfer.weights),
            "options": plain(transfer.options),
            "pairs": {name: [list(astuple(pair)) for pair in pairs] for name, pairs in transfer.pairs.items()},
            "state": _on_cpu(transfer.terms.state_dict()),
        },
        "pixels": images.cpu(),
        "labels": labels.cpu(),
        "teacher": None if teacher is None else outputs_content(teacher),
        "terms": student.pass_of(part).values,
    }


def outputs_content(outputs: Outputs) -> dict[str, Any]:
    """Outputs of a network, with what losses derived from them, as plain values and tensors."""
    return {
        "logits": _on_cpu(outputs.logits),
        "maps": _on_cpu(outputs.maps),
        "embedding": _on_cpu(outputs.embedding),
        "shared": [(key, _on_cpu(value)) for key, value in outputs.shared_so_far().items()],
    }


def outputs_from(content: dict[str, Any], device: torch.device) -> Outputs:
    """The reverse of :func:`outputs_content`."""
    outputs = Outputs(*(_moved(content[name], device) for name in ("logits", "maps", "embedding")))
    for key, value in content["shared"]:
        outputs.keep(key, _moved(value, device))
    return outputs


def broken_outputs(teacher: Outputs | None) -> list[str]:
    """What of a teacher's outputs is no number, each named."""
    if teacher is None:
        return []
    named = {"logits": teacher.logits, "embedding": teacher.embedding}
    named |= {f"map {level}": value for level, value in teacher.maps.items()}
    return [
        f"the teacher's {name}"
        for name, value in named.items()
        if value is not None and not is_stand_in(value) and not bool(value.isfinite().all())
    ]


def _on_cpu(value: Any) -> Any:
    return _moved(value, torch.device("cpu"))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value
