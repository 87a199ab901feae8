"""The page in a browser: sorting and filtering, and WCAG 2.1 A and AA by axe-core."""

import importlib.util
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).resolve().parents[2]
# what is folded is read too
AXE = """
for (const details of document.querySelectorAll("details")) details.open = true;
const rules = {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"], resultTypes: ["violations"]};
axe.run(document, rules).then((found) => tell(JSON.stringify({
  rules: found.passes.length,
  violations: found.violations.map((one) => [one.id, one.nodes.length, one.nodes[0].html.slice(0, 200)]),
}))).catch((error) => tell(JSON.stringify({error: String(error)})));
"""
USE = """
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


@pytest.fixture
def html(finished):
    return (finished[0] / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def axe():
    """The newest axe-core at hand: of ``npm install --no-save axe-core``, or the one that axe-core-python brings."""
    script = CHECKOUT / "node_modules" / "axe-core" / "axe.min.js"
    found = importlib.util.find_spec("axe_core_python")
    if not script.is_file() and found is not None and found.origin is not None:
        script = Path(found.origin).with_name("axe.min.js")
    if not script.is_file():
        pytest.skip("no axe-core: pip install axe-core-python, or npm install --no-save axe-core")
    return f"{script.read_text()}\n{AXE}"


@pytest.mark.parametrize("width", [1400, 420])
def test_sorting_filtering_and_nothing_from_the_network(html, in_browser, width):
    found = json.loads(in_browser(html, USE, width))
    assert found == {"width": width, "wide": 0, "best": "fitnet", "worst": "scratch", "left": 2, "asked": []}


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 420)])
def test_axe_finds_nothing(html, in_browser, axe, scheme, width):
    if scheme == "dark":
        assert html.count("@media (prefers-color-scheme: dark)") == 1
        html = html.replace("@media (prefers-color-scheme: dark)", "@media all")
    found = json.loads(in_browser(html, axe, width))
    assert found.get("violations") == [], found
    assert found["rules"] > 20


def test_axe_would_find_something(html, in_browser, axe):
    html = html.replace("--muted: #56606d", "--muted: #c0c8d0").replace('<html lang="en">', "<html>")
    found = json.loads(in_browser(html, axe, 1400))
    assert {"color-contrast", "html-has-lang"} <= {one[0] for one in found["violations"]}
