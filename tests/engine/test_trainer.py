"""The loop and its hooks, on a timer of their own."""

import pytest
import torch

from nst_det.engine import trainer
from nst_det.engine.format import GIB
from nst_det.engine.trainer import Hook, RollbackStep, SpeedHook, TrainLoop


class Steps(TrainLoop):
    """Each step waits for data and takes as long as it is told."""

    def __init__(self, seconds, monkeypatch):
        super().__init__()
        self.seconds, self.max_iter, self.rows, self.now = seconds, len(seconds), [], 0.0
        monkeypatch.setattr(trainer.time, "perf_counter", lambda: self.now)

    def run_step(self):
        self._data_seconds, spent = self.seconds[self.iter]
        self.now += self._data_seconds + spent

    def after_step(self):
        super().after_step()
        self.rows.append(dict(self.scalars))
        # evaluation, checkpoints and the like
        self.now += 50.0


def test_speed_is_that_of_the_steps_since_the_last_reading(monkeypatch):
    steps = Steps([(1.0, 3.0), (2.0, 2.0), (0.0, 2.0)], monkeypatch)
    steps.register_hooks([SpeedHook(16, torch.device("cpu"), period=2)])
    steps.train()
    # 32 images in 8 seconds, 3 of them waiting
    assert steps.rows == [
        {},
        {"speed/images_per_second": 4.0, "speed/data_wait": 0.375},
        {"speed/images_per_second": 8.0, "speed/data_wait": 0.0},
    ]


def test_gpu_memory_is_that_of_the_runs_device_and_nothing_waits_for_it(monkeypatch):
    device = torch.device("cuda:1")
    peaks = {}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update({device: 0}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("waited"))
    steps = Steps([(0.0, 1.0)], monkeypatch)
    steps.register_hooks([SpeedHook(8, device)])
    peaks[device] = 5 * GIB // 2
    steps.train()
    assert steps.rows[0]["speed/gpu_memory_gib"] == 2.5


def test_a_step_that_is_rolled_back_begins_again_at_an_earlier_one():
    made = []

    class Rolling(TrainLoop):
        def run_step(self):
            made.append(self.iter)
            if made == ["begin", 0, 1, 2]:
                self.iter = 1
                raise RollbackStep

    class Noted(Hook):
        def before_train(self):
            made.append("begin")

        def after_train(self):
            made.append("end")

    loop = Rolling()
    loop.max_iter = 4
    loop.register_hooks([Noted()])
    loop.train()
    assert made == ["begin", 0, 1, 2, "begin", 1, 2, 3, "end"]
