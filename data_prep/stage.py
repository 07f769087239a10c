"""First pass: source files are read once, and their samples' bytes and an index of them are staged.

    .prep/stage/000000.blob       the samples' bytes, one after the other
    .prep/stage/000000.rejected   what is no sample, as JSON lines
    .prep/stage/000000.index      an Arrow file, one row per sample; written last: where it stands, the others do

A job takes a group of consecutive source files, so that many small files do not make as many staged ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_prep.sources import Count, Modality, Rejection, Sample, SourceFile, Unreadable, check_unchanged
from mbtrain.shards import whole_file

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_BYTES = 32 * 1024**2
_GROUP_FILES = 4096
_INDEX_ROWS = 65536


@dataclass(frozen=True)
class StageJob:
    """A group of source files to stage under `number`; samples outside min_bytes..max_bytes are rejected."""

    number: int
    files: tuple[SourceFile, ...]
    modality: Modality
    min_bytes: int
    max_bytes: int
    prep: Path


def group_files(files: Sequence[SourceFile], group_bytes: int) -> list[tuple[SourceFile, ...]]:
    """Consecutive files in groups; each is closed by the file with which it reaches `group_bytes`."""
    groups: list[tuple[SourceFile, ...]] = []
    group: list[SourceFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.size
        if size >= group_bytes or len(group) >= _GROUP_FILES:
            groups.append(tuple(group))
            group, size = [], 0
    return [*groups, tuple(group)] if group else groups


def stage_path(prep: Path, number: int, kind: str) -> Path:
    """Where a staged file lies; `kind` is blob, rejected or index."""
    return prep / "stage" / f"{number:06d}.{kind}"


def stage_schema() -> pa.Schema:
    """Columns of a staged index; offset and bytes are in the blob, hash is the raw sha256."""
    import pyarrow as pa

    fields = [
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("hash", pa.binary(32)),
        ("shape", pa.list_(pa.int32())),
        ("sample_rate", pa.int32()),
        ("source", pa.string()),
    ]
    return pa.schema(fields)


def stage(job: StageJob, count: Count) -> None:
    """Stage a group of files, unless that was done; `count` is told of source bytes read.

    Raises:
        DataError: a file changed while it was read.
    """
    import pyarrow as pa

    index_path = stage_path(job.prep, job.number, "index")
    if index_path.exists():
        count(sum(file.size for file in job.files))
        return
    tmp, schema = job.prep / "tmp", stage_schema()
    rows: list[tuple[Any, ...]] = []
    with (  # closed from the last to the first
        whole_file(index_path, tmp) as index_file,
        whole_file(stage_path(job.prep, job.number, "rejected"), tmp) as rejected,
        whole_file(stage_path(job.prep, job.number, "blob"), tmp) as blob,
        pa.ipc.new_file(index_file, schema) as index,
    ):

        def flush() -> None:
            columns = zip(*rows, strict=True) if rows else [()] * len(schema)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            index.write_batch(pa.record_batch(arrays, schema=schema))
            rows.clear()

        for file in job.files:
            for item in _staged(job, file, blob, count):
                if isinstance(item, Rejection):
                    place = {"source": file.label, "file": file.name, "where": item.where}
                    line = json.dumps({**place, "reason": item.reason, "bad": item.bad})
                    rejected.write(line.encode() + b"\n")
                else:
                    rows.append((*item, file.label))
                    if len(rows) == _INDEX_ROWS:
                        flush()
            check_unchanged(file)
        flush()


def _staged(
    job: StageJob, file: SourceFile, blob: BinaryIO, count: Count
) -> Iterator[Rejection | tuple[int, int, bytes, tuple[int, ...] | None, int | None]]:
    """Write a file's samples to the blob; yields their rows less the source, and what was rejected."""
    read = 0

    def count_read(size: int) -> None:
        nonlocal read
        read += size
        count(size)

    start = blob.tell()
    try:
        for item in job.modality.samples(file, count_read):
            if isinstance(item, Rejection):
                yield item
                continue
            start = blob.tell()
            digest, reason = _append(item, blob, job.min_bytes, job.max_bytes)
            if reason is None:
                yield start, blob.tell() - start, digest, item.shape, item.sample_rate
                start = blob.tell()
            else:
                _cut(blob, start)
                yield Rejection(item.where, reason, bad=False)
    except Unreadable as error:
        _cut(blob, start)
        yield Rejection("", str(error))
    count(file.size - read)  # a reader may skip parts of its file, or read some twice


def _append(sample: Sample, blob: BinaryIO, min_bytes: int, max_bytes: int) -> tuple[bytes, str | None]:
    """Write a sample; returns its sha256, and why it is not wanted, if so."""
    digest, size = hashlib.sha256(), 0
    for chunk in sample.chunks:
        size += len(chunk)
        if size > max_bytes:
            return b"", f"longer than {max_bytes} bytes"
        blob.write(chunk)
        digest.update(chunk)
    if size == 0:
        return b"", "empty"
    if size < min_bytes:
        return b"", f"{size} bytes, shorter than {min_bytes}"
    return digest.digest(), None


def _cut(blob: BinaryIO, end: int) -> None:
    blob.seek(end)
    blob.truncate()
