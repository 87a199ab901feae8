import itertools
import random

import numpy as np
import pytest

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

from nst_det.detect.detectron2.loader import SeededImages, StepBatches  # noqa: E402
from nst_det.errors import UserError  # noqa: E402


def take(batches, count, start=0):
    batches.start = start
    return list(itertools.islice(iter(batches), count))


def test_every_epoch_shows_every_image_once():
    steps = take(StepBatches(size=7, batch=3, seed=1), 14)
    indices = [index for step in steps for index, _, _ in step]
    for epoch in range(6):
        assert sorted(indices[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert indices[:7] != indices[7:14]


@pytest.mark.parametrize("wide", [None, [True, False, True, True, False, False, True]])
def test_a_late_start_goes_on_with_the_same_batches(wide):
    whole = take(StepBatches(7, 2, seed=3, wide=wide), 20)
    assert take(StepBatches(7, 2, seed=3, wide=wide), 9, start=11) == whole[11:]
    assert take(StepBatches(7, 2, seed=4, wide=wide), 20) != whole


def test_processes_share_out_one_batch():
    whole = take(StepBatches(10, 4, seed=0), 6)
    parts = [take(StepBatches(10, 4, seed=0, rank=rank, world=2), 6) for rank in range(2)]
    assert [one + two for one, two in zip(*parts)] == whole


def test_wide_and_tall_images_are_not_mixed():
    wide = [index % 3 == 0 for index in range(20)]
    steps = take(StepBatches(20, 4, seed=0, wide=wide), 30)
    assert all(len({wide[index] for index, _, _ in step}) == 1 for step in steps)
    seen = {index for step in steps for index, _, _ in step}
    assert seen == set(range(20))


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match="IMS_PER_BATCH"):
        StepBatches(10, 3, seed=0, world=2)


def test_augmentation_depends_on_seed_step_and_place_alone():
    def mapper(item):
        return item["value"], random.random(), np.random.rand()

    images = SeededImages([{"value": 0}, {"value": 1}], mapper, seed=5)
    first = images[0, 7, 1]
    random.seed(99)
    np.random.seed(99)
    state = random.getstate(), np.random.get_state()[1].copy()
    assert images[0, 7, 1] == first
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()
    assert images[1, 7, 1][1:] == first[1:]
    assert images[0, 8, 1][1:] != first[1:]
    assert images[0, 7, 0][1:] != first[1:]
    assert SeededImages([{"value": 0}], mapper, seed=6)[0, 7, 1][1:] != first[1:]
