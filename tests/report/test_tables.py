import csv
import io
import json
import re

import pytest

from nst_det.comparison.result import ComparisonResult
from nst_det.errors import UserError
from nst_det.report.tables import csv_table, duration, fraction, latex_escape, latex_table, markdown_table, signed
from tests.helpers.finished import build_results, typed

HOSTILE = "a|b_c*</td><script>alert(1)</script>&\\ $x$"


def lines_of_csv(results):
    return list(csv.DictReader(io.StringIO(csv_table(results))))


def test_csv_holds_every_digit():
    tree = build_results()
    tree["rows"][0]["per_class"]["star"] = None
    for row in tree["rows"]:
        of_terms = {"source": "default", "trials": None}
        row["weights"] = [{"term": "kd", "weight": 1.0, **of_terms}, {"term": "at", "weight": 1e3, **of_terms}]
        row["differs"] = ["A 1 (ce: 2)", "B 3 (ce: 4)"]
        row |= {"p_holm": 0.25, "top1_std": 0.01, "measured": {"cka": 0.5, "knn": 0.75}}
    lines = lines_of_csv(typed(tree))
    assert lines[0]["ap_11point:star"] == ""
    for line, row in zip(lines, tree["rows"], strict=True):
        row |= {"map_11point": row["map"], "latency_seconds": row["cost"]["latency"]["median"], **row["cost"]}
        row["delta_low"], row["delta_high"] = row["delta_interval"] or (None, None)
        for stage in ("backbone", "detector"):
            row |= {f"{name}_{stage}": value for name, value in row[f"speed_{stage}"].items()}
        row |= {f"coco_ap{name}": row["coco"][key] for name, key in (("", "AP"), ("_small", "APs"), ("_large", "APl"))}
        row |= {f"ap_11point:{name}": ap for name, ap in row["per_class"].items()}
        row |= {f"ap_area:{name}": ap for name, ap in row["per_class_area"].items()}
        row |= row["measured"]
        row |= {"seeds": "0 1 2", "weights": "default: kd 1, at 1000", "differs": "A 1 (ce: 2); B 3 (ce: 4)"}
        for column in set(line) - {"coco_ap_medium"}:
            assert line[column] == ("" if row.get(column) is None else str(row[column])), column
        assert float(line["coco_ap_medium"]) == row["coco"]["APm"]


def test_markdown_shows_the_numbers_and_the_sentence():
    tree = build_results()
    text = markdown_table(typed(tree), "the sentence")
    assert text.startswith("the sentence\n")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("|")}
    for row in tree["rows"]:
        line = lines[row["method"]]
        assert f"{row['map']:.3f} ± {row['map_std']:.3f} | {row['map_area']:.3f}" in line
        if row["method"] != "ce":
            low, high = (f"{abs(x):.3f}" for x in row["delta_interval"])
            assert re.search(rf"[+−]{abs(row['delta_vs_ce']):.3f} \| \[[+−]{low}, [+−]{high}\]", line)
    assert "| within noise |" in lines["at"]
    assert "| reference |" in lines["ce"]
    assert len({line.count("|") for line in lines.values()}) == 1


def test_latex_shows_the_numbers():
    tree = build_results()
    text = latex_table(typed(tree), "100 % of it")
    assert r"100 \% of it" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    assert [line.split(" & ")[0] for line in body] == [row["method"] for row in tree["rows"]]
    for line, row in zip(body, tree["rows"]):
        assert rf"{row['map']:.3f} $\pm$ {row['map_std']:.3f}" in line
        assert (r"\textbf{0.811" in line) == (row["method"] == "fitnet")
    # as many cells as columns
    columns = re.search(r"tabular}{(\w+)}", text)
    assert {line.count(" & ") + 1 for line in body} == {len(columns[1])}


def test_hostile_names_stay_text():
    numbers = {HOSTILE: ((0.5, 0.6, 0.7), (0.5, 0.6, 0.7)), "ce": ((0.5, 0.5, 0.4), (0.1, 0.2, 0.3))}
    results = typed(build_results(numbers=numbers))
    markdown = markdown_table(results, HOSTILE)
    assert "<script" not in markdown
    assert r"a\|b\_c\*" in markdown
    assert lines_of_csv(results)[0]["method"] == HOSTILE
    assert latex_escape(HOSTILE) == (
        r"a\textbar{}b\_c*\textless{}/td\textgreater{}\textless{}script\textgreater{}alert(1)"
        r"\textless{}/script\textgreater{}\&\textbackslash{} \$x\$"
    )


def test_one_seed_has_no_spread():
    tree = build_results(seeds=1)
    text = markdown_table(typed(tree), "")
    assert "±" not in text
    assert f"| {tree['rows'][3]['map']:.3f} |" in text
    assert "can't be told from noise" in text
    line = lines_of_csv(typed(tree))[3]
    assert (line["map_std"], line["delta_low"], line["verdict"]) == ("", "", "single seed")


def test_what_judges_stage_one_without_labels_is_explained():
    tree = build_results()
    assert "without labels" not in markdown_table(typed(tree), "")
    tree["rows"][3]["measured"] = {"cka": 0.5}
    text = markdown_table(typed(tree), "")
    assert "| CKA |" in text
    assert "Stage one learned without labels: CKA is the linear centered kernel alignment" in text


def test_numbers_as_text():
    assert [signed(x) for x in (0.1234, -0.1236, 0.0, -0.0001, None)] == ["+0.123", "−0.124", "0.000", "0.000", "–"]
    assert fraction(None) == "–"
    texts = ["0.0 s", "120.0 s", "10 min", "2 h 1 min"]
    assert [duration(x) for x in (0.04, 119.96, 600, 3600 * 2 + 60)] == texts


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("rows", lambda tree: tree.pop("rows")),
        ("rows", lambda tree: tree.update(rows=[])),
        ("rows.2.map", lambda tree: tree["rows"][2].pop("map")),
        ("rows.1.map", lambda tree: tree["rows"][1].update(map=float("nan"))),
        ("rows.1.top1", lambda tree: tree["rows"][1].update(top1="high")),
        ("rows.1.params", lambda tree: tree["rows"][1].update(params=True)),
        ("rows.3.verdict", lambda tree: tree["rows"][3].update(verdict="best ever")),
        ("rows.3.delta_interval", lambda tree: tree["rows"][3].update(delta_interval=[0.1])),
        ("rows.3.per_seed.1.map", lambda tree: tree["rows"][3]["per_seed"]["1"].pop("map")),
        ("rows.0.cost.latency.p10", lambda tree: tree["rows"][0]["cost"]["latency"].pop("p10")),
    ],
)
def test_a_damaged_field_is_named(tmp_path, key, change):
    tree = build_results()
    change(tree)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=rf"results\.json: {re.escape(key)} "):
        ComparisonResult.load(path)
