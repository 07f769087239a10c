"""Every byte of a data set against its hash, and what is written in one place against what is written in another."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.pool import worker_pool
from data_prep.sources import READ_BYTES, Count
from data_prep.writer import member_header
from mbtrain.errors import DataError
from mbtrain.shards import (
    EXTENSIONS,
    Manifest,
    ShardInfo,
    SplitInfo,
    check_files,
    index_schema,
    load_manifest,
    read_index,
)

if TYPE_CHECKING:
    import pyarrow as pa

_NAMED_PER_SHARD = 5


@dataclass(frozen=True)
class VerifyJob:
    """One shard to check."""

    folder: Path
    shard: ShardInfo
    modality: str


@dataclass(frozen=True)
class ShardReport:
    """What is wrong with a shard, a line each, and the keys and hashes of its samples."""

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
        VerifyJob(root / split, shard, manifest.modality)
        for split, info in manifest.splits.items()
        for shard in info.shards
    ]
    with worker_pool(workers) as run:
        reports: list[ShardReport] = run(
            check_shard, jobs, "verify", sum(info.bytes for info in manifest.splits.values())
        )
    problems = [line for report in reports for line in report.problems]
    by_split = {
        split: [report for job, report in zip(jobs, reports, strict=True) if job.folder.name == split]
        for split in manifest.splits
    }
    problems += _repeated_keys(root, reports)
    if manifest.documents == "whole":
        problems += _repeated_hashes(root, by_split)
    problems += _strangers(root, manifest)
    return manifest, problems


def check_shard(job: VerifyJob, count: Count) -> ShardReport:
    """Check one shard; `count` is told of bytes of samples."""
    import pyarrow as pa

    empty = pa.array([], pa.string())
    info = SplitInfo(job.shard.samples, job.shard.bytes, (job.shard,))
    problems = check_files(job.folder, info, "full")
    parquet_path, tar_path = job.folder / f"{job.shard.name}.parquet", job.folder / f"{job.shard.name}.tar"
    try:
        table = read_index(parquet_path, index_schema().names)
    except DataError as error:
        return ShardReport(problems or [str(error)], empty, empty)
    report = ShardReport(problems, table["key"].combine_chunks(), table["hash"].combine_chunks())
    if len(table) != job.shard.samples or sum(table["bytes"].to_pylist()) != job.shard.bytes:
        problems.append(f"{parquet_path}: expected {job.shard.samples} samples of {job.shard.bytes} bytes")
    if tar_path.exists():
        bad = list(_check_tar(tar_path, table.to_pylist(), job.modality, count))
        more = [f"{tar_path}: and {len(bad) - _NAMED_PER_SHARD} more"] if len(bad) > _NAMED_PER_SHARD else []
        problems += bad[:_NAMED_PER_SHARD] + more
    return report


def _check_tar(path: Path, rows: Sequence[dict[str, Any]], modality: str, count: Count) -> Iterator[str]:
    """What is wrong in a tar against the rows of its index."""
    end = 0
    with open(path, "rb") as tar:
        for row in rows:
            member = f"{path}: {row['key']}"
            if row["modality"] != modality:
                yield f"{member}: expected modality {modality}, got {row['modality']}"
            if row["offset"] != end + tarfile.BLOCKSIZE:
                yield f"{member}: the index says offset {row['offset']}, expected {end + tarfile.BLOCKSIZE}"
            tar.seek(row["offset"] - tarfile.BLOCKSIZE)
            if tar.read(tarfile.BLOCKSIZE) != member_header(f"{row['key']}.{EXTENSIONS[modality]}", row["bytes"]):
                yield f"{member}: the tar's header is not as the index says"
            digest, left = hashlib.sha256(), row["bytes"]
            while left and (chunk := tar.read(min(left, READ_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
            if digest.hexdigest() != row["hash"]:
                yield f"{member}: {'cut off' if left else 'changed: its hash is not as the index says'}"
            padding = -row["bytes"] % tarfile.BLOCKSIZE
            if any(tar.read(padding)):
                yield f"{member}: its padding is not zero"
            end = row["offset"] + row["bytes"] + padding
            count(row["bytes"])
        tail = tar.read()
        if len(tail) < 2 * tarfile.BLOCKSIZE or any(tail):
            yield f"{path}: the end-of-archive mark is missing or damaged"


def _repeated(column: pa.ChunkedArray) -> list[str]:
    """The values that stand more than once in a column."""
    import pyarrow.compute as pc

    if pc.count_distinct(column).as_py() == len(column):
        return []
    counted = pc.value_counts(column)
    return [str(value) for value in counted.filter(pc.greater(counted.field("counts"), 1)).field("values").to_pylist()]


def _repeated_keys(root: Path, reports: list[ShardReport]) -> Iterator[str]:
    import pyarrow as pa

    for key in _repeated(pa.chunked_array([report.keys for report in reports], pa.string())):
        yield f"{root}: the key {key} stands twice"


def _repeated_hashes(root: Path, by_split: dict[str, list[ShardReport]]) -> Iterator[str]:
    import pyarrow as pa

    distinct = [
        pa.chunked_array([report.hashes for report in reports], pa.string()).unique() for reports in by_split.values()
    ]
    for value in _repeated(pa.chunked_array(distinct, pa.string())):
        yield f"{root}: the content with hash {value} stands in two splits"


def _strangers(root: Path, manifest: Manifest) -> Iterator[str]:
    """Shards that the manifest does not know: a reader that lists files would take them for part of the data."""
    for split, info in manifest.splits.items():
        known = {f"{shard.name}.{end}" for shard in info.shards for end in ("tar", "parquet")}
        for path in sorted((root / split).glob("*")):
            if path.suffix in (".tar", ".parquet") and path.name not in known:
                yield f"{path}: not in the manifest"
