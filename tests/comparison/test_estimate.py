import sys
from pathlib import Path

import pytest

from nst_det.cli import main
from nst_det.comparison import pipeline
from nst_det.comparison.config import load_comparison
from nst_det.comparison.estimate import (
    GPU_CONTEXT,
    Estimate,
    estimate,
    gpu_shortage,
    images_kept,
    total,
    wall_seconds,
)
from nst_det.comparison.launch_local import Machine
from nst_det.comparison.plan import Run, make_plan, run_config
from nst_det.data.synthetic import CLASSIFICATION, DETECTION, GenerateSettings, generate_data
from nst_det.data.voc import VocDataset
from nst_det.engine.format import bytes_below
from nst_det.errors import UserError
from tests.helpers.small_comparison import fake_command

COUNTS = {
    "classification_images": 40,
    "classification_val_images": 10,
    "detection_images": 12,
    "detection_test_images": 3,
}


@pytest.fixture(autouse=True)
def data(tmp_path, config_file, no_report):
    """Small data in the place of what the configs name, for a stage that trains nothing."""
    root = generate_data(tmp_path / "data", GenerateSettings(**COUNTS), workers=1)
    for name, before, after in (("distill", "images", CLASSIFICATION), ("detect", "voc", DETECTION)):
        file = tmp_path / f"{name}.yaml"
        text = file.read_text().replace(str(tmp_path / before), str(root / after))
        file.write_text(text.replace("SPLIT: train", "SPLIT: trainval"))
    return root


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_an_estimate_is_not_less_than_what_runs_take(comparison, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.1")
    runs = make_plan(comparison)
    before = files(tmp_path)
    found = estimate(comparison, runs, Machine(1), fake_command)
    assert files(tmp_path) == before
    assert not comparison.folder.exists()
    pipeline.compare(comparison, jobs=1, command=fake_command)
    # 3 methods of 6 steps each, one after another; 8 steps of a detector; a busy machine takes longer
    students, detector = found["distill/seed0"], found["detect/seed1/kd"]
    assert detector.seconds > 0.6
    assert students.seconds > 0.5
    # an interpreter and YAML, not this process with all of torch
    assert all(1 << 20 < one.memory < 400 << 20 for one in found.values())
    # nothing left to do takes nothing
    assert total(found, runs) == Estimate(0.0, 0, 0)


def test_each_kind_is_tried_once(comparison, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    runs, tried = make_plan(comparison), []

    def command(run, folder):
        tried.append(run.name)
        return fake_command(run, folder)

    estimate(comparison, runs, Machine(1), command)
    # rows differ by their weights alone; that of scratch by a rate
    assert tried == ["teacher", "distill/seed0", "detect/seed0/scratch"]


def test_a_teacher_that_is_taken_as_it_is_has_no_steps(config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    words = ["DISTILL.TEACHER.TRAIN", "False", "DISTILL.TEACHER.PRETRAINED", "True"]
    comparison = load_comparison(config_file, tmp_path / "out", words)
    runs = make_plan(comparison)
    found = estimate(comparison, runs, Machine(1), fake_command)
    assert {*found} == {run.name for run in runs}
    assert 0 < found["teacher"].seconds < 60


def test_a_trial_that_fails_is_named(comparison, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "scratch")
    monkeypatch.setenv("FAKE_CODE", "2")
    runs = make_plan(comparison)
    with pytest.raises(UserError, match="detect/seed0/scratch .*the images are gone"):
        estimate(comparison, runs, Machine(1), fake_command)


def test_the_command_prints_the_plan_then_what_it_takes_and_whether_a_gpu_is_too_small(
    config_file, tmp_path, monkeypatch, capsys
):
    found = Estimate(3725.0, 3 << 30, 1 << 30, 7 << 30)
    monkeypatch.setattr(pipeline, "estimate", lambda _comparison, runs, *_: {run.name: found for run in runs})
    monkeypatch.setattr(pipeline, "this_machine", lambda _: Machine(4, ("0",), 1))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (5 << 30, 8 << 30))
    words = ["compare", "--config-file", str(config_file), "--output", str(tmp_path / "out"), "--dry-run"]
    with pytest.raises(SystemExit, match="0"):
        main(words)
    plan, measured = capsys.readouterr().out.split("11 runs, 0 done, 11 to do")
    assert "detect/seed1/kd" in plan
    assert "1 h 02 min" in measured
    assert "3 GiB" in measured
    assert "11 h 22 min in total" in measured
    line = measured.strip().splitlines()[-1]
    assert line.startswith("GPU memory")
    assert "1 x 7.5 GiB, 5 GiB" in line
    assert "SOLVER.IMS_PER_BATCH" in line
    assert not (tmp_path / "out").exists()


def test_a_trial_on_a_gpu_tells_its_memory(comparison, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    monkeypatch.setenv("FAKE_GPU_GIB", "2.5")
    runs, machine = make_plan(comparison), Machine(6, ("4", "5"), 2)
    found = estimate(comparison, runs, machine, fake_command)
    # the stand-in has that much where it sees a GPU
    assert {one.gpu_memory for one in found.values()} == {5 << 29}
    assert total(found, runs).gpu_memory == 5 << 29
    found = estimate(comparison, runs, Machine(6), fake_command)
    assert {one.gpu_memory for one in found.values()} == {0}


# of 40 and 9 GiB free: one run a GPU; three of 3 GiB on the fuller one; four
@pytest.mark.parametrize(("jobs", "named"), [(2, ""), (6, ""), (7, "take --jobs 6")])
def test_runs_that_share_a_gpu_must_fit_its_memory(monkeypatch, jobs, named):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: ((40, 9)[index] << 30, 80 << 30))
    one = Estimate(1.0, 1, 1, (3 << 30) - GPU_CONTEXT)
    line = gpu_shortage(one, Machine(16, ("0", "1"), jobs))
    assert bool(line) == bool(named)
    assert named in line
    assert gpu_shortage(Estimate(1.0, 1, 1), Machine(16)) == ""


def test_wall_time_is_that_of_the_runs_side_by_side():
    needs = {"a": (), "b": ("a",), "c": ("a",), "d": ("a",)}
    runs = [
        Run(name, "detector", need, (Path("/nowhere") / name,), {}, threads=2 if name == "a" else 1)
        for name, need in needs.items()
    ]
    found = {name: Estimate(seconds, 0, 0) for name, seconds in (("a", 10.0), ("b", 5.0), ("c", 3.0), ("d", 4.0))}
    assert wall_seconds(runs, found, Machine(jobs=2)) == 10 + 3 + 4
    assert wall_seconds(runs, found, Machine(jobs=1)) == 22
    assert wall_seconds(runs, found, Machine(jobs=8)) == 15


def test_decoded_images_that_stay_in_memory(config_file, tmp_path, data):
    words = ["DISTILL.SOLVER.IMS_PER_BATCH", "2", "DETECT.SOLVER.IMS_PER_BATCH", "1", "DETECT.SOLVER.MAX_ITER", "99"]
    comparison = load_comparison(config_file, tmp_path / "out", words)
    runs = {run.name: run for run in make_plan(comparison)}
    students, detector = runs["distill/seed0"], runs["detect/seed0/scratch"]
    # 16 of 40 images are seen in a trial's steps
    side = comparison.distill.DATA.IMAGE_SIZE
    assert images_kept(students, run_config(comparison, students)) == 24 * 3 * side * side
    # and 8 of 12 of the detector's
    train = VocDataset(data / DETECTION, "trainval")
    pixels = sum(train.image(id_).size for id_ in train.ids)
    assert images_kept(detector, run_config(comparison, detector)) == pytest.approx(pixels / 3, abs=1)
    small = load_comparison(config_file, tmp_path / "out", [*words, "DETECT.DATALOADER.CACHE_IMAGES_MB", "0"])
    assert images_kept(detector, run_config(small, detector)) == 0


def test_generated_data_is_made_for_the_trial_alone(config_file, tmp_path, data, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    words = ["DATA.GENERATE", str(COUNTS)]
    comparison, made = load_comparison(config_file, tmp_path / "out", words), []

    def command(run, folder):
        if run.kind != "data":
            return fake_command(run, folder)
        made.append(generate_data(run.options[1], GenerateSettings(**COUNTS), workers=1))
        return [sys.executable, "-c", ""]

    found = estimate(comparison, make_plan(comparison), Machine(1), command)
    assert found["data"].disk == pytest.approx(bytes_below(data), rel=0.02)
    assert found["detect/seed1/kd"].seconds > 0
    assert len(made) == 1
    assert not made[0].exists()
    assert not comparison.folder.exists()
