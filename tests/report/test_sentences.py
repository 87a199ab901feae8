"""For random results no sentence of headline, bullets and box is refuted by the table beside it."""

import random
import re

import numpy as np
import pytest
from scipy import stats

from nst_det.report.curves import Curve
from nst_det.report.limits import late_fall, limits
from nst_det.report.summary import caveats, conclusion
from tests.helpers.finished import build_results, typed, without_detectors

# how each sentence of the box begins
BOX = {
    **{"weak": "The highest mAP", "one seed": "One seed", "two seeds": "Two seeds", "pairs": "Intervals compare"},
    **{"teacher": "The teacher's top-1", "upper": "The detector on the teacher's", "none": "No test object"},
    **{"few": "Few test objects", "images": "Top-1 of stage one"},
    **{
        "fall one": "Stage one was",
        "fall two": "Stage two was",
        "rise one": "Stage one: t",
        "rise two": "Stage two: m",
    },
}


# rows whose detector has no backbone of stage one
UNTAUGHT = ("scratch", "imagenet")


def random_results(draw):
    """Content of results.json and curves of both stages; few values, so that there are ties."""
    seeds = draw.randint(1, 5)
    marks = [name for name in (*UNTAUGHT, "teacher") if draw.random() < 0.7]
    methods = [name for name in ("kd", "fitnet", "nst-poly") if draw.random() < 0.8]
    # of more than five students a sentence would name some alone
    rows = ["ce", *marks, *methods[: 4 - len({*UNTAUGHT} & {*marks})]]
    draw.shuffle(rows)
    maps, top1 = draw.choice([(0.05, 0.1, 0.15), (0.1, 0.2, 0.3, 0.35)]), (0.4, 0.5, 0.6)
    numbers = {
        name: (
            tuple(draw.choice(maps) for _ in range(seeds)),
            None if name in UNTAUGHT else (draw.choice(top1),) * seeds,
        )
        for name in rows
    }
    begin = draw.choice(("", "lite0.pth"))
    tree = build_results(numbers=numbers, seeds=seeds, classes=("cup", "hat", "pen"), begin=begin)
    tree["teacher"] = {"top1": draw.choice((0.45, 0.5, None))} if draw.random() < 0.8 else None
    objects = {name: draw.choice((0, 7, 49, 50, 400)) for name in tree["classes"]}
    images = draw.choice((None, 30, 2000))
    for row in tree["rows"]:
        row["objects_per_class"] = objects
        for entry in row["per_seed"].values():
            entry["val_images"] = images
    taught = [name for name in rows if name not in (*UNTAUGHT, "teacher")]
    curves = [
        {"loss": {name: {row: fall(draw) for row in on}}, "accuracy": {key: {row: rise(draw) for row in taught}}}
        for name, key, on in (("loss/ce", "val/top1", taught), ("total_loss", "val/map", rows))
    ]
    return tree, curves


def fall(draw):
    """A loss over 80 steps that is 2, then 1, and in the last ten steps 1, 0.95 or 0.6."""
    end = draw.choice((1.0, 0.95, 0.6))
    return curve([2.0] * 20 + [1.0] * 50 + [end] * 10)


def rise(draw):
    return curve([0.1, *(draw.choice((0.2, 0.21, 0.3)) for _ in range(draw.randint(0, 2)))])


def curve(values):
    values = np.array(values)
    return Curve(np.arange(len(values)), values, values, values)


def assert_named(text, wanted):
    """A list such as ``kd (0.500), at (+0.1) and 2 more`` names some of those wanted, and counts the others."""
    pairs = re.findall(r"(\S+) \(([+−\d.]+)(?: %)?\)", text)
    found = {name: float(number.replace("−", "-")) for name, number in pairs}
    more = re.search(r"and (\d+) more", text)
    assert found.items() <= wanted.items()
    assert len(found) + int(more[1] if more else 0) == len(wanted)


