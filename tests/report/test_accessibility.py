"""The page by axe-core, in a browser: WCAG 2.1 A and AA, light on a desk and dark on a phone."""

import importlib.util
import json
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
# what is folded is read too
RUN = """
for (const details of document.querySelectorAll("details")) details.open = true;
const rules = {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"], resultTypes: ["violations"]};
axe.run(document, rules).then((found) => tell(JSON.stringify({
  rules: found.passes.length,
  violations: found.violations.map((one) => [one.id, one.nodes.length, one.nodes[0].html.slice(0, 200)]),
}))).catch((error) => tell(JSON.stringify({error: String(error)})));
"""


@pytest.fixture(scope="module")
def axe() -> str:
    """The newest axe-core at hand: of ``npm install --no-save axe-core``, or the one that axe-core-python brings."""
    script = CHECKOUT / "node_modules" / "axe-core" / "axe.min.js"
    found = importlib.util.find_spec("axe_core_python")
    if not script.is_file() and found is not None and found.origin is not None:
        script = Path(found.origin).with_name("axe.min.js")
    if not script.is_file():
        pytest.skip("no axe-core: pip install axe-core-python, or npm install --no-save axe-core")
    return script.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 420)])
def test_axe_finds_nothing(comparison, in_browser, axe, tmp_path, scheme, width) -> None:
    html = (comparison[0] / "report" / "index.html").read_text(encoding="utf-8")
    if scheme == "dark":
        assert html.count("@media (prefers-color-scheme: dark)") == 1
        html = html.replace("@media (prefers-color-scheme: dark)", "@media all")
    found = json.loads(in_browser(html, f"{axe}\n{RUN}", width, tmp_path))
    assert found.get("violations") == [], found
    assert found["rules"] > 20


@pytest.mark.slow
def test_axe_would_find_something(comparison, in_browser, axe, tmp_path) -> None:
    html = (comparison[0] / "report" / "index.html").read_text(encoding="utf-8")
    html = html.replace("--muted: #56606d", "--muted: #c0c8d0").replace('<html lang="en">', "<html>")
    found = json.loads(in_browser(html, f"{axe}\n{RUN}", 1400, tmp_path))
    assert {"color-contrast", "html-has-lang"} <= {one[0] for one in found["violations"]}
