"""Which files are read, in which order and under which label, and how they are opened."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mbtrain.errors import ConfigError, DataError

READ_BYTES = 1024**2
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_CONTAINERS = (".jsonl", ".ndjson", ".parquet", ".txt")

Count = Callable[[int], None]


class Unreadable(Exception):
    """A source file, or the rest of it, cannot be decoded; the message says why. It becomes a `Rejection`."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read. `label` names the SRC it came from; `name` is its path within that SRC; size in bytes."""

    path: str
    label: str
    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample's canonical bytes, in chunks, which may raise Unreadable and must be used before the next sample.

    where is its place in the file (`line 7`; empty for the whole); shape and sample_rate (Hz) are as in the index.
    """

    chunks: Iterator[bytes]
    where: str = ""
    shape: tuple[int, ...] | None = None
    sample_rate: int | None = None


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why something in a source file is no sample, and where in it (`line 7`; empty for the whole file).

    `bad` is False for what is sound but not wanted: empty, too short or too long.
    """

    where: str
    reason: str
    bad: bool = True


@dataclass(frozen=True)
class Modality:
    """A name of `mbtrain.shards.EXTENSIONS`, and the function from a source file to its samples.

    `samples(file, count)` yields in the file's order, is deterministic, calls `count` through `open_source`, may raise
    Unreadable, and can be pickled.
    """

    name: str
    samples: Callable[[SourceFile, Count], Iterator[Sample | Rejection]]


@dataclass(frozen=True)
class Found:
    """Files in source order, and how many things in the folders were passed over, by reason."""

    files: list[SourceFile]
    skipped: dict[str, int]


# ---- finding ------------------------------------------------------------------------------------------------------


