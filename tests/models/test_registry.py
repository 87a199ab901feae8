import os

import pytest
import torch
from iopath.common.file_io import PathManager

from nst_det.errors import UserError
from nst_det.models import (
    Card,
    create_model,
    input_contract,
    load_backbone,
    path_manager,
    register_handler,
    registry_folders,
    resolve,
    save_backbone,
)


def save(folder, name, **fields):
    torch.manual_seed(1)
    card = Card(
        arch="nst_resnet10_w32",
        num_classes=2,
        input=input_contract([0.5] * 3, [0.5] * 3, "RGB", 32),
        **{"method": "nst-poly", "top1": 0.876, **fields},
    )
    path = folder / f"{name}.safetensors"
    save_backbone(path, create_model("nst_resnet10_w32", 2), card)
    return path


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two registry folders; the first one is written to."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.setenv("NST_DET_BACKBONES", os.pathsep.join([str(first), str(second)]))
    return first, second


def test_names_resolve_in_order(folders):
    first, second = folders
    assert registry_folders() == [first, second]
    old = save(second, "kd:0.9+nst-poly-s0")
    assert resolve("backbone://kd:0.9+nst-poly-s0") == old
    new = save(first, "kd:0.9+nst-poly-s0", top1=0.5)
    assert resolve("backbone://kd:0.9+nst-poly-s0") == new
    assert load_backbone("backbone://kd:0.9+nst-poly-s0")[1].top1 == 0.5
    assert resolve("/some/where.safetensors").as_posix() == "/some/where.safetensors"


def test_without_the_variable_it_is_the_users_cache(monkeypatch):
    monkeypatch.delenv("NST_DET_BACKBONES", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert [str(folder) for folder in registry_folders()] == ["/home/somebody/.cache/nst_det/models"]


@pytest.mark.parametrize(
    "name", ["../secret", "a/b", "/etc/passwd", "..", ".hidden", "", "a\x00b", "a\nb", "x" * 201, "~"]
)
def test_names_that_lead_elsewhere_are_refused(folders, name):
    first, _ = folders
    save(first.parent, "secret")
    with pytest.raises(UserError, match="name"):
        resolve(f"backbone://{name}")
    assert not path_manager.exists(f"backbone://{name}")


def test_iopath_managers_open_it(folders):
    with pytest.raises(UserError, match="backbone://nix.*first, .*second"):
        resolve("backbone://nix")
    path = save(folders[0], "small")
    for manager in (path_manager, PathManager()):
        register_handler(manager)
        assert manager.get_local_path("backbone://small") == str(path)
        with manager.open("backbone://small", "rb") as file:
            assert file.read() == path.read_bytes()
        assert manager.isfile("backbone://small")
        assert not manager.exists("backbone://other")
        with pytest.raises(UserError, match="not through backbone://"):
            manager.open("backbone://small", "wb")
    assert path.exists()


def test_the_table_and_the_check(folders, cli, capsys):
    first, second = folders
    save(first, "good", teacher={"name": "[red]big"}, data={"name": "shapes"}, date="2024-05-06T07:08:09")
    (second / "broken.safetensors").write_bytes(b"x")
    assert cli("backbones") == 0
    said = capsys.readouterr().out
    row = next(line for line in said.split("\n") if "good" in line)
    for text in ("nst_resnet10_w32", "nst-poly", "87.6 %", "1.23 M", "[red]big", "shapes", "2024-05-06"):
        assert text in row
    assert "broken.safetensors: its card broken.json is missing" in said.replace("\n", " ")
    for name in ("good", "backbone://good", str(first / "good.safetensors")):
        assert cli("backbones", "--check", name) == 0
        assert "differ by at most 0" in capsys.readouterr().out
    assert cli("backbones", "--root", first, "--check", "good") == 0
    assert cli("backbones", "--root", first / "nix") == 2
    assert "nix: no such folder" in capsys.readouterr().err
