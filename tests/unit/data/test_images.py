"""Images as cameras, browsers and old archives store them: opening, conversion and refusal."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from advtrain.data.images import (
    UndecodableError,
    decoding,
    list_images,
    read_header,
    read_image,
    to_eight_bit,
)
from advtrain.errors import UserError


def stored(image, kind, **options):
    """Return the image as a file in memory."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def chunk(kind, content, crc=None):
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(width, height, bits, color, pixels, *more):
    """Return a PNG of raw pixels; Pillow does not write all kinds that it reads."""
    size = len(pixels) // height
    lines = b"".join(b"\0" + pixels[i * size : (i + 1) * size] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def palette(*colors, transparent=None):
    image = Image.new("P", (len(colors), 1))
    image.putpalette([level for color in colors for level in color])
    image.putdata(range(len(colors)))
    return stored(image, "PNG", **({} if transparent is None else {"transparency": transparent}))


def array(values, dtype):
    return Image.fromarray(np.array([values], dtype))


SIXTEEN = np.array([0, 3000, 40000, 65535], ">u2")
RGB16 = np.repeat(SIXTEEN, 3).tobytes()
RGBA16 = np.repeat([[0, 65535], [65535, 65535], [0, 0]], [3, 1], axis=1).astype(">u2").tobytes()

#: name: (file, gray pixels, or RGB pixels)
CONVERSIONS = {
    "L": (lambda: stored(array([0, 7, 255], "u1"), "PNG"), [0, 7, 255]),
    "1": (lambda: stored(array([0, 1], bool), "PNG"), [0, 255]),
    "I;16 png": (lambda: png(4, 1, 16, 0, SIXTEEN.tobytes()), [0, 11, 156, 255]),
    "I;16 tiff": (lambda: stored(array(SIXTEEN, "<u2"), "TIFF"), [0, 11, 156, 255]),
    "I;16B tiff": (lambda: stored(array(SIXTEEN, ">u2"), "TIFF"), [0, 11, 156, 255]),
    "I pgm": (lambda: io.BytesIO(b"P5 4 1 65535\n" + SIXTEEN.tobytes()), [0, 11, 156, 255]),
    "I tiff": (lambda: stored(array(SIXTEEN, "i4"), "TIFF"), [0, 11, 156, 255]),
    "I;16 with transparent 3000": (
        lambda: png(4, 1, 16, 0, SIXTEEN.tobytes(), chunk(b"tRNS", struct.pack(">H", 3000))),
        [0, 255, 156, 255],
    ),
    "RGB of 16 bits": (
        lambda: png(4, 1, 16, 2, RGB16),
        [[0, 0, 0], [11, 11, 11], [156, 156, 156], [255, 255, 255]],
    ),
    "RGBA of 16 bits": (lambda: png(3, 1, 16, 6, RGBA16), [[0, 0, 0], [255, 255, 255], [255, 255, 255]]),
    "F": (lambda: stored(array([0, 0.5, 1], "f4"), "TIFF"), [0, 128, 255]),
    "P in color": (lambda: palette((9, 8, 7), (255, 0, 0)), [[9, 8, 7], [255, 0, 0]]),
    "P in gray": (lambda: palette((9, 9, 9), (200, 200, 200)), [9, 200]),
    "P with a transparent color": (
        lambda: palette((9, 8, 7), (255, 0, 0), transparent=0),
        [[255, 255, 255], [255, 0, 0]],
    ),
    "RGBA": (
        lambda: stored(array([[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]], "u1"), "PNG"),
        [[10, 20, 30], [255, 255, 255], [204, 204, 204]],
    ),
    "LA": (
        lambda: stored(Image.merge("LA", [array([10, 10], "u1"), array([255, 0], "u1")]), "PNG"),
        [10, 255],
    ),
    "L with a transparent level": (lambda: stored(array([30, 40], "u1"), "PNG", transparency=30), [255, 40]),
    "CMYK": (
        lambda: stored(Image.fromarray(np.array([[[0, 0, 0, 0], [0, 255, 255, 0]]], "u1"), "CMYK"), "TIFF"),
        [[255, 255, 255], [255, 0, 0]],
    ),
    "first frame": (
        lambda: stored(
            array([0, 255], "u1"), "GIF", save_all=True, append_images=[array([255, 0], "u1")], optimize=False
        ),
        [0, 255],
    ),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_read_image_converts_each_mode_by_the_stated_rule(name):
    make, expected = CONVERSIONS[name]
    gray = not isinstance(expected[0], list)
    header, image = read_image(make(), 1 if gray else 3)
    assert np.asarray(image)[0].tolist() == expected
    assert header == read_header(make())
    assert header.gray is gray
    rgb = np.asarray(read_image(make(), 3)[1])[0]
    assert rgb.tolist() == ([[level] * 3 for level in expected] if gray else expected)


def test_color_becomes_gray_by_luma_weights():
    assert np.asarray(to_eight_bit(array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], "u1"), 1)).tolist() == [
        [76, 150, 29]
    ]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (array([0.5, 1.5], "f4"), r"floating-point pixels are not all in \[0, 1\]"),
        (array([0.5, np.nan], "f4"), r"floating-point pixels are not all in \[0, 1\]"),
        (array([0, 70000], "i4"), "integer pixels are not all in 0 to 65,535"),
        (array([-1, 7], "i4"), "integer pixels are not all in 0 to 65,535"),
    ],
)
def test_read_image_refuses_pixels_outside_the_range(image, message):
    with pytest.raises(UserError, match=f"cannot decode the image in x.tif: .*{message}"), decoding("x.tif"):
        read_image(stored(image, "TIFF"), 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_is_upright_for_each_exif_orientation(kind, orientation):
    """Oracle: the corner that the EXIF standard names as row 0 and column 0 of the visible image."""
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255  # the visible top left
    upright[:8, 24:] = 120  # the visible top right
    inverse = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = stored(Image.fromarray(np.ascontiguousarray(inverse[orientation])).convert("RGB"), kind, exif=exif)
    shown = np.asarray(read_image(file, 1)[1]).astype(int)
    assert shown.shape == (16, 32)
    assert np.abs(shown - upright).mean() < 10


def test_read_image_ignores_damaged_exif():
    file = stored(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffdamaged")
    assert read_image(file, 3)[1].size == (8, 8)


def large_text():
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (3 << 20), zip=True)
    return stored(Image.new("RGB", (8, 8)), "PNG", pnginfo=text)


DAMAGED = {
    "text chunk": large_text,
    "bomb": lambda: png(20_000, 20_000, 8, 2, b"\0" * 20_000),
    "large": lambda: png(12_000, 12_000, 8, 0, b"\0" * 12_000),
    "broken chunk": lambda: png(8, 8, 8, 2, b"\0" * 192, chunk(b"gAMA", b"\0\0\xb1\x8f", crc=1)),
    "cut": lambda: io.BytesIO(png(8, 8, 8, 2, bytes(range(192))).getvalue()[:70]),
    "cut jpeg": lambda: io.BytesIO(stored(Image.effect_noise((64, 64), 50), "JPEG").getvalue()[:-500]),
    "empty": io.BytesIO,
    "text": lambda: io.BytesIO(b"<html>404</html>"),
    "postscript": lambda: stored(Image.new("RGB", (8, 8)), "EPS"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", DAMAGED)
def test_read_image_error_names_damaged_image(name):
    with pytest.raises(UndecodableError, match=r"^cannot decode the image in k\\xe4se\.png: [^\n]*$"):  # noqa: SIM117
        with decoding("k\udce4se.png"):
            read_image(DAMAGED[name](), 3)


def test_read_image_distinguishes_unreadable_file_from_damaged_image(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.png.*No such file") as caught:  # noqa: SIM117
        with decoding(str(tmp_path / "gone.png")):
            read_image(str(tmp_path / "gone.png"), 3)
    assert not isinstance(caught.value, UndecodableError)


def test_list_images_counts_other_files_by_reason(tmp_path):
    folder = tmp_path / ".hidden" / "set"  # only names below the folder count
    images = ["a.jpg", "b.JFIF", "c.jpe", "deep/d.gif", "e.webp", "f.PGM", "g.tiff", "h.bmp"]
    hidden = [".DS_Store", "._a.jpg", ".ipynb_checkpoints/a.jpg", "__MACOSX/a.jpg", "deep/Thumbs.db"]
    for name in [*images, *hidden, "i.heic", "j.txt", "README"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "k.png").symlink_to(folder / "gone.png")
    (folder / "folder.png").mkdir()
    (folder / "link").symlink_to(folder / "deep")
    found, skipped = list_images(folder)
    assert [str(p.relative_to(folder)) for p in found] == sorted(images)
    assert {
        reason: sorted(str(p.relative_to(folder)) for p in paths) for reason, paths in skipped.items()
    } == {
        "hidden": [".DS_Store", "._a.jpg", ".ipynb_checkpoints", "__MACOSX", "deep/Thumbs.db"],
        "format .heic is not read": ["i.heic"],
        "format .txt is not read": ["j.txt"],
        "no file ending": ["README"],
        "broken link or not a regular file": ["k.png"],
        "link to a folder": ["link"],
    }
