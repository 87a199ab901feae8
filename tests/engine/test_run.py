import json

import pytest

from nst_det.engine.metrics import MetricsWriter, read_metrics
from nst_det.engine.run_dir import RunFolder, config_hash
from nst_det.errors import UserError


def test_a_finished_run_gives_its_result(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.opened({"A": 1}):
        assert not run.done
        run.finish({"map": 0.5})
    assert run.done
    assert run.result() == {"map": 0.5}
    (entry,) = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert entry["versions"]["torch"]


def test_another_config_is_refused_but_free_keys_may_differ(tmp_path):
    with RunFolder(tmp_path).opened({"A": 1, "OUTPUT_DIR": "x", "T": (1, 2)}):
        pass
    with RunFolder(tmp_path).opened({"A": 1, "OUTPUT_DIR": "y", "T": [1, 2]}):
        pass
    for values in ({"MODEL.DEVICE": "cpu", "DATALOADER.NUM_WORKERS": 0}, {"MODEL.DEVICE": "cuda"}):
        with RunFolder(tmp_path).opened({"A": 1, "T": [1, 2], **values}):
            pass
    with pytest.raises(UserError, match="holds a run with A 1, now it is 2"), RunFolder(tmp_path).opened({"A": 2}):
        pass


def test_a_second_writer_is_refused(tmp_path):
    with (
        RunFolder(tmp_path).opened({"A": 1}),
        pytest.raises(UserError, match="another process is writing"),
        RunFolder(tmp_path).opened({"A": 1}),
    ):
        pass


def test_config_hash_ignores_where():
    assert config_hash({"A": 1, "OUTPUT_DIR": "x"}) == config_hash({"A": 1, "OUTPUT_DIR": "y"})
    assert config_hash({"A": 1}) != config_hash({"A": 2})


def test_metrics_of_a_resumed_run_equal_an_undisturbed_ones(tmp_path):
    def write(path, start, stop):
        with MetricsWriter(path, start) as metrics:
            for step in range(start, stop):
                metrics.write(step, {"loss": step / 3})

    write(tmp_path / "whole.jsonl", 0, 6)
    write(tmp_path / "parts.jsonl", 0, 5)
    with open(tmp_path / "parts.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    write(tmp_path / "parts.jsonl", 3, 6)
    assert (tmp_path / "parts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_metrics_write_nan_as_null_and_name_a_bad_line(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write(0, {"loss": float("nan")})
    assert read_metrics(path) == [{"step": 0, "loss": None}]
    path.write_text('x\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"m\.jsonl: line 1 is not JSON"):
        read_metrics(path)


def test_tensorboard_gets_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path / "m.jsonl", tensorboard=tmp_path / "board") as metrics:
        metrics.write(0, {"loss": 1.5})
        metrics.write(1, {"loss": 0.5})
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(0, 1.5), (1, 0.5)]
