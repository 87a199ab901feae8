"""Images from bytes to RGB arrays, with a bound on their size that is checked before anything is decoded.

Pillow decodes and EXIF orientation is applied, both as in Detectron2's reader, so that engines see the same pixels.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import (
    Image,
    JpegImagePlugin,
    MpoImagePlugin,  # noqa: F401 (Pillow registers these when they are imported)
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from nst_det.data.safe_io import read_bytes, shown_path
from nst_det.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_IMAGE_BYTES = 128 << 20
MAX_IMAGE_PIXELS = 80_000_000
# no other decoder of Pillow's is ever given a byte; that of JPEG opens MPO too
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
# more than 8 bits a channel would be cut silently
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION_TAG = 0x0112
_OTHER_FILES = {
    b"gif8": "a GIF",
    b"ii*\0": "a damaged TIFF",
    b"mm\0*": "a damaged TIFF",
    b"ii+\0": "a BigTIFF",
    b"mm\0+": "a BigTIFF",
    b"%pdf": "a PDF",
    b"<svg": "an SVG",
    b"<!doctype html": "a page of HTML",
    b"<html": "a page of HTML",
    b"<?xml": "XML",
}
# not ImageOps.exif_transpose, which raises where the EXIF of an intact image is damaged
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's own warning starts above MAX_IMAGE_PIXELS, where _opened refuses the image in any case
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file into (H, W, 3) uint8, RGB; the error names the file."""
    path = Path(path)
    return decode_image(read_bytes(path, MAX_IMAGE_BYTES, "image"), shown_path(path))


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode a JPEG, PNG, BMP, WebP or TIFF image into (H, W, 3) uint8, RGB.

    Grey and palette images become RGB, transparency is dropped, EXIF orientation is applied.  Errors call it ``name``:
    not an image, truncated, more than :data:`MAX_IMAGE_PIXELS`, more than 8 bits a channel, or a TIFF that has several
    pages or is turned by its orientation tag.
    """
    return EncodedImage(data, name).pixels()


class EncodedImage:
    """An image of which only the header was read; width and height are in pixels, EXIF orientation applied.

    Errors are those of :func:`decode_image`.
    """

    def __init__(self, data: bytes, name: str) -> None:
        # EXIF orientation: 1 is upright, from 5 on the image lies on its side
        self._image, self.orientation = _opened(data, name)
        self.data, self.name = data, name
        width, height = self._image.size
        self.width, self.height = (height, width) if self.orientation >= 5 else (width, height)

    @property
    def is_plain_jpeg(self) -> bool:
        """Return whether it is a JPEG that needs neither turning nor another mode."""
        return self._image.format == "JPEG" and self._image.mode == "RGB" and self.orientation == 1

    def reduction(self, most: int) -> int:
        """Return the largest n up to ``most`` that :meth:`pixels` takes: of 1, 2, 4 and 8 for a JPEG, else 1."""
        jpeg = isinstance(self._image, JpegImagePlugin.JpegImageFile)
        return next((n for n in (8, 4, 2) if jpeg and n <= most), 1)

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """Return (H, W, 3) uint8, RGB; may be called once.

        With a ``reduction`` n the sides are 1 / n as long, rounded up: each pixel is what the JPEG has of n x n.
        """
        try:
            if reduction > 1:
                width, height = self._image.size
                self._image.draft(None, (width // reduction, height // reduction))
            self._image.load()
            turn = _TURNS.get(self.orientation)
            upright = self._image if turn is None else self._image.transpose(turn)
            return np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise all kinds of errors
            raise _undecodable(self.name, error) from error


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Return (width, height) in pixels as :func:`decode_image` would give it, from the header alone."""
    image = EncodedImage(data, name)
    return image.width, image.height


def _opened(data: bytes, name: str) -> tuple[Image.Image, int]:
    """Return an image that is not decoded yet, and its EXIF orientation, 1 to 8."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: more than {MAX_IMAGE_PIXELS} pixels; cut it into tiles, with their boxes") from error
    except UnidentifiedImageError as error:
        kind = next((kind for start, kind in _OTHER_FILES.items() if data.lstrip().lower().startswith(start)), "")
        looks = f"it is {kind or 'another file' if data else 'empty'}"
        raise UserError(f"{name}: no JPEG, PNG, BMP, WebP or TIFF image ({looks}); convert or remove it") from error
    except Exception as error:  # as above
        raise _undecodable(name, error) from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        size = f"{image.width}x{image.height}"
        raise UserError(f"{name}: {size} is more than {MAX_IMAGE_PIXELS} pixels; cut it into tiles, with their boxes")
    # Pillow opens colors of 16 bits in a mode of 8; byte 24 of a PNG is its depth
    depth, pages, turned = data[24] if image.format == "PNG" else 8, False, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        try:
            depth = max(map(int, image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))))
            pages = bool(image.tag_v2.next)
            turned = image.tag_v2.get(_ORIENTATION_TAG) in _TURNS
        except Exception as error:  # as above
            raise _undecodable(name, error) from error
    if depth > 8 or image.mode in DEEP_MODES:
        raise UserError(f"{name}: more than 8 bits a channel; convert it to 8-bit RGB")
    if pages:
        raise UserError(f"{name}: several pages; write the one that is annotated as an image of its own")
    # Pillow turns a TIFF itself, and Detectron2's reader then does so again
    if turned:
        raise UserError(f"{name}: a TIFF with an orientation tag; save it upright, and check that its boxes fit")
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # an intact image may have a damaged EXIF
        orientation = 1
    return image, orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def _undecodable(name: str, error: Exception) -> UserError:
    reason = str(error).split("<_io")[0].strip() or type(error).__name__
    return UserError(f"{name}: can't be decoded as an image ({reason}); replace it or take it out of the list")
