"""What is compared with what: every pair of a method with its shapes, before any training."""

from __future__ import annotations

from dataclasses import dataclass

from nst_det.transfer.loss import TransferLoss
from nst_det.transfer.outputs import Outputs
from nst_det.transfer.tensors import common_size


@dataclass(frozen=True)
class PairShape:
    """One line of a shape report.

    Attributes:
        term: the term's name.
        student: the student's level or kind of output.
        teacher: the teacher's.
        student_shape: without the batch, (C, H, W) for maps.
        teacher_shape: the same for the teacher.
        alignment: what is done about a difference, in words; ``none`` where sizes agree.
    """

    term: str
    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    alignment: str


def pair_shapes(loss: TransferLoss, student: Outputs, teacher: Outputs) -> list[PairShape]:
    """Each pair that ``loss`` compares in these outputs.

    Raises:
        ValueError: an output that a term reads isn't there.
    """
    lines = []
    for name, pairs in loss.pairs.items():
        student_kind, teacher_kind = loss.kinds[name]
        for pair in pairs:
            mine, theirs = student.of(student_kind, pair.student), teacher.of(teacher_kind, pair.teacher)
            alignment = "none"
            if student_kind == "maps" and mine.shape[2:] != theirs.shape[2:]:
                height, width = common_size(mine, theirs)
                sides = [who for who, x in (("student", mine), ("teacher", theirs)) if x.shape[2:] != (height, width)]
                alignment = f"{' and '.join(sides)} averaged down to {height} x {width}"
            lines.append(
                PairShape(name, pair.student, pair.teacher, tuple(mine.shape[1:]), tuple(theirs.shape[1:]), alignment)
            )
    return lines
