import json
import math

import pytest
import yaml

from nst_det.comparison.collect import build_results
from nst_det.comparison.config import load_comparison
from nst_det.comparison.pipeline import results_table
from nst_det.comparison.plan import make_plan
from nst_det.comparison.result import ComparisonResult, comparable
from nst_det.errors import UserError

# 11-point mAP by row and seed
MAPS = {"scratch": (0.25, 0.25), "ce": (0.5, 0.4), "kd": (0.625, 0.475), "kd+nst-poly": (0.75, 0.65)}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def detector_result(value, **changes):
    per_class = {"cup": value - 0.125, "hat": value + 0.125, "never": None}
    area = {name: None if ap is None else ap / 2 for name, ap in per_class.items()}
    result = {"map": value, "map_area": value / 2, "per_class": per_class, "per_class_area": area, "params": 11}
    result |= {"engine": "torchvision", "seconds": 30.0, "steps": 8, "coco": {"AP": value / 3}}
    result |= {"map_by_iou": {"0.5": value, "0.95": None}, "objects": {"small": 1, "medium": 2, "large": 3}}
    return result | changes


@pytest.fixture
def finished(comparison):
    """A comparison whose result files are all there."""
    for row, values in MAPS.items():
        for seed, value in enumerate(values):
            write(comparison.folder / f"detect/seed{seed}/{row}/result.json", detector_result(value))
            if row != "scratch":
                student = {"top1": value + 0.25, "top5": 1.0, "seconds": 10.0 + seed, "weights": {"kd": 2.5 + seed}}
                student["speed"] = {"images_per_second": 100.0 + seed, "data_wait": 0.25}
                write(comparison.folder / f"distill/seed{seed}/students/{row}/result.json", student)
    teacher = {"name": "small-teacher", "top1": 0.9375, "top5": 1.0, "seconds": 60.0, "steps": 5, "params": 99}
    write(comparison.folder / "teacher/teacher/result.json", teacher)
    return comparison


def test_rows_by_hand(finished, tmp_path):
    found = build_results(finished, make_plan(finished))
    found.save(tmp_path / "results.json")
    assert ComparisonResult.load(tmp_path / "results.json") == found
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["scratch", "ce", "kd", "kd+nst-poly"]
    assert results["engine"] == "torchvision"
    assert results["classes"] == ["cup", "hat", "never"]
    assert results["teacher"]["top1"] == 0.9375
    kd = rows["kd"]
    assert kd["map"] == pytest.approx(0.55)
    # two values differ by .15: deviation .15 / sqrt(2)
    assert kd["map_std"] == pytest.approx(0.15 / math.sqrt(2))
    assert (kd["map_area"], kd["map_area_std"]) == pytest.approx((0.275, 0.075 / math.sqrt(2)))
    assert kd["per_class"] == {"cup": pytest.approx(0.425), "hat": pytest.approx(0.675), "never": None}
    assert (kd["top1"], kd["seconds"], kd["seconds_detector"]) == (pytest.approx(0.8), 40.5, 30.0)
    assert kd["speed_backbone"] == {"images_per_second": 100.5, "data_wait": 0.25}
    # a result of an earlier version tells none
    assert kd["speed_detector"] == rows["scratch"]["speed_backbone"] == {}
    assert kd["map_by_iou"] == {"0.5": pytest.approx(0.55), "0.95": None}
    assert kd["coco"] == {"AP": pytest.approx(0.55 / 3)}
    assert kd["objects"] == {"small": 1, "medium": 2, "large": 3}
    # differences .125 and .075: mean .1, error .025; with one degree of freedom t(.975) = tan(.475 pi)
    assert kd["delta_vs_ce"] == pytest.approx(0.1)
    assert kd["delta_interval"] == pytest.approx([0.1 - 0.025 * math.tan(0.475 * math.pi), 0.1 + 0.3176551184])
    assert kd["verdict"] == "noise"
    # the same .25 on both seeds
    assert rows["kd+nst-poly"]["verdict"] == "better"
    # deltas -.25 and -.15
    assert (rows["scratch"]["delta_vs_ce"], rows["scratch"]["verdict"]) == (pytest.approx(-0.2), "noise")
    assert (rows["ce"]["delta_vs_ce"], rows["ce"]["verdict"], rows["ce"]["p_holm"]) == (0.0, "reference", None)
    p = {name: row["p_value"] for name, row in rows.items()}
    assert rows["scratch"]["p_holm"] == pytest.approx(2 * min(p["scratch"], p["kd"]))
    assert rows["scratch"]["top1"] is None
    assert rows["scratch"]["backbone"] == []
    assert kd["backbone"] == ["small-kd-s0", "small-kd-s1"]
    assert kd["per_seed"]["1"]["run"] == "detect/seed1/kd"
    assert kd["per_seed"]["1"]["distill_run"] == "distill/seed1/students/kd"
    assert kd["per_seed"]["1"]["map"] == 0.475
    assert kd["per_seed"]["1"]["term_weights"] == {"backbone": {"kd": 3.5}, "detector": {}}


