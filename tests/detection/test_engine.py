import copy

import pytest
import torch
import torch.nn.functional as F

from nst_det.detection.torchvision import build_detector
from nst_det.detection.torchvision.backbone import Shape
from nst_det.detection.torchvision.roi_heads import RoiHeads
from nst_det.errors import UserError

LEVELS = {"p2": Shape(channels=16, stride=4)}


def test_names_in_the_state_dict_are_detectron2s(talkative):
    names = set(talkative().state_dict())
    assert {
        "backbone.bottom_up.model.conv1.weight",
        "backbone.fpn_lateral2.weight",
        "backbone.fpn_output5.bias",
        "proposal_generator.rpn_head.conv.weight",
        "proposal_generator.rpn_head.objectness_logits.bias",
        "proposal_generator.rpn_head.anchor_deltas.weight",
        "roi_heads.box_head.fc1.weight",
        "roi_heads.box_head.fc2.bias",
        "roi_heads.box_predictor.cls_score.weight",
        "roi_heads.box_predictor.bbox_pred.weight",
    } <= names
    assert not any("anchors" in name or "pixel" in name for name in names)


def test_class_rows(talkative):
    predictor = talkative().roi_heads.box_predictor
    assert predictor.cls_score.weight.shape == (4, 32)
    assert predictor.bbox_pred.weight.shape == (12, 32)
    agnostic = talkative({"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}).roi_heads.box_predictor
    assert agnostic.bbox_pred.weight.shape == (4, 32)


def test_preprocess_normalizes_and_pads_right_and_below(talkative, batch):
    pixels, sizes = talkative().preprocess([item["image"] for item in batch])
    assert sizes == [(70, 96), (96, 81), (64, 64)]
    assert pixels.shape == (3, 3, 96, 96)
    expected = (batch[0]["image"][1, 5, 7].double() - 116.28) / 57.12
    assert float(pixels[0, 1, 5, 7]) == pytest.approx(float(expected), abs=1e-6)
    assert (pixels[0, :, 70:] == 0).all()
    assert (pixels[2, :, :, 64:] == 0).all()


def test_pyramid_is_the_sum_from_above(talkative, batch):
    detector = talkative().eval()
    pixels, _ = detector.preprocess([batch[0]["image"]])
    fpn = detector.backbone
    maps, below = fpn(pixels), fpn.bottom_up(pixels)
    assert {name: tuple(map_.shape[1:]) for name, map_ in maps.items()} == {
        "p2": (16, 24, 24), "p3": (16, 12, 12), "p4": (16, 6, 6), "p5": (16, 3, 3), "p6": (16, 2, 2),
    }  # fmt: skip
    top = fpn.fpn_lateral5(below["res5"])
    assert torch.equal(maps["p5"], fpn.fpn_output5(top))
    assert torch.equal(maps["p6"], maps["p5"][:, :, ::2, ::2])
    next_ = fpn.fpn_lateral4(below["res4"]) + top.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(maps["p4"], fpn.fpn_output4(next_), atol=1e-6)


def test_losses_and_gradients(talkative, batch):
    detector = talkative().train()
    torch.manual_seed(0)
    losses = detector(batch)
    assert list(losses) == ["loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"]
    assert all(value.ndim == 0 and value.isfinite() and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    without = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
    assert without == []


def test_a_batch_without_objects_trains_all_parameters(talkative, batch):
    detector = talkative().train()
    losses = detector([batch[2]])
    assert float(losses["loss_box_reg"]) == float(losses["loss_rpn_loc"]) == 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())


def test_detections(talkative, batch):
    detector = talkative({"TEST.DETECTIONS_PER_IMAGE": 20, "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.3}).eval()
    with torch.no_grad():
        for item, found in zip(batch, detector(batch)):
            boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
            assert 0 < len(boxes) <= 20
            assert (scores[:-1] >= scores[1:]).all()
            assert (scores > 0.01).all()
            assert ((labels >= 0) & (labels < 3)).all()
            # in the original image, which is twice as large
            assert (boxes >= 0).all()
            assert (boxes[:, 2] <= item["width"]).all()
            assert (boxes[:, 3] <= item["height"]).all()
            assert float(boxes[:, 2].max()) > item["image"].shape[-1]


def test_no_proposal_at_all_is_no_detection(talkative, batch):
    detector = talkative({"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 1000}).eval()
    with torch.no_grad():
        assert [len(found["boxes"]) for found in detector(batch)] == [0, 0, 0]
    assert all(value.isfinite() for value in detector.train()(batch).values())


def test_an_image_is_detected_alike_alone_and_in_a_batch(talkative, batch):
    detector = talkative().eval()
    same_size = [batch[0], {**batch[0], "image": batch[0]["image"].flip(-1)}]
    with torch.no_grad():
        alone, together = detector(same_size[:1])[0], detector(same_size)[0]
    assert torch.allclose(alone["boxes"], together["boxes"], atol=1e-3)
    assert torch.allclose(alone["scores"], together["scores"], atol=1e-5)


def test_detectors_of_one_seed_share_heads_whatever_the_backbone(small):
    one = build_detector(small(), seed=3).state_dict()
    other = build_detector(small({"MODEL.TIMM.ARCH": "nst_resnet18_w48"}), seed=3).state_dict()
    shared = [name for name in one if "bottom_up" not in name and "lateral" not in name]
    assert len(shared) > 15
    assert all(torch.equal(one[name], other[name]) for name in shared)
    changed = build_detector(small(), seed=4).state_dict()
    assert not torch.equal(one["roi_heads.box_head.fc1.weight"], changed["roi_heads.box_head.fc1.weight"])
    again = build_detector(small(), seed=3).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_building_leaves_the_random_state_alone(small):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build_detector(small(), seed=3)
    assert torch.equal(torch.rand(1), expected)


def test_without_fpn_on_one_level(talkative, batch):
    detector = talkative(
        {
            "MODEL.BACKBONE.NAME": "build_timm_backbone",
            "MODEL.TIMM.OUT_FEATURES": ["res4"],
            "MODEL.RPN.IN_FEATURES": ["res4"],
            "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
            "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
        }
    )
    assert "backbone.model.conv1.weight" in detector.state_dict()
    assert not any("layer4" in name for name in detector.state_dict())
    # nothing asks for padding to a multiple
    assert detector.preprocess([batch[1]["image"]])[0].shape[-2:] == (96, 81)
    losses = detector.train()(batch)
    assert all(value.isfinite() for value in losses.values())
    with torch.no_grad():
        assert len(detector.eval()(batch)) == 3


def test_mixed_precision_stays_out_of_the_heads_and_of_inference(talkative, batch):
    detector = talkative()
    plain, mixed = detector, copy.deepcopy(detector)
    mixed.amp = torch.bfloat16
    torch.manual_seed(0)
    first = plain.train()(batch)
    torch.manual_seed(0)
    second = mixed.train()(batch)
    assert all(value.dtype == torch.float32 for value in second.values())
    assert float(first["loss_rpn_cls"]) != float(second["loss_rpn_cls"])
    assert float(first["loss_rpn_cls"]) == pytest.approx(float(second["loss_rpn_cls"]), rel=0.05)
    # training moved the batch statistics of the two apart
    mixed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(batch)[0]["boxes"], mixed.eval()(batch)[0]["boxes"])


@pytest.mark.parametrize("changes", [{"MODEL.BACKBONE.FREEZE_AT": 2}, {"MODEL.TIMM.NORM": "FrozenBN"}])
def test_frozen_random_layers_are_refused_with_what_to_set(small, changes):
    config = small(changes)
    detector = build_detector(config)
    with pytest.raises(UserError, match=r"random weights.*set MODEL.BACKBONE.FREEZE_AT 0 and MODEL.TIMM.NORM BN"):
        detector.freeze(config.MODEL.BACKBONE.FREEZE_AT, config.MODEL.TIMM.NORM)


def test_freezing(small):
    detector = build_detector(small())
    detector.backbone.bottom_up.loaded = True
    detector.freeze(2, "FrozenBN")
    trainable = {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert not any("model.conv1" in name or "layer1" in name or ".bn" in name for name in trainable)
    assert "backbone.bottom_up.model.layer2.0.conv1.weight" in trainable
    detector.train()
    assert not detector.backbone.bottom_up.model.bn1.training
    assert detector.roi_heads.training


def test_unknown_architecture_is_one_line(small):
    with pytest.raises(UserError, match="MODEL.TIMM: unknown architecture 'resnet_18'"):
        build_detector(small({"MODEL.TIMM.ARCH": "resnet_18"}))


@pytest.fixture
def roi_heads(small):
    """RoI heads on one level, of two classes."""

    def build(**changes):
        settings = {
            "MODEL.ROI_HEADS.NUM_CLASSES": 2, "MODEL.ROI_HEADS.IN_FEATURES": ["p2"],
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64, "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 2.0,
        }  # fmt: skip
        return RoiHeads(small(settings | {f"MODEL.ROI_HEADS.{key}": value for key, value in changes.items()}), LEVELS)

    return build


def test_box_losses_by_hand(roi_heads):
    heads = roi_heads()
    logits = torch.tensor([[2.0, 0, 0], [0, 0, 0], [0, 0, 3.0]])
    deltas = torch.arange(24.0).reshape(3, 8) / 10
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 20], [5, 5, 9, 9]])
    targets = torch.tensor([[0.0, 0, 20, 10], [2, 0, 22, 20], [5, 5, 9, 9]])
    labels = torch.tensor([0, 1, 2])
    losses = heads.losses(logits, deltas, boxes, targets, labels)
    expected = F.cross_entropy(logits.double(), labels)
    assert float(losses["loss_cls"]) == pytest.approx(float(expected))
    # first: center moves by 5 of 10 pixels, width doubles; class 0's row. second: center moves by 2 of 20; class 1's
    log2 = 0.6931471805599453
    first = abs(0 - 5) + abs(0.1 - 0) + abs(0.2 - 5 * log2) + 0.3
    second = abs(1.2 - 1) + 1.3 + 1.4 + 1.5
    # summed over objects, divided by all three RoIs, times the weight
    assert float(losses["loss_box_reg"]) == pytest.approx(2 * (first + second) / 3, rel=1e-6)


def test_no_roi_at_all_gives_zero_not_nan(roi_heads):
    losses = roi_heads().losses(
        torch.zeros(0, 3), torch.zeros(0, 8), torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    )
    assert [float(value) for value in losses.values()] == [0, 0]


def test_rois_are_sampled_with_their_objects(roi_heads):
    heads = roi_heads()
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    proposals = torch.tensor([[0.0, 0, 10, 9], [20, 20, 30, 30], [21, 20, 40, 40]])
    rois, targets, labels = heads.sample_proposals(proposals, truth, torch.tensor([1, 0]))
    by_roi = {
        tuple(roi): (tuple(target), label)
        for roi, target, label in zip(rois.tolist(), targets.tolist(), labels.tolist())
    }
    assert len(by_roi) == 5
    assert by_roi[0, 0, 10, 9] == ((0, 0, 10, 10), 1)
    assert by_roi[21, 20, 40, 40] == ((20, 20, 40, 40), 0)
    # IoU 0.25: background, which is the last class
    assert by_roi[20, 20, 30, 30][1] == 2
    # the objects themselves are proposals too
    assert by_roi[20, 20, 40, 40] == ((20, 20, 40, 40), 0)
    assert len(roi_heads(PROPOSAL_APPEND_GT=False).sample_proposals(proposals, truth, torch.tensor([1, 0]))[0]) == 3


def test_rpn_losses_by_hand(talkative):
    rpn = talkative({"MODEL.RPN.BATCH_SIZE_PER_IMAGE": 4}).proposal_generator
    anchors = [torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 6], [50, 50, 60, 60]])]
    logits = [torch.tensor([[1.0, -2.0, 0.5, 3.0]])]
    deltas = [torch.full((1, 4, 4), 0.25)]
    truth = [torch.tensor([[0.0, 0, 10, 10]])]
    losses = rpn.losses(anchors, logits, deltas, [(64, 64)], truth)
    # the first is an object, the third (IoU 0.6) is ignored, two are background
    objectness = sum(float(F.softplus(torch.tensor(x, dtype=torch.float64))) for x in (-1.0, -2.0, 3.0))
    assert float(losses["loss_rpn_cls"]) == pytest.approx(objectness / 4, rel=1e-6)
    assert float(losses["loss_rpn_loc"]) == pytest.approx(4 * 0.25 / 4)


def test_diverged_proposals_are_one_line(talkative, batch):
    detector = talkative().train()
    with torch.no_grad():
        detector.proposal_generator.rpn_head.anchor_deltas.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        detector(batch)
