"""Second pass: one shard's tar and parquet, from the plan and the staged bytes, or the source files themselves."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from data_prep.plan import plan_path
from data_prep.pool import Progress
from data_prep.sources import READ_BYTES
from data_prep.stage import stage_path
from mbtrain.errors import DataError
from mbtrain.shards import EXTENSIONS, ShardInfo, index_schema, shard_name, whole_file

if TYPE_CHECKING:
    import pyarrow as pa

KEY_DIGITS = 32
_ROW_GROUP_ROWS = 65536

_EMPTY_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_EMPTY_CHECKSUM = int(_EMPTY_HEADER[148:154], 8)


@dataclass(frozen=True)
class ShardJob:
    """A shard to write: record batch `batch` of the plan becomes shard `number` of `split`.

    files    the Arrow file of the source files: `path` and `label` by their numbers
    bytes    of its samples
    """

    out: Path
    prep: Path
    files: Path
    modality: str
    split: str
    number: int
    batch: int
    bytes: int


def written(job: ShardJob) -> ShardInfo | None:
    """What was written of a shard, if both of its files are there."""
    folder, name = job.out / job.split, shard_name(job.split, job.number)
    try:
        info = ShardInfo(**json.loads(_record_path(job).read_bytes()))
        sizes = ((folder / f"{name}.tar").stat().st_size, (folder / f"{name}.parquet").stat().st_size)
    except FileNotFoundError:
        return None
    return info if sizes == (info.size_tar, info.size_parquet) else None


def write_shard(job: ShardJob, count: Progress) -> ShardInfo:
    """Write a shard's two files; `count` is told of bytes of samples.

    Raises:
        DataError: the staged bytes or a source file are not what was staged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, folder, tmp = shard_name(job.split, job.number), job.out / job.split, job.prep / "tmp"
    with pa.memory_map(str(plan_path(job.prep))) as file:
        plan = pa.ipc.open_file(file).get_batch(job.batch)
        with whole_file(folder / f"{name}.tar", tmp) as out:
            index, sha256_tar, size_tar = _write_tar(out, plan, job, count)
    buffer = pa.BufferOutputStream()
    pq.write_table(
        index,
        buffer,
        row_group_size=_ROW_GROUP_ROWS,
        compression="zstd",
        use_dictionary=["modality", "source"],
        write_page_checksum=True,
    )
    parquet = buffer.getvalue()
    with whole_file(folder / f"{name}.parquet", tmp) as out:
        out.write(parquet)
    info = ShardInfo(
        name=name,
        samples=len(index),
        bytes=job.bytes,
        size_tar=size_tar,
        size_parquet=len(parquet),
        sha256_tar=sha256_tar,
        sha256_parquet=hashlib.sha256(parquet).hexdigest(),
    )
    with whole_file(_record_path(job), tmp) as out:
        out.write(json.dumps(asdict(info)).encode())
    return info


def _record_path(job: ShardJob) -> Path:
    return job.prep / "shards" / f"{shard_name(job.split, job.number)}.json"


def _write_tar(out: BinaryIO, plan: pa.RecordBatch, job: ShardJob, count: Progress) -> tuple[pa.Table, str, int]:
    """Write the members of a shard; returns its index, the tar's sha256 (hex) and size."""
    import pyarrow as pa

    digest = hashlib.sha256()
    end = 0

    def put(data: bytes) -> None:
        nonlocal end
        out.write(data)
        digest.update(data)
        end += len(data)

    extension = EXTENSIONS[job.modality]
    keys: list[str] = []
    offsets: list[int] = []
    hashes: list[str] = []
    tables: list[pa.Table] = []
    with closing(_Stored(job)) as stored, pa.memory_map(str(job.files)) as file:
        files = pa.ipc.open_file(file).read_all()
        for group, staged, starts, lengths, pieces in _runs(plan, job.prep):
            blob = str(stage_path(job.prep, group, "blob"))
            columns = [staged[name].to_pylist() for name in ("hash", "file", "plain")]
            for staged_hash, number, plain, start, size, piece in zip(
                *columns, starts.tolist(), lengths.tolist(), pieces, strict=True
            ):
                key = staged_hash.hex()[:KEY_DIGITS] if piece is None else f"p{piece:012d}"
                path = os.fsdecode(files["path"][number].as_py()) if plain else blob
                header, padding = member_header(f"{key}.{extension}", size), bytes(-size % tarfile.BLOCKSIZE)
                offsets.append(end + len(header))
                sample_hash = hashlib.sha256()
                if size <= READ_BYTES:  # at once: for short samples the calls would take longer than the work
                    content = b"".join(stored.chunks(path, start, size))
                    sample_hash.update(content)
                    put(b"".join((header, content, padding)))
                else:
                    put(header)
                    for chunk in stored.chunks(path, start, size):
                        put(chunk)
                        sample_hash.update(chunk)
                    put(padding)
                if piece is None and sample_hash.digest() != staged_hash:
                    raise _changed(job, f"{path}: changed at byte {start}")
                count(size)
                keys.append(key)
                hashes.append(sample_hash.hexdigest())
            labels = files["label"].take(staged["file"]).cast(pa.string())
            table = staged.select(["shape", "sample_rate"]).append_column("source", labels)
            tables.append(table.append_column("bytes", pa.array(lengths, pa.int64())))
    put(bytes(2 * tarfile.BLOCKSIZE))
    put(bytes(-end % tarfile.RECORDSIZE))
    index = pa.concat_tables(tables).append_column("key", pa.array(keys))
    index = index.append_column("offset", pa.array(offsets, pa.int64())).append_column("hash", pa.array(hashes))
    index = index.append_column("modality", pa.repeat(job.modality, len(keys)))
    return index.select(index_schema().names).cast(index_schema()).combine_chunks(), digest.hexdigest(), end


