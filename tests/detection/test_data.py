import itertools
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from nst_det.data.voc import VocDataset
from nst_det.detection.augment import flip_boxes, resize, resized_shape
from nst_det.detection.data import (
    DetectionImages,
    StepBatchSampler,
    data_classes,
    evaluation_batches,
    list_items,
    open_voc,
    training_batches,
    warn_of_shared,
)
from nst_det.errors import UserError
from tests.helpers.loaders import assert_takes_few_files

CLASSES = ("crescent", "cross", "ellipse", "hexagon", "ring", "square", "star", "triangle")


@pytest.mark.parametrize(
    ("shape", "size", "largest", "expected"),
    [
        ((480, 640), 240, 1333, (240, 320)),
        ((640, 480), 240, 300, (300, 225)),
        # 333 * 800 / 500 = 532.8
        ((500, 333), 800, 800, (800, 533)),
        ((375, 500), 800, 1333, (800, 1067)),
        ((100, 50), 0, 10, (100, 50)),
        # a side is never less than a pixel
        ((1, 400), 80, 160, (1, 160)),
    ],
)
def test_resized_shape(shape, size, largest, expected):
    assert resized_shape(*shape, size, largest) == expected


def test_resize_and_flip():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, ::2] = 200
    # it averages where it shrinks
    assert np.abs(resize(image, 2, 2).astype(int) - 100).max() <= 15
    assert resize(image, 8, 8) is image
    boxes = np.array([[1.0, 2.0, 3.0, 5.0]])
    flipped = {"horizontal": [[17, 2, 19, 5]], "vertical": [[1, 5, 3, 8]], "none": boxes.tolist()}
    assert {way: flip_boxes(boxes, 10, 20, way).tolist() for way in flipped} == flipped


def take(count, size=10, batch=4, **how):
    return list(itertools.islice(StepBatchSampler(size, batch, **{"seed": 0, **how}), count))


def test_batches_are_a_function_of_seed_and_step():
    taken = [place.image for batch in take(5) for place in batch]
    # every epoch has every image once, in another order
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    assert take(3) != take(3, seed=1)
    wide = [True, False, True, True, False, False, True, False, True, False]
    whole = take(40, wide=wide)
    assert all(len({wide[place.image] for place in batch}) == 1 for batch in whole)
    assert [place.step for place in whole[5]] == [5, 5, 5, 5]
    # a late start, and the shares of processes
    assert take(9, wide=wide, start=11) == whole[11:20]
    parts = [take(6, wide=wide, share=slice(2 * rank, 2 * rank + 2)) for rank in range(2)]
    assert [one + two for one, two in zip(*parts)] == whole[:6]


def test_items(on_shapes, shapes):
    config = on_shapes()
    assert data_classes(config) == CLASSES
    config.defrost()
    config.DATASETS.TRAIN = ["coco_2017_train", *config.DATASETS.TRAIN]
    assert data_classes(config, known_only=True) == CLASSES
    with pytest.raises(UserError, match="DATASETS.TRAIN: no data set 'coco_2017_train' in DATASETS.VOC"):
        data_classes(config)
    data = VocDataset(shapes, "trainval", CLASSES)
    items = list_items([data, data], use_difficult=True, filter_empty=True)
    assert len(items) == 24
    annotation = data.annotation(items[0].id)
    assert items[0].boxes.tolist() == annotation.boxes.tolist()
    assert [CLASSES[label] for label in items[0].labels] == list(annotation.names)


