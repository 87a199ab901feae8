import subprocess
import sys
import time

import pytest

from nst_det import cli
from nst_det.errors import UserError


class Word:
    HELP = "a word"

    def __init__(self, result):
        self.result = result

    def add_arguments(self, parser):
        parser.add_argument("--x")

    def run(self, args):
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("result", "code", "said"),
    [
        (0, 0, ""),
        (UserError("f.yaml: A\n is wrong; remove it"), 2, "nst-det: f.yaml: A is wrong; remove it\n"),
        (KeyboardInterrupt(), 130, "nst-det: interrupted\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, result, code, said):
    monkeypatch.setattr(cli, "command_modules", lambda: {"word": Word(result)})
    with pytest.raises(SystemExit) as left:
        cli.main(["word"])
    assert left.value.code == code
    assert capsys.readouterr().err == said


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "command_modules", lambda: {"word": Word(ZeroDivisionError())})
    with pytest.raises(ZeroDivisionError):
        cli.main(["word"])


def test_every_command_has_a_help_page(capsys):
    for word in cli.command_modules():
        with pytest.raises(SystemExit) as left:
            cli.main([word, "--help"])
        assert left.value.code == 0
        assert word in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = "import sys, nst_det.cli as c; c.build_parser(); print('torch' in sys.modules, 'detectron2' in sys.modules)"
    start = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "False False\n"
    assert time.perf_counter() - start < 5
