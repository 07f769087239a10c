"""Every byte of a data set against its hash, and what is written in one place against what is written in another.

manifest.json     its own hash, as whenever it is read; its counts
*.parquet         sha256 as the manifest says; rows, bytes, shapes and sample rates
*.tar             sha256 as the manifest says; and from its first byte to its last what the index implies: header,
                  content (by its hash) and padding of each sample, then zeros. So what is damaged has a name.
rejected.parquet  sha256 and rows as the manifest says
in all            no key stands twice, no document in two splits, no shard beside those of the manifest
"""

from __future__ import annotations

import hashlib
import math
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_prep.pool import Progress, worker_pool
from data_prep.writer import member_header
from mbtrain.errors import DataError
from mbtrain.shards import (
    EXTENSIONS,
    REJECTED_NAME,
    Manifest,
    ShardInfo,
    SplitInfo,
    check_files,
    file_sha256,
    index_schema,
    load_manifest,
    read_index,
)

if TYPE_CHECKING:
    import pyarrow as pa

_NAMED = 5
_READ_BYTES = 1024**2


@dataclass(frozen=True)
class VerifyJob:
    """One shard to check; `prep` is the manifest's."""

    folder: Path
    shard: ShardInfo
    modality: str
    prep: dict[str, Any]


@dataclass(frozen=True)
class ShardReport:
    """What is wrong with a shard, a line each, and the keys and hashes of its samples."""

    index_path: Path
    problems: list[str]
    keys: pa.Array
    hashes: pa.Array


def verify(root: Path, workers: int) -> tuple[Manifest, list[str]]:
    """Check a data set: files and samples against their hashes, tars against indices, splits against each other.

    Returns its manifest and what is wrong, a line each, beginning with the file.

    Raises:
        DataError: there is no manifest, or it is damaged.
    """
    manifest = load_manifest(root)
    jobs = [
        VerifyJob(root / split, shard, manifest.modality, manifest.prep)
        for split, info in manifest.splits.items()
        for shard in info.shards
    ]
    with worker_pool(workers) as run:
        reports: list[ShardReport] = run(
            check_shard, jobs, "verify", sum(info.bytes for info in manifest.splits.values())
        )
    problems = [line for report in reports for line in report.problems]
    problems += _repeated_keys(reports)
    if manifest.documents == "whole":
        problems += _repeated_documents(reports)
    problems += _check_rejected(root, manifest)
    problems += _strangers(root, manifest)
    return manifest, problems


# ---- a shard ------------------------------------------------------------------------------------------------------


def check_shard(job: VerifyJob, count: Progress) -> ShardReport:
    """Check one shard; `count` is told of bytes of samples."""
    import pyarrow as pa

    shard = job.shard
    index_path, tar_path = job.folder / f"{shard.name}.parquet", job.folder / f"{shard.name}.tar"
    info = SplitInfo(shard.samples, shard.bytes, (shard,))
    try:
        table = _index(index_path)
        index_changed = _changed(index_path, file_sha256(index_path), shard.sha256_parquet)
    except (DataError, OSError) as error:  # without it nothing in the tar has a name
        count(shard.bytes)
        nothing = pa.array([], pa.string())
        return ShardReport(index_path, check_files(job.folder, info, "full") or [str(error)], nothing, nothing)

    problems = check_files(job.folder, info, "size")  # a tar that was cut off still shows which sample it was cut in
    if index_changed and not any(line.startswith(f"{index_path}:") for line in problems):
        problems.append(index_changed)
    rows = table.to_pylist()
    if len(rows) != shard.samples or sum(row["bytes"] for row in rows) != shard.bytes:
        problems.append(f"{index_path}: expected {shard.samples} samples of {shard.bytes} bytes")
    problems += _some(index_path, (f"{row['key']}: {said}" for row in rows if (said := _misfit(row, job))))
    if tar_path.is_file():
        damage, digest = _check_tar(tar_path, rows, job.modality, count)
        tar_changed = _changed(tar_path, digest, shard.sha256_tar)
        if tar_changed and not any(line.startswith(f"{tar_path}:") for line in problems):
            problems.append(tar_changed)
        # a tar that is as it was made cannot be what is wrong
        problems += _some(index_path if index_changed and not tar_changed else tar_path, damage)
    return ShardReport(index_path, problems, table["key"].combine_chunks(), table["hash"].combine_chunks())


