"""Pictures of textured shapes on cluttered ground.

Only the outline tells the classes apart: color, texture, size and place are drawn from the same distributions for
all of them.  Every function draws from the generator that it is given and from nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

# bits of a pixel's fraction in the coordinates that cv2 takes
SHIFT = 4


@dataclass(frozen=True)
class Look:
    """How hard the pictures are.

    Attributes:
        rotation: largest turn of an object to either side, degrees.
        contrast: smallest RGB distance between an object's color and the ground's.
        texture: amplitude of the textures, grey levels.
        noise: largest standard deviation of the pixel noise, grey levels.
        clutter: number of distractors, relative to a dense ground.
        shift: largest distance of an object to classify from the middle, pixels along either axis.
    """

    rotation: float = 30.0
    contrast: float = 100.0
    texture: float = 20.0
    noise: float = 9.0
    clutter: float = 0.5
    shift: float = 11.0


@dataclass(frozen=True)
class Placed:
    """An outline in an image: contours of (N, 2) float64 pixels x, y; its area in pixels, outside parts included."""

    contours: tuple[np.ndarray, ...]
    area: float

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1."""
        points = self.contours[0]
        return (*points.min(axis=0), *points.max(axis=0))


def _circle(radius: float = 1.0, start: float = 0.0, stop: float = 360.0, points: int = 40) -> np.ndarray:
    angle = np.radians(np.linspace(start, stop, points, endpoint=stop - start < 360))
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _regular(corners: int, inner: float | None = None) -> np.ndarray:
    count = corners if inner is None else 2 * corners
    angle = np.arange(count) * 2 * np.pi / count - np.pi / 2
    radius = np.ones(count)
    if inner is not None:
        radius[1::2] = inner
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _crescent() -> np.ndarray:
    # the inner arc goes back from the outer one's end to its start
    outer = _circle(1.0, 55, 305)
    tip = np.cos(np.radians(55)), np.sin(np.radians(55))
    center = 0.45
    angle = np.arctan2(tip[1], tip[0] - center)
    radius = np.hypot(tip[0] - center, tip[1])
    back = np.linspace(2 * np.pi - angle, angle, 30)
    inner = np.stack([center + radius * np.cos(back), radius * np.sin(back)], axis=1)
    return np.concatenate([outer, inner])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - y.mean()], axis=1) / 17


_THIRD = 0.34
_CROSS = [(_THIRD, -1), (_THIRD, -_THIRD), (1, -_THIRD), (1, _THIRD), (_THIRD, _THIRD), (_THIRD, 1)]
_ARROW = [(1, 0), (0.1, 0.8), (0.1, 0.32), (-1, 0.32), (-1, -0.32), (0.1, -0.32), (0.1, -0.8)]
_BOLT = [(0.25, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.25), (0.05, -0.25)]

# outer contour first, holes after it; all inside the unit circle or nearly
OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "ellipse": (_circle() * (1.0, 0.66),),
    "square": (_circle(1.0, 45, 405, 4) * 1.1,),
    "triangle": (_regular(3),),
    "star": (_regular(5, 0.45),),
    "cross": (np.array(_CROSS + [(-x, -y) for x, y in _CROSS]),),
    "ring": (_circle(), _circle(0.55)),
    "hexagon": (_regular(6),),
    "crescent": (_crescent(),),
    "arrow": (np.array(_ARROW),),
    "heart": (_heart(),),
    "bolt": (np.array(_BOLT),),
    "halfmoon": (_circle(1.0, 0, 180, 24) - (0, 0.4),),
}


def place(rng: np.random.Generator, name: str, center: tuple[float, float], radius: float, look: Look) -> Placed:
    """An outline turned, stretched and sheared at random, about ``radius`` pixels around ``center``."""
    angle = np.radians(rng.uniform(-look.rotation, look.rotation))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    warp = turn @ np.array([[stretch, rng.uniform(-0.12, 0.12)], [0.0, 1 / stretch]])
    contours = tuple(radius * points @ warp.T + center for points in OUTLINES[name])
    areas = [_area(points) for points in contours]
    return Placed(contours, areas[0] - sum(areas[1:]))


