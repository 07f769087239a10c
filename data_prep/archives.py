"""The members of tar and zip archives, in their order, read where they are: nothing is written under a member's name.

Tars are read in one pass, by a reader of our own: Python's takes a damaged header in the middle for the archive's end,
takes one that is cut off between two members for whole, and trusts sizes in headers; here each of these is told.
"""

from __future__ import annotations

import io
import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from data_prep.reading import seekable
from data_prep.sources import READ_BYTES, PassedOver, Rejection, Unreadable
from data_prep.wording import printable, reason_of

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_LONGEST_HEADER_BYTES = 16 * 1024**2
_MOST_SEGMENTS = 2**20
_BOMB_BYTES, _BOMB_RATIO = 1024**3, 1000
_CUT_OFF = "cannot be read: the archive is cut off"


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive: its path there, `where` (that, to be shown), and its size in bytes.

    content is all of it, or if that is long, a stream, which is used before the next member is asked for.
    """

    path: str
    where: str
    size: int
    content: bytes | IO[bytes]


def read_tar(stream: IO[bytes]) -> Iterator[Member | Rejection | PassedOver]:
    """The members of a tar (v7, ustar, pax, GNU; sparse files too); several tars one after the other are one.

    Where a member's stream ends in Unreadable since the archive does, this iterator ends too.

    Raises:
        Unreadable: the rest of the archive is damaged or cut off; says after which member.
    """
    place = ""
    try:
        for header in _headers(stream):
            where = printable(header.path)
            place = f"in {where}: "
            part = _Part(stream, header.stored)
            reason = _why_no_file(header)
            if reason:
                yield PassedOver(where, reason)
            elif leads_out(header.path):
                yield Rejection(where, "its name leads out of the archive; pack it again under a relative name")
            elif header.kind == b"M":
                yield Rejection(where, "the rest of a file in another volume; join the volumes first")
            else:
                try:
                    content, size = _content(header, part)
                except ValueError as error:
                    yield Rejection(where, str(error))
                else:
                    yield Member(header.path, where, size, content)
            if part.is_broken:  # whoever read it was told
                return
            part.skip()
            place = f"after {where}: "
            _exactly(stream, -header.stored % _BLOCK)
    except Unreadable as error:
        raise Unreadable(f"{place}{error}") from None


def leads_out(path: str) -> bool:
    """Whether a member's name would be a place outside a folder that it is unpacked in, or is no name at all."""
    return path.startswith(("/", "\\")) or "\0" in path or ".." in path.replace("\\", "/").split("/")


# ---- tar ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Header:
    """A member's header: `stored` bytes follow; `kind` is its type flag, `block` the header's own 512 bytes."""

    path: str
    kind: bytes
    stored: int
    block: bytes
    pax: dict[str, str]
    sparse_pairs: tuple[str, ...]
    extended: tuple[bytes, ...]


def _headers(stream: IO[bytes]) -> Iterator[_Header]:
    """Headers of members, with what stands before them in headers of headers; their content is the caller's to read."""
    ended = False
    everywhere: dict[str, str] = {}
    pax: dict[str, str] | None = None
    sparse_pairs: tuple[str, ...] = ()
    long_path: bytes | None = None
    while True:
        block = stream.read(_BLOCK)
        if block == _ZEROS:
            if pax is not None or long_path is not None:
                raise Unreadable(_CUT_OFF)
            ended = True
            continue
        if len(block) < _BLOCK:
            if not ended:
                raise Unreadable(f"{_CUT_OFF}: it has no end mark")
            if any(block):
                raise Unreadable("cannot be read: something other than a tar follows its end mark")
            return
        kind, size = _parse(block)
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            if size > _LONGEST_HEADER_BYTES:
                raise Unreadable(f"cannot be read: a header of {size} bytes")
            data = _exactly(stream, size)
            _exactly(stream, -size % _BLOCK)
            if kind == b"L":
                long_path = data.partition(b"\0")[0]
            elif kind == b"g":
                everywhere |= _parse_pax(data)[0]
            elif kind != b"K":
                pax, sparse_pairs = _parse_pax(data)
            ended = False
            continue
        extended = []
        more = kind == b"S" and block[482] != 0
        while more:
            extended.append(_exactly(stream, _BLOCK))
            more = extended[-1][504] != 0
            if len(extended) > _MOST_SEGMENTS // 21:
                raise Unreadable("cannot be read: a sparse file in too many segments")
        known = {**everywhere, **(pax or {})}
        name = _text(long_path) if long_path is not None else _short_path(block)
        if "size" in known and kind not in _WITHOUT_CONTENT:
            size = _decimal(known["size"])
        path = known.get("GNU.sparse.name") or known.get("path") or name
        yield _Header(path, kind, size, block, known, sparse_pairs, tuple(extended))
        ended, pax, sparse_pairs, long_path = False, None, (), None


_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")