def _index(path: Path) -> pa.Table:
    """An index with the columns and values that it has to have. Raises DataError."""
    import pyarrow as pa

    schema = index_schema()
    table = read_index(path, schema.names)
    try:
        table = table.cast(schema)
    except pa.ArrowException as error:
        raise DataError(f"{path}: expected the columns {schema.names}: {' '.join(str(error).split())}") from None
    for name in schema.names:
        if name not in ("shape", "sample_rate") and table[name].null_count:
            raise DataError(f"{path}: no value in column {name!r}, row {_first_null(table[name])}")
    return table


def _first_null(column: pa.ChunkedArray) -> int:
    return int(column.is_null().index(True).as_py())


def _misfit(row: dict[str, Any], job: VerifyJob) -> str:
    """What is wrong with the row of a sample by itself; empty if nothing is."""
    size, shape, rate = row["bytes"], row["shape"], row["sample_rate"]
    if row["modality"] != job.modality:
        return f"expected modality {job.modality}, got {row['modality']}"
    if size < 0:
        return f"expected a length, got {size} bytes"
    if job.modality == "image":
        good = shape is not None and len(shape) == 3 and min(shape) > 0 and shape[2] == 3 and math.prod(shape) == size
        return "" if good and rate is None else f"shape {shape}, sample rate {rate} do not fit an image of {size} bytes"
    if job.modality == "audio":
        width = 1 if job.prep.get("encoding") == "mulaw8" else 2
        good = shape is not None and len(shape) == 1 and shape[0] * width == size
        good = good and rate == job.prep.get("sample_rate", rate) and rate is not None and rate > 0
        return "" if good else f"shape {shape}, sample rate {rate} do not fit a sound of {size} bytes"
    return "" if shape is None and rate is None else f"expected neither shape nor sample rate, got {shape}, {rate}"


def _check_tar(path: Path, rows: Sequence[dict[str, Any]], modality: str, count: Progress) -> tuple[list[str], str]:
    """What is wrong in a tar against the rows of its index, and the sha256 (hex) of the whole file; read once."""
    with open(path, "rb") as file:
        tar = _Hashing(file)
        damage = list(_members(tar, rows, modality, count))
        while tar.read(_READ_BYTES):
            pass
        return damage, tar.digest.hexdigest()


class _Hashing:
    """A file that is read once from its start, and the hash of all that was read."""

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self._file = file

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


