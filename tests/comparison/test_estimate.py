import time
from pathlib import Path

import pytest

from nst_det.cli import main
from nst_det.comparison import estimate as module
from nst_det.comparison.config import load_comparison
from nst_det.comparison.estimate import (
    GPU_CONTEXT,
    Estimate,
    Parts,
    copy_parts,
    estimate,
    gpu_shortage,
    total,
    wall_seconds,
)
from nst_det.comparison.launch_local import Machine
from nst_det.comparison.pipeline import checked_configs, compare
from nst_det.comparison.plan import Run, make_plan
from nst_det.data.synthetic import CLASSIFICATION, DETECTION, GenerateSettings, generate_data
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError


@pytest.fixture
def without_data(monkeypatch, tmp_path):
    """The stage that trains nothing needs none."""
    monkeypatch.setattr(module, "copy_parts", lambda *_: Parts(tmp_path / "images"))
    monkeypatch.setattr("nst_det.report.write_report", lambda *_: None)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_estimate_is_near_what_runs_take(comparison, fake_command, without_data, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.1")
    monkeypatch.setattr(module, "STEPS", 6)
    runs = make_plan(comparison)
    configs = checked_configs(comparison, runs)
    before = files(tmp_path)
    found = estimate(comparison, runs, configs, Machine(1), fake_command)
    assert files(tmp_path) == before
    assert not comparison.folder.exists()
    began = time.monotonic()
    compare(comparison, jobs=1, command=fake_command)
    took = time.monotonic() - began
    # a busy machine may give one of the two less time than the other
    assert took / 4 < sum(one.seconds for one in found.values()) < took * 4
    # 3 methods of 6 steps each, one after another; 8 steps of a detector
    students, detector = found["distill/seed0"], found["detect/seed1/kd"]
    assert 0.6 < detector.seconds < 10
    assert 0.5 < students.seconds < 15
    # an interpreter and YAML, not this process with all of torch
    assert all(1 << 20 < one.memory < 400 << 20 for one in found.values())
    # nothing left to do takes nothing
    assert total(found, runs) == Estimate(0.0, 0, 0)


def test_each_kind_is_tried_once(comparison, fake_command, without_data, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    runs, tried = make_plan(comparison), []

    def command(run, folder):
        tried.append(run.name)
        return fake_command(run, folder)

    estimate(comparison, runs, checked_configs(comparison, runs), Machine(1), command)
    # rows differ by their weights alone; that of scratch by a rate
    assert tried == ["teacher", "distill/seed0", "detect/seed0/scratch"]


def test_a_trial_that_fails_is_named(comparison, fake_command, without_data, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "scratch")
    monkeypatch.setenv("FAKE_CODE", "2")
    runs = make_plan(comparison)
    with pytest.raises(UserError, match="the trial of detect/seed0/scratch failed: the images are gone"):
        estimate(comparison, runs, checked_configs(comparison, runs), Machine(1), fake_command)


def test_the_command_line_prints_the_plan_first_then_what_it_takes(config_file, tmp_path, monkeypatch, capsys):
    found = Estimate(3725.0, 3 << 30, 1 << 30)
    monkeypatch.setattr(
        "nst_det.comparison.pipeline.estimate", lambda _comparison, runs, *_: {run.name: found for run in runs}
    )
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "compare",
                "--config-file",
                str(config_file),
                "--output",
                str(tmp_path / "out"),
                "--dry-run",
                "--jobs",
                "2",
            ]
        )
    plan, measured = capsys.readouterr().out.split("11 runs, 0 done, 11 to do")
    assert "detect/seed1/kd" in plan
    assert "1 h 02 min" in measured
    assert "3 GiB" in measured
    assert "11 h 22 min of runs" in measured
    assert "GPU" not in measured
    assert not (tmp_path / "out").exists()


