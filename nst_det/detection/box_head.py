"""Outputs of two box heads for the same boxes, for terms on logits and embeddings.

The boxes are those that the student trains its box head on: proposals of its own, sampled as its config says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from nst_det.errors import UserError
from nst_det.losses import Method, ModelOutputs, TransferLoss, get_term

# (RoI heads, level -> map (B, C, H, W), (N, 4) boxes of each image) to (embedding (R, D), logits (R, K + 1))
BoxOutputs = Callable[[Any, Mapping[str, Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]


class Widths(NamedTuple):
    """Of a box head: D, the length of its predictor's input, and its number of logits, K + 1 with background."""

    embedding: int
    logits: int


def reads_box_head(method: Method) -> bool:
    """Return whether a term of the method reads logits or embeddings."""
    return any(get_term(name).level != "maps" for name in method.names)


def widths_of(detector: nn.Module, method: Method) -> Widths:
    """Return the widths of a detector's box head, which must be a single one with a softmax over its classes."""
    heads: Any = getattr(detector, "roi_heads", None)
    scores = getattr(getattr(heads, "box_predictor", None), "cls_score", None)
    if not isinstance(scores, nn.Linear) or pooler_of(heads) is None:
        who = type(detector if heads is None else heads).__name__
        raise UserError(
            f"METHOD {method}: it reads logits of a box head, and {who} has none; use terms on feature "
            "maps, such as nst-poly"
        )
    if getattr(heads.box_predictor, "use_sigmoid_ce", False):
        raise UserError(
            f"METHOD {method}: it compares class probabilities by softmax, and the box head is trained with "
            "sigmoids; set MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE False"
        )
    return Widths(scores.in_features, scores.out_features)


def pooler_of(heads: Any) -> nn.Module | None:
    pooler: nn.Module | None = getattr(heads, "box_pooler", getattr(heads, "pooler", None))
    return pooler


def check_classes(transfer: TransferLoss, student: Widths, teacher: Widths) -> None:
    """Refuse to compare logits one by one where their numbers differ."""
    if student.logits != teacher.logits:
        # the background, which is among the logits, is no class
        _refuse(transfer, f"the student has {student.logits - 1} classes and the teacher {teacher.logits - 1}")


def check_class_names(transfer: TransferLoss, student: Sequence[str], teacher: Sequence[str]) -> None:
    """Refuse to compare logits of different classes, where both lists are known (not empty)."""
    if student and teacher and list(student) != list(teacher):
        _refuse(transfer, f"the student's are {', '.join(student)}, the teacher's {', '.join(teacher)}")


def _refuse(transfer: TransferLoss, difference: str) -> None:
    terms = [name for name, kinds in transfer.kinds.items() if kinds == ("logits", "logits")]
    if terms:
        raise UserError(
            f"METHOD {transfer.method}: {terms[0]} compares class by class, but {difference}; take a teacher "
            "of the same classes in the same order, or terms on feature maps, such as nst-poly"
        )


class BoxHeadTap:
    """Listens to a student's box head in training: the boxes that it pools, its predictor's input and its logits."""

    def __init__(self, detector: nn.Module) -> None:
        heads: Any = detector.roi_heads
        self.forget()
        pooler = pooler_of(heads)
        assert pooler is not None, "widths_of() looked for it"
        pooler.register_forward_pre_hook(self._keep_boxes)
        heads.box_predictor.register_forward_hook(self._keep_outputs)

    def _keep_boxes(self, pooler: nn.Module, inputs: tuple[Any, ...]) -> None:
        if pooler.training:
            # Detectron2's Boxes hold a tensor, this project's are tensors
            self.boxes: list[Tensor] = [getattr(boxes, "tensor", boxes).detach() for boxes in inputs[1]]

    def _keep_outputs(self, predictor: nn.Module, inputs: tuple[Tensor, ...], outputs: Sequence[Tensor]) -> None:
        if predictor.training:
            self.outputs: tuple[Tensor, Tensor] | None = (inputs[0].flatten(1), outputs[0])

    def forget(self) -> None:
        """Drop what was kept, such as that of a step that failed."""
        self.boxes, self.outputs = [], None

    def take(self, student: ModelOutputs) -> list[Tensor]:
        """Add this step's outputs to the student's; return the (N, 4) boxes of each image, in the network's pixels."""
        if self.outputs is None:
            raise RuntimeError("the student's forward didn't call its box head, so there is nothing to compare")
        student.embedding, student.logits = self.outputs
        return self.boxes


def objects_of(item: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the (M, 4) boxes and (M,) labels of the objects on an image, in the network's pixels."""
    instances = item.get("instances")
    # Detectron2's, or the torchvision engine's
    return (item["boxes"], item["labels"]) if instances is None else (instances.gt_boxes.tensor, instances.gt_classes)


@torch.no_grad()
def roi_labels(heads: Any, boxes: Sequence[Tensor], objects: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return (R,) int64: the label of the object that each box overlaps most, or the background's, which is last."""
    background = heads.box_predictor.cls_score.out_features - 1
    matcher = getattr(heads, "proposal_matcher", None)
    threshold = heads.settings.IOU_THRESHOLDS[-1] if matcher is None else matcher.thresholds[-2]
    found = []
    for rois, (truth, labels) in zip(boxes, objects):
        label = torch.full((len(rois),), background, dtype=torch.long, device=rois.device)
        if len(truth):
            truth, labels = (value.to(rois.device, non_blocking=True) for value in (truth, labels))
            overlap, nearest = box_iou(truth.to(rois.dtype), rois).max(dim=0)
            label = torch.where(overlap >= threshold, labels[nearest], label)
        found.append(label)
    return torch.cat(found)


def box_outputs(heads: Any, maps: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what RoI heads with ``box_outputs``, as the torchvision engine's, compute for boxes; see BoxOutputs."""
    outputs: tuple[Tensor, Tensor] = heads.box_outputs(maps, boxes)
    return outputs
