"""Random changes of a training image and its boxes, for both engines: the keys of INPUT, and what they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from fvcore.common.config import CfgNode
from PIL import Image

from nst_det.detection.d2_defaults import CROP_TYPES, HONORED
from nst_det.engine.config import flat, plain
from nst_det.engine.keys import FROM_0_TO_1, Key, are_numbers, below_one, one_of
from nst_det.errors import UserError

# a side that is no longer than this, in pixels after resizing, leaves nothing to learn from; where images are cut or
# jittered, one of less than a pixel
EMPTY_SIDE, LEAST_SIDE = 1e-5, 1.0
# how often an image that would lose all of its objects is drawn, before it is taken whole
ATTEMPTS = 10
# Liu et al. 2016 (SSD), in the units of torchvision's RandomPhotometricDistort; SSD's configuration swaps no channels
COLOR_RANGES = {"brightness": (0.875, 1.125), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.05, 0.05)}
# luma of ITU-R 601
LUMA = (0.299, 0.587, 0.114)
# INPUT.AUGMENTATION -> defaults of the keys that it is short for.  Ghiasi et al. 2021 (arXiv 2012.07177): standard and
# large scale jitter; Liu et al. 2016 (SSD): chances of colors; Detectron2: size of a crop; YOLOv5: least visible part
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "voc": {
        "INPUT.CROP.ENABLED": True,
        "INPUT.SCALE_JITTER": [0.8, 1.25],
        "INPUT.PHOTOMETRIC": 0.5,
        "INPUT.MIN_VISIBLE": 0.1,
    },
    "strong": {"INPUT.SCALE_JITTER": [0.1, 2.0], "INPUT.PHOTOMETRIC": 0.5, "INPUT.MIN_VISIBLE": 0.1},
}

AUGMENTATION_KEYS: dict[str, Key] = {
    "INPUT.AUGMENTATION": one_of(
        "what is changed in training images besides MIN_SIZE_TRAIN and RANDOM_FLIP: sets the defaults of CROP, "
        "SCALE_JITTER, PHOTOMETRIC and MIN_VISIBLE; "
        + "; ".join(
            f"{name}: {', '.join(f'{key[6:]} {value}' for key, value in preset.items())}"
            for name, preset in PRESETS.items()
            if preset
        ),
        *PRESETS,
    ),
    "INPUT.SCALE_JITTER": Key(
        [],
        "smallest and largest factor by which an image's size is multiplied; what then is more than without it is cut "
        "off, at a place drawn by chance; [] for none",
        "[] or two numbers above 0, the smallest first",
        lambda limits: not limits or (are_numbers(limits, 2) and 0 < limits[0] <= limits[1]),
    ),
    "INPUT.PHOTOMETRIC": Key(
        0.0,
        "chance of each of SSD's changes of brightness, contrast, saturation and hue",
        *FROM_0_TO_1,
    ),
    "INPUT.MIN_VISIBLE": below_one(
        "part of a box's area that CROP and SCALE_JITTER have to leave, with a pixel of each side, or the box is left "
        "out; where all boxes would be, the image is drawn again, up to 10 times, and then taken whole",
        "limit",
        0.1,
    ),
}


# the keys of all presets as they are without one
OFF = {key: {**HONORED, **AUGMENTATION_KEYS}[key].default for preset in PRESETS.values() for key in preset}


def change_preset(config: CfgNode, pairs: Sequence[tuple[str, str]]) -> None:
    """Set what INPUT.AUGMENTATION among KEY VALUE pairs is short for, where ``config`` has what its own is short for.

    So a preset that comes on top takes the place of the one in a file; keys that were set by themselves stay.
    """
    wanted = dict(pairs).get("INPUT.AUGMENTATION")
    if wanted not in PRESETS or "INPUT" not in config:
        return
    before, after = ({**OFF, **PRESETS.get(name, {})} for name in (config.INPUT.AUGMENTATION, wanted))
    values = plain(flat(config))
    for key in OFF:
        if values[key] == before[key]:
            config.merge_from_list([key, after[key]])


def augments(given: CfgNode) -> bool:
    """Return whether INPUT asks for more than Detectron2's resizing and mirroring."""
    return bool(given.CROP.ENABLED or given.SCALE_JITTER or given.PHOTOMETRIC)


