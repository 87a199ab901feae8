from pathlib import Path

from nst_det.report.schema import read_results
from nst_det.report.summary import against_paper, caveats, conclusion, not_above, paper_order, unequal_weights


def read(tree):
    return read_results(tree, Path("runs"))


def with_verdicts(make_results, **verdicts):
    tree = make_results()
    for row in tree["rows"]:
        row["verdict"] = verdicts.get(row["method"].replace("-", "_").replace("+", "_"), row["verdict"])
    return read(tree)


def test_winners_noise_and_interval(make_results) -> None:
    text = conclusion(read(make_results()))
    assert text == (
        "Over 3 seeds, fitnet, kd+nst-poly, nst-poly and kd beat ce (labels only). The largest gain is that of fitnet: "
        "+0.312 mAP (95 % interval +0.157 to +0.467). For at, the difference lies within the noise."
    )


def test_one_winner(make_results) -> None:
    text = conclusion(with_verdicts(make_results, kd="noise", nst_poly="worse", kd_nst_poly="worse"))
    assert text.startswith("Over 3 seeds, fitnet beats ce (labels only): +0.312 mAP")
    assert "For kd and at, the difference lies within the noise." in text
    assert text.endswith("Worse than ce: kd+nst-poly and nst-poly.")


def test_no_winner_is_said(make_results) -> None:
    words = dict.fromkeys(("kd", "fitnet", "nst_poly", "kd_nst_poly"), "noise")
    text = conclusion(with_verdicts(make_results, **words))
    assert text.startswith("Over 3 seeds, no transfer method can be told to beat ce (labels only).")
    assert "beats" not in text
    assert text.endswith("Every difference lies within the noise.")
    words = dict.fromkeys(("kd", "at", "fitnet", "nst_poly", "kd_nst_poly"), "worse")
    assert conclusion(with_verdicts(make_results, **words)).startswith("Over 3 seeds, no transfer method beats ce")


def test_one_seed_names_no_winner(make_results) -> None:
    text = conclusion(read(make_results(seeds=1)))
    assert "no spread to judge by" in text
    assert "beat" not in text
    assert "fitnet has the highest mAP (0.812, +0.240 against ce)" in text


def test_without_methods_or_baseline(make_results) -> None:
    numbers = {"ce": ((0.5, 0.5, 0.4), (0.1, 0.2, 0.3)), "scratch": ((0.1, 0.1, 0.1), None)}
    assert conclusion(read(make_results(numbers=numbers))).startswith("No transfer method was compared")
    tree = make_results()
    tree["rows"] = [row for row in tree["rows"] if row["method"] != "ce"]
    assert "no row ce to compare with" in conclusion(read(tree))


def test_caveats(make_results) -> None:
    tree = make_results()
    for row, p in zip(tree["rows"], (0.01, None, 0.09, 0.02, 0.5, 0.04, 0.0501)):
        row["p_holm"] = p
    notes = caveats(read(tree))
    assert "kd and kd+nst-poly would no longer count" in notes[0]
    assert any("gives +0.393 mAP against a random one" in note for note in notes)
    assert not any("Two seeds" in note for note in notes)
    assert any("Two seeds" in note for note in caveats(read(make_results(seeds=2))))


def test_rows_that_are_not_above_ce_are_named_with_their_distance(make_results) -> None:
    assert not_above(read(make_results(seeds=1))) == "Not above ce: at (−0.040)."
    numbers = {"ce": ((0.5,), (0.7,)), "kd": ((0.25,), (0.7,)), "at": ((0.5,), (0.7,)), "fitnet": ((0.75,), (0.7,))}

    def results(*methods):
        return read(make_results({name: numbers[name] for name in methods}, seeds=1))

    assert not_above(results(*numbers)) == "Not above ce: kd (−0.250) and at (0.000)."
    assert not_above(results(*numbers)) in caveats(results(*numbers))
    assert not_above(results("ce", "fitnet")) == "Each method's row has a higher mAP than ce."
    assert not_above(results("ce")) is None


