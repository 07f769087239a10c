"""Sound: files to PCM, PCM to bytes and back, a file to play, a picture to look at.

A sound is int16 [frames], mono, at a sample rate in Hz.

    decode    WAV, AIFF, FLAC, OGG (Vorbis, Opus) and MP3, of any rate and any number of channels: the mean of the
              channels, resampled by soxr (HQ: 20 bits, linear phase), rounded to 16 bits and clipped, without dither.
              16-bit mono at the wanted rate comes through bit for bit.
    blocks    the same piece by piece, in constant memory: bit for bit what resampling at one go gives
    encode    PCM as the bytes of a sample: pcm16 (little-endian) or mulaw8 (ITU-T G.711, one byte a frame)
    to_pcm    the way back
    wav       such bytes as a file that plays anywhere
"""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator
from functools import cache, reduce
from types import SimpleNamespace

import numpy as np

from mbtrain.errors import ConfigError
from mbtrain.media import Undecodable, containers

ENCODINGS = ("pcm16", "mulaw8")
RATES = (1_000, 768_000)  # in Hz: the lowest and the highest that are read and made

_FORMATS = ("WAV", "WAVEX", "RF64", "AIFF", "FLAC", "OGG", "MP3")
_CHANNELS = 64
_MAX_HOURS = 48  # a few MB of FLAC can hold years of silence
_UNKNOWN_FRAMES = 1 << 62  # what libsndfile gives for a FLAC stream of undeclared length, and more
# A float file may go over full scale (1.0) and is clipped; this far over it is in other units, such as 16-bit steps.
_MAX_LEVEL = 100.0


def decode(data: bytes, sample_rate: int) -> np.ndarray:
    """int16 [frames]: the sound in a file's bytes, mono, at `sample_rate` Hz.

    Raises:
        Undecodable: it is no sound file of a known format, is cut off or damaged, or holds no sound.
    """
    return np.concatenate(list(blocks(data, sample_rate)))


def blocks(data: bytes | io.BufferedIOBase, sample_rate: int, frames_per_block: int = 32_768) -> Iterator[np.ndarray]:
    """int16 [n]: the pieces of `decode(data, sample_rate)`, one after the other.

    Args:
        data: a file's bytes, or a file that can be read and sought in; it is not closed.
        sample_rate: in Hz.
        frames_per_block: frames of the source that are decoded at a time; has no influence on the sound.

    Raises:
        Undecodable: as `decode`; damage to a FLAC file may be found only after some pieces were given.
    """
    import soundfile
    import soxr

    class Forward(soundfile.SoundFile):  # type: ignore[misc]
        """Read in order: as long as this says so, soundfile does not seek after every block, which FLAC cannot bear."""

        def seekable(self) -> bool:
            return False

    file = io.BytesIO(data) if isinstance(data, bytes) else data
    least, is_declared = containers.check(file)
    file.seek(0)
    got = made = rate = 0
    try:
        # without its name: soundfile takes a file named x.raw for one that has no header
        with Forward(SimpleNamespace(seek=file.seek, tell=file.tell, readinto=file.readinto)) as sound:
            rate = sound.samplerate
            declared = sound.frames if is_declared and sound.frames < _UNKNOWN_FRAMES else 0
            _check_header(sound.format, rate, sound.channels, max(declared, least))
            stream = None if rate == sample_rate else soxr.ResampleStream(rate, sample_rate, 1, "float32", "HQ")
            while len(block := sound.read(frames_per_block, dtype="float32", always_2d=True)):
                mono = _mono(block, got, rate)
                got += len(block)
                if got > _MAX_HOURS * 3600 * rate:
                    raise Undecodable(f"longer than {_MAX_HOURS} hours")
                pcm = _to_16_bit(mono if stream is None else stream.resample_chunk(mono))
                made += len(pcm)
                if len(pcm):
                    yield pcm
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", str(error)).removeprefix("Error : ").rstrip(".")
        raise Undecodable(f"cannot be decoded after second {got / max(rate, 1):.2f}: {reason}") from None
    if got < declared:
        raise Undecodable(
            f"cut off or damaged at second {got / rate:.2f}: its header says {declared / rate:.2f} seconds"
        )
    if got < least:
        raise Undecodable(
            f"only {got / rate:.2f} of at least {least / rate:.2f} seconds could be read (an MP3 whose first frame "
            "does not count all others); encode it anew"
        )
    if stream is not None:
        pcm = _to_16_bit(stream.resample_chunk(np.zeros(0, np.float32), last=True))
        made += len(pcm)
        if len(pcm):
            yield pcm
    if made == 0:
        raise Undecodable("no sound in it")


def _check_header(kind: str, rate: int, channels: int, frames: int) -> None:
    if kind not in _FORMATS:
        raise Undecodable(f"expected one of {', '.join(_FORMATS)}, got {kind}")
    if not RATES[0] <= rate <= RATES[1]:
        raise Undecodable(f"its header says {rate} Hz; expected {RATES[0]} to {RATES[1]}")
    if not 1 <= channels <= _CHANNELS:
        raise Undecodable(f"its header says {channels} channels; expected 1 to {_CHANNELS}")
    if frames > _MAX_HOURS * 3600 * rate:
        raise Undecodable(f"its header says {frames / rate / 3600:.0f} hours; expected {_MAX_HOURS} at most")


