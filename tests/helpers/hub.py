"""A cache of Hugging Face's hub, laid out as huggingface_hub does."""

from pathlib import Path

import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

# its published weights want mean and std .5, which are not ImageNet's
NAME = "test_resnet.r160_in1k"
REPO = f"timm/{NAME}"


def offline_cache(tmp_path, monkeypatch):
    """Take an empty cache, without network; return its folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot(cache, repo=REPO, commit="0123abcd"):
    """Make and return the folder of a repository's files."""
    folder = Path(cache) / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def weights(path, classes=1000):
    """Write random weights of the network; return it."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=classes).eval()
    save_file(model.state_dict(), path)
    return model
