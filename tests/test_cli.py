import subprocess
import sys

import pytest

from nst_det.cli import main
from nst_det.cli.command import COMMANDS, Command
from nst_det.errors import RunFailed, UserError


@pytest.fixture
def declared(monkeypatch):
    """``declared(result)``: makes a command ``some-name`` that gives it, or raises it."""

    def declare(result, **options):
        def run(args):
            """Do something."""
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setitem(COMMANDS, "some-name", Command(run, (), "", options.get("resumes", False)))

    return declare


@pytest.mark.parametrize(
    ("result", "code", "printed"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (UserError("f.yaml: A\n is wrong; remove it"), 2, "nst-det: f.yaml: A is wrong; remove it\n"),
        (RunFailed("run x failed", 75), 75, "nst-det: run x failed\n"),
        (KeyboardInterrupt(), 130, "nst-det: interrupted\n"),
    ],
)
def test_exit_codes(declared, cli, capsys, result, code, printed):
    declared(result)
    assert cli("some-name") == code
    assert capsys.readouterr().err == printed


def test_a_fault_of_the_program_keeps_its_traceback(declared):
    declared(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["some-name"])


def test_every_command_has_a_help_page(cli, capsys):
    for name, declared in COMMANDS.items():
        assert cli(name, "--help") == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert f"nst-det {name}" in printed
        assert declared.run.__doc__ in printed
    assert cli("--help") == 0
    assert set(COMMANDS) <= set(capsys.readouterr().out.split())


def test_help_does_not_import_torch():
    code = (
        "import sys, nst_det.cli as cli; cli.build_parser();"
        "print(*(name in sys.modules for name in ('torch', 'numpy', 'rich', 'detectron2')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False False False\n"
