"""The training loop of stage one: one batch and one teacher pass a step feed every student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nst_det.distill.accuracy import Accuracy
from nst_det.distill.clock import Clock
from nst_det.distill.images import Batch, Normalizer
from nst_det.distill.opening import log_balance
from nst_det.distill.student import Student
from nst_det.runtime.progress import progress
from nst_det.transfer import Outputs

SHOWN_LOSSES = 3
# batches of the steps from the first to before the last
Steps = Callable[[int, int], Iterator[Batch]]
# what a teacher or its cache says about normalized images and the views that these are
Teaching = Callable[[Tensor, Tensor | None], Outputs]
# accuracy of the students by their words
Measure = Callable[[Sequence[Student]], dict[str, Accuracy]]


def train_side_by_side(
    students: Sequence[Student],
    teacher: Teaching | None,
    steps: Steps,
    normalize: Normalizer,
    measure: Measure,
    *,
    last: int,
    eval_period: int,
    checkpoint_period: int,
    log_period: int,
    title: str,
    clock: Clock | None = None,
) -> None:
    """Bring every student to step ``last``.

    The loop begins at the smallest step that any student is at; the others join when it reaches theirs, so that
    a stop between two students' checkpoints costs nothing but the steps since.

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
        title: of the progress bar.
        clock: takes the time of the parts.

    Raises:
        UserError: an image can't be read, or a loss is not finite.
    """
    clock = clock or Clock()
    first = min((student.step for student in students), default=last)
    batches = steps(first, last)
    with progress(title, last) as meter:
        meter.start_at(first)
        for step in range(first, last):
            active = [student for student in students if student.step == step]
            losses = one_step(active, teacher, batches, normalize, clock)
            log_balance(active)
            done = step + 1
            if done % log_period == 0 or done == last:
                for student in active:
                    student.log()
            if done == last or (eval_period and done % eval_period == 0):
                with clock("evaluation"):
                    for word, accuracy in measure(active).items():
                        next(student for student in active if student.word == word).record(accuracy)
            if done == last or done % checkpoint_period == 0:
                with clock("checkpoints"):
                    for student in active:
                        student.save()
            meter.step(dict(list(losses.items())[:SHOWN_LOSSES]))


def one_step(
    active: Sequence[Student], teacher: Teaching | None, batches: Iterator[Batch], normalize: Normalizer, clock: Clock
) -> dict[str, float]:
    """One batch, one teacher pass, one optimizer step of each active student.

    Returns:
        Each student's loss, all terms together.
    """
    start = clock.total()
    with clock("data"):
        batch = next(batches)
        images = normalize(batch.images)
        labels = batch.labels.to(images.device, non_blocking=True)
    said = None
    if teacher is not None and any(student.needs_teacher for student in active):
        with clock("teacher"):
            said = teacher(images, batch.rows)
    share = (clock.total() - start) / len(active)
    for student in active:
        start = clock.total()
        with clock("students"):
            student.forward_backward(images, labels, said if student.needs_teacher else None)
        # at once, while its gradients are still in the cache
        with clock("optimizers"):
            student.update()
        student.seconds += share + clock.total() - start
    # read together: on a GPU each reading waits for it
    totals = torch.stack([student.total for student in active]).tolist()
    for student, total in zip(active, totals):
        student.check_finite(total)
    return {student.word: total for student, total in zip(active, totals)}
