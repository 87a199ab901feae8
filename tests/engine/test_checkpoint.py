import logging

import pytest
import torch

from nst_det.engine.checkpoint import checkpoints, load_checkpoint, load_latest_checkpoint, save_checkpoint
from nst_det.errors import UserError


def test_round_trip_keeps_the_newest_two(tmp_path):
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, {"w": torch.full((3,), float(step)), "note": "x"})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000030.pt"]
    state = load_latest_checkpoint(tmp_path)
    assert state is not None
    assert (state["iteration"], state["w"].tolist(), state["note"]) == (29, [30.0, 30.0, 30.0], "x")


def test_no_checkpoint_is_none(tmp_path):
    assert load_latest_checkpoint(tmp_path) is None


def flip_a_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(bytes(content))


def test_a_damaged_newest_is_named_and_the_one_before_taken(tmp_path, caplog):
    save_checkpoint(tmp_path, 1, {"w": torch.ones(1000)})
    newest = save_checkpoint(tmp_path, 2, {"w": torch.zeros(1000)})
    flip_a_byte(newest, newest.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        state = load_latest_checkpoint(tmp_path)
    assert state is not None
    assert state["iteration"] == 0
    assert "step-00000002.pt: damaged checkpoint" in caplog.text


def test_all_damaged_is_a_user_error(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"w": torch.ones(10)})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="every checkpoint here is damaged"):
        load_latest_checkpoint(tmp_path)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


def test_code_in_a_checkpoint_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": 1, "w": Evil()}, tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match="damaged checkpoint, or not one"):
        load_checkpoint(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "executed").exists()


def test_what_another_version_wrote_is_refused_in_one_line(tmp_path):
    path = save_checkpoint(tmp_path, 3, {})
    torch.save({"step": 3, "model": {}}, path)
    with pytest.raises(UserError, match=rf"^{path}: .*remove it"):
        load_latest_checkpoint(tmp_path)


def test_a_file_of_something_else_is_not_a_checkpoint(tmp_path):
    torch.save([1], tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: not a checkpoint"):
        load_checkpoint(tmp_path / "a.pt")
