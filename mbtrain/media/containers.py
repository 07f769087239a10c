"""Whether a sound file is whole: read off the container that its sound lies in.

libsndfile, which decodes, takes a file that is cut off for one that ends there, and passes over damaged pieces of OGG
and MP3 without a word. What its decoders find by themselves (each FLAC frame has a checksum) is not looked at here.

    WAV, RF64, AIFF   the header declares no more sound than the file holds
    OGG               every page has its checksum and its number in the sequence, and the last one says that it is last
    MP3               one frame follows the other up to the end of the file or to the tags there
"""

from __future__ import annotations

import struct
import zlib
from io import BufferedIOBase
from typing import NamedTuple

from mbtrain.media import Undecodable

# What programs that write to a pipe put where they do not know the length: ffmpeg, sox, arecord, GStreamer.
_UNKNOWN_BYTES = (range(0x7F000000 - 64, 0x7F000001), range(0x7FFFF000 - 64, 0x80000001), range(0xFFFFFF00, 1 << 32))
_TAG_BYTES = 4096
_RIFF_LIMIT = (1 << 32) + 8
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
# ISO 11172-3 and 13818-3: kbit/s by (MPEG 1?, layer) and index; Hz by version bits and index
_MP3_KBITS = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_RATES = {0: (11025, 12000, 8000), 2: (22050, 24000, 16000), 3: (44100, 48000, 32000)}
_MP3_UNHEARD = 2 * 4095  # frames that a decoder leaves out at the most: the encoder's delay, and its padding
_MP3_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3", b"3DI")


class Length(NamedTuple):
    """Frames (samples of each channel) that have to come out of a file at least, and whether its header declares them.

    Where it does not (MP3 without a first frame that counts the others), libsndfile guesses, and reads no further than
    its guess.
    """

    least: int
    declared: bool


