"""What stage one says as it begins: what is compared with what, and how hard each term pulls."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fvcore.common.config import CfgNode

from nst_det.backbones.levels import probe_outputs
from nst_det.distill.networks import Network
from nst_det.distill.student import Student
from nst_det.runtime.processes import is_first, world_size
from nst_det.runtime.table import text_table
from nst_det.transfer import Outputs, TransferLoss, balance, pair_shapes, shapes

log = logging.getLogger(__name__)


def log_shapes(losses: Mapping[str, TransferLoss], student: Network, teacher: Network, size: int) -> None:
    """A table of all pairs that the methods compare, for an image of ``size`` pixels; one line for each kind of pair.

    Raises:
        ValueError: an output that a term reads isn't there.
    """
    mine, my_strides = _probe(student, [name for loss in losses.values() for name in loss.student_levels], size)
    theirs, their_strides = _probe(teacher, [name for loss in losses.values() for name in loss.teacher_levels], size)
    lines = {
        line.cells: None
        for loss in losses.values()
        for line in pair_shapes(loss, mine, theirs, my_strides, their_strides)
    }
    if lines:
        log.info("compared at %d x %d pixels:\n%s", size, size, text_table(shapes.HEADINGS, lines))


def _probe(network: Network, names: Sequence[str], size: int) -> tuple[Outputs, dict[str, int]]:
    levels = {name: info for name, info in network.levels.items() if name in names} if names else {}
    return probe_outputs(network.model, levels, size), {name: info.stride for name, info in levels.items()}


def warn_of_neighbors(students: Sequence[Student], solver: CfgNode) -> None:
    """Say where a term compares the images of a batch with each other, and the batch is computed in pieces."""
    pieces = world_size() * solver.ACCUMULATE
    words = [student.word for student in students if "lp" in student.transfer.pairs]
    if pieces > 1 and words:
        each = solver.IMS_PER_BATCH // pieces
        log.warning(
            "%s: lp finds a sample's neighbors among the %d images that are computed together", ", ".join(words), each
        )


def log_balance(students: Sequence[Student]) -> None:
    """A table of the terms of those students that have just been measured, and a warning for each one-sided term."""
    found = {student.word: student.transfer.balance.lines for student in students if student.just_measured}
    if found and is_first():
        rows = [(word, *line.cells) for word, lines in found.items() for line in lines]
        log.info("terms against the labels' loss:\n%s", text_table(("method", *balance.HEADINGS), rows))
        for word, lines in found.items():
            for line in lines:
                if line.one_sided:
                    log.warning("%s: %s", word, line.warning)
