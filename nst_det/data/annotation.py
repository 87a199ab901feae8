"""One PASCAL VOC annotation: XML in, checked numbers out, and back to XML.

Only direct children count, so that the boxes of ``<part>`` (head, hand, foot) are never taken for objects.
``<filename>``, ``<folder>`` and ``<path>`` are not used: the image is found by the annotation's own name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, SubElement, indent, tostring

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
# kinds of faults, and the words for them
SWAPPED, NO_AREA, OUTSIDE, REACHES_OUTSIDE = "swapped corners", "box with no area", "box outside", "box reaches outside"
FAULTS = {
    SWAPPED: "has its corners swapped (xmin > xmax or ymin > ymax)",
    NO_AREA: "has no area",
    OUTSIDE: "lies outside the image",
    REACHES_OUTSIDE: "reaches outside the image",
}
_UTF8 = re.compile(rb"""^(\s*<\?xml[^>]*?encoding\s*=\s*["'])utf_?8(?=["'])""", re.IGNORECASE)
# float() alone would take "nan", "inf", "4_0" and digits of other scripts
NUMBER = re.compile(r"[-+]?\d{1,12}(\.\d{0,20})?([eE][-+]?\d{1,2})?", re.ASCII)


@dataclass(frozen=True)
class VocObject:
    """One object of class ``name``; ``box`` is as on disk: pixels counted from 1, both ends inclusive."""

    name: str
    box: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax
    difficult: bool = False  # left out of the positives when AP is computed
    truncated: bool = False  # the box doesn't hold the whole object


@dataclass(frozen=True)
class VocAnnotation:
    """The objects on one image of ``width`` x ``height`` pixels; ``id`` is the file's stem.

    Both sides are 0 where the file doesn't say them: then the image itself does.
    """

    id: str
    width: int
    height: int
    objects: tuple[VocObject, ...]

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32, xyxy, 0-based continuous: (xmin - 1, ymin - 1, xmax, ymax)."""
        one_based = np.array([item.box for item in self.objects], dtype=np.float64).reshape(-1, 4)
        return (one_based - (1, 1, 0, 0)).astype(np.float32)

    @property
    def names(self) -> tuple[str, ...]:
        """N class names."""
        return tuple(item.name for item in self.objects)

    @property
    def difficult(self) -> np.ndarray:
        """(N,) bool."""
        return np.array([item.difficult for item in self.objects], dtype=bool)

    def describe(self, index: int) -> str:
        """Return ``object 3 (car)``, counted from 1."""
        return f"object {index + 1} ({shown(self.objects[index].name)})"

    def box_fault(self, index: int) -> tuple[str, str] | None:
        """Return the kind of fault of an object's box, and one line about it."""
        box, width, height = self.objects[index].box, self.width, self.height
        xmin, ymin, xmax, ymax = box
        # both ends are inside: a side is xmax - xmin + 1 pixels
        if xmax - xmin < -1 or ymax - ymin < -1:
            fault = SWAPPED
        elif xmax <= xmin or ymax <= ymin:
            fault = NO_AREA
        elif not width:
            return None
        elif xmax < 1 or ymax < 1 or xmin > width or ymin > height:
            fault = OUTSIDE
        elif xmin < 1 or ymin < 1 or xmax > width or ymax > height:
            fault = REACHES_OUTSIDE
        else:
            return None
        corners = ", ".join(f"{value:g}" for value in box)
        size = "" if fault in (SWAPPED, NO_AREA) else f" of {width}x{height}"
        return fault, f"the box ({corners}) of {self.describe(index)} {FAULTS[fault]}{size}"


def usable_boxes(annotation: VocAnnotation) -> tuple[np.ndarray, list[str]]:
    """Return which boxes a detector can be trained on, (N,) bool, and a line for each of the others.

    A box is dropped where its corners are swapped, where it has no area, or where it lies wholly outside the image.
    """
    keep = np.ones(len(annotation.objects), dtype=bool)
    dropped = []
    for index in range(len(keep)):
        fault = annotation.box_fault(index)
        if fault and fault[0] != REACHES_OUTSIDE:
            keep[index] = False
            dropped.append(f"{annotation.id}: {fault[1]}")
    return keep, dropped


def read_annotation(path: Path, id_: str) -> VocAnnotation:
    """Read an image's XML file; the error names the first thing that is wrong with it, and how many more there are."""
    annotation, problems = parse_annotation(read_bytes(path, MAX_XML_BYTES, "annotation"), id_)
    if annotation is None or problems:
        more = f" (and {len(problems) - 1} more; nst-det check-data lists all)" if len(problems) > 1 else ""
        raise UserError(f"{shown_path(path)}: {problems[0]}{more}")
    return annotation


def parse_xml(data: bytes) -> Element:
    """Return the root of an annotation; DOCTYPE and entities are refused."""
    try:
        # the XML parser knows UTF-8 by its proper name alone
        root: Element = fromstring(_UTF8.sub(rb"\1utf-8", data, count=1), forbid_dtd=True)
    except DefusedXmlException as error:
        raise UserError(f"XML with a DOCTYPE or entities is refused ({type(error).__name__}); remove them") from error
    except (ParseError, ValueError, LookupError) as error:
        raise UserError(f"not well-formed XML ({shown(str(error))}); write it again or remove it") from error
    if root.tag != "annotation":
        raise UserError(f"its root is <{shown(root.tag, 40)}>, not <annotation>: not a VOC annotation")
    return root


def parse_annotation(data: bytes, name: str) -> tuple[VocAnnotation | None, list[str]]:
    """Parse XML and return what :func:`annotation_from` does of it; no annotation where it can't be parsed."""
    try:
        root = parse_xml(data)
    except UserError as error:
        return None, [str(error)]
    return annotation_from(root, name)


def annotation_from(root: Element, name: str) -> tuple[VocAnnotation | None, list[str]]:
    """Return the annotation ``name`` with the objects that can be read, and a line for everything that is wrong.

    There is none where the size can't be read; one that is missing or 0 is left to the image.
    """
    problems: list[str] = []
    sides = ("size/width", "size/height")
    unknown = any((root.findtext(side) or "0").strip() in ("", "0") for side in sides)
    width, height = (0, 0) if unknown else (_number(root, side, problems, side=True) for side in sides)
    objects = [_object(element, number, problems) for number, element in enumerate(root.findall("object"), 1)]
    nested = sum(1 for _ in root.iter("object")) - len(objects)
    if nested:
        problems.append(f"{nested} of its <object> are not directly in <annotation>; move them there")
    if width is None or height is None:
        return None, problems
    found = tuple(item for item in objects if item is not None)
    return VocAnnotation(name, int(width), int(height), found), problems


def is_class_name(name: str) -> bool:
    """Return whether a class can have this name: not empty, printable, and at most 200 characters."""
    return 0 < len(name) <= 200 and name.isprintable()


def _object(element: Element, number: int, problems: list[str]) -> VocObject | None:
    before = len(problems)
    name = (element.findtext("name") or "").strip()
    where = f"object {number}" + (f" ({shown(name, 40)})" if name else "")
    if not is_class_name(name):
        problems.append(f"{where}: its name is {'missing' if not name else 'not printable or too long'}; correct it")
    flags = []
    for flag in ("difficult", "truncated"):
        text = (element.findtext(flag) or "").strip()
        share = float(text) if flag == "truncated" and NUMBER.fullmatch(text) else -1
        flags.append(FLAGS.get(text.lower(), share > 0))
        # some tools write which share of the object is cut off
        if text.lower() not in FLAGS and not 0 <= share <= 1:
            problems.append(f"{where}: {flag} is '{shown(text, 40)}'; write 0 or 1")
    frames = element.findall("bndbox")
    if not frames:
        problems.append(f"{where}: bndbox is missing; add it or remove the object")
        return None
    if len(frames) > 1:
        problems.append(f"{where}: bndbox is there {len(frames)} times; write an object for each")
    box = tuple(_number(frames[0], corner, problems, f"{where}: bndbox/") for corner in CORNERS)
    return VocObject(name, box, *flags) if len(problems) == before else None  # type: ignore[arg-type]


def _number(element: Element, path: str, problems: list[str], where: str = "", side: bool = False) -> float | None:
    text = element.findtext(path)
    value = float(text) if text is not None and NUMBER.fullmatch(text.strip()) else None
    if value is None or abs(value) > MAX_PIXELS or (side and not (value >= 1 and value.is_integer())):
        found = "is missing" if text is None else f"is '{shown(text.strip(), 40)}'"
        kind = "a whole number of pixels" if side else "pixels"
        problems.append(f"{where}{path} {found}; write {kind}, at most {MAX_PIXELS}")
        return None
    return value


def voc_xml(
    annotation: VocAnnotation, filename: str, folder: str = "", scores: Sequence[float] = (), digits: str = ".12g"
) -> str:
    """Return an annotation as VOC XML, with a ``<score>`` in each object where there are ``scores``, 0..1.

    ``digits`` is the format of a corner ("" writes all its digits), ``folder`` the data set ("" leaves it out).
    """
    root = Element("annotation")
    _add(root, **({"folder": folder} if folder else {}), filename=filename)
    _add(SubElement(root, "size"), width=annotation.width, height=annotation.height, depth=3)
    _add(root, segmented=0)
    for index, item in enumerate(annotation.objects):
        element = SubElement(root, "object")
        _add(element, name=item.name, **({"score": repr(scores[index])} if scores else {}), pose="Unspecified")
        _add(element, truncated=int(item.truncated), difficult=int(item.difficult))
        corners = {corner: f"{value:{digits}}" for corner, value in zip(CORNERS, item.box)}
        _add(SubElement(element, "bndbox"), **corners)
    indent(root, "\t")
    return tostring(root, encoding="unicode") + "\n"


def _add(parent: Element, **texts: object) -> None:
    for name, text in texts.items():
        SubElement(parent, name).text = str(text)