def test_a_row_with_terms_of_stage_two_starts_from_the_backbone_of_its_word(finished, config_file):
    words = ["METHODS", "[cwd@det:3, kd, kd+pkd@det]"]
    for row, value in {"cwd@det:3": 0.5, "kd+pkd@det": 0.75}.items():
        for seed in (0, 1):
            write(finished.folder / f"detect/seed{seed}/{row}/result.json", detector_result(value))
    comparison = load_comparison(config_file, finished.folder, words)
    rows = {row.method: row for row in build_results(comparison, make_plan(comparison)).rows}
    # those that learn in stage one alone come first
    assert list(rows) == ["scratch", "ce", "kd", "cwd@det:3", "kd+pkd@det"]
    assert [row.stage for row in rows.values()] == ["", "", "backbone", "detector", "detector"]
    assert [row.weights_from for row in rows.values()] == ["", "", "default", "configured", "default"]
    assert [row.weights_text for row in rows.values()][2:] == [
        *("default: kd 3", "configured: cwd@det", "default: kd 3, pkd@det")
    ]
    assert (rows["kd+pkd@det"].top1, rows["cwd@det:3"].top1) == (rows["kd"].top1, rows["ce"].top1)
    assert rows["kd+pkd@det"].backbone == ["small-kd-s0", "small-kd-s1"]
    # and what the row needs is all in its commands
    assert any("detect/seed0/teacher.yaml" in command for command in rows["kd+pkd@det"].commands)


def test_what_differs_between_rows_is_said_at_the_row(finished, config_file, tmp_path):
    search = {"kd": {"trials": 8, "settings": {"WEIGHTS": {"kd": 2.5}, "OPTIONS": {"kd": {"temperature": 2.0}}}}}
    search["kd+nst-poly"] = {"trials": 8, "settings": {"LEVELS": ["res4"]}}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump({"methods": search}))
    for row in ("no-fpn", "teacher"):
        for seed in (0, 1):
            write(finished.folder / f"detect/seed{seed}/{row}/result.json", detector_result(0.5))
    words = ["TUNED", str(tmp_path / "tuned.yaml"), "ROWS", "[no-fpn, teacher]"]
    words += ["DETECT.NO_FPN_OPTS", "[SOLVER.BASE_LR, 0.25]"]
    comparison = load_comparison(config_file, finished.folder, words)
    results = build_results(comparison, make_plan(comparison))
    differs = {row.method: row.differs for row in results.rows}
    assert differs == {
        "scratch": ["SOLVER.BACKBONE_MULTIPLIER 0.5 (ce: 1.0)"],
        "ce": [],
        "kd": ["kd.temperature 2.0 (default: 4.0)"],
        "kd+nst-poly": ["TRANSFER.LEVELS ['res4'] (elsewhere: ['res3', 'res4'])"],
        "no-fpn": ["SOLVER.BASE_LR 0.25 (ce: 0.001)"],
        "teacher": ["MODEL.TIMM.ARCH nst_resnet18_w48 (ce: nst_resnet10_w32)"],
    }
    assert results.row("kd").weights_text == "tuned (8 trials): kd 3"
    caption = str(results_table(results).caption)
    assert all(line in caption.replace("\\[", "[") for lines in differs.values() for line in lines)


def test_commands_make_a_row_again(finished):
    rows = {row.method: row for row in build_results(finished, make_plan(finished)).rows}
    configs = finished.folder / "configs"
    assert rows["scratch"].commands == [
        f"OMP_NUM_THREADS=1 nst-det train-det --config-file {configs}/detect/seed{seed}/scratch.yaml" for seed in (0, 1)
    ]
    assert [command.split("configs/")[1] for command in rows["kd+nst-poly"].commands] == [
        "teacher.yaml",
        "distill/seed0.yaml",
        "distill/seed1.yaml",
        "detect/seed0/kd+nst-poly.yaml",
        "detect/seed1/kd+nst-poly.yaml",
    ]
    assert rows["kd"].commands[0].startswith("OMP_NUM_THREADS=2 nst-det distill ")


