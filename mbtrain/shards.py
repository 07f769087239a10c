"""The shard format and its reading side: manifest, index, bytes by offset. Knows no model and imports no torch.

    DIR/manifest.json                    what the data set is; written last, so its presence means that all is whole
    DIR/rejected.parquet                 what is no sample, and why; only there if something is not
    DIR/<split>/<split>-000000.tar       a webdataset tar (USTAR), one member <key>.<extension> per sample
    DIR/<split>/<split>-000000.parquet   one row per member, in the tar's order; see `index_schema`

A sample is read by one `pread` at its offset in the tar, so the order of reading is free and a resume is a seek.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from mbtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.parquet"
EXTENSIONS = {"text": "text", "image": "rgb", "audio": "pcm"}
SPLIT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")

# found            what the readers of the sources yielded, as samples or rejected; of a file cut in pieces, the pieces
# duplicates       samples left out because their very bytes were there before
# near_duplicates  samples left out because they resemble one that was there before
# rejected         what is no sample; rejected.parquet says what and why
# passed_over      members of archives that were not asked for
# unused_bytes     past the end of the last split, where a file is cut in pieces
COUNTS = ("found", "duplicates", "near_duplicates", "rejected", "passed_over", "unused_bytes")

# One descriptor per shard stays open up to this many; a soft limit of 1024 open files is common.
MAX_OPEN_SHARDS = 256
_OPEN_THREADS = 8
_WRITE_BYTES = 1024**2
_PREPARE_AGAIN = "prepare the data again with mbtrain-prep, or copy it again"


# ---- the manifest -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardInfo:
    """One tar and its parquet index. `bytes` counts the samples' own bytes; the sizes are of the files, in bytes."""

    name: str
    samples: int
    bytes: int
    size_tar: int
    size_parquet: int
    sha256_tar: str
    sha256_parquet: str


@dataclass(frozen=True)
class SplitInfo:
    """The shards of one split in their order, with the sums of their samples and of the samples' bytes."""

    samples: int
    bytes: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class Manifest:
    """What a data set is. Holds nothing of the machine or the moment: the same input gives the same manifest.

    documents   "whole": each sample is one document, image or recording; "pieces": consecutive pieces of one file
    prep        the parameters that the bytes depend on
    sources     `files`, `bytes` and a `digest` over labels, relative paths and sizes of what was read first, and in
                `appended` the same of each addition
    counts      see `COUNTS`; found = samples + duplicates + near_duplicates + rejected
    rejected_sha256     of rejected.parquet; empty where nothing was rejected

    On disk it ends with `sha256`, which `load_manifest` compares with the rest.
    """

    schema_version: int
    modality: str
    documents: Literal["whole", "pieces"]
    prep: dict[str, Any]
    sources: dict[str, Any]
    counts: dict[str, int]
    splits: dict[str, SplitInfo]
    rejected_sha256: str = ""


def write_manifest(root: Path, manifest: Manifest, tmp_dir: Path | None = None) -> None:
    """Write `root/manifest.json`; it appears whole or not at all. `tmp_dir` is as in `whole_file`."""
    with whole_file(Path(root) / MANIFEST_NAME, tmp_dir) as out:
        out.write(_manifest_bytes(json.loads(json.dumps(asdict(manifest)))))


def _manifest_bytes(value: dict[str, Any]) -> bytes:
    """The one file that says `value`, less its `sha256`: so a file is changed exactly when it is not this one."""
    content = {key: item for key, item in value.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps(content | {"sha256": digest}, indent=1) + "\n").encode()


