"""README and tutorials as a new user follows them: every command block is run, in order, in one folder.

``nst-det`` is :mod:`shim` there, so that a block takes seconds.  What is not run says why in a comment above its
block, and is counted below, so that it can't become more unseen.  A line that a page repeats is not run again.
"""

import importlib
import importlib.util
import itertools
import logging
import multiprocessing
import os
import re
import shlex
import sys
import time
from pathlib import Path

import pytest
import yaml

import nst_det
from nst_det.cli import build_parser

CHECKOUT = Path(__file__).resolve().parents[2]
README = CHECKOUT / "README.md"
PAGES = [README, *sorted((CHECKOUT / "docs" / "tutorials").glob("*.md"), key=lambda path: path.name != "own_data.md")]
# page -> reasons, as they stand above the blocks
NOT_RUN = {
    "README.md": [
        "takes minutes and installs from a package index; what it runs is tested by itself",
        "installs from a package index",
        "installs from a package index, and takes minutes",
        "needs data that is not part of the project",
    ],
    "detectron2.md": [
        "needs Detectron2; tests/detectron2/test_detectron2_library.py runs the same",
        "needs Detectron2 and PASCAL VOC",
        "needs Detectron2; tests/detectron2/test_detectron2_export.py runs the same",
        "needs Detectron2",
    ],
}
_spec = importlib.util.spec_from_file_location("guide_shim", Path(__file__).with_name("shim.py"))
shim = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shim)
BLOCK = re.compile(
    r"(?:^<!-- test: (?P<note>.*?) -->\n)?^(?P<fence>```+)(?P<language>.*?)\n(?P<text>.*?)^(?P=fence)$", re.M | re.S
)
COMMAND = re.compile(r"^\s*(?:[A-Z_]+=\S+ )*(nst-det|python3?|make|pip)\b", re.M)


