"""One PASCAL VOC annotation: XML in, checked numbers out, and back to XML.

Only direct children count, so that the boxes of ``<part>`` (head, hand, foot) are never taken for objects.
``<filename>``, ``<folder>`` and ``<path>`` are not used: the image is found by the annotation's own name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError
from xml.sax.saxutils import escape

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
NO_AREA, OUTSIDE, REACHES_OUTSIDE = "has no area", "lies outside the image", "reaches outside the image"
# float() alone would take "nan", "inf", "4_0" and digits of other scripts
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
    """The objects on one image of ``width`` x ``height`` pixels; ``id`` is the file's stem."""

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
    """Turn boxes as on disk (1-based, inclusive) into 0-based continuous xyxy, (N, 4) float32.

    Example:
        >>> to_zero_based([(1, 1, 10, 20)])
        array([[ 0.,  0., 10., 20.]], dtype=float32)
    """
    one_based = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return (one_based - (1, 1, 0, 0)).astype(np.float32)


def usable_boxes(annotation: VocAnnotation) -> tuple[np.ndarray, list[str]]:
    """Return which boxes a detector can be trained on, (N,) bool, and a line for each of the others.

    A box is dropped where it has no area, or where it lies wholly outside the image.
    """
    keep = np.ones(len(annotation.objects), dtype=bool)
    dropped = []
    for index, item in enumerate(annotation.objects):
        fault = box_fault(item.box, annotation.width, annotation.height)
        if fault in (NO_AREA, OUTSIDE):
            keep[index] = False
            dropped.append(f"{annotation.id}: {describe_box(item, index)} {fault}")
    return keep, dropped


def box_fault(box: Sequence[float], width: int, height: int) -> str | None:
    """Return what is wrong with a box (1-based, inclusive) in an image of ``width`` x ``height`` pixels."""
    xmin, ymin, xmax, ymax = box
    if xmax <= xmin or ymax <= ymin:
        return NO_AREA
    if xmax < 1 or ymax < 1 or xmin > width or ymin > height:
        return OUTSIDE
    if xmin < 1 or ymin < 1 or xmax > width or ymax > height:
        return REACHES_OUTSIDE
    return None


def describe(item: VocObject, index: int) -> str:
    """Return ``object 3 (car)``, counted from 1."""
    return f"object {index + 1} ({shown(item.name)})"


def describe_box(item: VocObject, index: int) -> str:
    """Return ``the box (1, 1, 9, 9) of object 3 (car)``."""
    return f"the box ({', '.join(f'{value:g}' for value in item.box)}) of {describe(item, index)}"


def read_annotation(path: Path) -> VocAnnotation:
    """Read one XML file; the error names the first thing that is wrong with it, and how many more there are."""
    annotation, problems = parse_annotation(read_bytes(path, MAX_XML_BYTES, "annotation"), path.stem)
    if annotation is None or problems:
        more = f" (and {len(problems) - 1} more; nst-det check-data lists all)" if len(problems) > 1 else ""
        raise UserError(f"{shown_path(path)}: {problems[0]}{more}")
    return annotation


def parse_annotation(data: bytes, name: str) -> tuple[VocAnnotation | None, list[str]]:
    """Collect everything that is wrong with an XML file's content; ``name`` becomes the annotation's id.

    Returns:
        The annotation with the objects that can be read, or None where there is no size or no XML at all;
        and the problems, each one line without the file's name.
    """
    try:
        root = fromstring(data, forbid_dtd=True)
    except DefusedXmlException as error:
        return None, [f"XML with a DOCTYPE or entities is refused ({type(error).__name__}); remove them"]
    except (ParseError, ValueError, LookupError) as error:
        return None, [f"not well-formed XML ({shown(str(error))}); write it again or remove it"]
    if root.tag != "annotation":
        return None, [f"its root is <{shown(root.tag, 40)}>, not <annotation>; it is no VOC annotation"]
    problems: list[str] = []
    size = [
        _number(root, f"size/{side}", problems, f"the image's {side} in pixels", side=True)
        for side in ("width", "height")
    ]
    objects = [_object(element, number, problems) for number, element in enumerate(root.findall("object"), 1)]
    if size[0] is None or size[1] is None:
        return None, problems
    found = tuple(item for item in objects if item is not None)
    return VocAnnotation(name, int(size[0]), int(size[1]), found), problems


