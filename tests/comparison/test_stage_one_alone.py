"""A comparison without a detector: its plan, its numbers, what it refuses, and a real one that is killed."""

import json
import subprocess
import sys
import time

import pytest
import yaml

from nst_det.comparison.collect import build_results
from nst_det.comparison.config import load_comparison
from nst_det.comparison.pipeline import compare, results_table
from nst_det.comparison.plan import make_plan
from nst_det.comparison.result import ComparisonResult, comparable
from nst_det.errors import UserError
from nst_det.report import write_report
from tests.helpers.small_comparison import COMPARE, fake_command, write_comparison

ALONE = {key: value for key, value in COMPARE.items() if key != "DETECT"}


@pytest.fixture
def alone_file(tmp_path):
    return write_comparison(tmp_path, compare=ALONE)


@pytest.fixture
def alone(alone_file, tmp_path):
    return load_comparison(alone_file, tmp_path / "out")


def test_the_plan_ends_with_stage_one(alone, cli, alone_file, capsys):
    assert [run.name for run in make_plan(alone)] == ["teacher", "distill/seed0", "distill/seed1"]
    assert alone.all_rows == ("ce", "kd", "kd+nst-poly")
    assert alone.claim["ENGINE"] == ""
    assert cli("compare", "--config-file", alone_file, "--plan", "--seeds", "0", "--methods", "kd") == 0
    assert "2 runs, 0 done" in capsys.readouterr().out


def test_pickles_are_trusted_in_the_stage_that_there_is(cli, alone, alone_file):
    words = ["compare", "--config-file", alone_file, "--output", alone.folder, "--plan"]
    assert cli(*words, "--trust-pickle") == 0
    assert cli(*words, "DETECT.SOLVER.MAX_ITER", "3") == 2


