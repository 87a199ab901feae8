"""What is compared with what: every pair of a method with its shapes, before any training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nst_det.transfer.loss import TransferLoss
from nst_det.transfer.outputs import Outputs
from nst_det.transfer.tensors import common_size

HEADINGS = ("term", "student", "teacher", "alignment")


@dataclass(frozen=True)
class PairShape:
    """One line of a shape report.

    Attributes:
        term: the term's name.
        student: the student's level or kind of output.
        teacher: the teacher's.
        student_shape: without the batch, (C, H, W) for maps.
        teacher_shape: the same for the teacher.
        student_stride: of a map, in pixels; None where it isn't known.
        teacher_stride: the same for the teacher.
        alignment: what is done about a difference, in words; ``none`` where sizes agree.
    """

    term: str
    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    student_stride: int | None
    teacher_stride: int | None
    alignment: str

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """What stands under :data:`HEADINGS`."""
        student = _place(self.student, self.student_shape, self.student_stride)
        return self.term, student, _place(self.teacher, self.teacher_shape, self.teacher_stride), self.alignment


def _place(name: str, shape: tuple[int, ...], stride: int | None) -> str:
    size = " x ".join(map(str, shape))
    return f"{name}: {size}" + (f", stride {stride}" if stride else "")


def pair_shapes(
    loss: TransferLoss,
    student: Outputs,
    teacher: Outputs,
    student_strides: Mapping[str, int] | None = None,
    teacher_strides: Mapping[str, int] | None = None,
) -> list[PairShape]:
    """Each pair that ``loss`` compares in these outputs.

    Args:
        loss: of one method.
        student: what it said about some image.
        teacher: what it said about the same image.
        student_strides: level to stride, where it is known.
        teacher_strides: the same for the teacher.

    Raises:
        ValueError: an output that a term reads isn't there.
    """
    lines = []
    for name, pairs in loss.pairs.items():
        student_kind, teacher_kind = loss.kinds[name]
        for pair in pairs:
            mine, theirs = student.of(student_kind, pair.student), teacher.of(teacher_kind, pair.teacher)
            alignment, grid = "none", getattr(loss.module(name, pair), "grid", 0)
            if grid:
                alignment = f"student spread over, teacher averaged to {grid} x {grid}"
            elif student_kind == "maps" and mine.shape[2:] != theirs.shape[2:]:
                height, width = common_size(mine, theirs)
                sides = [who for who, x in (("student", mine), ("teacher", theirs)) if x.shape[2:] != (height, width)]
                alignment = f"{' and '.join(sides)} averaged down to {height} x {width}"
            shapes = tuple(mine.shape[1:]), tuple(theirs.shape[1:])
            strides = (student_strides or {}).get(pair.student), (teacher_strides or {}).get(pair.teacher)
            lines.append(PairShape(name, pair.student, pair.teacher, *shapes, *strides, alignment))
    return lines