def _area(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def fill(placed: Placed, height: int, width: int) -> np.ndarray:
    """(H, W) uint8 coverage, 0..255, edges smoothed."""
    mask = np.zeros((height, width), np.uint8)
    _fill(mask, list(placed.contours), 255)
    return mask


def _fill(image: np.ndarray, contours: list[np.ndarray], color: int | tuple[float, ...]) -> None:
    points = [np.round(contour * (1 << SHIFT)).astype(np.int32) for contour in contours]
    cv2.fillPoly(image, points, color, lineType=cv2.LINE_AA, shift=SHIFT)


def texture(rng: np.random.Generator, height: int, width: int, color: np.ndarray, amplitude: float) -> np.ndarray:
    """(H, W, 3) float32: a color modulated by soft blobs, stripes and a slope of brightness."""
    cells = rng.standard_normal((int(rng.integers(3, 10)), int(rng.integers(3, 10)))).astype(np.float32)
    pattern = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC) * rng.uniform(0.2, 0.8)
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 18)
    x = np.arange(width, dtype=np.float32) * np.float32(2 * np.pi * np.cos(angle) / period)
    y = np.arange(height, dtype=np.float32) * np.float32(2 * np.pi * np.sin(angle) / period)
    phase = x[None, :] + y[:, None] + np.float32(rng.uniform(0, 2 * np.pi))
    pattern += np.sin(phase) * np.float32(rng.uniform(0, 1))
    slope = rng.uniform(-0.7, 0.7, 2).astype(np.float32)
    pattern += slope[0] * np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    pattern += slope[1] * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    tint = rng.uniform(0.6, 1.2, 3).astype(np.float32) * np.float32(amplitude)
    return color.astype(np.float32) + pattern[..., None] * tint


def ground(rng: np.random.Generator, height: int, width: int, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """A cluttered ground, (H, W, 3) float32, and its main color, (3,)."""
    color = rng.uniform(30, 225, 3)
    image = texture(rng, height, width, color, look.texture)
    dense = 18 * height * width / 64**2
    for _ in range(rng.poisson(look.clutter * dense)):
        shade = tuple((color + rng.normal(0, 32, 3)).clip(0, 255).tolist())
        spot = rng.uniform((0, 0), (width, height))
        if rng.random() < 0.5:
            end = spot + rng.uniform(-0.6, 0.6, 2) * 48
            ends = np.round(np.stack([spot, end]) * (1 << SHIFT)).astype(np.int32).tolist()
            cv2.line(image, ends[0], ends[1], shade, int(rng.integers(1, 4)), cv2.LINE_8, SHIFT)
        else:
            corners = int(rng.integers(3, 8))
            angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
            radii = rng.uniform(2, 9, corners)
            blob = spot + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            points = np.round(blob * (1 << SHIFT)).astype(np.int32)
            cv2.fillPoly(image, [points], shade, cv2.LINE_8, SHIFT)
    return image, color


def object_color(rng: np.random.Generator, around: np.ndarray, contrast: float) -> np.ndarray:
    """A color at least ``contrast`` away from ``around`` in RGB; both (3,), 0..255.

    Raises:
        ValueError: there is none, or none was met in 1000 draws.
    """
    for _ in range(1000):
        color = rng.uniform(10, 245, 3)
        if np.linalg.norm(color - around) >= contrast:
            return color
    raise ValueError(f"no color is {contrast} away from {around}; the largest possible contrast is about 200")


def paint(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, color: np.ndarray, look: Look) -> None:
    """Blend a textured object into a float image in place.

    Args:
        rng: of the texture.
        image: (H, W, 3) float32 RGB, 0..255; is changed.
        mask: (H, W) uint8, 255 where the object is.
        color: (3,), 0..255.
        look: its texture's amplitude.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    alpha = mask[window].astype(np.float32)[..., None] / 255
    filled = texture(rng, alpha.shape[0], alpha.shape[1], color, look.texture)
    image[window] += alpha * (filled - image[window])


def finish(rng: np.random.Generator, image: np.ndarray, look: Look) -> np.ndarray:
    """Pixel noise on an image (H, W, 3) float32, 0..255, then uint8."""
    sigma = np.float32(rng.uniform(0.2, 1.0) * look.noise)
    return (image + sigma * rng.standard_normal(image.shape, dtype=np.float32)).clip(0, 255).astype(np.uint8)


def encode_jpeg(rng: np.random.Generator, image: np.ndarray) -> bytes:
    """An RGB image (H, W, 3) uint8 as JPEG of a quality that varies.

    Raises:
        RuntimeError: this build of OpenCV can't write JPEG.
    """
    quality = int(rng.integers(85, 96))
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise RuntimeError("cv2 can't encode JPEG")
    return data.tobytes()
