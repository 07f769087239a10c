"""A compressed file's header: what was written is read back; what nobody wrote is refused in one line.

pytest tests/test_mbz.py
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbtrain import mbz
from mbtrain.errors import DataError
from mbtrain.mbz import Header

PLAIN = Header(b"w" * 8, b"s" * 4, 7, b"rr", 32, 1, 0, 0, 1000, b"d" * 12)
PICTURES = replace(PLAIN, height=4, width=6, length=5 * 72)
WORDS = b"\1\2\3\4" * 90

HEADERS = st.builds(
    Header,
    weights=st.binary(min_size=8, max_size=8),
    settings=st.binary(min_size=4, max_size=4),
    step=st.integers(0, 2**32 - 1),
    rounding=st.binary(min_size=2, max_size=2),
    batch=st.integers(1, mbz.MAX_BATCH),
    threads=st.integers(1, mbz.MAX_THREADS),
    height=st.just(0),
    width=st.just(0),
    length=st.integers(0, 10**8),
    digest=st.binary(min_size=12, max_size=12),
)


@given(HEADERS, st.integers(100, 200).map(lambda n: b"abcd" * n))
def test_what_was_written_is_read_back(header: Header, words: bytes) -> None:
    packed = mbz.pack(header, words)
    assert len(packed) == mbz.HEADER_BYTES + len(words)
    assert mbz.unpack(packed, "x") == (header, words)


def test_the_header_and_the_coders_last_word_leave_room_in_64_bytes() -> None:
    assert mbz.HEADER_BYTES == 51
    assert len(mbz.pack(replace(PLAIN, length=0), b"")) == 51
    assert mbz.unpack(mbz.pack(PICTURES, WORDS), "x")[0].shape == (4, 6)
    assert PLAIN.shape is None


@given(st.data())
def test_every_cut_and_every_changed_byte_is_told(data: st.DataObject) -> None:
    packed = mbz.pack(PLAIN, WORDS)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(DataError, match=r"^x\.mbz: "):
        mbz.unpack(packed[:cut], "x.mbz")
    changed = bytearray(packed)
    changed[cut] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DataError, match=r"^x\.mbz: "):
        mbz.unpack(bytes(changed), "x.mbz")
    with pytest.raises(DataError, match="cut off or changed"):
        mbz.unpack(packed + b"more", "x.mbz")


@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_of_one_kind(content: bytes) -> None:
    for packed in (content, b"mbz\1" + content):
        with pytest.raises(DataError):
            mbz.unpack(packed, "x.mbz")


def crafted(**fields: int) -> bytes:
    """A file with a right checksum whose header says what pack would not be told."""
    return mbz.pack(replace(PICTURES, **fields), WORDS)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (crafted(batch=0), "rows together: got 0"),
        (crafted(batch=mbz.MAX_BATCH + 1), "rows together: got 1025, expected 1 to 1024"),
        (crafted(threads=0), "threads: got 0"),
        (crafted(height=0), "picture: got 0x6"),
        (crafted(height=65535, width=65535), "picture: got 65535x65535"),
        (crafted(length=73), "length: got 73, expected a multiple of a picture's 72 bytes"),
        (crafted(height=0, width=0, length=2**48 - 1), "expected at most what 2880 bits can hold"),
        (mbz.pack(PLAIN, WORDS + b"x"), "cut off or changed"),
        (b"mbz\2" + bytes(100), "format 2, this version reads 1"),
        (b"\x1f\x8b\x08\0", "expected 'mbz': a file that `mbtrain compress` wrote"),
        (b"", "begins with b''"),
    ],
)
def test_what_cannot_be_is_refused(packed: bytes, words: str) -> None:
    with pytest.raises(DataError) as error:
        mbz.unpack(packed, "x.mbz")
    assert words in str(error.value)


def test_the_layout_is_the_documented_one() -> None:
    packed = mbz.pack(replace(PICTURES, length=2**33 // 72 * 72), WORDS)
    assert packed[:4] == b"mbz\1"
    assert (packed[4:12], packed[12:16], packed[20:22], packed[35:47]) == (b"w" * 8, b"s" * 4, b"rr", b"d" * 12)
    assert struct.unpack("<I", packed[16:20]) == (7,)
    assert struct.unpack("<HBHH", packed[22:29]) == (32, 1, 4, 6)
    assert int.from_bytes(packed[29:35], "little") == 2**33 // 72 * 72
    assert int.from_bytes(packed[47:51], "little") == zlib.crc32(packed[:47] + packed[51:])
