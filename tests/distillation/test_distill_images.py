"""Batches of stage one: augmentation against NumPy, what a batch depends on, views, workers, accuracy."""

import signal
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from nst_det.data.folders import read_image_folder
from nst_det.data.images import EncodedImage, read_image
from nst_det.distillation import dataloader
from nst_det.distillation.accuracy import correct_counts, measure
from nst_det.distillation.augment import (
    ImageStore,
    Views,
    center_square,
    changed,
    cut_out,
    decode,
    move,
    random_box,
    seen_places,
)
from nst_det.distillation.color_jitter import color_row, draw_colors, jittered
from nst_det.distillation.config import get_defaults, load_distill_config
from nst_det.distillation.dataloader import Batch, EvaluationBatches, Normalizer, TrainingBatches
from nst_det.engine.loader import load
from nst_det.errors import UserError


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.floats(0, 1), st.integers(1, 4), st.integers(6, 9), st.integers(0, 99))
def test_moves_against_numpy(shift, flip, count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    offsets = torch.randint(-shift, shift + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < flip
    for row, moved in enumerate(move(images, seen_places(offsets, mirrored, size))):
        # mirrored first: columns are reversed, then moved
        pixels = images[row].numpy()[:, :, ::-1] if mirrored[row] else images[row].numpy()
        padded = np.pad(pixels, ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
        top = shift + offsets[0, row].item()
        left = shift + (-1 if mirrored[row] else 1) * offsets[1, row].item()
        assert np.array_equal(moved.numpy(), padded[:, top : top + size, left : left + size])


def jpeg_folder(folder, *sizes, **options):
    """An image folder of smooth JPEGs of (width, height)."""
    (folder / "a").mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / "a" / f"{number}.jpg", quality=95, **options)
    return read_image_folder(folder, val_fraction=0).train


@pytest.mark.parametrize("limit", [0, 1e9])
def test_crops_are_torchvisions_of_the_box_that_is_drawn(tmp_path, limit):
    split = jpeg_folder(tmp_path, (60, 40), (41, 130), (99, 110), (500, 400))
    store, area, aspect = ImageStore(split, 32, 1.0, False, limit), (0.2, 1.0), (0.75, 4 / 3)
    assert store.cached == bool(limit)
    reductions = set()
    for index in range(len(split)):
        whole = torch.from_numpy(split.image(index)).permute(2, 0, 1)
        for seed in range(20):
            found = torch.from_numpy(store.crop(index, area, aspect, Random(seed))).permute(2, 0, 1)
            top, left, height, width = random_box(*whole.shape[1:], area, aspect, Random(seed))
            n = max(n for n in (1, 2, 4, 8) if n == 1 or 32 * n <= min(height, width))
            # cut at whole pixels of the scale at which it is decoded
            rows, columns = (top + height) // n - top // n, (left + width) // n - left // n
            box = top // n * n, left // n * n, rows * n, columns * n
            away = (found.int() - F.resized_crop(whole, *box, [32, 32], antialias=True).int()).abs().float()
            assert away.max() == 0 if n == 1 else away.mean() < 1.5
            reductions.add(n)
    assert reductions == {1, 2, 4, 8}


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}, {"exif": 6}])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_fast_decoding_gives_pillows_bits(tmp_path, options, reduction):
    if "exif" in options:
        options = {"exif": Image.Exif()}
        options["exif"][0x0112] = 6
    path = jpeg_folder(tmp_path, (203, 149), **options).path(0)
    data, image = path.read_bytes(), Image.open(path)
    image.draft(None, (203 // reduction, 149 // reduction))
    wanted = np.rot90(image, -1) if "exif" in options else np.asarray(image)
    assert np.array_equal(decode(EncodedImage(data, "x"), reduction), wanted)
    for cut in (data[:-2], data[: len(data) // 2]):
        with pytest.raises(UserError, match="^x: can't be decoded"):
            decode(EncodedImage(cut, "x"), reduction)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_are_decoded_as_everywhere(tmp_path, mode):
    path = tmp_path / "x.jpg"
    Image.effect_noise((90, 60), 50).convert(mode).save(path)
    assert np.array_equal(decode(EncodedImage(path.read_bytes(), "x")), read_image(path))


# the distance of two samples of 3,000 from one distribution is larger once in 20,000 times
FAR = 0.058


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    rng, area, aspect = Random(0), (0.08, 1.0), (0.75, 4 / 3)
    for height, width in ((375, 500), (64, 64), (300, 90)):
        image = torch.empty(3, height, width)
        theirs = np.array([RandomResizedCrop.get_params(image, area, aspect) for _ in range(3000)])
        ours = np.array([random_box(height, width, area, aspect, rng) for _ in range(3000)])
        assert (ours >= (0, 0, 1, 1)).all()
        assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
        found, wanted = ([b[:, 0], b[:, 1], b[:, 2] * b[:, 3], b[:, 3] / b[:, 2]] for b in (ours, theirs))
        assert max(ks_2samp(*pair).statistic for pair in zip(found, wanted)) < FAR
    # nothing fits: the largest permitted part of the middle
    assert random_box(10, 100, (0.9, 1.0), aspect, rng) == (0, 43, 10, 13)
    assert random_box(100, 10, (0.9, 1.0), aspect, rng) == (43, 0, 13, 10)


COLORS = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]


@pytest.mark.parametrize("jitter", [[0.4, 0.4, 0.4, 0.0], [0.4, 0.3, 0.6, 0.2], [2.0, 0.0, 3.0, 0.5]])
def test_colors_are_torchvisions(jitter):
    images = torch.randint(0, 256, (6, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[1], images[2], images[3, :, 10:] = images[1, :1], 0, 255
    for seed in range(10):
        steps = [draw_colors(jitter, Random(100 * seed + number)) for number in range(len(images))]
        rows = torch.tensor([color_row(some) for some in steps])
        found = jittered(images, rows)
        for image, of_image, ours in zip(images, steps, found):
            wanted = image.float() / 255
            for kind, amount in of_image:
                wanted = COLORS[kind](wanted, amount)
            assert (ours - 255 * wanted).abs().max() < 0.01
        assert torch.equal(found[2:4], jittered(images[2:4], rows[2:4]))


def test_colors_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    drawn = [draw_colors([0.4, 1.5, 0.2, 0.1], Random(seed)) for seed in range(3000)]
    theirs = [ColorJitter.get_params((0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)) for _ in range(3000)]
    for kind in range(4):
        assert ks_2samp([dict(steps)[kind] for steps in drawn], [one[1 + kind] for one in theirs]).statistic < FAR
    orders = Counter(tuple(kind for kind, _ in steps) for steps in drawn)
    # 24 orders of 125 each, in theirs as well
    for counts in (orders, Counter(tuple(order.tolist()) for order, *_ in theirs)):
        assert len(counts) == 24
        assert chisquare(list(counts.values())).pvalue > 1e-4


def test_crops_have_the_size_asked_for_and_depend_on_their_seeds(tmp_path):
    augment = augmentation(CROP_AREA=[0.2, 1.0], COLOR_JITTER=[0.4, 0.4, 0.4, 0.1])
    store = ImageStore(jpeg_folder(tmp_path, (40, 30), (20, 50)), 16, 1.0, False, 1e9)
    places = torch.zeros(2, 2, dtype=torch.int16), torch.zeros(2, dtype=torch.bool)
    before = torch.get_rng_state()
    first, again = (cut_out(store, torch.tensor([0, 1]), [1, 2], *places, augment) for _ in range(2))
    assert (first[0].shape, first[0].dtype) == ((2, 3, 16, 16), torch.uint8)
    assert torch.equal(changed(*first), changed(*again))
    alone = cut_out(store, torch.tensor([1]), [2], places[0][:, :1], places[1][:1], augment)
    assert torch.equal(changed(*first)[1:], changed(*alone))
    assert torch.equal(before, torch.get_rng_state())


def test_center_squares_are_torchvisions():
    rng = np.random.default_rng(0)
    for height, width, size, ratio in ((40, 60, 40, 1.0), (40, 60, 32, 0.8), (333, 500, 224, 0.875), (91, 50, 64, 0.9)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        resized = F.resize(torch.from_numpy(pixels).permute(2, 0, 1), [round(size / ratio)], antialias=True)
        wanted = F.center_crop(resized, [size, size]).permute(1, 2, 0)
        assert np.array_equal(center_square(pixels, size, ratio), wanted)
    # and Pillow's up to rounding
    wanted = Image.fromarray(pixels).resize((71, 129), Image.BILINEAR).crop((4, 32, 68, 96))
    assert np.abs(center_square(pixels, 64, 0.9).astype(int) - np.asarray(wanted)).max() <= 1


def test_normalizing_against_float64():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    means, stds = (torch.tensor(values).double().view(3, 1, 1) for values in (mean, std))
    found = Normalizer(mean, std, torch.device("cpu"))(images)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found.double(), (images.double() / 255 - means) / stds, atol=1e-6)


def augmentation(**keys):
    node = get_defaults().DATA.AUGMENT
    node.merge_from_list([item for pair in keys.items() for item in pair])
    return node


def batches(split, size=7, seed=0, limit=1e9, views=0, threads=1, **keys):
    augment = augmentation(**keys)
    store = ImageStore(split, 32, 1.0, not augment.CROP_AREA, limit, threads)
    return TrainingBatches(store, size, seed, augment, Views(store, augment, views, 5) if views else None)


def seen(batch):
    """The pixels that are trained on."""
    return changed(batch.images, batch.changes)


def same(one, other):
    pairs = [(seen(one), seen(other)), *zip(one[1:3], other[1:3], strict=True)]
    return all(torch.equal(*pair) for pair in pairs) and one.names == other.names


def test_every_epoch_shows_each_image_once(images):
    train = batches(read_image_folder(images).train)
    seen = torch.cat([train.rows(step) for step in range(24)])
    assert len(seen) == 7 * 24
    for epoch in range(7):
        assert sorted(seen[24 * epoch : 24 * (epoch + 1)].tolist()) == list(range(24))
    assert seen[:24].tolist() != seen[24:48].tolist()


def test_a_batch_larger_than_the_data_runs_through_several_epochs(images):
    split = read_image_folder(images).train.select(np.arange(3))
    seen = batches(split).rows(4).tolist()
    assert len(seen) == 7
    assert sorted(seen[2:5]) == [0, 1, 2]


def test_a_batch_depends_on_seed_and_step_alone(images):
    split, keys = read_image_folder(images).train, {"SHIFT": 3, "HFLIP": 0.5}
    train, before = batches(split, **keys), torch.get_rng_state()
    straight = [train[step] for step in range(6)]
    assert torch.equal(before, torch.get_rng_state())
    for workers, limit in ((0, 1e9), (2, 1e9), (0, 0)):
        other = load(batches(split, limit=limit, **keys), range(4, 6), workers)
        assert all(same(*pair) for pair in zip(straight[4:], other, strict=True))
    assert not torch.equal(seen(batches(split, seed=1, **keys)[4]), seen(straight[4]))


def test_labels_go_with_their_images(images):
    train = batches(read_image_folder(images).train)
    assert train.store.cached
    for step in range(3):
        for image, label in zip(train[step].images, train[step].labels):
            band = image[:, int(label) * 32 // 3 : (int(label) + 1) * 32 // 3].float().mean()
            assert band < 80, "the band of its class is the dark one"


@pytest.mark.parametrize("more", [{}, {"CROP_AREA": [0.3, 1.0], "COLOR_JITTER": [0.4, 0.4, 0.4, 0.1]}])
def test_a_view_of_an_image_depends_on_nothing_beside_it(images, more):
    split, keys = read_image_folder(images).train, {"SHIFT": 3, "HFLIP": 0.5, **more}
    views = batches(split, views=3, **keys).views
    rows, before = torch.tensor([71, 2, 26, 50, 3]), torch.get_rng_state()
    together = changed(*views[rows])
    alone = torch.cat([changed(*batches(split, views=3, **keys).views[row[None]]) for row in rows])
    assert torch.equal(together, alone)
    assert torch.equal(together[1:2], changed(*views[range(74, 75)])), "after the last row comes the first"
    assert torch.equal(before, torch.get_rng_state())
    assert len({image.numpy().tobytes() for image in together[1:4]}) == 3, "image 2 in three views"
    assert not torch.equal(together, changed(*Views(views.store, views.augment, 3, seed=6)[rows]))


def test_the_view_of_an_epoch_is_its_number_modulo_the_views(images):
    train = batches(read_image_folder(images).train, size=16, views=2, SHIFT=3)
    plain = batches(read_image_folder(images).train, size=16)
    rows = torch.cat([train[step].rows for step in range(6)])
    # 96 images: four epochs of 24, the views 0, 1, 0, 1
    assert (rows // 24).tolist() == [0] * 24 + [1] * 24 + [0] * 24 + [1] * 24
    assert rows.bincount().tolist() == [2] * 48
    assert torch.equal(rows % 24, torch.cat([plain.rows(step) for step in range(6)]))
    assert torch.equal(seen(train[1]), changed(*train.views[train[1].rows]))
    assert torch.equal(train[1].labels, train.store.labels[train[1].rows % 24])


@pytest.mark.parametrize("crop", [[], [0.3, 1.0]])
@pytest.mark.parametrize("views", [0, 2])
def test_workers_ask_no_gpu_for_anything(images, crop, views, cuda_in_use):
    train = batches(read_image_folder(images).train, views=views, SHIFT=3, HFLIP=0.5, CROP_AREA=crop)
    assert all(same(train[step], batch) for step, batch in enumerate(load(train, range(4), 2)))


@pytest.mark.parametrize("limit", [0, 1e9])
def test_workers_give_the_same_images_to_evaluate_on(images, limit, cuda_in_use):
    store = ImageStore(read_image_folder(images).train, 24, 0.8, True, limit)
    evaluation, firsts = EvaluationBatches(store, 7), range(0, 24, 7)
    alone = [evaluation[first] for first in firsts]
    assert [len(batch.labels) for batch in alone] == [7, 7, 7, 3]
    assert torch.equal(torch.cat([batch.labels for batch in alone]), store.labels)
    assert all(same(*pair) for pair in zip(alone, load(evaluation, firsts, 2), strict=True))
    evaluation.store.threads = 3
    assert all(same(batch, evaluation[first]) for batch, first in zip(alone, firsts))


@pytest.mark.parametrize("limit", [0, 1e9])
@pytest.mark.parametrize("crop", [[], [0.3, 1.0]])
def test_threads_give_the_same_images_to_train_on(images, limit, crop):
    split = read_image_folder(images).train
    one, three = (batches(split, limit=limit, threads=n, CROP_AREA=crop, COLOR_JITTER=[0.4] * 4) for n in (1, 3))
    assert all(same(one[step], three[step]) for step in range(5))


@pytest.mark.parametrize(("device", "processes", "threads"), [("cpu", 0, 2), ("cuda", 2, 1)])
def test_workers_are_threads_of_a_cpu_and_processes_for_a_gpu(images, monkeypatch, device, processes, threads):
    monkeypatch.setattr(dataloader, "default_device", lambda: torch.device("cpu"))
    config = load_distill_config(
        None, ["DATA.ROOT", str(images), "DATALOADER.NUM_WORKERS", "2", "DATA.CACHE_GIB", "0.0"]
    )
    data, asked = dataloader.StageOneData(config), []
    data.normalize.device = torch.device(device)
    monkeypatch.setattr(dataloader, "load", lambda source, keys, workers: asked.append((source.store, workers)))
    data.evaluation("val")
    ((store, workers),) = asked
    assert (workers, store.threads) == (processes, threads)


def test_an_unreadable_image_is_named_also_by_a_worker(tmp_path, images):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(next(images.rglob("*.png")).read_bytes()[:200])
    split = read_image_folder(tmp_path, val_fraction=0).train
    named = f"^{tmp_path}/a/1.png: can't be decoded"
    with pytest.raises(UserError, match=named):
        batches(split)
    kept = [batches(split, limit=0, threads=threads) for threads in (1, 2)]
    for source in (*kept, *(EvaluationBatches(one.store, 2) for one in kept)):
        for workers in (0, 1):
            with pytest.raises(UserError, match=named) as caught:
                list(load(source, range(1), workers))
            assert "Traceback" not in str(caught.value)


LOADERS = """
import sys
from nst_det.data.folders import read_image_folder
from nst_det.distillation.augment import ImageStore
from nst_det.distillation.config import get_defaults
from nst_det.distillation.dataloader import EvaluationBatches, TrainingBatches
from nst_det.engine.loader import load
kept, read = (ImageStore(read_image_folder(sys.argv[1]).train, 32, 1.0, True, limit) for limit in (1e9, 0))
train = TrainingBatches(kept, 300, 0, get_defaults().DATA.AUGMENT)
loaders = [load(train, range(10**6), 8), load(EvaluationBatches(read, 1), range(24), 4)]
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_training_however_that_ends(images, signum, left_behind):
    assert left_behind(LOADERS, signum, images) == []


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
    labels = torch.tensor([0, 0]), torch.tensor([1])
    data = [Batch(torch.zeros(len(some), 3, 4, 4, dtype=torch.uint8), some, some) for some in labels]
    result = measure(networks, data, Normalizer([0.5] * 3, [0.5] * 3, torch.device("cpu")), None)
    assert (result["zero"]["top1"], result["one"]["top1"]) == pytest.approx((2 / 3, 1 / 3))
    assert networks["zero"].training
    assert not networks["one"].training
