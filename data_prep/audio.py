"""The modality of audio: sound files as 16-bit mono PCM at one sample rate, or as 8-bit mu-law.

One recording is one sample, unless `segment_s` cuts it. Recordings stay whole by default, for two reasons: the loader
cuts long samples into rows itself, and a sample's split is decided by a hash of its content, so that segments of one
recording would come to stand on both sides: the validation split would hold the same voices, rooms and tunes, a moment
before and after what was trained on, and its score would flatter. Cut where single recordings are longer than a shard
should be (hours); and where the score has to be of unheard recordings, keep those for validation as a data set of
their own.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from functools import partial
from io import BufferedIOBase
from typing import cast

from data_prep.sources import READ_BYTES, Item, Modality, Rejection, Sample
from mbtrain.errors import ConfigError
from mbtrain.media import Undecodable, audio

SUFFIXES = (".wav", ".wave", ".rf64", ".aif", ".aiff", ".aifc", ".flac", ".ogg", ".oga", ".opus", ".mp3")
_MEMORY_BYTES = (
    64 * 1024**2
)  # a file, and its sound, up to this size are held in memory; longer ones in a temporary file


def audio_modality(
    *, sample_rate: int = 16_000, encoding: str = "pcm16", segment_s: float | None = None, column: str = "audio"
) -> Modality:
    """Audio.

    Args:
        sample_rate: of the samples, in Hz; what is recorded at another is resampled.
        encoding: pcm16 (16-bit little-endian) or mulaw8 (ITU-T G.711, one byte a frame).
        segment_s: seconds after which a recording is cut, to the nearest frame; the last piece is shorter. The pieces
            follow one another in their order. None: recordings stay whole.
        column: as in `Modality`.

    Raises:
        ConfigError: an option that is out of range or of another type.
    """
    low, high = audio.RATES
    if not isinstance(sample_rate, int) or isinstance(sample_rate, bool) or not low <= sample_rate <= high:
        raise ConfigError(f"--rate: expected {low} to {high} Hz as a whole number, got {sample_rate!r}")
    if encoding not in audio.ENCODINGS:
        raise ConfigError(f"--encoding: expected {' or '.join(audio.ENCODINGS)}, got {encoding!r}")
    segment_frames = None
    if segment_s is not None:
        number = isinstance(segment_s, int | float) and not isinstance(segment_s, bool) and math.isfinite(segment_s)
        if not number or (segment_frames := round(segment_s * sample_rate)) < 1:
            raise ConfigError(
                f"--segment: expected seconds, of one frame (1/{sample_rate}) or more, or none, got {segment_s!r}"
            )
    options = {
        "column": column,
        "sample_rate": sample_rate,
        "encoding": encoding,
        "segment_s": None if segment_s is None else float(segment_s),
        "channels": "mean",
        "resampler": "soxr HQ",
    }
    decode = partial(_decode, sample_rate, encoding, segment_frames)
    return Modality("audio", decode, column, SUFFIXES, options)


def _decode(sample_rate: int, encoding: str, segment_frames: int | None, item: Item) -> Iterator[Sample | Rejection]:
    """The samples of a sound file. It is decoded wholly before the first is given: of a damaged file there is none."""
    with _scratch() as content, _scratch() as sound:
        for chunk in item.chunks:
            content.write(chunk)
        frames = 0
        try:
            for pcm in audio.blocks(content, sample_rate):
                sound.write(audio.encode(pcm, encoding))
                frames += len(pcm)
        except Undecodable as error:
            yield Rejection(item.where, str(error))
            return
        content.close()
        frame_bytes = sound.tell() // frames
        for start in range(0, frames, segment_frames or frames):
            stop = min(start + (segment_frames or frames), frames)
            where = item.where
            if segment_frames is not None:
                where = f"{where}: second {start / sample_rate}".removeprefix(": ")
            chunks = _part(sound, start * frame_bytes, stop * frame_bytes)
            yield Sample(chunks, where, (stop - start,), sample_rate)


def _part(file: BufferedIOBase, start: int, stop: int) -> Iterator[bytes]:
    """The bytes start to stop of a file."""
    while start < stop:
        file.seek(start)
        chunk = file.read(min(READ_BYTES, stop - start))
        start += len(chunk)
        yield chunk


def _scratch() -> BufferedIOBase:
    return cast(BufferedIOBase, tempfile.SpooledTemporaryFile(_MEMORY_BYTES))
