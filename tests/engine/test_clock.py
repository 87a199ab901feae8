import pytest
import torch

from nst_det.engine.clock import GIB, Clock, Speed
from nst_det.engine.metrics import MetricsWriter, read_metrics, speed_of
from nst_det.engine.run_dir import RunFolder


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda's figures without a card: its peak of allocated bytes, and what was asked of which device."""
    asked = []
    state = {"peak": 0, "asked": asked}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(("reset", device)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(("wait", device)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"])
    return state


def test_speed_is_that_of_the_steps_since_the_last_reading():
    clock = Clock()
    clock.seconds["data"] = 100.0
    speed = Speed(16, torch.device("cpu"), clock)
    for waited, spent in ((1.0, 3.0), (2.0, 2.0)):
        clock.seconds["data"] += waited
        clock.seconds["students"] += spent
        clock.seconds["evaluation"] += 50.0
        clock.seconds["checkpoints"] += 7.0
        speed.steps += 1
    # 32 images in 8 seconds, 3 of them waiting
    assert speed.read() == {"speed/images_per_second": 4.0, "speed/data_wait": 0.375}
    clock.seconds["students"] += 2.0
    speed.steps += 1
    assert speed.read() == {"speed/images_per_second": 8.0, "speed/data_wait": 0.0}


def test_gpu_memory_is_that_of_the_runs_device_and_nothing_waits_for_it(gpu):
    clock, device = Clock(), torch.device("cuda:1")
    speed = Speed(8, device, clock)
    with clock("step"):
        speed.steps += 1
    gpu["peak"] = 5 * GIB // 2
    assert speed.read()["speed/gpu_memory_gib"] == 2.5
    assert gpu["asked"] == [("reset", device)]


def test_an_exact_clock_waits_for_its_own_gpu(gpu):
    with Clock(exact=torch.device("cuda:1"))("step"):
        pass
    assert gpu["asked"] == [("wait", torch.device("cuda:1"))] * 2
    with Clock(exact=torch.device("cpu"))("step"):
        pass
    assert len(gpu["asked"]) == 2


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
