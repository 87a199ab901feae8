"""One PASCAL VOC annotation: XML in, checked numbers out.

Only direct children count, so that the boxes of ``<part>`` (head, hand, foot) are never taken for objects.
``<filename>``, ``<folder>`` and ``<path>`` are not used: the image is found by the annotation's own name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from nst_det.data.safe_io import read_bytes, shown, shown_path
from nst_det.errors import UserError

# a real annotation has a few kilobytes; this leaves room for some ten thousand objects
MAX_XML_BYTES = 4 << 20
# the largest side and coordinate, in pixels: float32 still resolves a sixteenth of a pixel there
MAX_PIXELS = 1_000_000
CORNERS = ("xmin", "ymin", "xmax", "ymax")
FLAGS = {"": False, "0": False, "false": False, "unspecified": False, "1": True, "true": True}
_NUMBER = re.compile(r"[-+]?\d{1,12}(\.\d{0,20})?([eE][-+]?\d{1,2})?", re.ASCII)


@dataclass(frozen=True)
class VocObject:
    """One object.

    Attributes:
        name: class name.
        box: (xmin, ymin, xmax, ymax) as on disk: pixels counted from 1, both ends inclusive.
        difficult: left out of the positives when AP is computed.
        truncated: the box doesn't hold the whole object.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class VocAnnotation:
    """What one XML file says about one image of ``width`` x ``height`` pixels; ``id`` is the file's stem."""

    id: str
    width: int
    height: int
    objects: tuple[VocObject, ...]

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32, xyxy, 0-based continuous: (xmin - 1, ymin - 1, xmax, ymax)."""
        return to_zero_based([item.box for item in self.objects])

    @property
    def names(self) -> tuple[str, ...]:
        """N class names."""
        return tuple(item.name for item in self.objects)

    @property
    def difficult(self) -> np.ndarray:
        """(N,) bool."""
        return np.array([item.difficult for item in self.objects], dtype=bool)


def to_zero_based(boxes: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Boxes as on disk (1-based, inclusive) as 0-based continuous xyxy, float32.

    Example:
        >>> to_zero_based([(1, 1, 10, 20)])
        array([[ 0.,  0., 10., 20.]], dtype=float32)
    """
    one_based = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return (one_based - (1, 1, 0, 0)).astype(np.float32)


def usable_boxes(annotation: VocAnnotation) -> tuple[np.ndarray, list[str]]:
    """Which boxes a detector can be trained on.

    A box is dropped where xmax <= xmin or ymax <= ymin (no area), or where it lies wholly outside the image.

    Returns:
        keep: (N,) bool.
        dropped: one line for each box that is not kept, naming the image, the object and the box.
    """
    keep = np.ones(len(annotation.objects), dtype=bool)
    dropped = []
    for index, item in enumerate(annotation.objects):
        fault = box_fault(item.box, annotation.width, annotation.height)
        if fault in ("no area", "outside"):
            keep[index] = False
            what = "has no area" if fault == "no area" else "lies outside the image"
            dropped.append(f"{annotation.id}: the box {_corners(item.box)} of {describe(item, index)} {what}")
    return keep, dropped


def box_fault(box: Sequence[float], width: int, height: int) -> str | None:
    """``no area``, ``outside`` (wholly), ``reaches outside`` (partly), or None for a sound box.

    Args:
        box: xmin, ymin, xmax, ymax in pixels, counted from 1, both ends inclusive.
        width: of the image in pixels.
        height: of the image in pixels.
    """
    xmin, ymin, xmax, ymax = box
    if xmax <= xmin or ymax <= ymin:
        return "no area"
    if xmax < 1 or ymax < 1 or xmin > width or ymin > height:
        return "outside"
    if xmin < 1 or ymin < 1 or xmax > width or ymax > height:
        return "reaches outside"
    return None


def describe(item: VocObject, index: int) -> str:
    """``object 3 (car)``, counted from 1."""
    return f"object {index + 1} ({shown(item.name)})"


def _corners(box: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in box) + ")"


