import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

import nst_det.comparison.launch_local
from nst_det.cli import main
from nst_det.comparison.config import load_comparison
from nst_det.comparison.display import ProgressDisplay
from nst_det.comparison.launch_local import LocalLauncher, Machine, RunFailed, run_plan, this_machine
from nst_det.comparison.pipeline import compare
from nst_det.comparison.plan import Run, make_plan
from nst_det.comparison.result import ComparisonResult, comparable
from nst_det.errors import UserError


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report room is tested by itself."""
    monkeypatch.setattr("nst_det.report.write_report", lambda *_: None)


@pytest.fixture
def start(config_file, tmp_path, forked):
    """Starts ``nst-det compare`` on tmp_path/out with the stage that trains nothing, in a process."""

    def watched():
        nst_det.comparison.launch_local.stage_command = watched_command

    return lambda *words: forked(
        ["compare", "--config-file", config_file, "--output", tmp_path / "out", *words], watched
    )


def watched_command(run, folder):
    os.environ["FAKE_PARENT_DIES"] = str(os.getpid())
    fake = Path(__file__).with_name("fake_stage.py")
    return [sys.executable, str(fake), *run.command(folder)]


def starts(folder):
    return (folder / "starts.log").read_text().splitlines()


def test_a_comparison_is_done_once(comparison, fake_command, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    results = compare(comparison, jobs=4, command=fake_command)
    assert [row.method for row in results.rows] == ["scratch", "ce", "kd", "kd+nst-poly"]
    assert ComparisonResult.load(comparison.folder / "report" / "results.json") == results
    assert (comparison.folder / "logs" / "detect" / "seed0" / "kd.log").exists()
    again = compare(comparison, jobs=1, command=lambda *_: pytest.fail("a run that is done was started"))
    assert comparable(again) == comparable(results)
    # stage one has the plan's threads, a detector one, however many jobs there are
    assert starts(comparison.folder / "distill" / "seed1" / "students" / "kd") == ["0 threads 2"]
    assert starts(comparison.folder / "detect" / "seed1" / "kd") == ["0 threads 1"]


def test_methods_and_seeds_may_be_added_and_nothing_else_changed(comparison, config_file, fake_command, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    few = ["METHODS", "['kd']", "SEEDS", "[0]"]
    first = compare(load_comparison(config_file, comparison.folder, few), 4, fake_command)
    assert [row.verdict for row in first.rows] == ["single seed", "reference", "single seed"]
    more = compare(comparison, 4, fake_command)
    assert starts(comparison.folder / "distill" / "seed0" / "students" / "ce") == ["0 threads 2"]
    assert starts(comparison.folder / "detect" / "seed0" / "kd") == ["0 threads 1"]
    assert more.rows[2].per_seed["0"] == first.rows[2].per_seed["0"]
    words = ["DISTILL.SOLVER.BASE_LR", "0.3"]
    with pytest.raises(UserError, match=r"holds a run with DISTILL\.SOLVER\.BASE_LR 0\.1, now it is 0\.3; name"):
        compare(load_comparison(config_file, comparison.folder, words), 4, fake_command)
    # the threads of an earlier call stay
    (config_file.parent / "compare.yaml").write_text(config_file.read_text().replace("THREADS: 2", "THREADS: 0"))
    assert load_comparison(config_file, comparison.folder).threads == 2


@pytest.mark.parametrize(("said", "code"), [("2", 2), ("1", 1), ("3", 1)])
def test_a_failing_run_stops_the_others_and_is_named(comparison, fake_command, monkeypatch, said, code):
    monkeypatch.setenv("FAKE_FAILS", "scratch")
    monkeypatch.setenv("FAKE_CODE", said)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.3")
    # the teacher runs beside it
    stopped = comparison.folder / "teacher" / "teacher"
    monkeypatch.setenv("FAKE_FAILS_AFTER", str(stopped / "metrics.jsonl"))
    with pytest.raises(
        RunFailed, match="run detect/seed0/scratch failed: the images are gone; bring them back"
    ) as info:
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
    ("words", "message"),
    [
        (["DISTILL.DATA.ROOT", "/nowhere"], r"DISTILL\.DATA\.ROOT: no folder '/nowhere'"),
        (["DISTILL.DATA.ROOT", "$NOT_SET_HERE/x"], r"DISTILL\.DATA\.ROOT: the environment variable NOT_SET_HERE"),
        (["DETECT.DATASETS.VOC.own_test.ROOT", "/nowhere"], r"DETECT\.DATASETS\.VOC\.own_test\.ROOT: no folder"),
        (["DISTILL.TRANSFER.LEVELS", "['res9']"], "DISTILL: TRANSFER: .*res9"),
        (
            ["DISTILL.STUDENT.ARCH", "resnet11", "DETECT.MODEL.TIMM.ARCH", "resnet11"],
            "DISTILL: STUDENT.ARCH: .*resnet11",
        ),
        (["DISTILL.TEACHER.WEIGHTS", "gone.safetensors"], "gone.safetensors"),
        (["DISTILL.SOLVER.BASE_LR", "-1.0"], "run teacher: stage one: SOLVER.BASE_LR must be above 0"),
        (["DETECT.MODEL.FPN.FUSE_TYPE", "max"], "stage two: .*MODEL.FPN.FUSE_TYPE 'max'"),
        (
            ["METHODS", "[cwd@det]", "DETECT.TRANSFER.LEVELS", "[p9]"],
            "small: row cwd@det: DETECT: TRANSFER: .*p9",
        ),
    ],
)
def test_what_would_fail_after_hours_fails_at_once(config_file, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        compare(load_comparison(config_file, tmp_path / "out", words), 1, lambda *_: pytest.fail("a run was started"))
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_result_is_a_failure(tmp_path):
    run = Run("detect/seed0/kd", "detector", (), (tmp_path / "result.json",), {})
    for code, message in (("", r"without writing .*result\.json"), ("os.kill(os.getpid(), 9)", "killed by SIGKILL")):
        with pytest.raises(RunFailed, match=f"run detect/seed0/kd .*{message}"):
            run_code([run], tmp_path, Machine(1), lambda _, code=code: f"import os; {code}")


def test_a_run_that_does_not_stop_when_asked_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(nst_det.comparison.launch_local, "STOP_SECONDS", 0.3)
    stubborn = Run("stubborn", "detector", (), (tmp_path / "s",), {})
    failing = Run("failing", "detector", (), (tmp_path / "f",), {})
    deaf = "import pathlib,signal,time; signal.signal(15, signal.SIG_IGN)\n"
    deaf += f"pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    waits = f"import pathlib,time\nwhile not pathlib.Path({str(tmp_path / 'ready')!r}).exists(): time.sleep(.01)\n1 / 0"
    code = {"stubborn": deaf, "failing": waits}
    with pytest.raises(RunFailed, match="run failing failed: ZeroDivisionError: division by zero") as info:
        run_code([stubborn, failing], tmp_path, Machine(2), lambda run: code[run.name])
    assert info.value.code == 1
    assert not alive(tmp_path / "ready")


def test_this_machine_takes_the_gpus_that_it_may_see(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(nst_det.comparison.launch_local, "core_count", lambda: 6)
    assert this_machine() == Machine(6)
    assert this_machine(3) == Machine(3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine() == Machine(6, ("0", "1"), 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    # the runs on the GPUs are counted, not those of the CPU
    assert this_machine(4) == Machine(6, ("4", "7"), 4)


def run_code(runs, folder, machine, code_of):
    """Do runs whose processes are Python code; what started and ended, in order."""
    with Log(runs, {}) as display:
        run_plan(
            runs, folder, LocalLauncher(folder, machine, lambda run, _: [sys.executable, "-c", code_of(run)]), display
        )
    return display.events


class Log(ProgressDisplay):
    """Notes what starts (a) and ends (A)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.events = []

    def started(self, run):
        super().started(run)
        self.events.append(run.name)

    def finished(self, run):
        super().finished(run)
        self.events.append(run.name.upper())