def test_a_trial_on_a_gpu_tells_its_memory(comparison, fake_command, without_data, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    monkeypatch.setenv("FAKE_GPU_GIB", "2.5")
    runs, machine = make_plan(comparison), Machine(6, ("4", "5"), 2)
    found = estimate(comparison, runs, checked_configs(comparison, runs), machine, fake_command)
    # the stand-in has that much where it sees a GPU
    assert {one.gpu_memory for one in found.values()} == {5 << 29}
    assert total(found, runs).gpu_memory == 5 << 29
    found = estimate(comparison, runs, checked_configs(comparison, runs), Machine(6), fake_command)
    assert {one.gpu_memory for one in found.values()} == {0}


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        (2, ""),  # one run a GPU
        (6, ""),  # three of 3 GiB on the fuller one with 9 free
        (7, "4 x 3 GiB, 9 GiB are free; take --jobs 6"),
    ],
)
def test_runs_that_share_a_gpu_must_fit_its_memory(monkeypatch, jobs, said):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: ((40, 9)[index] << 30, 80 << 30))
    one = Estimate(1.0, 1, 1, (3 << 30) - GPU_CONTEXT)
    assert (
        gpu_shortage(one, Machine(16, ("0", "1"), jobs)).removeprefix("GPU memory: runs side by side on a GPU take ")
        == said
    )
    assert gpu_shortage(Estimate(1.0, 1, 1), Machine(16)) == ""


def test_the_command_line_says_that_runs_do_not_fit_a_gpu(config_file, tmp_path, monkeypatch, capsys):
    one = Estimate(1.0, 1 << 30, 1 << 30, 7 << 30)
    monkeypatch.setattr(
        "nst_det.comparison.pipeline.estimate", lambda _comparison, runs, *_: {run.name: one for run in runs}
    )
    monkeypatch.setattr("nst_det.comparison.pipeline.this_machine", lambda _: Machine(4, ("0",), 1))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (5 << 30, 8 << 30))
    words = ["compare", "--config-file", str(config_file), "--output", str(tmp_path / "out"), "--dry-run"]
    with pytest.raises(SystemExit, match="0"):
        main(words)
    *_, line = capsys.readouterr().out.strip().splitlines()
    assert line.startswith("GPU memory")
    assert "1 x 7.5 GiB, 5 GiB" in line
    assert "SOLVER.IMS_PER_BATCH" in line


def named(name, needs=(), threads=1):
    return Run(name, "detector", tuple(needs), (Path("/nowhere") / name,), {}, threads=threads)


def test_wall_time_is_that_of_the_runs_side_by_side():
    runs = [named("a", threads=2), named("b", ["a"]), named("c", ["a"]), named("d", ["a"])]
    found = {name: Estimate(seconds, 0, 0) for name, seconds in (("a", 10.0), ("b", 5.0), ("c", 3.0), ("d", 4.0))}
    assert wall_seconds(runs, found, Machine(jobs=2)) == 10 + 3 + 4
    assert wall_seconds(runs, found, Machine(jobs=1)) == 22
    assert wall_seconds(runs, found, Machine(jobs=8)) == 15


def test_a_part_of_the_data_is_copied(config_file, tmp_path, monkeypatch):
    settings = GenerateSettings(
        classification_images=40, classification_val_images=20, detection_images=6, detection_test_images=40
    )
    root = generate_data(tmp_path / "data", settings, workers=1)
    text = (tmp_path / "distill.yaml").read_text().replace(str(tmp_path / "images"), str(root / CLASSIFICATION))
    (tmp_path / "distill.yaml").write_text(text)
    detect = (tmp_path / "detect.yaml").read_text().replace(str(tmp_path / "voc"), str(root / DETECTION))
    detect = detect.replace("SPLIT: train", "SPLIT: trainval")
    (tmp_path / "detect.yaml").write_text(detect)
    monkeypatch.setattr("nst_det.comparison.estimate.TRAIN_IMAGES", 20)
    comparison = load_comparison(config_file, tmp_path / "out")
    parts = copy_parts(comparison, tmp_path / "trial")
    test = VocDataset(parts.voc["own_test"], "test")
    assert 16 <= len(test.ids) <= 20
    assert parts.test_share == len(test.ids) / 40
    assert test.image(test.ids[0]).ndim == 3
    assert len(VocDataset(parts.voc["own_train"], "trainval").ids) == 6
    assert parts.val_share == 1.0
    assert len(list((parts.images / "train").rglob("*.jpg"))) == 20
    size = comparison.distill.DATA.IMAGE_SIZE
    assert parts.distill_cache == 20 * 3 * size * size