@pytest.mark.parametrize("detects", [True, False])
@pytest.mark.parametrize("number", range(200))
def test_no_sentence_is_refuted_by_the_table(number, detects):
    draw = random.Random(number)
    tree, curves = random_results(draw)
    name = "mAP" if detects else "top-1"
    if not detects:
        tree, curves = without_detectors(tree), [curves[0], {"loss": {}, "accuracy": {}}]
    found = typed(tree)
    assert detects or "mAP" not in " ".join([conclusion(found), *caveats(found), *limits(found, *curves)])
    seeds = len(found.seeds)
    rows = {row.method: row for row in found.rows}
    if detects:
        check_limits(tree, curves, limits(found, *curves))
    methods = {row.method: row for row in found.methods}
    text, ce, scratch = conclusion(found), rows["ce"].score, rows.get("scratch")
    check_published_start(tree, methods, text, detects)
    if not methods:
        assert text == "No transfer method was compared: there is nothing to tell apart yet."
        return
    assert text.startswith("Stage one") == (scratch is not None and round(scratch.score - ce, 3) > 0)
    if "and every transfer method" in text:
        assert all(row.score < scratch.score for row in (rows["ce"], *methods.values()))
    if named := re.search(rf"of the transfer methods (\S+) has the highest {name}", text):
        assert methods[named[1]].score == max(row.score for row in methods.values())
        assert seeds == 1
    if named := re.search(r"Over \d seeds, (?!no )(.+?) beats? ce", text):
        assert all(methods[one].score > ce for one in re.split(", | and ", named[1]))
    if named := re.search(r"Worse than ce: (.+?)\.$", text):
        assert all(methods[one].score < ce for one in re.split(", | and ", named[1]))
    for note in caveats(found):
        if note.startswith("Each method's row"):
            assert all(round(row.score - ce, 3) > 0 for row in methods.values())
        if note.startswith("Not above ce"):
            below = {name for name, row in methods.items() if round(row.score - ce, 3) <= 0}
            assert set(re.findall(r"(\S+) \(", note)) == below
        if note.startswith("Stage one with labels only"):
            assert ("−" in note) == (round(ce - scratch.score, 3) < 0)


def check_published_start(tree, methods, text, detects):
    """The answer about published weights is that of the paired differences, seed by seed."""
    answer = re.search(r"still help from published weights\? (.+)", text)
    rows = {row["method"]: row for row in tree["rows"]}
    begin, alone = tree["student_weights"], rows.get("imagenet")
    assert bool(answer) == (detects and bool(methods) and bool(begin or alone))
    if not answer:
        return
    answer = answer[1]
    if not begin or not alone or len(alone["seeds"]) == 1:
        reason = "random weights" if not begin else "one seed" if alone else "ROWS"
        assert re.match(rf"Not measured: [^.]*{reason}", answer)
        return
    gains = {
        name: [
            own["map"] - other["map"] for own, other in zip(*(rows[n]["per_seed"].values() for n in (name, "imagenet")))
        ]
        for name in (*methods, "ce")
    }
    # of equal differences scipy gives NaN
    sides = {
        name: np.sign(values[0])
        if max(values) - min(values) < 1e-12
        else (stats.ttest_1samp(values, 0).pvalue < 0.05) * np.sign(np.mean(values))
        for name, values in gains.items()
    }
    better, worse = ({name for name in methods if sides[name] == side} for side in (1, -1))
    expected = "Yes" if better else "No, it hurts" if worse == {*methods} else "It can't be told from noise"
    assert answer.startswith(f"{expected}: over {len(alone['seeds'])} seeds")
    if better:
        beat = re.search(r"seeds, (.+?) beats? imagenet", answer)[1]
        assert {*re.split(", | and ", beat)} == better
        assert ("So does ce" in answer) == (sides["ce"] == 1)
    if expected[0] != "N":
        name, gain = re.search(r"The largest (?:gain|difference) is that of (\S+): ([+−]?[\d.]+) mAP", answer).groups()
        largest = max(np.mean(gains[method]) for method in methods)
        assert np.mean(gains[name]) == pytest.approx(largest)
        assert float(gain.replace("−", "-")) == pytest.approx(largest, abs=5.1e-4)
        told = re.search(r"Worse than imagenet: (.+?)\.", answer)
        assert {*re.split(", | and ", told[1] if told else "")} - {""} == worse


