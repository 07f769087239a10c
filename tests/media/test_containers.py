"""A sound file that is cut off or damaged is found out, and one that is whole is not."""

from __future__ import annotations

import io
import struct
from functools import cache

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain.media import Undecodable, audio

RATE = 16_000
KINDS = [
    ("WAV", "PCM_16"),
    ("WAV", "MS_ADPCM"),
    ("WAVEX", "PCM_24"),
    ("RF64", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


@cache
def file_of(kind: str, subtype: str) -> bytes:
    """Three seconds of a tone in noise."""
    return written(tone(), kind, subtype)


def tone(seconds: int = 3) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(seconds * RATE)
    return 0.3 * np.sin(np.arange(len(noise)) / 6) + 0.05 * noise


def written(sound: np.ndarray, kind: str, subtype: str, mode: str | None = None) -> bytes:
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", RATE, 1, format=kind, subtype=subtype, bitrate_mode=mode) as file:
        file.write(sound)
    return out.getvalue()


def reason(data: bytes) -> str:
    """Why it is no sound, in one line; empty where it is."""
    why = ""
    try:
        audio.decode(data, RATE)
    except Undecodable as error:
        why = str(error) or "?"
    assert "\n" not in why
    assert why != "?"
    return why


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_a_file_that_is_cut_off_anywhere_is_found_out(kind: str, subtype: str) -> None:
    data = file_of(kind, subtype)
    assert reason(data) == ""
    places = np.random.default_rng(1).integers(0, len(data), 60).tolist()
    for end in [*places, *range(0, 70, 3), len(data) - 1, len(data) - 2]:
        assert reason(data[:end]), end


@pytest.mark.parametrize(("kind", "subtype"), [k for k in KINDS if k[0] in ("FLAC", "OGG")])
def test_every_changed_byte_of_what_has_checksums_is_found(kind: str, subtype: str) -> None:
    """Of FLAC, in its frames: its head holds none."""
    data = file_of(kind, subtype)
    rng = np.random.default_rng(2)
    for at in rng.integers(9000 if kind == "FLAC" else 0, len(data), 60).tolist():
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        assert reason(bytes(changed)), at


@pytest.mark.parametrize(("kind", "subtype"), [k for k in KINDS if k[0] in ("FLAC", "OGG", "MP3")])
def test_a_hole_is_found(kind: str, subtype: str) -> None:
    data = file_of(kind, subtype)
    middle = len(data) // 2
    assert reason(data[:middle] + data[middle + 500 :])
    assert reason(data[:middle] + bytes(500) + data[middle + 500 :]) or kind == "MP3"


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_changed_bytes_never_raise_anything_else(kind: str, subtype: str) -> None:
    data = file_of(kind, subtype)
    rng = np.random.default_rng(3)
    for at in rng.integers(0, 120, 100).tolist():  # in the head
        changed = bytearray(data)
        changed[at] = int(rng.integers(0, 256))
        reason(bytes(changed))


STARTS = [
    b"",
    b"RIFF\0\0\0\0WAVE",
    b"RIFF\0\0\0\0WAVEfmt ",
    b"FORM\0\0\0\0AIFF",
    b"OggS\0",
    b"fLaC",
    b"\xff\xfb\x90\x00",
    b"ID3\3\0\0\0\0\0\5",
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(STARTS), st.binary(max_size=300))
def test_random_bytes_are_no_sound(start: bytes, rest: bytes) -> None:
    assert reason(start + rest)


# ---- WAV ----------------------------------------------------------------------------------------------------------


def test_the_second_of_a_cut_is_named() -> None:
    data = file_of("WAV", "PCM_16")
    at = data.index(b"data") + 8
    expected = "cut off at second 1.50: its header declares 96000 bytes of sound, 48000 are there"
    assert reason(data[: at + 48_000]) == expected


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFF000, 0x80000000, 0x7FFFFFFF - 36])
def test_a_header_written_to_a_pipe_declares_nothing(length: int) -> None:
    data = file_of("WAV", "PCM_16")
    at = data.index(b"data") + 4
    piped = data[:4] + b"\xff\xff\xff\xff" + data[8:at] + struct.pack("<I", length) + data[at + 4 :]
    assert np.array_equal(audio.decode(piped, RATE), audio.decode(data, RATE))


