"""Sound files become samples: whole or in segments, in order, and every one that does not is named."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import audio as prep
from data_prep.audio import audio_modality
from data_prep.items import items
from data_prep.sources import Item, PassedOver, Rejection, Sample, SourceFile, Unreadable
from mbtrain.errors import ConfigError
from mbtrain.media import audio

RATE = 16_000


def file_of(pcm: np.ndarray, rate: int = RATE, kind: str = "WAV") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, pcm, rate, format=kind)
    return out.getvalue()


def noise(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(-32768, 32768, frames).astype(np.int16)


def decoded(
    data: bytes, where: str = "", **options: Any
) -> list[tuple[str, bytes, tuple[int, ...] | None, int | None]]:
    """Where, content, shape and rate of an item's samples; each is used before the next, as the contract has it."""
    chunks = iter([data[:7], data[7:]])
    samples = []
    for sample in audio_modality(**options).decode(Item("x.wav", where, chunks)):
        assert isinstance(sample, Sample)
        assert not sample.plain
        samples.append((sample.where, b"".join(sample.chunks), sample.shape, sample.sample_rate))
    return samples


def test_a_recording_is_one_sample() -> None:
    pcm = noise(20 * RATE)
    expected = ("a/b.wav", pcm.astype("<i2").tobytes(), (20 * RATE,), RATE)
    assert decoded(file_of(pcm), "a/b.wav") == [expected]
    assert decoded(file_of(pcm, kind="FLAC"), "a/b.wav") == [expected]


