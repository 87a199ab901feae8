import pytest
import torch

from nst_det.engine import trainer
from nst_det.engine.format import GIB
from nst_det.engine.metrics import MetricsWriter, read_metrics, speed_of
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.trainer import Hook, RollbackStep, SpeedHook, TrainLoop


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda's figures without a card: its peak of allocated bytes, and what was asked of which device."""
    asked = []
    state = {"peak": 0, "asked": asked}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(("reset", device)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(("wait", device)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"])
    return state


class Steps(TrainLoop):
    """Each step waits for data and takes as long as it is told, by a timer of its own."""

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


def test_gpu_memory_is_that_of_the_runs_device_and_nothing_waits_for_it(gpu, monkeypatch):
    device = torch.device("cuda:1")
    steps = Steps([(0.0, 1.0)], monkeypatch)
    steps.register_hooks([SpeedHook(8, device)])
    gpu["peak"] = 5 * GIB // 2
    steps.train()
    assert steps.rows[0]["speed/gpu_memory_gib"] == 2.5
    assert gpu["asked"] == [("reset", device)]


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


def test_a_result_has_the_medians_and_the_peak_of_all_readings_also_those_before_a_stop(tmp_path):
    run = RunFolder(tmp_path)
    readings = [(10.0, 0.5, 1.0), (90.0, 0.1, 3.0), (20.0, 0.3, 2.0)]
    for start, rows in ((0, readings[:2]), (2, readings[2:])):
        with MetricsWriter(run.metrics_path, start) as metrics:
            for step, (images, wait, memory) in enumerate(rows, start):
                names = ("images_per_second", "data_wait", "gpu_memory_gib")
                row = {f"speed/{name}": value for name, value in zip(names, (images, wait, memory))}
                metrics.write(step, {"loss": 1.0, **row})
    run.finish({"map": 0.5})
    assert run.result() == {
        "map": 0.5, "speed": {"images_per_second": 20.0, "data_wait": 0.3, "gpu_memory_gib": 3.0},
    }  # fmt: skip
    # what two equal runs share
    assert read_metrics(run.metrics_path) == [{"step": step, "loss": 1.0} for step in range(3)]
    assert speed_of(read_metrics(run.metrics_path)) == {}
