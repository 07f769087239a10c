"""First pass: source files are read once, and an index of their samples is staged, with the bytes of those it must.

    .prep/stage/000000.blob       samples' bytes, one after the other; none if there are none
    .prep/stage/000000.rejected   an Arrow file, one row per rejection; none if there are none
    .prep/stage/000000.index      an Arrow file, one row per sample; written last: where it stands, the others do

A long plain file is its own sample, byte for byte: it is hashed where it lies and not copied, and the second pass reads
it again. A job takes a group of consecutive source files, so that many small files do not make as many staged ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_prep.items import items
from data_prep.pool import Progress
from data_prep.sources import (
    Item,
    Modality,
    PassedOver,
    Rejection,
    Sample,
    SourceFile,
    Unreadable,
    check_unchanged,
)
from mbtrain.errors import DataError
from mbtrain.shards import whole_file

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_BYTES = 16 * 1024**2
_GROUP_FILES = 4096
_BATCH_ROWS = 65536

# Below this a second opening of the file costs more than a copy, on network file systems above all.
REFERRED_BYTES = 64 * 1024


@dataclass(frozen=True)
class StageJob:
    """A group of source files to stage under `number`.

    first                  the number of its first file among all source files
    min_bytes, max_bytes   samples outside are rejected
    signed                 make a signature of each sample, by which near-duplicates are found
    """

    number: int
    first: int
    files: tuple[SourceFile, ...]
    modality: Modality
    min_bytes: int
    max_bytes: int
    signed: bool
    prep: Path


@dataclass(frozen=True)
class StageCounts:
    """What the reader yielded in a group: `found` as samples or rejections, of which `rows` became samples.

    `rejected` are the others, `bad` those of them that cannot be read or decoded; `passed_over` was not asked for.
    """

    rows: int = 0
    found: int = 0
    rejected: int = 0
    bad: int = 0
    passed_over: int = 0


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


def stage_schema(signed: bool = False) -> pa.Schema:
    """Columns of a staged index.

    file        number of the source file
    plain       the sample is the source file itself; else it is in the blob
    offset      in the blob, or 0
    hash        sha256 of the sample
    signature   see `data_prep.near`; with `signed` only
    """
    import pyarrow as pa

    fields = [
        ("file", pa.int32()),
        ("plain", pa.bool_()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("hash", pa.binary(32)),
        ("shape", pa.list_(pa.int32())),
        ("sample_rate", pa.int32()),
    ]
    return pa.schema([*fields, ("signature", pa.binary())] if signed else fields)


def rejected_schema() -> pa.Schema:
    """Columns of staged rejections; `file` is the number of the source file."""
    import pyarrow as pa

    return pa.schema([("file", pa.int32()), ("where", pa.string()), ("reason", pa.string()), ("bad", pa.bool_())])


def read_counts(prep: Path, number: int) -> StageCounts:
    """The counts of a staged group; they stand with the last batch of its index."""
    import pyarrow as pa

    with pa.memory_map(str(stage_path(prep, number, "index"))) as file:
        reader = pa.ipc.open_file(file)
        _, metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        return StageCounts(**json.loads(metadata[b"counts"]))


def stage(job: StageJob, count: Progress) -> None:
    """Stage a group of files; `count` is told of source bytes read and of what is bad.

    Raises:
        DataError: a file changed while it was read, or the network failed.
    """
    import pyarrow as pa

    sign: Callable[[bytes], bytes] | None = None
    if job.signed:
        from data_prep.near import signature

        sign = signature

    found = rejected = bad = passed_over = 0
    tmp = job.prep / "tmp"
    with ExitStack() as stack:  # closed from the last to the first
        index = stack.enter_context(whole_file(stage_path(job.prep, job.number, "index"), tmp))
        rows = _Rows(index, stage_schema(job.signed), stack)
        rejections: _Rows | None = None
        blob = _Blob(stage_path(job.prep, job.number, "blob"), tmp, stack)
        for number, file in enumerate(job.files, job.first):
            for thing in _staged(job, file, blob, count, sign):
                if isinstance(thing, PassedOver):
                    passed_over += 1
                    continue
                found += 1
                if isinstance(thing, Rejection):
                    if rejections is None:
                        path = stage_path(job.prep, job.number, "rejected")
                        rejections = _Rows(stack.enter_context(whole_file(path, tmp)), rejected_schema(), stack)
                    rejected += 1
                    bad += thing.bad
                    where, reason = (_utf8(text) for text in (thing.where, thing.reason))
                    rejections.add((number, where, reason, thing.bad))
                    count(0, int(thing.bad))
                else:
                    rows.add((number, *thing))
            check_unchanged(file)
        if rejections is not None:
            rejections.flush()
        counts = StageCounts(rows.number, found, rejected, bad, passed_over)
        rows.flush(pa.KeyValueMetadata({"counts": json.dumps(asdict(counts))}))


class _Rows:
    """An Arrow file that is written row by row, a batch at a time."""

    def __init__(self, out: BinaryIO, schema: pa.Schema, stack: ExitStack) -> None:
        import pyarrow as pa

        self.number = 0
        self._rows: list[tuple[Any, ...]] = []
        self._schema = schema
        self._writer = stack.enter_context(pa.ipc.new_file(out, schema))

    def add(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        self.number += 1
        if len(self._rows) == _BATCH_ROWS:
            self.flush()

    def flush(self, metadata: Any = None) -> None:
        import pyarrow as pa

        columns: Iterable[Sequence[Any]] = zip(*self._rows, strict=True) if self._rows else [()] * len(self._schema)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema), custom_metadata=metadata)
        self._rows.clear()


class _Blob:
    """The blob of a group: a file that is made with its first sample."""

    def __init__(self, path: Path, tmp: Path, stack: ExitStack) -> None:
        self.end = 0
        self._path, self._tmp, self._stack = path, tmp, stack
        self._file: BinaryIO | None = None

    def write(self, data: bytes) -> None:
        if self._file is None:
            self._file = self._stack.enter_context(whole_file(self._path, self._tmp))
        self._file.write(data)
        self.end += len(data)

    def cut(self, end: int) -> None:
        if self._file is not None and self.end != end:
            self._file.seek(end)
            self._file.truncate()
            self.end = end


def _staged(
    job: StageJob, file: SourceFile, blob: _Blob, count: Progress, sign: Callable[[bytes], bytes] | None
) -> Iterator[Rejection | PassedOver | tuple[Any, ...]]:
    """Stage a file's samples; yields their rows less the file's number, what was rejected and what was passed over."""
    read = 0

    def count_read(size: int) -> None:
        nonlocal read
        read += size
        count(size)

    try:
        for item in items(file, job.modality.column, job.modality.wants, count_read):
            if isinstance(item, Item):
                yield from _decoded(job, file, item, blob, sign)
            else:
                yield item
    except Unreadable as error:
        yield Rejection("", str(error))
    except RecursionError:
        yield Rejection("", "nested too deep")
    count(file.size - read)  # a reader may skip parts of its file, or read some twice


def _decoded(
    job: StageJob, file: SourceFile, item: Item, blob: _Blob, sign: Callable[[bytes], bytes] | None
) -> Iterator[Rejection | tuple[Any, ...]]:
    start = blob.end
    try:
        for sample in job.modality.decode(item):
            if isinstance(sample, Rejection):
                yield sample
                continue
            start = blob.end
            plain = sample.plain and file.size >= REFERRED_BYTES
            size, digest, reason, signature = _taken(job, sample, None if plain else blob, sign)
            if reason is not None:
                blob.cut(start)
                yield Rejection(sample.where, reason, bad=False)
                continue
            if plain and size != file.size:
                raise DataError(
                    f"{file.path}: expected {file.size} bytes, got {size}: it changed while it was read; "
                    "start again with --overwrite when it is complete"
                )
            row = (plain, 0 if plain else start, size, digest, sample.shape, sample.sample_rate)
            yield (*row, signature) if job.signed else row
            start = blob.end
    except Unreadable as error:
        blob.cut(start)
        yield Rejection(item.where, str(error))


def _taken(
    job: StageJob, sample: Sample, blob: _Blob | None, sign: Callable[[bytes], bytes] | None
) -> tuple[int, bytes, str | None, bytes | None]:
    """Hash a sample, and write it to the blob if there is one.

    Returns its length, its sha256, why it is not wanted, if so, and its signature, if one is asked for.
    """
    digest, size = hashlib.sha256(), 0
    kept: list[bytes] = []
    for chunk in sample.chunks:
        size += len(chunk)
        if size > job.max_bytes:
            return size, b"", f"longer than {job.max_bytes} bytes", None
        digest.update(chunk)
        if blob is not None:
            blob.write(chunk)
        if sign is not None:
            kept.append(chunk)
    if size == 0:
        return 0, b"", "empty", None
    if size < job.min_bytes:
        return size, b"", f"{size} bytes, shorter than {job.min_bytes}", None
    return size, digest.digest(), None, sign(b"".join(kept)) if sign is not None else None


def _utf8(text: str) -> str:
    """`text` with what is no Unicode written out: names of files may hold any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()
