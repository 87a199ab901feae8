"""Weights by the names of timm and Hugging Face, in a cache made here; no test reaches a network."""

import json
import pickle
import threading
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import LocalEntryNotFoundError

from nst_det.errors import UserError
from nst_det.models import create_model, hub, recognize, resolve
from tests.helpers.hub import NAME, REPO, offline_cache, snapshot, weights


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return offline_cache(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", [REPO, f"hf-hub:{REPO}", f"hf_hub:{REPO}@main", NAME, "test_resnet"])
def test_a_cached_file_is_taken_by_any_of_its_names(cache, name):
    file = snapshot(cache, REPO) / "model.safetensors"
    theirs = weights(file)
    assert resolve(name) == file
    found = recognize(resolve(name), "test_resnet", {}, 7)
    assert found.head == 1000
    assert found.contract == {"channel_order": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "size": 160}
    for named in (REPO, "test_resnet", "1000", "160", "bilinear"):
        assert named in found.says
    model = create_model("test_resnet", 7, True).eval()
    own = create_model("test_resnet", 7).eval()
    own.load_state_dict(found.tensors, strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for made in (model, own):
            torch.testing.assert_close(made.forward_features(images), theirs.forward_features(images), rtol=0, atol=0)


def test_a_file_of_that_name_is_a_file(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    weights(tmp_path / REPO)
    assert resolve(REPO) == Path(REPO)


@pytest.mark.parametrize("cfg", [{"pretrained_cfg": {}}, {}])
def test_a_repository_of_ones_own_says_its_input_or_it_is_asked_for(cache, cfg, caplog):
    folder = snapshot(cache, "me/net")
    weights(folder / "model.safetensors", classes=5)
    said = {"mean": [0.1, 0.2, 0.3], "std": [0.4] * 3, "input_size": [3, 96, 96], "interpolation": "bicubic"}
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet"} | dict.fromkeys(cfg, said)))
    found = recognize(resolve("hf-hub:me/net"), "test_resnet", {}, 5)
    assert found.head is None
    seen = []
    found.check_input(seen.append, "RGB with mean [0, 0, 0]", "STUDENT.WEIGHTS")
    if cfg:
        assert seen[0].input == {"channel_order": "RGB", "mean": said["mean"], "std": said["std"], "size": 96}
        assert "me/net" in found.says
    else:
        assert not seen
        assert "STUDENT.WEIGHTS" in caplog.text
        assert "mean [0, 0, 0]" in caplog.text


@pytest.mark.parametrize(("name", "repo", "more"), [(NAME, REPO, ()), ("hf-hub:me/net", "me/net", ("config.json",))])
def test_without_a_network_one_line_says_what_to_bring_and_then_it_works(cache, tmp_path, name, repo, more):
    with pytest.raises(UserError, match=name) as told:
        resolve(name)
    line = str(told.value)
    assert "\n" not in line
    for part in ("model.safetensors", f"https://huggingface.co/{repo} ", *more):
        assert part in line
    folder = Path(line.split(" into ")[1].split(" (")[0])
    assert folder.is_relative_to(cache)
    if not more:
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            create_model(NAME, 7, True)
        assert str(folder) in hub.to_bring(NAME)
    folder.mkdir(parents=True)
    weights(folder / "model.safetensors")
    for file in more:
        (folder / file).write_text("{}")
    assert resolve(name) == folder / "model.safetensors"
    if not more:
        assert hub.to_bring(NAME) == ""
        create_model(NAME, 7, True)


def test_a_hub_that_does_not_answer_is_not_waited_for(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "SECONDS", 0.05)
    silence = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: silence.wait(60))
    with pytest.raises(UserError, match=r"model\.safetensors .*no answer within"):
        resolve(NAME)
    silence.set()


@pytest.fixture
def online(cache, tmp_path, monkeypatch):
    """A hub with the files of a folder."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = tmp_path / "server"
    (server / REPO).mkdir(parents=True)

    def ask(url, **_):
        repo, file = url.removeprefix(f"{constants.ENDPOINT}/").split("/resolve/main/")
        if not (server / repo).is_dir():
            raise error_of(huggingface_hub.errors.RepositoryNotFoundError)
        if not (server / repo / file).is_file():
            raise error_of(huggingface_hub.errors.RemoteEntryNotFoundError)

    def download(repo, file, revision):
        if not (server / repo / file).is_file():
            raise LocalEntryNotFoundError("gone")
        target = snapshot(cache, repo) / file
        target.write_bytes((server / repo / file).read_bytes())
        return str(target)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return server / REPO


def error_of(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "404")
    return error


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_not_in_the_cache_is_fetched_once(online, file, monkeypatch):
    if file.endswith("bin"):
        torch.save(timm.create_model(NAME).state_dict(), online / file)
    else:
        weights(online / file)
    assert hub.to_bring(NAME) == ""
    path = resolve(NAME)
    assert path.name == file
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", None)
    assert resolve(NAME) == path
    assert recognize(path, "test_resnet", {}, 1000).head is None


def test_a_pickle_that_runs_code_is_refused_from_the_hub_too(online):
    (online / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Path("x")}))
    with pytest.raises(UserError, match="--trust-pickle"):
        recognize(resolve(NAME), "test_resnet", {}, 1000)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("test_resnet.r160_in1", NAME),
        ("timm/test_resnet.r16_in1k", NAME),
        ("test_resnett.r160_in1k", NAME),
        ("hf-hub:timm/test_resnet.160_in1k", NAME),
        ("nst_resnet10_w32", "list_pretrained|near it"),
        ("hf-hub:", "hf-hub:ORG/NAME"),
        (REPO, "pytorch_model"),
    ],
)
def test_names_of_nothing_are_refused_with_those_near_them(online, name, near):
    with pytest.raises(UserError, match=near) as refused:
        resolve(name)
    assert name in str(refused.value)
