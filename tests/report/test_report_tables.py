import csv
import io
import re
from pathlib import Path

import pytest

from nst_det.errors import UserError
from nst_det.report.schema import Results, read_results
from nst_det.report.tables import csv_table, fraction, latex_escape, latex_table, markdown_table, seconds_text, signed

HOSTILE = "a|b_c*</td><script>alert(1)</script>&\\ $x$"


def read(make_results, **changes) -> tuple[Results, dict]:
    tree = make_results(**changes)
    return read_results(tree, Path("runs")), tree


def test_csv_holds_every_digit(make_results) -> None:
    results, tree = read(make_results)
    lines = list(csv.DictReader(io.StringIO(csv_table(results))))
    assert [line["method"] for line in lines] == [row["method"] for row in tree["rows"]]
    for line, row in zip(lines, tree["rows"]):
        for column, key in [("map_11point", "map"), ("map_std", "map_std"), ("map_area", "map_area")]:
            assert float(line[column]) == row[key]
        assert float(line["delta_vs_ce"]) == row["delta_vs_ce"]
        assert [line["delta_low"], line["delta_high"]] == [repr(float(x)) for x in row["delta_interval"] or ()] or (
            row["method"] == "ce" and line["delta_low"] == ""
        )
        assert line["verdict"] == row["verdict"]
        assert line["top1"] == ("" if row["top1"] is None else repr(row["top1"]))
        assert (int(line["params"]), float(line["seconds"]), line["seeds"]) == (1934567, 47.123, "0 1 2")
        for stage in ("backbone", "detector"):
            for name in ("images_per_second", "data_wait", "gpu_memory_gib"):
                value = row[f"speed_{stage}"].get(name)
                assert line[f"{name}_{stage}"] == ("" if value is None else repr(value))
        for name in tree["classes"]:
            assert float(line[f"ap_11point:{name}"]) == row["per_class"][name]
            assert float(line[f"ap_area:{name}"]) == row["per_class_area"][name]


def test_markdown_shows_the_numbers_and_the_sentence(make_results) -> None:
    results, tree = read(make_results)
    text = markdown_table(results, "the sentence")
    assert text.startswith("the sentence\n")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("|")}
    for row in tree["rows"]:
        line = lines[row["method"]]
        assert f"{row['map']:.3f} ± {row['map_std']:.3f}" in line
        assert f"{row['map_area']:.3f}" in line
        if row["method"] != "ce":
            low, high = (f"{abs(x):.3f}" for x in row["delta_interval"])
            assert re.search(rf"[+−]{abs(row['delta_vs_ce']):.3f} \| \[[+−]{low}, [+−]{high}\]", line)
    assert "| within noise |" in lines["at"]
    assert "| reference |" in lines["ce"]
    assert len({line.count("|") for line in lines.values()}) == 1


def test_latex_shows_the_numbers(make_results) -> None:
    results, tree = read(make_results)
    text = latex_table(results, "100 % of it")
    assert r"100 \% of it" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    assert [line.split(" & ")[0] for line in body.splitlines()[1:] if line] == [row["method"] for row in tree["rows"]]
    for row in tree["rows"]:
        assert rf"{row['map']:.3f} $\pm$ {row['map_std']:.3f}" in body
    assert body.count(r"\textbf") == 1
    assert r"fitnet & \textbf{0.811" in body
    # as many cells as columns
    columns = re.search(r"tabular}{(\w+)}", text)
    assert columns
    assert {line.count(" & ") + 1 for line in body.splitlines()[1:] if line} == {len(columns[1])}


def test_hostile_names_stay_text(make_results) -> None:
    numbers = {HOSTILE: ((0.5, 0.6, 0.7), (0.5, 0.6, 0.7)), "ce": ((0.5, 0.5, 0.4), (0.1, 0.2, 0.3))}
    results, _ = read(make_results, numbers=numbers)
    markdown = markdown_table(results, HOSTILE)
    assert "<script" not in markdown
    assert r"a\|b\_c\*" in markdown
    assert next(iter(csv.DictReader(io.StringIO(csv_table(results)))))["method"] == HOSTILE
    assert latex_escape(HOSTILE) == (
        r"a\textbar{}b\_c*\textless{}/td\textgreater{}\textless{}script\textgreater{}alert(1)"
        r"\textless{}/script\textgreater{}\&\textbackslash{} \$x\$"
    )


def test_one_seed_has_no_spread(make_results) -> None:
    results, tree = read(make_results, seeds=1)
    text = markdown_table(results, "")
    assert "±" not in text
    assert f"| {tree['rows'][3]['map']:.3f} |" in text
    assert "can't be told from noise" in text
    line = list(csv.DictReader(io.StringIO(csv_table(results))))[3]
    assert (line["map_std"], line["delta_low"], line["verdict"]) == ("", "", "single seed")


def test_numbers_as_text() -> None:
    assert [signed(x) for x in (0.1234, -0.1236, 0.0, -0.0001, None)] == ["+0.123", "−0.124", "0.000", "0.000", "–"]
    assert fraction(float("nan")) == "–"
    assert [seconds_text(x) for x in (0.04, 119.96, 600, 3600 * 2 + 60, None)] == [
        "0.0 s",
        "120.0 s",
        "10 min",
        "2 h 1 min",
        "–",
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tree: tree.pop("rows"), "rows is missing"),
        (lambda tree: tree.update(rows=[]), "rows must be a list"),
        (lambda tree: tree["rows"][2].pop("map"), r"rows\[2\].map is missing"),
        (lambda tree: tree["rows"][1].update(map=float("nan")), r"rows\[1\].map must be a finite number"),
        (lambda tree: tree["rows"][1].update(top1="high"), r"rows\[1\].top1 must be a finite number"),
        (lambda tree: tree["rows"][3].update(verdict="best ever"), r"rows\[3\].verdict: unknown word 'best ever'"),
        (lambda tree: tree["rows"][3].update(delta_interval=[0.1]), r"delta_interval must be \[low, high\]"),
        (lambda tree: tree["rows"][3].update(method="kd"), "a method twice"),
        (lambda tree: tree["rows"][3]["per_seed"]["1"].pop("map"), r"rows\[3\].per_seed\[1\].map is missing"),
    ],
)
def test_a_damaged_field_is_named(make_results, change, says) -> None:
    tree = make_results()
    change(tree)
    with pytest.raises(UserError, match=f"file.json.*{says}"):
        read_results(tree, Path("runs"), "file.json")


def test_class_without_objects_has_no_ap(make_results) -> None:
    tree = make_results()
    tree["rows"][0]["per_class"]["star"] = None
    results = read_results(tree, Path("runs"))
    assert next(iter(csv.DictReader(io.StringIO(csv_table(results)))))["ap_11point:star"] == ""
