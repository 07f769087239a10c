"""What a compressed file is on disk: 51 bytes that say how it was made, then the coder's words.

    offset  bytes   what                                                                       (integers little-endian)
    0       3       b"mbz"
    3       1       format version
    4       8       sha256 of the model's weights: its first bytes, as are those of all hashes here
    12      4       sha256 of the settings that decide what the model predicts
    16      4       step of the checkpoint, at most 2**32 - 1
    20      2       sha256 of what decides how floats are rounded: torch's version, processor, capabilities
    22      2       rows that advance together
    24      1       threads
    25      2, 2    height and width in pixels where rows are pictures; else 0, 0
    29      6       bytes of the original
    35      12      sha256 of the original
    47      4       CRC-32 of all other bytes of the file
    51      4 each  the words of the coder

The file is as small as that because its size is to prove a score: what stands here is within the 64 bytes allowed.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import astuple, dataclass

from mbtrain.errors import DataError

FORMAT = 1
MAX_BATCH = 1024
MAX_THREADS = 255
MAX_BYTES = 2**48 - 1
MAX_SIDE = 2**16 - 1
MAX_PICTURE_BYTES = 3 * 2**22  # an order of that many pixels takes 100 MB, and four times as much while it is made

_MAGIC = b"mbz"
_FIELDS = struct.Struct("<8s4sI2sHBHHIH12s")  # the length is a number of 4 and one of 2 bytes
_CRC = struct.Struct("<I")
_START = len(_MAGIC) + 1
HEADER_BYTES = _START + _FIELDS.size + _CRC.size
_WORD_BYTES = 4
# A byte costs at least -log2(1 - 257 / 2**24) bits, the other symbols having a step of the coder's each.
_BYTES_A_BIT = 50_000


@dataclass(frozen=True)
class Header:
    """How a file was made; see the module. Hashes are the first bytes of a sha256."""

    weights: bytes
    settings: bytes
    step: int
    rounding: bytes
    batch: int
    threads: int
    height: int
    width: int
    length: int
    digest: bytes

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width in pixels where rows are pictures."""
        return (self.height, self.width) if self.height else None


# Bytes of the hashes, as they are written.
WEIGHTS_HASH, SETTINGS_HASH, ROUNDING_HASH, CONTENT_HASH = 8, 4, 2, 12


def pack(header: Header, words: bytes) -> bytes:
    """The whole file. `words` are the coder's, 4 bytes each."""
    *fields, length, digest = astuple(header)
    start = _MAGIC + bytes([FORMAT]) + _FIELDS.pack(*fields, length & 0xFFFFFFFF, length >> 32, digest)
    return start + _CRC.pack(zlib.crc32(words, zlib.crc32(start))) + words


def unpack(content: bytes, name: str) -> tuple[Header, bytes]:
    """Header and words of a whole file; `name` stands in errors.

    What is returned is within the bounds of this module, whoever wrote the file; nothing else is believed of it.

    Raises:
        DataError: no such file, another version, cut off, changed, or out of bounds.
    """
    if content[: len(_MAGIC)] != _MAGIC:
        raise DataError(f"{name}: begins with {content[:4]!r}, expected 'mbz': a file that `mbtrain compress` wrote")
    if len(content) > len(_MAGIC) and content[len(_MAGIC)] != FORMAT:
        raise DataError(f"{name}: format {content[len(_MAGIC)]}, this version reads {FORMAT}")
    if len(content) < HEADER_BYTES:
        raise DataError(f"{name}: got {len(content)} bytes, expected at least {HEADER_BYTES}: it is cut off")
    start, words = content[: HEADER_BYTES - _CRC.size], content[HEADER_BYTES:]
    (crc,) = _CRC.unpack_from(content, len(start))
    if zlib.crc32(words, zlib.crc32(start)) != crc or len(words) % _WORD_BYTES:
        raise DataError(f"{name}: its content is not what was written (checksum differs): it is cut off or changed")
    fields = list(_FIELDS.unpack_from(start, _START))
    fields[-3:] = [fields[-3] | fields[-2] << 32, fields[-1]]  # the length's two numbers
    header = Header(*fields)
    problem = _out_of_bounds(header, 8 * len(words))
    if problem:
        raise DataError(f"{name}: {problem}: nothing that `mbtrain compress` writes")
    return header, words


def _out_of_bounds(header: Header, bits: int) -> str:
    """What of a header cannot be beside words of so many bits, or ''."""
    if not 1 <= header.batch <= MAX_BATCH:
        return f"rows together: got {header.batch}, expected 1 to {MAX_BATCH}"
    if header.threads < 1:
        return "threads: got 0, expected at least 1"
    picture = 3 * header.height * header.width
    if bool(header.height) != bool(header.width) or picture > MAX_PICTURE_BYTES:
        return f"picture: got {header.height}x{header.width} pixels, expected at most {MAX_PICTURE_BYTES} bytes"
    if picture and header.length % picture:
        return f"length: got {header.length}, expected a multiple of a picture's {picture} bytes"
    if header.length > (bits + 64) * _BYTES_A_BIT:
        return f"length: got {header.length}, expected at most what {bits} bits can hold"
    return ""
