"""The bytes of a source file: from the disk or the network, decompressed by its suffix, as streams.

These streams raise Unreadable for what cannot be read or decompressed, and DataError where the network fails.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from data_prep.remote import open_remote
from data_prep.sources import COMPRESSIONS, READ_BYTES, TAR_SHORTS, Count, SourceFile, Unreadable
from data_prep.wording import reason_of

_SPOOL_MEMORY_BYTES = 64 * 1024**2
_SPOOL_LIMIT_BYTES = 8 * 1024**3


def open_source(file: SourceFile, count: Count) -> IO[bytes]:
    """The file's bytes, decompressed; `count` is told of those read from the disk or the network.

    Raises:
        Unreadable: (by reading too) it cannot be opened, read or decompressed.
        DataError: (by reading too) the network failed.
    """
    raw: io.RawIOBase
    if file.is_remote:
        raw = open_remote(file.path, file.size, count)
    else:
        try:
            raw = _Counted(file.path, count)
        except OSError as error:
            raise _unreadable(error) from None
    return decompressed(io.BufferedReader(raw, READ_BYTES), file.name)


def decompressed(stream: IO[bytes], name: str) -> IO[bytes]:
    """A stream's content as the suffix of `name` tells; the stream itself if that is of no compression.

    Whoever closes the result closes the stream.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in TAR_SHORTS:
        suffix = os.path.splitext(TAR_SHORTS[suffix])[1]
    return io.BufferedReader(_Decompressed(stream, suffix), READ_BYTES) if suffix in COMPRESSIONS else stream


def read_chunks(file: SourceFile, count: Count) -> Iterator[bytes]:
    """The file's bytes, decompressed, up to a MiB at a time; raises as `open_source` does."""
    with open_source(file, count) as stream:
        yield from chunks(stream)


def chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """What is left of a stream, up to a MiB at a time."""
    while chunk := stream.read(READ_BYTES):
        yield chunk


def seekable(stream: IO[bytes]) -> IO[bytes]:
    """A stream that can be read at any place: itself, or a copy in memory or (where long) in a temporary file.

    Raises:
        Unreadable: it is longer than is copied, or cannot be read.
    """
    if stream.seekable():
        return stream
    copy = tempfile.SpooledTemporaryFile(_SPOOL_MEMORY_BYTES)  # noqa: SIM115 (it ends with whoever reads it)
    for chunk in chunks(stream):
        copy.write(chunk)
        if copy.tell() > _SPOOL_LIMIT_BYTES:
            copy.close()
            raise Unreadable(f"cannot be read: longer than {_SPOOL_LIMIT_BYTES} bytes when unpacked; unpack it first")
    copy.seek(0)
    return copy  # type: ignore[return-value]


def _unreadable(error: Exception) -> Unreadable:
    return Unreadable(f"cannot be read: {reason_of(error)}")


class _Counted(io.FileIO):
    """A file that tells how many bytes were read from it, for progress."""

    def __init__(self, path: str, count: Count) -> None:
        super().__init__(path)
        self._count = count

    def readinto(self, buffer: Any) -> int:
        try:
            got = super().readinto(buffer)
        except OSError as error:
            raise _unreadable(error) from None
        self._count(got)
        return got

    def readall(self) -> bytes:
        try:
            data = super().readall()
        except OSError as error:
            raise _unreadable(error) from None
        self._count(len(data))
        return data


class _Decompressed(io.RawIOBase):
    """A compressed stream's content."""

    def __init__(self, raw: IO[bytes], suffix: str) -> None:
        opener: dict[str, Callable[[Any], Any]] = {
            ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
            ".bz2": bz2.BZ2File,
            ".xz": lzma.LZMAFile,
            ".zst": lambda raw: io.BufferedReader(_Zstd(raw), READ_BYTES),
        }
        self._errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
        if suffix == ".zst":
            import zstandard

            self._errors = (*self._errors, zstandard.ZstdError)
        self._raw = raw
        self._stream = opener[suffix](raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            # once: what came before a damage is to be given before it is told
            return self._stream.readinto1(buffer)
        except self._errors as error:
            raise _unreadable(error) from None

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._raw.close()
        super().close()


class _Zstd(io.RawIOBase):
    """Zstandard frames, one after the other. (The package's own reader takes a file that is cut off for its end.)"""

    def __init__(self, raw: IO[bytes]) -> None:
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
            data = self._rest or self._raw.read(128 * 1024)
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
