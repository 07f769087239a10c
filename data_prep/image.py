"""The modality of images: raw RGB, three bytes a pixel, rows from the top; one picture is one sample.

    JPEG, PNG, WebP, GIF, BMP, TIFF   one picture, decoded as `mbtrain.media.image` says
    a NumPy array (.npy)              uint8 [n, h, w, 3] or grey [n, h, w] or [n, h, w, 1]: n pictures, `index 0` to
                                      `index n-1`; [h, w, 3] or grey [h, w]: one. Read one picture at a time

Which of these a piece of data is, its first bytes tell; its name does not matter.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial

import numpy as np

from data_prep.sources import Item, Modality, Rejection, Sample
from mbtrain.errors import ConfigError
from mbtrain.media import Undecodable
from mbtrain.media.image import FILTERS, MAX_PIXELS, PILLOW_MAX_PIXELS, decode_rgb, square

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy")
_NPY = b"\x93NUMPY"
_MAX_SIDE = 16384
# No file of max_pixels is larger: 16 bits in each of four channels, and what stands beside the pixels.
_FILE_BYTES_PER_PIXEL, _FILE_BYTES_BESIDE = 8, 64 * 1024**2


def image_modality(
    *,
    size: int | None,
    filter: str = "lanczos",
    draft: bool = False,
    max_pixels: int = MAX_PIXELS,
    column: str = "image",
) -> Modality:
    """Images.

    Args:
        size: side in pixels of the centre square that each picture becomes; None: as large as it is.
        filter: of `mbtrain.media.image.FILTERS`, by which it is resized.
        draft: let the JPEG decoder shrink a picture on its way, while at least twice `size` is left: faster, and other
            pixels (of 400 x 533 photos to 64: 2.1 times as fast, off by 0.65 of 255 in the mean).
        max_pixels: a picture that declares more is rejected before it is decoded.
        column: as in `Modality`.

    Raises:
        ConfigError: an option is out of its range.
    """
    if size is not None and not _is_whole(size, 1, _MAX_SIDE):
        raise ConfigError(f"--size: expected 'none' or a whole number from 1 to {_MAX_SIDE}, got {size!r}")
    if filter not in FILTERS:
        raise ConfigError(f"--filter: expected one of {', '.join(FILTERS)}, got {filter!r}")
    if not isinstance(draft, bool):
        raise ConfigError(f"--draft: expected true or false, got {draft!r}")
    if not _is_whole(max_pixels, 1, PILLOW_MAX_PIXELS):
        raise ConfigError(f"--max-pixels: expected a whole number from 1 to {PILLOW_MAX_PIXELS}, got {max_pixels!r}")
    options = {
        "size": size,
        "filter": filter,
        "draft": draft,
        "max_pixels": max_pixels,
        "background": "white",  # under what is transparent
        "column": column,
    }
    return Modality("image", partial(_decode, size, filter, draft, max_pixels), column, SUFFIXES, options)


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _decode(size: int | None, filter: str, draft: bool, max_pixels: int, item: Item) -> Iterator[Sample | Rejection]:
    stream = _Stream(item.chunks)
    head = stream.read(len(_NPY))
    if head == _NPY:
        yield from _pictures(stream, size, filter, max_pixels, item.where)
        return
    most = max_pixels * _FILE_BYTES_PER_PIXEL + _FILE_BYTES_BESIDE
    data = head + stream.read(most + 1 - len(head))
    if len(data) > most:
        yield Rejection(item.where, f"longer than {most} bytes, which no picture of {max_pixels} pixels needs")
        return
    try:
        rgb, shape = decode_rgb(data, size, filter=filter, draft=draft, max_pixels=max_pixels)
    except Undecodable as error:
        yield Rejection(item.where, str(error))
        return
    yield Sample(iter((rgb,)), item.where, shape=shape)


# ---- arrays -------------------------------------------------------------------------------------------------------


def _pictures(
    stream: _Stream, size: int | None, filter: str, max_pixels: int, where: str
) -> Iterator[Sample | Rejection]:
    """The samples of a NumPy array, whose pictures are read one by one."""
    try:
        shape = _shape(stream, max_pixels)
    except ValueError as error:
        yield Rejection(where, str(error))
        return
    many = len(shape) == 4
    count, (height, width, channels) = (shape[0] if many else 1), shape[-3:]
    place = f"{where}: index" if where else "index"
    for i in range(count):
        here = f"{place} {i}" if many else where
        data = stream.read(height * width * channels)
        if len(data) < height * width * channels:
            rest = f"; {count - i} of {count} pictures are missing" if many else ""
            yield Rejection(here, f"NumPy array: cut off{rest}")
            return
        pixels = np.frombuffer(data, np.uint8).reshape(height, width, channels)
        if channels == 1:
            pixels = pixels.repeat(3, axis=2)
        if size is not None:
            pixels = square(pixels, size, filter=filter)
        yield Sample(iter((pixels.tobytes(),)), here, shape=pixels.shape)
    if stream.read(1):
        yield Rejection(where, "NumPy array: more bytes follow its end; save one array a file")


def _shape(stream: _Stream, max_pixels: int) -> tuple[int, ...]:
    """(n, h, w, c) or (h, w, c), with c 1 or 3, from an array's header; ValueError says why not."""
    version, length = tuple(stream.read(2)), stream.read(2)
    if version != (1, 0):  # what np.save writes for plain arrays; such a header is shorter than 64 KiB
        raise ValueError("NumPy array: expected format version 1.0; save it again with np.save")
    header = stream.read(int.from_bytes(length, "little"))
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(length + header))
    except Exception as error:  # a crafted header can fail in any way
        raise ValueError(f"NumPy array: broken header: {' '.join(str(error).split())[:200]}") from None
    if dtype != np.uint8:
        raise ValueError(f"NumPy array: expected uint8, got {dtype}; scale it to 0..255 and save it as uint8")
    if fortran_order and len(shape) > 1:
        raise ValueError("NumPy array: in Fortran order; save np.ascontiguousarray(array)")
    whole = shape if len(shape) == 4 or (len(shape) == 3 and shape[-1] == 3) else (*shape, 1)
    if len(whole) not in (3, 4) or whole[-1] not in (1, 3):
        raise ValueError(f"NumPy array: expected shape [n, h, w, 3], [n, h, w], [h, w, 3] or [h, w], got {list(shape)}")
    if min(whole) < 1:
        raise ValueError(f"NumPy array: shape {list(shape)} holds no pixel")
    if whole[-3] * whole[-2] > max_pixels:
        raise ValueError(
            f"NumPy array: pictures of {whole[-2]} x {whole[-3]} pixels, more than max_pixels = {max_pixels}"
        )
    return whole


class _Stream:
    """Reads any number of bytes at a time from chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""
        parts = []
        while size > 0:
            if not self._rest:
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._rest = memoryview(chunk)
            part = self._rest[:size]
            self._rest = self._rest[len(part) :]
            size -= len(part)
            parts.append(part)
        return b"".join(parts)
