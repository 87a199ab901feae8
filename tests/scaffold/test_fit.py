import math

import numpy as np
import pytest

from nst_det.data.annotation import VocAnnotation, VocObject
from nst_det.scaffold.configs import (
    Schedule,
    box_sizes,
    fit_anchors,
    fit_detection,
    fit_distillation,
    fit_period,
    fit_size,
)


def image(width, height, *boxes, difficult=False):
    return VocAnnotation("a", width, height, tuple(VocObject("cat", box, difficult) for box in boxes))


def test_sizes_are_medians_made_smaller_and_never_larger():
    annotations = [image(640, 480), image(480, 640), image(640, 400), image(2000, 100)]
    # short sides 480 480 400 100, long sides 640 640 640 2000: medians 440 and 640
    # half as large 220 and 320; 192 is the next multiple of 32 below, and to it belong 192 * 640 / 440 = 279
    assert fit_size(annotations, 320) == (192, 288)
    assert fit_size(annotations, 1000) == (416, 608)
    # half as large would leave 50 pixels: the shortest side is kept at 64, to which 410 belong
    assert fit_size([image(640, 100)], 320) == (64, 416)
    assert fit_size([image(320, 320)], 320) == (320, 320)


def test_box_sizes_after_resizing():
    # 400 x 200 becomes 200 x 100; boxes on disk are 1-based and inclusive
    one = image(400, 200, (1, 1, 40, 90), (101, 51, 180, 70), (5, 5, 5, 20))
    two = image(100, 300, (11, 21, 60, 120))
    hard = image(400, 200, (1, 1, 100, 100), difficult=True)
    found, names = box_sizes([one, two, hard], 100, 200)
    assert names.tolist() == ["cat"] * 3
    # the second image becomes 67 x 200 (its longest side is bound)
    wanted = [math.sqrt(20 * 45), math.sqrt(40 * 10), math.sqrt(50 * 67 / 100 * 100 * 200 / 300)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_anchors_by_hand():
    # of five boxes each stands in the middle of a fifth: at .1, .3, .5, .7, .9
    sizes, cats = np.array([60.0, 20, 100, 40, 80]), np.array(["cat"] * 5)
    assert fit_anchors(sizes, cats) == [20, 40, 60, 80, 100]
    # small boxes: each level's stride bounds its anchor from below
    assert fit_anchors(sizes / 10, cats) == [4, 8, 16, 32, 64]
    assert fit_anchors(np.array([30.0]), cats[:1]) == [30, 30, 30, 32, 64]


def test_a_rare_class_has_its_anchors():
    # 98 cats of 50, one ant of 10, one whale of 200: a third of the weight each, at 1/6, ..., 5/6
    sizes = np.array([50.0] * 98 + [10, 200])
    names = np.array(["cat"] * 98 + ["ant", "whale"])
    # .1 lies before the ant's middle; .3 between it (1/6) and the first cat (1/3 + 1/588); .7 and .9 alike
    below = 10 + 40 * (0.3 - 1 / 6) / (1 / 6 + 1 / 588)
    above = 50 + 150 * (0.7 - (2 / 3 - 1 / 588)) / (1 / 6 + 1 / 588)
    assert fit_anchors(sizes, names) == [10, round(below), 50, round(above), 200]


@pytest.mark.parametrize(
    ("images", "device", "wanted"),
    [
        (24, "cpu", Schedule(150, 4)),
        (300, "cpu", Schedule(250, 8)),
        (5011, "cpu", Schedule(600, 8)),
        (3, "cpu", Schedule(150, 3)),
        (5011, "cuda", Schedule(7600, 16)),
        (40, "cuda", Schedule(500, 4)),
    ],
)
def test_steps_of_stage_two(images, device, wanted):
    assert fit_detection(images, device) == wanted


@pytest.mark.parametrize(
    ("steps", "period"), [(150, 25), (250, 50), (600, 100), (500, 100), (9000, 1000), (7600, 1000), (20, 10)]
)
def test_validations_are_round_numbers_apart(steps, period):
    assert fit_period(steps) == period


def test_steps_of_stage_one():
    assert fit_distillation(60, "cpu") == (Schedule(300, 8), Schedule(150, 8))
    assert fit_distillation(3200, "cpu") == (Schedule(750, 64), Schedule(500, 64))
    assert fit_distillation(10**6, "cpu") == (Schedule(1500, 64), Schedule(900, 64))
    assert fit_distillation(3, "cpu")[1].batch == 3
