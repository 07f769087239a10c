"""Sound in, PCM out, and back: against libsndfile's own readings, scalar G.711 and laws of resampling."""

from __future__ import annotations

import io
import struct
import wave
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain.errors import ConfigError
from mbtrain.media import Undecodable, audio

RATE = 16_000


def sine(rate: int, seconds: float = 1.0, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def file_of(sound: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, sound, rate, format=kind, subtype=subtype)
    return out.getvalue()


def spectrum_peak(pcm: np.ndarray, rate: int) -> tuple[float, float]:
    """Frequency and amplitude (of full scale) of the strongest sine, from the middle of the sound."""
    middle = pcm[len(pcm) // 4 :][: len(pcm) // 2] / 32768
    taper = np.hanning(len(middle))
    magnitude = np.abs(np.fft.rfft(middle * taper)) * 2 / taper.sum()
    return float(magnitude.argmax() * rate / len(middle)), float(magnitude.max())


# ---- decoding -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-32768, 32767), min_size=1, max_size=300),
    st.sampled_from(["WAV", "WAVEX", "RF64", "AIFF", "FLAC"]),
)
def test_16_bit_mono_at_the_wanted_rate_comes_through_bit_for_bit(values: list[int], kind: str) -> None:
    pcm = np.array(values, np.int16)
    got = audio.decode(file_of(pcm, RATE, kind, "PCM_16"), RATE)
    assert got.dtype == np.int16
    assert np.array_equal(got, pcm)


def test_all_65536_values_come_through() -> None:
    pcm = np.arange(-32768, 32768).astype(np.int16)
    assert np.array_equal(audio.decode(file_of(pcm, RATE, "WAV"), RATE), pcm)


@pytest.mark.parametrize(
    ("kind", "subtype", "step"),
    [
        ("WAV", "PCM_U8", 1 / 128),
        ("WAV", "PCM_24", 0),
        ("WAV", "PCM_32", 0),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ULAW", 1 / 32),
        ("AIFF", "PCM_24", 0),
        ("FLAC", "PCM_24", 0),
        ("OGG", "VORBIS", 0.06),
        ("OGG", "OPUS", 0.06),
        ("MP3", "MPEG_LAYER_III", 0.06),
    ],
)
def test_every_format_has_the_same_scale(kind: str, subtype: str, step: float) -> None:
    """Within half a step of 16 bits, or within what the format itself loses."""
    sound = sine(RATE)
    got = audio.decode(file_of(sound, RATE, kind, subtype), RATE)
    assert len(got) == len(sound)
    end = -100 if subtype == "OPUS" else None  # libsndfile's encoder loses the last few frames of it
    assert np.abs(got / 32768 - sound)[:end].max() <= step + 0.501 / 32768


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("hertz", [100.0, 1000.0, 3000.0])
def test_resampling_keeps_frequency_and_amplitude(rate: int, hertz: float) -> None:
    got = audio.decode(file_of(sine(rate, hertz=hertz), rate, "WAV", "PCM_24"), RATE)
    assert abs(len(got) - RATE) <= 1
    frequency, amplitude = spectrum_peak(got, RATE)
    assert frequency == pytest.approx(hertz, abs=2)
    assert amplitude == pytest.approx(0.5, rel=0.001)


def test_what_is_above_half_the_new_rate_is_filtered_out_not_folded() -> None:
    got = audio.decode(file_of(sine(48_000, hertz=11_000), 48_000, "WAV", "PCM_24"), RATE)
    assert np.abs(got[1000:-1000]).max() <= 2


def test_channels_are_averaged() -> None:
    left, right = np.array([100, -32768, 32767, 7], np.int16), np.array([300, 32767, 32767, 6], np.int16)
    got = audio.decode(file_of(np.stack([left, right], 1), RATE, "WAV"), RATE)
    assert got.tolist() == [200, 0, 32767, 6]  # -0.5 and 6.5: halves go to the even one
    six = np.tile(np.arange(6, dtype=np.int16)[None] * 100, (50, 1))
    assert audio.decode(file_of(six, RATE, "WAV"), RATE).tolist() == [250] * 50


def test_what_is_over_full_scale_is_clipped_not_wrapped() -> None:
    got = audio.decode(file_of(np.array([1.5, -1.5, 1.0, -1.0, 0.99997]), RATE, "WAV", "FLOAT"), RATE)
    assert got.tolist() == [32767, -32768, 32767, -32768, 32767]
    square = np.repeat(np.tile([1.0, -1.0], 50), 441)  # resampling rings over full scale
    got = audio.decode(file_of(square, 44_100, "WAV", "FLOAT"), RATE).astype(int)
    assert (got[100:400] * got[261:561] <= 0).mean() > 0.9  # half a period apart: of opposite signs still


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 30_000),
    st.integers(1, 9_000),
    st.sampled_from([8_000, 16_000, 44_100, 48_000, 44_101]),
    st.integers(1, 3),
)
def test_blocks_are_the_whole_whatever_their_size(frames: int, block: int, rate: int, channels: int) -> None:
    sound = np.random.default_rng(frames).uniform(-1, 1, (frames, channels)).astype(np.float32)
    data = file_of(sound, rate, "WAV", "FLOAT")
    if round(frames * RATE / rate) == 0:
        return
    whole = audio.decode(data, RATE)
    parts = list(audio.blocks(io.BytesIO(data), RATE, block))
    assert all(len(part) for part in parts)
    assert np.array_equal(np.concatenate(parts), whole)
    assert abs(len(whole) - frames * RATE / rate) <= 1
    if channels == 1:
        once = sound[:, 0] if rate == RATE else soxr.resample(sound[:, 0], rate, RATE, "HQ")
        assert np.array_equal(whole, np.clip(np.rint(once * 32768), -32768, 32767).astype(np.int16))


