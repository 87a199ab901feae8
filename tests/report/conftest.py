import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from nst_det.report import write_report
from tests.helpers.finished import CLASSES, build_results, build_runs, typed


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished comparison of three seeds with its report: folder, content of results.json, and objects by image."""
    folder, results = tmp_path_factory.mktemp("comparison"), build_results(classes=CLASSES)
    truth = build_runs(folder, results)
    write_report(typed(results), folder / "report", folder)
    (folder / "report" / "results.json").write_text(json.dumps(results))
    return folder, results, truth


@pytest.fixture
def in_browser(tmp_path):
    """``in_browser(html, script, width)``: what a script on a page says by ``tell(text)``, in headless Chromium."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on this machine: the page is not looked at in a browser")

    def browse(html, script, width):
        script = f"const tell = (text) => parent.postMessage(text, '*');\n{script}"
        # the script is one more inline script, so the policy gets its hash; in all else it is the page itself
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        html = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
        (tmp_path / "page.html").write_text(html.replace("</body>", f"<script>{script}</script></body>"))
        # a frame, because a window can't be as narrow as a phone
        frame = f"<body><iframe src=page.html style='width:{width}px;height:900px;border:0'></iframe>"
        frame += "<script>onmessage = (event) => { document.title = event.data; };</script>"
        (tmp_path / "frame.html").write_text(frame)
        flags = "headless no-sandbox disable-gpu no-first-run enable-logging=stderr disable-background-networking"
        flags += f" disable-component-update disable-sync dump-dom user-data-dir={tmp_path / 'profile'}"
        flags += " window-size=1500,900 virtual-time-budget=20000"
        command = [chromium, *(f"--{flag}" for flag in flags.split()), f"file://{tmp_path}/frame.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        assert ":CONSOLE" not in done.stderr, done.stderr
        return unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1])

    return browse
