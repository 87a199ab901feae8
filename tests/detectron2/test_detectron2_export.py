"""Backbone files in Detectron2's models and checkpointers, and Detectron2's own ResNet as the target of export."""

import logging

import pytest
import torch
import torchvision

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from nst_det.data.images import read_image
from nst_det.detection.data import network_input
from nst_det.detectron2 import add_config, parity
from nst_det.detectron2.checkpoint import BackboneCheckpointer
from nst_det.detectron2.config import load_config
from nst_det.detectron2.modeling import check_frozen_random
from nst_det.errors import UserError
from nst_det.exporting.agreement import partners
from nst_det.exporting.backbone import export_detectron2
from nst_det.exporting.runtime import load_exported
from nst_det.models import bottomup_from_file
from tests.helpers.hub import REPO, offline_cache, snapshot, weights

LEVELS = ["res2", "res3", "res4", "res5"]


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def timm_cfg(fpn=True, weights="later", arch="resnet18"):
    cfg = get_cfg()
    add_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.ARCH, cfg.INPUT.FORMAT = "cpu", weights, arch, "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NAME = 3, "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 16
    if fpn:
        cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
        cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = LEVELS, 16
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    else:
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.OUT_FEATURES = "build_timm_backbone", ["res4"]
    return cfg


def test_a_published_name_fills_the_bottom_up(tmp_path, monkeypatch):
    theirs = weights(snapshot(offline_cache(tmp_path, monkeypatch)) / "model.safetensors")
    model = build_model(timm_cfg(arch="test_resnet"))
    with pytest.raises(UserError, match=r"MODEL\.PIXEL_MEAN \[127\.5, 127\.5, 127\.5\]"):
        BackboneCheckpointer(model).load(REPO)
    model.pixel_mean.fill_(127.5)
    model.pixel_std.fill_(127.5)
    BackboneCheckpointer(model).load(REPO)
    for name, value in model.backbone.bottom_up.model.state_dict().items():
        assert torch.equal(value.cpu(), theirs.state_dict()[name])


