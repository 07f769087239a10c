"""Baselines are what the compressors' own one-call functions give on the same bytes.

pytest tests/test_codecs.py
"""

import gzip
import io
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mbtrain import codecs
from mbtrain.shards import Split, open_split
from tests.handmade import Made, dataset, picture, sound

RNG = np.random.default_rng(0)
WORDS = [b"byte ", b"patch ", b"stage ", b"model "]


def text(n: int) -> bytes:
    return b"".join(WORDS[i] for i in RNG.integers(0, 4, n))


def smooth(height: int, width: int) -> np.ndarray:
    """A picture that compresses: a slope and a little noise."""
    slope = np.add.outer(np.arange(height), np.arange(width))[:, :, None] + np.array([0, 60, 120])
    return (slope + RNG.integers(0, 3, (height, width, 3))).astype(np.uint8)


def hum(frames: int) -> np.ndarray:
    return (8000 * np.sin(np.arange(frames) / 20) + RNG.integers(-20, 20, frames)).astype(np.int16)


def opened(root: Path, modality: str, samples: list[Made], **prep: object) -> Split:
    return open_split(dataset(root, modality, {"val": [samples[:2], samples[2:]]}, prep=prep), "val")


def bpb(compressed: bytes, content: bytes) -> float:
    return 8 * len(compressed) / len(content)


def test_gzip_and_xz_of_a_split_are_those_of_its_bytes_end_to_end(tmp_path: Path) -> None:
    samples = [Made(text(n)) for n in (300_000, 1, 40, 5000)]  # one of more than a MiB, which is read in pieces
    content = b"".join(sample.content for sample in samples)
    told: list[int] = []
    assert codecs.baselines(opened(tmp_path, "text", samples), count=told.append) == {
        "bytes": len(content),
        "gzip_bpb": bpb(gzip.compress(content, 9), content),
        "xz_bpb": bpb(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME), content),
    }
    assert sum(told) == len(content)


def test_images_by_png_and_lossless_webp_each_as_a_file(tmp_path: Path) -> None:
    pixels = [smooth(*size) for size in [(16, 16), (9, 31), (40, 3), (1, 1)]]
    split = opened(tmp_path, "image", [picture(image) for image in pixels])
    found = codecs.baselines(split)
    sizes = {"PNG": 0, "WEBP": 0}
    for image in pixels:
        for kind, options in {"PNG": {"optimize": True}, "WEBP": {"lossless": True, "method": 4}}.items():
            file = io.BytesIO()
            Image.fromarray(image).save(file, kind, **options)
            sizes[kind] += len(file.getvalue())
            assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), image)  # lossless, or it is no baseline
    total = sum(image.size for image in pixels)
    assert found["bytes"] == total
    assert found["png_bpb"] == 8 * sizes["PNG"] / total
    assert found["webp_bpb"] == 8 * sizes["WEBP"] / total
    assert set(found) == {"bytes", "gzip_bpb", "xz_bpb", "png_bpb", "webp_bpb"}


def test_an_image_that_is_too_large_for_webp_is_measured_without_it(tmp_path: Path) -> None:
    found = codecs.baselines(opened(tmp_path, "image", [picture(smooth(1, 16384))]))
    assert "png_bpb" in found
    assert "webp_bpb" not in found


def test_audio_in_pcm16_by_flac_each_sample_as_a_file(tmp_path: Path) -> None:
    sounds = [hum(frames) for frames in (20_000, 5, 700)]
    found = codecs.baselines(opened(tmp_path, "audio", [sound(pcm) for pcm in sounds], sample_rate=16000))
    size = 0
    for pcm in sounds:
        file = io.BytesIO()
        soundfile.write(file, pcm, 16000, format="FLAC", subtype="PCM_16", compression_level=1.0)
        size += len(file.getvalue())
        file.seek(0)
        assert np.array_equal(soundfile.read(file, dtype="int16")[0], pcm)
    assert found["flac_bpb"] == 8 * size / sum(2 * len(pcm) for pcm in sounds)


def test_audio_in_mulaw8_has_no_flac(tmp_path: Path) -> None:
    split = opened(tmp_path, "audio", [Made(b"\x7f\x80" * 500, [1000], 8000)], sample_rate=8000, encoding="mulaw8")
    assert set(codecs.baselines(split)) == {"bytes", "gzip_bpb", "xz_bpb"}


def test_a_split_without_a_byte_has_no_baseline(tmp_path: Path) -> None:
    assert codecs.baselines(opened(tmp_path, "text", [])) == {"bytes": 0}


@pytest.mark.parametrize(("places", "measured"), [(1, 8000), (3, 3 * 2666)])
def test_of_a_large_split_a_part_is_measured_and_told(tmp_path: Path, places: int, measured: int) -> None:
    """The part of sound is cut between frames, for FLAC's sake."""
    split = opened(tmp_path, "audio", [sound(hum(3000)) for _ in range(10)], sample_rate=16000)
    found = codecs.baselines(split, 8001, places)
    assert found["bytes"] == measured
    parts = codecs.excerpt(split.lengths, 8001, places)
    content = b"".join(split.read(*part) for part in parts)
    assert found["gzip_bpb"] == bpb(gzip.compress(content, 9), content)
    assert [len(split.read(*part)) % 2 for part in parts] == [0] * len(parts)
    if places == 1:
        assert content == b"".join(split.read(i) for i in range(10))[:8000]


def test_memory_for_a_small_split_is_not_that_of_xz_s_largest_window(tmp_path: Path) -> None:
    """xz -9e would take 700 MB for each of the splits of a data set, however small."""
    dataset(tmp_path, "text", {"val": [[Made(text(1000))]]})
    program = (
        "import re, sys; from pathlib import Path; from mbtrain import codecs, shards; "
        "codecs.baselines(shards.open_split(sys.argv[1], 'val')); "
        # not ru_maxrss, which begins with the memory of the process that started this one
        "sys.stdout.write(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400_000  # kB


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=30),
    st.integers(1, 4000),
    st.integers(1, 12),
    st.booleans(),
)
def test_an_excerpt_is_in_order_disjoint_and_near_its_limit(
    sizes: list[int], limit: int, places: int, whole: bool
) -> None:
    lengths = np.array(sizes, np.int64)
    parts = codecs.excerpt(lengths, limit, places, whole=whole)
    begins = np.cumsum(lengths) - lengths
    spans = [(begins[i] + start, begins[i] + stop) for i, start, stop in parts]
    assert parts
    assert all(0 <= start < stop <= lengths[i] for i, start, stop in parts)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    total = sum(stop - start for start, stop in spans)
    if lengths.sum() <= limit:
        assert total == lengths.sum()
    elif whole:
        assert all(start == 0 and stop == lengths[i] for i, start, stop in parts)
    else:
        assert limit - 2 * places <= total <= max(limit, 2)
    if limit >= 4 * places and not whole:  # evenly spread: no half of the split is left out
        assert places == 1 or spans[-1][1] > lengths.sum() / 2 - limit
