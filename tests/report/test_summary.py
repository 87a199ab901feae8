from dataclasses import replace

import pytest

from nst_det.comparison.published import PUBLISHED
from nst_det.report.summary import (
    against_paper,
    caveats,
    conclusion,
    not_above,
    paper_order,
    published,
    question,
    unequal_weights,
)
from tests.helpers.finished import build_results, typed, without_detectors


def results(field="", by_method=(), **changes):
    """Results of changed numbers; ``by_method`` changes a field of some rows."""
    tree = build_results(**changes)
    for row in tree["rows"]:
        if row["method"] in by_method:
            row[field] = by_method[row["method"]]
    return typed(tree)


GAIN = "+0.312 mAP (95 % interval +0.157 to +0.467)"
ALONE = {"ce": ((0.5, 0.5, 0.4), (0.1, 0.2, 0.3)), "scratch": ((0.1, 0.1, 0.1), None)}
FOUR = ("kd", "fitnet", "nst-poly", "kd+nst-poly")


@pytest.mark.parametrize(
    ("verdicts", "changes", "parts"),
    [
        ({}, {}, ["Over 3 seeds, fitnet, kd+nst-poly, nst-poly and kd beat ce", f"fitnet: {GAIN}", "For at, the diff"]),
        (
            {"kd": "noise", "nst-poly": "worse", "kd+nst-poly": "worse"},
            {},
            [f"fitnet beats ce (labels only): {GAIN}", "For kd and at,", "Worse than ce: kd+nst-poly and nst-poly."],
        ),
        (dict.fromkeys(FOUR, "noise"), {}, ["no transfer method can be shown to beat ce", "Every difference lies"]),
        (dict.fromkeys((*FOUR, "at"), "worse"), {}, ["no transfer method beats ce", "Worse than ce: fitnet"]),
        (
            {},
            {"seeds": 1},
            ["no spread to judge by", "of the transfer methods fitnet has the highest mAP (0.812, +0.240 against ce)"],
        ),
        ({}, {"numbers": ALONE}, ["No transfer method was compared"]),
    ],
)
def test_the_conclusion_claims_what_the_verdicts_say(verdicts, changes, parts):
    text = conclusion(results("verdict", verdicts, **changes))
    assert [part for part in parts if part not in text] == []
    assert ("beat" in text) == (changes == {})


def test_caveats():
    p_holm = {"scratch": 0.01, "kd": 0.09, "fitnet": 0.02, "at": 0.5, "nst-poly": 0.04, "kd+nst-poly": 0.0501}
    notes = caveats(results("p_holm", p_holm))
    assert "kd and kd+nst-poly would no longer count" in notes[0]
    assert any("ce is +0.393 against that of a random backbone" in note for note in notes)
    without = replace(results(), missing={"mgd": "not finite at step 3 of distill/seed0/students/mgd"})
    assert [part for part in ("mgd", "step 3") if part not in caveats(without)[0]] == []


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (["ce", "kd", "at", "fitnet"], "Not above ce: kd (−0.250) and at (0.000)."),
        (["ce", "fitnet"], "Each method's row has a higher mAP than ce."),
        (["ce"], None),
    ],
)
def test_rows_that_are_not_above_ce_are_named_with_their_distance(methods, expected):
    maps = {"ce": 0.5, "kd": 0.25, "at": 0.5, "fitnet": 0.75}
    found = results(numbers={name: ((maps[name],), (0.7,)) for name in methods}, seeds=1)
    assert not_above(found) == expected
    assert expected is None or expected in caveats(found)


def test_unequal_weights_are_named():
    tuned, default = (
        [{"term": "kd", "weight": 2.5, "source": source, "trials": trials}]
        for source, trials in (("tuned", 8), ("default", None))
    )
    text = unequal_weights(results("weights", {"kd": tuned, "at": default, "fitnet": tuned}))
    assert "(tuned (8 trials): kd, fitnet; default: at)" in text
    assert unequal_weights(results()) is None
    assert unequal_weights(results("weights", {"kd": tuned, "at": tuned})) is None


def test_what_a_random_backbone_is_trained_with_is_said_where_it_is_compared():
    rate = "SOLVER.BACKBONE_MULTIPLIER 1.0 (ce: 0.3)"
    notes = caveats(results("differs", {"scratch": [rate]}))
    assert [rate in note for note in notes if "random backbone" in note] == [True]


VOC07 = PUBLISHED["nst-voc07"]