def _members(tar: _Hashing, rows: Sequence[dict[str, Any]], modality: str, count: Progress) -> Iterator[str]:
    end = 0
    for number, row in enumerate(rows):
        key, size = row["key"], row["bytes"]
        if size < 0:  # was said already
            return
        if row["offset"] != end + tarfile.BLOCKSIZE:
            yield f"{key}: the index says offset {row['offset']}, expected {end + tarfile.BLOCKSIZE}"
        try:
            expected = member_header(f"{key}.{EXTENSIONS[modality]}", size)
        except ValueError as error:
            yield f"{key}: no name for a tar's member ({error})"
            return
        header = tar.read(tarfile.BLOCKSIZE)
        if header != expected and len(header) == tarfile.BLOCKSIZE:
            yield f"{key}: the tar's header is not as the index says"
        digest, left = hashlib.sha256(), size
        while left and (chunk := tar.read(min(left, _READ_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
        padding = -size % tarfile.BLOCKSIZE
        filling = tar.read(padding)
        if len(header) < tarfile.BLOCKSIZE or left or len(filling) < padding:
            more = f", and the {len(rows) - number - 1} samples after it are missing" if number + 1 < len(rows) else ""
            yield f"{key}: cut off{more}"
            return
        if digest.hexdigest() != row["hash"]:
            yield f"{key}: changed: its hash is not as the index says"
        if any(filling):
            yield f"{key}: its padding is not zero"
        end += tarfile.BLOCKSIZE + size + padding
        count(size)
    length, zero = 0, True
    while chunk := tar.read(_READ_BYTES):
        length += len(chunk)
        zero = zero and not any(chunk)
    if length < 2 * tarfile.BLOCKSIZE or not zero:
        yield "the end-of-archive mark is missing or damaged"


def _changed(path: Path, got: str, expected: str) -> str:
    return "" if got == expected else f"{path}: changed: expected sha256 {expected}, got {got}"


def _some(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """The first few of many lines about a file, and how many more there are."""
    more = 0
    for number, line in enumerate(lines):
        if number < _NAMED:
            yield f"{path}: {line}"
        else:
            more += 1
    if more:
        yield f"{path}: and {more} more"


# ---- all shards ---------------------------------------------------------------------------------------------------


def _repeated(column: pa.ChunkedArray) -> list[str]:
    """The values that stand more than once in a column."""
    import pyarrow.compute as pc

    if pc.count_distinct(column).as_py() == len(column):
        return []
    counted = pc.value_counts(column)
    return [str(value) for value in counted.filter(pc.greater(counted.field("counts"), 1)).field("values").to_pylist()]


def _repeated_keys(reports: list[ShardReport]) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    repeated = _repeated(pa.chunked_array([report.keys for report in reports], pa.string()))
    for key in repeated[:_NAMED]:
        paths = [report.index_path for report in reports if pc.index(report.keys, key).as_py() >= 0]
        where = f"there and in {paths[1]}" if len(paths) > 1 else "both times there"
        yield f"{paths[0]}: the key {key} stands twice, {where}"
    if len(repeated) > _NAMED:
        yield f"{reports[0].index_path.parent.parent}: and {len(repeated) - _NAMED} more keys stand twice"


def _repeated_documents(reports: list[ShardReport]) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    by_split: dict[Path, list[pa.Array]] = {}
    for report in reports:
        by_split.setdefault(report.index_path.parent, []).append(report.hashes)
    distinct = [pa.chunked_array(hashes, pa.string()).unique() for hashes in by_split.values()]
    repeated = _repeated(pa.chunked_array(distinct, pa.string()))
    for value in repeated[:_NAMED]:
        paths = [report.index_path for report in reports if pc.index(report.hashes, value).as_py() >= 0]
        other = next(path for path in paths if path.parent != paths[0].parent)
        yield f"{paths[0]}: the document with hash {value} stands in two splits, there and in {other}"
    if len(repeated) > _NAMED:
        yield f"{reports[0].index_path.parent.parent}: and {len(repeated) - _NAMED} more documents stand in two splits"


def _check_rejected(root: Path, manifest: Manifest) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, rejected = root / REJECTED_NAME, manifest.counts["rejected"]
    if not path.exists():
        if rejected:
            yield f"{path}: missing, and {rejected} were rejected"
        return
    if not rejected:
        yield f"{path}: not in the manifest, by which nothing was rejected"
        return
    try:
        if changed := _changed(path, file_sha256(path), manifest.rejected_sha256):
            yield changed
            return
        rows = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        yield f"{path}: cannot be read: {' '.join(str(error).split())}"
        return
    if rows != rejected:
        yield f"{path}: expected {rejected} rows, one of each that was rejected, got {rows}"


def _strangers(root: Path, manifest: Manifest) -> Iterator[str]:
    """Shards that the manifest does not know: a reader that lists files would take them for part of the data."""
    known = {
        root / split / f"{shard.name}.{end}"
        for split, info in manifest.splits.items()
        for shard in info.shards
        for end in ("tar", "parquet")
    }
    for path in sorted(root.glob("*/*")):
        if path.suffix in (".tar", ".parquet") and not path.parent.name.startswith(".") and path not in known:
            yield f"{path}: not in the manifest"
