"""Which files are read, in which order and under which label; and the types that pass from reader to stage."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.remote import RemoteFile, find_remote, is_remote, local_path, shown, stat_remote
from mbtrain.errors import ConfigError, DataError

READ_BYTES = 1024**2
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
JSON_LINES = (".jsonl", ".ndjson")
ARCHIVES = (".tar", ".zip")
# Suffixes for two in one, as they are commonly written.
TAR_SHORTS = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}

Count = Callable[[int], None]


class Unreadable(Exception):
    """A source file, or the rest of it, cannot be decoded; the message says why. It becomes a `Rejection`."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read.

    path     on the local disk, or a URL
    label    names the SRC it came from
    name     its path within that SRC
    size     in bytes; of a remote file that tells none: 0
    mtime_ns time of the last change; of a remote file that tells none: 0
    version  of a remote file: whatever tells one content from another (see `RemoteFile`)
    """

    path: str
    label: str
    name: str
    size: int
    mtime_ns: int
    version: str = ""

    @property
    def is_remote(self) -> bool:
        """Whether `path` is a URL; a local one is absolute and normal, so it never has two slashes in a row."""
        return "://" in self.path


@dataclass(frozen=True, slots=True)
class Item:
    """A piece of a source file before decoding: the file itself, a member of an archive, the value of a record.

    name    the innermost file name less its compression's suffix (`b.png` of x.tar: a/b.png.gz); empty for a value
    where   its place in the source file: empty for the whole, `a/b.png`, `line 7`, `row 12`, `a/b.jsonl: line 7`
    chunks  its content, decompressed; to be used before the next item is asked for, wholly or not; may raise Unreadable
    size    bytes of its content, if known without reading
    plain   its content is the source file's own bytes on a local disk, unchanged, so it need not be copied
    """

    name: str
    where: str
    chunks: Iterator[bytes]
    size: int | None = None
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample's canonical bytes, in chunks, which may raise Unreadable and must be used before the next sample.

    where is its place in the file (`line 7`; empty for the whole); shape and sample_rate (Hz) are as in the index;
    plain is as in Item: the sample is the source file, byte for byte.
    """

    chunks: Iterator[bytes]
    where: str = ""
    shape: tuple[int, ...] | None = None
    sample_rate: int | None = None
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why something in a source file is no sample, and where in it (`line 7`; empty for the whole file).

    `bad` is False for what is sound but not wanted: empty, too short or too long.
    """

    where: str
    reason: str
    bad: bool = True


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Something in a source file that was not asked for: a folder, a link, a member of another modality. Counted."""

    where: str
    reason: str


@dataclass(frozen=True)
class Modality:
    """What a source file's items become.

    name      of `mbtrain.shards.EXTENSIONS`
    decode    from an item to its samples, in its order; deterministic, can be pickled, may raise Unreadable
    column    the field of the content in records; nested: `a.b`
    suffixes  of the files of this modality in folders and archives, such as (".png", ".jpg"); None: any
    options   what stands for this modality in the manifest's `prep`
    """

    name: str
    decode: Callable[[Item], Iterator[Sample | Rejection]]
    column: str = "text"
    suffixes: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        """Whether a file of this name in a folder or archive is of this modality; `x.png.gz` is as `x.png`."""
        return self.suffixes is None or uncompressed(name.lower()).endswith(self.suffixes)


@dataclass(frozen=True)
class Found:
    """Files in source order, and how many things in the folders were passed over, by reason."""

    files: list[SourceFile]
    skipped: dict[str, int]


def uncompressed(name: str) -> str:
    """A file's name less its compression's suffix: `x.png` of `x.png.gz` and of `x.png`, `x.tar` of `x.tgz`."""
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in TAR_SHORTS:
        return f"{stem}.tar"
    return stem if suffix.lower() in COMPRESSIONS else name


def container(name: str) -> str:
    """`.tar`, `.zip`, `.parquet` or `.jsonl`, if a file of this name holds others or records; else empty."""
    suffix = os.path.splitext(uncompressed(name))[1].lower()
    if suffix in JSON_LINES:
        return JSON_LINES[0]
    return suffix if suffix in (*ARCHIVES, ".parquet") else ""


# ---- finding ------------------------------------------------------------------------------------------------------