def check_augmentation(given: CfgNode, source: str) -> None:
    """Refuse a preset of which nothing is left, images without colors to change, and a wrong size of INPUT.CROP."""
    crop, size = given.CROP, given.CROP.SIZE
    if given.AUGMENTATION != "none" and not augments(given):
        raise UserError(
            f"{source}: INPUT.AUGMENTATION {given.AUGMENTATION}: all that it is short for (CROP, SCALE_JITTER, "
            "PHOTOMETRIC) is off; set it to none, or read the config by load_config of this project, which sets them"
        )
    if given.PHOTOMETRIC and given.FORMAT not in ("RGB", "BGR"):
        raise UserError(f"{source}: INPUT.PHOTOMETRIC changes colors; set it to 0 with INPUT.FORMAT {given.FORMAT}")
    if not crop.ENABLED:
        return
    if crop.TYPE not in CROP_TYPES:
        raise UserError(f"{source}: INPUT.CROP.TYPE is {crop.TYPE!r}; set it to one of {', '.join(CROP_TYPES)}")
    relative = crop.TYPE.startswith("relative")
    if not (
        are_numbers(size, 2)
        and (max(size) <= 1 if relative else all(type(side) is int for side in size))
        and min(size) > 0
        and (crop.TYPE != "absolute_range" or size[0] <= size[1])
    ):
        wanted = (
            "two numbers above 0, at most 1" if relative else "two whole numbers above 0, of a range the smallest first"
        )
        raise UserError(f"{source}: INPUT.CROP.SIZE is {size!r}; for TYPE {crop.TYPE} set it to {wanted}")


