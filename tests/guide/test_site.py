"""The documentation is built as ``make docs`` builds it: any broken link, anchor or cross-reference stops it."""

import html.parser
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


class Requests(html.parser.HTMLParser):
    """Addresses that a browser fetches by itself when it shows a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        for name in ("src", "data") + (("href",) if tag == "link" else ()):
            if name in given:
                self.addresses.append(given[name])


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="MkDocs is not installed; the extra docs has it")
def test_the_site_is_built_strictly_and_asks_nothing_of_the_net(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        reader = Requests()
        reader.feed(page.read_text(encoding="utf-8"))
        assert reader.addresses
        outside = [address for address in reader.addresses if address.startswith(("http:", "https:", "//"))]
        assert not outside, f"{page.name}: {outside}"
    # the reference is made from the docstrings
    losses = (tmp_path / "site" / "reference" / "transfer.html").read_text(encoding="utf-8")
    assert 'id="nst_det.transfer.nst.nst_loss"' in losses
    assert ":func:" not in losses