def find_files(sources: Sequence[str], include: Sequence[str], exclude: Sequence[str], out: Path) -> Found:
    """All files of `sources`: those given by name, and those in folders, sorted by their relative path.

    Patterns hold for what is found in folders: `*.py` and `tests` match a name at any depth (`tests` in `exclude`
    leaves out whole folders), a pattern with a slash the path from SRC on, where `**` is any number of folders. Hidden
    names, links back to a folder on the way, and `out` itself are passed over.

    Raises:
        DataError: a source does not exist or is not a file or folder, or nothing is left.
    """
    wanted = _matcher(include) if include else lambda name: True
    unwanted = _matcher(exclude)
    files: list[SourceFile] = []
    skipped = {"hidden": 0, "not matching": 0, "excluded": 0, "link loops": 0, "not files": 0}
    own = _identity(out)

    def walk(folder: str, prefix: str, label: str, above: tuple[tuple[int, int] | None, ...]) -> None:
        try:
            names = os.listdir(folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read: {error.strerror}; mend it, or --exclude it") from None
        for name in names:
            path, relative = os.path.join(folder, name), prefix + name
            if name.startswith("."):
                skipped["hidden"] += 1
            elif unwanted(relative):
                skipped["excluded"] += 1
            elif os.path.isdir(path):
                identity = _identity(Path(path))
                if identity in above:
                    skipped["link loops"] += 1
                elif own is None or identity != own:
                    walk(path, f"{relative}/", label, (*above, identity))
            elif not os.path.isfile(path):  # a socket, a pipe, a link to nothing
                skipped["not files"] += 1
            elif not wanted(relative):
                skipped["not matching"] += 1
            else:
                files.append(_source_file(path, label, relative))

    for source, label in zip(sources, source_labels(sources), strict=True):
        start = len(files)
        if os.path.isdir(source):
            walk(source, "", label, (_identity(Path(source)),))
            files[start:] = sorted(files[start:], key=lambda file: os.fsencode(file.name))
        else:
            files.append(_source_file(source, label, os.path.basename(source)))
    skipped = {reason: count for reason, count in skipped.items() if count}
    if not files:
        passed = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "nothing"
        raise DataError(f"{' '.join(sources)}: no file to read (passed over: {passed}); check SRC and --glob")
    return Found(files, skipped)


def source_labels(sources: Sequence[str]) -> list[str]:
    """A distinct short label per source: `wiki` of data/wiki/, `books` of books.jsonl.zst, `wiki-2` of other/wiki."""
    labels: list[str] = []
    for source in sources:
        name = os.path.basename(os.path.abspath(source))
        if not os.path.isdir(source):
            for suffixes in (COMPRESSIONS, _CONTAINERS):
                name = next((name[: -len(end)] for end in suffixes if name.endswith(end) and name != end), name)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._") or "source"
        number = 1
        while (label := name if number == 1 else f"{name}-{number}") in labels:
            number += 1
        labels.append(label)
    return labels


def digest(files: Sequence[SourceFile]) -> str:
    """Sha256 (hex) over label, relative path and size of the files: the same on every machine."""
    total = hashlib.sha256()
    for file in files:
        total.update(os.fsencode(f"{file.label}\0{file.name}\0{file.size}\n"))
    return total.hexdigest()


def _source_file(path: str, label: str, name: str) -> SourceFile:
    try:
        info = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"{path}: expected a file or folder, got something else; save it as a file first")
    return SourceFile(os.path.abspath(path), label, name, info.st_size, info.st_mtime_ns)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a relative path matches one of the patterns; those without a slash match its last component."""
    named = [_regex(pattern) for pattern in patterns if "/" not in pattern]
    rooted = [_regex(pattern.removeprefix("./").strip("/")) for pattern in patterns if "/" in pattern]

    def matches(path: str) -> bool:
        name = path.rpartition("/")[2]
        return any(p.fullmatch(name) for p in named) or any(p.fullmatch(path) for p in rooted)

    return matches


def _regex(pattern: str) -> re.Pattern[str]:
    """The regular expression of a path pattern (PurePath.full_match does this, but only from Python 3.13 on)."""
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern)
    # the odd parts are the wildcards that the split captured
    literal = [re.escape(part) for part in parts[::2]]
    wildcards = [meanings.get(part) or part.replace("[!", "[^", 1) for part in parts[1::2]] + [""]
    try:
        return re.compile("".join(text for pair in zip(literal, wildcards, strict=True) for text in pair), re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"--glob, --exclude: expected a pattern such as '**/*.py', got {pattern!r} ({error})"
        ) from None


def check_unchanged(file: SourceFile) -> None:
    """Raise DataError if the file is not as it was when it was found."""
    try:
        info = os.stat(file.path)
    except OSError as error:
        raise DataError(f"{file.path}: gone since the start ({error.strerror}); start again with --overwrite") from None
    if (info.st_size, info.st_mtime_ns) != (file.size, file.mtime_ns):
        raise DataError(f"{file.path}: changed since the start; start again with --overwrite when it is complete")


# ---- opening ------------------------------------------------------------------------------------------------------


@contextmanager
def open_source(file: SourceFile, count: Count) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed by its suffix as they are read; `count` is told of bytes read from the disk.

    Raises:
        Unreadable: from this block too, where the file cannot be opened, read or decompressed.
    """
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
    suffix = os.path.splitext(file.path)[1].lower()
    if suffix == ".zst":
        import zstandard

        errors = (*errors, zstandard.ZstdError)
    try:
        with _Counted(file.path, count) as disk, io.BufferedReader(disk, READ_BYTES) as raw:
            if suffix not in COMPRESSIONS:
                yield raw
                return
            opener: dict[str, Callable[[Any], Any]] = {
                ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
                ".bz2": bz2.BZ2File,
                ".xz": lzma.LZMAFile,
                ".zst": lambda raw: io.BufferedReader(_Zstd(raw), READ_BYTES),
            }
            with opener[suffix](raw) as stream:
                yield stream
    except errors as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Unreadable(f"cannot be read: {' '.join(text.split()) or type(error).__name__}") from None


def read_chunks(file: SourceFile, count: Count) -> Iterator[bytes]:
    """The file's bytes, decompressed, a MiB at a time."""
    with open_source(file, count) as stream:
        while chunk := stream.read(READ_BYTES):
            yield chunk


class _Counted(io.FileIO):
    """A file that tells how many bytes were read from it, for progress."""

    def __init__(self, path: str, count: Count) -> None:
        super().__init__(path)
        self._count = count

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer)
        self._count(got)
        return got

    def readall(self) -> bytes:
        data = super().readall()
        self._count(len(data))
        return data


class _Zstd(io.RawIOBase):
    """Zstandard frames, one after the other. (The package's own reader takes a file that is cut off for its end.)"""

    def __init__(self, raw: io.BufferedReader) -> None:
        import zstandard

        self._raw = raw
        # 2^31: files made with `zstd --long=31` can be read too
        self._start = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame: Any = None
        self._rest = b""  # compressed, past the end of the last frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._raw.read1(128 * 1024)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._frame = self._frame or self._start()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
