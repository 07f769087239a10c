"""Inputs that `mbtrain bench data` makes for itself: texts, pictures, and data sets of any number of samples.

The same arguments give the same bytes, whatever the machine.
"""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mbtrain.shards import (
    COUNTS,
    SCHEMA_VERSION,
    Manifest,
    ShardInfo,
    SplitInfo,
    file_sha256,
    index_schema,
    shard_name,
    write_manifest,
)

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_BYTES = 128 * 1024**2  # as data prep's default
_FOLDER_FILES = 1000
_BLOCK, _RECORD = 512, 10240  # of a tar
_SPREAD = 1.5  # of the logarithms of files' lengths: most are short, most bytes are in long ones
_MEDIAN_BYTES, _LONGEST_BYTES = 20_000, 4_000_000
_ROW_GROUP = 65536  # as data prep's


def words(n_bytes: int, seed: int) -> bytes:
    """So many bytes of made-up words with spaces between them."""
    rng = np.random.default_rng(seed)
    known = [bytes(rng.integers(97, 123, length, np.uint8)) for length in rng.integers(1, 12, 4096).tolist()]
    return b" ".join([known[i] for i in rng.integers(0, len(known), n_bytes // 4).tolist()])[:n_bytes]


def texts(folder: Path, n_bytes: int, seed: int = 0) -> Path:
    """Fill a folder with plain files of mixed lengths, so many bytes in all; returns it."""
    rng = np.random.default_rng(seed)
    source = words(min(4 * n_bytes, 4 * _LONGEST_BYTES), seed)
    written = 0
    for number in count():
        if written >= n_bytes:
            return folder
        drawn = int(_MEDIAN_BYTES * np.exp(_SPREAD * rng.standard_normal())) + 1
        length = min(drawn, _LONGEST_BYTES, n_bytes - written)
        start = int(rng.integers(0, len(source) - length + 1))
        path = folder / f"{number // _FOLDER_FILES:03d}" / f"{number:06d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source[start : start + length])
        written += length
    raise AssertionError("unreachable")


def pictures(folder: Path, n: int, seed: int = 0) -> Path:
    """Fill a folder with n JPEGs of about 400 pixels: soft shapes under a grain that gives them a photo's size."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    grain = rng.normal(0, 7, (640, 640, 3)).astype(np.int16)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        height, width = rng.integers(340, 480, 2).tolist()
        top, left = rng.integers(0, 640 - 480, 2).tolist()
        coarse = rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(soft + grain[top : top + height, left : left + width], 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=90)
    return folder


def data_set(root: Path, splits: Mapping[str, int], mean_bytes: int, *, sparse: bool = False) -> Path:
    """Write a data set of text with so many documents by split, of mean_bytes / 2 to mean_bytes * 3 / 2; returns root.

    sparse: the tars are as long as they must be, and empty: they take no room, and samples read as zeros. The index is
    as long as a real one: nothing in it compresses that would not.
    """
    rng = np.random.default_rng(0)
    source = words(min(SHARD_BYTES // 8, 64 * mean_bytes), 0)
    per_shard = max(1, SHARD_BYTES // (mean_bytes + 2 * _BLOCK))
    infos = {}
    for split, samples in splits.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        made: list[ShardInfo] = []
        for first in range(0, samples, per_shard):
            lengths = rng.integers(-(-mean_bytes // 2), mean_bytes * 3 // 2 + 1, min(per_shard, samples - first))
            stem = root / split / shard_name(split, len(made))
            made.append(_hollow(stem, lengths, rng) if sparse else _shard(stem, lengths, source, rng))
        infos[split] = SplitInfo(samples, sum(shard.bytes for shard in made), tuple(made))
    counts = {**dict.fromkeys(COUNTS, 0), "found": sum(splits.values())}
    sources = {"files": sum(splits.values()), "bytes": sum(info.bytes for info in infos.values()), "digest": "0" * 64}
    write_manifest(root, Manifest(SCHEMA_VERSION, "text", "whole", {}, sources, counts, infos))
    return root


def _offsets(lengths: np.ndarray) -> tuple[np.ndarray, int]:
    """Where samples of these lengths begin in a tar, and how long it is."""
    members = _BLOCK + -(-lengths // _BLOCK) * _BLOCK
    size = int(members.sum()) + 2 * _BLOCK
    return np.cumsum(members) - members + _BLOCK, -(-size // _RECORD) * _RECORD


def _hollow(stem: Path, lengths: np.ndarray, rng: np.random.Generator) -> ShardInfo:
    """A shard whose tar is one hole, with an index of random hashes."""
    with stem.with_suffix(".tar").open("wb") as out:
        out.truncate(_offsets(lengths)[1])
    return _indexed(stem, lengths, rng.bytes(32 * len(lengths)))


def _shard(stem: Path, lengths: np.ndarray, source: bytes, rng: np.random.Generator) -> ShardInfo:
    """A shard whose documents are cut out of `source`, each with a number before it: no two are alike."""
    from data_prep.writer import KEY_DIGITS, member_header

    hashes = []
    with stem.with_suffix(".tar").open("wb") as out:
        starts = rng.integers(0, len(source) - int(lengths.max()) + 1, len(lengths)).tolist()
        for number, (start, length) in enumerate(zip(starts, lengths.tolist(), strict=True)):
            content = (b"%s %d " % (stem.name.encode(), number) + source[start : start + length])[:length]
            hashes.append(hashlib.sha256(content).digest())
            out.write(member_header(f"{hashes[-1].hex()[:KEY_DIGITS]}.text", length))
            out.write(content + bytes(-length % _BLOCK))
        out.write(bytes(_offsets(lengths)[1] - out.tell()))
    made = _indexed(stem, lengths, b"".join(hashes))
    return replace(made, sha256_tar=file_sha256(stem.with_suffix(".tar")))


def _indexed(stem: Path, lengths: np.ndarray, hashes: bytes) -> ShardInfo:
    """Write the index of a shard whose tar is written; hashes of 32 bytes each, end to end. The tar's is left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = len(lengths)
    offsets, size = _offsets(lengths)
    digits = np.frombuffer(binascii.hexlify(hashes), np.uint8).reshape(n, 64)
    columns = {
        "key": _strings(digits[:, :32]),
        "offset": pa.array(offsets),
        "bytes": pa.array(lengths),
        "modality": pa.repeat("text", n),
        "shape": pa.nulls(n, pa.list_(pa.int32())),
        "sample_rate": pa.nulls(n, pa.int32()),
        "source": pa.repeat("made", n),
        "hash": _strings(digits),
    }
    path = stem.with_suffix(".parquet")
    table = pa.table(columns, schema=index_schema())
    options = {"compression": "zstd", "use_dictionary": ["modality", "source"], "write_page_checksum": True}
    pq.write_table(table, path, row_group_size=_ROW_GROUP, **options)
    return ShardInfo(stem.name, n, int(lengths.sum()), size, path.stat().st_size, "0" * 64, file_sha256(path))


def _strings(characters: np.ndarray) -> pa.StringArray:
    """Strings of equal length, uint8 [n, length], as Arrow holds them; a call for each would take most of the time."""
    import pyarrow as pa

    n, length = characters.shape
    ends = np.arange(n + 1, dtype=np.int32) * length
    return pa.StringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(characters)))