def test_chunks_before_and_after_the_sound_are_no_harm() -> None:
    data = file_of("WAV", "PCM_16")
    at = data.index(b"data")
    more = b"LIST" + struct.pack("<I", 5) + b"abcde\0"  # of an odd length, so padded
    assert np.array_equal(audio.decode(data[:at] + more + data[at:] + more, RATE), audio.decode(data, RATE))


def test_sound_beyond_what_the_header_declares_does_not_vanish() -> None:
    data = written(np.full(2 * RATE, -0.5), "WAV", "PCM_16")  # of bytes that spell no chunk's name
    at = data.index(b"data") + 4
    assert "32000 more follow" in reason(data[:at] + struct.pack("<I", 32_000) + data[at + 4 :])


class Hollow(io.BytesIO):
    """A file that says that it is 5 GB long."""

    def seek(self, offset: int, whence: int = 0) -> int:
        return 5_000_000_000 if whence == 2 else super().seek(offset, whence)


def test_a_wav_file_too_long_for_its_header_is_refused() -> None:
    with pytest.raises(Undecodable, match="over 4 GiB"):
        next(audio.blocks(Hollow(file_of("WAV", "PCM_16")), RATE))


# ---- OGG ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_second_stream_does_not_vanish(subtype: str) -> None:
    data = file_of("OGG", subtype)
    assert "several streams" in reason(data + written(tone(1), "OGG", subtype))
    assert "several streams" in reason(data + data)


# ---- MP3 ----------------------------------------------------------------------------------------------------------


def frames_of(data: bytes) -> list[bytes]:
    """An MP3's frames, by its sync bytes (all of its frames have the same first two)."""
    ends = [at for at in range(len(data)) if data[at : at + 2] == data[:2] and data[at + 2] & 0x0C == data[2] & 0x0C]
    return [data[at:end] for at, end in zip(ends, [*ends[1:], len(data)], strict=True)]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
def test_an_mp3_whose_first_frame_counts_the_others(mode: str) -> None:
    sound = np.concatenate([tone(1), np.zeros(RATE), tone(1)])
    data = written(sound, "MP3", "MPEG_LAYER_III", mode)
    assert len(audio.decode(data, RATE)) == len(sound)
    for tag in (b"TAG" + bytes(125), b"APETAGEX" + bytes(40), bytes(1000)):
        assert len(audio.decode(data + tag, RATE)) == len(sound)
    id3 = b"ID3\4\0\0\0\0\1\0" + bytes(128)
    assert len(audio.decode(id3 + data, RATE)) == len(sound)
    assert len(audio.decode(id3 + id3 + data, RATE)) == len(sound)
    frames = frames_of(data)
    assert b"".join(frames) == data
    assert "cut off or damaged at second" in reason(b"".join(frames[:-4]))  # between two frames
    assert reason(b"".join(frames[:20] + frames[24:]))
    assert reason(data + data)  # the second would not be read
    assert "damaged at second" in reason(data + b"no tag, no frame")


def test_an_mp3_without_such_a_frame_is_read_wholly_or_refused() -> None:
    """libsndfile guesses its length by the first frames' bit rate, and stops there."""
    quiet, loud = np.zeros(2 * RATE), np.random.default_rng(0).standard_normal(RATE) * 0.3
    first_quiet = written(np.concatenate([quiet, loud]), "MP3", "MPEG_LAYER_III", "VARIABLE")
    bare = b"".join(frames_of(first_quiet)[1:])
    assert len(audio.decode(bare, RATE)) == pytest.approx(3 * RATE, abs=2 * 1152)
    assert "cut off" in reason(bare[:-10])
    first_loud = written(np.concatenate([loud, quiet]), "MP3", "MPEG_LAYER_III", "VARIABLE")
    assert "seconds could be read" in reason(b"".join(frames_of(first_loud)[1:]))


def test_a_changed_head_of_a_frame_is_found() -> None:
    frames = frames_of(file_of("MP3", "MPEG_LAYER_III"))
    frames[10] = b"\0" + frames[10][1:]
    assert "damaged at second 0.3" in reason(b"".join(frames))
