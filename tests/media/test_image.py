"""Pictures of every format and mode, right, broken and hostile: `mbtrain.media.image`.

pytest tests/media/test_image.py
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mbtrain.media import Undecodable
from mbtrain.media.image import MAX_PIXELS, decode, grid, png, square
from tests import launch

ROWS, COLUMNS = np.mgrid[:23, :17]
PIXELS = np.stack([COLUMNS * 15, ROWS * 11, (COLUMNS * ROWS) % 256], axis=-1).astype(np.uint8)
ALPHA = (COLUMNS * 16).clip(0, 255).astype(np.uint8)
GREY = (COLUMNS * 9 + ROWS * 4).astype(np.uint8)


def encoded(picture: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, format, **options)
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = (alpha.astype(float) / 255)[..., None]
    return pixels * share + 255 * (1 - share)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, content: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def tiff_of(tags: dict[int, int], content: bytes) -> bytes:
    """A little-endian TIFF, whose content starts after its one directory, at tag 273 or 324."""
    end = 8 + 2 + 12 * len(tags) + 4
    at = {tag: end if tag in (273, 324) else value for tag, value in sorted(tags.items())}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in at.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + content


PALETTE = Image.fromarray(PIXELS).quantize(40)
GIF_FRAMES = {"save_all": True, "append_images": [PALETTE.transpose(Image.Transpose.ROTATE_180)]}
SOUND = {
    "jpeg": encoded(PIXELS, "JPEG"),
    "progressive jpeg": encoded(PIXELS, "JPEG", progressive=True, exif=oriented(6)),
    "png": encoded(PIXELS, "PNG"),
    "palette png": encoded(PALETTE, "PNG", transparency=3),
    "webp": encoded(PIXELS, "WEBP"),
    "lossless webp": encoded(np.dstack([PIXELS, ALPHA]), "WEBP", lossless=True, exif=oriented(8)),
    "gif": encoded(PALETTE, "GIF", transparency=2),
    "animated gif": encoded(PALETTE, "GIF", **GIF_FRAMES),
    "bmp": encoded(PIXELS, "BMP"),
    "palette bmp": encoded(PALETTE, "BMP"),
    "tiff": encoded(PIXELS, "TIFF"),
    "lzw tiff": encoded(PIXELS, "TIFF", compression="tiff_lzw", exif=oriented(5)),
    "jpeg tiff": encoded(PIXELS, "TIFF", compression="jpeg"),
    "fax tiff": encoded(Image.fromarray(GREY).convert("1"), "TIFF", compression="group4"),
}


# ---- right --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["png", "bmp", "tiff"])
def test_lossless_formats_come_back_exactly(name: str) -> None:
    assert np.array_equal(decode(SOUND[name], None), PIXELS)


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_lossy_formats_are_as_pillow_has_them(name: str) -> None:
    assert np.array_equal(decode(SOUND[name], None), np.asarray(Image.open(io.BytesIO(SOUND[name])).convert("RGB")))


BLACK_WHITE = Image.fromarray(GREY).convert("1")
WIDE = ROWS.astype(np.uint16) * 2800 + COLUMNS.astype(np.uint16)
FEW = Image.fromarray(GREY // 32).convert("P")
FEW.putpalette([value for i in range(8) for value in (i * 30, 255 - i, i)])
FEW_PIXELS = np.array([(i * 30, 255 - i, i) for i in range(8)])[GREY // 32]
CYAN = np.dstack([PIXELS, ALPHA])
MODES = {
    "grey": (encoded(GREY, "PNG"), three(GREY)),
    "grey webp": (encoded(three(GREY), "WEBP", lossless=True), three(GREY)),
    "1 bit": (encoded(BLACK_WHITE, "PNG"), three(np.asarray(BLACK_WHITE) * 255)),
    "1 bit bmp": (encoded(BLACK_WHITE, "BMP"), three(np.asarray(BLACK_WHITE) * 255)),
    "1 bit fax": (encoded(BLACK_WHITE, "TIFF", compression="group4"), three(np.asarray(BLACK_WHITE) * 255)),
    "grey and alpha": (
        encoded(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), "PNG"),
        over_white(three(GREY), ALPHA),
    ),
    "alpha": (encoded(np.dstack([PIXELS, ALPHA]), "PNG"), over_white(PIXELS, ALPHA)),
    "alpha tiff": (encoded(np.dstack([PIXELS, ALPHA]), "TIFF"), over_white(PIXELS, ALPHA)),
    "palette": (encoded(FEW, "PNG"), FEW_PIXELS),
    "palette gif": (encoded(FEW, "GIF"), FEW_PIXELS),
    "palette bmp": (encoded(FEW, "BMP"), FEW_PIXELS),
    "one palette entry transparent": (
        encoded(FEW, "PNG", transparency=2),
        np.where((GREY // 32 == 2)[..., None], 255, FEW_PIXELS),
    ),
    "one gif entry transparent": (
        encoded(FEW, "GIF", transparency=2),
        np.where((GREY // 32 == 2)[..., None], 255, FEW_PIXELS),
    ),
    "alpha per palette entry": (
        encoded(FEW, "PNG", transparency=bytes(range(0, 160, 20))),
        over_white(FEW_PIXELS, (GREY // 32) * 20),
    ),
    "key colour": (
        encoded(PIXELS, "PNG", transparency=(30, 22, 4)),
        np.where((PIXELS == (30, 22, 4)).all(-1, keepdims=True), 255, PIXELS),
    ),
    "grey key": (encoded(GREY, "PNG", transparency=40), three(np.where(GREY == 40, 255, GREY))),
    "16 bit": (encoded(WIDE, "PNG"), three(WIDE >> 8)),
    "16 bit key": (encoded(WIDE, "PNG", transparency=2803), three(np.where(WIDE == 2803, 255, WIDE >> 8))),
    "16 bit tiff": (encoded(WIDE, "TIFF"), three(WIDE >> 8)),
    "16 bit tiff, big-endian": (encoded(WIDE.astype(">u2"), "TIFF"), three(WIDE >> 8)),
    "16 bit lzw tiff": (encoded(WIDE, "TIFF", compression="tiff_lzw"), three(WIDE >> 8)),
    "cmyk": (
        encoded(Image.merge("CMYK", Image.fromarray(CYAN).split()), "TIFF"),
        (255 - PIXELS.astype(float)) * (255 - ALPHA[..., None].astype(float)) / 255,
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name: str) -> None:
    data, expected = MODES[name]
    got = decode(data, None)
    assert got.dtype == np.uint8
    assert got.shape == (*GREY.shape, 3)
    assert np.abs(got - expected.astype(float)).max() <= 1, "one off is alpha's rounding"
    if "alpha" not in name and name != "cmyk":
        assert np.array_equal(got, expected)


def test_12_bit_grey_keeps_its_highest_8() -> None:
    values = [0, 15, 16, 0x7FF, 0xABC, 0xFFF]
    packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True))
    tags = {256: 6, 257: 1, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: len(packed)}
    assert decode(tiff_of(tags, packed), None)[0, :, 0].tolist() == [value >> 4 for value in values]


def test_cmyk_jpeg_is_not_inverted() -> None:
    white = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    assert decode(encoded(white, "JPEG"), None).min() > 250


@pytest.mark.parametrize("mode", ["F", "I"])
def test_grey_without_a_range_is_refused(mode: str) -> None:
    with pytest.raises(Undecodable, match="32 bits"):
        decode(encoded(Image.new(mode, (4, 4), 7), "TIFF"), None)


# Row 0 and column 0 of what is stored are the picture's sides that the EXIF standard names for each orientation.
STORED = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: PIXELS[:, ::-1].transpose(1, 0, 2),
    7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
    8: PIXELS[::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", STORED)
def test_orientation(orientation: int) -> None:
    stored, exif = np.ascontiguousarray(STORED[orientation]), oriented(orientation)
    for format, options in (
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ):
        got = decode(encoded(stored, format, exif=exif, **options), None)
        assert np.array_equal(got, PIXELS), (format, options)
    jpeg = decode(encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0), None)
    assert jpeg.shape == PIXELS.shape
    assert np.abs(jpeg.astype(int) - PIXELS).mean() < 2
    wide = decode(encoded(np.ascontiguousarray(WIDE if orientation == 1 else WIDE.T), "PNG", exif=exif), None)
    assert wide.shape[:2] == (WIDE.shape if orientation in (1, 5, 6, 7, 8) else WIDE.T.shape)
    # cropped after it was turned: the odd pixel is left out on the same side, whatever the orientation
    assert np.array_equal(decode(encoded(stored, "PNG", exif=exif), 17), PIXELS[3:20])


def test_orientation_after_the_pixels() -> None:
    whole, *_ = parted()
    assert np.array_equal(decode(whole, None), PIXELS)
    for end in range(len(whole)):
        try:
            assert np.array_equal(decode(whole[:end], None), PIXELS), "cut off, and not turned"
        except Undecodable:
            continue


def parted() -> tuple[bytes, bytes, bytes, bytes]:
    """A PNG whose orientation stands after its pixels; and its parts."""
    whole = encoded(np.ascontiguousarray(STORED[6]), "PNG", exif=oriented(6))
    at = whole.index(b"eXIf") - 4
    after = at + 12 + struct.unpack_from(">I", whole, at)[0]
    parts = whole[:at] + whole[after:-12], whole[at:after], whole[-12:]
    return b"".join(parts), *parts


def test_a_broken_exif_block_is_passed_over() -> None:
    _, pixels, _, end = parted()
    for block in (b"", b"MM", b"MM\0*\0\0\xff\xff", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0"):
        assert np.array_equal(decode(pixels + chunk(b"eXIf", block) + end, None), STORED[6])
    for orientation in (0, 9, 65535):
        assert np.array_equal(decode(encoded(PIXELS, "PNG", exif=oriented(orientation)), None), PIXELS)


def test_the_first_picture_of_several() -> None:
    first = decode(encoded(PALETTE, "GIF"), None)
    assert np.array_equal(decode(SOUND["animated gif"], None), first)
    others = {"save_all": True, "append_images": [Image.fromarray(PIXELS[::-1])]}
    for format, options in (("PNG", others), ("TIFF", others), ("WEBP", {**others, "lossless": True})):
        assert np.array_equal(decode(encoded(PIXELS, format, **options), None), PIXELS), format


# ---- size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(23, 17), (17, 23), (40, 40), (5, 90), (1, 1)])
@pytest.mark.parametrize("filter", ["lanczos", "box"])
def test_a_size_is_the_centre_square_resized(shape: tuple[int, int], filter: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = shape
    side = min(shape)
    top, left = (height - side) // 2, (width - side) // 2
    crop = Image.fromarray(pixels[top : top + side, left : left + side])
    expected = np.asarray(crop.resize((8, 8), getattr(Image.Resampling, filter.upper())))
    assert np.array_equal(decode(encoded(pixels, "PNG"), 8, filter=filter), expected)
    assert np.array_equal(square(pixels, 8, filter=filter), expected)
    assert np.array_equal(square(pixels, side), pixels[top : top + side, left : left + side]), "its own size: untouched"


def test_draft_is_near() -> None:
    smooth = np.asarray(Image.fromarray(PIXELS).resize((300, 400), Image.Resampling.BICUBIC))
    data = encoded(smooth, "JPEG")
    plain, drafted = decode(data, 32), decode(data, 32, draft=True)
    assert plain.shape == drafted.shape
    assert 0 < np.abs(plain.astype(int) - drafted).mean() < 3


# ---- broken -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOUND)
def test_what_is_cut_off_is_whole_or_undecodable(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = SOUND[name]
    whole, reasons = decode(data, None), []
    for end in range(len(data)):
        try:
            assert np.array_equal(decode(data[:end], None), whole), end
        except Undecodable as error:
            reasons.append(str(error))
    assert len(reasons) > len(data) * 0.4
    assert all(reason.splitlines() == [reason] for reason in reasons)
    assert capfd.readouterr() == ("", "")


def test_flipped_and_random_bytes_raise_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    rng, reasons = random.Random(0), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning that gets out is a failure
        for _ in range(2500):
            data = bytearray(rng.choice(list(SOUND.values())))
            for _ in range(rng.choice((1, 1, 3, 10))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            if rng.random() < 0.1:
                data[16:] = rng.randbytes(len(data) - 16)
            try:
                got = decode(bytes(data), rng.choice((None, 8)), max_pixels=10**6)
                assert (got.dtype, got.ndim) == (np.uint8, 3)
            except Undecodable as error:
                reasons.append(str(error))
    assert len(reasons) > 1000
    assert not any("0x" in reason for reason in reasons), "an address makes two runs differ"
    assert capfd.readouterr() == ("", "")


def test_a_tiff_that_lost_its_palette_is_undecodable() -> None:
    """Its pixels stand before; Pillow warns, and would take them for grey."""
    pixels, colours = bytes(range(64)), np.arange(768, dtype="<u2").tobytes()
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 3, 273: 0, 277: 1, 278: 8, 279: 64, 320: 0}
    at = 8 + 2 + 12 * len(tags) + 4 + 64
    data = tiff_of(tags, pixels + colours)
    whole = data.replace(struct.pack("<HHII", 320, 4, 1, 0), struct.pack("<HHII", 320, 3, 768, at))
    assert decode(whole, None).shape == (8, 8, 3)
    for end in (at, at + 1, at + 700, len(whole) - 1):
        with pytest.raises(Undecodable, match=r"Skipping tag 320|Truncated"):
            decode(whole[:end], None)


@given(st.binary(max_size=64))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(data, None)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html>\n<title>404", "an HTML page"),
        (b"\xef\xbb\xbf \n<html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"RIFF\0\0\0\0WAVEfmt ", "RIFF, but not WebP"),
        (bytes(100), "zeros"),
        (b"hello", "text"),
        (b"P6\n1 1\n255\n\0\0\0", "unknown|text"),
        (b"\x8a\xfe\x01\x02", "8a fe 01 02"),
    ],
)
def test_it_is_said_what_a_file_is_instead(data: bytes, what: str) -> None:
    with pytest.raises(Undecodable, match=what):
        decode(data, 64)


def webp_of(width: int, height: int) -> bytes:
    """A WebP file with this canvas, and a small frame on it."""
    frame = encoded(PIXELS, "WEBP", lossless=True)[12:]
    animation = chunk_of_riff(b"ANIM", bytes(6))
    shown = chunk_of_riff(b"ANMF", bytes(6) + struct.pack("<I", 16)[:3] + struct.pack("<I", 22)[:3] + bytes(4) + frame)
    head = chunk_of_riff(b"VP8X", b"\x02\0\0\0" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3])
    body = b"WEBP" + head + animation + shown
    return b"RIFF" + struct.pack("<I", len(body)) + body


def chunk_of_riff(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def zeros_compressed(size: int) -> bytes:
    """As zlib has so many zeros, which are never in memory all at once: its peak is measured below."""
    maker = zlib.compressobj()
    parts = [maker.compress(bytes(10**6)) for _ in range(size // 10**6)]
    return b"".join(parts) + maker.flush()


def bombs(side: int) -> dict[str, bytes]:
    """Small files that ask for `side` x `side` pixels, or for much else."""
    rows = zlib.compress(bytes(2**20))
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, side, side, 0) + b"\x08\x02\x4c\x01\0;"
    zeros = zeros_compressed(9000 * 9000)
    jpeg = SOUND["jpeg"]
    size_at = jpeg.index(b"\xff\xc0") + 5
    tile = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 0, 325: len(zeros)}
    strip = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 273: 0, 277: 1, 278: side, 279: len(zeros)}
    rle = bytearray(encoded(FEW, "BMP"))
    struct.pack_into("<IIHHI", rle, 18, side, side, 1, 8, 1)
    return {
        "png": png_of(side, side, rows),
        "png just above the limit": png_of(8192, 8193, rows),
        "png, one row": png_of(2**31 - 1, 1, rows),
        "gif": b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + frame,
        "gif whose frame is larger than it": b"GIF89a"
        + struct.pack("<HHBBB", 8, 8, 0, 0, 0)
        + b"!\xf9\x04\x08\0\0\0\0"
        + frame,
        "tiff": tiff_of(strip, zeros),
        "tiff whose tile is larger than it": tiff_of(tile, zeros),
        "tiff whose tile is too large for any number": tiff_of({**tile, 322: 2**32 - 16, 323: 2**32 - 16}, zeros),
        "tiff with many samples a pixel": tiff_of({**strip, 256: 8, 257: 8, 277: 2**31}, zeros),
        "bmp": struct.pack("<2sIIIIiiHHIIIIII", b"BM", 99, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
        "rle bmp": bytes(rle),
        "webp": webp_of(min(side, 16384), min(side, 16384)),
        "jpeg": jpeg[:size_at] + struct.pack(">HH", side, side) + jpeg[size_at + 4 :],
        "zTXt": png_of(8, 8, zlib.compress(bytes(8 * 25)), chunk(b"zTXt", b"a\0\0" + zeros)),
        "iCCP": png_of(8, 8, zlib.compress(bytes(8 * 25)), chunk(b"iCCP", b"a\0\0" + zeros)),
        "many zTXt": png_of(8, 8, zlib.compress(bytes(8 * 25)), *[chunk(b"zTXt", b"a\0\0" + rows)] * 300),
    }


def run_alone() -> None:
    """In a process of its own: what the bombs raise and cost, and a sum over the sound files."""
    import time

    def peak_kb() -> int:  # not ru_maxrss, which begins with the memory of the process that started this one
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found
        return int(found[1])

    made = {f"{name}, {side}": data for side in (9000, 60000) for name, data in bombs(side).items()}
    decode(SOUND["jpeg"], 8)
    before, start = peak_kb(), time.process_time()
    for name, data in made.items():
        assert len(data) < 500_000, name
        try:
            decode(data, 64)
        except Undecodable as error:
            sys.stderr.write(f"{name}: {error}\n")
        else:
            raise AssertionError(f"{name} was decoded")
    cost = peak_kb() - before
    total = hashlib.sha256()
    for data in SOUND.values():
        total.update(decode(data, None).tobytes() + decode(data, 16).tobytes())
    sys.stdout.write(f"{cost // 1024} {time.process_time() - start:.3f} {total.hexdigest()}")


def test_bombs_cost_little_and_processes_agree() -> None:
    program = "from tests.media.test_image import run_alone; run_alone()"
    sums = set()
    for seed in ("1", "2"):
        env = {**launch.environment(), "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, cwd=launch.ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        mib, seconds, total = done.stdout.split()
        assert int(mib) < 200, done.stderr
        assert float(seconds) < 5
        assert "gif, 9000: GIF: 9000 x 9000 pixels declared, more than max_pixels" in done.stderr
        assert "webp, 9000: WEBP: 9000 x 9000 pixels declared, more than max_pixels" in done.stderr
        assert "png just above the limit, 9000: PNG: 8192 x 8193 pixels declared, more than max_pixels" in done.stderr
        sums.add(total)
    assert len(sums) == 1
    assert MAX_PIXELS == 8192 * 8192


def test_a_limit_of_ones_own() -> None:
    data = SOUND["png"]
    assert decode(data, None, max_pixels=17 * 23).shape == (23, 17, 3)
    with pytest.raises(Undecodable, match=r"PNG: 17 x 23 pixels declared, more than max_pixels = 390"):
        decode(data, None, max_pixels=17 * 23 - 1)


def test_nothing_global_is_changed() -> None:
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS, os.fstat(2))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads get in one another's way
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for name in ("lzw tiff", "png", "jpeg") * 10:
                decode(SOUND[name], 8)
                with pytest.raises(Undecodable):
                    decode(SOUND[name][:-30], 8)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not failed
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS, os.fstat(2)) == before


# ---- encoding -----------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_png_round_trip(height: int, width: int, rng: random.Random) -> None:
    pixels = np.frombuffer(rng.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
    data = png(pixels)
    assert np.array_equal(decode(data, None), pixels)
    assert png(decode(data, None)) == data
    assert png(pixels[::-1]) == png(np.ascontiguousarray(pixels[::-1]))


def test_a_grid_holds_every_picture_in_its_place() -> None:
    pictures = [np.full((4 + i, 9 - i, 3), 10 * i, np.uint8) for i in range(5)]
    whole = grid(pictures)
    assert whole.shape == (8 + 2 + 8, 9 + 2 + 9 + 2 + 9, 3), "two rows of three"
    for i, picture in enumerate(pictures):
        top, left = i // 3 * 10, i % 3 * 11
        cell = whole[top : top + 8, left : left + 9]
        assert np.array_equal(cell[: 4 + i, : 9 - i], picture)
        assert (cell[4 + i :] == 128).all()
    assert (whole[8:10] == 128).all()
    assert grid(pictures, columns=5).shape == (8, 5 * 9 + 8, 3)
    assert grid(pictures[:2], columns=5).shape == (5, 9 + 2 + 9, 3)
    assert np.array_equal(grid(pictures[:1]), pictures[0])


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_picture_cannot_be_encoded(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\]"):
        png(wrong)
    with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\]"):
        grid([wrong])
    with pytest.raises(ValueError, match="0 pictures"):
        grid([])
