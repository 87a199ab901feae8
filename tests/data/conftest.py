"""Small VOC folders made for one test."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest


def xml(objects="", width=40, height=30, extra=""):
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{extra}{size}{objects}</annotation>"


def obj(name="cat", box=(1, 1, 10, 10), extra=""):
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def jpeg(width=40, height=30, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make(root, annotations, split="train", image=True):
    """A VOC folder; ``annotations`` is id to XML text."""
    root = Path(root)
    (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
    for id_, text in annotations.items():
        write(root / "Annotations" / f"{id_}.xml", text)
        if image:
            write(root / "JPEGImages" / f"{id_}.jpg", jpeg())
    write(root / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{id_}\n" for id_ in annotations))
    return root


@pytest.fixture(scope="session")
def voc():
    """Makers of VOC folders, their XML and their images."""
    return SimpleNamespace(xml=xml, obj=obj, jpeg=jpeg, write=write, make=make)
