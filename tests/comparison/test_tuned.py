import pytest
import yaml

from nst_det.comparison.config import Tuned, load_comparison, parse_row, read_tuned, weights_from
from nst_det.comparison.plan import make_plan, run_config
from nst_det.distillation.config import transfer_of
from nst_det.engine.config import plain
from nst_det.errors import UserError

FOUND = {
    "kd": {"trials": 8, "settings": {"WEIGHTS": {"kd": 2.5}}},
    "nst-poly+kd": {"trials": 8, "settings": {"LEVELS": ["res4"], "WEIGHTS": {"kd": 0.5, "nst-poly": 70.0}}},
    "cwd@det": {"trials": 4, "settings": {"LEVELS": ["p3"], "WEIGHTS": {"cwd": 3.0}}},
    "at": {"trials": 8, "settings": {"WEIGHTS": {"at": 9.0}}},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tuned.yaml"
    path.write_text(yaml.safe_dump({"budget": {"trials": 8}, "methods": FOUND}))
    return path


def test_each_method_runs_with_what_was_found_for_it(config_file, file):
    words = ["METHODS", "[kd, kd+nst-poly, fitnet, cwd@det, pkd@det]", "TUNED", str(file)]
    comparison = load_comparison(config_file, overrides=words)
    runs = {run.name: run for run in make_plan(comparison)}
    students = run_config(comparison, runs["distill/seed0"])
    assert plain(transfer_of(students, "kd").WEIGHTS) == {"kd": 2.5}
    assert transfer_of(students, "kd+nst-poly").LEVELS == ["res4"]
    assert plain(transfer_of(students, "kd+nst-poly").WEIGHTS) == {"kd": 0.5, "nst-poly": 70.0}
    assert transfer_of(students, "fitnet").LEVELS == comparison.distill.TRANSFER.LEVELS
    # of methods that aren't compared nothing is handed on
    assert "at" not in students.TRANSFER.BY_METHOD
    config = run_config(comparison, runs["detect/seed1/cwd@det"])
    detector = config.TRANSFER
    assert (config.METHOD, detector.LEVELS, plain(detector.WEIGHTS)) == ("cwd", ["p3"], {"cwd": 3.0})
    detector = run_config(comparison, runs["detect/seed1/pkd@det"]).TRANSFER
    assert (detector.LEVELS, plain(detector.WEIGHTS)) == (["p2", "p3", "p4", "p5"], {})
    # rows without terms of stage two are what they are without the file
    assert runs["detect/seed0/kd"].options == ()


def test_a_file_is_named_relative_to_the_comparison_and_may_be_added_to_a_finished_one(config_file, file):
    tree = yaml.safe_load(config_file.read_text())
    plain_claim = load_comparison(config_file).claim
    config_file.write_text(yaml.safe_dump(tree | {"TUNED": "tuned.yaml"}))
    comparison = load_comparison(config_file)
    assert comparison.tuned["kd+nst-poly"] == Tuned(FOUND["nst-poly+kd"]["settings"], 8)
    assert comparison.claim == plain_claim


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no methods in it"),
        ({"methods": {"nst-polly": {"trials": 1, "settings": {}}}}, "unknown term 'nst-polly'"),
        ({"methods": {"kd": {"trials": 1}}}, "kd needs trials, and settings"),
        ({"methods": {"kd": {"trials": 1, "settings": {"SOLVER": {}}}}}, "kd needs trials, and settings"),
        ({"methods": {"kd": {"trials": "8", "settings": {}}}}, "kd needs trials"),
    ],
)
def test_what_is_no_such_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message) as caught:
        read_tuned(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("ce", ""),
        ("kd", "tuned: 8 trials"),
        ("kd:2", "weight in the method string"),
        ("fitnet", "configured weight"),
        ("nst-linear", "default weight"),
        ("fitnet+nst-linear", "configured weight, default weight"),
        ("vid", "automatic weight"),
        ("kd+cwd@det", "tuned: 8 trials, default weight"),
        ("cwd@det", "tuned: 4 trials"),
        ("pkd@det", "configured weight"),
    ],
)
def test_where_the_weights_of_a_row_are_from(file, word, text):
    distill = {"WEIGHTS": {"fitnet": 3.0, "kd": 1.0}, "AUTO_WEIGHT": {"vid": 0.5}}
    assert weights_from(parse_row(word), read_tuned(file), distill, {"WEIGHTS": {"pkd": 1.0}}) == text
