import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict

import psutil
import pytest
import torch
import yaml

from nst_det.cli import main
from nst_det.comparison import launch_local, pipeline
from nst_det.comparison.config import load_comparison
from nst_det.comparison.launch_local import LocalLauncher, Machine, RunFailed, run_plan, this_machine
from nst_det.comparison.pipeline import compare
from nst_det.comparison.plan import STUDENTS, Run, make_plan, run_config
from nst_det.comparison.result import ComparisonResult, comparable
from nst_det.detection.torchvision import build_detector
from nst_det.distillation.fingerprint import student_claim
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.losses import parse_method
from tests.helpers.small_comparison import change, fake_command, starts

pytestmark = pytest.mark.usefixtures("no_report")


def watched_command(run, folder):
    os.environ["FAKE_PARENT_DIES"] = str(os.getpid())
    return fake_command(run, folder)


@pytest.fixture
def start(config_file, tmp_path, forked):
    """Starts ``nst-det compare`` on tmp_path/out with the stage that trains nothing, in a process."""
    words = ["compare", "--config-file", config_file, "--output", tmp_path / "out"]
    return lambda *more: forked([*words, *more], lambda: setattr(launch_local, "stage_command", watched_command))


def last_line(tmp_path):
    return (tmp_path / "output.txt").read_text().splitlines()[-1]


