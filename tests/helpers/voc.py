"""Small VOC folders made for one test."""

from pathlib import Path

import cv2
import numpy as np

from nst_det.data.synthetic import GenerateSettings

# 30 images to detect on, as few as can be to classify
SMALL_DATA = GenerateSettings(
    classification_images=3,
    classification_val_images=3,
    classification_classes=3,
    detection_images=24,
    detection_test_images=6,
    detection_classes=3,
)


def obj(name="cat", box=(1, 1, 10, 10), extra=""):
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def xml(objects="", width=40, height=30, extra=""):
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{extra}{size}{objects}</annotation>"


def jpeg(width=40, height=30, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_list(root, name, ids):
    write(root / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{id_}\n" for id_ in ids))


def make(root, annotations, split="train"):
    """A VOC folder; ``annotations`` is id to XML text.  No two images are alike."""
    root = Path(root)
    for seed, (id_, text) in enumerate(annotations.items()):
        write(root / "Annotations" / f"{id_}.xml", text)
        write(root / "JPEGImages" / f"{id_}.jpg", jpeg(seed=seed))
    write_list(root, split, annotations)
    return root
