import itertools
import random

import numpy as np
import pytest

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

from nst_det.detect.batches import Place, StepBatches  # noqa: E402
from nst_det.detect.detectron2.loader import SeededImages, SharedBatches  # noqa: E402
from nst_det.errors import UserError  # noqa: E402


def take(batches, count, start=0):
    batches.start = start
    return list(itertools.islice(iter(batches), count))


@pytest.mark.parametrize("wide", [None, [True, False, True, True, False, False, True, False, True, False]])
def test_a_late_start_goes_on_with_the_same_batches(wide):
    whole = take(SharedBatches(10, 2, seed=3, wide=wide), 20)
    assert take(SharedBatches(10, 2, seed=3, wide=wide), 9, start=11) == whole[11:]
    assert take(SharedBatches(10, 2, seed=4, wide=wide), 20) != whole


def test_processes_share_out_one_batch():
    whole = take(SharedBatches(10, 4, seed=0), 6)
    parts = [take(SharedBatches(10, 4, seed=0, rank=rank, world=2), 6) for rank in range(2)]
    assert [one + two for one, two in zip(*parts)] == whole
    assert whole == take(StepBatches(10, 4, seed=0), 6)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match="IMS_PER_BATCH"):
        SharedBatches(10, 3, seed=0, world=2)


def test_augmentation_depends_on_seed_step_and_place_alone():
    def mapper(item):
        return item["value"], random.random(), np.random.rand()

    images = SeededImages([{"value": 0}, {"value": 1}], mapper, seed=5)
    first = images[Place(0, 7, 1)]
    random.seed(99)
    np.random.seed(99)
    state = random.getstate(), np.random.get_state()[1].copy()
    assert images[Place(0, 7, 1)] == first
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()
    assert images[Place(1, 7, 1)][1:] == first[1:]
    assert images[Place(0, 8, 1)][1:] != first[1:]
    assert images[Place(0, 7, 0)][1:] != first[1:]
    assert SeededImages([{"value": 0}], mapper, seed=6)[Place(0, 7, 1)][1:] != first[1:]