def test_rows_by_hand(alone, tmp_path):
    scores = {"ce": (0.5, 0.4), "kd": (0.625, 0.475), "kd+nst-poly": (0.75, 0.65)}
    for row, values in scores.items():
        for seed, value in enumerate(values):
            path = alone.folder / f"distill/seed{seed}/students/{row}/result.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"top1": value, "top5": 1.0, "seconds": 10.0, "params": 170000, "steps": 6}))
    found = build_results(alone, make_plan(alone))
    rows = {row.method: row for row in found.rows}
    assert {name: row.score for name, row in rows.items()} == pytest.approx(
        {"ce": 0.45, "kd": 0.55, "kd+nst-poly": 0.7}
    )
    # differences .125 and .075, and the same .25 on both seeds
    assert rows["kd"].delta_vs_ce == pytest.approx(0.1)
    assert {name: row.verdict for name, row in rows.items()} == {
        **{"ce": "reference", "kd": "noise", "kd+nst-poly": "better"}
    }
    assert (rows["kd"].map, rows["kd"].params, rows["kd"].seconds, found.classes) == (None, 170000, 10.0, [])
    assert len(rows["kd"].commands) == 3
    table = results_table(found)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert (columns["top-1"][1], columns["error"][1]) == ("0.550", "45.00 %")
    assert not {"mAP", "area"} & set(columns)
    found.save(tmp_path / "results.json")
    assert ComparisonResult.load(tmp_path / "results.json") == found
    tree = json.loads((tmp_path / "results.json").read_text())
    tree["rows"][1]["top1"] = None
    (tmp_path / "results.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"results\.json: rows\.1\.top1 "):
        ComparisonResult.load(tmp_path / "results.json")
    path.write_text(json.dumps({"seconds": 10.0}))
    with pytest.raises(UserError, match=r"seed1/students/kd\+nst-poly/result\.json: top1"):
        build_results(alone, make_plan(alone))


UNLABELLED = {
    "DATA": {"ROOT": "FOLDER/images", "LABELS": False},
    "TEACHER": {"WEIGHTS": "FOLDER/teacher.pth"},
    "SOLVER": {"MAX_ITER": 6, "CE_WEIGHT": 0.0},
}


@pytest.mark.parametrize(
    ("words", "measure", "first"),
    [
        (["DISTILL.TEST.PROBE.ROOT", "somewhere"], "knn", "scratch"),
        (["DISTILL.TEST.PROBE.ROOT", "x", "DISTILL.TEST.PROBE.BY", "linear"], "linear", "scratch"),
        (["DISTILL.STUDENT.WEIGHTS", "published.pth"], "agreement", "imagenet"),
        (["METHODS", "[kd, at]"], "cka", "scratch"),
    ],
)
def test_without_labels_rows_are_compared_with_the_start(tmp_path, words, measure, first):
    file = write_comparison(tmp_path, compare=ALONE, distill=UNLABELLED)
    comparison = load_comparison(file, tmp_path / "out", words)
    runs = make_plan(comparison)
    assert comparison.measure.key == measure
    methods = list(comparison.methods)
    assert [*comparison.all_rows] == [first, *methods]
    assert "ce" not in methods
    assert [run.settings["METHODS"] for run in runs] == [methods] * 2
    for seed, values in enumerate(((0.2, 0.5, 0.6), (0.1, 0.425, 0.3))):
        for row, value in zip(methods, values[1:]):
            path = comparison.folder / f"distill/seed{seed}/students/{row}/result.json"
            path.parent.mkdir(parents=True)
            measured = {measure: value, "cka": 0.9} | {f"{measure}_start": values[0]}
            measured = measured if measure != "cka" else {"cka": value, "cka_start": values[0]}
            path.write_text(json.dumps({"top1": None, **measured, "seconds": 10.0, "params": 170000, "steps": 6}))
    found = build_results(comparison, runs)
    rows = {row.method: row for row in found.rows}
    assert (found.baseline, found.measure.key, rows[first].top1) == (first, measure, None)
    assert {name: row.score for name, row in rows.items()} == pytest.approx(
        {first: 0.15, methods[0]: 0.4625, methods[1]: 0.45}
    )
    # differences .3 and .325
    assert rows[methods[0]].delta_vs_ce == pytest.approx(0.3125)
    assert [row.verdict for row in found.rows] == ["reference", "better", "noise"]
    columns = {column.header: list(column.cells) for column in results_table(found).columns}
    assert (columns[found.measure.head][1], columns[f"vs {first}"][1]) == ("0.463", "+0.312")
    assert not {"top-1", "error", "vs ce"} & {*columns}
    found.save(tmp_path / "results.json")
    assert ComparisonResult.load(tmp_path / "results.json") == found
    write_report(found, tmp_path / "report", comparison.folder)
    markdown = (tmp_path / "report/table.md").read_text()
    assert f"| method | {found.measure.head} | difference to {first} |" in markdown
    for text in ("top-1", "labels only", " ce "):
        assert text not in markdown


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["METHODS", "[]"], "METHODS"),
        (["METHODS", "[ce, kd]"], "METHODS ce"),
        (["PUBLISHED", "[nst-cifar10]"], "PUBLISHED"),
    ],
)
def test_what_only_labels_give_is_refused(tmp_path, words, named):
    file = write_comparison(tmp_path, compare=ALONE, distill=UNLABELLED)
    with pytest.raises(UserError, match=rf"compare\.yaml: {named}"):
        load_comparison(file, tmp_path / "out", words)


@pytest.mark.parametrize(
    ("words", "named"), [("METHODS [kd,cwd@det]", r"METHODS cwd@det"), ("ROWS [no-fpn]", "ROWS no-fpn")]
)
def test_no_detector_begins_with_a_student_that_only_labels_make(tmp_path, words, named):
    file = write_comparison(tmp_path, distill=UNLABELLED)
    comparison = load_comparison(file, tmp_path / "out")
    assert (comparison.all_rows, comparison.baseline) == (("scratch", "kd", "kd+nst-poly"), "scratch")
    with pytest.raises(UserError, match=rf"{named} .*DISTILL\.DATA\.LABELS"):
        load_comparison(file, tmp_path / "out", words.split())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("ROWS [scratch]", "ROWS"),
        ("ROWS [teacher]", "ROWS"),
        ("METHODS [kd,cwd@det]", "cwd@det"),
        ("ENGINE torchvision", "ENGINE"),
        ("DETECT.OPTS [SOLVER.MAX_ITER,3]", r"DETECT\.OPTS"),
        ("DETECT.SOLVER.MAX_ITER 3", r"DETECT\.SOLVER\.MAX_ITER"),
        ("PUBLISHED [nst-voc07]", "PUBLISHED"),
        ("PUBLISHED [nowhere]", "PUBLISHED"),
    ],
)
def test_what_is_for_detectors_is_refused(alone_file, words, named):
    with pytest.raises(UserError, match=rf"compare\.yaml: {named}|compare\.yaml: METHODS {named}"):
        load_comparison(alone_file, None, words.split())