def load_manifest(root: Path | str) -> Manifest:
    """Read and check `root/manifest.json`.

    Raises:
        DataError: it is missing, cut off, of another schema version, or any byte of it is not as written.
    """
    path = Path(root) / MANIFEST_NAME
    try:
        written = path.read_bytes()
        value = json.loads(written)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no manifest, so this is no finished data set; run mbtrain-prep (again: it goes on where it was)"
        ) from None
    except NotADirectoryError:
        raise DataError(f"{root}: expected a folder made by mbtrain-prep, got a file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cut off or not JSON ({error}); {_PREPARE_AGAIN}") from None
    where = str(path)
    if isinstance(value, dict) and value.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{where}: schema_version: expected {SCHEMA_VERSION}, got {value.get('schema_version')!r}; "
            "prepare the data again with this version's mbtrain-prep"
        )
    top = _record(value, where, _MANIFEST_KEYS)
    if top["modality"] not in EXTENSIONS:
        raise DataError(f"{where}: modality: expected one of {', '.join(EXTENSIONS)}, got {top['modality']!r}")
    if top["documents"] not in ("whole", "pieces"):
        raise DataError(f"{where}: documents: expected 'whole' or 'pieces', got {top['documents']!r}")
    counts = _record(top["counts"], f"{where}: counts", dict.fromkeys(COUNTS, int))
    splits = {name: _split_info(name, split, f"{where}: splits.{name}") for name, split in top["splits"].items()}
    check_counts(where, counts, sum(split.samples for split in splits.values()))
    # last, since what was said above says more
    if _manifest_bytes(value) != written:
        raise DataError(f"{where}: changed: its own sha256 does not fit it; {_PREPARE_AGAIN}")
    return Manifest(**{**{key: item for key, item in top.items() if key != "sha256"}, "splits": splits})


def check_counts(where: str, counts: dict[str, int], samples: int) -> None:
    """Raise DataError unless found = samples + duplicates + near_duplicates + rejected: nothing vanishes unseen."""
    parts = {"samples": samples} | {key: counts[key] for key in ("duplicates", "near_duplicates", "rejected")}
    if counts["found"] != sum(parts.values()):
        listed = " + ".join(f"{number} {key}" for key, number in parts.items())
        raise DataError(f"{where}: counts: expected {counts['found']} found = {listed}; {_PREPARE_AGAIN}")