def test_a_comparison_is_done_once(comparison, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    results = compare(comparison, 4, fake_command)
    assert [row.method for row in results.rows] == ["scratch", "ce", "kd", "kd+nst-poly"]
    assert ComparisonResult.load(comparison.folder / "report" / "results.json") == results
    assert (comparison.folder / "logs" / "detect" / "seed0" / "kd.log").exists()
    again = compare(comparison, 1, lambda *_: pytest.fail("a run that is done was started"))
    assert comparable(again) == comparable(results)
    # stage one has the plan's threads, a detector one, however many jobs there are
    assert starts(comparison.folder / "distill" / "seed1" / "students" / "kd") == ["0 threads 2"]
    assert starts(comparison.folder / "detect" / "seed1" / "kd") == ["0 threads 1"]


def test_methods_and_seeds_may_be_added_and_nothing_else_changed(comparison, config_file, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    few = ["METHODS", "['kd']", "SEEDS", "[0]"]
    first = compare(load_comparison(config_file, comparison.folder, few), 4, fake_command)
    assert [row.verdict for row in first.rows] == ["single seed", "reference", "single seed"]
    more = compare(comparison, 4, fake_command)
    assert starts(comparison.folder / "distill" / "seed0" / "students" / "ce") == ["0 threads 2"]
    assert starts(comparison.folder / "detect" / "seed0" / "kd") == ["0 threads 1"]
    assert more.rows[2].per_seed["0"] == first.rows[2].per_seed["0"]
    for key, value in (("DISTILL.SOLVER.BASE_LR", "0.3"), ("NAME", "other"), ("DETECT.SCRATCH_OPTS", "[VIS_PERIOD,3]")):
        with pytest.raises(UserError, match=f"out: .*{key}"):
            compare(load_comparison(config_file, comparison.folder, [key, value]), 4, fake_command)
    # the threads of an earlier call stay
    change(config_file, THREADS=0)
    assert load_comparison(config_file, comparison.folder).threads == 2


@pytest.mark.parametrize(("exit_code", "code"), [("2", 2), ("1", 1), ("3", 1)])
def test_a_failing_run_stops_the_others_and_is_named(comparison, monkeypatch, exit_code, code):
    monkeypatch.setenv("FAKE_FAILS", "scratch")
    monkeypatch.setenv("FAKE_CODE", exit_code)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.3")
    # the teacher runs beside it
    stopped = comparison.folder / "teacher" / "teacher"
    monkeypatch.setenv("FAKE_FAILS_AFTER", str(stopped / "metrics.jsonl"))
    with pytest.raises(RunFailed, match="detect/seed0/scratch .*the images are gone; bring them back") as info:
        compare(comparison, 3, fake_command)
    assert info.value.code == code
    assert str(comparison.folder / "logs" / "detect" / "seed0" / "scratch.log") in str(info.value)
    assert starts(stopped) == ["0 threads 2"]
    before = (stopped / "metrics.jsonl").read_bytes()
    time.sleep(0.5)
    assert (stopped / "metrics.jsonl").read_bytes() == before
    monkeypatch.delenv("FAKE_FAILS")
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    assert len(compare(comparison, 3, fake_command).rows) == 4


@pytest.mark.parametrize(
    ("methods", "term", "where"),
    [
        ("[kd, nst-poly+kd]", "nst-poly", "distill/seed0/students/kd+nst-poly"),
        ("[kd, cwd@det]", "cwd", "detect/seed0/cwd@det"),
    ],
)
def test_a_row_that_is_not_finite_costs_no_other_row_anything(
    config_file, tmp_path, cli, capsys, monkeypatch, methods, term, where
):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    monkeypatch.setattr(launch_local, "stage_command", fake_command)
    monkeypatch.setenv("FAKE_NOT_FINITE", f"{term} 0")
    words = ["compare", "--config-file", config_file, "--output", tmp_path / "out", "METHODS", methods]
    assert cli(*words) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("nst-det: "))
    row = where.rpartition("/")[2]
    assert all(part in line for part in (row, where, "SOLVER.NON_FINITE.POLICY"))
    results = ComparisonResult.load(tmp_path / "out" / "report" / "results.json")
    assert [*results.missing] == [row]
    assert where in results.missing[row]
    # as if it had never been asked for
    without = compare(load_comparison(config_file, tmp_path / "without", ["METHODS", "[kd]"]), 2)
    rows, others = (comparable([asdict(row) for row in one.rows]) for one in (results, without))
    assert rows == others
    # called again it is tried again
    assert cli(*words) == 1
    monkeypatch.delenv("FAKE_NOT_FINITE")
    assert cli(*words) == 0
    results = ComparisonResult.load(tmp_path / "out" / "report" / "results.json")
    assert (results.missing, results.row(row) is None) == ({}, False)


def test_without_the_baseline_there_is_no_result(comparison, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    monkeypatch.setenv("FAKE_NOT_FINITE", "ce 0")
    with pytest.raises(RunFailed, match="distill/seed"):
        compare(comparison, 2, fake_command)
    assert not (comparison.folder / "report").exists()


def run_code(runs, folder, machine, code_of):
    """Do runs whose processes are Python code; return what started (a) and ended (A), in order."""
    log = Log()
    launcher = LocalLauncher(folder, machine, lambda run, _: [sys.executable, "-c", code_of(run)])
    run_plan(runs, folder, launcher, log)
    return log.events


class Log:
    """In the place of the display."""

    def __init__(self):
        self.events = []

    def started(self, run):
        self.events.append(run.name)

    def finished(self, run):
        self.events.append(run.name.upper())

    def update(self, running):
        pass


def test_a_run_without_its_result_is_a_failure(tmp_path):
    run = Run("detect/seed0/kd", "detector", (), (tmp_path / "result.json",), {})
    for code, message in (("", r"result\.json"), ("os.kill(os.getpid(), 9)", "SIGKILL")):
        with pytest.raises(RunFailed, match=f"run detect/seed0/kd .*{message}"):
            run_code([run], tmp_path, Machine(1), lambda _, code=code: f"import os; {code}")


def test_a_run_that_does_not_stop_when_asked_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_local, "STOP_SECONDS", 0.3)
    stubborn = Run("stubborn", "detector", (), (tmp_path / "s",), {})
    failing = Run("failing", "detector", (), (tmp_path / "f",), {})
    deaf = "import pathlib,signal,time; signal.signal(15, signal.SIG_IGN)\n"
    deaf += f"pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    waits = f"import pathlib,time\nwhile not pathlib.Path({str(tmp_path / 'ready')!r}).exists(): time.sleep(.01)\n1 / 0"
    code = {"stubborn": deaf, "failing": waits}
    with pytest.raises(RunFailed, match="run failing .*ZeroDivisionError") as info:
        run_code([stubborn, failing], tmp_path, Machine(2), lambda run: code[run.name])
    assert info.value.code == 1
    assert not alive(tmp_path / "ready")


def test_this_machine_takes_the_gpus_that_it_may_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(launch_local, "core_count", lambda: 6)
    assert (this_machine(), this_machine(3)) == (Machine(6), Machine(3))
    with pytest.raises(UserError, match="--jobs"):
        this_machine(-1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine() == Machine(6, ("0", "1"), 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    # the runs on the GPUs are counted, not those of the CPU
    assert this_machine(4) == Machine(6, ("4", "7"), 4)


def events_of(folder, machine, runs):
    """What happens when runs ``name -> (threads, needs, wants_gpu)`` go; each notes its GPU and its threads."""
    note = "import os,time; text = '{CUDA_VISIBLE_DEVICES} {OMP_NUM_THREADS}'.format(**os.environ)\n"
    plan = [
        Run(name, "detector", needs, (folder / name,), {}, threads=threads, wants_gpu=gpu)
        for name, (threads, needs, gpu) in runs.items()
    ]
    return run_code(
        plan, folder, machine, lambda run: f"{note}open({str(run.results[0])!r}, 'w').write(text); time.sleep(.2)"
    )


def test_a_run_that_waits_for_room_is_not_overtaken(tmp_path):
    runs = {"a": (1, (), False), "b": (2, (), False), "c": (1, (), False)}
    assert events_of(tmp_path, Machine(2), runs) == ["a", "A", "b", "B", "c", "C"]


def test_a_run_that_waits_for_another_lets_others_go(tmp_path):
    runs = {"a": (1, (), False), "b": (2, ("a",), False), "c": (1, (), False)}
    assert events_of(tmp_path, Machine(2), runs)[:2] == ["a", "c"]


def test_each_gpu_run_gets_the_gpu_with_the_fewest_and_the_cpus_run_beside_them(tmp_path):
    runs = {"a": (8, (), True), "b": (8, (), True), "c": (8, (), True), "d": (1, (), False)}
    events = events_of(tmp_path, Machine(6, ("3", "5"), 2), runs)
    assert events[:3] == ["a", "b", "d"]
    # each has its share of the cores
    assert {(tmp_path / name).read_text() for name in "ab"} == {"3 3", "5 3"}
    assert (tmp_path / "c").read_text() in ("3 3", "5 3")
    assert (tmp_path / "d").read_text() == " 1"


def test_more_runs_than_gpus_share_them_in_turn(tmp_path):
    runs = dict.fromkeys("abcde", (1, (), True))
    assert events_of(tmp_path, Machine(8, ("0", "1"), 4), runs)[:4] == ["a", "b", "c", "d"]
    assert [(tmp_path / name).read_text() for name in "abcd"] == ["0 2", "1 2", "0 2", "1 2"]


def test_a_run_without_a_gpu_sees_none_even_where_its_parent_does(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    events_of(tmp_path, Machine(2), {"a": (2, (), True), "b": (1, (), False)})
    assert [(tmp_path / name).read_text() for name in "ab"] == [" 2", " 1"]


def wait_for(path, seconds=30):
    for _ in range(seconds * 50):
        if path.exists():
            return
        time.sleep(0.02)
    pytest.fail(f"{path} never came")


def alive(folder):
    """Processes whose command line names the folder."""
    found = [process.info for process in psutil.process_iter(["pid", "cmdline", "status"])]
    commands = {info["pid"]: " ".join(info["cmdline"] or ()) for info in found if info["status"] != "zombie"}
    return [command for pid, command in commands.items() if str(folder) in command and pid != os.getpid()]


def test_a_second_comparison_on_one_folder_is_refused(start, comparison, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.5")
    start()
    wait_for(comparison.folder / "teacher" / "teacher" / "metrics.jsonl")
    with pytest.raises(UserError, match="out: another process"):
        compare(comparison, 1, fake_command)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_run_outlives_the_comparison(start, comparison, signum, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.5")
    process = start()
    wait_for(comparison.folder / "teacher" / "teacher" / "metrics.jsonl")
    assert alive(comparison.folder / "configs")
    os.kill(process.pid, signum)
    process.join(30)
    assert process.exitcode == (-signum if signum == signal.SIGKILL else 75)
    assert signum == signal.SIGKILL or signum.name in last_line(tmp_path)
    for _ in range(100):
        if not alive(comparison.folder / "configs"):
            return
        time.sleep(0.05)
    pytest.fail(f"still running: {alive(comparison.folder / 'configs')}")


def steps_in(folder):
    return sum(path.read_text().count("\n") for path in folder.rglob("metrics.jsonl"))


def test_killed_anywhere_and_started_again_gives_the_undisturbed_result(
    start, comparison, config_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    undisturbed = compare(load_comparison(config_file, tmp_path / "undisturbed"), 4, fake_command)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.03")
    draw = random.Random(0)
    for _ in range(5):
        process = start("--jobs", "3")
        enough = steps_in(comparison.folder) + draw.randint(2, 15)
        while process.is_alive() and steps_in(comparison.folder) < enough:
            time.sleep(0.01)
        process.kill()
        process.join()
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    process = start("--jobs", "4")
    process.join(60)
    assert process.exitcode == 0
    results = json.loads((comparison.folder / "report" / "results.json").read_text())
    assert comparable(results) == comparable(undisturbed)
    logs = list(comparison.folder.rglob("starts.log"))
    assert sum(len(starts(path.parent)) for path in logs) > len(logs)


def test_the_plan_is_shown_and_nothing_written(comparison, config_file, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--config-file", str(config_file), "--output", str(comparison.folder), "--plan"])
    shown = capsys.readouterr().out
    assert "11 runs, 0 done, 11 to do" in shown
    assert all(run.name in shown for run in make_plan(comparison))
    assert not comparison.folder.exists()


@pytest.mark.parametrize("how", [["--plan"], []])
@pytest.mark.parametrize(
    "words", [["DISTILL.STUDENT.WEIGHTS", "FILE"], ["DETECT.IMAGENET_OPTS", "[MODEL.WEIGHTS, FILE]"]]
)
def test_a_detector_is_no_start_of_the_row_imagenet(config_file, tmp_path, cli, capsys, how, words):
    comparison = load_comparison(config_file, tmp_path / "out")
    run = next(run for run in make_plan(comparison) if run.row == "scratch")
    config = run_config(comparison, run)
    config.defrost()
    config.MODEL.ROI_HEADS.NUM_CLASSES = 2
    torch.save(build_detector(config).state_dict(), tmp_path / "model.pth")
    words = ["ROWS", "[imagenet]", *(word.replace("FILE", str(tmp_path / "model.pth")) for word in words)]
    assert cli("compare", "--config-file", config_file, "--output", tmp_path / "out", *how, *words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(part in line for part in ("ROWS: imagenet: ", "MODEL.WEIGHTS", "model.pth", "DETECT.IMAGENET_OPTS"))
    assert not (tmp_path / "out").exists()


PLANNED_AND_DONE = pytest.mark.parametrize("how", [["--plan"], ["--dry-run"], []])


@PLANNED_AND_DONE
def test_weights_of_a_row_that_are_missing_are_found_before_stage_one(config_file, tmp_path, cli, capsys, how):
    words = ["ROWS", "[imagenet]", "DETECT.IMAGENET_OPTS", "[MODEL.WEIGHTS, gone.pth]"]
    assert cli("compare", "--config-file", config_file, "--output", tmp_path / "out", *how, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in ("ROWS: imagenet: ", "gone.pth"))
    assert not (tmp_path / "out").exists()


@PLANNED_AND_DONE
@pytest.mark.parametrize("key", ["DISTILL.SOLVER.MAX_ITER", "DETECT.SOLVER.MAX_ITER", "THREADS", "TUNED"])
def test_the_plan_refuses_what_compare_does(comparison, config_file, cli, capsys, monkeypatch, how, key, tmp_path):
    # as far as it came: ce and kd of one seed are done
    for run in make_plan(comparison):
        config = run_config(comparison, run)
        if run.kind == STUDENTS and run.seed == 0:
            for folder, result in zip(run.folders[:2], run.results):
                with RunFolder(folder).opened(student_claim(config, parse_method(folder.name), "data", "teacher")):
                    result.write_text("{}")
        if run.row == "ce" and run.seed == 0:
            with RunFolder(run.folders[0]).opened(config):
                run.results[0].write_text("{}")
    with RunFolder(comparison.folder).opened(comparison.claim):
        pass
    words = ["compare", "--config-file", config_file, "--output", comparison.folder]
    assert cli(*words, "--plan") == 0
    assert "11 runs, 1 done" in capsys.readouterr().out
    monkeypatch.setattr(pipeline, "checked_configs", lambda *_: pytest.fail("it was not refused"))
    settings = {"WEIGHTS": {"kd": 3.0}}
    (tmp_path / "3").write_text(yaml.safe_dump({"methods": {"kd": {"trials": 8, "settings": settings}}}))
    value = tmp_path / "3" if key == "TUNED" else 3
    before = {path: path.read_bytes() for path in comparison.folder.rglob("*.json")}
    capsys.readouterr()
    assert cli(*words, *how, key, value) == 2
    (line,) = capsys.readouterr().err.splitlines()
    student = comparison.folder / "distill/seed0/students/kd"
    named = (student, "TRANSFER.WEIGHTS.kd") if key == "TUNED" else (comparison.folder, key)
    assert all(str(part) in line for part in named)
    assert {path: path.read_bytes() for path in comparison.folder.rglob("*.json")} == before


def test_the_command_exits_as_the_run_that_failed(start, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_FAILS", "scratch")
    monkeypatch.setenv("FAKE_CODE", "2")
    process = start("--jobs", "3")
    process.join(60)
    assert process.exitcode == 2
    assert "detect/seed0/scratch failed: the images are gone; bring them back (log: " in last_line(tmp_path)