def events_of(folder, machine, runs):
    """What happens when runs ``name -> (threads, needs, wants_gpu)`` go; each notes its GPU and its threads."""
    note = "import os,time; text = '{CUDA_VISIBLE_DEVICES} {OMP_NUM_THREADS}'.format(**os.environ)\n"
    wait = "time.sleep(.2)"
    plan = [
        Run(name, "detector", needs, (folder / name,), {}, threads=threads, wants_gpu=gpu)
        for name, (threads, needs, gpu) in runs.items()
    ]
    return run_code(plan, folder, machine, lambda run: f"{note}open({str(run.results[0])!r}, 'w').write(text); {wait}")


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


def test_a_second_comparison_on_one_folder_is_refused(start, comparison, fake_command, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.5")
    start()
    wait_for(comparison.folder / "teacher" / "teacher" / "metrics.jsonl")
    with pytest.raises(UserError, match="another process is writing this run"):
        compare(comparison, 1, fake_command)


def wait_for(path, seconds=30):
    for _ in range(seconds * 50):
        if path.exists():
            return
        time.sleep(0.02)
    pytest.fail(f"{path} never came")


def alive(folder):
    """Processes whose command line names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if str(folder) in words and state != "Z":
                found.append(words.replace("\0", " "))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_run_outlives_the_comparison(start, comparison, signum, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.5")
    process = start()
    wait_for(comparison.folder / "teacher" / "teacher" / "metrics.jsonl")
    assert alive(comparison.folder / "configs")
    os.kill(process.pid, signum)
    process.join(30)
    assert process.exitcode == (-signum if signum == signal.SIGKILL else 75)
    if signum != signal.SIGKILL:
        said = (tmp_path / "said.txt").read_text().splitlines()
        assert (
            said[-1] == f"nst-det: stopped by {signum.name}; what is done is saved, the same command goes on from here"
        )
    for _ in range(100):
        if not alive(comparison.folder / "configs"):
            return
        time.sleep(0.05)
    pytest.fail(f"still running: {alive(comparison.folder / 'configs')}")


def steps_in(folder):
    return sum(path.read_text().count("\n") for path in folder.rglob("metrics.jsonl"))


def test_killed_anywhere_and_started_again_gives_the_undisturbed_result(
    start, comparison, config_file, fake_command, tmp_path, monkeypatch
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
    with pytest.raises(SystemExit) as left:
        main(["compare", "--config-file", str(config_file), "--output", str(comparison.folder), "--plan"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "11 runs, 0 done, 11 to do" in shown
    for run in make_plan(comparison):
        assert run.name in shown
    assert not comparison.folder.exists()


def test_the_command_line_says_what_failed_and_with_which_code(start, comparison, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_FAILS", "scratch")
    monkeypatch.setenv("FAKE_CODE", "2")
    process = start("--jobs", "3")
    process.join(60)
    assert process.exitcode == 2
    last = (tmp_path / "said.txt").read_text().splitlines()[-1]
    assert last.startswith("nst-det: run detect/seed0/scratch failed: the images are gone; bring them back (log: ")
