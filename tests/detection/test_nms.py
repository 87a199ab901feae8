"""NMS of many groups at once, and detections, against torchvision's NMS of each group and loops over images."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torchvision.ops import nms

from nst_det.detection.torchvision.batch import limits_of
from nst_det.detection.torchvision.nms import kept_by_nms


def groups(count, size):
    generator = torch.Generator().manual_seed(4)
    corners, sides = (torch.rand(count, size, 2, generator=generator) for _ in range(2))
    boxes = torch.cat((corners * 60, corners * 60 + sides * 30), dim=-1)
    valid = torch.rand(count, size, generator=generator) < 0.8
    valid[-1] = False
    return boxes, valid


def group_by_group(boxes, valid, threshold):
    kept = torch.zeros_like(valid)
    for group, (of_group, usable) in enumerate(zip(boxes, valid)):
        scores = torch.where(usable, torch.linspace(1, 0.5, len(usable)), 0.0)
        # what isn't valid is far away
        moved = torch.where(usable[:, None], of_group, of_group + 1e4 * (1 + torch.arange(len(usable)))[:, None])
        kept[group, nms(moved, scores, threshold)] = True
    return kept & valid


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_groups_do_not_touch_each_other(threshold):
    boxes, valid = groups(5, 70)
    kept = kept_by_nms(boxes, valid, threshold)
    assert torch.equal(kept, group_by_group(boxes, valid, threshold))
    assert 0 < kept.sum() < valid.sum()
    # what isn't valid may be no number
    assert torch.equal(kept_by_nms(boxes.masked_fill(~valid[..., None], torch.nan), valid, threshold), kept)


def test_nothing_is_kept_of_nothing():
    assert kept_by_nms(torch.zeros(0, 5, 4), torch.zeros(0, 5, dtype=torch.bool), 0.5).shape == (0, 5)
    assert kept_by_nms(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), 0.5).shape == (2, 0)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_for_gpus_keeps_the_same():
    """Triton's interpreter runs it on the CPU, where the variable is set before Triton is imported."""
    script = """
import torch
from nst_det.detection.torchvision.nms_kernel import kept_by_triton
from tests.detection.test_nms import group_by_group, groups
for size in (1, 70, 128):
    boxes, valid = groups(4, size)
    for threshold in (0.0, 0.3, 0.7):
        boxes = boxes.masked_fill(~valid[..., None], torch.nan)
        kept = kept_by_triton(boxes, valid, threshold)
        assert torch.equal(kept, group_by_group(boxes, valid, threshold)), (size, threshold)
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


def detections_loop(heads, logits, deltas, rois, sizes, originals):
    """What is found on each image, one image and class after the other."""
    found, threshold = [], heads.settings.SCORE_THRESH_TEST
    for image, ((height, width), (full_height, full_width)) in enumerate(zip(sizes, originals)):
        mine = rois[:, 0] == image
        boxes = heads.coder.decode_rows(deltas[mine], rois[mine, 1:]).unflatten(1, (-1, 4))
        scores, rows = logits[mine].softmax(dim=1), []
        for label in range(scores.shape[1] - 1):
            over = torch.nonzero(scores[:, label] > threshold).squeeze(1)
            of_class = boxes[over, label].clamp(min=0).minimum(torch.tensor([width, height] * 2))
            for kept in nms(of_class, scores[over, label], heads.settings.NMS_THRESH_TEST).tolist():
                rows.append((float(scores[over[kept], label]), label, of_class[kept]))
        rows = sorted(rows, key=lambda row: -row[0])[: heads.detections if heads.detections >= 0 else None]
        scale = torch.tensor([full_width / width, full_height / height] * 2)
        scaled = [
            (score, label, (box * scale).minimum(torch.tensor([full_width, full_height] * 2)))
            for score, label, box in rows
        ]
        found.append([row for row in scaled if row[2][2] > row[2][0] and row[2][3] > row[2][1]])
    return found


@pytest.mark.parametrize("detections", [-1, 7])
def test_detections_are_those_of_each_image_and_class(roi_heads, monkeypatch, detections):
    heads = roi_heads(SCORE_THRESH_TEST=0.3, NMS_THRESH_TEST=0.4)
    heads.detections = detections
    torch.manual_seed(0)
    corners = torch.rand(3, 40, 2) * 70
    proposals = torch.cat((corners, corners + 5 + torch.rand(3, 40, 2) * 40), dim=-1)
    counts = (40, 0, 25)
    valid = torch.arange(40) < torch.tensor(counts)[:, None]
    logits, deltas = torch.randn(65, 3) * 2, torch.randn(65, 8)
    monkeypatch.setattr(heads, "predict", lambda maps, boxes, counts: (logits, deltas))
    sizes, originals = [(100, 90), (64, 64), (80, 100)], [(205, 180), (64, 64), (40, 50)]
    seen, wanted = limits_of(sizes), limits_of(originals)
    found = heads.detect({}, proposals, valid, seen.float(), (wanted / seen).float(), wanted.float())
    rois = torch.cat(
        [torch.cat((torch.full((n, 1), i), rows[:n]), 1) for i, (rows, n) in enumerate(zip(proposals, counts))]
    )
    expected = detections_loop(heads, logits, deltas, rois, sizes, originals)
    assert [len(one.scores) for one in found] == [len(rows) for rows in expected]
    assert len(expected[0]) == 7 if detections > 0 else len(expected[0]) > 15
    assert not expected[1]
    for one, rows in zip(found, expected):
        for box, score, label, (their_score, their_label, their_box) in zip(*one, rows):
            assert (float(score), int(label)) == (pytest.approx(their_score, rel=1e-6), their_label)
            assert torch.allclose(box, their_box, atol=1e-4)


def test_no_number_is_no_detection(roi_heads, monkeypatch):
    heads = roi_heads(SCORE_THRESH_TEST=0.3)
    logits, deltas = torch.tensor([[4.0, 0, 0], [4, 0, 0], [torch.nan, 0, 0]]), torch.zeros(3, 8)
    deltas[1, 5] = torch.inf
    monkeypatch.setattr(heads, "predict", lambda maps, boxes, counts: (logits, deltas))
    # the last, scaled to an image of one pixel's height, is empty there
    proposals = torch.tensor([[[0.0, 0, 10, 10], [30, 30, 40, 40], [60, 60, 70, 70]]])
    limits = limits_of([(100, 100)]).float()
    (found,) = heads.detect({}, proposals, torch.ones(1, 3, dtype=torch.bool), limits, torch.ones(1, 4), limits)
    assert found.boxes.tolist() == [[0, 0, 10, 10]]
    clipped = limits.clone()
    clipped[:, 1::2] = 0
    (found,) = heads.detect({}, proposals, torch.ones(1, 3, dtype=torch.bool), limits, torch.ones(1, 4), clipped)
    assert len(found.boxes) == 0, "what is empty in the original image is dropped"
