"""Names of weights; that they are Detectron2's is checked against Detectron2 in test_detectron2_export."""

import re

import pytest
import torch
from torchvision.models import resnet18, resnet50, resnext50_32x4d
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from nst_det.errors import UserError
from nst_det.models import create_model
from nst_det.models.convert import (
    RESNET,
    convert,
    detect_form,
    resnet_from_detectron2,
    resnet_keys,
    resnet_to_detectron2,
)


@pytest.fixture
def torchvisions():
    """The state dict of torchvision's own Faster R-CNN."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return FasterRCNN(backbone, num_classes=4).state_dict()


def test_torchvisions_faster_rcnn_there_and_back(torchvisions):
    ours = convert(torchvisions, "timm")
    assert detect_form(ours) == "timm"
    assert ours["roi_heads.box_predictor.cls_score.weight"].shape == (4, 1024)
    # background is the first of torchvision's classes and the last of ours
    scores = torchvisions["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(ours["roi_heads.box_predictor.cls_score.bias"], torch.cat((scores[1:], scores[:1])))
    assert ours["roi_heads.box_predictor.bbox_pred.weight"].shape == (12, 1024)
    assert torch.equal(ours["backbone.fpn_lateral2.weight"], torchvisions["backbone.fpn.inner_blocks.0.0.weight"])
    again = convert(ours, "torchvision")
    assert again.keys() == torchvisions.keys()
    for name, value in again.items():
        if name.startswith("roi_heads.box_predictor.bbox_pred"):
            assert torch.equal(value[4:], torchvisions[name][4:])
            assert not value[:4].any()
        else:
            assert torch.equal(value, torchvisions[name]), name
    # names of torchvision before 0.13 are read too
    old = {re.sub(r"(_blocks\.\d|head\.conv)(\.0)+\.(weight|bias)$", r"\1.\3", name): v for name, v in again.items()}
    assert old.keys() != again.keys()
    assert convert(old, "timm").keys() == ours.keys()


def test_a_detector_takes_detectron2s_names_and_back(torchvisions):
    ours = convert(torchvisions, "timm")
    theirs = convert(ours, "detectron2")
    assert detect_form(theirs) == "detectron2"
    assert "backbone.bottom_up.res5.1.conv2.norm.running_var" in theirs
    assert not any("bottom_up.model" in name for name in theirs)
    again = convert(theirs, "timm")
    # torchvision's frozen normalization keeps no batch counter
    counters = {name for name in again if name.endswith("num_batches_tracked")}
    assert again.keys() - counters == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_the_command_writes_another_form(cli, torchvisions, tmp_path, capsys):
    torch.save(torchvisions, tmp_path / "in.pth")
    assert cli("convert", "--weights", tmp_path / "in.pth", "--to", "detectron2", "--output", tmp_path / "o.pth") == 0
    assert "from torchvision to detectron2" in capsys.readouterr().out
    assert "backbone.bottom_up.stem.conv1.weight" in torch.load(tmp_path / "o.pth")["model"]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.conv2.weight", "res2.0.conv2.weight"),
        ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
        ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
        ("layer2.0.downsample.1.weight", "res3.0.shortcut.norm.weight"),
    ],
)
def test_names_of_a_resnet(name, target):
    assert RESNET[name] == target


def test_a_resnet_there_and_back_is_the_same_network():
    state = {key: value for key, value in resnet18(num_classes=2).state_dict().items() if not key.startswith("fc.")}
    again = resnet_from_detectron2(resnet_to_detectron2(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_another_epsilon_goes_into_the_variance():
    state = {"bn1.running_var": torch.tensor([0.5, 2.0])}
    moved = resnet_to_detectron2(state, eps=1e-3)["stem.conv1.norm.running_var"]
    torch.testing.assert_close(moved + 1e-5, state["bn1.running_var"] + 1e-3)


@pytest.mark.parametrize(
    ("build", "depth", "groups", "width", "channels"),
    [(resnet18, 18, 1, 64, 64), (resnet50, 50, 1, 64, 256), (resnext50_32x4d, 50, 32, 4, 256)],
)
def test_the_keys_are_read_off_the_weights(build, depth, groups, width, channels):
    keys = resnet_keys(build(num_classes=2).state_dict())
    assert keys["STEM_OUT_CHANNELS"] == 64
    assert (keys["DEPTH"], keys["NUM_GROUPS"]) == (depth, groups)
    assert (keys["WIDTH_PER_GROUP"], keys["RES2_OUT_CHANNELS"]) == (width, channels)


@pytest.mark.parametrize(
    ("refuse", "named"),
    [
        (lambda state: convert({**state, "roi_heads.mask_head.0.weight": torch.zeros(1)}, "timm"), "mask_head"),
        (lambda _: detect_form({"conv1.weight": torch.zeros(1)}), "conv1.weight"),
        (lambda _: convert({"backbone.bottom_up.model.conv_stem.weight": torch.zeros(1)}, "detectron2"), "conv_stem"),
        (lambda _: resnet_to_detectron2({"blocks.0.conv.weight": torch.zeros(1)}), r"blocks\.0\.conv"),
        (lambda _: resnet_keys(create_model("mobilenetv3_small_050", 3).state_dict()), "no conv1 and layer1"),
        (lambda _: resnet_keys(create_model("nst_resnet10_w32", 3).state_dict()), "basic blocks"),
        (lambda _: resnet_keys(create_model("resnet50d", 3).state_dict()), "build_timm_fpn_backbone"),
    ],
)
def test_other_networks_are_refused(torchvisions, refuse, named):
    with pytest.raises(UserError, match=named):
        refuse(torchvisions)
