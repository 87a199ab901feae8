"""Run folders, their metrics and what shows progress."""

import importlib.util
import io
import json
import logging
import math
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from nst_det.engine import progress as module
from nst_det.engine.metrics import MetricsWriter, check_wandb, loss_note, read_metrics, speed_of
from nst_det.engine.progress import VARIABLE, progress, progress_file, told, waiting
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


def test_a_run_that_made_no_step_claims_no_folder(tmp_path):
    run = RunFolder(tmp_path)
    for config in ({"SPLIT": "tset"}, {"SPLIT": "test", "MAX_ITER": 2}):
        with run.opened(config):
            pass
    assert json.loads(run.config_path.read_text()) == {"SPLIT": "test", "MAX_ITER": 2}


@pytest.mark.parametrize(
    "trace",
    [
        *("metrics.jsonl", "checkpoints/step-00000500.pt", "model_0000499.pth", "result.json"),
        # of a comparison: one of its runs
        "detect/seed0/ce/metrics.jsonl",
    ],
)
def test_a_run_that_made_a_step_keeps_its_folder(tmp_path, trace):
    with RunFolder(tmp_path).opened({"MAX_ITER": 2}):
        (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / trace).touch()
    with pytest.raises(UserError, match=f"^{tmp_path}: .*MAX_ITER 2, now it is 4") as caught:
        RunFolder(tmp_path).opened({"MAX_ITER": 4}).__enter__()
    assert "MODEL.WEIGHTS" not in str(caught.value)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=f"MODEL.WEIGHTS {tmp_path / 'model.safetensors'}"):
        RunFolder(tmp_path).opened({"MAX_ITER": 4}).__enter__()


def test_another_config_is_refused_but_free_keys_may_differ(tmp_path):
    first = {"A": 1, "T": (1, 2), "OUTPUT_DIR": "x"}
    (tmp_path / "metrics.jsonl").touch()
    for values in (first, {**first, "OUTPUT_DIR": "y", "MODEL.DEVICE": "cpu"}, {"A": 1, "T": [1, 2]}):
        with RunFolder(tmp_path).opened(values):
            pass
    with pytest.raises(UserError, match=f"^{tmp_path}: .* A 1"), RunFolder(tmp_path).opened({"A": 2, "T": [1, 2]}):
        pass
    with (
        RunFolder(tmp_path).opened(first),
        pytest.raises(UserError, match=f"^{tmp_path}: another process"),
        RunFolder(tmp_path).opened(first),
    ):
        pass
    assert config_hash(first) == config_hash({**first, "OUTPUT_DIR": "y"}) != config_hash({**first, "A": 2})


@pytest.mark.parametrize(("before", "now"), [("ab", None), (None, "ab"), ("ab", "cd")])
def test_what_a_run_began_with_is_neither_left_out_nor_added_later(tmp_path, before, now):
    first, later = ({} if digest is None else {"STUDENT.SHA256": digest} for digest in (before, now))
    (tmp_path / "metrics.jsonl").touch()
    for _ in range(2):
        with RunFolder(tmp_path).opened({"A": 1}, first):
            pass
    with pytest.raises(UserError, match=f"^{tmp_path}: .*STUDENT.SHA256 {before!r}, now it is {now!r}"):
        RunFolder(tmp_path).opened({"A": 1}, later).__enter__()


def test_a_result_has_the_speed_of_all_calls_and_metrics_do_not(tmp_path):
    run = RunFolder(tmp_path)
    readings = [(10.0, 0.5, 1.0), (90.0, 0.1, 3.0), (20.0, 0.3, 2.0)]
    names = ("images_per_second", "data_wait", "gpu_memory_gib")
    for start, rows in ((0, readings[:2]), (2, readings[2:])):
        with MetricsWriter(run.metrics_path, start) as metrics:
            for step, values in enumerate(rows, start):
                metrics.write(step, {"loss": 1.0} | {f"speed/{name}": value for name, value in zip(names, values)})
    run.finish({"map": 0.5})
    # medians, and the peak of the memory
    assert run.result() == {"map": 0.5, "speed": dict(zip(names, (20.0, 0.3, 3.0)))}
    assert read_metrics(run.metrics_path) == [{"step": step, "loss": 1.0} for step in range(3)]
    assert speed_of(read_metrics(run.metrics_path)) == {}


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


def test_metrics_go_to_the_file_tensorboard_and_wandb(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, sent, begun = tmp_path / "m.jsonl", [], []
    run = SimpleNamespace(log=lambda values, step: sent.append((step, values)), finish=lambda: sent.append("end"))
    wandb = SimpleNamespace(init=lambda **given: begun.append(given) or run, Error=RuntimeError, __spec__=1)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with MetricsWriter(path, tensorboard=tmp_path / "board", wandb="shapes") as metrics:
        metrics.write(0, {"loss": 1.5, "broken": math.nan})
        metrics.write(1, {"loss": 0.5})
    assert read_metrics(path) == [{"step": 0, "loss": 1.5, "broken": None}, {"step": 1, "loss": 0.5}]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(0, 1.5), (1, 0.5)]
    assert [(given["project"], given["dir"]) for given in begun] == [("shapes", str(tmp_path))]
    # values that are not finite are left out
    assert sent == [(0, {"loss": 1.5}), (1, {"loss": 0.5}), "end"]


