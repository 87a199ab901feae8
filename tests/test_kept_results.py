"""What README and documentation say of a kept comparison is what its file says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.finished import NUMBERS, build_results

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md")
sys.path.insert(0, str(ROOT / "benchmarks"))

from keep_results import markdown, tables_in  # noqa: E402

KEPT = {
    path.name: kept
    for path in (ROOT / "benchmarks" / "results").glob("*.json")
    if "rows" in (kept := json.loads(path.read_text())) and "conclusion" in kept
}


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_files(page):
    shown = tables_in((ROOT / page).read_text())
    assert KEPT
    assert shown == {name: markdown(KEPT[name]) for name in shown}
    if page == "docs/results.md":
        assert {*shown} == {*KEPT}


def test_a_comparison_is_kept(tmp_path):
    numbers = {"imagenet": ((0.61, 0.62, 0.63), None), **NUMBERS, "teacher": ((0.81, 0.82, 0.83), (0.9,) * 3)}
    tree = build_results(numbers, begin="lite0.pth")
    tree["provenance"] |= {"cpu_count": 2, "command": "nst-det compare", "commit": "0" * 40, "python": "3.11"}
    tree["provenance"]["cuda"] = "NVIDIA H200"
    # the row teacher starts from the one backbone of all seeds
    tree["teacher"]["seconds"] = 20.0
    for seed in tree["rows"][-1]["per_seed"].values():
        seed |= {"distill_run": "teacher/teacher", "seconds_backbone": 20.0}
    (tmp_path / "run" / "report").mkdir(parents=True)
    (tmp_path / "run" / "report" / "results.json").write_text(json.dumps(tree))
    command = [sys.executable, ROOT / "benchmarks" / "keep_results.py", tmp_path / "run", tmp_path / "shapes.json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kept = json.loads((tmp_path / "shapes.json").read_text())
    (lines,) = tables_in(printed).values()
    assert lines == markdown(kept)
    rows = {row["method"]: row for row in kept["rows"]}
    assert {name: tuple(row["per_seed"].values()) for name, row in rows.items()} == {
        n: maps for n, (maps, _) in numbers.items()
    }
    # .6577 less .62 is .0377 of the means of kd's .658 .503 .564 and imagenet's
    assert rows["kd"]["vs_imagenet"]["mean"] == pytest.approx((0.658 + 0.503 + 0.564) / 3 - 0.62)
    assert "| 0.575 ± 0.078 |" in next(line for line in lines if line.startswith("| kd |"))
    # detectors 35 s, students 11, 12 and 13 s, the teacher 20 s
    seconds = 3 * 9 * 35 + 6 * (11 + 12 + 13) + 20
    assert kept["hours"] == round(seconds / 3600, 2)
    assert kept["machine"] == "2 cores, NVIDIA H200"
    # a digit that is altered shows
    page = printed.replace("0.575", "0.576")
    assert tables_in(page) != {"shapes.json": lines}
