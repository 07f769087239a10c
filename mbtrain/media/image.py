"""Pictures: the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file to RGB pixels, and pixels to PNG.

Pixels are uint8 [h, w, 3], rows from the top. What a file holds becomes that as follows.

    several pictures     the first one (GIF, APNG, animated WebP, TIFF, MPO)
    EXIF orientation     applied; an EXIF block that cannot be read is passed over
    grey, 1 bit          the same value in all three channels
    16 bits a channel    the highest 8 bits (of 12 bit grey too); grey of 32 bits or floats has no range: refused
    alpha, key colour    composited over white
    CMYK, YCbCr          Pillow's own formulas; ICC profiles are not applied
    a size given         the centre square of the shorter side, then one resize to size x size by the filter named
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from mbtrain.media import Undecodable

if TYPE_CHECKING:
    from PIL import Image

FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
MAX_PIXELS = 2**26  # 8192 x 8192; decoding takes 10 bytes a pixel, with alpha 16
PILLOW_MAX_PIXELS = 2 * (1024**3 // 4 // 3)  # where Pillow itself refuses; a global of its, which is left alone
BACKGROUND = (255, 255, 255)  # under what is transparent
_GAP = 2
_NEUTRAL = 128

# Only these formats' decoders are ever reached: Pillow knows others, some of which start programs (EPS).
_MAGIC = (
    ("JPEG", b"\xff\xd8\xff"),
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("GIF", b"GIF87a"),
    ("GIF", b"GIF89a"),
    ("BMP", b"BM"),
    ("TIFF", b"II\x2a\x00"),
    ("TIFF", b"MM\x00\x2a"),
    ("TIFF", b"II\x2b\x00"),
    ("TIFF", b"MM\x00\x2b"),
)
# How what is no picture begins, in lower case, and what it is.
_OTHERS = (
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "XML"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (b"%!ps", "PostScript"),
    (b"%pdf", "a PDF"),
    (b"pk\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zxz", "xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"8bps", "a Photoshop document"),
    (b"\x00\x00\x01\x00", "an icon (ICO)"),
    (b"\x93numpy", "a NumPy array"),
    (b"riff", "RIFF, but not WebP"),
    (b"{", "JSON"),
)
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _TILE_WIDTH, _TILE_LENGTH = 258, 322, 323
_taking_turns = threading.Lock()  # the filters of warnings, and stderr, belong to the whole process


# ---- decoding -----------------------------------------------------------------------------------------------------


def decode(
    data: bytes, size: int | None, *, filter: str = "lanczos", draft: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """The picture in a file's bytes as read-only uint8 [h, w, 3]; h = w = size if that is given.

    filter is one of FILTERS. draft lets the JPEG decoder itself shrink by 2, 4 or 8 while at least 2 * size is left:
    faster, other pixels. A smaller picture is enlarged. Threads take turns.

    Raises:
        Undecodable: it is of another format, broken, cut off, or of more than max_pixels.
    """
    rgb, shape = decode_rgb(data, size, filter=filter, draft=draft, max_pixels=max_pixels)
    return np.frombuffer(rgb, np.uint8).reshape(shape)


def decode_rgb(
    data: bytes, size: int | None, *, filter: str = "lanczos", draft: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[bytes, tuple[int, int, int]]:
    """The bytes of `decode`'s pixels, and their shape."""
    from PIL import Image, UnidentifiedImageError

    kind = _format(data)
    if kind == "PNG" and data.rfind(b"IEND") < 0:  # Pillow would take one that lost only metadata after its pixels
        raise Undecodable("PNG: cut off: it has no end chunk")
    try:
        with _quietly(kind):
            image = Image.open(io.BytesIO(data), formats=[kind])
            _check_size(image, max_pixels)
            if draft and size is not None:
                image.draft(None, (2 * size, 2 * size))
            image.load()
            picture = _upright(_eight_bits(image) if image.mode.startswith("I;16") else image)
            picture = _rgb(picture) if size is None else _resized(picture, size, filter)
            return picture.tobytes(), (picture.height, picture.width, 3)
    except Undecodable:
        raise
    except UnidentifiedImageError:  # its own message holds an address in memory
        raise Undecodable(f"{kind}: the header is broken, or of a kind that Pillow does not know") from None
    except Image.DecompressionBombError:
        raise Undecodable(f"{kind}: more than {PILLOW_MAX_PIXELS} pixels declared") from None
    except Exception as error:  # Pillow's parsers raise whatever a broken file makes them trip over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Undecodable(f"{kind}: cannot be decoded: {reason}") from None


def square(pixels: np.ndarray, size: int, *, filter: str = "lanczos") -> np.ndarray:
    """uint8 [h, w, 3] as [size, size, 3], cropped and resized as by `decode`; of that size already: unchanged."""
    from PIL import Image

    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(_resized(Image.fromarray(np.ascontiguousarray(pixels)), size, filter))


