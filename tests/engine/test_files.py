"""Files that are never half written: JSON, safetensors and checkpoints, also on a disk that is full."""

import errno
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch
from safetensors.torch import save_file

from nst_det.cli.command import COMMANDS, Command
from nst_det.engine.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
    would_resume,
)
from nst_det.engine.io import (
    atomic_folder,
    atomic_path,
    read_json,
    read_sealed_json,
    remove_left_over,
    sha256_of_file,
    write_json,
    write_sealed_json,
    write_text,
)
from nst_det.engine.metrics import MetricsWriter, read_metrics
from nst_det.engine.safetensors_io import read_metadata, read_tensors, write_tensors
from nst_det.errors import UserError

ROOM = 20_000
BIG = {"weight": torch.arange(50_000.0)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


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
def test_on_a_full_disk_the_old_file_stays(write, full, tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UserError, match=r"file: .*\(File too large\)"):
        write(path)
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_on_a_full_disk_the_checkpoint_before_is_the_newest(full, tmp_path):
    save_checkpoint(tmp_path, 1, {"weight": torch.ones(3)})
    with pytest.raises(UserError, match=r"step-00000002\.pt: .*\(File too large\)"):
        save_checkpoint(tmp_path, 2, BIG)
    assert load_latest_checkpoint(tmp_path)["iteration"] == 1 - 1
    assert names(tmp_path) == ["step-00000001.pt"]


def test_on_a_full_disk_metrics_end_with_a_whole_line(full, tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match=r"metrics\.jsonl"), MetricsWriter(path) as metrics:  # noqa: PT012
        for step in range(ROOM):
            metrics.write(step, {"loss": 1.0})
    rows = read_metrics(path)
    assert len(rows) > 100
    assert [row["step"] for row in rows] == list(range(len(rows)))


def test_a_full_disk_under_any_writer_is_one_line(cli, monkeypatch, capsys):
    def run(args):
        """Write."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.out")

    monkeypatch.setitem(COMMANDS, "some-name", Command(run, (), "", False))
    assert cli("some-name") == 2
    line = capsys.readouterr().err
    assert line.startswith("nst-det: events.out: ")
    assert line.count("\n") == 1


@pytest.mark.parametrize("atomic", [atomic_path, lambda path: atomic_folder(path, "")])
def test_a_write_that_fails_leaves_nothing(tmp_path, atomic):
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "new"):
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with pytest.raises(UserError, match="new"), atomic(tmp_path / "new") as temporary:  # noqa: PT012
        (temporary.rmdir if temporary.is_dir() else temporary.unlink)()
        raise UserError("new")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/new"), atomic(tmp_path / "file" / "new"):
        pass
    assert names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_stays(tmp_path):
    def write(go):
        with atomic_path(tmp_path / "a.json") as temporary, atomic_folder(tmp_path / "b", "") as folder:
            temporary.write_text("half")
            (folder / "c").touch()
            go.set()
            time.sleep(60)

    fork = multiprocessing.get_context("fork")
    go = fork.Event()
    process = fork.Process(target=write, args=(go,))
    process.start()
    go.wait(30)
    of_another_machine = tmp_path / ".a.json.elsewhere-1-01234567.tmp"
    of_another_machine.touch()
    for owned in (False, True):
        remove_left_over(tmp_path, owned)
        assert len(names(tmp_path)) == 3 - owned
    process.kill()
    process.join()
    remove_left_over(tmp_path)
    assert names(tmp_path) == []


def test_json(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": [1, 2.5, None]})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, math.nan)
    assert read_json(path) == {"x": [1, 2.5, None]}
    write_sealed_json(path, {"a": 1, "b": {"c": 2}})
    # neither order nor spaces are sealed
    path.write_text(json.dumps(dict(reversed(read_json(path).items()))))
    assert read_sealed_json(path, "") == {"a": 1, "b": {"c": 2}}
    path.write_text(path.read_text().replace("2}", "3}"))
    with pytest.raises(UserError, match=r"a\.json: .*make it again"):
        read_sealed_json(path, "make it again")
    path.write_bytes(b"abc")
    assert sha256_of_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


TENSORS = {
    "scalar": torch.tensor(7),
    "none": torch.zeros(0, 3),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "learned": torch.nn.Parameter(torch.ones(2)),
}


def change_header(path, change):
    """Write the file with another header; its tensors stay as they are."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    values = json.loads(content[8:end])
    change(values)
    new = json.dumps(values).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[end:])


def test_tensors_of_any_kind_come_back(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, TENSORS, {"classes": '["a"]'})
    change_header(path, lambda values: values.update(__metadata__=dict(reversed(values.pop("__metadata__").items()))))
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value.detach())
    about = read_metadata(path)
    assert (about["format"], about["classes"], len(about["content_sha256"])) == ("pt", '["a"]', 64)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["__metadata__"].update(classes='["b"]'),
        lambda values: values["turned"].update(shape=[2, 3]),
        lambda values: values["half"].update(dtype="F16"),
        lambda values: values.update(ears=values.pop("mask")),
    ],
)
def test_another_header_is_damage(tmp_path, change):
    write_tensors(tmp_path / "w.safetensors", TENSORS, {"classes": '["a"]'})
    change_header(tmp_path / "w.safetensors", change)
    with pytest.raises(UserError, match=r"w\.safetensors: damaged"):
        read_tensors(tmp_path / "w.safetensors")


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    assert load_latest_checkpoint(tmp_path) is None
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, {"w": torch.full((3,), float(step)), "note": "x"})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000030.pt"]
    state = load_latest_checkpoint(tmp_path)
    assert (state["iteration"], state["w"].tolist(), state["note"]) == (29, [30.0, 30.0, 30.0], "x")


def test_a_damaged_checkpoint_is_named_and_the_one_before_loaded(tmp_path, caplog):
    first, newest = (save_checkpoint(tmp_path, step, {"w": torch.ones(1000)}) for step in (1, 2))
    flip_a_byte(newest)
    with caplog.at_level(logging.WARNING):
        assert load_latest_checkpoint(tmp_path)["iteration"] == 0
    assert str(newest) in caplog.text
    flip_a_byte(first)
    with pytest.raises(UserError, match=f"^{tmp_path}: every checkpoint"):
        load_latest_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save([1], tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: "):
        load_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 3, {})
    torch.save({"step": 3, "model": {}}, path)
    with pytest.raises(UserError, match=rf"^{path}: .*schema"):
        load_latest_checkpoint(tmp_path)


def test_what_a_run_would_resume_from(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    runs = [[save_checkpoint(first, step, {}) for step in (10, 20)], [save_checkpoint(second, 10, {})]]
    assert would_resume(runs).endswith(f"step 10, {runs[1][0]}")
    assert would_resume(runs[:1]).endswith(f"step 20, {runs[0][1]}")
    runs[0][1].write_bytes(b"half")
    assert would_resume(runs[:1]).endswith(f"step 10, {runs[0][0]}")
    assert "no checkpoint" in would_resume([runs[0], []])
    assert "no checkpoint" in would_resume([])
