"""The training loop of stage one: one batch and one teacher pass a step feed every student."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from nst_det.distillation.dataloader import Batch, Normalizer, StageOneData, TrainingBatches, load_images
from nst_det.distillation.trainer import StudentTrainer
from nst_det.distillation.validation import Validation
from nst_det.engine.compilation import begin_step
from nst_det.engine.device import HostCopy
from nst_det.engine.distributed import is_main_process, world_size
from nst_det.engine.format import text_table
from nst_det.engine.metrics import loss_note
from nst_det.engine.nan_guard import not_finite
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
from nst_det.losses import ModelOutputs
from nst_det.losses.loss_balance import HEADINGS

log = logging.getLogger(__name__)
SHOWN_LOSSES = 3
# the outputs of a teacher, or its cache, for normalized images and the rows of these views
Teaching = Callable[[Tensor, Tensor | None], ModelOutputs]


class Unread:
    """Losses and gradient norms of the last step, which the host hasn't read yet."""

    def __init__(self) -> None:
        self._made: list[tuple[StudentTrainer, int]] = []

    def __bool__(self) -> bool:
        return bool(self._made)

    def put(self, students: Sequence[StudentTrainer], values: Tensor) -> None:
        """Take (S, 2) values of the step that these students have just made."""
        self._made, self._values = [(student, student.step - 1) for student in students], HostCopy(values)

    def read(self) -> dict[str, float]:
        """Let each student learn how that step ended; return the losses, nothing where there is no such step."""
        losses = {}
        for (student, step), (loss, norm) in zip(self._made, self._values.read() if self._made else ()):
            losses[student.name] = loss
            student.learn(step, math.isfinite(loss) and math.isfinite(norm))
        self._made = []
        return losses


def one_step(
    students: Sequence[StudentTrainer],
    teacher: Teaching | None,
    batches: Iterator[Batch],
    normalize: Normalizer,
    clock: Clock,
    unread: Unread,
) -> dict[str, float]:
    """One batch, one teacher pass, one optimizer step of each student; return the loss of each.

    On a GPU the losses go into ``unread``, and those of the previous step are returned.  A student whose previous step
    turns out not to be finite makes no step now and goes back to that one.
    """
    begin_step(students[0].solver.COMPILE)
    start, step, waits = clock.total(), students[0].step, any(student.waits for student in students)
    with clock("data"):
        parts = [
            part._replace(
                images=normalize(part.images, part.changes),
                labels=part.labels.to(normalize.device, non_blocking=True),
            )
            for part in next(batches).split(students[0].solver.ACCUMULATE)
        ]
    outputs: list[ModelOutputs | None] = [None] * len(parts)
    if teacher is not None and any(student.needs_teacher for student in students):
        with clock("teacher"):
            outputs = [teacher(part.images, part.rows) for part in parts]
    shared_seconds = (clock.total() - start) / len(students)
    losses: dict[str, float] = {}
    # on a CPU one by one, while a student's gradients are in the cache; each reading of a GPU waits for it, so together
    one_by_one = waits and normalize.device.type == "cpu"
    for group in [[student] for student in students] if one_by_one else [students]:
        start = clock.total()
        with clock("students"):
            for student in group:
                for number, part in enumerate(parts):
                    student.forward_backward(part.images, part.labels, outputs[number], number)
        with clock("optimizers"):
            losses |= unread.read()
            still = [student for student in group if student.step == step]
            if not still:
                continue
            values = torch.stack([value for student in still for value in student.loss_and_norm]).view(-1, 2)
            if not waits:
                for student, broken in zip(still, not_finite(values)):
                    student.update(broken)
                unread.put(still, values)
            for student, (loss, norm) in zip(still, values.tolist() if waits else ()):
                losses[student.name] = loss
                if math.isfinite(loss) and math.isfinite(norm):
                    student.update()
                else:
                    part, reply = parts[student.broken_part], outputs[student.broken_part]
                    student.handle_nonfinite(part.images, part.labels, reply, part.names)
        for student in group:
            student.seconds += shared_seconds + (clock.total() - start) / len(group)
    return losses