def declared_filename(data: bytes) -> str | None:
    """Return the content of ``<filename>``, for checks only; None if there is none or the XML is malformed."""
    try:
        return fromstring(data, forbid_dtd=True).findtext("filename")
    except (DefusedXmlException, ParseError, ValueError, LookupError):
        return None


def _object(element: Element, number: int, problems: list[str]) -> VocObject | None:
    before = len(problems)
    name = (element.findtext("name") or "").strip()
    where = f"object {number}" + (f" ({shown(name, 40)})" if name else "")
    if not name or not name.isprintable() or len(name) > 200:
        problems.append(f"{where}: its name is {'missing' if not name else 'not printable or too long'}; correct it")
    flags = []
    for flag in ("difficult", "truncated"):
        text = (element.findtext(flag) or "").strip()
        flags.append(FLAGS.get(text.lower(), False))
        if text.lower() not in FLAGS:
            problems.append(f"{where}: {flag} is '{shown(text, 40)}'; write 0 or 1")
    frame = element.find("bndbox")
    if frame is None:
        problems.append(f"{where}: bndbox is missing; add it or remove the object")
        return None
    remedy = f"pixels, at most {MAX_PIXELS}"
    box = [_number(frame, corner, problems, remedy, f"{where}: bndbox/") for corner in CORNERS]
    return VocObject(name, tuple(box), *flags) if len(problems) == before else None  # type: ignore[arg-type]


def _number(
    element: Element, path: str, problems: list[str], remedy: str, where: str = "", side: bool = False
) -> float | None:
    text = element.findtext(path)
    value = float(text) if text is not None and _NUMBER.fullmatch(text.strip()) else None
    if value is None or abs(value) > MAX_PIXELS or (side and not (value >= 1 and value.is_integer())):
        found = "is missing" if text is None else f"is '{shown(text.strip(), 40)}'"
        problems.append(f"{where}{path} {found}; write {remedy}")
        return None
    return value


def voc_xml(
    annotation: VocAnnotation, filename: str, folder: str = "", scores: Sequence[float] = (), digits: str = ".12g"
) -> str:
    """Return an annotation as VOC XML, with a ``<score>`` in each object where there are scores.

    Args:
        annotation: its boxes are written as they are, in pixels counted from 1.
        filename: of the image.
        folder: of the data set; "" leaves it out.
        scores: one an object, 0..1, or none.
        digits: format of a corner; "" writes all its digits.
    """
    lines = [
        "<annotation>",
        *([f"\t<folder>{escape(folder)}</folder>"] if folder else []),
        f"\t<filename>{escape(filename)}</filename>",
        "\t<size>",
        f"\t\t<width>{annotation.width}</width>",
        f"\t\t<height>{annotation.height}</height>",
        "\t\t<depth>3</depth>",
        "\t</size>",
        "\t<segmented>0</segmented>",
    ]
    for index, item in enumerate(annotation.objects):
        lines += [
            "\t<object>",
            f"\t\t<name>{escape(item.name)}</name>",
            *([f"\t\t<score>{scores[index]!r}</score>"] if scores else []),
            "\t\t<pose>Unspecified</pose>",
            f"\t\t<truncated>{item.truncated:d}</truncated>",
            f"\t\t<difficult>{item.difficult:d}</difficult>",
            "\t\t<bndbox>",
            *(f"\t\t\t<{corner}>{value:{digits}}</{corner}>" for corner, value in zip(CORNERS, item.box)),
            "\t\t</bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])