@pytest.mark.parametrize(("kind", "subtype"), [("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_compressed_sound_is_the_same_in_blocks(kind: str, subtype: str | None) -> None:
    """A decoder that loses its state between reads, or that seeks inexactly, would show here."""
    data = file_of(np.stack([sine(48_000, 2), sine(48_000, 2, 700)], 1), 48_000, kind, subtype)
    whole = audio.decode(data, RATE)
    assert np.array_equal(np.concatenate(list(audio.blocks(data, RATE, 777))), whole)
    read, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    once = soxr.resample(read.mean(axis=1), 48_000, RATE, "HQ")
    assert np.abs(whole - np.clip(once * 32768, -32768, 32767)).max() <= 0.51


def test_the_name_of_a_file_does_not_matter(tmp_path: Any) -> None:
    pcm = np.arange(100, dtype=np.int16)
    (tmp_path / "x.raw").write_bytes(file_of(pcm, RATE, "WAV"))
    with open(tmp_path / "x.raw", "rb") as file:
        assert np.array_equal(np.concatenate(list(audio.blocks(file, RATE))), pcm)
        assert not file.closed


def test_the_file_is_let_go_when_reading_stops_early() -> None:
    file = io.BytesIO(file_of(sine(RATE, 10), RATE, "FLAC"))
    blocks = audio.blocks(file, RATE, 100)
    next(blocks)
    blocks.close()
    assert len(np.concatenate(list(audio.blocks(file, RATE)))) == 10 * RATE


# ---- what is no sound ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_found_with_its_second(value: float) -> None:
    sound = sine(RATE, 3)
    sound[40_000] = value
    with pytest.raises(Undecodable, match=r"not finite \(second 2\.50\)"):
        audio.decode(file_of(sound, RATE, "WAV", "FLOAT"), RATE)


def test_float_sound_in_16_bit_steps_is_refused_not_clipped_to_noise() -> None:
    with pytest.raises(Undecodable, match=r"goes up to 16384 where full scale is 1 \(second 0\.00\)"):
        audio.decode(file_of(sine(RATE) * 32768, RATE, "WAV", "FLOAT"), RATE)


def header(channels: int, rate: int, frames: int = 100) -> bytes:
    """A WAV file of 16-bit silence whose header says so."""
    body = struct.pack("<HHIIHH", 1, channels, rate, (rate * channels * 2) & 0xFFFFFFFF, channels * 2 & 0xFFFF, 16)
    sound = bytes(2 * channels * frames)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + body + b"data" + struct.pack("<I", len(sound)) + sound
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def test_limits_of_rates_and_channels() -> None:
    assert len(audio.decode(header(64, 16_000), RATE)) == 100
    with pytest.raises(Undecodable, match="says 65 channels; expected 1 to 64"):
        audio.decode(header(65, 16_000), RATE)
    with pytest.raises(Undecodable, match="says 999 Hz; expected 1000 to 768000"):
        audio.decode(header(1, 999), RATE)
    with pytest.raises(Undecodable, match="says 768001 Hz"):
        audio.decode(header(1, 768_001), RATE)
    for channels, rate in ((0, RATE), (65_535, RATE), (1, 0), (1, 0xFFFFFFFF)):
        with pytest.raises(Undecodable):
            audio.decode(header(channels, rate), RATE)


def test_years_of_silence_in_a_small_file_are_refused_before_they_are_decoded() -> None:
    data = bytearray(file_of(np.zeros(4096, np.int16), RATE, "FLAC"))
    data[21] = data[21] & 0xF0 | 0xF  # of the stream's 36-bit number of frames
    with pytest.raises(Undecodable, match="hours; expected 48 at most"):
        audio.decode(bytes(data), RATE)


def test_no_sound_is_an_error() -> None:
    for kind in ("WAV", "AIFF"):
        with pytest.raises(Undecodable, match="no sound in it"):
            audio.decode(file_of(np.zeros(0, np.int16), RATE, kind), RATE)
    with pytest.raises(Undecodable, match="no sound in it"):  # a 48th of a frame
        audio.decode(file_of(np.zeros(1, np.int16), 768_000, "WAV"), RATE)
    with pytest.raises(Undecodable, match="empty"):
        audio.decode(b"", RATE)


@pytest.mark.parametrize("kind", ["AU", "CAF", "W64", "VOC", "NIST"])
def test_other_formats_are_not_taken_by_accident(kind: str) -> None:
    with pytest.raises(Undecodable, match="expected WAV, AIFF, FLAC, OGG or MP3"):
        audio.decode(file_of(sine(RATE, 0.1), RATE, kind, "PCM_16"), RATE)


# ---- samples' bytes -----------------------------------------------------------------------------------------------


def mulaw_scalar(value: int) -> int:
    """G.711 by its definition: sign, the logarithm's segment, four bits within it, all inverted."""
    magnitude = min(abs(value) // 4, 8158) + 33
    segment = 0
    while magnitude >= 64 << segment:
        segment += 1
    step = (magnitude - (32 << segment)) // (2 << segment)
    return 0xFF ^ ((0x80 if value < 0 else 0) | segment << 4 | step)


def test_mulaw_is_g_711() -> None:
    values = np.arange(-32768, 32768).astype(np.int16)
    codes = audio.encode(values, "mulaw8")
    assert list(codes) == [mulaw_scalar(int(value)) for value in values]
    known = {0: 0xFF, 32767: 0x80, -32768: 0x00, 8: 0xFE, -8: 0x7E, 1000: 0xCE, -1000: 0x4E}
    assert {value: audio.encode(np.array([value], np.int16), "mulaw8")[0] for value in known} == known


def test_mulaw_stands_for_what_libsndfile_reads() -> None:
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", RATE, 1, format="WAV", subtype="ULAW") as file:
        file.write(np.zeros(256, np.int16))
    data = out.getvalue()
    at = data.index(b"data") + 8
    read, _ = soundfile.read(io.BytesIO(data[:at] + bytes(range(256)) + data[at + 256 :]), dtype="int16")
    assert np.array_equal(audio.to_pcm(bytes(range(256)), "mulaw8"), read)


def test_mulaw_there_and_back() -> None:
    codes = bytes(range(256))
    back = audio.encode(audio.to_pcm(codes, "mulaw8"), "mulaw8")
    assert [i for i in range(256) if back[i] != codes[i]] == [0x7F]  # minus nought becomes nought
    values = np.arange(-32635, 32636).astype(np.int16)
    error = np.abs(audio.to_pcm(audio.encode(values, "mulaw8"), "mulaw8").astype(int) - values)
    assert (error <= np.maximum(4, (np.abs(values.astype(int)) + 132) / 32)).all()  # half a step: 16 in each doubling
    assert np.array_equal(np.sort(values), values)
    heard = audio.to_pcm(audio.encode(values, "mulaw8"), "mulaw8").astype(int)
    assert (np.diff(heard) >= 0).all()


@given(st.binary(max_size=101), st.sampled_from(audio.ENCODINGS))
def test_any_bytes_are_sound(content: bytes, encoding: str) -> None:
    pcm = audio.to_pcm(content, encoding)
    assert pcm.dtype == np.int16
    assert len(pcm) == len(content) // (2 if encoding == "pcm16" else 1)
    if encoding == "pcm16":
        assert audio.encode(pcm, encoding) == content[: len(content) // 2 * 2]
    data = audio.wav(content, 22_050, encoding)
    with wave.open(io.BytesIO(data)) as file:
        assert file.getparams()[:4] == (1, 2, 22_050, len(pcm))
    if len(pcm) and not content.startswith((b"OggS", b"wvpk")):  # which libsndfile takes for OGG or WavPack in WAV
        assert np.array_equal(audio.decode(data, 22_050), pcm)


def test_pcm_is_little_endian() -> None:
    assert audio.encode(np.array([1, -2], np.int16), "pcm16") == b"\x01\x00\xfe\xff"
    assert audio.to_pcm(b"\x01\x00\xfe\xff\x07", "pcm16").tolist() == [1, -2]


def test_another_encoding_is_refused() -> None:
    for call in (
        lambda: audio.encode(np.zeros(1, np.int16), "alaw"),
        lambda: audio.to_pcm(b"", "alaw"),
        lambda: audio.wav(b"", RATE, "alaw"),
    ):
        with pytest.raises(ConfigError, match="expected pcm16 or mulaw8, got 'alaw'"):
            call()


# ---- to look at ---------------------------------------------------------------------------------------------------


def test_a_sine_stands_in_its_row_of_the_spectrogram() -> None:
    picture = audio.spectrogram(np.rint(sine(RATE, 1, 2000, 1.0) * 32767).astype(np.int16), RATE)
    bins, columns = picture.shape
    assert picture.dtype == np.float32
    assert columns == 98  # windows of 25 ms every 10 ms
    assert (picture.argmax(axis=0) == 2000 * 2 * (bins - 1) // RATE).all()
    assert picture.max() == pytest.approx(0, abs=0.1)
    assert picture.min() >= -100
    assert picture[: bins // 8].max() < -60


@pytest.mark.parametrize("frames", [0, 1, 399, 400, 401])
def test_a_spectrogram_of_little_is_one_column(frames: int) -> None:
    picture = audio.spectrogram(np.zeros(frames, np.int16), RATE)
    assert picture.shape == (201, 1)
    assert (picture == -100).all()
