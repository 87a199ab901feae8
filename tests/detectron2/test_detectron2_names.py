"""The mapping of names needs no Detectron2; its right side is checked against Detectron2 in test_detectron2_export."""

import pytest
import torch
from torchvision.models import resnet18, resnet50, resnext50_32x4d

from nst_det.detectron2.resnet_key_map import (
    from_detectron2_name,
    resnet_from_detectron2,
    resnet_shape,
    resnet_to_detectron2,
    to_detectron2_name,
)
from nst_det.errors import UserError
from nst_det.models import create_model


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.conv2.weight", "res2.0.conv2.weight"),
        ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
        ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
        ("layer2.0.downsample.1.weight", "res3.0.shortcut.norm.weight"),
        ("bn1.num_batches_tracked", None),
        ("fc.bias", None),
    ],
)
def test_a_name_goes_to_detectron2s_and_back(name, target):
    assert to_detectron2_name(name) == target
    if target is not None:
        assert from_detectron2_name(target) == name


def test_other_networks_are_refused_by_name():
    with pytest.raises(UserError, match="blocks\\.0\\.conv"):
        to_detectron2_name("blocks.0.conv.weight")
    with pytest.raises(UserError, match="not a plain ResNet"):
        resnet_shape(create_model("mobilenetv3_small_050", 3).state_dict())
    with pytest.raises(UserError, match="can't be built"):
        resnet_shape(create_model("nst_resnet10_w32", 3).state_dict())


def test_a_deep_stem_is_refused():
    with pytest.raises(UserError, match="build_timm_fpn_backbone"):
        resnet_shape(create_model("resnet50d", 3).state_dict())


@pytest.mark.parametrize(
    ("build", "expected"),
    [(resnet18, (18, 1, 64, 64)), (resnet50, (50, 1, 64, 256)), (resnext50_32x4d, (50, 32, 4, 256))],
)
def test_the_shape_is_read_off_the_weights(build, expected):
    shape = resnet_shape(build(num_classes=2).state_dict())
    assert (shape.depth, shape.groups, shape.width_per_group, shape.res2_channels) == expected


def test_there_and_back_is_the_same_network():
    state = {key: value for key, value in resnet18(num_classes=2).state_dict().items() if not key.startswith("fc.")}
    again = resnet_from_detectron2(resnet_to_detectron2(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_another_epsilon_goes_into_the_variance():
    state = {"bn1.running_var": torch.tensor([0.5, 2.0])}
    moved = resnet_to_detectron2(state, eps=1e-3)["stem.conv1.norm.running_var"]
    torch.testing.assert_close(moved + 1e-5, state["bn1.running_var"] + 1e-3)
