import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nst_det.cli import main
from nst_det.report import write_report
from nst_det.report.page import CHANGE, HEAT, color_scale, luminance

HOSTILE = "</td></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;{{ 7 * 7 }}$x_1$"
VOID = {"meta", "link", "br", "img", "input", "wbr", "hr"}


class Page(HTMLParser):
    """Elements with attributes, the text of each table's rows, and whether tags are balanced."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.values: dict[str, list[list[str | None]]] = {}
        self._table = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = attributes.get("id", "")
            self.tables[self._table], self.values[self._table] = [], []
        if tag == "tr":
            self.tables[self._table].append([])
            self.values[self._table].append([])
        if tag in ("td", "th"):
            self.tables[self._table][-1].append("")
            self.values[self._table][-1].append(attributes.get("data-value"))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[self._table][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html(comparison) -> str:
    return (comparison[0] / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, make_results, as_results, write_runs) -> Path:
    numbers = {
        "scratch": ((0.1, 0.11), None),
        "ce": ((0.5, 0.52), (0.7, 0.71)),
        HOSTILE: ((0.6, 0.63), (0.8, 0.79)),
    }
    folder = tmp_path_factory.mktemp("hostile")
    results = make_results(numbers=numbers, seeds=2, classes=(HOSTILE[:60], "cat"))
    results["name"] = results["engine"] = HOSTILE
    results["provenance"]["platform"] = HOSTILE
    results["settings"][HOSTILE] = {HOSTILE: [HOSTILE]}
    for row in results["rows"]:
        row["commands"].append(HOSTILE)
        for seed, entry in row["per_seed"].items():
            entry["run"] = f"detect/{seed}/{'scratch' if row['method'] == 'scratch' else len(row['method'])}"
            entry["distill_run"] = entry["distill_run"] and f"distill/{seed}/{len(row['method'])}"
    write_runs(folder, results)
    write_report(as_results(results), folder / "report", folder)
    return folder / "report" / "index.html"


def test_the_table_shows_the_numbers(page, comparison):
    shown = {row[0]: (row, values) for row, values in zip(page.tables["rows"], page.values["rows"])}
    assert list(shown)[1:] == [row["method"] for row in comparison[1]["rows"]]
    for row in comparison[1]["rows"]:
        cells, values = shown[row["method"]]
        assert cells[1] == f"{row['map']:.3f} ± {row['map_std']:.3f}"
        assert float(values[1]) == row["map"]
        assert float(values[5]) == row["map_area"]
        assert cells[5] == f"{row['map_area']:.3f}"
        assert values[6] == ("" if row["top1"] is None else str(row["top1"]))
        assert (cells[7], values[7], cells[8], values[8]) == ("1.93 M", "1934567", "2.5 G", "2500000000")
        assert (cells[9], values[9], cells[10], values[10]) == ("42.1 ms", "0.0421", "47.1 s", "47.123")
        if row["method"] == "ce":
            assert cells[4] == "reference"
            continue
        assert float(values[2]) == row["delta_vs_ce"]
        low, high = row["delta_interval"]
        signs = ["+" if x > 0 else "−" for x in (row["delta_vs_ce"], low, high)]
        texts = [f"{sign}{abs(x):.3f}" for sign, x in zip(signs, (row["delta_vs_ce"], low, high))]
        assert cells[2] == f"{texts[0]} [{texts[1]}, {texts[2]}]"
        assert cells[4] == {"noise": "within noise"}.get(row["verdict"], row["verdict"])


def test_a_narrow_head_is_broken_between_terms_alone(html):
    head = html[html.index('<table id="heat"') :].split("</thead>")[0]
    cell = next(cell for cell in head.split("<th ") if "nst-poly" in cell and "kd" in cell)
    assert '>kd</span><wbr><span class="whole">+nst-poly</span></th>' in cell
    assert ".whole { white-space: nowrap; }" in html


def test_heat_maps_show_every_class_and_difference(page, comparison):
    rows = comparison[1]["rows"]
    baseline = next(row for row in rows if row["method"] == "ce")
    others = [row for row in rows if row is not baseline]
    assert page.tables["heat"][0][1:] == [row["method"] for row in rows]
    for at, name in enumerate(comparison[1]["classes"], start=1):
        assert page.tables["heat"][at][0] == name
        assert [float(value) for value in page.values["heat"][at][1:]] == [row["per_class"][name] for row in rows]
        assert page.tables["heat"][at][1:] == [f"{row['per_class'][name]:.2f}" for row in rows]
        area = [row["per_class_area"][name] for row in rows]
        assert [float(value) for value in page.values["heat-area"][at][1:]] == area
        less = [row["per_class"][name] - baseline["per_class"][name] for row in others]
        assert [float(value) for value in page.values["changes"][at][1:]] == less


def test_the_page_says_the_result_and_names_both_aps(html):
    assert "Which transfer method gives the better detector?" in html
    assert "Over 3 seeds, fitnet, kd+nst-poly, nst-poly and kd beat ce (labels only)." in html
    assert "11-point as in VOC 2007, area as in VOC 2010 and later" in html
    assert "the paper&#39;s order is not reproduced here" in html
    # the paper's row of NST: 76.8 and 75.18 % beside the comparison's own
    cells = ("0.768", "0.739", "+0.012", "+0.240", "agrees", "0.752", "0.873")
    found = re.search(r'<tr><th scope="row">nst-poly</th>((?:<td[^>]*>[^<]*</td>)+)</tr>', html)
    assert found is not None
    assert tuple(re.findall(r">([^<]+)</td>", found[1])) == cells


def test_where_latency_was_measured_is_said(html):
    assert "teacher shapes-teacher with top-1 0.953" in html
    assert "Latency is the median of one image at a time on AMD EPYC, 2 threads, 120 × 160 pixels." in html
    assert "stage one 12.0 s, stage two 35.1 s" in html


def test_overlap_and_size_as_numbers(page, comparison):
    rows = comparison[1]["rows"]
    assert page.tables["coco"][0][:6] == ["method", "COCO AP", "AP75", "small", "medium", "large"]
    assert page.tables["coco"][0][6:] == [f"mAP0.{digits}" for digits in range(50, 100, 5)]
    for line, row in zip(page.values["coco"][1:], rows):
        assert [float(value) for value in line[1:5]] == [row["coco"][name] for name in ("AP", "AP75", "APs", "APm")]
        assert line[5] == ""
        assert [float(value) for value in line[6:]] == list(row["map_by_iou"].values())


def test_best_and_last_checkpoint(page, html, comparison):
    for line, row in zip(page.tables["best"][1:], comparison[1]["rows"]):
        seeds = [entry["checkpoints"] for entry in row["per_seed"].values()]
        best, last = (sum(one[name]["map"] for one in seeds) / 3 for name in ("best", "last"))
        assert line == [
            row["method"], f"{best:.3f}", "120, 140, 160", f"{last:.3f}", "+0.010", f"{row['map']:.3f}",
        ]  # fmt: skip
    assert "with its last checkpoint, and never read to choose" in html


def test_speed_of_the_training(page, comparison):
    expected = []
    for row in comparison[1]["rows"]:
        if row["top1"] is not None:
            expected.append([row["method"], "one", "812.2", "12 %", "–"])
        expected.append([row["method"], "two", "34.5", "50 %", "3.25 GiB"])
    assert page.tables["speed"][1:] == expected


def test_balance_of_the_terms(page):
    shares: dict[str, float] = {}
    for line in page.values["balance"][1:]:
        assert 0 < float(line[4] or 0) < 1
    for line, values in zip(page.tables["balance"][1:], page.values["balance"][1:]):
        shares[line[0]] = shares.get(line[0], 0) + float(values[6] or 0)
    assert set(shares) == {"kd", "fitnet", "at", "nst-poly", "kd+nst-poly"}
    assert list(shares.values()) == pytest.approx([1] * 5)


def test_one_seed_and_what_is_not_known(tmp_path, make_results, as_results, write_runs):
    results = make_results(seeds=1)
    for row in results["rows"]:
        row["cost"] = row["per_seed"]["0"]["checkpoints"] = None
        row |= {key: {} for key in ("coco", "map_by_iou", "objects", "speed_backbone", "speed_detector")}
    write_runs(tmp_path, results)
    write_report(as_results(results), tmp_path / "report", tmp_path)
    html = (tmp_path / "report" / "index.html").read_text()
    page = Page(html)
    assert {"coco", "best", "speed"}.isdisjoint(page.tables)
    assert page.tables["rows"][1][8:10] == ["–", "–"]
    assert html.count("no spread") >= 2
    assert "±" not in html
    assert "one seed (0)" in html


@pytest.mark.parametrize("which", ["html", "hostile"])
def test_nothing_is_asked_of_the_network(which, request):
    given = request.getfixturevalue(which)
    html = given.read_text(encoding="utf-8") if isinstance(given, Path) else given
    page = Page(html)
    assert not page.open, "every element is closed"
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "").replace("url(#", "")
    assert not re.search(r"@import|url\((?!#)", html)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert len(page.all("script")) == 1


def test_hostile_names_are_escaped(hostile):
    html = hostile.read_text(encoding="utf-8")
    page = Page(html)
    assert page.tables["rows"][3][0] == HOSTILE
    assert page.tables["heat"][1][0] == HOSTILE[:60]
    assert "alert(1)</script>" not in html
    assert "<img src=x" not in html
    assert not page.all("img")
    # neither run as a template nor typeset as mathematics
    assert "{{ 7 * 7 }}" in html
    assert "49$x" not in html


def test_semantics(page, html):
    assert html.startswith("<!doctype html>")
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("h1", "main", "header", "footer", "nav")] == [1] * 5
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        target = attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in ids
        assert attributes.get("aria-labelledby", ids[0]) in ids
    assert all("scope" in attributes for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_pictures_have_words_and_data(page, comparison):
    for attributes in page.all("img"):
        assert attributes.get("alt")
        assert len(attributes["src"] or "") > 100
    drawn = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert all(a.get("role") == "img" and len(a.get("aria-label") or "") > 10 for a in drawn)
    # 6 images x (truth + 3 rows, 4 more); bars, scatter; top-1, top-5; 7 - 1 terms; levels of 2;
    # 4 losses; 6 differences; precision over recall of all classes and of 8; overlap, sizes
    assert len(drawn) == 6 * 8 + 2 + 2 + 6 + 2 + 4 + 6 + 9 + 2
    assert all(len(a["href"]) > 1000 and a["href"].startswith("data:image/jpeg;base64,") for a in page.all("image"))
    assert len(page.all("image")) == 6
    labels = " ".join(a["aria-label"] for a in drawn)
    for row in comparison[1]["rows"]:
        assert f"{row['method']} {row['map']:.3f}" in labels


def test_equal_input_gives_equal_bytes(comparison, as_results, tmp_path):
    folder, results = comparison
    write_report(as_results(results), tmp_path, folder)
    for name in ("index.html", "results.csv", "table.md", "table.tex"):
        assert (tmp_path / name).read_bytes() == (folder / "report" / name).read_bytes()


def contrast(first, second) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_texts_and_lines(html):
    style = html[html.index("<style>") : html.index("</style>")]
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)[:2]
    )
    assert set(light) == set(dark)
    for theme in (light, dark):
        color = {name: f"#{value[1:] * (2 if len(value) == 4 else 1)}" for name, value in theme.items()}
        for back in ("page", "surface", "raised"):
            for text in ("ink", "muted", "accent"):
                assert contrast(color[text], color[back]) >= 4.5, (text, back)
        assert contrast(color["good"], color["good-back"]) >= 4.5
        assert contrast(color["bad"], color["bad-back"]) >= 4.5
        assert contrast(color["ink"], color["even-back"]) >= 4.5
        for index in range(10):
            assert contrast(color[f"m{index}"], color["surface"]) >= 4.5, index


@pytest.mark.parametrize("scale", [HEAT, CHANGE])
def test_contrast_in_heat_maps(scale):
    color = color_scale(scale)
    assert all(contrast(*color(step / 100)) >= 4.5 for step in range(101))
    assert (color(0)[0], color(1)[0]) == (scale[0], scale[-1])


def test_runs_that_are_gone_cost_no_number(comparison, as_results, tmp_path):
    folder, results = comparison
    write_report(as_results(results), tmp_path, tmp_path / "nowhere")
    html = (tmp_path / "index.html").read_text()
    assert "No training curves" in html
    assert "No sample images" in html
    assert Page(html).tables["rows"] == Page((folder / "report" / "index.html").read_text()).tables["rows"]


def test_the_command_makes_it_again(comparison, tmp_path, capsys):
    folder, _ = comparison
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = (copy / "report" / "index.html").read_bytes()
    (copy / "report" / "index.html").unlink()
    with pytest.raises(SystemExit) as done:
        main(["report", str(copy)])
    assert done.value.code == 0
    assert capsys.readouterr().out.strip() == str(copy / "report" / "index.html")
    assert (copy / "report" / "index.html").read_bytes() == before


@pytest.mark.parametrize("content", [None, "[]", '{"name": "", "engine": "", "classes": {}}'])
def test_the_command_names_what_is_wrong(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "results.json").write_text(content)
    with pytest.raises(SystemExit) as done:
        main(["report", str(tmp_path)])
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "report" / "results.json") in error
    assert error.count("\n") == 1


CHECK = """
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const head = document.querySelector('#rows thead th:nth-child(2) button');
head.click();
const best = document.querySelector('#rows tbody tr th').textContent;
head.click();
const worst = document.querySelector('#rows tbody tr th').textContent;
const box = document.querySelector('.filter');
box.value = 'NST'; box.dispatchEvent(new Event('input'));
const left = [...document.querySelectorAll('#rows tbody tr')].filter((row) => !row.hidden).length;
const asked = performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:')).map((e) => e.name);
tell(JSON.stringify({width: innerWidth, wide, best, worst, left, asked}));
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 420])
def test_a_browser_shows_it(comparison, in_browser, tmp_path, width):
    html = (comparison[0] / "report" / "index.html").read_text()
    said = json.loads(in_browser(html, CHECK, width, tmp_path))
    assert said == {"width": width, "wide": 0, "best": "fitnet", "worst": "scratch", "left": 2, "asked": []}
