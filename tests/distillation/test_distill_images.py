import signal
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nst_det.data.folders import read_image_folder
from nst_det.distillation.accuracy import correct_counts, measure
from nst_det.distillation.augment import ImageStore, Views, center_square, crop_and_jitter, shift_and_flip
from nst_det.distillation.config import get_defaults
from nst_det.distillation.dataloader import Batch, Normalizer, TrainingBatches, evaluation_batches
from nst_det.engine.device import autocast
from nst_det.engine.seeds import seeded
from nst_det.errors import UserError


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.floats(0, 1), st.integers(1, 4), st.integers(6, 9), st.integers(6, 9), st.integers(0, 99))
def test_shift_and_flip_against_numpy(shift, flip, count, height, width, seed):
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
    with seeded(seed):
        moved = shift_and_flip(images, shift, flip)
    with seeded(seed):
        offsets, mirrored = torch.randint(-shift, shift + 1, (2, count)), torch.rand(count) < flip
    for row in range(count):
        padded = np.pad(images[row].numpy(), ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
        top, left = shift + offsets[0, row].item(), shift + offsets[1, row].item()
        # mirrored first: columns are reversed, then moved
        if mirrored[row]:
            padded = np.pad(images[row].numpy()[:, :, ::-1], ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
            left = shift - offsets[1, row].item()
        wanted = padded[:, top : top + height, left : left + width]
        assert np.array_equal(moved[row].numpy(), wanted)


def test_no_augmentation_gives_the_same_images():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert shift_and_flip(images, 0, 0.0) is images
    assert torch.equal(shift_and_flip(images, 0, 1.0), images.flip(3))


def test_crops_have_the_size_asked_for():
    augment = get_defaults().DATA.AUGMENT
    augment.CROP_AREA, augment.COLOR_JITTER = [0.2, 1.0], [0.4, 0.4, 0.4, 0.1]
    whole = [torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8), torch.zeros(3, 20, 50, dtype=torch.uint8)]
    with seeded(1):
        first = crop_and_jitter(whole, 16, augment)
    with seeded(1):
        again = crop_and_jitter(whole, 16, augment)
    assert first.shape == (2, 3, 16, 16)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)


