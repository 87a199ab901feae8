"""Multilayer perceptrons as timm models."""

import pytest
import torch
from torch import nn

from nst_det.models import Bottomup, count_parameters, create_model, feature_levels, forward_outputs
from nst_det.models.build import LevelInfo, embedding_width

SMALL = {"depth": 2, "img_size": 8}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("nst_mlp_w1024", 5, **SMALL).eval()


def test_it_computes_what_the_formula_says(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(3, 3, 16, 16)
    outputs = forward_outputs(model, images, feature_levels(model))
    x = images.reshape(3, 3, 8, 2, 8, 2).mean((3, 5)).reshape(3, -1).double()
    state = {name: value.double() for name, value in model.state_dict().items()}
    for layer in range(2):
        x = x @ state[f"hidden.{layer}.0.weight"].T
        variance = state[f"hidden.{layer}.1.running_var"] + 1e-5
        x = ((x - state[f"hidden.{layer}.1.running_mean"]) / variance.sqrt()).clamp_min(0)
        assert torch.allclose(outputs.maps[f"hidden{layer + 1}"][:, :, 0, 0].double(), x, atol=1e-4)
    assert torch.allclose(outputs.embedding.double(), x, atol=1e-4)
    assert torch.allclose(outputs.logits.double(), x @ state["head.weight"].T + state["head.bias"], atol=1e-4)
    assert torch.equal(outputs.logits, model(images))


def test_levels_are_its_hidden_vectors(model):
    assert feature_levels(model) == {"hidden1": LevelInfo(0, 0, 1024), "hidden2": LevelInfo(1, 0, 1024)}
    assert embedding_width(model) == 1024
    maps = model.forward_intermediates(torch.zeros(2, 3, 8, 8), indices=[-1], intermediates_only=True)
    assert [tuple(map_.shape) for map_ in maps] == [(2, 1024, 1, 1)]
    for level in ("res4", "hidden1"):
        with pytest.raises(ValueError, match=f"nst_mlp_w1024.*'{level}'"):
            Bottomup("nst_mlp_w1024", [level], SMALL)


@pytest.mark.parametrize(("width", "millions"), [(1024, 6.3), (2048, 16.7), (4096, 50.3)])
def test_parameters(width, millions):
    with torch.device("meta"):
        model = create_model(f"nst_mlp_w{width}", 1000)
    assert count_parameters(model) == pytest.approx(millions * 1e6, rel=0.01)
