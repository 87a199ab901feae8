"""The torchvision engine's parts by hand, and the detector that is made of them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nst_det.detection.pipeline import place_detector
from nst_det.detection.torchvision import build_detector
from nst_det.detection.torchvision.backbone import Shape
from nst_det.detection.torchvision.box_coder import (
    Anchors,
    BoxCoder,
    cell_anchors,
    clip,
    larger_than,
    match,
    sample,
    smooth_l1_sum,
)
from nst_det.detection.torchvision.roi_heads import Instances, Pooler, RoiHeads, postprocess
from nst_det.engine.nan_guard import NotFinite
from nst_det.errors import UserError


def test_anchors():
    # size 24, height/width 0.5: width 24 * sqrt(2), height half of it, not rounded
    (x0, y0, x1, y1), square = cell_anchors([24], [0.5, 1.0]).tolist()
    assert (x1 - x0, y1 - y0) == pytest.approx((33.941125, 16.970563), abs=1e-5)
    assert square == [-12, -12, 12, 12]
    # a 160 pixel image has 3 x 3 cells on p6: the image divided by the map would give 53, the stride is 64
    fine, coarse = Anchors([[12], [96]], [[1.0]], [4, 64])([torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 3, 3)])
    assert fine.shape == (1600, 4)
    assert coarse[[0, 1, 3]].tolist() == [[-48, -48, 48, 48], [16, -48, 112, 48], [-48, 16, 48, 112]]
    (level,) = Anchors([[2]], [[1.0]], strides=[16], offset=0.5)([torch.zeros(1, 1, 1, 2)])
    assert level.tolist() == [[7, 7, 9, 9], [23, 7, 25, 9]]
    with pytest.raises(ValueError, match="as many anchors a cell"):
        Anchors([[8], [8, 16]], [[1.0]], strides=[4, 8])


def test_box_coding():
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    box, target = torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([[15.0, 20.0, 25.0, 100.0]])
    deltas = coder.encode_single(target, box)
    # center stays at x = 20, moves from y = 40 to 60: half the height; width halves, height doubles
    assert deltas.tolist()[0] == pytest.approx([0, 5, -5 * math.log(2), 5 * math.log(2)])
    assert coder.decode_rows(deltas, box).tolist()[0] == pytest.approx(target.tolist()[0])
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    # growth is limited
    (x0, _, x1, _) = coder.decode_rows(torch.tensor([[0.0, 0, 100, 0]]), torch.tensor([[0.0, 0, 16, 16]]))[0].tolist()
    assert x1 - x0 == pytest.approx(1000)
    # a batch, and several classes
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 8, 8]]])
    deltas = torch.tensor([[[0.0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]]])
    assert coder.decode_rows(deltas, boxes)[0].tolist() == [[0, 0, 4, 4, 4, 0, 8, 4], [0, 0, 8, 8, 0, 8, 8, 16]]


def test_smooth_l1():
    predicted, target = torch.tensor([0.0, 0.0]), torch.tensor([0.05, 2.0])
    assert float(smooth_l1_sum(predicted, target, 0.0)) == pytest.approx(2.05)
    # below beta x^2 / (2 beta), above it x - beta / 2
    assert float(smooth_l1_sum(predicted, target, 0.1)) == pytest.approx(0.05**2 / 0.2 + 2.0 - 0.05)


LEVELS = {"p2": Shape(channels=16, stride=4)}
TRUTH = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
# IoU with the first: 1, 0.5, 0.2, 0; with the second: 0, 0, 0, 0.35
CANDIDATES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 10], [0, 0, 2, 10], [20, 0, 23.5, 10]])


def test_match():
    index, label = match(TRUTH, CANDIDATES, [0.3, 0.7], (0, -1, 1), low_quality=False)
    assert index.tolist() == [0, 0, 0, 1]
    assert label.tolist() == [1, -1, 0, -1]
    # every object keeps its best candidate
    assert match(TRUTH, CANDIDATES, [0.3, 0.7], (0, -1, 1), low_quality=True)[1].tolist() == [1, -1, 0, 1]
    # a bound belongs to the label above it
    assert match(TRUTH, CANDIDATES, [0.5], (0, 1), low_quality=False)[1].tolist() == [1, 1, 0, 0]
    index, label = match(torch.zeros(0, 4), CANDIDATES, [0.3, 0.7], (0, -1, 1), low_quality=True)
    assert index.tolist() == label.tolist() == [0, 0, 0, 0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([-1, 0, 1, 2]), max_size=40),
    st.integers(1, 20),
    st.floats(0, 1),
)
def test_sample_takes_what_it_may(labels, count, fraction):
    label = torch.tensor(labels, dtype=torch.int64)
    positive, negative = sample(label, 0, count, fraction)
    objects, background = sum(x > 0 for x in labels), labels.count(0)
    assert len(positive) == min(objects, int(count * fraction))
    assert len(negative) == min(background, count - len(positive))
    assert (label[positive] > 0).all()
    assert (label[negative] == 0).all()
    assert len(set(positive.tolist())) == len(positive)


def test_clip_and_size():
    boxes = clip(torch.tensor([[-5.0, 2, 50, 9], [12, 3, 40, 4]]), (8, 10))
    assert boxes.tolist() == [[0, 2, 10, 8], [10, 3, 10, 4]]
    assert larger_than(boxes, 0).tolist() == [True, False]
    assert larger_than(torch.tensor([[0.0, 0, 3, 4]]), 3).tolist() == [False]


def test_pooling():
    pooler = Pooler([4, 8, 16, 32], 7, 2)
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0])
    boxes = torch.stack((torch.zeros(8), torch.zeros(8), sides, sides), dim=1)
    assert pooler.levels(boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    shifted = Pooler([4, 8, 16, 32], 7, 2, canonical_size=56, canonical_level=3)
    assert shifted.levels(boxes).tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    # on a map that grows by 1 a cell, aligned RoIAlign gives the coordinate of a bin's center, exactly
    ramp = torch.arange(20.0).expand(1, 1, 20, 20)
    pooled = Pooler([4], 2, 1)([ramp], [torch.tensor([[8.0, 8, 40, 40]])])
    # bins of 16 pixels centered at 16 and 32: cells 4 and 8, less the half cell that alignment takes off
    assert pooled[0, 0, 0].tolist() == pytest.approx([3.5, 7.5])


def test_postprocess_scales_clips_and_drops_empty_boxes():
    found = Instances(torch.tensor([[0.0, 0, 10, 5], [10, 0, 12, 5]]), torch.tensor([0.9, 0.8]), torch.tensor([1, 0]))
    boxes, scores, labels = postprocess(found, seen=(5, 10), size=(10, 30))
    assert boxes.tolist() == [[0, 0, 30, 10]]
    assert (scores.tolist(), labels.tolist()) == (pytest.approx([0.9]), [1])


def test_names_and_shapes_in_the_state_dict_are_detectron2s(talkative):
    state = talkative().state_dict()
    assert {
        "backbone.bottom_up.model.conv1.weight",
        "backbone.fpn_lateral2.weight",
        "backbone.fpn_output5.bias",
        "proposal_generator.rpn_head.conv.weight",
        "proposal_generator.rpn_head.objectness_logits.bias",
        "proposal_generator.rpn_head.anchor_deltas.weight",
        "roi_heads.box_head.fc1.weight",
        "roi_heads.box_head.fc2.bias",
    } <= set(state)
    assert state["roi_heads.box_predictor.cls_score.weight"].shape == (4, 32)
    assert state["roi_heads.box_predictor.bbox_pred.weight"].shape == (12, 32)
    assert not any("anchors" in name or "pixel" in name for name in state)


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
    # the last image has no object
    for images in (batch, batch[2:]):
        losses = detector(images)
        assert list(losses) == ["loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"]
        assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
        detector.zero_grad()
        sum(losses.values()).backward()
        assert all(parameter.grad is not None for parameter in detector.parameters())
    assert float(losses["loss_box_reg"].detach()) == float(losses["loss_rpn_loc"].detach()) == 0
    with torch.no_grad():
        detector.proposal_generator.rpn_head.anchor_deltas.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match="RPN's proposals"):
        detector(batch)


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


@pytest.mark.parametrize(("keys", "kind"), [({}, torch.float32), ({"TEST.AMP": True}, torch.bfloat16)])
def test_inference_has_the_precision_of_its_key(talkative, small, batch, keys, kind):
    detector, kinds = talkative(), []
    place_detector(detector, small({"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "bf16", **keys}))
    detector.backbone.register_forward_hook(lambda _, __, maps: kinds.append(maps["p2"].dtype))
    with torch.no_grad():
        found = detector.eval()(batch)[0]
    assert kinds == [kind]
    assert found["boxes"].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"MODEL.BACKBONE.FREEZE_AT": 2}, "MODEL.WEIGHTS is empty.*MODEL.BACKBONE.FREEZE_AT 0"),
        ({"MODEL.TIMM.NORM": "FrozenBN"}, "MODEL.WEIGHTS is empty.*MODEL.TIMM.NORM BN"),
        ({"MODEL.TIMM.ARCH": "resnet_18"}, "MODEL.TIMM.*'resnet_18'"),
        ({"MODEL.ROI_HEADS.NUM_CLASSES": 0}, "MODEL.ROI_HEADS.NUM_CLASSES"),
        ({"MODEL.ROI_BOX_HEAD.NUM_FC": 0}, "MODEL.ROI_BOX_HEAD.*NUM_FC"),
    ],
)
def test_what_cant_be_built_is_one_line(small, changes, named):
    config = small(changes)
    with pytest.raises(UserError, match=named):
        build_detector(config).freeze(config.MODEL.BACKBONE.FREEZE_AT, config.MODEL.TIMM.NORM)


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
    # no RoI at all gives 0, not NaN
    nothing = heads.losses(*(values[:0] for values in (logits, deltas, boxes, targets, labels)))
    assert [float(value) for value in nothing.values()] == [0, 0]


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
