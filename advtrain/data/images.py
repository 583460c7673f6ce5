"""Image files: which are read, how they are opened, and how pixels become 8-bit gray or RGB."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from advtrain.errors import UserError
from advtrain.text import readable

#: File names that are read as images, by their ending in lower case.
IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".gif",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    ]
)
#: Pillow's formats that are opened, whatever the file is called. Others, such as EPS, would start programs.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
Image.init()  # registers them
#: Largest image in pixels: Pillow's default limit against decompression bombs.
MOST_PIXELS = 89_478_485

#: Files and folders that operating systems leave in folders of images, in lower case.
_SYSTEM_FILES = frozenset({"__macosx", "thumbs.db", "desktop.ini", "@eadir"})
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})


class UndecodableError(UserError):
    """The content of an image cannot be decoded or converted; its file can be read."""


@dataclass(frozen=True)
class Header:
    """Form of a stored image, known without decoding its pixels."""

    mode: str  # Pillow's mode, such as L, RGB or P
    width: int
    height: int
    gray: bool
    alpha: bool  # transparency, as a channel or as a color of the palette


def is_hidden(name: str) -> bool:
    """Return True for the name of a hidden file or folder, or one that a system leaves."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def subfolders(path: Path) -> list[Path]:
    """Return the folders in `path` that are not hidden, sorted."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not is_hidden(p.name))


def list_images(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return the image files below a folder, sorted, and all other files by the reason.

    Hidden folders, and links to folders inside it, are not entered; each counts as one skipped file.

    Raises:
        UserError: a folder cannot be read.
    """
    images: list[Path] = []
    skipped: dict[str, list[Path]] = defaultdict(list)
    for root, folders, files in os.walk(folder, onerror=_refuse):
        for name in sorted([*folders, *files]):
            path = Path(root, name)
            if is_hidden(name):
                skipped["hidden"].append(path)
            elif name in folders:
                if path.is_symlink():
                    skipped["link to a folder"].append(path)
            elif path.suffix.lower() not in IMAGE_SUFFIXES:
                kind = readable(path.suffix.lower())
                skipped[f"format {kind} is not read" if kind else "no file ending"].append(path)
            elif not path.is_file():
                skipped["broken link or not a regular file"].append(path)
            else:
                images.append(path)
        folders[:] = [name for name in folders if not is_hidden(name)]
    return sorted(images), dict(skipped)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the folder '{readable(str(error.filename))}': {error.strerror}") from error


@contextmanager
def decoding(where: str) -> Iterator[None]:
    """Convert any error of opening or decoding an image to a UserError that names it.

    Raises:
        UndecodableError: the image cannot be decoded.
        UserError: its file cannot be read.
    """
    where = readable(where)
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UndecodableError(
            f"cannot decode the image in {where}: it is none of {', '.join(_FORMATS)}"
        ) from error
    except Exception as error:  # the decoders of Pillow raise any kind for a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {where}: {error.strerror}") from error
        raise UndecodableError(f"cannot decode the image in {where}: {readable(str(error))}") from error


def read_header(source: str | IO[bytes]) -> Header:
    """Read the form of an image without decoding its pixels."""
    with Image.open(source, formats=_FORMATS) as image:
        return _header(image)


def read_image(source: str | IO[bytes], channels: int) -> tuple[Header, Image.Image]:
    """Return the stored form of an image, and the image upright in 8-bit gray or RGB.

    Only the first frame of an animation or page of a document is read.

    Args:
        source: path of a file, or the encoded image.
        channels: 1 for gray or 3 for RGB.
    """
    with Image.open(source, formats=_FORMATS) as image:
        header = _header(image)
        image.load()  # decoding is lazy: a truncated image raises here
        return header, to_eight_bit(_upright(image), channels)


def to_eight_bit(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image of any mode to 8-bit gray (1 channel) or RGB (3 channels).

    Of 16 bits, the upper 8 are kept; Pillow would clip. Floating-point pixels in [0, 1] are multiplied by 255 and
    rounded. Transparent pixels are composited on white. Color becomes gray by the weights of ITU-R 601. Color
    profiles are ignored.

    Raises:
        ValueError: floating-point pixels are outside [0, 1], or integers outside 0 to 65,535.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = _from_deep(image)
    elif _has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Convert gray of 16 or 32 bits to 8 bits."""
    pixels = np.asarray(image)
    if image.mode == "F":
        if not ((pixels >= 0) & (pixels <= 1)).all():  # NaN compares false
            raise ValueError("its floating-point pixels are not all in [0, 1]")
        eight = np.rint(pixels * 255)
    else:
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its integer pixels are not all in 0 to 65,535 (16 bits)")
        eight = pixels >> 8
        if isinstance(transparent := image.info.get("transparency"), int):
            eight = np.where(pixels == transparent, 255, eight)
    return Image.fromarray(eight.astype(np.uint8))


def _header(image: Image.Image) -> Header:
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"it has {image.width}x{image.height} pixels; at most {MOST_PIXELS:,} are read, as a small file may hold "
            "an image that fills the memory"
        )
    return Header(image.mode, image.width, image.height, _is_gray(image), _has_alpha(image))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or ("transparency" in image.info and not image.mode.startswith("I"))


def _is_gray(image: Image.Image) -> bool:
    """Return True if the mode has no color, or all colors of the palette are gray."""
    if image.mode in ("P", "PA") and image.palette is not None:
        every = Image.new("P", (256, 1))
        every.putdata(range(256))
        every.putpalette(image.palette)
        colors = np.asarray(every.convert("RGB"))
        return bool((colors == colors[..., :1]).all())
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def _upright(image: Image.Image) -> Image.Image:
    """Return a decoded image turned or mirrored as its EXIF orientation says.

    If the EXIF data are damaged, the image is as stored; viewers do the same.
    """
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 (the parser raises any kind)
        return image
