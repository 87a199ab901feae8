"""README and tutorials as a new user follows them: every command block is run, in order, in one folder.

``nst-det`` is :mod:`shim` there, so that a block takes seconds.  What is not run says why in a comment above its
block, and is counted below, so that it can't become more unseen.  A line that a page repeats is not run again.
"""

import importlib
import itertools
import logging
import multiprocessing
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import nst_det
from nst_det.cli import build_parser
from nst_det.data.synthetic import DETECTION, generate_data
from tests.guide import shim
from tests.helpers.voc import SMALL_DATA

CHECKOUT = Path(__file__).resolve().parents[2]
README = CHECKOUT / "README.md"
PAGES = [README, *sorted((CHECKOUT / "docs" / "tutorials").glob("*.md"), key=lambda path: path.name != "own_data.md")]
# page -> reasons, as they stand above the blocks
NOT_RUN = {
    "README.md": [
        "installs from a package index",
        "installs from a package index, and takes minutes",
        "needs data that is not part of the project",
        "takes minutes and installs from a package index; what it runs is tested by itself",
    ],
    "detectron2.md": [
        "needs Detectron2; tests/detectron2/test_detectron2_library.py runs the same",
        "needs Detectron2 and PASCAL VOC",
        "needs Detectron2; tests/detectron2/test_detectron2_export.py runs the same",
        "needs Detectron2",
    ],
}
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


@pytest.mark.parametrize("page", sorted({*PAGES, *(CHECKOUT / "docs").rglob("*.md")}), ids=lambda path: path.name)
def test_commands_and_files_in_all_pages_exist(page):
    parser = build_parser()
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        assert block.language or not COMMAND.search(block.text), f"{page.name}: {block.text}"
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
def empty_folder(tmp_path, monkeypatch):
    """A folder as a new user has it: 30 images of one's own in VOC layout, without lists, and nothing else."""
    voc = generate_data(tmp_path / "generated", SMALL_DATA, workers=1) / DETECTION
    folder = tmp_path / "new user"
    for name in ("Annotations", "JPEGImages"):
        shutil.copytree(voc / name, folder / "my_images" / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NST_DET_BACKBONES", str(tmp_path / "registry"))
    return folder


@pytest.fixture
def terminal(empty_folder, tmp_path):
    """Does a shell line or Python text in the new user's folder; gives what it printed.

    In a forked process where that is the same as in a new one, so that torch is not imported a dozen times.
    """
    (empty_folder / "configs").symlink_to(CHECKOUT / "configs")
    # what the commands import when they are called
    stages = ("distillation.pipeline", "detection.pipeline", "detection.predict", "comparison.pipeline")
    for name in (*stages, "report.page", "api"):
        importlib.import_module(f"nst_det.{name}")

    def run(text, begin):
        output = tmp_path / "output.txt"
        process = multiprocessing.get_context("fork").Process(target=in_fork, args=(begin, output))
        process.start()
        process.join(300)
        assert process.exitcode == 0, f"{text}\n{output.read_text()[-4000:]}"
        return output.read_text()

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


def in_fork(begin, output):
    with open(output, "w", buffering=1, encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        os.environ |= {"COLUMNS": "160", "OMP_NUM_THREADS": "1"}
        # as in a new process: logging is not configured, and torch takes one thread
        logging.getLogger().handlers.clear()
        begin()


def test_every_block_runs(terminal, empty_folder):
    printed = {}
    for page in PAGES:
        for block in blocks(page):
            if block.kind == "file":
                with open(empty_folder / block.detail, "a", encoding="utf-8") as file:
                    file.write(block.text)
            elif block.kind == "run" and block.language in ("bash", "sh"):
                for line in block.commands:
                    # without its comment
                    command = shlex.join(shlex.split(line, comments=True))
                    if command not in printed:
                        printed[command] = terminal(line, block.language)
            elif block.kind == "run" and block.language == "python":
                printed[block.text] = terminal(block.text, block.language)
    # what a new user is told, is there
    named = next(text for line, text in printed.items() if " init " in line)
    assert shlex.join(shlex.split(re.search(r"^next +(.*)$", named, re.MULTILINE)[1])) in printed
    report = empty_folder / "my_project" / "output" / "report" / "index.html"
    first_look = next(text for line, text in printed.items() if "compare" in line)
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