def test_one_seed_has_no_spread(finished, config_file):
    one = load_comparison(config_file, finished.folder, ["SEEDS", "[1]"])
    rows = build_results(one, make_plan(one)).rows
    assert {row.method: row.verdict for row in rows} == {
        "scratch": "single seed", "ce": "reference", "kd": "single seed", "kd+nst-poly": "single seed",
    }  # fmt: skip
    assert rows[2].map_std is rows[2].delta_interval is rows[2].p_holm is None
    assert rows[2].delta_vs_ce == pytest.approx(0.075)
    table = results_table(build_results(one, make_plan(one)))
    assert "no spread" in str(table.caption)
    heads = ["row", "mAP", "area", "vs ce", "top-1", "seconds", "verdict", "weights"]
    assert [column.header for column in table.columns] == heads


@pytest.mark.parametrize("begin", ["lite0.pth", ""])
def test_rows_that_begin_from_published_weights_are_compared_with_them(finished, config_file, begin):
    for seed, value in enumerate((0.25, 0.5)):
        write(finished.folder / f"detect/seed{seed}/imagenet/result.json", detector_result(value))
    words = ["ROWS", "[imagenet]", "DETECT.IMAGENET_OPTS", "[MODEL.WEIGHTS, other.pth]"]
    words += ["DISTILL.STUDENT.WEIGHTS", f"somewhere/{begin}"] if begin else []
    comparison = load_comparison(config_file, finished.folder, words)
    results = build_results(comparison, make_plan(comparison))
    heads = [str(column.header) for column in results_table(results).columns]
    assert ("vs imagenet" in heads) == bool(begin)
    assert results.student_weights == begin
    found = {row.method: row.vs_imagenet for row in results.rows}
    if not begin:
        assert {*found.values()} == {None}
        return
    # kd .625 and .475, scratch .25 twice
    assert {name: round(one.mean, 9) for name, one in found.items()} == {
        "scratch": -0.125, "imagenet": 0.0, "ce": 0.075, "kd": 0.175, "kd+nst-poly": 0.325,
    }  # fmt: skip
    # differences .375 and -.025: error .2; with one degree of freedom t(.975) = tan(.475 pi)
    reach = 0.2 * math.tan(0.475 * math.pi)
    assert found["kd"].interval == pytest.approx((0.175 - reach, 0.175 + reach))
    assert (found["kd"].verdict, found["imagenet"].verdict) == ("noise", "reference")


def test_the_table_with_several_seeds(finished):
    table = results_table(build_results(finished, make_plan(finished)))
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["mAP"] == ["0.250", "0.450", "0.550", "0.700"]
    assert cells["±"] == ["0.000", "0.071", "0.106", "0.071"]
    assert cells["95 % interval"] == ["-0.835 .. +0.435", "-", "-0.218 .. +0.418", "+0.250 .. +0.250"]
    assert cells["top-1"] == ["-", "0.700", "0.800", "0.950"]


def test_comparable_leaves_out_when_where_and_how_fast(finished, config_file, tmp_path):
    first = build_results(finished, make_plan(finished))
    moved = finished.folder.rename(tmp_path / "elsewhere")
    slow = detector_result(0.475, seconds=99.0)
    write(moved / "detect/seed1/kd/result.json", slow)
    other = load_comparison(config_file, moved)
    second = build_results(other, make_plan(other))
    assert second != first
    assert comparable(second) == comparable(first)
    write(moved / "detect/seed1/kd/result.json", slow | {"map": 0.4750000001})
    assert comparable(build_results(other, make_plan(other))) != comparable(first)


@pytest.mark.parametrize("key", ["map", "map_area", "per_class", "per_class_area"])
def test_a_damaged_result_is_named(finished, key):
    path = finished.folder / "detect/seed0/kd/result.json"
    write(path, detector_result(0.5, **{key: None}))
    with pytest.raises(UserError, match=rf"seed0/kd/result\.json: {key} must be .*remove"):
        build_results(finished, make_plan(finished))


def test_a_teacher_row_and_a_teacher_of_ones_own(finished, config_file):
    folder = finished.folder
    for seed in (0, 1):
        write(folder / f"detect/seed{seed}/teacher/result.json", detector_result(0.875))
    both = load_comparison(config_file, folder, ["ROWS", "['teacher']"])
    row = build_results(both, make_plan(both)).rows[-1]
    assert (row.method, row.top1, row.map) == ("teacher", 0.9375, 0.875)
    assert row.per_seed["0"].distill_run == "teacher/teacher"
    (folder / "teacher/teacher/result.json").unlink()
    own = load_comparison(config_file, folder, ["ROWS", "['teacher']", "DISTILL.TEACHER.WEIGHTS", "big.safetensors"])
    results = build_results(own, make_plan(own))
    assert results.teacher is None
    assert results.rows[-1].top1 is None
