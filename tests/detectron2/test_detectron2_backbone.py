import pytest
import torch

detectron2 = pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from torch import nn  # noqa: E402

from nst_det.detectron2 import add_config  # noqa: E402
from nst_det.detectron2.checkpoint import BackboneCheckpointer  # noqa: E402
from nst_det.detectron2.modeling import check_frozen_random  # noqa: E402
from nst_det.errors import UserError  # noqa: E402
from nst_det.models import bottomup_from_file  # noqa: E402


def timm_cfg(fpn=True, weights="later"):
    from detectron2.config import get_cfg

    cfg = get_cfg()
    add_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = weights
    cfg.MODEL.TIMM.ARCH = "resnet18"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    if fpn:
        cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 16
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    else:
        cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
        cfg.MODEL.TIMM.OUT_FEATURES = ["res4"]
    return cfg


@pytest.mark.parametrize(("name", "arch"), [("r18", "resnet18"), ("mobile", "mobilenetv3_small_050")])
def test_with_fpn_the_file_fills_the_bottom_up(name, arch):
    cfg = timm_cfg()
    cfg.MODEL.TIMM.ARCH = arch
    model = build_model(cfg)
    assert {key: (spec.channels, spec.stride) for key, spec in model.backbone.output_shape().items()} == {
        f"p{level}": (16, 2**level) for level in range(2, 7)
    }
    assert model.backbone.size_divisibility == 32
    BackboneCheckpointer(model).load(f"backbone://{name}")
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = bottomup_from_file(f"backbone://{name}").eval()(images)
        got = model.eval().backbone.bottom_up(images)
    assert all(torch.equal(got[level], wanted[level]) for level in wanted)


def test_alone_it_gives_its_levels_with_their_strides():
    model = build_model(timm_cfg(fpn=False))
    shape = model.backbone.output_shape()
    assert list(shape) == ["res4"]
    assert (shape["res4"].channels, shape["res4"].stride) == (256, 16)
    # what res5 alone needs is not there
    assert not any("layer4" in name for name, _ in model.named_parameters())
    BackboneCheckpointer(model).load("backbone://r18")
    images = torch.randn(1, 3, 70, 96)
    assert model.backbone(images)["res4"].shape == (1, 256, 5, 6)


def test_detectron2s_own_checkpointer_reads_the_scheme():
    model = build_model(timm_cfg())
    DetectionCheckpointer(model).load("backbone://r18")
    wanted = bottomup_from_file("backbone://r18").state_dict()
    got = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted if not key.endswith("num_batches_tracked"))


def test_other_weights_are_refused_in_either_checkpointer(tmp_path):
    with pytest.raises(UserError, match="holds resnet50, the model is resnet18"):
        BackboneCheckpointer(build_model(timm_cfg())).load("backbone://r50")
    model = build_model(timm_cfg())
    part = {key: value for key, value in model.state_dict().items() if "layer3" not in key}
    torch.save({"model": part}, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"layer3\.0\.conv1\.weight"):
        DetectionCheckpointer(build_model(timm_cfg())).load(str(tmp_path / "part.pth"))


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


def test_frozen_and_random_is_refused():
    cfg = timm_cfg(weights="")
    cfg.MODEL.TIMM.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "FrozenBN", 0
    with pytest.raises(UserError, match="random weights"):
        build_model(cfg)
    cfg.MODEL.TIMM.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 2
    with pytest.raises(UserError, match="random weights"):
        build_model(cfg)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    build_model(cfg)


def test_weights_that_bring_nothing_for_frozen_layers_are_refused(tmp_path):
    model = build_model(timm_cfg())
    heads = {key: value for key, value in model.state_dict().items() if key.startswith("roi_heads")}
    torch.save({"model": heads}, tmp_path / "heads.pth")
    BackboneCheckpointer(model).load(str(tmp_path / "heads.pth"))
    with pytest.raises(UserError, match="stay random"):
        check_frozen_random(model)
    BackboneCheckpointer(model).load("backbone://r18")
    check_frozen_random(model)


def test_wrong_words_are_named():
    cfg = timm_cfg()
    cfg.MODEL.TIMM.NORM = "LN"
    with pytest.raises(UserError, match="MODEL.TIMM.NORM"):
        build_model(cfg)
    cfg = timm_cfg()
    cfg.MODEL.TIMM.ARCH = "resnet1"
    with pytest.raises(UserError, match="unknown architecture"):
        build_model(cfg)
    cfg = timm_cfg()
    cfg.MODEL.TIMM.OUT_FEATURES = ["res3", "res4"]
    with pytest.raises(UserError, match="MODEL.FPN.IN_FEATURES"):
        build_model(cfg)