def _why_no_file(header: _Header) -> str:
    if header.kind in (b"1", b"2"):
        return "a link"
    if header.kind in (b"5", b"D") or (header.kind == b"\0" and header.path.endswith("/")):
        return "a folder"
    return "not a file" if header.kind in (b"3", b"4", b"6", b"N", b"V") else ""


def _parse(block: bytes) -> tuple[bytes, int]:
    """Type and size of a header, if its checksum is right."""
    try:
        expected = _number(block[148:156])
        size = _number(block[124:136])
    except ValueError:
        raise Unreadable("cannot be read: damaged, or not a tar") from None
    summed = block[:148] + b" " * 8 + block[156:]
    # some old tars sum bytes with a sign
    if sum(summed) != expected and sum(byte - 256 * (byte > 127) for byte in summed) != expected:
        raise Unreadable("cannot be read: damaged, or not a tar")
    kind = block[156:157]
    return kind, 0 if kind in _WITHOUT_CONTENT else size


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or (for what is too large for them) binary after a first byte of 128."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("no number")
    return int(digits or b"0", 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Unreadable("cannot be read: a damaged header")
    return int(text)


def _short_path(block: bytes) -> str:
    path = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + path if prefix else path)


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _parse_pax(data: bytes) -> tuple[dict[str, str], tuple[str, ...]]:
    """The records `LENGTH KEY=VALUE` of a pax header; and the values of GNU.sparse.offset and numbytes, in order."""
    records: dict[str, str] = {}
    pairs = []
    position = 0
    while position < len(data) and data[position]:
        length, space, _ = data[position : position + 20].partition(b" ")
        end = position + int(length) if length.isdigit() else 0
        key, equals, value = data[position + len(length) + 1 : max(end - 1, 0)].partition(b"=")
        if not space or not equals or end > len(data) or data[end - 1 : end] != b"\n":
            raise Unreadable("cannot be read: a damaged header")
        records[_text(key)] = _text(value)
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            pairs.append(_text(value))
        position = end
    return records, tuple(pairs)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise Unreadable(_CUT_OFF)
    return data


def _content(header: _Header, part: _Part) -> tuple[bytes | IO[bytes], int]:
    """A member's content and size; ValueError if its map of segments is damaged or a bomb."""
    sparse = _segments(header, part)
    raw: io.RawIOBase = part
    size = header.stored
    if sparse is not None:
        segments, size = sparse
        end = 0
        for offset, length in segments:
            if offset < end:
                raise ValueError("a sparse file whose map is damaged")
            end = offset + length
        if end > size or sum(length for _, length in segments) != part.left:
            raise ValueError("a sparse file whose map is damaged")
        if _is_bomb(size, header.stored):
            raise ValueError(f"a bomb: {size} bytes in {header.stored}; leave it out")
        raw = _Sparse(part, segments, size)
    if sparse is None and size <= READ_BYTES:
        return part.read_all(), size
    stream = io.BufferedReader(raw, READ_BYTES)
    return (stream if size > READ_BYTES else stream.read()), size


def _segments(header: _Header, part: _Part) -> tuple[list[tuple[int, int]], int] | None:
    """Where a sparse file is not zero, as (offset, bytes) in its order, and its size; None for every other file.

    Raises:
        ValueError: something in it is no number.
    """
    pax = header.pax
    if header.kind == b"S":
        fields = [header.block[386:482], *(block[:504] for block in header.extended)]
        entries = [block[i : i + 24] for block in fields for i in range(0, len(block), 24)]
        pairs = [(_number(entry[:12]), _number(entry[12:])) for entry in entries if any(entry)]
        return pairs, _number(header.block[483:495])
    if pax.get("GNU.sparse.major") == "1":  # the map stands before the content, in whole blocks
        numbers = _map_numbers(part)
        count = next(numbers)
        if count > _MOST_SEGMENTS:
            raise ValueError("a sparse file in too many segments")
        flat = [next(numbers) for _ in range(2 * count)]
        size = _plain_number(pax.get("GNU.sparse.realsize", ""))
    elif "GNU.sparse.map" in pax:
        flat = [_plain_number(text) for text in pax["GNU.sparse.map"].split(",") if text]
        size = _plain_number(pax.get("GNU.sparse.size", ""))
    elif "GNU.sparse.size" in pax:
        flat = [_plain_number(text) for text in header.sparse_pairs]
        size = _plain_number(pax["GNU.sparse.size"])
    else:
        return None
    return list(zip(flat[::2], flat[1::2], strict=True)), size


def _map_numbers(part: _Part) -> Iterator[int]:
    """Decimal numbers, a line each, over blocks of which no more are read than are asked for."""
    line = b""
    while True:
        block = part.read_block()
        *lines, line = (line + block).split(b"\n")
        yield from (_plain_number(text.decode("latin-1")) for text in lines)
        if len(line) > 20:
            raise ValueError("a sparse file whose map is damaged")