class Drawn(NamedTuple):
    """What is done to one image: a part of it is cut out, resized, mirrored, and gets other colors, in this order."""

    size: tuple[int, int]  # (height, width) of the result
    cut: tuple[int, int, int, int] | None = None  # left, top, width, height in pixels; None is the whole image
    flip: str = "none"
    colors: tuple[tuple[str, float], ...] = ()  # steps of COLOR_RANGES, in their order

    def pixels(self, image: np.ndarray, bgr: bool) -> np.ndarray:
        """Return an image (H, W, 3) uint8 changed."""
        if self.cut is not None:
            left, top, width, height = self.cut
            image = image[top : top + height, left : left + width]
        image = resize(image, *self.size)
        if self.flip != "none":
            image = image[:, ::-1] if self.flip == "horizontal" else image[::-1]
        return distorted(image, self.colors, bgr)

    def scale(self, height: int, width: int) -> np.ndarray:
        """Return (4,): how many times as wide, high, wide and high a part of an image of that size becomes."""
        _, _, columns, rows = self.cut or (0, 0, width, height)
        return np.array([self.size[1] / columns, self.size[0] / rows] * 2)

    def boxes(self, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
        """Return boxes (N, 4) xyxy of an image of that size as float32, moved with it and cut off at its new edges."""
        rows, columns = self.size
        inside = boxes if self.cut is None else boxes - (self.cut[:2] * 2)
        moved = flip_boxes(inside * self.scale(height, width), rows, columns, self.flip)
        return moved.clip(0, [columns, rows] * 2).astype(np.float32)


class Augmentation:
    """What the keys of INPUT let happen to training images.

    Everything is drawn from NumPy's old generator (a ``RandomState``, or ``np.random`` itself), in the order in which
    Detectron2's RandomCrop, ResizeShortestEdge and RandomFlip draw.
    """

    def __init__(self, given: CfgNode) -> None:
        self.crop, self.jitter, self.chance = given.CROP, tuple(given.SCALE_JITTER), given.PHOTOMETRIC
        self.sizes, self.largest, self.flip = np.array(given.MIN_SIZE_TRAIN), given.MAX_SIZE_TRAIN, given.RANDOM_FLIP
        self.from_range = given.MIN_SIZE_TRAIN_SAMPLING == "range"
        self.least_share = given.MIN_VISIBLE
        self.cuts = bool(self.crop.ENABLED or self.jitter)

    def draw(self, height: int, width: int, boxes: np.ndarray, rng: Any) -> Drawn:
        """Draw for an image of that size; where it has boxes (N, 4) one of them will be :meth:`moved` and kept."""
        for _ in range(ATTEMPTS if self.cuts else 1):
            cut = self._draw_crop(height, width, rng) if self.crop.ENABLED else (0, 0, width, height)
            edge = int(rng.randint(self.sizes[0], self.sizes[1] + 1) if self.from_range else rng.choice(self.sizes))
            drawn = self._jittered(cut, edge, rng) if self.cuts else Drawn(self.shape(height, width, edge))
            if not self.cuts or not len(boxes) or self.moved(drawn, boxes, height, width)[1].any():
                break
        else:
            drawn = Drawn(self.shape(height, width, edge))
        if self.flip != "none" and rng.uniform(0, 1.0) < 0.5:
            drawn = drawn._replace(flip=self.flip)
        return drawn._replace(colors=draw_colors(self.chance, rng)) if self.chance else drawn

    def shape(self, height: int, width: int, edge: int) -> tuple[int, int]:
        return resized_shape(height, width, edge, self.largest)

    def moved(self, drawn: Drawn, boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes (N, 4) float32 after a change, and which of them, (N,) bool, are large enough to be learnt."""
        moved = drawn.boxes(boxes, height, width)
        sides = moved[:, 2:] - moved[:, :2]
        if not self.cuts:
            return moved, (sides > EMPTY_SIDE).all(axis=1)
        whole = np.clip(boxes, 0, [width, height] * 2) * drawn.scale(height, width)
        areas = (whole[:, 2:] - whole[:, :2]).prod(axis=1)
        return moved, (sides >= LEAST_SIDE).all(axis=1) & (sides.prod(axis=1) >= self.least_share * areas)

    def _draw_crop(self, height: int, width: int, rng: Any) -> tuple[int, int, int, int]:
        kind, (one, two) = self.crop.TYPE, self.crop.SIZE
        if kind == "absolute":
            rows, columns = min(one, height), min(two, width)
        elif kind == "absolute_range":
            rows, columns = (int(rng.randint(min(side, one), min(side, two) + 1)) for side in (height, width))
        else:
            least = np.asarray(self.crop.SIZE, dtype=np.float32)
            shares = least + rng.rand(2) * (1 - least) if kind == "relative_range" else self.crop.SIZE
            rows, columns = (max(int(side * share + 0.5), 1) for side, share in zip((height, width), shares))
        top = int(rng.randint(height - rows + 1))
        return int(rng.randint(width - columns + 1)), top, columns, rows

    def _jittered(self, cut: tuple[int, int, int, int], edge: int, rng: Any) -> Drawn:
        """Return a cut resized to ``edge`` times a factor; what then would be larger than without it is cut off."""
        left, top, width, height = cut
        size = self.shape(height, width, edge)
        factor = rng.uniform(*self.jitter) if self.jitter else 1.0
        if factor <= 1:
            return Drawn((max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)), cut)
        columns, rows = max(round(width / factor), 1), max(round(height / factor), 1)
        top += int(rng.randint(height - rows + 1))
        left += int(rng.randint(width - columns + 1))
        return Drawn(size, (left, top, columns, rows))


def draw_colors(chance: float, rng: Any) -> tuple[tuple[str, float], ...]:
    """Return the steps that an image gets, each with that chance; the contrast comes second, or last."""
    steps = [(name, rng.uniform(*limits)) for name, limits in COLOR_RANGES.items() if rng.uniform(0, 1.0) < chance]
    return tuple(sorted(steps, key=lambda step: step[0] == "contrast") if rng.uniform(0, 1.0) < 0.5 else steps)


def distorted(image: np.ndarray, colors: tuple[tuple[str, float], ...], bgr: bool) -> np.ndarray:
    """Return (H, W, 3) uint8 in other colors, as torchvision's functions make them, rounded once."""
    if not colors:
        return image
    # nothing else in stage two needs it
    import cv2

    # a loader process can't use the threads of its parent
    cv2.setNumThreads(0)
    pixels = np.ascontiguousarray(image, dtype=np.float32)
    to_hsv, back = (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR) if bgr else (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
    luma = np.array(LUMA[::-1] if bgr else LUMA)
    for name, amount in colors:
        if name == "brightness":
            pixels *= amount
        elif name == "contrast":
            mean = luma @ cv2.mean(pixels)[:3]
            pixels *= amount
            pixels += (1 - amount) * mean
        elif name == "saturation":
            pixels = cv2.transform(pixels, amount * np.eye(3) + (1 - amount) * luma)
        else:
            hsv = cv2.cvtColor(pixels, to_hsv)
            hue = hsv[..., 0]
            hue += 360 * (amount % 1)
            hue -= 360 * (hue >= 360)
            pixels = cv2.cvtColor(hsv, back)
        np.clip(pixels, 0, 255, out=pixels)
    return np.rint(pixels).astype(np.uint8)


def resized_shape(height: int, width: int, size: int, largest: int) -> tuple[int, int]:
    """Return (height, width) after Detectron2's shortest-edge resize; size 0 leaves the image as it is."""
    if size == 0:
        return height, width
    scale = size / min(height, width)
    new_height, new_width = (size, scale * width) if height < width else (scale * height, size)
    longest = max(new_height, new_width)
    if longest > largest:
        new_height, new_width = new_height * (largest / longest), new_width * (largest / longest)
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3) by PIL's bilinear filter, which averages where it shrinks."""
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def flip_boxes(boxes: np.ndarray, height: int, width: int, direction: str) -> np.ndarray:
    """Return (N, 4) xyxy boxes in an image of that size, mirrored ``horizontal``, ``vertical`` or not (``none``)."""
    if direction == "none":
        return boxes
    x0, y0, x1, y1 = boxes.T
    if direction == "horizontal":
        return np.stack((width - x1, y0, width - x0, y1), axis=1)
    return np.stack((x0, height - y1, x1, height - y0), axis=1)