def test_long_recordings_are_cut_in_their_order() -> None:
    pcm = noise(25 * RATE)
    samples = decoded(file_of(pcm), "a.tar: b.wav", segment_s=10)
    wheres = [where for where, _, _, _ in samples]
    assert wheres == [f"a.tar: b.wav: second {second}" for second in ("0.0", "10.0", "20.0")]
    assert [shape for _, _, shape, _ in samples] == [(10 * RATE,), (10 * RATE,), (5 * RATE,)]
    assert b"".join(content for _, content, _, _ in samples) == pcm.astype("<i2").tobytes()
    assert decoded(file_of(pcm[:100]), segment_s=10)[0][0] == "second 0.0"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5000),
    st.integers(1, 3000),
    st.sampled_from([8_000, 16_000, 44_100]),
    st.sampled_from(audio.ENCODINGS),
)
def test_segments_are_the_whole(frames: int, segment: int, rate: int, encoding: str) -> None:
    data = file_of(noise(frames), rate)
    if round(frames * RATE / rate) == 0:
        return
    [(_, whole, _, _)] = decoded(data, encoding=encoding)
    samples = decoded(data, encoding=encoding, segment_s=segment / RATE)
    assert b"".join(content for _, content, _, _ in samples) == whole
    size = 2 if encoding == "pcm16" else 1
    assert all(shape == (len(content) // size,) for _, content, shape, _ in samples)
    assert all(shape == (segment,) for _, _, shape, _ in samples[:-1])
    assert whole == audio.encode(audio.decode(data, RATE), encoding)
    assert len({where for where, _, _, _ in samples}) == len(samples)


def test_mulaw_has_one_byte_a_frame() -> None:
    [(_, content, shape, rate)] = decoded(file_of(noise(1000)), encoding="mulaw8", sample_rate=8000)
    assert (len(content), shape, rate) == (500, (500,), 8000)


def test_what_is_longer_than_memory_goes_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(noise(5 * RATE), kind="FLAC")
    before = decoded(data, segment_s=2)
    monkeypatch.setattr(prep, "_MEMORY_BYTES", 1000)
    monkeypatch.setattr(prep, "READ_BYTES", 777)
    assert decoded(data, segment_s=2) == before


@pytest.mark.parametrize("segment_s", [None, 1])
def test_a_damaged_file_gives_its_reason_and_no_sample(segment_s: float | None) -> None:
    """However much of it could be decoded: a recording is whole, or it is none."""
    data = file_of(noise(60 * RATE), kind="FLAC")
    item = Item("x.flac", "row 3", iter([data[: len(data) - 100]]))
    [rejection] = audio_modality(segment_s=segment_s).decode(item)
    assert isinstance(rejection, Rejection)
    assert rejection.where == "row 3"
    assert rejection.bad
    assert "after second 5" in rejection.reason


def test_a_source_that_ends_is_told_to_the_reader() -> None:
    def chunks() -> Iterator[bytes]:
        yield file_of(noise(100))[:50]
        raise Unreadable("cannot be read: the archive ends")

    with pytest.raises(Unreadable, match="the archive ends"):
        list(audio_modality().decode(Item("x.wav", "", chunks())))


def test_the_modality_says_what_it_does() -> None:
    modality = audio_modality(segment_s=10, column="audio.bytes")
    assert (modality.name, modality.column) == ("audio", "audio.bytes")
    assert modality.options == {
        "column": "audio.bytes",
        "sample_rate": 16_000,
        "encoding": "pcm16",
        "segment_s": 10.0,
        "channels": "mean",
        "resampler": "soxr HQ",
    }
    assert modality.wants("a/b.FLAC")
    assert modality.wants("b.wav.gz")
    assert not modality.wants("a/b.raw")
    assert not modality.wants("transcript.txt")
    assert pickle.loads(pickle.dumps(modality)).options == modality.options  # noqa: S301 - our own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 999}, "--rate: expected 1000 to 768000 Hz as a whole number, got 999"),
        ({"sample_rate": 16000.0}, "got 16000.0"),
        ({"sample_rate": True}, "got True"),
        ({"encoding": "mulaw"}, "--encoding: expected pcm16 or mulaw8, got 'mulaw'"),
        ({"segment_s": 0}, "--segment: expected seconds"),
        ({"segment_s": -1.0}, "--segment: expected seconds"),
        ({"segment_s": 1e-9}, "--segment: expected seconds"),
        ({"segment_s": float("nan")}, "--segment: expected seconds"),
        ({"segment_s": float("inf")}, "--segment: expected seconds"),
        ({"segment_s": "10"}, "--segment: expected seconds"),
        ({"segment_s": True}, "--segment: expected seconds"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        audio_modality(**options)
    assert message in str(error.value)


def everything(path: Path) -> list[tuple[str, bytes | str]]:
    """Where and content (or reason) of all that a source file gives."""
    info = path.stat()
    modality = audio_modality()
    found: list[tuple[str, bytes | str]] = []
    source = SourceFile(str(path), "x", path.name, info.st_size, info.st_mtime_ns)
    for item in items(source, modality.column, modality.wants, lambda size: None):
        assert not isinstance(item, Rejection)
        if isinstance(item, PassedOver):
            found.append((item.where, "passed over"))
            continue
        for sample in modality.decode(item):
            found.append((sample.where, sample.reason if isinstance(sample, Rejection) else b"".join(sample.chunks)))
    return found


def test_members_of_archives_and_values_of_records(tmp_path: Path) -> None:
    one, two = noise(100), noise(200)
    flac = file_of(one, kind="FLAC")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in {"a/1.flac": flac, "a/1.txt": b"said", "2.wav": file_of(two), "3.flac": flac[:-9]}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = dict(everything(tmp_path / "x.tar"))
    sounds = [one.tobytes(), two.tobytes()]
    assert [found.pop(name) for name in ("a/1.flac", "2.wav")] == sounds
    assert found.pop("a/1.txt") == "passed over"
    assert "flac decoder lost sync" in str(found.pop("3.flac"))
    assert not found

    values = [{"bytes": flac, "path": "1.flac"}, {"bytes": file_of(two), "path": "2.wav"}]
    pq.write_table(pa.table({"audio": values, "text": ["a", "b"]}), tmp_path / "x.parquet")
    assert everything(tmp_path / "x.parquet") == [("row 0", sounds[0]), ("row 1", sounds[1])]
