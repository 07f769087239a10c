"""Lossless compressors as baselines: bits per byte of a split's own bytes, beside which a model's score can be read.

    gzip  xz      all samples end to end, in the order of the shards, with all that went before as context
    png   webp    images: each a file of its own (lossless WebP), headers included
    flac          audio in pcm16: each sample a file of its own, headers included

An image's bytes are its dimensions, so its bits per byte are bits per dimension.
"""

from __future__ import annotations

import io
import lzma
import wave
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from mbtrain.shards import Split

# What is measured where nobody says otherwise: xz -9e takes half a minute for it.
LIMIT_BYTES = 64 * 1024**2

_READ_BYTES = 1024**2
_XZ_PRESET = 9 | lzma.PRESET_EXTREME
_XZ_DICT_BYTES = 64 * 1024**2
_WEBP_LARGEST_SIDE = 16383

Part = tuple[int, int, int]


def baselines(
    split: Split,
    limit_bytes: int | None = LIMIT_BYTES,
    places: int = 1,
    count: Callable[[int], None] = lambda size: None,
) -> dict[str, Any]:
    """Bits per byte of general compressors, and of those of the split's modality, on the same bytes.

    Args:
        split: what to measure on.
        limit_bytes: how much of it; None: all. See `excerpt`.
        places: in how many places of the split the measured bytes lie.
        count: is told of bytes that are done.

    Returns `bytes`, how many were measured, and `gzip_bpb` and `xz_bpb`; for images `png_bpb` and, where they are small
    enough for it, `webp_bpb`; for audio in pcm16 `flac_bpb`. Without a byte to measure, `bytes` is all.

    Memory holds one sample and the compressors' windows: xz -9e takes about 700 MB where 64 MiB or more are measured.

    Raises:
        DataError: the split cannot be read.
    """
    parts = excerpt(split.lengths, limit_bytes, places, whole=split.modality == "image")
    total = sum(stop - start for _, start, stop in parts)
    if total == 0:
        return {"bytes": 0}
    streams, files = _stream_codecs(total), _file_codecs(split, parts)
    sizes = dict.fromkeys([*streams, *files], 0)
    with ThreadPoolExecutor(len(sizes)) as pool:  # all of them let go of the interpreter while they work
        for i, chunk, whole in _chunks(split, parts):
            work = {name: pool.submit(_flowed, codec.compress, chunk) for name, codec in streams.items()}
            if whole is not None:
                work |= {name: pool.submit(encoded, i, whole) for name, encoded in files.items()}
            for name, size in work.items():
                sizes[name] += size.result()
            count(len(chunk))
        for name, codec in streams.items():
            sizes[name] += len(codec.flush())
    return {"bytes": total} | {f"{name}_bpb": 8 * size / total for name, size in sizes.items()}


