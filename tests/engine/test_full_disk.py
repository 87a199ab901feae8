"""Every kind of file on a disk that is full: one line, nothing half written, the old content stays."""

import errno
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from nst_det.cli.command import COMMANDS, Command
from nst_det.engine.checkpoint import checkpoints, load_latest_checkpoint, save_checkpoint
from nst_det.engine.io import atomic_path, write_json, write_text
from nst_det.engine.metrics import MetricsWriter, read_metrics
from nst_det.errors import UserError

ROOM = 20_000
BIG = {"weight": torch.arange(50_000.0)}


@pytest.fixture
def full():
    """No file may grow beyond :data:`ROOM` bytes; the kernel refuses each write beyond, as a full disk does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def write_safetensors(path):
    with atomic_path(path) as temporary:
        save_file(BIG, str(temporary))


@pytest.mark.parametrize(
    "write",
    [
        write_safetensors,
        lambda path: write_text(path, "x" * 10 * ROOM),
        lambda path: write_json(path, list(range(ROOM))),
    ],
    ids=["safetensors", "text", "json"],
)
def test_what_was_there_stays(write, full, tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UserError, match=r"file: can't be written \(File too large\); free some space or name another"):
        write(path)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_the_checkpoint_before_is_the_newest(full, tmp_path):
    save_checkpoint(tmp_path, 1, {"weight": torch.ones(3)})
    with pytest.raises(UserError, match=r"step-00000002\.pt: can't be written \(File too large\)"):
        save_checkpoint(tmp_path, 2, BIG)
    assert load_latest_checkpoint(tmp_path)["step"] == 1
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001.pt"]
    assert len(list(tmp_path.iterdir())) == 1


def test_metrics_up_to_the_last_whole_line(full, tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match=r"metrics\.jsonl: can't be written"), MetricsWriter(path) as metrics:  # noqa: PT012
        for step in range(ROOM):
            metrics.write(step, {"loss": 1.0})
    rows = read_metrics(path)
    assert len(rows) > 100
    assert [row["step"] for row in rows] == list(range(len(rows)))


def test_a_write_by_anybody_is_one_line(cli, monkeypatch, capsys):
    def run(args):
        """Write."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.out")

    monkeypatch.setitem(COMMANDS, "some-name", Command(run, (), "", False))
    assert cli("some-name") == 2
    said = capsys.readouterr().err
    assert said.startswith("nst-det: events.out: can't be written (No space left on device); free some space")
    assert said.count("\n") == 1