def test_a_classifier_from_elsewhere_fills_the_bottom_up(tmp_path):
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = build_model(timm_cfg())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    BackboneCheckpointer(model).load(str(tmp_path / "theirs.pth"))
    for name, value in model.state_dict().items():
        below = name.startswith("backbone.bottom_up.model.")
        expected = theirs.state_dict()[name.removeprefix("backbone.bottom_up.model.")] if below else before[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(("name", "arch"), [("r18", "resnet18"), ("mobile", "mobilenetv3_small_050")])
@pytest.mark.parametrize("checkpointer", [BackboneCheckpointer, DetectionCheckpointer])
def test_the_file_fills_the_bottom_up(name, arch, checkpointer):
    model = build_model(timm_cfg(arch=arch))
    assert {key: (spec.channels, spec.stride) for key, spec in model.backbone.output_shape().items()} == {
        f"p{level}": (16, 2**level) for level in range(2, 7)
    }
    assert model.backbone.size_divisibility == 32
    checkpointer(model).load(f"backbone://{name}")
    images = noise(1, 3, 64, 96)
    with torch.no_grad():
        wanted = bottomup_from_file(f"backbone://{name}").eval()(images)
        got = model.eval().backbone.bottom_up(images)
    assert all(torch.equal(got[level], wanted[level]) for level in wanted)


def test_a_backbone_without_fpn():
    model = build_model(timm_cfg(fpn=False))
    shape = model.backbone.output_shape()
    assert list(shape) == ["res4"]
    assert (shape["res4"].channels, shape["res4"].stride) == (256, 16)
    # what res5 alone needs is not there
    assert not any("layer4" in name for name, _ in model.named_parameters())
    BackboneCheckpointer(model).load("backbone://r18")
    assert model.backbone(noise(1, 3, 70, 96))["res4"].shape == (1, 256, 5, 6)


@pytest.mark.parametrize(
    ("norm", "at", "trained_norms", "frozen_stages"),
    [("FrozenBN", 2, 0, ("conv1", "layer1")), ("BN", 0, 20, ()), ("BN", 3, 20 - 10, ("conv1", "layer1", "layer2"))],
)
def test_norm_policy_and_freeze_at(norm, at, trained_norms, frozen_stages):
    cfg = timm_cfg()
    cfg.MODEL.TIMM.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = norm, at
    bottom_up = build_model(cfg).train().backbone.bottom_up
    norms = [layer for layer in bottom_up.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert sum(layer.training for layer in norms) == trained_norms
    assert sum(layer.weight.requires_grad for layer in norms) == trained_norms
    frozen = {
        name.split(".")[1]
        for name, parameter in bottom_up.named_parameters()
        if name.endswith("weight") and parameter.ndim == 4 and not parameter.requires_grad
    }
    assert frozen == set(frozen_stages)


def test_weights_that_bring_nothing_for_frozen_layers(tmp_path):
    model = build_model(timm_cfg())
    heads = {key: value for key, value in model.state_dict().items() if key.startswith("roi_heads")}
    torch.save({"model": heads}, tmp_path / "heads.pth")
    BackboneCheckpointer(model).load(str(tmp_path / "heads.pth"))
    with pytest.raises(UserError, match="MODEL.WEIGHTS"):
        check_frozen_random(model)
    BackboneCheckpointer(model).load("backbone://r18")
    check_frozen_random(model)


@pytest.mark.parametrize(("name", "suffix"), [("r18", ".pkl"), ("r50", ".pkl"), ("r18", ".pth")])
def test_a_plain_detectron2_computes_the_same_maps(plain_detectron2, name, suffix, tmp_path):
    exported = export_detectron2(f"backbone://{name}", tmp_path / f"out{suffix}")
    assert float(exported.agreement.split()[0]) <= 1e-4
    images = noise(2, 3, 160, 224)
    seen = plain_detectron2(exported.files["config"], exported.files["weights"], images)
    assert seen["format"] == "RGB"
    assert [key for key in seen["missing"] if key.startswith("backbone.bottom_up")] == []
    assert any(key.startswith("backbone.fpn_") for key in seen["missing"])
    with torch.no_grad():
        wanted = bottomup_from_file(f"backbone://{name}").eval()(images)
    for level, map_ in wanted.items():
        torch.testing.assert_close(seen["maps"][level], map_, atol=1e-4, rtol=0)


def test_a_run_of_detectron2_finds_the_same_in_onnx(cli, whole, voc_root, tmp_path, capsys):
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    output = tmp_path / "detector.onnx"
    words = ["--format", "onnx", "--run", whole, "--output", output, "--images", voc_root / "JPEGImages"]
    assert cli("export", *words) == 0
    assert "compared  12 images" in capsys.readouterr().out
    # its own config, model and weights
    cfg = load_config(whole / "config.yaml")
    model, exported = parity.load_run(whole, cfg, torch.device("cpu")), load_exported(output)
    assert exported.contract.classes == ("bar", "square")
    count = 0
    for path in sorted((voc_root / "JPEGImages").iterdir())[:4]:
        pixels = read_image(path)
        item = {"image": network_input(pixels, cfg), "height": pixels.shape[0], "width": pixels.shape[1]}
        with torch.no_grad():
            (wanted,) = parity.detect(model, [item])
        (found,) = exported.find([pixels])
        pairs, alone = partners(
            [wanted[name].numpy() for name in ("boxes", "scores", "labels")], [found.boxes, found.scores, found.labels]
        )
        assert alone == []
        count += len(pairs)
    assert count > 20


def test_a_network_that_detectron2_can_not_build(tmp_path):
    with pytest.raises(UserError, match="build_timm_fpn_backbone"):
        export_detectron2("backbone://small", tmp_path / "x.pkl")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def resnet_cfg(tmp_path):
    """``resnet_cfg(name)``: of Detectron2's own ResNet, as it is exported with a backbone file."""

    def configure(name="r18"):
        cfg = get_cfg()
        cfg.merge_from_file(str(export_detectron2(f"backbone://{name}", tmp_path / f"{name}.pkl").files["config"]))
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
        return cfg

    return configure


def test_the_file_fills_detectron2s_resnet(resnet_cfg, caplog):
    exact, plain = build_model(resnet_cfg()), build_model(resnet_cfg())
    with caplog.at_level(logging.INFO):
        BackboneCheckpointer(exact).load("backbone://r18")
    assert "FPN (" in caplog.text
    assert "RoI heads (" in caplog.text
    # Detectron2's own class, which knows the scheme from its path manager
    DetectionCheckpointer(plain).load("backbone://r18")
    states = [model.backbone.bottom_up.state_dict() for model in (exact, plain)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    images = noise(1, 3, 64, 64)
    with torch.no_grad():
        wanted = bottomup_from_file("backbone://r18").eval()(images)
        got = exact.eval().backbone.bottom_up(images)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_a_resnet_without_fpn_takes_res5_into_its_heads(resnet_cfg):
    cfg = resnet_cfg("r50")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.OUT_FEATURES = "build_resnet_backbone", ["res4"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ANCHOR_GENERATOR.SIZES = "Res5ROIHeads", [[32]]
    model = build_model(cfg)
    BackboneCheckpointer(model).load("backbone://r50")
    wanted = bottomup_from_file("backbone://r50").state_dict()
    assert torch.equal(model.backbone.res4[5].conv3.weight, wanted["model.layer3.5.conv3.weight"])
    assert torch.equal(model.roi_heads.res5[2].conv3.weight, wanted["model.layer4.2.conv3.weight"])


def test_weights_that_do_not_fit(resnet_cfg, tmp_path):
    with pytest.raises(UserError, match="resnet50, the model is resnet18"):
        BackboneCheckpointer(build_model(timm_cfg())).load("backbone://r50")
    with pytest.raises(UserError, match="r50.safetensors.* MODEL.RESNETS"):
        BackboneCheckpointer(build_model(resnet_cfg())).load("backbone://r50")
    model = build_model(timm_cfg())
    part = {key: value for key, value in model.state_dict().items() if "layer3" not in key}
    torch.save({"model": part}, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"layer3\.0\.conv1\.weight"):
        DetectionCheckpointer(model).load(str(tmp_path / "part.pth"))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("r18", "INPUT.FORMAT", "BGR"),
        ("r18", "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
        ("r50", "MODEL.RESNETS.STRIDE_IN_1X1", True),
    ],
)
def test_a_config_that_gives_it_other_pixels_or_strides(resnet_cfg, name, key, value):
    cfg = resnet_cfg(name)
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=f"{name}.safetensors.*{key}"):
        BackboneCheckpointer(build_model(cfg)).load(f"backbone://{name}")
