import multiprocessing
import sys

import pytest

from nst_det.cli import main
from nst_det.comparison.config import load_comparison
from tests.helpers.small_comparison import write_comparison


@pytest.fixture
def config_file(tmp_path):
    return write_comparison(tmp_path)


@pytest.fixture
def comparison(config_file, tmp_path):
    return load_comparison(config_file, tmp_path / "out")


@pytest.fixture
def no_report(monkeypatch):
    """The report room is tested by itself."""
    monkeypatch.setattr("nst_det.report.write_report", lambda *_: None)


@pytest.fixture
def forked(tmp_path):
    """``forked(words)``: ``nst-det`` with these words in a process of its own, whose output goes to output.txt.

    It is forked, because importing torch takes its time; ``first`` is called in it before.
    """
    started = []

    def begin(words, first=lambda: None):
        process = multiprocessing.get_context("fork").Process(target=call, args=(words, first))
        process.start()
        started.append(process)
        return process

    def call(words, first):
        with open(tmp_path / "output.txt", "a", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            first()
            main([str(word) for word in words])

    yield begin
    for process in started:
        process.kill()
        process.join()