def _plain_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError("a sparse file whose map is damaged")
    return int(text)


class _Part(io.RawIOBase):
    """The next `left` bytes of a stream."""

    def __init__(self, stream: IO[bytes], left: int) -> None:
        self._stream = stream
        self.left = left
        self.is_broken = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._take(min(len(buffer), self.left))
        buffer[: len(data)] = data
        return len(data)

    def read_all(self) -> bytes:
        """All that is left, which should not be much."""
        return self._take(self.left)

    def read_block(self) -> bytes:
        """A block of 512 bytes; ValueError if there is none left."""
        if self.left < _BLOCK:
            raise ValueError("a sparse file whose map is damaged")
        return self._take(_BLOCK)

    def skip(self) -> None:
        """Read what is left and forget it."""
        while self.left:
            self._take(min(self.left, READ_BYTES))

    def _take(self, size: int) -> bytes:
        try:
            data = _exactly(self._stream, size)
        except Unreadable:
            self.is_broken = True
            raise
        self.left -= size
        return data


class _Sparse(io.RawIOBase):
    """A sparse file's content: its segments, one after the other in `part`, and zeros between them."""

    def __init__(self, part: _Part, segments: Sequence[tuple[int, int]], size: int) -> None:
        self._part = part
        self._size = size
        self._segments = iter([*segments, (size, 0)])
        self._start = self._stop = self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._position == self._stop < self._size:
            self._start, length = next(self._segments)
            self._stop = self._start + length
        if self._position < self._start:
            size = min(len(buffer), self._start - self._position)
            buffer[:size] = bytes(size)
        else:
            size = self._part.readinto(memoryview(buffer)[: self._stop - self._position])
        self._position += size
        return size


# ---- zip ----------------------------------------------------------------------------------------------------------

_ZIP_ERRORS: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    RuntimeError,  # NotImplementedError, of a method of compression, is one
    ValueError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
)
_ZIP_STARTS = (b"PK\3\4", b"PK\5\6", b"PK\7\x08", b"PK00")
_ENCRYPTED = 1


def read_zip(stream: IO[bytes]) -> Iterator[Member | Rejection | PassedOver]:
    """The members of a zip, in the order of its directory; a member that is damaged is rejected, the rest is read.

    Raises:
        Unreadable: it is no whole zip, or in all a bomb: more than 1 GiB, and 1000 times as long as the archive.
    """
    source = seekable(stream)
    try:
        start = source.read(4)
        archive = zipfile.ZipFile(source)
        archive_bytes = source.seek(0, io.SEEK_END)
    except _ZIP_ERRORS as error:
        raise Unreadable(f"cannot be read: not a whole zip ({reason_of(error)})") from None
    with archive:
        found = archive.infolist()
        first = min((info.header_offset for info in found), default=0)
        # an archive that is cut off can end with a whole one that it holds, which must not be taken for it
        if start not in _ZIP_STARTS or first > 4 or (not found and start != b"PK\5\6"):
            raise Unreadable("cannot be read: not a whole zip (it begins with something else)")
        total = 0
        for info in found:
            where = printable(info.orig_filename)
            if info.is_dir():
                yield PassedOver(where, "a folder")
            elif stat.S_ISLNK(info.external_attr >> 16):
                yield PassedOver(where, "a link")
            elif leads_out(info.orig_filename):
                yield Rejection(where, "its name leads out of the archive; pack it again under a relative name")
            elif info.flag_bits & _ENCRYPTED:
                yield Rejection(where, "encrypted; unpack it first")
            elif _is_bomb(info.file_size, info.compress_size):
                yield Rejection(where, f"a bomb: {info.file_size} bytes in {info.compress_size}; leave it out")
            elif _is_bomb(total + info.file_size, archive_bytes):
                raise Unreadable(f"from {where} on: a bomb: more than {total} bytes in {archive_bytes}; leave it out")
            else:
                total += info.file_size
                try:
                    content = _zip_content(archive, info)
                except Unreadable as error:
                    yield Rejection(where, str(error))
                else:
                    yield Member(info.filename, where, info.file_size, content)


def _zip_content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes | IO[bytes]:
    part = _ZipPart(archive, info)
    return part.readall() if info.file_size <= READ_BYTES else io.BufferedReader(part, READ_BYTES)


def _is_bomb(size: int, packed: int) -> bool:
    return size > _BOMB_BYTES and size > _BOMB_RATIO * packed


class _ZipPart(io.RawIOBase):
    """A member's content; Unreadable unless it has the size and checksum of the directory."""

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self._left = info.file_size
        try:
            self._stream = archive.open(info)
        except _ZIP_ERRORS as error:
            raise Unreadable(f"cannot be read: {reason_of(error)}") from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except _ZIP_ERRORS as error:
            raise Unreadable(f"cannot be read: {reason_of(error)}") from None
        if not data and self._left and len(buffer):
            raise Unreadable("cannot be read: shorter than the archive says")
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