def dataset_hash(manifest: Manifest) -> str:
    """Sha256 (hex) over the splits: equal exactly when every file of every split is equal."""
    splits = {name: asdict(split) for name, split in manifest.splits.items()}
    return hashlib.sha256(json.dumps(splits, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_MANIFEST_KEYS: dict[str, type] = {
    "schema_version": int,
    "modality": str,
    "documents": str,
    "prep": dict,
    "sources": dict,
    "counts": dict,
    "splits": dict,
    "rejected_sha256": str,
    "sha256": str,
}
_SPLIT_KEYS: dict[str, type] = {"samples": int, "bytes": int, "shards": list}
_SHARD_KEYS: dict[str, type] = {
    "name": str,
    "samples": int,
    "bytes": int,
    "size_tar": int,
    "size_parquet": int,
    "sha256_tar": str,
    "sha256_parquet": str,
}


def _record(value: object, where: str, kinds: dict[str, type]) -> dict[str, Any]:
    """`value` if it is an object with exactly the keys and types of `kinds`; else DataError."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}; {_PREPARE_AGAIN}")
    if unknown := sorted(value.keys() - kinds.keys()):
        raise DataError(f"{where}: unknown key {unknown[0]!r}; {_PREPARE_AGAIN}")
    for key, kind in kinds.items():
        if key not in value:
            raise DataError(f"{where}: the key {key!r} is missing; {_PREPARE_AGAIN}")
        if type(value[key]) is not kind:
            got = type(value[key]).__name__
            raise DataError(f"{where}: {key}: expected {kind.__name__}, got {got}; {_PREPARE_AGAIN}")
    return value


def _split_info(name: str, value: object, where: str) -> SplitInfo:
    if not SPLIT_NAME.fullmatch(name):
        raise DataError(f"{where}: not a split's name; {_PREPARE_AGAIN}")
    split = _record(value, where, _SPLIT_KEYS)
    shards = tuple(ShardInfo(**_record(shard, f"{where}.shards", _SHARD_KEYS)) for shard in split["shards"])
    for number, shard in enumerate(shards):
        if shard.name != shard_name(name, number):
            raise DataError(f"{where}: expected shard {shard_name(name, number)}, got {shard.name!r}; {_PREPARE_AGAIN}")
    for key in ("samples", "bytes"):
        total = sum(getattr(shard, key) for shard in shards)
        if split[key] != total:
            raise DataError(f"{where}: {key}: expected {total} (sum over shards), got {split[key]}; {_PREPARE_AGAIN}")
    return SplitInfo(split["samples"], split["bytes"], shards)


# ---- files --------------------------------------------------------------------------------------------------------


def shard_name(split: str, number: int) -> str:
    """`train-000000`: the name of both files of a shard, less .tar and .parquet."""
    return f"{split}-{number:06d}"


@contextmanager
def whole_file(final: Path, tmp_dir: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name only when the block ends without an error, synced with its folder.

    `tmp_dir` (the file's own folder by default) must be on the same file system.
    """
    # random: machines that share a file system may give two processes the same number
    tmp = (tmp_dir or final.parent) / f".{final.name}.{os.urandom(6).hex()}.tmp"
    try:
        with open(tmp, "wb", buffering=_WRITE_BYTES) as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(tmp, final)
    except BaseException:
        with suppress(OSError):
            tmp.unlink()
        raise
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Sha256 (hex) of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_schema() -> pa.Schema:
    """The columns of a shard's parquet, one row per sample.

    key          name of the tar member less its extension; holds no dot
    offset       position of the sample's first byte in the tar
    bytes        length of the sample
    shape        [height, width, channels] of an image, [frames] of audio; null for text
    sample_rate  in Hz, of audio; null for text and images
    source       which of the sources given to mbtrain-prep the sample came from
    hash         sha256 (hex) of the sample's bytes
    """
    import pyarrow as pa

    fields = [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("modality", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("sample_rate", pa.int32()),
        ("source", pa.string()),
        ("hash", pa.string()),
    ]
    return pa.schema(fields)


def read_index(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read columns of a shard's parquet; `source` comes dictionary-encoded.

    Raises:
        DataError: the file is missing, damaged (its pages carry checksums) or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not by pq.read_table, which imports pyarrow.dataset and, where there is one, pandas: 0.25 s and 50 MB.
        dictionary = ["source"] if "source" in columns else None
        with pq.ParquetFile(path, read_dictionary=dictionary, page_checksum_verification=True) as file:
            # many indices are read at once; two kinds of threads would only get in each other's way
            return file.read(list(columns), use_threads=False).select(list(columns))
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: the index cannot be read ({reason}); {_PREPARE_AGAIN}") from None


# ---- a split, open for reading ------------------------------------------------------------------------------------


def check_files(folder: Path, info: SplitInfo, check: Literal["size", "full"] = "size") -> list[str]:
    """What is wrong with a split's files against the manifest: one line per bad file, an empty list if all is well."""

    def problem(path: Path, size: int, sha256: str) -> str | None:
        try:
            got = path.stat().st_size
            if got != size:
                return f"{path}: {'cut off' if got < size else 'too long'}: expected {size} bytes, got {got}"
            if check == "full" and (digest := file_sha256(path)) != sha256:
                return f"{path}: changed: expected sha256 {sha256}, got {digest}"
        except OSError as error:
            return f"{path}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}"
        return None

    checks: list[tuple[Path, int, str]] = []
    for shard in info.shards:
        checks.append((folder / f"{shard.name}.tar", shard.size_tar, shard.sha256_tar))
        checks.append((folder / f"{shard.name}.parquet", shard.size_parquet, shard.sha256_parquet))
    return [line for line in _in_threads(lambda item: problem(*item), checks) if line is not None]


def open_split(root: Path | str, split: str, check: Literal["size", "full"] = "size") -> Split:
    """Open one split of a data set for reading by sample number.

    Args:
        root: the folder that holds manifest.json.
        split: its name, such as `train`.
        check: "size" compares the size of every file with the manifest; "full" its sha256 as well (reads everything).

    Raises:
        DataError: no such split, or a file is missing, cut off, changed, or does not fit its manifest.
    """
    manifest = load_manifest(root)
    if split not in manifest.splits:
        names = ", ".join(manifest.splits)
        raise DataError(f"{root}: no split {split!r}; this data set has {names}")
    info, folder = manifest.splits[split], Path(root) / split
    if problems := check_files(folder, info, check):
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; {_PREPARE_AGAIN}")

    lengths = np.empty(info.samples, np.int64)
    offsets = np.empty(info.samples, np.int64)
    source_index = np.empty(info.samples, np.int32)
    image_sizes = np.empty((info.samples, 2), np.int32) if manifest.modality == "image" else None
    names_seen: dict[str, int] = {}
    row = 0
    for shard, table in zip(info.shards, _indices(folder, info.shards, manifest.modality), strict=True):
        path = folder / f"{shard.name}.parquet"
        rows = slice(row, row + shard.samples)
        lengths[rows] = _numbers(path, table["bytes"])
        offsets[rows] = _numbers(path, table["offset"])
        source = table["source"].combine_chunks()
        numbers = np.array([names_seen.setdefault(n, len(names_seen)) for n in source.dictionary.to_pylist()], np.int32)
        source_index[rows] = numbers[_numbers(path, source.indices)]
        if image_sizes is not None:
            image_sizes[rows] = _image_sizes(path, table)
        row += shard.samples
    return Split(manifest, split, folder, lengths, offsets, list(names_seen), source_index, image_sizes)


def _numbers(path: Path, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of whole numbers. Not by to_numpy, which imports pandas: 0.2 s and 40 MB.

    Raises:
        DataError: a number is missing, or it holds something else.
    """
    import pyarrow as pa

    try:
        return np.from_dlpack(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
    except pa.ArrowException as error:
        raise DataError(f"{path}: the index cannot be read ({error}); {_PREPARE_AGAIN}") from None


def _image_sizes(path: Path, table: pa.Table) -> np.ndarray:
    """Height and width of each image of an index, int32 [n, 2]."""
    values = _numbers(path, table["shape"].combine_chunks().flatten())
    shapes = values.reshape(-1, 3) if len(values) == 3 * len(table) else None
    fits = shapes is not None and (shapes[:, 2] == 3).all() and (shapes > 0).all()
    if shapes is None or not fits or (shapes.astype(np.int64).prod(axis=1) != _numbers(path, table["bytes"])).any():
        raise DataError(f"{path}: an image's shape does not fit its bytes; {_PREPARE_AGAIN}")
    return shapes[:, :2]


def _indices(folder: Path, shards: Sequence[ShardInfo], modality: str) -> Iterator[pa.Table]:
    """The shards' indices in their order, each checked against the manifest."""

    columns = ("offset", "bytes", "source", *(("shape",) if modality == "image" else ()))

    def index(shard: ShardInfo) -> pa.Table:
        path = folder / f"{shard.name}.parquet"
        table = read_index(path, columns)
        lengths, offsets = _numbers(path, table["bytes"]), _numbers(path, table["offset"])
        if len(lengths) != shard.samples or int(lengths.sum()) != shard.bytes:
            got = f"{len(lengths)} samples of {int(lengths.sum())} bytes"
            raise DataError(f"{path}: expected {shard.samples} samples of {shard.bytes} bytes, got {got}")
        if len(lengths) and (lengths.min() < 0 or offsets.min() < 0 or (offsets + lengths).max() > shard.size_tar):
            raise DataError(f"{path}: a sample lies outside its tar of {shard.size_tar} bytes; {_PREPARE_AGAIN}")
        return table

    return _in_threads(index, shards)


class Split:
    """One split, open for reading; made by `open_split`. Safe in threads, after a fork, and when pickled to a process.

    name, modality, documents   as in the manifest
    lengths                     int64 [n]: bytes of each sample, in the order of the shards
    source_names, source_index  names of the sources, and int32 [n]: which of them each sample came from
    """

    def __init__(
        self,
        manifest: Manifest,
        name: str,
        folder: Path,
        lengths: np.ndarray,
        offsets: np.ndarray,
        source_names: list[str],
        source_index: np.ndarray,
        image_sizes: np.ndarray | None = None,
    ) -> None:
        self.manifest = manifest
        self.name = name
        self.modality = manifest.modality
        self.documents = manifest.documents
        self.lengths = lengths
        self.source_names = source_names
        self.source_index = source_index
        self._folder = folder
        self._offsets = offsets
        self._image_sizes = image_sizes
        counts = [shard.samples for shard in manifest.splits[name].shards]
        self._first_rows = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._renew()

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start..stop (to its end by default) of sample i.

        Raises:
            IndexError: there is no such sample, or not 0 <= start <= stop <= lengths[i].
            DataError: the tar ends too early; it was cut off after it was opened.
        """
        number, _ = self._locate(i)
        length = int(self.lengths[i])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"bytes {start}..{stop} of sample {i}, which has {length}")
        descriptor = self._descriptor(number)
        position, end = int(self._offsets[i]) + start, int(self._offsets[i]) + stop
        path = self._shard_path(number, "tar")
        try:
            data = os.pread(descriptor.number, end - position, position)
            if len(data) == end - position:
                return data
            parts = [data]  # a single call reads 2 GiB at most, and may be interrupted
            while parts[-1]:
                position += len(parts[-1])
                parts.append(os.pread(descriptor.number, end - position, position))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror}; mend its disk or network, then resume"
            ) from None
        if position != end:
            raise DataError(f"{path}: cut off: sample {i} ends at byte {end}, the file at {position}; {_PREPARE_AGAIN}")
        return b"".join(parts)

    def read_many(self, samples: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> bytes:
        """Bytes starts..stops of each of these samples, end to end; int64 arrays, one row each.

        Made for many short reads: what `read` does for each is done here for all at once, all but the reading. A stop
        may lie one byte behind its sample, where a boundary goes: that byte means nothing.

        Raises:
            DataError: a tar cannot be read, or ends too early: it was cut off after it was opened.
        """
        numbers = (self._first_rows.searchsorted(samples, side="right") - 1).tolist()
        shards = set(numbers)
        if len(shards) > MAX_OPEN_SHARDS:  # in halves, so that no more of them are held open
            half = len(samples) // 2
            both = ((x[:half], x[half:]) for x in (samples, starts, stops))
            return b"".join(self.read_many(*part) for part in zip(*both, strict=True))
        held = {number: self._descriptor(number) for number in shards}
        descriptors = [held[number].number for number in numbers]
        positions, sizes = self._offsets[samples] + starts, stops - starts
        with suppress(OSError):
            data = b"".join(map(os.pread, descriptors, sizes.tolist(), positions.tolist()))
            if len(data) == sizes.sum():
                return data
        # `read` goes on where a call stopped early or failed, or says what is wrong
        rows = zip(samples.tolist(), starts.tolist(), np.minimum(stops, self.lengths[samples]).tolist(), strict=True)
        parts = [self.read(*row).ljust(size, b"\0") for row, size in zip(rows, sizes.tolist(), strict=True)]
        return b"".join(parts)

    def image_size(self, i: int) -> tuple[int, int]:
        """Height and width of image i, in pixels.

        Raises:
            DataError: these are no images.
        """
        if self._image_sizes is None:
            raise DataError(f"split {self.name!r}: holds {self.modality}, no images")
        height, width = self._image_sizes[i].tolist()
        return height, width

    def first_image_off(self, side: int) -> int | None:
        """The first image whose height or width, in pixels, is no multiple of `side`; None where all are."""
        sizes = self._image_sizes
        off = np.zeros(0, np.int64) if sizes is None else np.flatnonzero((sizes % side).any(axis=1))
        return int(off[0]) if len(off) else None

    def common_image_size(self) -> tuple[int, int] | None:
        """Height and width, in pixels, where all images have the same; else None."""
        sizes = self._image_sizes
        if sizes is None or not len(sizes) or (sizes != sizes[0]).any():
            return None
        return self.image_size(0)

    def key(self, i: int) -> str:
        """Key of sample i: the name of its tar member less the extension. Reads the index; meant for messages."""
        number, row = self._locate(i)
        return str(read_index(self._shard_path(number, "parquet"), ["key"])["key"][row].as_py())

    def close(self) -> None:
        """Close the shards' descriptors; reading opens them again."""
        with self._lock:
            self._open.clear()

    def _locate(self, i: int) -> tuple[int, int]:
        """Number of the shard of sample i, and its row there."""
        if not 0 <= i < len(self.lengths):
            raise IndexError(f"sample {i} of {len(self.lengths)} in split {self.name}")
        number = int(np.searchsorted(self._first_rows, i, side="right")) - 1
        return number, int(i) - int(self._first_rows[number])

    def _shard_path(self, number: int, extension: str) -> Path:
        return self._folder / f"{shard_name(self.name, number)}.{extension}"

    def _descriptor(self, number: int) -> _Descriptor:
        if os.getpid() != self._pid:
            self._renew()
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
            else:
                path = self._shard_path(number, "tar")
                try:
                    self._open[number] = _Descriptor(path)
                except OSError as error:
                    raise DataError(f"{path}: cannot be opened: {error.strerror}; {_PREPARE_AGAIN}") from None
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            return self._open[number]

    def _renew(self) -> None:
        # A fork may copy a lock that another thread held, so a child starts with a lock and descriptors of its own.
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_open", "_pid")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._renew()


class _Descriptor:
    """A file descriptor that closes with its last reference, so that no thread sees it closed while it reads."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`map` with threads, for work that waits for files; keeps the order and holds few results at a time."""
    if len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        waiting = iter(items)
        futures = [pool.submit(function, item) for item in islice(waiting, 4 * _OPEN_THREADS)]
        while futures:
            result = futures.pop(0).result()
            futures += [pool.submit(function, item) for item in islice(waiting, 1)]
            yield result
