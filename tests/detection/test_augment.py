"""Augmentation against plain loops over what was drawn, painted images, and torchvision's colors."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from nst_det.detection.augment import COLOR_RANGES, Augmentation, distorted, draw_colors
from nst_det.detection.config import load_detect_config
from nst_det.detection.data import DetectionImages, Item, SampleIndex, open_voc, training_batches
from nst_det.detection.torchvision import build_detector
from nst_det.errors import UserError

SIZES = {"INPUT.MIN_SIZE_TRAIN": [48, 96], "INPUT.MAX_SIZE_TRAIN": 120}


def test_a_preset_is_the_default_of_its_keys(base_file, tmp_path):
    def read(*words, file=base_file):
        given = load_detect_config(file, words).INPUT
        return given.CROP.ENABLED, given.SCALE_JITTER, given.PHOTOMETRIC, given.MIN_VISIBLE

    assert read() == (False, [], 0.0, 0.0)
    assert read("INPUT.AUGMENTATION", "voc") == (True, [0.8, 1.25], 0.5, 0.1)
    assert read("INPUT.PHOTOMETRIC", "0", "INPUT.AUGMENTATION", "strong") == (False, [0.1, 2.0], 0.0, 0.1)
    (tmp_path / "own.yaml").write_text(
        f"_BASE_: {base_file}\nINPUT: {{AUGMENTATION: voc, SCALE_JITTER: [], CROP: {{ENABLED: False}}}}\n"
    )
    assert read(file=tmp_path / "own.yaml") == (False, [], 0.5, 0.1)
    # as a run keeps it
    (tmp_path / "run.yaml").write_text(load_detect_config(tmp_path / "own.yaml").dump())
    assert read(file=tmp_path / "run.yaml") == (False, [], 0.5, 0.1)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("relative", "[0.5, 1.5]"), ("relative_range", "[0.9]"), ("relative", "[0, 1]"), ("absolute", "[0.9, 0.9]"),
        ("absolute_range", "[80, 60]"), ("absolute", "[a, b]"), ("central", "[1, 1]"),
    ],
)  # fmt: skip
def test_crops_that_are_none(base_file, kind, size):
    words = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", size]
    with pytest.raises(UserError, match=r"INPUT\.CROP\."):
        load_detect_config(base_file, words)


def test_a_preset_of_which_nothing_is_left(base_file):
    words = ["INPUT.AUGMENTATION", "strong", "INPUT.SCALE_JITTER", "[]", "INPUT.PHOTOMETRIC", "0"]
    with pytest.raises(UserError, match=r"INPUT\.AUGMENTATION strong"):
        load_detect_config(base_file, words)


@pytest.fixture
def examples(small, monkeypatch):
    """Gives, without end, training examples of images (pixels, boxes) and what was drawn for each."""

    def of(images, changes):
        found, draw = [], Augmentation.draw
        monkeypatch.setattr(Augmentation, "draw", lambda *given: found.append(draw(*given)) or found[-1])
        data = SimpleNamespace(image=lambda number: images[number][0])
        items = [
            Item(data, number, *pixels.shape[:2], boxes, np.arange(len(boxes)))
            for number, (pixels, boxes) in enumerate(images)
        ]
        dataset = DetectionImages(items, small({**SIZES, **changes}), train=True)
        for step in itertools.count():
            place = SampleIndex(step % len(items), step, 0)
            yield items[place.image], dataset[place], found[-1]

    return of


def random_images(count, boxes_each):
    rng = np.random.default_rng(0)
    for _ in range(count):
        height, width = rng.integers(20, 200, 2)
        corners = np.sort(rng.uniform(0, [[width, height]], (boxes_each, 2, 2)), axis=1)
        yield np.zeros((height, width, 3), np.uint8), corners.reshape(-1, 4)


CROPS = {"INPUT.CROP.ENABLED": True, "INPUT.RANDOM_FLIP": "vertical", "INPUT.CROP.SIZE": [0.3, 0.5]}


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"INPUT.AUGMENTATION": "none"}, (1e-5, 0)),
        ({"INPUT.AUGMENTATION": "voc"}, (1, 0.1)),
        ({"INPUT.AUGMENTATION": "strong"}, (1, 0.1)),
        ({**CROPS, "INPUT.CROP.TYPE": "relative"}, (1, 0)),
        ({**CROPS, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [30, 40], "INPUT.MIN_VISIBLE": 0.9}, (1, 0.9)),
        ({**CROPS, "INPUT.MIN_SIZE_TRAIN": [0], "INPUT.SCALE_JITTER": [0.5, 1.5]}, (1, 0)),
    ],
)
def test_boxes_against_plain_loops(examples, changes, least):
    """1,000 boxes: each is where the drawn numbers put it and inside; those that are missing are too small."""
    lost, cuts, counts = 0, 0, []
    for item, example, drawn in itertools.islice(examples(list(random_images(250, 4)), changes), 250):
        rows, columns = example["image"].shape[1:]
        assert (rows, columns) == drawn.size
        left, top, width, height = drawn.cut or (0, 0, item.width, item.height)
        assert 0 <= left <= left + width <= item.width
        assert 0 <= top <= top + height <= item.height
        wanted = []
        for label, (x0, y0, x1, y1) in enumerate(item.boxes.tolist()):
            x0, x1 = ((x - left) * columns / width for x in (x0, x1))
            y0, y1 = ((y - top) * rows / height for y in (y0, y1))
            area = (x1 - x0) * (y1 - y0)
            if drawn.flip == "horizontal":
                x0, x1 = columns - x1, columns - x0
            if drawn.flip == "vertical":
                y0, y1 = rows - y1, rows - y0
            x0, x1 = (min(max(x, 0.0), columns) for x in (x0, x1))
            y0, y1 = (min(max(y, 0.0), rows) for y in (y0, y1))
            if min(x1 - x0, y1 - y0) >= least[0] and (x1 - x0) * (y1 - y0) >= least[1] * area:
                wanted.append((label, x0, y0, x1, y1))
        assert example["labels"].tolist() == [label for label, *_ in wanted]
        found = example["boxes"].double().numpy()
        assert np.abs(found - [box for _, *box in wanted]).max() < 1e-3
        assert (found >= 0).all()
        assert (found <= [columns, rows, columns, rows]).all()
        # an image keeps an object, and its size stays that of MIN_SIZE_TRAIN and MAX_SIZE_TRAIN, or below
        assert wanted
        if changes.get("INPUT.MIN_SIZE_TRAIN") != [0]:
            assert min(rows, columns) <= 96
            assert max(rows, columns) <= 120
        lost += len(item.boxes) - len(wanted)
        cuts += (width, height) != (item.width, item.height)
        counts.append(drawn.flip)
    assert len(set(counts)) == 2
    assert (lost > 3, cuts > 50) == (2 * (changes.get("INPUT.AUGMENTATION") != "none",))


def test_an_image_that_would_lose_its_objects_is_taken_whole(examples):
    pixels, box = np.zeros((60, 80, 3), np.uint8), np.array([[10.0, 10.0, 50.0, 50.0]])
    crop = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [2, 2]}
    crop |= {"INPUT.MIN_VISIBLE": 0.5, "INPUT.RANDOM_FLIP": "none", "INPUT.MIN_SIZE_TRAIN": [0]}
    images = [(pixels, box), (pixels, box[:0])]
    for item, example, drawn in itertools.islice(examples(images, crop), 20):
        assert example["boxes"].tolist() == item.boxes.tolist()
        # without an object there is nothing to lose
        assert (drawn.cut is None) == (len(item.boxes) > 0)
        assert example["image"].shape[1:] == ((60, 80) if len(item.boxes) else (2, 2))


@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
@pytest.mark.parametrize("preset", ["none", "voc", "strong"])
def test_what_is_painted_moves_with_its_box(examples, preset, flip):
    pixels = np.zeros((90, 120, 3), np.uint8)
    boxes = np.array([[8, 10, 40, 50], [60, 5, 115, 45], [20, 55, 100, 85]])
    for channel, (x0, y0, x1, y1) in enumerate(boxes):
        pixels[y0:y1, x0:x1, channel] = 255
    changes = {"INPUT.AUGMENTATION": preset, "INPUT.RANDOM_FLIP": flip, "INPUT.FORMAT": "RGB"}
    changes |= {"INPUT.PHOTOMETRIC": 0.0, **({} if preset == "none" else {"INPUT.MIN_VISIBLE": 0.5})}
    # what has one or two pixels left has no edge at half of its level
    changes |= {"INPUT.SCALE_JITTER": [0.4, 2.0]} if preset == "strong" else {}
    seen = Counter()
    for _, example, drawn in itertools.islice(examples([(pixels, boxes.astype(np.float64))], changes), 60):
        for label, box in zip(example["labels"].tolist(), example["boxes"].tolist()):
            rows, columns = np.nonzero(example["image"][label].numpy() > 127)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(extent) - box).max() <= 1
            seen[drawn.flip] += 1
    assert min(seen["none"], seen[flip]) > 30


@pytest.mark.parametrize("bgr", [False, True])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 3, 1], [3], [2], []])
def test_colors_are_those_of_torchvision(order, bgr):
    rng = np.random.RandomState(len(order))
    image = rng.randint(0, 256, (40, 30, 3)).astype(np.uint8)
    image[:4] = image[:4, :, :1]  # grey has no hue
    names = list(COLOR_RANGES)
    for _ in range(10):
        colors = tuple((names[kind], rng.uniform(*COLOR_RANGES[names[kind]])) for kind in order)
        # in float32, without its rounding to levels at each step
        wanted = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)
        for name, amount in colors:
            wanted = getattr(F, f"adjust_{name}")(wanted, amount)
        found = distorted(np.ascontiguousarray(image[:, :, ::-1]) if bgr else image, colors, bgr)
        assert found.dtype == np.uint8
        found = found[:, :, ::-1] if bgr else found
        # its weights of grey have four digits
        assert np.abs(found - 255 * wanted.permute(1, 2, 0).numpy()).max() < 0.6


def test_drawn_colors():
    rng = np.random.RandomState(0)
    drawn = [draw_colors(0.5, rng) for _ in range(2000)]
    counts = Counter(name for steps in drawn for name, _ in steps)
    assert all(900 < counts[name] < 1100 for name in COLOR_RANGES)
    for name, (low, high) in COLOR_RANGES.items():
        amounts = [amount for steps in drawn for kind, amount in steps if kind == name]
        assert low <= min(amounts) < low + 0.02 * (high - low)
        assert high >= max(amounts) > high - 0.02 * (high - low)
    # 1 in 16 has all four
    orders = Counter(tuple(name for name, _ in steps) for steps in drawn if len(steps) == 4)
    first, last = (("brightness", "contrast", "saturation", "hue"), ("brightness", "saturation", "hue", "contrast"))
    assert orders.keys() == {first, last}
    assert min(orders.values()) > 30
    assert all(len(draw_colors(1.0, rng)) == 4 for _ in range(10))


def test_padded_sizes_hold_what_is_drawn(on_shapes):
    sizes = [[64, 96], [96, 64], [96, 96]]
    config = on_shapes(
        changes={
            "INPUT.AUGMENTATION": "strong", "INPUT.CROP.ENABLED": True, "INPUT.CROP.SIZE": [0.5, 0.5],
            "INPUT.PADDED_SIZES": sizes, "INPUT.MIN_SIZE_TRAIN": [64], "MODEL.ROI_HEADS.NUM_CLASSES": 8,
        }
    )  # fmt: skip
    detector, seen = build_detector(config).train(), set()
    for batch in itertools.islice(training_batches(config, open_voc(config, "DATASETS.TRAIN", None), 0, 0), 20):
        pixels, _ = detector.preprocess([item["image"] for item in batch])
        seen.add(tuple(pixels.shape[-2:]))
    assert seen <= set(map(tuple, sizes))
    # the losses of what came last are numbers
    assert all(torch.isfinite(loss) for loss in detector(batch).values())