@pytest.mark.parametrize("line", ["x", "[1]", '{"loss": 1}'])
def test_a_damaged_row_is_named(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 1}}\n')
    with pytest.raises(UserError, match=f"^{path}: line 2 "):
        read_metrics(path)


def test_without_wandb_the_key_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_wandb("", "a.yaml")
    with pytest.raises(UserError, match=r"^a\.yaml: WANDB 'shapes'"):
        check_wandb("shapes", "a.yaml")
    with pytest.raises(UserError, match="WANDB 'shapes'"):
        MetricsWriter(tmp_path / "metrics.jsonl", wandb="shapes")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_wandb_run_that_stays_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = RunFolder(tmp_path / "detect" / "seed0" / "kd")
    with folder.opened({"SOLVER.MAX_ITER": 3}), MetricsWriter(folder.metrics_path, wandb="shapes") as metrics:
        for step in range(3):
            metrics.write(step, {"loss_cls": 1 / (step + 1)})
    # its service has written all once it has ended
    importlib.import_module("wandb").teardown()
    (written,) = (folder.path / "wandb").glob("offline-run-*/*.wandb")
    assert all(repr(1 / (step + 1)).encode() in written.read_bytes() for step in (1, 2))


def test_progress_is_a_plain_line_now_and_then_and_at_the_end(monkeypatch, caplog):
    now, asked = [0.0], []
    monkeypatch.setattr(module, "is_live", lambda console: False)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)

    def lines(steps, *given):
        caplog.clear()
        with progress("students", 8) as meter:
            for _ in range(steps):
                now[0] += 4
                meter.step(*given)
        return [record.getMessage() for record in caplog.records]

    assert lines(8, {"ce": 1.5}) == [
        "students 4/8  4 s/it  ETA 16 s  ce 1.5",
        "students 8/8  4 s/it  ETA 0 s  ce 1.5",
    ]
    # a longer note is made only where a line is written
    assert lines(5, {"kd": 3.0}, lambda: asked.append(1) or "total 3") == ["students 4/8  4 s/it  ETA 16 s  total 3"]
    assert len(asked) == 1


def test_what_a_run_waits_for_is_told_to_the_comparison_and_shown_by_the_bar(tmp_path, monkeypatch):
    log, console = tmp_path / "kd:0.5.log", Console(force_terminal=True, width=120, file=io.StringIO())
    monkeypatch.setattr(module, "TELL_SECONDS", 0.0)
    assert told(log) == (0, "")
    for shown in (False, True):
        monkeypatch.setattr(module, "console", console)
        monkeypatch.setattr(module, "is_live", lambda console, shown=shown: shown)
        monkeypatch.setenv(VARIABLE, str(progress_file(log)))
        with waiting("loading data"):
            assert told(log) == (0, "loading data")
        with progress("kd", 90, training=True) as meter:
            meter.start_at(30)
            meter.wait("resumed at step 30")
            assert told(log) == (30, "resumed at step 30")
            meter.step({"loss": 0.5})
            assert told(log) == (31, "")
            with progress("evaluation", 7) as inner:
                inner.step()
                assert told(log) == (31, "evaluation 1/7")
            with waiting("checkpoint"):
                assert told(log) == (31, "checkpoint")
                # a thread draws the bars
                latest = time.monotonic() + 20 * shown
                while time.monotonic() < latest and "checkpoint" not in console.file.getvalue():
                    time.sleep(0.02)
            meter.step()
            assert told(log) == (32, "")
        with progress("evaluation", 400) as last:
            last.start_at(200)
            last.step()
            # steps of training alone count
            assert told(log) == (0, "evaluation 201/400")
        assert told(log) == (0, "")
    assert "checkpoint" in console.file.getvalue()
    progress_file(log).write_text('{"steps": 3, "no')
    assert told(log) == (0, "")


def test_losses_of_both_stages_their_sum_first():
    one = {"step": 1, "loss/ce": 2.0, "loss/at": 0.125, "level/at@res4": 0.01, "loss/total": 2.125, "lr": 0.1}
    assert loss_note(one) == "total 2.125  ce 2  at 0.125"
    two = {"step": 1, "loss_cls": 1.25, "loss_transfer_cwd": None, "total_loss": math.nan, "lr": 0.1, "map": 0.5}
    assert loss_note(two) == "total_loss nan  loss_cls 1.25"
    assert loss_note(one, 2) == "total 2.125  ce 2"
    assert loss_note({"step": 1, "val/top1": 0.5}) == ""