def _runs(plan: pa.RecordBatch, prep: Path) -> Iterator[tuple[int, pa.Table, np.ndarray, np.ndarray, list[int | None]]]:
    """The plan's rows by the group in which they were staged.

    Yields the group, the rows' staged index, where each sample or piece begins (in the group's blob, or in the source
    file), its length, and the numbers of pieces (None for whole samples).
    """
    import pyarrow as pa

    groups, rows = plan["group"].to_numpy(), plan["row"].to_numpy()
    bounds = np.flatnonzero(np.diff(groups, prepend=-1, append=-1)).tolist()
    for first, last in zip(bounds, bounds[1:], strict=False):
        group = int(groups[first])
        with pa.memory_map(str(stage_path(prep, group, "index"))) as file:
            staged = pa.ipc.open_file(file).read_all().take(rows[first:last])
        starts, lengths = staged["offset"].to_numpy(), staged["bytes"].to_numpy()
        pieces: list[int | None] = [None] * (last - first)
        if "piece" in plan.schema.names:
            starts = starts + plan["start"].to_numpy()[first:last]
            lengths = plan["bytes"].to_numpy()[first:last]
            pieces = plan["piece"].to_pylist()[first:last]
        yield group, staged, starts, lengths, pieces


def _changed(job: ShardJob, what: str) -> DataError:
    """An error after which this job cannot be gone on with, for what was staged of it is no longer true."""
    (job.prep / "job.json").unlink(missing_ok=True)
    return DataError(f"{what} since it was staged; start again with --overwrite")


def member_header(name: str, size: int) -> bytes:
    """The header block of a regular file of `size` bytes: mode 644, no owner, time 0. `name` is short and ASCII.

    What tarfile writes, byte for byte, in a tenth of its time, which would be most of the time for short samples.
    """
    name_field, size_field = name.encode("ascii"), b"%011o" % size
    if len(name_field) > tarfile.LENGTH_NAME or len(size_field) > 11:
        raise ValueError(f"a member that does not fit into the tar format: {name}, {size} bytes")
    header = bytearray(_EMPTY_HEADER)
    header[: len(name_field)] = name_field
    header[124:135] = size_field
    checksum = _EMPTY_CHECKSUM + sum(name_field) + sum(size_field) - sum(b"0" * 11)
    header[148:154] = b"%06o" % checksum
    return bytes(header)


class _Stored:
    """Ranges of stored files; keeps the file that was read last open."""

    def __init__(self, job: ShardJob) -> None:
        self._job = job
        self._path, self._descriptor = "", -1

    def chunks(self, path: str, start: int, size: int) -> Iterator[bytes]:
        """The bytes from `start` on, a MiB at a time; raises DataError where the file ends too early."""
        if path != self._path:
            self.close()
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._path = path
        while size:
            chunk = os.pread(self._descriptor, min(size, READ_BYTES), start)
            if not chunk:
                raise _changed(self._job, f"{path}: cut off at byte {start}")
            yield chunk
            start += len(chunk)
            size -= len(chunk)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._path, self._descriptor = "", -1
