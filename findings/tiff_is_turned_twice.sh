#!/usr/bin/env bash
# An image reader that applies the orientation tag by hand turns a TIFF twice, and OpenCV turns it though told not to.
#
# Pillow 13.0.0 gives JPEG, PNG and WebP as they are stored, with their tag; detection code reads the tag by getexif() and
# transposes.  A TIFF it turns itself when the pixels are loaded: its size is the turned one already when it is opened,
# while getexif() still has the tag until then.  So the same lines of code give a TIFF upside down, or lying where it
# should stand, and boxes lie elsewhere; with the tag 3 not even the size tells.  ImageOps.exif_transpose knows this.
# OpenCV 5.0.0 (opencv-python-headless) turns a TIFF even with IMREAD_IGNORE_ORIENTATION, which a JPEG obeys.
# Seen: stored 40 x 20 (width x height), tag 6: JPEG by hand 20 x 40, right; TIFF by hand 40 x 20, wrong; tag 3: TIFF by hand
# the stored pixels.  OpenCV, told to ignore the tag: JPEG 40 x 20, TIFF 20 x 40.
# Exit code 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "pillow==13.0.0" "numpy<3" "opencv-python-headless==5.0.0.93"
"$folder/env/bin/python" - <<'PYTHON'
import io
import sys

import cv2
import numpy as np
from PIL import Image, ImageOps

TAG = 0x0112
TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}
stored = np.zeros((20, 40, 3), np.uint8)
stored[:, :20], stored[:10, 20:] = 255, 128
right = {3: stored[::-1, ::-1], 6: np.rot90(stored, -1)}


def written(form: str, tag: int) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[TAG] = tag
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    Image.fromarray(stored).save(file, form, exif=exif, **options)
    return file.getvalue()


def by_hand(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    tag = image.getexif().get(TAG)
    return np.asarray(image.transpose(TURNS[tag]) if tag in TURNS else image)


def by_pillow(content: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))


def by_opencv(content: bytes) -> np.ndarray:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(content, np.uint8), flags)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool((abs(one.astype(int) - other) <= 3).all())


found = {}
for form in ("JPEG", "PNG", "TIFF"):
    for tag in TURNS:
        content = written(form, tag)
        found[form, tag] = [same(read(content), right[tag]) for read in (by_hand, by_pillow)]
        print(form, tag, "by hand right:", found[form, tag][0], " exif_transpose right:", found[form, tag][1])
ignoring = {form: same(by_opencv(written(form, 6)), stored) for form in ("JPEG", "TIFF")}
print("OpenCV ignores the tag where told to:", ignoring)
expected = {key: [key[0] != "TIFF", True] for key in found}
sys.exit(0 if found == expected and ignoring == {"JPEG": True, "TIFF": False} else 1)
PYTHON
