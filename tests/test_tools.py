"""The scripts of tools/ are commands of nst-det."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.mark.parametrize(
    ("script", "command", "words"),
    [
        ("distill_backbone", "distill", ["--config-file", "gone.yaml"]),
        ("train_det", "train-det", ["--config-file", "gone.yaml"]),
        ("eval_voc", "evaluate", ["--voc-root", "gone", "--split", "test", "--detections", "gone.json"]),
    ],
)
def test_a_script_is_its_command(script, command, words, tmp_path, cli, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = str(TOOLS / f"{script}.py")
    found = subprocess.run([sys.executable, file, *words], capture_output=True, text=True)
    assert (found.returncode, cli(command, *words)) == (2, 2)
    assert found.stderr == capsys.readouterr().err
    assert "gone" in found.stderr
    assert list(tmp_path.iterdir()) == []
