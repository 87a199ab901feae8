import io
import json
import logging

import pytest
from rich.console import Console

from nst_det.comparison import display
from nst_det.comparison.display import ProgressDisplay, last_metrics, steps_done
from nst_det.comparison.plan import Run
from nst_det.engine.progress import progress_file


def make_run(tmp_path, name, kind="detector", folders=1, threads=1):
    paths = tuple(tmp_path / name / str(index) for index in range(folders))
    return Run(name, kind, (), tuple(path / "result.json" for path in paths), {}, threads=threads)


def write_steps(folder, steps, cut=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "loss": 1 / (step + 1), "note": "x" * 50}) for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + cut)


def test_last_whole_line(tmp_path):
    assert last_metrics(tmp_path / "metrics.jsonl") is None
    write_steps(tmp_path, 1000, cut='{"step": 1000, "lo')
    assert last_metrics(tmp_path / "metrics.jsonl") == {"step": 999, "loss": 1e-3, "note": "x" * 50}
    write_steps(tmp_path, 0, cut='{"st')
    assert last_metrics(tmp_path / "metrics.jsonl") is None


def test_the_student_that_is_furthest_behind_counts(tmp_path):
    run = make_run(tmp_path, "distill", folders=3)
    assert steps_done(run) == (0, {})
    write_steps(run.folders[0], 60)
    (run.folders[0] / "result.json").write_text("{}")
    for folder, steps in zip(run.folders[1:], (8, 5)):
        write_steps(folder, steps)
    assert steps_done(run) == (5, {"loss": 0.2, "note": "x" * 50})
    for folder in run.folders[1:]:
        (folder / "result.json").write_text("{}")
    assert steps_done(run)[0] == 5


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_by_hand(tmp_path, clock):
    teacher = make_run(tmp_path, "teacher", "teacher", threads=2)
    detectors = [make_run(tmp_path, name) for name in "abc"]
    with ProgressDisplay([teacher, *detectors], {"teacher": 10, "detector": 20}, lambda run: run.threads / 2) as view:
        view.started(teacher)
        assert view.seconds_left({"teacher": 0}) is None  # no run of the kind detector was seen yet
        clock[0] += 30
        (tmp_path / "teacher" / "0").mkdir(parents=True)
        (tmp_path / "teacher" / "0" / "result.json").write_text("{}")
        view.finished(teacher)
        view.started(detectors[0])
        view.started(detectors[1])
        clock[0] += 5
        # a did 5 of 20 steps in 5 s, so a detector takes 20 s; left are 15, 18 and 20 s for two at a time
        assert view.seconds_left({"a": 5, "b": 2}) == pytest.approx((15 + 18 + 20) / 2)


def test_a_run_that_went_on_is_scaled_to_a_whole_one(tmp_path, clock):
    runs = [make_run(tmp_path, name) for name in "ab"]
    write_steps(runs[0].folders[0], 10)
    with ProgressDisplay(runs, {"detector": 20}) as view:
        view.started(runs[0])
        clock[0] += 7
        view.finished(runs[0])
        # half of it took 7 s
        assert view.seconds_left({}) == pytest.approx(14.0)


def test_plain_lines_now_and_then(tmp_path, clock, caplog):
    runs = [make_run(tmp_path, name) for name in "ab"]
    with caplog.at_level(logging.INFO), ProgressDisplay(runs, {"detector": 20}) as view:
        view.started(runs[0])
        view.update(runs[:1])
        write_steps(runs[0].folders[0], 4)
        for _ in range(8):
            clock[0] += 2
            view.update(runs[:1])
        view.finished(runs[0])
    said = [record.getMessage() for record in caplog.records]
    # 4 steps in 16 s: 4 s a step, 16 left of this and 20 of the other
    assert said == ["a: starts", "0/2 runs done; a 4/20 (loss 0.25)  ETA 2 min 24 s", "a: done in 16 s (1 of 2 runs)"]


def test_on_a_terminal_there_is_a_bar_for_each_run(tmp_path, clock, monkeypatch):
    console = Console(force_terminal=True, width=120, file=io.StringIO())
    monkeypatch.setattr(display, "console", console)
    runs = [make_run(tmp_path, name) for name in ("detect/a", "detect/b")]
    with ProgressDisplay(runs, {"detector": 20}, folder=tmp_path) as view:
        view.started(runs[0])
        write_steps(runs[0].folders[0], 5)
        view.update(runs[:1])
        # drawn by a thread now and then
        view._bar.refresh()
        # the metrics are behind
        told = progress_file(runs[0].log_path(tmp_path))
        told.parent.mkdir(parents=True)
        told.write_text('{"steps": 7, "note": "evaluation 3/4"}')
        clock[0] += 1
        view.update(runs[:1])
        view._bar.refresh()
        view.finished(runs[0])
        view.started(runs[0])
        view._bar.refresh()
        view.finished(runs[0])
    assert not told.exists()
    shown = [line for line in console.file.getvalue().splitlines() if "detect/a" in line or "runs" in line]
    assert any("5/20" in line and "loss 0.2" in line for line in shown)
    assert any("7/20" in line and "evaluation 3/4" in line for line in shown)
    assert any("5/20" in line and "resumed at step 5" in line for line in shown)
    assert "1/2" in shown[-1]
