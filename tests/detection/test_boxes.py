import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from nst_det.detection.torchvision.roi_heads import Instances, Pooler, postprocess


def test_cell_anchors_are_not_rounded():
    # size 24, height/width 0.5: width 24 * sqrt(2), height half of it
    (x0, y0, x1, y1), square = cell_anchors([24], [0.5, 1.0]).tolist()
    assert x1 - x0 == pytest.approx(33.941125, abs=1e-5)
    assert y1 - y0 == pytest.approx(16.970563, abs=1e-5)
    assert square == [-12, -12, 12, 12]


def test_anchors_stand_on_the_levels_own_stride():
    # a 160 pixel image has 3 x 3 cells on p6: the image divided by the map would give 53, the stride is 64
    anchors = Anchors([[12], [96]], [[1.0]], strides=[4, 64])
    fine, coarse = anchors([torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 3, 3)])
    assert fine.shape == (1600, 4)
    assert coarse[0].tolist() == [-48, -48, 48, 48]
    assert coarse[1].tolist() == [16, -48, 112, 48]
    assert coarse[3].tolist() == [-48, 16, 48, 112]


def test_anchor_offset():
    (level,) = Anchors([[2]], [[1.0]], strides=[16], offset=0.5)([torch.zeros(1, 1, 1, 2)])
    assert level.tolist() == [[7, 7, 9, 9], [23, 7, 25, 9]]


def test_levels_need_equally_many_anchors():
    with pytest.raises(ValueError, match="as many anchors a cell"):
        Anchors([[8], [8, 16]], [[1.0]], strides=[4, 8])


def test_box_coding_by_hand():
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    box, target = torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([[15.0, 20.0, 25.0, 100.0]])
    deltas = coder.encode_single(target, box)
    # center stays at x = 20, moves from y = 40 to 60: half the height; width halves, height doubles
    assert deltas.tolist()[0] == pytest.approx([0, 5, -5 * math.log(2), 5 * math.log(2)])
    assert coder.decode_rows(deltas, box).tolist()[0] == pytest.approx(target.tolist()[0])


def test_decoding_limits_growth():
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    (x0, _, x1, _) = coder.decode_rows(torch.tensor([[0.0, 0, 100, 0]]), torch.tensor([[0.0, 0, 16, 16]]))[0].tolist()
    assert x1 - x0 == pytest.approx(1000)


def test_decode_rows_takes_a_batch_and_several_classes():
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 8, 8]]])
    deltas = torch.tensor([[[0.0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]]])
    decoded = coder.decode_rows(deltas, boxes)
    assert decoded[0, 0].tolist() == [0, 0, 4, 4, 4, 0, 8, 4]
    assert decoded[0, 1].tolist() == [0, 0, 8, 8, 0, 8, 8, 16]


def test_smooth_l1():
    predicted, target = torch.tensor([0.0, 0.0]), torch.tensor([0.05, 2.0])
    assert float(smooth_l1_sum(predicted, target, 0.0)) == pytest.approx(2.05)
    # below beta x^2 / (2 beta), above it x - beta / 2
    assert float(smooth_l1_sum(predicted, target, 0.1)) == pytest.approx(0.05**2 / 0.2 + 2.0 - 0.05)


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


def test_match_without_objects():
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


def test_boxes_go_to_the_level_of_their_size():
    pooler = Pooler([4, 8, 16, 32], 7, 2)
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0])
    boxes = torch.stack((torch.zeros(8), torch.zeros(8), sides, sides), dim=1)
    assert pooler.levels(boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    shifted = Pooler([4, 8, 16, 32], 7, 2, canonical_size=56, canonical_level=3)
    assert shifted.levels(boxes).tolist() == [0, 1, 2, 2, 3, 3, 3, 3]


def test_pooling_reads_what_a_linear_map_says():
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