def test_center_square_against_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    # no scaling left to differ in: shortest side 40 / 0.8 = 50 would scale, 40 / 1.0 doesn't
    square = center_square(torch.from_numpy(pixels).permute(2, 0, 1), 40)
    assert np.array_equal(square.permute(1, 2, 0).numpy(), pixels[:, 10:50])
    small = center_square(torch.from_numpy(pixels).permute(2, 0, 1), 32, 0.8)
    wanted = np.asarray(Image.fromarray(pixels).resize((60, 40), Image.BILINEAR).crop((14, 4, 46, 36)))
    assert np.abs(small.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 1


def test_normalizing_against_float64():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    wanted = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    given_ = Normalizer(mean, std, torch.device("cpu"))(images)
    assert given_.dtype == torch.float32
    assert given_.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(given_.double(), wanted, atol=1e-6)


def batches(split, seed=0, limit=1e9, size=32, square=True, **augment):
    node = get_defaults().DATA.AUGMENT
    node.merge_from_list([item for pair in augment.items() for item in pair])
    return TrainingBatches(ImageStore(split, size, 1.0, square, limit), 7, seed, node)


def test_every_epoch_shows_each_image_once(images):
    train = batches(read_image_folder(images).train)
    seen = torch.cat([train.indices(step) for step in range(24)])
    assert len(seen) == 7 * 24
    for epoch in range(7):
        assert sorted(seen[24 * epoch : 24 * (epoch + 1)].tolist()) == list(range(24))
    assert seen[:24].tolist() != seen[24:48].tolist()


def test_a_batch_larger_than_the_data_runs_through_several_epochs(images):
    split = read_image_folder(images).train.select(np.arange(3))
    seen = batches(split).indices(4).tolist()
    assert len(seen) == 7
    assert sorted(seen[2:5]) == [0, 1, 2]


def test_a_batch_depends_on_seed_and_step_alone(images):
    split = read_image_folder(images).train
    options = {"SHIFT": 3, "HFLIP": 0.5}
    straight = list(batches(split, **options).steps(0, 6, 0))
    for other in (
        list(batches(split, **options).steps(4, 6, 0)),
        list(batches(split, **options).steps(4, 6, 2)),
        list(batches(split, limit=0, **options).steps(4, 6, 0)),
    ):
        for mine, its in zip(straight[4:], other, strict=True):
            assert torch.equal(mine.images, its.images)
            assert torch.equal(mine.labels, its.labels)
    changed = batches(split, seed=1, **options)[4]
    assert not torch.equal(changed.images, straight[4].images)


def test_random_state_outside_is_left_alone(images):
    train = batches(read_image_folder(images).train, SHIFT=3)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train[0]
    assert torch.equal(torch.rand(3), wanted)


def test_labels_go_with_their_images(images):
    folder = read_image_folder(images)
    store = ImageStore(folder.train, 32, 1.0, True, 1e9)
    assert store.cached
    for batch in batches(folder.train).steps(0, 3, 0):
        for image, label in zip(batch.images, batch.labels):
            band = image[:, int(label) * 32 // 3 : (int(label) + 1) * 32 // 3].float().mean()
            assert band < 80, "the band of its class is the dark one"
    rows = list(evaluation_batches(store, 10))
    assert [len(batch.labels) for batch in rows] == [10, 10, 4]
    assert torch.equal(torch.cat([batch.labels for batch in rows]), store.labels)


def test_an_unreadable_image_is_named_also_by_a_worker(tmp_path, images):
    split = read_image_folder(images).train
    (tmp_path / "a").mkdir()
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.png").write_bytes((split.path(0)).read_bytes()[:200])
    broken = read_image_folder(tmp_path, val_fraction=0).train
    with pytest.raises(UserError, match="1.png: can't be decoded"):
        ImageStore(broken, 32, 1.0, True, 1e9)
    train = TrainingBatches(ImageStore.__new__(ImageStore), 2, 0, get_defaults().DATA.AUGMENT)
    train.store.split, train.store.size, train.store.crop_ratio = broken, 32, 1.0
    train.store.square, train.store.cached, train.store.labels = True, False, torch.zeros(2, dtype=torch.long)
    with pytest.raises(UserError, match="1.png: can't be decoded") as caught:
        list(train.steps(0, 1, 1))
    assert "Traceback" not in str(caught.value)


def test_correct_counts_by_hand():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5], [5.0, 4, 3, 2, 1, 0]])
    assert correct_counts(logits, torch.tensor([0, 0, 5])).tolist() == [1, 1]
    assert correct_counts(logits, torch.tensor([0, 1, 4])).tolist() == [1, 3]
    assert correct_counts(torch.tensor([[1.0, 2.0]]), torch.tensor([0])).tolist() == [0, 1]


