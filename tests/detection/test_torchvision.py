"""The torchvision engine's parts by hand, and the detector that is made of them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from nst_det.detection.pipeline import place_detector
from nst_det.detection.torchvision import build_detector
from nst_det.detection.torchvision.box_coder import Anchors, BoxCoder, cell_anchors, clip, larger_than, smooth_l1
from nst_det.detection.torchvision.pooler import Pooler, roi_align_by_rows
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
    deltas = coder.encode(target, box)
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
    assert smooth_l1(predicted, target, 0.0).tolist() == pytest.approx([0.05, 2.0])
    # below beta x^2 / (2 beta), above it x - beta / 2
    assert smooth_l1(predicted, target, 0.1).tolist() == pytest.approx([0.05**2 / 0.2, 2.0 - 0.05])


def test_clip_and_size():
    boxes = clip(torch.tensor([[-5.0, 2, 50, 9], [12, 3, 40, 4]]), torch.tensor([10.0, 8, 10, 8]))
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


@pytest.mark.parametrize("given", ["counted by the pooler", "counted before"])
def test_every_box_is_pooled_on_its_own_level_in_its_own_place(given):
    torch.manual_seed(0)
    maps = [torch.randn(3, 2, 64 // 2**level, 64 // 2**level, requires_grad=True) for level in range(4)]
    corners = torch.rand(3, 9, 2) * 100
    boxes = torch.cat((corners, corners + 2 ** (torch.rand(3, 9, 2) * 7)), dim=-1)
    pooler, lengths = Pooler([4, 8, 16, 32], 3, 2, canonical_size=32), (9, 0, 4)
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    counts = pooler.count(boxes, valid)
    assert [sum(of_image) for of_image in counts] == list(lengths)
    lists = [rows[:count] for rows, count in zip(boxes, lengths)]
    pooled = pooler(maps, lists, *([counts] if given == "counted before" else []))
    expected, levels = [], set()
    for image, rows in enumerate(lists):
        for box in rows:
            level = int(pooler.levels(box))
            levels.add(level)
            one = maps[level][image : image + 1]
            expected.append(roi_align(one, [box[None]], 3, 0.25 / 2**level, 2, True)[0])
    assert levels == {0, 1, 2, 3}
    assert torch.allclose(pooled, torch.stack(expected), atol=1e-6)
    weights = torch.randn(pooled.shape)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), maps) for x in (pooled, torch.stack(expected)))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(mine, theirs))


@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_roi_align_by_rows_is_torchvisions(sampling_ratio, aligned, layout):
    torch.manual_seed(0)
    map_ = torch.randn(2, 5, 13, 17, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    corners = torch.rand(40, 2, dtype=torch.float64) * 80 - 12
    boxes = torch.cat((corners, corners + torch.rand(40, 2) ** 3 * 90), dim=1)
    # beside the map, of no size, of the whole map, along its edges
    boxes[:5] = torch.tensor([[900.0, 0, 950, 10], [20, 20, 20, 20], [0, 0, 68, 52], [-9, -9, 1, 60], [60, 40, 68, 52]])
    rois = torch.cat((torch.randint(0, 2, (40, 1)), boxes), dim=1)
    found, expected = (
        function(map_, rois, 3, 0.25, sampling_ratio, aligned) for function in (roi_align_by_rows, roi_align)
    )
    assert torch.allclose(found, expected, atol=1e-12)
    assert (found[0] == 0).all()
    weights = torch.randn(found.shape, dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), map_)[0] for x in (found, expected))
    assert torch.allclose(mine, theirs, atol=1e-12)
    assert roi_align_by_rows(map_, rois[:0], 3, 0.25, sampling_ratio, aligned).shape == (0, 5, 3, 3)


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


def test_mixed_precision_ends_before_boxes_and_losses(talkative, batch):
    detector, seen = talkative(), []
    plain, mixed = detector, copy.deepcopy(detector)
    mixed.amp = torch.bfloat16
    torch.manual_seed(0)
    first = plain.train()(batch)
    torch.manual_seed(0)
    for layer in (mixed.proposal_generator.rpn_head.conv, mixed.roi_heads.box_predictor.cls_score):
        layer.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    second = mixed.train()(batch)
    assert set(seen) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in second.values())
    assert float(first["loss_rpn_cls"]) != float(second["loss_rpn_cls"])
    assert float(first["loss_rpn_cls"]) == pytest.approx(float(second["loss_rpn_cls"]), rel=0.05)
    # training moved the batch statistics of the two apart
    mixed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = plain.eval()(batch)[0]
        assert torch.equal(expected["boxes"], mixed.eval()(batch)[0]["boxes"])
        mixed.test_amp = torch.bfloat16
        found = mixed(batch)[0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert float((found["scores"][0] - expected["scores"][0]).abs()) == pytest.approx(0, abs=0.05)
    assert not torch.equal(found["scores"], expected["scores"])


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
