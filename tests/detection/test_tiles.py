"""Images in tiles: a detector that sees coloured rectangles, on scenes whose rectangles are known."""

import itertools

import cv2
import numpy as np
import pytest

from nst_det.detection.predictions import Boxes
from nst_det.detection.tiles import Tiles

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def find_rectangles(images, smallest=6):
    """Yield the box of each connected part of one color, as it is seen: cut off at the edge, unseen below ``smallest``.

    The score falls with what is cut off or small, as that of a trained detector does.
    """
    for image in images:
        rows = []
        for label, color in enumerate(COLORS):
            count, _, stats, _ = cv2.connectedComponentsWithStats((image == color).all(2).astype(np.uint8))
            for x, y, width, height, _ in stats[1:count].tolist():
                if min(width, height) >= smallest:
                    rows.append(([x, y, x + width, y + height], label, 1 - 1 / (1 + width * height)))
        rows.sort(key=lambda row: -row[2])
        yield boxes([row[0] for row in rows], [row[2] for row in rows], [row[1] for row in rows])


def scene(size, rectangles):
    image = np.full((*size, 3), 90, np.uint8)
    for label, (left, top, right, bottom) in rectangles:
        image[top:bottom, left:right] = COLORS[label]
    return image


def boxes(rows, scores=None, labels=None):
    found = np.array(rows, np.float32).reshape(-1, 4)
    label = np.zeros(len(rows), np.int64) if labels is None else np.array(labels, np.int64)
    return Boxes(found, label, np.ones(len(rows), np.float32) if scores is None else np.array(scores, np.float32))


def seen(found):
    return sorted(zip(found.labels.tolist(), map(tuple, found.boxes.tolist())))


def random_rectangles(rng, size, sides, count):
    """Rectangles that stay 2 pixels apart."""
    free = np.ones(size, bool)
    placed = []
    for _ in range(50 * count):
        width, height = (int(rng.integers(*sides)) for _ in range(2))
        left, top = int(rng.integers(0, size[1] - width)), int(rng.integers(0, size[0] - height))
        if len(placed) < count and free[max(top - 2, 0) : top + height + 2, max(left - 2, 0) : left + width + 2].all():
            free[top : top + height, left : left + width] = False
            placed.append((int(rng.integers(3)), (left, top, left + width, top + height)))
    return placed


@pytest.mark.parametrize(("size", "overlap"), [((300, 400), 0.2), ((101, 250), 0.5), ((90, 801), 0)])
def test_tiles_cover_the_image_share_what_is_asked_and_are_few(size, overlap):
    side = 100
    tiles = Tiles(side, overlap).places(*size)
    covered = np.zeros(size, bool)
    for left, top, right, bottom in tiles.tolist():
        assert (right - left, bottom - top) == (min(side, size[1]), min(side, size[0]))
        covered[top:bottom, left:right] = True
    assert covered.all()
    for axis, length in ((0, size[1]), (1, size[0])):
        starts = sorted(set(tiles[:, axis].tolist()))
        assert starts[0] == 0
        shared = [a + side - b for a, b in itertools.pairwise(starts)]
        assert min(shared, default=side) >= round(side * overlap) - 1
        # with one less they would share too little
        if len(starts) > 2:
            assert (length - side) / (len(starts) - 2) > side * (1 - overlap)


@pytest.mark.parametrize("seed", range(6))
def test_every_object_is_found_once_and_whole(seed):
    rng = np.random.default_rng(seed)
    size, tiles = (330, 470), Tiles(128, 0.25)
    rectangles = random_rectangles(rng, size, (8, 31), 60)
    # seams go through many of them
    ends = set(tiles.places(*size)[:, [0, 2]].ravel().tolist()) - {0, size[1]}
    assert len(rectangles) > 40
    assert sum(any(left < end < right for end in ends) for _, (left, _, right, _) in rectangles) > 10
    (found,) = tiles.around(find_rectangles)([scene(size, rectangles)])
    assert seen(found) == sorted((label, tuple(map(float, box))) for label, box in rectangles)
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("whole", [True, False])
def test_objects_larger_than_a_tile_are_found_once(whole):
    # across seams in one direction, in both, and larger than a tile; the last is small
    rectangles = [(0, (40, 20, 210, 60)), (1, (60, 90, 290, 270)), (2, (330, 30, 360, 280)), (0, (10, 200, 30, 215))]
    tiles, image = Tiles(100, 0.2), scene((300, 400), rectangles)

    def find(images):
        for part in images:
            # without a look at the whole image pieces are put together
            yield from find_rectangles([part]) if whole or part.shape != image.shape else [boxes([])]

    (found,) = tiles.around(find)([image])
    assert seen(found) == sorted((label, tuple(map(float, box))) for label, box in rectangles)


def test_a_piece_alone_is_kept_and_a_neighbor_is_not_taken_for_it():
    # two touch a seam from both sides without being one, beside each other
    rectangles = [(0, (70, 10, 99, 30)), (0, (70, 34, 99, 54)), (0, (101, 60, 140, 80))]
    (found,) = Tiles(100, 0).around(find_rectangles)([scene((100, 200), rectangles)])
    assert seen(found) == sorted((label, tuple(map(float, box))) for label, box in rectangles)


def test_scores_and_boxes_of_one_object():
    """The box that ends inside its tile stands for the object, with the better score of both."""
    tiles = Tiles(100, 0.4).places(100, 160)
    assert tiles.tolist() == [[0, 0, 100, 100], [60, 0, 160, 100]]
    of_first = boxes([[65, 10, 100, 40], [5, 5, 20, 20]], [0.9, 0.3], [1, 1])
    of_second = boxes([[5, 10, 50, 40], [5, 10, 50, 40]], [0.6, 0.2], [1, 2])
    found = Tiles(100, 0.4).join([of_first, of_second, boxes([])], np.vstack((tiles, [[0, 0, 160, 100]])))
    # another class is another object
    assert found.labels.tolist() == [1, 1, 2]
    assert found.boxes.tolist() == [[65, 10, 110, 40], [5, 5, 20, 20], [65, 10, 110, 40]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.3, 0.2])


def test_small_images_are_given_as_they_are_in_one_stream():
    given = []

    def find(images):
        for image in images:
            given.append(image.shape[:2])
            yield from find_rectangles([image])

    images = [np.zeros((height, width, 3), np.uint8) for height, width in ((50, 60), (64, 64), (64, 100), (10, 10))]
    found = list(Tiles(64, 0.25).around(find)(images))
    assert len(found) == 4
    assert given == [(50, 60), (64, 64), (64, 64), (64, 64), (64, 100), (10, 10)]
