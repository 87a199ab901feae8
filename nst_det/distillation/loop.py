"""The training loop of stage one: one batch and one teacher pass a step feed every student."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from nst_det.distillation.accuracy import Accuracy
from nst_det.distillation.build import Network
from nst_det.distillation.dataloader import Batch, Normalizer
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine.distributed import is_main_process, world_size
from nst_det.engine.format import text_table
from nst_det.engine.metrics import loss_note
from nst_det.engine.trainer import (
    Clock,
    PeriodicCheckpointer,
    PeriodicHook,
    ProgressHook,
    RollbackStep,
    SpeedHook,
    StopWhenAsked,
    TrainLoop,
)
from nst_det.losses import ModelOutputs, TransferLoss, pair_shapes
from nst_det.losses import loss as shapes
from nst_det.losses import loss_balance as balance
from nst_det.models.build import probe_outputs

log = logging.getLogger(__name__)
SHOWN_LOSSES = 3
# batches of the steps from the first to before the last
Steps = Callable[[int, int], Iterator[Batch]]
# what a teacher or its cache says about normalized images and the views that these are
Teaching = Callable[[Tensor, Tensor | None], ModelOutputs]
# normalized images, labels and the teacher's outputs
Seen = tuple[Tensor, Tensor, ModelOutputs | None]
# accuracy of the students by their words
Measure = Callable[[Sequence[StudentTrainer]], dict[str, Accuracy]]


def log_shapes(losses: Mapping[str, TransferLoss], student: Network, teacher: Network, size: int) -> None:
    """A table of all pairs that the methods compare, for an image of ``size`` pixels; one line for each kind of pair.

    Raises:
        ValueError: an output that a term reads isn't there.
    """
    mine, my_strides = _probe(student, [name for loss in losses.values() for name in loss.student_levels], size)
    theirs, their_strides = _probe(teacher, [name for loss in losses.values() for name in loss.teacher_levels], size)
    lines = {
        line: None for loss in losses.values() for line in pair_shapes(loss, mine, theirs, my_strides, their_strides)
    }
    if lines:
        log.info("compared at %d x %d pixels:\n%s", size, size, text_table(shapes.HEADINGS, lines))


def _probe(network: Network, names: Sequence[str], size: int) -> tuple[ModelOutputs, dict[str, int]]:
    levels = {name: info for name, info in network.levels.items() if name in names} if names else {}
    return probe_outputs(network.model, levels, size), {name: info.stride for name, info in levels.items()}


def warn_of_neighbors(students: Sequence[StudentTrainer], solver: CfgNode) -> None:
    """Say where a term compares the images of a batch with each other, and the batch is computed in pieces."""
    pieces = world_size() * solver.ACCUMULATE
    words = [student.word for student in students if "lp" in student.transfer.pairs]
    if pieces > 1 and words:
        each = solver.IMS_PER_BATCH // pieces
        log.warning(
            "%s: lp finds a sample's neighbors among the %d images that are computed together", ", ".join(words), each
        )


def log_balance(students: Sequence[StudentTrainer]) -> None:
    """A table of the terms of those students that have just been measured, and a warning for each one-sided term."""
    found = {student.word: student.transfer.balance.lines for student in students if student.just_measured}
    if found and is_main_process():
        rows = [(word, *line.cells) for word, lines in found.items() for line in lines]
        log.info("terms against the labels' loss:\n%s", text_table(("method", *balance.HEADINGS), rows))
        for word, lines in found.items():
            for line in lines:
                if line.one_sided:
                    log.warning("%s: %s", word, line.warning)


class StageOneTrainer(TrainLoop):
    """All students side by side; see :func:`train_side_by_side`.

    The loop begins at the smallest step that any student is at; the others join when it reaches theirs, so that
    a stop between two students' checkpoints costs nothing but the steps since.

    Attributes:
        stayed: students that made this step, or skipped it; not those that were rolled back in it.
    """

    def __init__(
        self,
        students: Sequence[StudentTrainer],
        teacher: Teaching | None,
        steps: Steps,
        normalize: Normalizer,
        max_iter: int,
    ) -> None:
        super().__init__()
        self.students, self.teacher, self.steps, self.normalize = students, teacher, steps, normalize
        self.max_iter, self.start_iter = max_iter, self._first()
        self.active: list[StudentTrainer] = []
        self.stayed: list[StudentTrainer] = []
        self.losses: dict[str, float] = {}
        self.clock = Clock()

    def _first(self) -> int:
        return min((student.step for student in self.students), default=self.max_iter)

    def before_train(self) -> None:
        """Begin at ``iter``."""
        self._batches = self.steps(self.iter, self.max_iter)
        super().before_train()

    def run_step(self) -> None:
        """One batch, one teacher pass, one optimizer step of each student that is at this step."""
        waited = self.clock.seconds["data"]
        self.active = [student for student in self.students if student.step == self.iter]
        self.losses = one_step(self.active, self.teacher, self._batches, self.normalize, self.clock)
        self._data_seconds = self.clock.seconds["data"] - waited
        self.stayed = [student for student in self.active if student.step == self.iter + 1]
        log_balance(self.stayed)
        if len(self.stayed) < len(self.active):
            # the others have made the step
            self.after_step()
            self.iter = self._first()
            raise RollbackStep

    def save_step(self) -> None:
        """Save each student that made this step."""
        for student in self.stayed:
            student.save()


def train_side_by_side(
    students: Sequence[StudentTrainer],
    teacher: Teaching | None,
    steps: Steps,
    normalize: Normalizer,
    measure: Measure,
    *,
    last: int,
    eval_period: int,
    checkpoint_period: int,
    log_period: int,
    images: int,
    title: str,
) -> None:
    """Bring every student to step ``last``.

    Args:
        students: unfinished ones, each started.
        teacher: None where no method has a term.
        steps: ``steps(first, last)`` gives the batches.
        normalize: uint8 batches to what the networks take.
        measure: accuracy of the students on the validation split.
        last: steps in all.
        eval_period: steps between evaluations; 0 evaluates at the end only.
        checkpoint_period: steps between checkpoints.
        log_period: steps between rows of metrics.
        images: of a step, of all processes.
        title: of the progress bar.
    """
    trainer = StageOneTrainer(students, teacher, steps, normalize, last)

    def evaluate() -> None:
        found = measure(trainer.stayed)
        for student in trainer.stayed:
            student.record(found[student.word])

    def write_metrics() -> None:
        for student in trainer.stayed:
            student.log(trainer.scalars)

    trainer.register_hooks(
        [
            SpeedHook(images, normalize.device, log_period),
            PeriodicHook(log_period, write_metrics, last=True),
            PeriodicHook(eval_period, evaluate, last=True),
            PeriodicCheckpointer(checkpoint_period),
            ProgressHook(
                title,
                lambda: dict(list(trainer.losses.items())[:SHOWN_LOSSES]),
                lambda: "; ".join(f"{student.word}: {loss_note(student.losses)}" for student in trainer.active),
            ),
            StopWhenAsked(normalize.device),
        ]
    )
    trainer.train()


def one_step(
    active: Sequence[StudentTrainer],
    teacher: Teaching | None,
    batches: Iterator[Batch],
    normalize: Normalizer,
    clock: Clock,
) -> dict[str, float]:
    """One batch, one teacher pass, one optimizer step of each active student.

    A student whose loss or gradient is not finite makes no step; see :meth:`StudentTrainer.handle_nonfinite`.

    Returns:
        Each student's loss, all terms together.

    Raises:
        UserError: an image can't be read, or a student is to stop where its loss is not finite.
    """
    start = clock.total()
    with clock("data"):
        whole = next(batches)
        parts = whole.split(active[0].solver.ACCUMULATE)
    totals: dict[str, float] = {}
    waiting: list[StudentTrainer] = []
    seen: list[Seen] = []
    for number, batch in enumerate(parts):
        with clock("data"):
            images = normalize(batch.images)
            labels = batch.labels.to(images.device, non_blocking=True)
        outputs = None
        if teacher is not None and any(student.needs_teacher for student in active):
            with clock("teacher"):
                outputs = teacher(images, batch.rows)
        seen.append((images, labels, outputs))
        share = (clock.total() - start) / len(active)
        for student in active:
            start = clock.total()
            with clock("students"):
                student.forward_backward(images, labels, outputs if student.needs_teacher else None, number)
            if number == len(parts) - 1:
                waiting.append(student)
            # on a CPU at once, while its gradients are in the cache; each reading of a GPU waits for it, so together
            if waiting and (images.device.type == "cpu" or student is active[-1]):
                with clock("optimizers"):
                    totals |= _update(waiting, seen, parts)
                waiting.clear()
            student.seconds += share + clock.total() - start
        start = clock.total()
    return totals


def _update(students: Sequence[StudentTrainer], seen: Sequence[Seen], parts: Sequence[Batch]) -> dict[str, float]:
    """An optimizer step of those whose loss and gradient are numbers; each one's loss."""
    totals = {}
    found = torch.stack([student.loss_and_norm for student in students]).tolist()
    for student, numbers in zip(students, found):
        totals[student.word] = numbers[0]
        if all(map(math.isfinite, numbers)):
            student.update()
            continue
        part = student.broken_part
        images, labels, outputs = seen[part]
        student.handle_nonfinite(images, labels, outputs if student.needs_teacher else None, parts[part].names)
    return totals
