import math

import numpy as np
import pytest

from nst_det.data.annotation import VocAnnotation, VocObject
from nst_det.project.fit import Schedule, box_sizes, fit_anchors, fit_detection, fit_distillation, fit_size


def image(width, height, *boxes, difficult=False):
    return VocAnnotation("a", width, height, tuple(VocObject("cat", box, difficult) for box in boxes))


def test_sizes_are_medians_made_smaller_and_never_larger():
    annotations = [image(640, 480), image(480, 640), image(640, 400), image(2000, 100)]
    # short sides 480 480 400 100, long sides 640 640 640 2000: medians 440 and 640
    assert fit_size(annotations, 320) == (220, 320)
    assert fit_size(annotations, 1000) == (440, 640)
    # half as large would leave 50 pixels: the shortest side is kept at 64
    assert fit_size([image(640, 100)], 320) == (64, 410)


def test_box_sizes_after_resizing():
    # 400 x 200 becomes 200 x 100; boxes on disk are 1-based and inclusive
    one = image(400, 200, (1, 1, 40, 90), (101, 51, 180, 70), (5, 5, 5, 20))
    two = image(100, 300, (11, 21, 60, 120))
    hard = image(400, 200, (1, 1, 100, 100), difficult=True)
    found = box_sizes([one, two, hard], 100, 200)
    # the second image becomes 67 x 200 (its longest side is bound)
    wanted = [math.sqrt(20 * 45), math.sqrt(40 * 10), math.sqrt(50 * 67 / 100 * 100 * 200 / 300)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_anchors_by_hand():
    # quantiles of 11 evenly spaced values are the values themselves: 2nd, 4th, 6th, 8th, 10th
    sizes = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110.0])
    assert fit_anchors(sizes) == [20, 40, 60, 80, 100]
    # small boxes: each level's stride bounds its anchor from below
    assert fit_anchors(sizes / 10) == [4, 8, 16, 32, 64]
    assert fit_anchors(np.array([30.0])) == [30, 30, 30, 32, 64]


@pytest.mark.parametrize(
    ("images", "device", "wanted"),
    [
        (24, "cpu", Schedule(150, 4)),
        (300, "cpu", Schedule(225, 8)),
        (5011, "cpu", Schedule(600, 8)),
        (3, "cpu", Schedule(150, 3)),
        (5011, "cuda", Schedule(15033, 8)),
    ],
)
def test_steps_of_stage_two(images, device, wanted):
    assert fit_detection(images, device) == wanted


def test_steps_of_stage_one():
    assert fit_distillation(60, "cpu") == (Schedule(300, 8), Schedule(150, 8))
    assert fit_distillation(3200, "cpu") == (Schedule(750, 64), Schedule(500, 64))
    assert fit_distillation(10**6, "cpu") == (Schedule(1500, 64), Schedule(900, 64))
    assert fit_distillation(3, "cpu")[1].batch == 3