def check(file: BufferedIOBase) -> Length:
    """Find out what a sound file is and that it is whole; leaves the file somewhere in its middle.

    Raises:
        Undecodable: it is none of WAV, AIFF, FLAC, OGG and MP3, or is cut off or damaged.
    """
    size = file.seek(0, 2)
    if size == 0:
        raise Undecodable("empty")
    head = _read(file, 0, 12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        _check_chunks(file, size, "<", b"data", head[:4] == b"RIFF")
    elif head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        _check_chunks(file, size, ">", b"SSND", False)
    elif head[:4] == b"OggS":
        _check_ogg(file, size)
    else:
        start = _skip_id3(file)
        if _read(file, start, 4) != b"fLaC":
            return _check_mp3(file, start, size)
    return Length(0, True)


def _read(file: BufferedIOBase, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _check_chunks(file: BufferedIOBase, size: int, endian: str, wanted: bytes, limited: bool) -> None:
    """WAV and AIFF are chunks of a name, a length and content, padded to an even length."""
    if limited and size > _RIFF_LIMIT:
        raise Undecodable("a WAV file of over 4 GiB, whose header cannot say how long it is; make it RF64 or FLAC")
    at, bytes_per_s, long_length = 12, 0, 0
    while len(head := _read(file, at, 8)) == 8:
        name, length = struct.unpack(f"{endian}4sI", head)
        if name == b"ds64":  # RF64: 64-bit lengths, of the file and of its sound
            long_length = int.from_bytes(_read(file, at + 16, 8), "little")
        elif name == b"fmt ":
            bytes_per_s = int.from_bytes(_read(file, at + 16, 4), "little")
        elif name == wanted:
            there = size - at - 8
            unknown = any(length in lengths for lengths in _UNKNOWN_BYTES)
            declared = long_length if long_length and length == 0xFFFFFFFF else 0 if unknown else length
            if declared > there:
                second = f" at second {there / bytes_per_s:.2f}" if bytes_per_s else ""
                raise Undecodable(f"cut off{second}: its header declares {declared} bytes of sound, {there} are there")
            rest = there - declared
            # after a crash the length may be an early one; little that is unknown is taken for a tag
            if declared and rest > _TAG_BYTES and not _read(file, size - rest, 5).strip(b"\0").isascii():
                raise Undecodable(
                    f"its header declares {declared} bytes of sound, but {rest} more follow that it does not"
                )
            return
        at += 8 + length + length % 2
    raise Undecodable(f"cut off: it ends before its sound (no chunk {wanted.decode()!r})")


def _check_ogg(file: BufferedIOBase, size: int) -> None:
    """RFC 3533: pages of a 27-byte head, a table of lengths, and content."""
    at = number = 0
    serial = rate = 0
    granule, last = 0, False

    def damaged(what: str) -> Undecodable:
        place = f"second {granule / rate:.2f}" if rate else f"byte {at}"
        return Undecodable(f"{what} after {place}")

    while at < size:
        head = _read(file, at, 27)
        if head[:4] != b"OggS"[: len(head)]:
            raise damaged("damaged: no page of an OGG file follows")
        table = file.read(head[26]) if len(head) == 27 else b""
        content = file.read(sum(table))
        if len(head) < 27 or len(table) < head[26] or len(content) < sum(table):
            raise damaged("cut off")
        flags, position, page_serial, page_number, checksum = struct.unpack("<xBqIII", head[4:26])
        if _ogg_checksum(head[:22] + bytes(4) + head[26:] + table + content) != checksum:
            raise damaged("damaged: the checksum of a page does not fit")
        if at == 0:
            serial, number = page_serial, page_number
            if content.startswith(b"\x01vorbis"):
                rate = int.from_bytes(content[12:16], "little")
            elif content.startswith(b"OpusHead"):
                rate = 48000  # of positions, whatever the sound's own
        if page_serial != serial or (at and flags & 2):  # 2: a stream begins
            raise Undecodable("holds several streams, of which only the first could be read; split it first")
        if last or page_number != number:
            raise damaged("damaged: a page is missing")
        number = (number + 1) & 0xFFFFFFFF
        granule, last = max(granule, position), bool(flags & 4)
        at += 27 + len(table) + len(content)
    if not last:
        raise damaged("cut off")


def _ogg_checksum(page: bytes) -> int:
    """OGG's CRC-32 has zlib's polynomial, but the other order of bits, and neither of its two inversions."""
    checksum = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{checksum:032b}"[::-1], 2)


def _skip_id3(file: BufferedIOBase) -> int:
    """Where the content begins after ID3v2 tags, if there are any."""
    at = 0
    while (head := _read(file, at, 10))[:3] == b"ID3" and len(head) == 10:
        length = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        at += 10 + length + (10 if head[5] & 0x10 else 0)
    return at


def _mp3_frame(head: bytes) -> tuple[int, int, int] | None:
    """Bytes, samples and sample rate of the MPEG audio frame with this head of 4 bytes; None: it is none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, bits, rate_index = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or bits == 15 or rate_index == 3:  # reserved
        return None
    one, padding, rate = version == 3, head[2] >> 1 & 1, _MP3_RATES[version][rate_index]
    bit_rate = 1000 * _MP3_KBITS[one, layer][bits - 1] if bits else 0  # 0: free, so that the length is not known
    if layer == 1:
        return (12 * bit_rate // rate + padding) * 4, 384, rate
    samples = 1152 if one or layer == 2 else 576
    return samples // 8 * bit_rate // rate + padding, samples, rate


def _check_mp3(file: BufferedIOBase, start: int, size: int) -> Length:
    """MP3 is frames one after the other, each as long as its head says, then tags (ID3v1, APE, lyrics) or zeros."""
    at, frames, tagged, declared = start, 0, False, False
    first: tuple[int, int, int] | None = None
    while frame := _mp3_frame(_read(file, at, 4)):
        if first is None:
            first = frame
            tagged, declared = _mp3_tag(_read(file, at, frame[0]))
        length, samples, rate = frame
        if (samples, rate) != first[1:]:
            break
        if length < 24:
            raise Undecodable("MP3 of a free bit rate, whose frames do not say how long they are; make it FLAC or WAV")
        if at + length > size and frames:
            raise Undecodable(f"cut off at second {frames * samples / rate:.2f}: its last frame is not whole")
        frames += 1
        at += length
    if first is None or (frames < 2 and at != size):  # four bytes may look like a frame by chance
        raise Undecodable("no sound file that can be read: expected WAV, AIFF, FLAC, OGG or MP3")
    rest = _read(file, at, 1 << 20)
    if rest.strip(b"\0") and not rest.lstrip(b"\0").startswith(_MP3_TAGS):
        second = frames * first[1] / first[2]
        raise Undecodable(f"damaged at second {second:.2f}: no frame of the same MP3 follows")
    least = (frames - tagged) * first[1] - (_MP3_UNHEARD if tagged else 0)
    return Length(max(least, 0), declared)


def _mp3_tag(frame: bytes) -> tuple[bool, bool]:
    """Whether an MP3's first frame is no sound but a table about the others, and whether that counts them."""
    if frame[36:40] == b"VBRI":
        return True, True
    for at in (13, 21, 36):  # after the frame's head and side information, by MPEG version and channels
        if frame[at : at + 4] in (b"Xing", b"Info"):
            return True, bool(frame[at + 7] & 1) if len(frame) > at + 7 else False
    return False, False
