"""The documentation is built as ``make docs`` builds it: any broken link, anchor or cross-reference stops it."""

import html.parser
import importlib.util
import os
import re
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
    assert 'id="nst_det.losses.nst.nst_loss"' in losses
    assert ":func:" not in losses


LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = [*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")]
# hosts that pages link to; no test asks them
HOSTS = {"arxiv.org", "detectron2.readthedocs.io", "docs.ray.io", "github.com", "pytorch.org", "semver.org"}
# files of weights
HOSTS |= {"dl.fbaipublicfiles.com", "download.pytorch.org"}


def links(page):
    return LINK.findall(page.read_text(encoding="utf-8"))


def test_links_to_other_hosts_are_few_and_known():
    found = {link for page in PAGES for link in links(page) if ":" in link}
    assert all(link.startswith("https://") for link in found)
    assert {link.split("/")[2] for link in found} == HOSTS


def test_pages_that_mkdocs_does_not_see_link_to_what_is_there():
    for page in CHECKOUT.glob("*.md"):
        for link in links(page):
            if ":" not in link:
                assert (page.parent / link.split("#")[0]).exists(), f"{page.name}: {link}"


def test_the_reference_has_every_part_of_the_package():
    # the command line is documented by its own --help
    parts = {path.stem for path in (CHECKOUT / "nst_det").iterdir() if not path.name.startswith("_")}
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (CHECKOUT / "docs" / "reference").glob("*.md"))
    assert parts - {"cli", "py"} == set(re.findall(r"^::: nst_det\.(\w+)", pages, re.MULTILINE))