def find_files(
    sources: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    out: Path,
    modality: Modality | None = None,
) -> Found:
    """All files of `sources`: those given by name, and those in folders, sorted by their relative path.

    Patterns hold for what is found in folders: `*.py` and `tests` match a name at any depth (`tests` in `exclude`
    leaves out whole folders), a pattern with a slash the path from SRC on, where `**` is any number of folders. Hidden
    names, links back to a folder on the way, and `out` itself are passed over; so is what is not of the modality by its
    suffix, and holds no other files or records, unless patterns say what to include.

    Raises:
        DataError: a source does not exist or is not a file or folder, or nothing is left, or the network failed.
    """
    skipped: dict[str, int] = {}
    files: list[SourceFile] = []
    unwanted = _matcher(exclude)
    own = _identity(out)

    def skip(reason: str) -> None:
        skipped[reason] = skipped.get(reason, 0) + 1

    if include:
        matches = _matcher(include)
        why_not = "not matching"
    else:
        matches = lambda name: modality is None or bool(container(name)) or modality.wants(name)  # noqa: E731
        why_not = f"not {modality.name} files" if modality else ""

    def walk(folder: str, prefix: str, label: str, above: tuple[tuple[int, int] | None, ...]) -> None:
        try:
            names = os.listdir(folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read: {error.strerror}; mend it, or --exclude it") from None
        for name in names:
            path, relative = os.path.join(folder, name), prefix + name
            if name.startswith("."):
                skip("hidden")
            elif unwanted(relative):
                skip("excluded")
            elif os.path.isdir(path):
                identity = _identity(Path(path))
                if identity in above:
                    skip("link loops")
                elif own is None or identity != own:
                    walk(path, f"{relative}/", label, (*above, identity))
            elif not os.path.isfile(path):  # a socket, a pipe, a link to nothing
                skip("not files")
            elif not matches(relative):
                skip(why_not)
            else:
                files.append(_source_file(path, label, relative))

    def choose(remote: RemoteFile, label: str) -> None:
        """Keep a file of a remote folder, or not, as `walk` does."""
        parts = remote.name.split("/")
        if any(part.startswith(".") for part in parts):
            skip("hidden")
        elif any(unwanted("/".join(parts[:depth])) for depth in range(1, len(parts) + 1)):
            skip("excluded")
        elif not matches(remote.name):
            skip(why_not)
        else:
            files.append(_remote_source(remote, label))

    for source, label in zip(sources, source_labels(sources), strict=True):
        start = len(files)
        if is_remote(source):
            is_folder, found = find_remote(source)
            for remote in found:
                if is_folder:
                    choose(remote, label)
                else:
                    files.append(_remote_source(remote, label))
        elif os.path.isdir(path := local_path(source)):
            walk(path, "", label, (_identity(Path(path)),))
        else:
            files.append(_source_file(path, label, os.path.basename(path)))
        files[start:] = sorted(files[start:], key=lambda file: os.fsencode(file.name))
    if not files:
        passed = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "nothing"
        shown_sources = " ".join(shown(source) for source in sources)
        raise DataError(f"{shown_sources}: no file to read (passed over: {passed}); check SRC and --glob")
    return Found(files, skipped)


def source_labels(sources: Sequence[str]) -> list[str]:
    """A distinct short label per source: `wiki` of data/wiki/, `books` of books.jsonl.zst, `wiki-2` of other/wiki."""
    labels: list[str] = []
    for source in sources:
        path = shown(source) if is_remote(source) else local_path(source)
        name = os.path.basename(os.path.abspath(path))
        if not os.path.isdir(path):
            for suffixes in (COMPRESSIONS, (*TAR_SHORTS, *ARCHIVES, *JSON_LINES, ".parquet", ".txt")):
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


def _remote_source(file: RemoteFile, label: str) -> SourceFile:
    return SourceFile(file.url, label, file.name, file.size, file.mtime_ns, file.version)


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
    if file.is_remote:
        now = stat_remote(file.path)
        # a listing may know another mark of the content than the file itself; such two cannot be compared
        same_mark = now.version.partition("=")[0] == file.version.partition("=")[0]
        if now.size != file.size or (same_mark and now.version != file.version):
            raise DataError(f"{shown(file.path)}: changed since the start; start again with --overwrite")
        return
    try:
        info = os.stat(file.path)
    except OSError as error:
        raise DataError(f"{file.path}: gone since the start ({error.strerror}); start again with --overwrite") from None
    if (info.st_size, info.st_mtime_ns) != (file.size, file.mtime_ns):
        raise DataError(f"{file.path}: changed since the start; start again with --overwrite when it is complete")