class Block:
    """A fenced block, its language, and what the comment above it tells the test."""

    def __init__(self, page, match):
        self.page, self.language, self.text = page, match["language"].strip(), match["text"]
        kind, _, self.detail = (match["note"] or "run").partition(": ")
        assert kind in ("run", "not run", "file"), f"{page.name}: unknown comment: test: {match['note']}"
        self.kind = kind

    @property
    def commands(self):
        """The lines of a shell block, continued ones joined."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def blocks(page):
    return [Block(page, match) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def test_what_is_not_run_is_known():
    found = {page.name: [block.detail for block in blocks(page) if block.kind == "not run"] for page in PAGES}
    assert {name: reasons for name, reasons in found.items() if reasons} == NOT_RUN


def test_no_command_hides_in_a_block_without_a_language():
    for page in [*PAGES, *(CHECKOUT / "docs").rglob("*.md")]:
        for block in blocks(page):
            assert block.language or not COMMAND.search(block.text), f"{page.name}: {block.text}"


@pytest.mark.parametrize("page", sorted({*PAGES, *(CHECKOUT / "docs").rglob("*.md")}), ids=lambda path: path.name)
def test_commands_and_files_in_all_pages_exist(page):
    parser = build_parser()
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        for line in block.commands if block.language in ("bash", "sh") else []:
            words = shlex.split(line, comments=True)
            words = words[words.index("nst-det") :] if "nst-det" in words else []
            if words[1:] and "..." not in words:
                try:
                    parser.parse_args(words[1:])
                except SystemExit:
                    pytest.fail(f"{page.name}: {line}")
    for name in re.findall(r"(?<![\w/-])(?:configs|benchmarks|tools|examples|tests|nst_det)/[\w./]*\w", text):
        assert (CHECKOUT / name).exists(), f"{page.name}: there is no {name}"


def test_words_and_options_in_the_text_exist():
    parsers = build_parser()._subparsers._group_actions[0].choices
    for page in sorted({*PAGES, *CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")}):
        for code in re.findall(r"(?<!`)`nst-det ([^`]+)`(?!`)", page.read_text(encoding="utf-8")):
            word, *rest = code.split()
            if word not in ("COMMAND", "--help"):
                assert word in parsers, f"{page.name}: nst-det {code}"
                options = {text for text in rest if text.startswith("--")} - set(parsers[word]._option_string_actions)
                assert not options, f"{page.name}: nst-det {code}"


@pytest.fixture
def terminal(empty_folder, tmp_path):
    """Does a shell line or Python text in the new user's folder; gives what it printed.

    In a forked process where that is the same as in a new one, so that torch is not imported a dozen times.
    """
    (empty_folder / "configs").symlink_to(CHECKOUT / "configs")
    preload()

    def run(text, begin):
        start, said = time.monotonic(), tmp_path / "said.txt"
        process = multiprocessing.get_context("fork").Process(target=in_fork, args=(begin, said))
        process.start()
        process.join(300)
        print(f"{time.monotonic() - start:5.1f} s  {text.splitlines()[0]}")
        assert process.exitcode == 0, f"{text}\n{said.read_text()[-4000:]}"
        return said.read_text()

    def terminal(text, language):
        if language == "python":
            return run(text, lambda: exec(compile(text, "guide", "exec"), {"__name__": "__main__"}))
        assert not re.search(r"[|;&<>`]|\$\(", text), f"write a test for a line with shell syntax: {text}"
        words = shlex.split(text, comments=True)
        settings = list(itertools.takewhile(lambda word: re.match(r"[A-Z_]+=", word), words))
        program, *rest = words[len(settings) :]
        assert program == "nst-det", text
        environment = dict(setting.split("=", 1) for setting in settings)
        sys_path = environment.get("PYTHONPATH", "").split(os.pathsep)
        return run(text, lambda: (os.environ.update(environment), sys.path.extend(sys_path), shim.run(rest)))

    return terminal


def in_fork(begin, said):
    with open(said, "w", buffering=1, encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        os.environ |= {"COLUMNS": "160", "OMP_NUM_THREADS": "1"}
        # as in a new process: logging is not configured, and torch takes one thread
        logging.getLogger().handlers.clear()
        begin()


def preload():
    """What the commands import when they are called."""
    for name in (
        "distillation.pipeline",
        "detection.pipeline",
        "detection.predict",
        "comparison.pipeline",
        "report.page",
        "api",
    ):
        importlib.import_module(f"nst_det.{name}")


def test_every_block_runs(terminal, empty_folder):
    said = {}
    for page in PAGES:
        for block in blocks(page):
            if block.kind == "file":
                with open(empty_folder / block.detail, "a", encoding="utf-8") as file:
                    file.write(block.text)
            elif block.kind == "run" and block.language in ("bash", "sh"):
                for line in block.commands:
                    # without its comment
                    command = shlex.join(shlex.split(line, comments=True))
                    if command not in said:
                        said[command] = terminal(line, block.language)
            elif block.kind == "run" and block.language == "python":
                said[block.text] = terminal(block.text, block.language)
    # what a new user is told, is there
    named = next(text for line, text in said.items() if " init " in line)
    assert shlex.join(shlex.split(re.search(r"^next +(.*)$", named, re.MULTILINE)[1])) in said
    report = empty_folder / "my_project" / "output" / "report" / "index.html"
    first_look = next(text for line, text in said.items() if "compare" in line)
    assert f"report: {report}" in first_look
    assert "nst-poly" in report.read_text(encoding="utf-8")
    predictions = empty_folder / "predictions"
    assert len(list((predictions / "images").iterdir())) == 30
    assert (predictions / "detections.json").is_file()


def test_the_citation_names_the_version_the_authors_and_every_paper():
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    assert citation["version"] == nst_det.__version__
    assert f'authors = [{{ name = "{citation["authors"][0]["name"]}" }}]' in project
    assert f'license = "{citation["license"]}"' in project
    methods = (CHECKOUT / "docs" / "methods.md").read_text(encoding="utf-8")
    # the papers in the heads of the methods' sections
    papers = set(re.findall(r"\barXiv (\d{4}\.\d{5})[.,].*`nst_det/losses/", methods))
    assert len(papers) >= 8
    assert papers <= {paper["url"].rpartition("/")[2] for paper in citation["references"]}
    assert f"## {nst_det.__version__}" in (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