def test_accuracy_of_several_networks_in_one_pass():
    class Fixed(torch.nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label

        def forward(self, images):
            assert not self.training
            return torch.nn.functional.one_hot(torch.full((len(images),), self.label), 7).float()

    networks = {"zero": Fixed(0).train(), "one": Fixed(1).eval()}
    data = [Batch(torch.zeros(2, 3, 4, 4), torch.tensor([0, 0])), Batch(torch.zeros(1, 3, 4, 4), torch.tensor([1]))]
    result = measure(networks, data, lambda images: images, lambda: autocast(torch.device("cpu"), None))
    assert (result["zero"].top1, result["one"].top1) == pytest.approx((2 / 3, 1 / 3))
    assert networks["zero"].training
    assert not networks["one"].training


@pytest.mark.parametrize("area", [[], [0.3, 1.0]])
def test_a_view_of_an_image_depends_on_nothing_beside_it(images, area):
    augment = get_defaults().DATA.AUGMENT
    augment.SHIFT, augment.HFLIP, augment.CROP_AREA = 3, 0.5, area
    store = ImageStore(read_image_folder(images).train, 32, 1.0, not area, 1e9)
    views = Views(store, augment, 3, seed=5)
    rows = torch.tensor([71, 2, 26, 50, 3])
    together = views.images(rows)
    before = torch.get_rng_state()
    alone = torch.cat([Views(store, augment, 3, seed=5).images(row[None]) for row in rows])
    assert torch.equal(together, alone)
    assert torch.equal(before, torch.get_rng_state())
    assert len({image.numpy().tobytes() for image in together[1:4]}) == 3, "image 2 in three views"
    other = Views(store, augment, 3, seed=6).images(rows)
    assert not torch.equal(together, other)


def test_the_view_of_an_epoch_is_its_number_modulo_the_views(images):
    augment = get_defaults().DATA.AUGMENT
    augment.SHIFT = 3
    store = ImageStore(read_image_folder(images).train, 32, 1.0, True, 1e9)
    views = Views(store, augment, 2, seed=0)
    batches = TrainingBatches(store, 16, 0, augment, views)
    rows = torch.cat([batches[step].rows for step in range(6)])
    # 96 images: four epochs of 24, the views 0, 1, 0, 1
    assert (rows // 24).tolist() == [0] * 24 + [1] * 24 + [0] * 24 + [1] * 24
    assert rows.bincount().tolist() == [2] * 48
    assert torch.equal(rows % 24, torch.cat([batches.indices(step) for step in range(6)]))
    assert torch.equal(batches[1].images, views.images(batches[1].rows))
    assert torch.equal(batches[1].labels, store.labels[batches[1].rows % 24])


def whole(batch):
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in asdict(batch).items()}


@pytest.mark.parametrize("crop", [[], [0.3, 1.0]])
@pytest.mark.parametrize("views", [0, 2])
def test_workers_ask_no_gpu_for_anything(images, crop, views, cuda_in_use):
    train = batches(read_image_folder(images).train, square=not crop, SHIFT=3, HFLIP=0.5, CROP_AREA=crop)
    train.views = Views(train.store, train.augment, views, 5) if views else None
    alone = [whole(batch) for batch in train.steps(0, 4, 0)]
    assert [whole(batch) for batch in train.steps(0, 4, 2)] == alone


@pytest.mark.parametrize("limit", [0, 1e9])
def test_workers_give_the_same_images_to_evaluate_on(images, limit, cuda_in_use):
    store = ImageStore(read_image_folder(images).train, 24, 0.8, True, limit)
    alone = [whole(batch) for batch in evaluation_batches(store, 7)]
    assert [len(batch["labels"]) for batch in alone] == [7, 7, 7, 3]
    assert [whole(batch) for batch in evaluation_batches(store, 7, workers=2)] == alone
    share = slice(1, None, 2)
    assert [whole(batch) for batch in evaluation_batches(store, 7, share, workers=2)] == alone[share]


def test_an_unreadable_image_is_named_in_evaluation_too(tmp_path, images):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(next(images.rglob("*.png")).read_bytes()[:200])
    store = ImageStore(read_image_folder(tmp_path, val_fraction=0).train, 32, 1.0, True, 0)
    for workers in (0, 1):
        with pytest.raises(UserError, match=f"^{tmp_path}/a/1.png: ") as caught:
            list(evaluation_batches(store, 2, workers=workers))
        assert "Traceback" not in str(caught.value)


LOADERS = """
import sys
from nst_det.data.folders import read_image_folder
from nst_det.distillation.config import get_defaults
from nst_det.distillation.dataloader import TrainingBatches, evaluation_batches
from nst_det.distillation.augment import ImageStore
kept, read = (ImageStore(read_image_folder(sys.argv[1]).train, 32, 1.0, True, limit) for limit in (1e9, 0))
train = TrainingBatches(kept, 300, 0, get_defaults().DATA.AUGMENT)
loaders = [train.steps(0, 10**6, 8), evaluation_batches(read, 1, workers=4)]
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_training_however_that_ends(images, signum, left_behind):
    assert left_behind(LOADERS, signum, images) == []
