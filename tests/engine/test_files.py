import math
import multiprocessing
import os
import time

import pytest

from nst_det.engine.io import atomic_path, read_json, remove_left_over, sha256_of_file, write_json, write_text
from nst_det.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "f.txt"
    write_text(path, "old")

    def write_and_fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"f\.txt: can't be written \(No space left on device\); free some space"):
        write_text(tmp_path / "f.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_json_round_trip_and_refusal_of_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", math.nan)
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_a_user_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "a.json")


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_stays(tmp_path):
    def write(go):
        with atomic_path(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            go.set()
            time.sleep(60)

    fork = multiprocessing.get_context("fork")
    go = fork.Event()
    process = fork.Process(target=write, args=(go,))
    process.start()
    go.wait(30)
    (name,) = [path.name for path in tmp_path.iterdir()]
    os.utime(tmp_path / name, (0, 0))
    remove_left_over(tmp_path)
    assert (tmp_path / name).exists()
    process.kill()
    process.join()
    remove_left_over(tmp_path)
    assert not list(tmp_path.iterdir())
