import csv
import itertools
import json
import re
import shutil

import pytest

from nst_det.api import SHOWN_LINES, CompareResult
from nst_det.engine.format import print_table
from nst_det.report import write_report
from nst_det.report.page import CHANGE, HEAT, luminance, readable
from nst_det.report.tables import UNTOLD
from tests.helpers.finished import NUMBERS, build_results, build_runs, typed
from tests.helpers.page import Page

HOSTILE = "</td></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;{{ 7 * 7 }}$x_1$"


def write(results, folder, runs):
    write_report(typed(results), folder / "report", runs)
    return Page((folder / "report" / "index.html").read_text())


@pytest.fixture(scope="module")
def page(finished):
    return Page((finished[0] / "report" / "index.html").read_text())


@pytest.fixture(scope="module")
def rows(finished):
    return finished[1]["rows"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page of a comparison whose names are HTML, a template and mathematics."""
    numbers = {"scratch": ((0.1, 0.11), None), "ce": ((0.5, 0.52), (0.7, 0.71)), HOSTILE: ((0.6, 0.63), (0.8, 0.79))}
    folder = tmp_path_factory.mktemp("hostile")
    results = build_results(numbers=numbers, seeds=2, classes=(HOSTILE[:60], "cat"))
    results["name"] = results["engine"] = results["provenance"]["platform"] = HOSTILE
    results["settings"][HOSTILE] = {HOSTILE: [HOSTILE]}
    for number, row in enumerate(results["rows"]):
        row["commands"].append(HOSTILE)
        for seed, entry in row["per_seed"].items():
            entry["run"] = f"detect/{seed}/{number}"
            entry["distill_run"] = entry["distill_run"] and f"distill/{seed}/{number}"
    build_runs(folder, results)
    return write(results, folder, folder)


def test_the_table_shows_the_numbers(page, rows):
    shown = {row[0]: (row, values) for row, values in zip(page.tables["rows"], page.values["rows"])}
    assert list(shown)[1:] == [row["method"] for row in rows]
    for row in rows:
        cells, values = shown[row["method"]]
        assert (cells[1], float(values[1])) == (f"{row['map']:.3f} ± {row['map_std']:.3f}", row["map"])
        assert (cells[5], float(values[5])) == (f"{row['map_area']:.3f}", row["map_area"])
        assert values[6] == ("" if row["top1"] is None else str(row["top1"]))
        assert (cells[7], values[7], cells[8], values[8]) == ("1.93 M", "1934567", "2.5 G", "2500000000")
        assert (cells[9], values[9], cells[10], values[10]) == ("42.1 ms", "0.0421", "47.1 s", "47.123")
        if row["method"] == "ce":
            assert cells[4] == "reference"
            continue
        numbers = (row["delta_vs_ce"], *row["delta_interval"])
        texts = [f"{'+' if x > 0 else '−'}{abs(x):.3f}" for x in numbers]
        assert (cells[2], float(values[2])) == (f"{texts[0]} [{texts[1]}, {texts[2]}]", row["delta_vs_ce"])
        assert cells[4] == {"noise": "within noise"}.get(row["verdict"], row["verdict"])


def test_files_are_shown_beside_pytorch(page, rows):
    assert [name for name in page.tables if name.startswith("deployed")] == ["deployed0"]
    head, *lines = page.tables["deployed0"]
    shown = {(line[0], line[1]): dict(zip(head, line)) for line in lines}
    assert list(shown) == [
        *(("PyTorch fp32", "1"), ("ONNX fp32", "1"), ("ONNX int8", "1"), ("PyTorch fp32", "8"), ("OpenVINO int8", "8"))
    ]
    small = shown["ONNX int8", "1"]
    second = list(rows[-1]["per_class"])[1]
    assert (small["most lost"], small["median ms"], small["images/s"]) == (f"{second} −0.0100", "5.0", "200.0")
    assert (small["time/PyTorch's"], small["size/PyTorch's"], small["MB"]) == ("0.25", "0.25", "2.00")
    labels = [attributes.get("aria-label", "") for attributes in page.all("svg")]
    (label,) = [text for text in labels if text.startswith("Scatter plot of milliseconds")]
    assert f"{rows[-1]['method']} OpenVINO int8 {float(shown['OpenVINO int8', '8']['mAP']):.3f} in 10.0 ms" in label


def test_a_narrow_head_is_broken_between_terms_alone(page):
    head = page.html[page.html.index('<table id="heat"') :].split("</thead>")[0]
    assert '>kd</span><wbr><span class="whole">+nst-poly</span></th>' in head
    assert ".whole { white-space: nowrap; }" in page.html


def test_heat_maps_show_every_class_and_difference(page, rows, finished):
    baseline = next(row for row in rows if row["method"] == "ce")
    others = [row for row in rows if row is not baseline]
    assert page.tables["heat"][0][1:] == [row["method"] for row in rows]
    for at, name in enumerate(finished[1]["classes"], start=1):
        ap = [row["per_class"][name] for row in rows]
        assert page.tables["heat"][at] == [name, *(f"{value:.2f}" for value in ap)]
        numbers = {
            table: [float(value) for value in page.values[table][at][1:]] for table in ("heat", "heat-area", "changes")
        }
        assert numbers["heat"] == ap
        assert numbers["heat-area"] == [row["per_class_area"][name] for row in rows]
        assert numbers["changes"] == [row["per_class"][name] - baseline["per_class"][name] for row in others]


def test_what_the_page_says(page):
    for text in (
        "Which transfer method gives the better detector?",
        "Over 3 seeds, fitnet, kd+nst-poly, nst-poly and kd beat ce (labels only).",
        "11-point as in VOC 2007, area as in VOC 2010 and later",
        "the paper&#39;s order is not reproduced here",
        "teacher shapes-teacher with top-1 0.953",
        "Latency is the median of one image at a time on AMD EPYC, 2 threads, 120 × 160 pixels, measured once",
        "stage one 12.0 s, stage two 35.1 s",
        "with its last checkpoint, and never read to choose",
    ):
        assert text in page.html
    # the paper's row of NST: 76.8 and 75.18 % and the comparison's own
    cells = ["0.768", "0.739", "+0.012", "+0.240", "agrees", "0.752", "0.873"]
    found = re.search(r'<tr><th scope="row">nst-poly</th>((?:<td[^>]*>[^<]*</td>)+)</tr>', page.html)
    assert re.findall(r">([^<]+)</td>", found[1]) == cells


def test_overlap_size_checkpoints_and_speed_as_numbers(page, rows):
    heads = ["method", "COCO AP", "AP75", "small", "medium", "large", *(f"mAP0.{iou}" for iou in range(50, 100, 5))]
    assert page.tables["coco"][0] == heads
    speed = []
    for coco, best, row in zip(page.values["coco"][1:], page.tables["best"][1:], rows, strict=True):
        assert [float(value) for value in coco[1:5]] == [row["coco"][name] for name in ("AP", "AP75", "APs", "APm")]
        assert (coco[5], [float(value) for value in coco[6:]]) == ("", list(row["map_by_iou"].values()))
        seeds = [entry["checkpoints"] for entry in row["per_seed"].values()]
        means = [sum(one[name]["map"] for one in seeds) / 3 for name in ("best", "last")]
        texts = [f"{value:.3f}" for value in (*means, row["map"])]
        assert best == [row["method"], texts[0], "120, 140, 160", texts[1], "+0.010", texts[2]]
        if row["top1"] is not None:
            speed.append([row["method"], "one", "812.2", "12 %", "–"])
        speed.append([row["method"], "two", "34.5", "50 %", "3.25 GiB"])
    assert page.tables["speed"][1:] == speed


def test_errors_confusion_thresholds_and_counts(page, rows, finished):
    methods, classes = [row["method"] for row in rows], finished[1]["classes"]
    assert page.tables["kinds"][0] == [
        *("method", "found", "class", "localization", "both", "duplicate", "background", "missed")
    ]
    assert [line[0] for line in page.tables["kinds"][1:]] == methods
    heads = page.tables["confusion0"][0]
    assert heads == ["true class", *classes, "not found"]
    lines = page.values["confusion0"][1:]
    # the leader's diagonal is what it finds
    found = {line[0]: float(values[1]) for line, values in zip(page.tables["kinds"], page.values["kinds"]) if values[1]}
    assert sum(float(line[at + 1]) for at, line in enumerate(lines[:-1])) == pytest.approx(found["fitnet"])
    there = {line[0]: int(line[2]) for line in page.tables["objects"][1:]}
    sums = {line[0]: sum(map(float, values[1:])) for line, values in zip(page.tables["confusion0"][1:-1], lines)}
    assert sums == pytest.approx(there)
    assert page.tables["confusion1"][0] == heads
    assert page.tables["thresholds"][1:] == [[name, "0.50, 0.50, 0.50", "0.81"] for name in classes]


def test_shares_of_the_terms_sum_to_one(page):
    shares = {}
    for line, values in zip(page.tables["balance"][1:], page.values["balance"][1:]):
        assert 0 < float(values[4]) < 1
        shares[line[0]] = shares.get(line[0], 0) + float(values[6])
    assert shares == pytest.approx(dict.fromkeys(("kd", "fitnet", "at", "nst-poly", "kd+nst-poly"), 1))


def test_one_seed_and_what_is_not_known(tmp_path):
    results = build_results(seeds=1)
    for row in results["rows"]:
        row["cost"] = row["per_seed"]["0"]["checkpoints"] = None
        row |= {key: {} for key in ("coco", "map_by_iou", "objects", "speed_backbone", "speed_detector")}
    build_runs(tmp_path, results)
    page = write(results, tmp_path, tmp_path)
    assert {"coco", "best", "speed"}.isdisjoint(page.tables)
    assert page.tables["rows"][1][8:10] == ["–", "–"]
    assert page.html.count("no spread") >= 2
    assert "±" not in page.html
    assert "one seed (0)" in page.html


@pytest.mark.parametrize("which", ["page", "hostile"])
def test_it_needs_nothing_but_itself(which, request):
    page = request.getfixturevalue(which)
    page.check_self_contained()
    assert len(page.all("script")) == 1


def test_hostile_names_are_escaped(hostile):
    assert hostile.tables["rows"][3][0] == HOSTILE
    assert hostile.tables["heat"][1][0] == HOSTILE[:60]
    assert "alert(1)</script>" not in hostile.html
    assert not hostile.all("img")
    # neither run as a template nor typeset as mathematics
    assert "{{ 7 * 7 }}" in hostile.html
    assert "49$x" not in hostile.html


def test_semantics(page):
    assert page.html.startswith("<!doctype html>")
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("h1", "main", "header", "footer", "nav")] == [1] * 5
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in attributes for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_pictures_have_words_and_data(page, rows):
    drawn = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert all(a.get("role") == "img" and len(a.get("aria-label") or "") > 10 for a in drawn)
    # 6 images x (truth + 3 rows, 4 more); bars, scatter; top-1, top-5; 7 - 1 terms; levels of 2;
    # 4 losses; 6 differences; precision over recall of all classes and of 8; overlap, sizes, F1, files
    assert len(drawn) == 6 * 8 + 2 + 2 + 6 + 2 + 4 + 6 + 9 + 4
    images = [a["href"] for a in page.all("image")]
    assert len(images) == 6
    assert all(len(data) > 1000 and data.startswith("data:image/jpeg;base64,") for data in images)
    labels = " ".join(a["aria-label"] for a in drawn)
    assert [row["method"] for row in rows if f"{row['method']} {row['map']:.3f}" not in labels] == []


def contrast(first, second):
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_texts_and_lines(page):
    assert (luminance("#ffffff"), luminance("#000000")) == (1, 0)
    style = page.html[page.html.index("<style>") : page.html.index("</style>")]
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)[:2]
    )
    assert set(light) == set(dark)
    pairs = [(text, back) for text in ("ink", "muted", "accent") for back in ("page", "surface", "raised")]
    pairs += [("good", "good-back"), ("bad", "bad-back"), ("ink", "even-back")]
    pairs += [(f"m{index}", "surface") for index in range(10)]
    for theme in (light, dark):
        assert [pair for pair in pairs if contrast(*(theme[name] for name in pair)) < 4.5] == []


@pytest.mark.parametrize("scale", [HEAT, CHANGE])
def test_contrast_in_heat_maps(scale):
    assert all(contrast(*readable(step / 100, scale)) >= 4.5 for step in range(101))
    assert (readable(0, scale)[0], readable(1, scale)[0]) == (scale[0], scale[-1])


def test_runs_that_are_gone_cost_no_number(page, finished, tmp_path):
    bare = write(finished[1], tmp_path, tmp_path / "nowhere")
    assert "No training curves" in bare.html
    assert "No sample images" in bare.html
    assert bare.tables["rows"] == page.tables["rows"]


def test_the_command_makes_the_same_bytes_again(cli, finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    files = [copy / "report" / name for name in ("index.html", "results.csv", "table.md", "table.tex")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    assert cli("report", copy) == 0
    assert capsys.readouterr().out.strip() == str(files[0])
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("content", [None, "[]", json.dumps({"name": "", "engine": "", "classes": {}})])
def test_the_command_names_what_is_wrong(cli, tmp_path, capsys, content):
    file = tmp_path / "report" / "results.json"
    if content is not None:
        file.parent.mkdir()
        file.write_text(content)
    assert cli("report", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line


def test_rows_that_begin_from_published_weights_are_compared_with_them_everywhere(tmp_path, capsys):
    tree = build_results({"imagenet": ((0.61, 0.62, 0.63), None), **NUMBERS}, begin="lite0.pth")
    page = write(tree, tmp_path, tmp_path)
    head, *lines = page.tables["rows"]
    shown = {line[0]: dict(zip(head, line)) for line in lines}
    mean = sum(NUMBERS["fitnet"][0]) / 3 - 0.62
    assert shown["fitnet"]["difference to imagenet"].startswith(f"+{mean:.3f} [+")
    verdicts = [shown[name]["verdict to imagenet"] for name in ("fitnet", "kd", "scratch", "imagenet")]
    assert verdicts == ["better", "within noise", "worse", "reference"]
    markdown = (tmp_path / "report" / "table.md").read_text()
    assert f"| +{mean:.3f} [+" in next(line for line in markdown.splitlines() if line.startswith("| fitnet |"))
    with open(tmp_path / "report" / "results.csv") as file:
        found = {line["method"]: line for line in csv.DictReader(file)}
    assert float(found["fitnet"]["delta_vs_imagenet"]) == pytest.approx(mean)
    assert found["kd"]["verdict_vs_imagenet"] == "noise"
    answer = CompareResult(typed(tree), tmp_path)
    print_table(answer)
    sentence = "from published weights? Yes: over 3 seeds, fitnet, kd+nst-poly and nst-poly beat"
    for text in (page.html, markdown, answer.conclusion, " ".join(capsys.readouterr().out.split())):
        assert sentence in text


def test_what_it_cannot_tell_stands_below_the_table_on_a_terminal_too(finished, capsys):
    folder, results, _ = finished
    answer = CompareResult(typed(results), folder)
    assert answer.untold
    listed = (folder / "report" / "table.md").read_text().replace("\\", "")
    assert all(f"- {line}" in listed for line in answer.untold)
    print_table(answer)
    printed = " ".join(capsys.readouterr().out.split())
    shown = answer.untold[:SHOWN_LINES]
    assert printed.index("scratch") < printed.index(UNTOLD)
    assert all(" ".join(line.split()) in printed for line in shown)
    assert (f"{len(answer.untold) - SHOWN_LINES} more" in printed) == (len(answer.untold) > SHOWN_LINES)