def write_voc(root, boxes, size=(40, 30)):
    """A VOC folder of one image with boxes (xmin, ymin, xmax, ymax, difficult) of class ``thing``."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    objects = "".join(
        f"<object><name>thing</name><difficult>{hard}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d, hard in boxes
    )
    width, height = size
    (root / "Annotations" / "one.xml").write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "JPEGImages" / "one.png")
    (root / "ImageSets" / "Main" / "train.txt").write_text("one\n")
    return VocDataset(root, "train", ["thing"]), pixels


def test_difficult_and_faulty_boxes_are_left_out(tmp_path, caplog):
    data, _ = write_voc(tmp_path / "a", [(1, 1, 10, 10, 0), (5, 5, 15, 15, 1), (7, 7, 7, 20, 0)])
    (item,) = list_items([data], use_difficult=False, filter_empty=True)
    assert item.boxes.tolist() == [[0, 0, 10, 10]]
    assert "one: the box (7, 7, 7, 20) of object 3 (thing) has no area" in caplog.text
    (item,) = list_items([data], use_difficult=True, filter_empty=True)
    assert item.boxes.tolist() == [[0, 0, 10, 10], [4, 4, 15, 15]]
    data, _ = write_voc(tmp_path / "b", [(5, 5, 15, 15, 1)])
    assert len(list_items([data], use_difficult=False, filter_empty=False)) == 1
    with pytest.raises(UserError, match="train.*nst-det check-data"):
        list_items([data], use_difficult=False, filter_empty=True)


@pytest.mark.parametrize("place", ["same list", "copied file", "another image"])
def test_what_is_trained_and_tested_on_is_named(tmp_path, caplog, place):
    train, pixels = write_voc(tmp_path / "a", [(1, 1, 10, 10, 0)])
    test, _ = (train, None) if place == "same list" else write_voc(tmp_path / "b", [(5, 5, 15, 15, 0)])
    if place == "another image":
        Image.fromarray(255 - pixels).save(test.image_path("one"))
    warn_of_shared([train], [test])
    assert ("DATASETS.TEST: 1 of 1" in caplog.text) == (place != "another image")
    assert (str(test.image_path("one")) in caplog.text) == (place != "another image")


def test_an_example(tmp_path, small):
    data, pixels = write_voc(tmp_path, [(1, 1, 10, 10, 0), (31, 3, 99, 30, 0)])
    items = list_items([data], False, True)
    changes = {"INPUT.MIN_SIZE_TRAIN": [60], "INPUT.MAX_SIZE_TRAIN": 999, "INPUT.RANDOM_FLIP": "none"}
    example = DetectionImages(items, small(changes), train=True)[next(iter(StepBatchSampler(1, 1, 0)))[0]]
    assert (example["height"], example["width"], example["image_id"]) == (30, 40, "one")
    assert example["image"].shape == (3, 60, 80)
    assert example["image"].dtype == torch.uint8
    expected = np.asarray(Image.fromarray(pixels).resize((80, 60), Image.Resampling.BILINEAR))
    assert torch.equal(example["image"], torch.from_numpy(expected.copy()).permute(2, 0, 1))
    # twice as large, and cut off at the image's edge
    assert example["boxes"].tolist() == [[0, 0, 20, 20], [60, 4, 80, 60]]
    assert example["labels"].tolist() == [0, 0]
    (batch,) = evaluation_batches(small({"INPUT.FORMAT": "BGR", "INPUT.MIN_SIZE_TEST": 0}), data)
    assert torch.equal(batch[0]["image"], torch.from_numpy(pixels[:, :, ::-1].copy()).permute(2, 0, 1))
    assert "boxes" not in batch[0]


def test_flipped_boxes_stay_on_their_pixels(tmp_path, small):
    data, _ = write_voc(tmp_path, [(11, 6, 20, 25, 0)])
    items = list_items([data], False, True)
    seen = set()
    for direction in ("horizontal", "vertical"):
        images = DetectionImages(items, small({"INPUT.MIN_SIZE_TRAIN": [0], "INPUT.RANDOM_FLIP": direction}), True)
        plain = DetectionImages(items, small({"INPUT.MIN_SIZE_TRAIN": [0], "INPUT.RANDOM_FLIP": "none"}), True)
        for batch, _ in zip(StepBatchSampler(1, 1, 0), range(12)):
            one, other = images[batch[0]], plain[batch[0]]
            (x0, y0, x1, y1), (a0, b0, a1, b1) = one["boxes"][0].long().tolist(), other["boxes"][0].long().tolist()
            crop, same = one["image"][:, y0:y1, x0:x1], other["image"][:, b0:b1, a0:a1]
            flipped = not torch.equal(one["image"], other["image"])
            assert torch.equal(crop.flip(-1 if direction == "horizontal" else -2) if flipped else crop, same)
            seen.add((direction, flipped))
    assert len(seen) == 4


@pytest.mark.parametrize("preset", ["none", "strong"])
def test_augmentation_is_a_function_of_seed_step_and_slot(on_shapes, preset):
    sizes = {"INPUT.MIN_SIZE_TRAIN": [64, 96], "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}
    config = on_shapes(changes={"INPUT.AUGMENTATION": preset, **sizes})
    sets = open_voc(config, "DATASETS.TRAIN", CLASSES)

    def images(seed, start, count):
        batches = training_batches(config, sets, seed, start)
        return [item["image"] for _ in range(count) for item in next(batches)]

    whole, tail = images(0, 0, 6), images(0, 4, 2)
    assert all(torch.equal(one, other) for one, other in zip(whole[8:], tail))
    assert len({image.shape for image in whole}) > 3
    assert any(one.shape != other.shape for one, other in zip(whole, images(1, 0, 6)))


def whole(batch):
    return [
        {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in item.items()}
        for item in batch
    ]


def test_workers_give_the_same_batches_and_ask_no_gpu_for_anything(on_shapes, shapes, cuda_in_use):
    shown = {"INPUT.MIN_SIZE_TRAIN": [64], "INPUT.AUGMENTATION": "voc"}
    changes = {**shown, "DATALOADER.CACHE_IMAGES_MB": 0}
    plain, workers = on_shapes(changes=changes), on_shapes(changes={**changes, "DATALOADER.NUM_WORKERS": 2})
    sets = open_voc(plain, "DATASETS.TRAIN", CLASSES)
    for one, other, _ in zip(training_batches(plain, sets, 0, 3), training_batches(workers, sets, 0, 3), range(8)):
        assert whole(one) == whole(other)
    data = VocDataset(shapes, "test", CLASSES)
    # kept in memory
    kept = on_shapes(changes=shown)
    for one, other, _ in zip(training_batches(plain, sets, 0, 0), training_batches(kept, sets, 0, 0), range(20)):
        assert whole(one) == whole(other)
    alone = [whole(batch) for batch in evaluation_batches(plain, data, largest=2)]
    assert [whole(batch) for batch in evaluation_batches(workers, data, largest=2)] == alone
    share = slice(1, None, 2)
    assert [whole(batch) for batch in evaluation_batches(workers, data, 2, share)] == alone[share]


LOADERS = """
import sys, time
from nst_det.data.voc import VocDataset
from nst_det.detection.config import load_detect_config
from nst_det.detection.data import DetectionImages as Images
from nst_det.detection.data import data_classes, evaluation_batches, open_voc, training_batches
config = load_detect_config(sys.argv[1])
sets = open_voc(config, "DATASETS.TRAIN", data_classes(config))
loaders = [training_batches(config, sets, 0, 0)]
"""
BOTH = "loaders.append(evaluation_batches(config, sets[0], largest=1))\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_training_however_that_ends(on_shapes, tmp_path, signum, left_behind):
    changes = {"DATALOADER.NUM_WORKERS": 6, "SOLVER.IMS_PER_BATCH": 24}
    (tmp_path / "run.yaml").write_text(on_shapes(changes=changes).dump())
    assert left_behind(LOADERS + BOTH, signum, tmp_path / "run.yaml") == []


@pytest.mark.slow
def test_batches_that_wait_take_few_files(on_shapes, tmp_path):
    changes = {"DATALOADER.NUM_WORKERS": 12, "SOLVER.IMS_PER_BATCH": 16, "INPUT.MIN_SIZE_TRAIN": [32]}
    (tmp_path / "run.yaml").write_text(on_shapes(changes=changes).dump())
    assert_takes_few_files(LOADERS, tmp_path / "run.yaml")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line(tmp_path, small, workers):
    data, _ = write_voc(tmp_path, [(1, 1, 10, 10, 0)])
    path = tmp_path / "JPEGImages" / "one.png"
    path.write_bytes(path.read_bytes()[:500])
    config = small({"DATALOADER.NUM_WORKERS": workers, "DATALOADER.CACHE_IMAGES_MB": 0, "SOLVER.IMS_PER_BATCH": 1})
    for batches in (training_batches(config, [data], 0, 0), evaluation_batches(config, data)):
        with pytest.raises(UserError, match=rf"^{path}: .*") as caught:
            next(batches)
        assert "Traceback" not in str(caught.value)


def test_test_images_of_one_size_share_a_batch(on_shapes, shapes):
    data = VocDataset(shapes, "test", CLASSES)
    batches = list(evaluation_batches(on_shapes(), data, largest=3))
    assert sorted(item["image_id"] for batch in batches for item in batch) == sorted(data.ids)
    shapes_of = [{tuple(item["image"].shape) for item in batch} for batch in batches]
    assert all(len(of_batch) == 1 for of_batch in shapes_of)
    # wherever in the list they are: as many batches as must be
    counts = Counter(tuple(item["image"].shape) for batch in batches for item in batch)
    assert Counter(shape for (shape,) in shapes_of) == {shape: -(-count // 3) for shape, count in counts.items()}
    assert len(counts) > 1


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("more", "own"),
    [
        ({}, True),
        ({"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}, True),
        ({"INPUT.CROP.ENABLED": True}, True),
        ({"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute_range", "INPUT.CROP.SIZE": [60, 80]}, True),
        # Detectron2 has no key for the rest
        ({"INPUT.AUGMENTATION": "voc"}, False),
        ({"INPUT.AUGMENTATION": "strong", "INPUT.RANDOM_FLIP": "vertical"}, False),
    ],
)
def test_examples_are_those_of_detectron2s_mapper(on_shapes, shapes, more, own):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import get_cfg
    from detectron2.data import DatasetMapper

    from nst_det.detection.config import add_nst_det_config
    from nst_det.detectron2.data import ImageMapper, SeededImages, voc_dicts

    changes = {"INPUT.MIN_SIZE_TRAIN": [70, 90], "INPUT.MAX_SIZE_TRAIN": 100, "INPUT.FORMAT": "BGR"}
    config = on_shapes(changes=changes | more)
    cfg = get_cfg()
    add_nst_det_config(cfg)
    cfg.INPUT.CROP.update(config.INPUT.CROP)
    cfg.INPUT.update({key: value for key, value in config.INPUT.items() if key != "CROP"})
    data = VocDataset(shapes, "trainval", CLASSES)
    mapper = (DatasetMapper if own else ImageMapper)(cfg, True)
    theirs = SeededImages(voc_dicts(data, use_difficult=False), mapper, seed=5)
    ours = DetectionImages(list_items([data], False, False), config, train=True, seed=5)
    for batch, _ in zip(StepBatchSampler(len(data), 2, 5), range(10)):
        for place in batch:
            one, other = ours[place], theirs[place]
            assert torch.equal(one["image"], other["image"])
            assert torch.equal(one["boxes"], other["instances"].gt_boxes.tensor)
            assert torch.equal(one["labels"], other["instances"].gt_classes)


@pytest.mark.real_data
def test_zero_area_boxes_of_bccd_are_left_out(real_data, caplog):
    data = VocDataset(real_data / "bccd", "train")
    items = list_items([data], use_difficult=False, filter_empty=True)
    lines = [record.message for record in caplog.records if "has no area" in record.message]
    assert lines
    assert all("BloodImage_00338" in line or "BloodImage_00343" in line for line in lines)
    assert all((item.boxes[:, 2:] > item.boxes[:, :2]).all() for item in items)