def _mono(block: np.ndarray, start: int, rate: int) -> np.ndarray:
    """float32 [n]: the mean over the channels of float32 [n, c], full scale being 1; `start` is its first frame."""
    if not (level := max(float(block.max()), -float(block.min()))) <= _MAX_LEVEL:  # true for NaN too
        wrong = ~(np.abs(block) <= _MAX_LEVEL)
        second = (start + int(wrong.any(axis=1).argmax())) / rate
        what = f"goes up to {level:g} where full scale is 1" if np.isfinite(level) else "is not finite"
        raise Undecodable(f"its sound {what} (second {second:.2f})")
    channels = block.shape[1]
    # channel by channel: the same order of additions, so the same bits, on every machine
    total = reduce(np.add, block.T)
    return np.ascontiguousarray(total if channels == 1 else total / np.float32(channels))


def _to_16_bit(sound: np.ndarray) -> np.ndarray:
    """int16 of float32 with full scale 1, which is overwritten: rounded to the nearest (halves to even), clipped."""
    np.rint(np.multiply(sound, np.float32(32768), out=sound), out=sound)
    return np.clip(sound, -32768, 32767, out=sound).astype(np.int16)


# ---- samples' bytes -----------------------------------------------------------------------------------------------


def encode(pcm: np.ndarray, encoding: str) -> bytes:
    """The bytes of int16 [frames]: two a frame in pcm16 (little-endian), one in mulaw8.

    Raises:
        ConfigError: another encoding.
    """
    _check_encoding(encoding)
    if encoding == "pcm16":
        return pcm.astype("<i2").tobytes()
    return _mulaw_codes()[pcm.astype(np.int16).view(np.uint16)].tobytes()


def to_pcm(content: bytes, encoding: str) -> np.ndarray:
    """int16 [frames]: the sound of `encode`'s bytes, or of any bytes; an odd last byte of pcm16 is left out.

    Raises:
        ConfigError: another encoding.
    """
    _check_encoding(encoding)
    if encoding == "pcm16":
        return np.frombuffer(content, "<i2", len(content) // 2).astype(np.int16)
    return _mulaw_values()[np.frombuffer(content, np.uint8)]


def wav(content: bytes, sample_rate: int, encoding: str) -> bytes:
    """A WAV file, 16-bit mono, of a sample's bytes; an odd last byte of pcm16 is left out.

    Raises:
        ConfigError: another encoding.
    """
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(encode(to_pcm(content, encoding), "pcm16"))
    return out.getvalue()


def _check_encoding(encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise ConfigError(f"encoding: expected {' or '.join(ENCODINGS)}, got {encoding!r}")


@cache
def _mulaw_values() -> np.ndarray:
    """int16 [256]: what the codes of G.711's mu-law stand for, in 16-bit steps."""
    bits = ~np.arange(256, dtype=np.int32) & 0xFF
    magnitude = ((((bits & 15) << 3) + 132) << (bits >> 4 & 7)) - 132
    return np.where(bits & 0x80, -magnitude, magnitude).astype(np.int16)


@cache
def _mulaw_codes() -> np.ndarray:
    """uint8 [65536]: the code of each 16-bit value, in the order of its bits as an unsigned number."""
    value = np.arange(65536, dtype=np.uint16).view(np.int16).astype(np.int32)
    biased = np.minimum(np.abs(value) >> 2, 8158) + 33  # 14 bits; 33 to 8191
    segment = np.frexp(biased)[1] - 6  # the exponent of 2: 0 for 33 to 63, 7 for 4096 to 8191
    bits = segment << 4 | (biased >> segment + 1) & 15
    return (~np.where(value < 0, bits | 0x80, bits) & 0xFF).astype(np.uint8)


# ---- to look at ---------------------------------------------------------------------------------------------------


def spectrogram(pcm: np.ndarray, sample_rate: int) -> np.ndarray:
    """float32 [bins, columns], in dB: row i is i / bins * sample_rate / 2 Hz, a column 10 ms, 0 dB a full-scale sine.

    Windows are of 25 ms (Hann); nothing is below -100 dB. A sound shorter than a window is taken with silence after it.
    """
    window = max(round(0.025 * sample_rate), 2)
    hop = max(round(0.010 * sample_rate), 1)
    sound = np.pad(pcm.astype(np.float32) / 32768, (0, max(window - len(pcm), 0)))
    taper = np.hanning(window + 1)[:-1].astype(np.float32)
    views = np.lib.stride_tricks.sliding_window_view(sound, window)[::hop]
    magnitude = np.abs(np.fft.rfft(views * taper, axis=1)) * (2 / taper.sum())
    return np.maximum(20 * np.log10(np.maximum(magnitude, 1e-6)), -100).astype(np.float32).T