def read_annotation(path: Path) -> VocAnnotation:
    """Read one XML file strictly.

    Raises:
        UserError: the first thing that is wrong with it, and how many more there are.
    """
    annotation, problems = scan_annotation(path)
    if annotation is None or problems:
        more = f" (and {len(problems) - 1} more; nst-det check-data lists all)" if len(problems) > 1 else ""
        raise UserError(f"{shown_path(path)}: {problems[0]}{more}")
    return annotation


def scan_annotation(path: Path) -> tuple[VocAnnotation | None, list[str]]:
    """Read one XML file and collect everything that is wrong with it.

    Returns:
        The annotation with the objects that can be read, or None where there is no size or no XML at all;
        and the problems, each one line without the file's name.

    Raises:
        UserError: the file is missing, unreadable or larger than :data:`MAX_XML_BYTES`.
    """
    return parse_annotation(read_bytes(path, MAX_XML_BYTES, "annotation"), path.stem)


def parse_annotation(data: bytes, name: str) -> tuple[VocAnnotation | None, list[str]]:
    """:func:`scan_annotation` on bytes; ``name`` becomes the annotation's id."""
    try:
        root = fromstring(data, forbid_dtd=True)
    except DefusedXmlException as error:
        return None, [f"XML with a DOCTYPE or entities is refused ({type(error).__name__}); remove them"]
    except (ParseError, ValueError, LookupError) as error:
        return None, [f"not well-formed XML ({shown(str(error))}); write it again or remove it"]
    if root.tag != "annotation":
        return None, [f"its root is <{shown(root.tag, 40)}>, not <annotation>; it is no VOC annotation"]
    problems: list[str] = []
    width, height = (_side(root, side, problems) for side in ("width", "height"))
    objects = [_object(element, number, problems) for number, element in enumerate(root.findall("object"), 1)]
    if width is None or height is None:
        return None, problems
    return VocAnnotation(name, width, height, tuple(item for item in objects if item is not None)), problems


def declared_filename(data: bytes) -> str | None:
    """What ``<filename>`` says, for checks only; None if there is none or the XML is malformed."""
    try:
        return fromstring(data, forbid_dtd=True).findtext("filename")
    except (DefusedXmlException, ParseError, ValueError, LookupError):
        return None


def _side(root: Element, side: str, problems: list[str]) -> int | None:
    text = root.findtext(f"size/{side}")
    value = None if text is None else _number(text)
    if value is None or not 1 <= value <= MAX_PIXELS or value != int(value):
        said = "is missing" if text is None else f"is '{shown(text.strip(), 40)}'"
        problems.append(f"size/{side} {said}; write the image's {side} in pixels")
        return None
    return int(value)


def _object(element: Element, number: int, problems: list[str]) -> VocObject | None:
    before = len(problems)
    name = (element.findtext("name") or "").strip()
    where = f"object {number}" + (f" ({shown(name, 40)})" if name else "")
    if not name or not name.isprintable() or len(name) > 200:
        problems.append(f"{where}: its name is {'missing' if not name else 'not printable or too long'}; correct it")
    flags = [_flag(element, flag, where, problems) for flag in ("difficult", "truncated")]
    box = _box(element, where, problems)
    if box is None or len(problems) > before:
        return None
    return VocObject(name, box, *flags)


def _box(element: Element, where: str, problems: list[str]) -> tuple[float, float, float, float] | None:
    frame = element.find("bndbox")
    if frame is None:
        problems.append(f"{where}: bndbox is missing; add it or remove the object")
        return None
    values = []
    for corner in CORNERS:
        text = frame.findtext(corner)
        value = None if text is None else _number(text)
        if value is None or abs(value) > MAX_PIXELS:
            said = "is missing" if text is None else f"is '{shown(text.strip(), 40)}'"
            problems.append(f"{where}: bndbox/{corner} {said}; write pixels, at most {MAX_PIXELS}")
        else:
            values.append(value)
    return (values[0], values[1], values[2], values[3]) if len(values) == 4 else None


def _number(text: str) -> float | None:
    if not _NUMBER.fullmatch(text.strip()):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _flag(element: Element, flag: str, where: str, problems: list[str]) -> bool:
    text = (element.findtext(flag) or "").strip()
    value = FLAGS.get(text.lower())
    if value is None:
        problems.append(f"{where}: {flag} is '{shown(text, 40)}'; write 0 or 1")
        return False
    return value
