import pytest
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from nst_det.cli import main
from nst_det.detectron2.convert import convert, detect_form
from nst_det.errors import UserError


def torchvision_detector():
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return FasterRCNN(backbone, num_classes=4)


def test_torchvisions_faster_rcnn_there_and_back():
    state = torchvision_detector().state_dict()
    ours = convert(state, "timm")
    assert detect_form(ours) == "timm"
    assert ours["roi_heads.box_predictor.cls_score.weight"].shape == (4, 1024)
    # background is the first of torchvision's classes and the last of ours
    scores = state["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(ours["roi_heads.box_predictor.cls_score.bias"], torch.cat((scores[1:], scores[:1])))
    assert ours["roi_heads.box_predictor.bbox_pred.weight"].shape == (12, 1024)
    assert torch.equal(ours["backbone.fpn_lateral2.weight"], state["backbone.fpn.inner_blocks.0.0.weight"])
    again = convert(ours, "torchvision")
    assert again.keys() == state.keys()
    for name, value in again.items():
        if name.startswith("roi_heads.box_predictor.bbox_pred"):
            assert torch.equal(value[4:], state[name][4:])
            assert not value[:4].any()
        else:
            assert torch.equal(value, state[name]), name


def test_a_resnet_takes_detectron2s_names_and_back():
    ours = convert(torchvision_detector().state_dict(), "timm")
    theirs = convert(ours, "detectron2")
    assert detect_form(theirs) == "detectron2"
    assert "backbone.bottom_up.res5.1.conv2.norm.running_var" in theirs
    assert not any("bottom_up.model" in name for name in theirs)
    again = convert(theirs, "timm")
    # torchvision's frozen normalization keeps no batch counter
    counters = {name for name in again if name.endswith("num_batches_tracked")}
    assert again.keys() - counters == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_what_has_no_place_is_refused():
    state = torchvision_detector().state_dict()
    with pytest.raises(UserError, match="mask_head"):
        convert({**state, "roi_heads.mask_head.0.0.weight": torch.zeros(1)}, "timm")
    with pytest.raises(UserError, match="not the weights of a detector"):
        detect_form({"conv1.weight": torch.zeros(1)})
    mobile = {"backbone.bottom_up.model.conv_stem.weight": torch.zeros(16, 3, 3, 3)}
    with pytest.raises(UserError, match="conv_stem"):
        convert(mobile, "detectron2")


def test_the_command_writes_and_says_what(tmp_path, capsys):
    torch.save(torchvision_detector().state_dict(), tmp_path / "in.pth")
    with pytest.raises(SystemExit) as left:
        main(
            [
                "convert",
                "--weights",
                str(tmp_path / "in.pth"),
                "--to",
                "detectron2",
                "--output",
                str(tmp_path / "out.pth"),
            ]
        )
    assert left.value.code == 0
    assert "from torchvision to detectron2" in capsys.readouterr().out
    written = torch.load(tmp_path / "out.pth")["model"]
    assert "backbone.bottom_up.stem.conv1.weight" in written
