"""The networks for images of 32 x 32: sizes as published, and a second implementation of one."""

import pytest
import timm
import torch
from torch.nn import functional as F

from nst_det.models import count_parameters, create_model, feature_levels, forward_outputs, load_into, save_backbone
from nst_det.models.card import Card, input_contract

# published, in millions, with 10 classes: WRN's and He et al.'s articles; FitNets' as remembered
PUBLISHED = [
    ("nst_wrn16_1", 0.17, 0.01),
    ("nst_wrn16_2", 0.7, 0.05),
    ("nst_wrn40_1", 0.6, 0.05),
    ("nst_wrn40_2", 2.2, 0.05),
    ("nst_wrn", 36.5, 0.05),
    ("nst_preact_resnet110", 1.7, 0.05),
    # 10.18 million weights of convolutions, 0.15 of normalizations
    ("nst_preact_resnet1001", 10.2, 0.15),
    ("nst_plain1", 0.25, 0.01),
    ("nst_plain2", 0.862, 0.01),
    ("nst_plain4", 2.5, 0.06),
]


@pytest.mark.parametrize(("name", "millions", "rounding"), PUBLISHED)
def test_parameters_are_as_published(name, millions, rounding):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=rounding)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("nst_wrn16_2", {"conv1": (1, 16), "conv2": (1, 32), "conv3": (2, 64), "conv4": (4, 128)}),
        ("nst_preact_resnet110", {"conv1": (1, 16), "conv2": (1, 16), "conv3": (2, 32), "conv4": (4, 64)}),
        ("nst_inception_bn_32", {"3b": (1, 80), "4d": (2, 144), "5b": (4, 336)}),
        ("nst_plain1", {"conv1": (1, 16), "conv2": (2, 32), "conv3": (4, 64)}),
        ("nst_plain_teacher", {"conv1": (1, 96), "conv2": (2, 96), "conv3": (4, 96)}),
    ],
)
@pytest.mark.parametrize("size", [28, 32])
def test_levels_and_shapes(name, levels, size):
    model = create_model(name, 10).eval()
    found = feature_levels(model)
    assert {level: (info.stride, info.channels) for level, info in found.items()} == levels
    images = torch.randn(2, 3, size, size)
    outputs = forward_outputs(model, images, found)
    shapes = {level: (width, size // stride, size // stride) for level, (stride, width) in levels.items()}
    assert {level: tuple(map_.shape[1:]) for level, map_ in outputs.maps.items()} == shapes
    assert outputs.embedding.shape == (2, 500 if "plain" in name else levels[list(levels)[-1]][1])
    assert torch.equal(outputs.logits, model(images))


def test_a_bottleneck_is_a_bottleneck():
    model = create_model("nst_preact_resnet1001", 10).eval()
    kernels = [tuple(conv.weight.shape) for conv in model.stages["conv3"][1].convs]
    assert kernels == [(32, 128, 1, 1), (32, 32, 3, 3), (128, 32, 1, 1)]
    assert [len(model.stages[f"conv{group}"]) for group in (2, 3, 4)] == [111] * 3
    # 3 x 111 x 3 + the first convolution + the classifier
    assert sum(len(block.convs) for group in (2, 3, 4) for block in model.stages[f"conv{group}"]) + 2 == 1001


def by_the_table(images, state):
    """WRN-16-1 by the article's table 1 and figure 1: groups of N = 2 blocks, 16, 32 and 64 wide, average pool, linear.

    Weights are taken one after another, so that names say nothing here.
    """
    convolutions = iter([value for key, value in state.items() if value.ndim == 4 and "shortcut" not in key])
    shortcuts = iter([value for key, value in state.items() if "shortcut" in key])
    norms = iter([[value for key, value in state.items() if key.startswith(f"{norm}.")] for norm in norm_names(state)])

    def norm_relu(x):
        scale, shift, mean, variance, *_ = (value[:, None, None] for value in next(norms) if value.ndim)
        return ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)

    x = F.conv2d(images, next(convolutions), padding=1)
    for group in range(3):
        for block in range(2):
            stride = 2 if group and not block else 1
            before = norm_relu(x)
            y = F.conv2d(before, next(convolutions), stride=stride, padding=1)
            y = F.conv2d(norm_relu(y), next(convolutions), padding=1)
            # 16 channels go in and out of the first group
            x = y + (F.conv2d(before, next(shortcuts), stride=stride) if group and not block else x)
    return norm_relu(x).mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def norm_names(state):
    return [key.removesuffix(".running_mean") for key in state if key.endswith("running_mean")]


def test_wrn_16_1_is_that_of_the_articles_table():
    torch.manual_seed(0)
    model = create_model("nst_wrn16_1", 10).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(std=0.2)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 2)
    model = model.double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        expected = by_the_table(images, model.state_dict())
        assert expected.std() > 0.1
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_maxout_takes_the_larger_of_two():
    model = create_model("nst_plain1", 10)
    x = torch.tensor([[1.0, 4.0, -3.0, -2.0]])
    assert model.hidden[-1](x).tolist() == [[4.0, -2.0]]
    assert model.stages["conv1"][2](x[:, :, None, None]).flatten().tolist() == [4.0, -2.0]


def test_a_wrn_of_any_depth_and_width():
    with torch.device("meta"):
        assert count_parameters(create_model("nst_wrn", 10, depth=16, width=1)) == 175_066
    for kwargs in ({"depth": 17}, {"depth": 4}, {"width": 0}):
        with pytest.raises(ValueError, match=f"not {kwargs.get('depth', 28)}, {kwargs.get('width', 10)}"):
            create_model("nst_wrn", 10, **kwargs)


def test_plain_code_loads_what_is_saved(tmp_path):
    torch.manual_seed(0)
    model = create_model("nst_wrn16_1", 10).eval()
    contract = input_contract([0.5] * 3, [0.25] * 3, "RGB", 32)
    save_backbone(tmp_path / "x.safetensors", model, Card("nst_wrn16_1", 10, input=contract))
    other = timm.create_model("nst_wrn16_1", num_classes=10).eval()
    load_into(other, tmp_path / "x.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(images), model(images))