def test_a_table_of_students_is_not_put_beside_detectors(config_file):
    with pytest.raises(UserError, match=r"compare\.yaml: PUBLISHED .*nst-voc07"):
        load_comparison(config_file, None, ["PUBLISHED", "[nst-cifar10]"])


def test_the_report(alone_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    folder = tmp_path / "out"
    comparison = load_comparison(alone_file, folder, ["PUBLISHED", "[vid-cifar10-100,nst-cifar10]"])
    compare(comparison, 1, fake_command)
    page = (folder / "report/index.html").read_text()
    assert "Which transfer method gives the better student?" in page
    # each published table with its source
    for text in ("CVPR 2019", "tables 1 and 2", "0.588", "0.942"):
        assert text in page
    for gone in ("mAP", "Faster R-CNN", 'id="classes"', 'id="images"', "scratch"):
        assert gone not in page
    head, first = (folder / "report/results.csv").read_text().splitlines()[:2]
    assert dict(zip(head.split(","), first.split(",")))["map_11point"] == ""
    markdown = (folder / "report/table.md").read_text()
    assert "| method | top-1 | error | difference to ce |" in markdown
    assert "mAP" not in markdown + (folder / "report/table.tex").read_text()


DISTILL = {
    "DATA": {"ROOT": "generated", "IMAGE_SIZE": 32},
    "TEACHER": {"ARCH": "nst_resnet10_w32", "SOLVER": {"MAX_ITER": 3}},
    "SOLVER": {"OPTIMIZER": "ADAMW", "MAX_ITER": 6, "IMS_PER_BATCH": 8, "CHECKPOINT_PERIOD": 2},
    "LOG_PERIOD": 1,
}
GENERATE = {
    **{"classification_images": 24, "classification_val_images": 12, "classification_classes": 3},
    **{"detection_images": 2, "detection_test_images": 2, "detection_classes": 2},
}


@pytest.mark.slow
def test_killed_and_started_again_equals_undisturbed(tmp_path, pytestconfig):
    """The real stage one, on generated images."""
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(DISTILL))
    tree = {"NAME": "tiny", "METHODS": ["kd"], "THREADS": 1, "SEEDS": [0, 1], "DATA": {"GENERATE": GENERATE}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(tree | {"DISTILL": {"CONFIG": "distill.yaml"}}))

    def start(folder):
        words = ["compare", "--config-file", tmp_path / "compare.yaml", "--output", folder, "--jobs", "1"]
        # not forked: the report of another test has left threads in this process
        with open(tmp_path / "output.txt", "a") as said:
            command = [sys.executable, "-m", "nst_det", *map(str, words)]
            return subprocess.Popen(command, stdout=said, stderr=said, cwd=pytestconfig.rootpath)

    def finish(folder):
        assert start(folder).wait(200) == 0, (tmp_path / "output.txt").read_text()[-2000:]
        return json.loads((folder / "report/results.json").read_text())

    undisturbed = finish(tmp_path / "undisturbed")
    assert [row["method"] for row in undisturbed["rows"]] == ["ce", "kd"]
    # in the middle of a seed's students
    steps, process = tmp_path / "killed/distill/seed0/students/kd/metrics.jsonl", start(tmp_path / "killed")
    while process.poll() is None and not (steps.exists() and steps.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    assert comparable(finish(tmp_path / "killed")) == comparable(undisturbed)