def test_against_the_paper():
    lines = {line["method"]: line for line in against_paper(results("verdict", {"nst-poly": "worse"}), VOC07)}
    maps = {"ce": 75.6, "kd": 76.0, "fitnet": 76.6, "at": 76.5, "nst-poly": 76.8, "kd+nst-poly": 77.2}
    assert {method: round(100 * line["paper_score"], 6) for method, line in lines.items()} == maps
    tops = {"ce": 74.26, "kd": 75.44, "fitnet": 74.70, "at": 74.90, "nst-poly": 75.18, "kd+nst-poly": 75.66}
    assert {method: round(100 * line["paper_top1"], 6) for method, line in lines.items()} == tops
    rows = {row.method: row for row in results().rows}
    assert all((line["score"], line["top1"]) == (rows[name].map, rows[name].top1) for name, line in lines.items())
    assert [lines["ce"][key] for key in ("paper", "here", "direction")] == [None, None, "the baseline"]
    assert round(lines["nst-poly"]["paper"], 6) == 0.012
    directions = {"nst-poly": "contradicts the paper", "fitnet": "agrees", "at": "can't be told"}
    assert {method: lines[method]["direction"] for method in directions} == directions
    order = paper_order(results(), VOC07)
    assert "kd+nst-poly > nst-poly > fitnet > at > kd" in order
    assert "fitnet > kd+nst-poly > nst-poly > kd > at: the paper's order is not reproduced here." in order


def test_methods_that_the_paper_lacks_or_has_in_table_3_alone():
    line = against_paper(results("method", {"at": "kd+at"}), VOC07)[-3]
    assert line["method"] == "kd+at"
    assert (line["paper_score"], line["paper"], line["direction"]) == (None, None, "no mAP in the paper")
    assert round(line["paper_top1"], 6) == 0.7536
    assert line["here"] == results().row("at").delta_vs_ce
    numbers = {"scratch": ((0.1,), None), "ce": ((0.5,), (0.7,)), "cwd": ((0.6,), (0.7,))}
    assert published(results(numbers=numbers, seeds=1)) == []


def test_students_beside_the_papers_figures():
    found = typed(without_detectors(build_results()))
    assert question(found) == "Which transfer method gives the better student?"
    assert "fitnet: +0.312 top-1 (95 % interval" in conclusion(found)
    assert "mAP" not in conclusion(found) + " ".join(caveats(found))
    (table,) = published(found)
    lines = {line["method"]: line for line in against_paper(found, table)}
    # VID's table, 100 images a class: 58.84 without a teacher, fitnet 68.90
    assert list(lines) == ["ce", "kd", "fitnet", "at"]
    assert (lines["ce"]["paper_score"], lines["fitnet"]["paper_score"]) == pytest.approx((0.5884, 0.689))
    assert lines["fitnet"]["paper"] == pytest.approx(0.1006)
    assert lines["fitnet"]["score"] == found.row("fitnet").top1
    # of 5000 a class, where the paper's fitnet (90.64) is below its baseline (90.72)
    lines = {line["method"]: line for line in against_paper(found, PUBLISHED["vid-cifar10-5000"])}
    directions = {"kd": "agrees", "fitnet": "contradicts the paper", "at": "can't be told"}
    assert {method: lines[method]["direction"] for method in directions} == directions


@pytest.mark.parametrize(
    ("name", "method", "figure"),
    [
        ("nst-cifar10", "kd+nst-poly", 95.79),
        ("nst-cifar100", "nst-gaussian", 76.15),
        ("nst-imagenet", "kd+at", 75.36),
        ("vid-cifar10-100", "vid", 81.59),
        ("vid-workshop-1000", "kd+at", 87.34),
        ("vid-unlabelled-100", "kd+vid", 91.34),
        ("vid-unlabelled-1000", "ce", 85.21),
        ("vid-mlp-1024", "vid", 78.57),
        ("vid-cifar100-16-1", "nst-poly", 64.95),
    ],
)
def test_published_figures_are_those_of_the_tables(name, method, figure):
    assert PUBLISHED[name].figures[method] == figure


def test_what_fpn_brings():
    numbers = {"ce": ((0.5, 0.52), (0.7, 0.7)), "kd": ((0.6, 0.6), (0.7, 0.7)), "no-fpn": ((0.3, 0.36), (0.7, 0.7))}
    found = results(numbers=numbers, seeds=2)
    # differences -.2 and -.16: mean -.18, error .02; with one degree of freedom t(.975) = tan(.475 pi) = 12.7062
    wanted = "has mAP 0.330, −0.180 [−0.434, +0.074] against ce with it."
    assert next(note for note in caveats(found) if note.startswith("FPN itself")).endswith(wanted)
    # it is no transfer method
    assert "no-fpn" not in conclusion(found)
    assert found.leader.method == "kd"