class StageOneTrainer(TrainLoop):
    """Trains students of several methods side by side.

    It begins at the smallest step that any student is at; the others join when it reaches theirs, so that a stop
    between two students' checkpoints costs nothing but the steps since.
    """

    def __init__(
        self,
        data: StageOneData,
        batches: TrainingBatches,
        students: Sequence[StudentTrainer],
        teacher: Teaching | None,
        solver: CfgNode,
        validate: Validation,
    ) -> None:
        super().__init__()
        self.data, self.batches, self.students, self.teacher = data, batches, students, teacher
        self.validate = validate
        self.max_iter = solver.MAX_ITER
        self.start_iter = self._first_step()
        # the students at this step, and those that made or skipped it and were not rolled back
        self.active: list[StudentTrainer] = []
        self.stayed: list[StudentTrainer] = []
        self.losses: dict[str, float] = {}
        self.unread = Unread()
        self.clock = Clock()
        config, device = data.config, data.normalize.device
        title = f"{len(students)} students" if len(students) > 1 else students[0].name
        self.register_hooks(
            [
                SpeedHook(solver.IMS_PER_BATCH, device, config.LOG_PERIOD),
                PeriodicHook(config.LOG_PERIOD, self.write_metrics, last=True),
                PeriodicHook(config.TEST.EVAL_PERIOD, self.evaluate, last=True),
                PeriodicCheckpointer(solver.CHECKPOINT_PERIOD),
                ProgressHook(
                    title,
                    lambda: dict(list(self.losses.items())[:SHOWN_LOSSES]),
                    lambda: "; ".join(f"{student.name}: {loss_note(student.losses)}" for student in self.active),
                ),
                StopWhenAsked(),
            ]
        )

    def _first_step(self) -> int:
        return min((student.step for student in self.students), default=self.max_iter)

    def before_train(self) -> None:
        """Begin at ``iter``; without labels, students that begin are measured first: nothing else says what is good."""
        new = [student for student in self.students if not student.step]
        if new and not self.data.config.DATA.LABELS:
            self._measure(new)
        device, steps = self.data.normalize.device, range(self.iter, self.max_iter)
        self._batches = load_images(self.batches, steps, self.data.config, device)
        super().before_train()

    def run_step(self) -> None:
        """Make step ``iter`` of each student that is at it."""
        waited = self.clock.seconds["data"]
        self.active = [student for student in self.students if student.step == self.iter]
        found = one_step(self.active, self.teacher, self._batches, self.data.normalize, self.clock, self.unread)
        self._data_seconds = self.clock.seconds["data"] - waited
        self.losses = (self.unread.read() if self.is_due() else {}) or found or self.losses
        self.stayed = [student for student in self.active if student.step == self.iter + 1]
        log_balance(self.stayed)
        if len(self.stayed) < len(self.active):
            # the others have made the step
            self.after_step()
            self.iter = self._first_step()
            raise RollbackStep

    @property
    def settled(self) -> bool:
        return not self.unread

    def write_metrics(self) -> None:
        """Write a row of each student's metrics."""
        for student in self.stayed:
            student.log(self.scalars)

    def evaluate(self) -> None:
        """Measure each student on the validation split."""
        self._measure(self.stayed)

    def _measure(self, students: Sequence[StudentTrainer]) -> None:
        models = {student.name: student.eval_model for student in students}
        found = self.validate(models, self.students[0].precision)
        for student in students:
            student.record(found[student.name])

    def save_step(self) -> None:
        """Save each student that made this step, and those that are ahead of it."""
        for student in self.students:
            if student.step > self.iter:
                student.save()


def warn_of_neighbors(students: Sequence[StudentTrainer], solver: CfgNode) -> None:
    """Warn where a term compares the images of a batch with each other, and the batch is computed in pieces."""
    pieces = world_size() * solver.ACCUMULATE
    names = ", ".join(student.name for student in students if "lp" in student.transfer.pairs)
    if pieces > 1 and names:
        together = solver.IMS_PER_BATCH // pieces
        log.warning("%s: lp finds a sample's neighbors among the %d images that are computed together", names, together)


def log_balance(students: Sequence[StudentTrainer]) -> None:
    """Log the terms of students whose gradients were measured for the last time in this step."""
    lines = [
        (student.name, line)
        for student in students
        for line in student.transfer.balance.lines
        if student.step == student.transfer.balance.measured
    ]
    if lines and is_main_process():
        rows = [(name, *line.cells) for name, line in lines]
        log.info("terms against the labels' loss:\n%s", text_table(("method", *HEADINGS), rows))
        for name, line in lines:
            if line.one_sided:
                log.warning("%s: %s", name, line.warning)