def _format(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if not data:
        raise Undecodable("empty")
    kind = next((kind for kind, magic in _MAGIC if data.startswith(magic)), None)
    if kind is None:
        raise Undecodable(f"not a JPEG, PNG, WebP, GIF, BMP or TIFF: it looks like {_looks_like(data)}")
    return kind


def _looks_like(data: bytes) -> str:
    """What bytes that are no picture may be, for a message."""
    head = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if data[4:8] == b"ftyp":
        return f"{'AVIF' if data[8:12] == b'avif' else 'HEIC, AVIF or video (MP4)'}; convert it to PNG"
    if not data[:512].strip(b"\0"):
        return "zeros: a hole in the file"
    if what := next((what for start, what in _OTHERS if head.startswith(start)), None):
        return what
    try:
        data[:512].decode("ascii")
        return "text"
    except UnicodeDecodeError:
        return f"something unknown, which starts with the bytes {data[:8].hex(' ')}"


@contextmanager
def _quietly(kind: str) -> Iterator[None]:
    """Ignore Pillow's warnings within; but those on a TIFF's tags become errors, for a lost tag changes the picture.

    libtiff writes on the process's own stderr, without the file's name; that is shut meanwhile.
    """
    with _taking_turns, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if kind != "TIFF":
            yield
            return
        warnings.filterwarnings("error", module=r"PIL\.TiffImagePlugin")
        with _stderr_shut():
            yield


@contextmanager
def _stderr_shut() -> Iterator[None]:
    try:
        saved = os.dup(2)
    except OSError:  # it is closed already
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Refuse what would take too much memory, before it does: nothing is decoded yet."""
    areas = [image.size]
    tags = getattr(image, "tag_v2", {})
    if _TILE_WIDTH in tags and _TILE_LENGTH in tags:  # a TIFF's tile may be larger than the picture
        areas.append((int(tags[_TILE_WIDTH]), int(tags[_TILE_LENGTH])))
    for width, height in areas:
        if width * height > max_pixels:
            raise Undecodable(
                f"{image.format}: {width} x {height} pixels declared, more than max_pixels = {max_pixels}"
            )


def _upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF orientation asks. (TIFF's is done by Pillow's load.)"""
    from PIL import Image

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # metadata alone is broken; Pillow raises anything here
        return image
    if orientation not in (2, 3, 4, 5, 6, 7, 8):
        return image
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation])


def _resized(image: Image.Image, size: int, filter: str) -> Image.Image:
    """The centre square of the shorter side in RGB, resized; an odd pixel is left out on the right or at the bottom."""
    from PIL import Image

    width, height = image.size
    side = min(width, height)
    if width != height:
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return _rgb(image).resize((size, size), Image.Resampling[filter.upper()])


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB."""
    from PIL import Image

    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise Undecodable(f"{image.mode}: pixels of 32 bits, floats or another colour space; save it as 8-bit RGB")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of 12 in a TIFF, by its highest 8. (Pillow's own conversion cuts off all above 255.)"""
    from PIL import Image

    values = np.asarray(image)
    bits = 12 if getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) == (12,) else 16
    grey = (values >> (bits - 8)).astype(np.uint8)
    key = image.info.get("transparency")  # of a PNG: this value is transparent
    if key is not None:
        grey[values == key] = BACKGROUND[0]
    result = Image.fromarray(grey)
    result.info = {name: value for name, value in image.info.items() if name != "transparency"}  # EXIF stands there
    return result


# ---- encoding -----------------------------------------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    """uint8 [h, w, 3] as the bytes of an RGB PNG file.

    Raises:
        ValueError: pixels are of another shape or type.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(_checked(pixels))).save(file, "PNG")
    return file.getvalue()


def grid(pictures: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Pictures, uint8 [h, w, 3] each, in rows from the top left, as one; ceil(sqrt(n)) columns unless given.

    Cells are as large as the largest; two pixels between them, and what a smaller picture leaves, are grey.

    Raises:
        ValueError: there is no picture or column, or a picture is of another shape or type.
    """
    if not pictures or (columns is not None and columns < 1):
        raise ValueError(f"expected pictures and columns, got {len(pictures)} pictures in {columns} columns")
    columns = min(columns or int(np.ceil(np.sqrt(len(pictures)))), len(pictures))
    rows = -(-len(pictures) // columns)
    height, width = (max(_checked(picture).shape[side] for picture in pictures) for side in (0, 1))
    whole = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), _NEUTRAL, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + _GAP), i % columns * (width + _GAP)
        whole[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return whole


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"expected pixels as uint8 [h, w, 3], got {pixels.dtype} {list(pixels.shape)}")
    return pixels