def excerpt(lengths: np.ndarray, limit_bytes: int | None, places: int = 1, *, whole: bool = False) -> list[Part]:
    """(sample, start, stop) of about limit_bytes of a split, in order: everything where that is within the limit.

    Else equal runs of bytes that begin at `places` evenly spaced ones; a single place gives the first part of the
    split. `whole` samples are not cut: those are taken that begin in a run (the first, if none does).
    """
    total = int(lengths.sum())
    if limit_bytes is None or total <= limit_bytes:
        return [(i, 0, length) for i, length in enumerate(lengths.tolist())]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    places = min(places, max(1, limit_bytes // 2))
    run = max(2, limit_bytes // places & ~1)  # even, as are the places: 16-bit samples of sound stay whole
    parts: list[Part] = []
    for place in range(places):
        begin = place * total // places & ~1
        if whole:
            first, last = np.searchsorted(begins, [begin, begin + run]).tolist()
            parts += [(i, 0, int(lengths[i])) for i in range(first, last)]
        else:
            end = min(begin + run, total)
            first, last = np.searchsorted(ends, begin, "right"), np.searchsorted(begins, end)
            starts, stops = np.maximum(begin - begins, 0)[first:last], np.minimum(end - begins, lengths)[first:last]
            parts += zip(range(first, last), starts.tolist(), stops.tolist(), strict=True)
    return parts or [(0, 0, int(lengths[0]))]


def read_parts(split: Split, parts: list[Part]) -> Iterator[bytes]:
    """The bytes of an excerpt in pieces of about a MiB."""
    pending: list[bytes] = []
    size = 0
    for i, start, stop in parts:
        for at in range(start, stop, _READ_BYTES):
            pending.append(split.read(i, at, min(at + _READ_BYTES, stop)))
            size += len(pending[-1])
            if size >= _READ_BYTES:
                yield b"".join(pending)
                pending, size = [], 0
    if pending:
        yield b"".join(pending)


def of_file(
    content: bytes, *, shape: tuple[int, int] | None = None, sample_rate: int | None = None
) -> dict[str, float]:
    """Bits per byte of compressors on one file's bytes: gzip -9, xz -9e and zstd -19, and of its kind's.

    Args:
        content: the bytes; at least one.
        shape: height and width where they are pictures in RGB, one after the other: `png_bpb`, a file each.
        sample_rate: in Hz, where they are 16-bit mono sound: `flac_bpb`. A WAV file of 16 bits has it by itself.
    """
    import zstandard

    sizes = {
        name: _flowed(codec.compress, content) + len(codec.flush())
        for name, codec in _stream_codecs(len(content)).items()
    }
    sizes["zstd"] = len(zstandard.ZstdCompressor(level=19).compress(content))
    if shape is not None:
        picture = 3 * shape[0] * shape[1]
        pieces = (content[at : at + picture] for at in range(0, len(content), picture))
        sizes["png"] = sum(_picture_file(shape, "png", {"optimize": True}, piece) for piece in pieces)
    flac = _flac_file(sample_rate, 0, content) if sample_rate is not None else _flac_of_wav(content)
    if flac is not None:
        sizes["flac"] = flac
    return {f"{name}_bpb": 8 * size / len(content) for name, size in sizes.items()}


def _chunks(split: Split, parts: list[Part]) -> Iterator[tuple[int, bytes, bytes | None]]:
    """(sample, bytes for the streams, the sample's bytes if they are to be a file) over an excerpt."""
    if split.modality == "text":
        for chunk in read_parts(split, parts):
            yield 0, chunk, None
        return
    for i, start, stop in parts:
        content = split.read(i, start, stop)
        yield i, content, content


def _stream_codecs(total: int) -> dict[str, Any]:
    # A window beyond the content gains nothing and costs ten times its size in memory; the sizes stay the same.
    window = min(_XZ_DICT_BYTES, max(4096, 1 << (total - 1).bit_length()))
    xz = {"id": lzma.FILTER_LZMA2, "preset": _XZ_PRESET, "dict_size": window}
    return {
        "gzip": zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS),
        "xz": lzma.LZMACompressor(lzma.FORMAT_XZ, filters=[xz]),
    }


def _flowed(compress: Callable[[bytes], bytes], chunk: bytes) -> int:
    return len(compress(chunk))


def _file_codecs(split: Split, parts: list[Part]) -> dict[str, Callable[[int, bytes], int]]:
    """By name, functions that give the size of a sample (number, bytes) as a file."""
    prep = split.manifest.prep
    if split.modality == "image":
        sides = max(max(split.image_size(i)) for i, _, _ in parts)
        kinds: dict[str, dict[str, Any]] = {"png": {"optimize": True}}
        if sides <= _WEBP_LARGEST_SIDE:
            kinds["webp"] = {"lossless": True, "method": 4}  # methods above take 20 times as long for no gain
        return {kind: partial(_image_file, split, kind, options) for kind, options in kinds.items()}
    if split.modality == "audio" and prep.get("encoding", "pcm16") == "pcm16":
        return {"flac": partial(_flac_file, int(prep.get("sample_rate", 16_000)))}
    return {}


def _image_file(split: Split, kind: str, options: dict[str, Any], i: int, content: bytes) -> int:
    return _picture_file(split.image_size(i), kind, options, content)


def _picture_file(shape: tuple[int, int], kind: str, options: dict[str, Any], content: bytes) -> int:
    from PIL import Image

    height, width = shape
    file = io.BytesIO()
    Image.frombuffer("RGB", (width, height), content, "raw", "RGB", 0, 1).save(file, kind, **options)
    return len(file.getvalue())


def _flac_file(sample_rate: int, _: int, content: bytes) -> int:
    frames = np.frombuffer(content, "<i2", len(content) // 2)
    return _flac_size(frames, sample_rate) + len(content) % 2


def _flac_of_wav(content: bytes) -> int | None:
    """Size of a WAV file's sound as FLAC; None where it is no WAV of 16 bits that FLAC can hold."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            if file.getsampwidth() != 2 or file.getnchannels() > 8 or not 1 <= file.getframerate() <= 655_350:
                return None
            frames = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            whole = len(frames) - len(frames) % file.getnchannels()
            return _flac_size(frames[:whole].reshape(-1, file.getnchannels()), file.getframerate())
    except (wave.Error, EOFError, ValueError):
        return None


def _flac_size(frames: np.ndarray, sample_rate: int) -> int:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, frames, sample_rate, format="FLAC", subtype="PCM_16", compression_level=1.0)  # 1: level 8
    return len(file.getvalue())