def check_limits(tree, curves, lines):
    """Hold each sentence of the box to the tables, and miss none that they call for."""
    begins = {}
    for line in lines:
        key = next(key for key in BOX if re.match(BOX[key], line))
        assert key not in begins
        begins[key] = line
    rows = {row["method"]: row for row in tree["rows"]}
    seeds = len(rows["ce"]["seeds"])
    best = max(row["map"] for name, row in rows.items() if name != "teacher")
    assert ("weak" in begins) == (best < 2 / 11)
    if "weak" in begins:
        value, name = re.match(r"The highest mAP is (\S+) \((\S+)\)\.", begins["weak"]).groups()
        assert float(value) == round(rows[name]["map"], 3) == round(best, 3)
    assert ("one seed" in begins, "two seeds" in begins) == (seeds == 1, seeds == 2)
    told = [row for name, row in rows.items() if row["delta_interval"] and name not in (*UNTAUGHT, "teacher")]
    assert ("pairs" in begins) == (len(told) > 1)
    taught = (tree["teacher"] or {}).get("top1")
    above = {n: row["top1"] for n, row in rows.items() if taught and n != "teacher" and (row["top1"] or 0) > taught}
    assert_named(begins.get("teacher", ""), {name: round(value, 3) for name, value in above.items()})
    assert "teacher" not in begins or f"top-1 is {taught:.3f}" in begins["teacher"]
    upper = rows["teacher"]["map"] if "teacher" in rows else 1
    above = {n: round(row["map"], 3) for n, row in rows.items() if round(row["map"] - upper, 3) > 0}
    assert_named(begins.get("upper", "").partition("below")[2], above)
    objects = rows["ce"]["objects_per_class"]
    assert set(re.findall("cup|hat|pen", begins.get("none", ""))) == {n for n, count in objects.items() if not count}
    few = {name: count for name, count in objects.items() if 0 < count < 50}
    listed = re.findall(r"(cup|hat|pen) (\d+)", begins.get("few", ""))
    assert {name: int(count) for name, count in listed} == few
    if few:
        rarest = re.search(r"missed is (\S+) of the recall of (\w+)", begins["few"])
        assert (few[rarest[2]], float(rarest[1])) == (min(few.values()), round(1 / min(few.values()), 3))
    images = rows["ce"]["per_seed"]["0"]["val_images"]
    # of 30 images: sqrt(.24 / 30) = .089 at .4 and .6, sqrt(.25 / 30) = .091 at .5; of 2000 .011
    assert ("images" in begins) == (images == 30)
    assert "images" not in begins or re.search(
        r"of 30 .* at 0\.[46]00 .* 0\.089 |of 30 .* at 0\.500 .* 0\.091 ", begins["images"]
    )
    for stage, (kinds, key, top) in {
        "one": (curves[0], "loss/ce", "top1"),
        "two": (curves[1], "total_loss", "map"),
    }.items():
        ends = {name: one.mean[-1] for name, one in kinds["loss"][key].items()}
        # .4 of a fall of 1.4; .05 of one of 1.05 is less than a tenth
        assert_named(begins.get(f"fall {stage}", ""), {name: 29 for name, end in ends.items() if end == 0.6})
        last = {name: one.mean[-2:].tolist() for name, one in kinds["accuracy"][f"val/{top}"].items()}
        rises = {
            name: round(two[1] - two[0], 3) for name, two in last.items() if len(two) == 2 and two[1] - two[0] > 0.02
        }
        assert_named(begins.get(f"rise {stage}", ""), rises)


def test_a_box_names_the_first_of_many_and_shared_seeds():
    tree = build_results(classes=[f"c{number}" for number in range(9)])
    for row in tree["rows"]:
        row["objects_per_class"] = {name: 10 + number for number, name in enumerate(tree["classes"])}
    tree["rows"][2]["verdict"] = "single seed"
    # as of a row with a term of stage two
    for seed, entry in tree["rows"][3]["per_seed"].items():
        entry["distill_run"] = tree["rows"][1]["per_seed"][seed]["distill_run"]
    still = curve([2.0] * 20 + [1.0] * 50 + [0.6] * 10)
    curves = {"loss": {"loss/ce": {"ce": still, "fitnet": still, "at": still}}, "accuracy": {}}
    lines = limits(typed(tree), curves, {"loss": {}, "accuracy": {}})
    assert any("steps, for ce (29 %) and at (29 %)." in line for line in lines)
    assert any(": c0 10, c1 11, c2 12, c3 13 and 5 more." in line for line in lines)
    assert "Only one seed is shared with ce by kd: no spread to judge by." in lines


@pytest.mark.parametrize(("noise", "found"), [(0.0, 0.4 / 1.4), (0.6, 0.0)])
def test_a_fall_that_is_noise_is_none(noise, found):
    values = np.array([2.0] * 20 + [1.0] * 50 + [0.6] * 10)
    values[1::2] += noise
    values[::2] -= noise
    assert late_fall(curve(values)) == pytest.approx(found)
    assert late_fall(curve(values[::-1])) == late_fall(curve([1.0, 0.5])) == 0
