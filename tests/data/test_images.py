import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nst_det.data.images import MAX_IMAGE_PIXELS, decode_image, image_size, read_image
from nst_det.errors import UserError
from tests.helpers.voc import jpeg, write


def encode(array_or_image, format="PNG", **options):
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_as_rgb(format):
    decoded = decode_image(encode(PIXELS, format), "x")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, PIXELS)


def test_grey_palette_and_transparent_images_become_rgb():
    grey = decode_image(encode(PIXELS[..., 0]), "x")
    np.testing.assert_array_equal(grey, np.repeat(PIXELS[..., :1], 3, axis=2))
    alpha = np.dstack([PIXELS, np.full((5, 7), 9, np.uint8)])
    np.testing.assert_array_equal(decode_image(encode(alpha), "x"), PIXELS)
    palette = Image.fromarray(PIXELS).quantize(4)
    np.testing.assert_array_equal(decode_image(encode(palette), "x"), np.array(palette.convert("RGB")))


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, PIXELS[::-1, ::-1]),
        (4, PIXELS[::-1]),
        (5, PIXELS.transpose(1, 0, 2)),
        (6, np.rot90(PIXELS, -1)),
        (7, PIXELS[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(PIXELS, 1)),
        (77, PIXELS),
    ],
)
def test_exif_orientation_is_applied(orientation, expected):
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encode(image, "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data, "x"), expected)
    assert image_size(data, "x") == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a\1\0\1\0\0\0\0;", jpeg()[:-200]]
)
def test_what_is_no_image_is_named(tmp_path, data):
    with pytest.raises(UserError, match=r"cut\.jpg: .*image"):
        read_image(write(tmp_path / "cut.jpg", data))
    if len(data) < 100:
        with pytest.raises(UserError, match="^it: .*image"):
            image_size(data, "it")


def test_sixteen_bits_a_channel_are_refused_rather_than_cut():
    deep = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000
    with pytest.raises(UserError, match="^x: .*8 bits"):
        decode_image(encode(deep), "x")


@pytest.mark.parametrize("kind", ["RGB", "L", "1", "P", "RGBA", "CMYK", "LZW"])
def test_tiff_is_what_pillow_makes_of_it(kind):
    image = Image.fromarray(PIXELS).convert("RGB" if kind == "LZW" else kind)
    data = encode(image, "TIFF", **({"compression": "tiff_lzw"} if kind == "LZW" else {}))
    np.testing.assert_array_equal(decode_image(data, "x"), np.array(image.convert("RGB")))
    assert image_size(data, "x") == (7, 5)


def test_tiffs_that_are_refused():
    import cv2

    deep = np.arange(105, dtype=np.uint16).reshape(5, 7, 3) * 600
    for pixels in (deep, deep[..., 0], deep[..., 0].astype(np.float32)):
        with pytest.raises(UserError, match="^x: .*8 bits"):
            decode_image(cv2.imencode(".tif", pixels)[1].tobytes(), "x")
    image = Image.fromarray(PIXELS)
    with pytest.raises(UserError, match="^x: several pages"):
        image_size(encode(image, "TIFF", save_all=True, append_images=[image]), "x")
    for orientation in range(1, 10):
        data = encode(image, "TIFF", tiffinfo={0x0112: orientation})
        if orientation in (1, 9):
            np.testing.assert_array_equal(decode_image(data, "x"), PIXELS)
        else:
            with pytest.raises(UserError, match="^x: .*orientation"):
                image_size(data, "x")


def with_size(jpeg_bytes, width, height):
    """A JPEG whose header claims another size."""
    at = jpeg_bytes.index(b"\xff\xc0") + 5
    return jpeg_bytes[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg_bytes[at + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9000, 12000, 65535])
def test_a_header_that_claims_a_huge_image_is_refused_before_decoding(side):
    assert side * side > MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=f"^x: .*{MAX_IMAGE_PIXELS}.*tiles"):
        decode_image(with_size(jpeg(), side, side), "x")


def test_pillows_own_warning_is_not_printed_beside_the_error(tmp_path):
    path = write(tmp_path / "big.jpg", with_size(jpeg(), 12000, 12000))
    script = (
        "import sys; from nst_det.data.images import read_image; from nst_det.errors import UserError\n"
        "try: read_image(sys.argv[1])\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "12000x12000 is more than" in done.stdout


@pytest.mark.real_data
def test_real_jpegs_decode_to_the_pixels_of_opencv_within_rounding(real_data):
    import cv2

    for path in sorted((real_data / "bccd" / "JPEGImages").iterdir())[:3]:
        ours, theirs = read_image(path), cv2.imread(str(path))[..., ::-1]
        assert np.abs(ours.astype(int) - theirs).max() <= 2
