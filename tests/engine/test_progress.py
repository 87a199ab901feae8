import logging
import math

import pytest

from nst_det.engine import progress as module
from nst_det.engine.metrics import loss_note
from nst_det.engine.progress import progress


@pytest.fixture
def said(monkeypatch, caplog):
    """Plain lines of a clock that goes on by four seconds a step."""
    now = [0.0]
    monkeypatch.setattr(module, "is_live", lambda console: False)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)

    def steps(count, values=None, more=None):
        with progress("students", 8) as meter:
            for _ in range(count):
                now[0] += 4
                meter.step(values, more)
        return [record.getMessage() for record in caplog.records]

    return steps


def test_a_plain_line_now_and_then_and_at_the_end(said):
    assert said(8, {"ce": 1.5}) == [
        "students 4/8  4 s/it  ETA 16 s  ce 1.5",
        "students 8/8  4 s/it  ETA 0 s  ce 1.5",
    ]


def test_what_a_plain_line_has_room_for_is_asked_only_then(said):
    asked = []

    def more():
        asked.append(1)
        return "kd: total 3  ce 2  kd 1"

    assert said(5, {"kd": 3.0}, more) == ["students 4/8  4 s/it  ETA 16 s  kd: total 3  ce 2  kd 1"]
    assert len(asked) == 1


def test_losses_of_both_stages_their_sum_first():
    one = {"step": 1, "loss/ce": 2.0, "loss/at": 0.125, "level/at@res4": 0.01, "loss/total": 2.125, "lr": 0.1}
    assert loss_note(one) == "total 2.125  ce 2  at 0.125"
    two = {"step": 1, "loss_cls": 1.25, "loss_transfer_cwd": None, "total_loss": math.nan, "lr": 0.1, "map": 0.5}
    assert loss_note(two) == "total_loss nan  loss_cls 1.25"
    assert loss_note(one, 2) == "total 2.125  ce 2"
    assert loss_note({"step": 1, "val/top1": 0.5}) == ""