def test_unequal_weights_are_said(make_results) -> None:
    def results(weights):
        tree = make_results()
        for row in tree["rows"]:
            row["weights"] = weights.get(row["method"], "")
        return read(tree)

    said = unequal_weights(results({"kd": "tuned: 8 trials", "at": "default weight", "fitnet": "tuned: 8 trials"}))
    assert "(tuned: 8 trials: kd, fitnet; default weight: at)" in said
    assert unequal_weights(results({})) is None
    assert unequal_weights(results({"kd": "tuned: 8 trials", "at": "tuned: 8 trials"})) is None


def test_against_the_paper(make_results) -> None:
    lines = {line.method: line for line in against_paper(with_verdicts(make_results, nst_poly="worse"))}
    assert set(lines) == {"ce", "kd", "fitnet", "at", "nst-poly", "kd+nst-poly"}
    assert round(lines["nst-poly"].paper, 6) == 0.012
    maps = {"ce": 75.6, "kd": 76.0, "fitnet": 76.6, "at": 76.5, "nst-poly": 76.8, "kd+nst-poly": 77.2}
    assert {method: round(100 * line.paper_map, 6) for method, line in lines.items()} == maps
    tops = {"ce": 74.26, "kd": 75.44, "fitnet": 74.70, "at": 74.90, "nst-poly": 75.18, "kd+nst-poly": 75.66}
    assert {method: round(100 * line.paper_top1, 6) for method, line in lines.items()} == tops
    rows = {row["method"]: row for row in make_results()["rows"]}
    assert all((line.map, line.top1) == (rows[name]["map"], rows[name]["top1"]) for name, line in lines.items())
    assert (lines["ce"].paper, lines["ce"].here, lines["ce"].says) == (None, None, "the baseline")
    assert lines["nst-poly"].says == "contradicts the paper"
    assert lines["fitnet"].says == "agrees"
    assert lines["at"].says == "can't be told"
    order = paper_order(read(make_results()))
    assert order is not None
    assert "kd+nst-poly > nst-poly > fitnet > at > kd" in order
    assert "fitnet > kd+nst-poly > nst-poly > kd > at: the paper's order is not reproduced here." in order


def test_a_method_that_only_table_3_has_is_shown_with_its_top1_alone(make_results) -> None:
    tree = make_results()
    tree["rows"][4]["method"] = "kd+at"
    line = next(line for line in against_paper(read(tree)) if line.method == "kd+at")
    assert (line.paper_map, line.paper, line.says) == (None, None, "not in table 4")
    assert round(line.paper_top1, 6) == 0.7536
    assert line.here == tree["rows"][4]["delta_vs_ce"]


def test_a_comparison_without_the_papers_methods_has_no_such_box(make_results) -> None:
    tree = make_results()
    tree["rows"] = [row | {"method": row["method"].replace("kd+nst-poly", "cwd")} for row in tree["rows"][:2]]
    assert against_paper(read(tree)) == []


def test_what_fpn_brings_is_said(make_results) -> None:
    numbers = {"ce": ((0.5, 0.52), (0.7, 0.7)), "kd": ((0.6, 0.6), (0.7, 0.7)), "no-fpn": ((0.3, 0.36), (0.7, 0.7))}
    results = read(make_results(numbers=numbers, seeds=2))
    # differences -.2 and -.16: mean -.18, error .02; with one degree of freedom t(.975) = tan(.475 pi) = 12.7062
    wanted = "has mAP 0.330, −0.180 [−0.434, +0.074] against ce with it."
    assert next(note for note in caveats(results) if note.startswith("FPN itself")).endswith(wanted)
    # it is no transfer method
    assert "no-fpn" not in conclusion(results)
    assert results.leader is not None
    assert results.leader.method == "kd"
