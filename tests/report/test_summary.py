import pytest

from nst_det.report.summary import against_paper, caveats, conclusion, not_above, paper_order, unequal_weights


@pytest.fixture
def results(make_results, as_results):
    """Results of changed numbers; ``by_method`` changes a field of some rows."""

    def make(field="", by_method=(), **changes):
        tree = make_results(**changes)
        for row in tree["rows"]:
            if row["method"] in by_method:
                row[field] = by_method[row["method"]]
        return as_results(tree)

    return make


def test_winners_noise_and_interval(results):
    text = conclusion(results())
    assert text == (
        "Over 3 seeds, fitnet, kd+nst-poly, nst-poly and kd beat ce (labels only). The largest gain is that of fitnet: "
        "+0.312 mAP (95 % interval +0.157 to +0.467). For at, the difference lies within the noise."
    )


def test_one_winner(results):
    text = conclusion(results("verdict", {"kd": "noise", "nst-poly": "worse", "kd+nst-poly": "worse"}))
    assert text.startswith("Over 3 seeds, fitnet beats ce (labels only): +0.312 mAP")
    assert "For kd and at, the difference lies within the noise." in text
    assert text.endswith("Worse than ce: kd+nst-poly and nst-poly.")


def test_no_winner_is_said(results):
    words = dict.fromkeys(("kd", "fitnet", "nst-poly", "kd+nst-poly"), "noise")
    text = conclusion(results("verdict", words))
    assert text.startswith("Over 3 seeds, no transfer method can be told to beat ce (labels only).")
    assert "beats" not in text
    assert text.endswith("Every difference lies within the noise.")
    words = dict.fromkeys(("kd", "at", "fitnet", "nst-poly", "kd+nst-poly"), "worse")
    assert conclusion(results("verdict", words)).startswith("Over 3 seeds, no transfer method beats ce")


def test_one_seed_names_no_winner(results):
    text = conclusion(results(seeds=1))
    assert "no spread to judge by" in text
    assert "beat" not in text
    assert "fitnet has the highest mAP (0.812, +0.240 against ce)" in text


def test_without_methods(results):
    numbers = {"ce": ((0.5, 0.5, 0.4), (0.1, 0.2, 0.3)), "scratch": ((0.1, 0.1, 0.1), None)}
    assert conclusion(results(numbers=numbers)).startswith("No transfer method was compared")


def test_caveats(results):
    p_holm = {"scratch": 0.01, "kd": 0.09, "fitnet": 0.02, "at": 0.5, "nst-poly": 0.04, "kd+nst-poly": 0.0501}
    notes = caveats(results("p_holm", p_holm))
    assert "kd and kd+nst-poly would no longer count" in notes[0]
    assert any("gives +0.393 mAP against a random one" in note for note in notes)
    assert not any("Two seeds" in note for note in notes)
    assert any("Two seeds" in note for note in caveats(results(seeds=2)))


def test_rows_that_are_not_above_ce_are_named_with_their_distance(results):
    assert not_above(results(seeds=1)) == "Not above ce: at (−0.040)."
    numbers = {"ce": ((0.5,), (0.7,)), "kd": ((0.25,), (0.7,)), "at": ((0.5,), (0.7,)), "fitnet": ((0.75,), (0.7,))}

    def some(*methods):
        return results(numbers={name: numbers[name] for name in methods}, seeds=1)

    assert not_above(some(*numbers)) == "Not above ce: kd (−0.250) and at (0.000)."
    assert not_above(some(*numbers)) in caveats(some(*numbers))
    assert not_above(some("ce", "fitnet")) == "Each method's row has a higher mAP than ce."
    assert not_above(some("ce")) is None


def test_unequal_weights_are_said(results):
    tuned = "tuned: 8 trials"
    text = unequal_weights(results("weights", {"kd": tuned, "at": "default weight", "fitnet": tuned}))
    assert "(tuned: 8 trials: kd, fitnet; default weight: at)" in text
    assert unequal_weights(results()) is None
    assert unequal_weights(results("weights", {"kd": tuned, "at": tuned})) is None


def test_against_the_paper(results):
    lines = {line.method: line for line in against_paper(results("verdict", {"nst-poly": "worse"}))}
    assert set(lines) == {"ce", "kd", "fitnet", "at", "nst-poly", "kd+nst-poly"}
    assert round(lines["nst-poly"].paper, 6) == 0.012
    maps = {"ce": 75.6, "kd": 76.0, "fitnet": 76.6, "at": 76.5, "nst-poly": 76.8, "kd+nst-poly": 77.2}
    assert {method: round(100 * line.paper_map, 6) for method, line in lines.items()} == maps
    tops = {"ce": 74.26, "kd": 75.44, "fitnet": 74.70, "at": 74.90, "nst-poly": 75.18, "kd+nst-poly": 75.66}
    assert {method: round(100 * line.paper_top1, 6) for method, line in lines.items()} == tops
    rows = {row.method: row for row in results().rows}
    assert all((line.map, line.top1) == (rows[name].map, rows[name].top1) for name, line in lines.items())
    assert (lines["ce"].paper, lines["ce"].here, lines["ce"].direction) == (None, None, "the baseline")
    assert lines["nst-poly"].direction == "contradicts the paper"
    assert lines["fitnet"].direction == "agrees"
    assert lines["at"].direction == "can't be told"
    order = paper_order(results())
    assert order is not None
    assert "kd+nst-poly > nst-poly > fitnet > at > kd" in order
    assert "fitnet > kd+nst-poly > nst-poly > kd > at: the paper's order is not reproduced here." in order


def test_a_method_that_only_table_3_has_is_shown_with_its_top1_alone(results):
    line = next(line for line in against_paper(results("method", {"at": "kd+at"})) if line.method == "kd+at")
    assert (line.paper_map, line.paper, line.direction) == (None, None, "not in table 4")
    assert round(line.paper_top1, 6) == 0.7536
    assert line.here == results().row("at").delta_vs_ce


def test_a_comparison_without_the_papers_methods_has_no_such_box(results):
    numbers = {"scratch": ((0.1,), None), "ce": ((0.5,), (0.7,)), "cwd": ((0.6,), (0.7,))}
    assert against_paper(results(numbers=numbers, seeds=1)) == []


def test_what_fpn_brings_is_said(results):
    numbers = {"ce": ((0.5, 0.52), (0.7, 0.7)), "kd": ((0.6, 0.6), (0.7, 0.7)), "no-fpn": ((0.3, 0.36), (0.7, 0.7))}
    found = results(numbers=numbers, seeds=2)
    # differences -.2 and -.16: mean -.18, error .02; with one degree of freedom t(.975) = tan(.475 pi) = 12.7062
    wanted = "has mAP 0.330, −0.180 [−0.434, +0.074] against ce with it."
    assert next(note for note in caveats(found) if note.startswith("FPN itself")).endswith(wanted)
    # it is no transfer method
    assert "no-fpn" not in conclusion(found)
    assert found.leader.method == "kd"
