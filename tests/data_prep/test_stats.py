"""Figures agree with the samples, of a part as of all; the page shows samples of every split.

pytest tests/data_prep/test_stats.py
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep import stats as module
from data_prep.cli import main
from data_prep.pictures import chosen, text_head
from data_prep.stats import entropy_bits, stats, table
from data_prep.verify import verify
from mbtrain.codecs import baselines
from mbtrain.shards import open_split
from tests.handmade import Made, dataset, picture, sound

RNG = np.random.default_rng(0)
DOCUMENTS = [f"{i} ".encode() * (i + 1) for i in range(40)]
TEXTS = [Made(document) for document in DOCUMENTS]
# documents that a page could stumble over: mathtext, control characters, no character at all, right to left, one line
ODD = [b"$x^2$ \\alpha", RNG.bytes(700), b"\0\x1b[0m\r\n\tx", b"\n" * 90, "שלום 漢字 😀".encode(), b"W" * 5000]
PICTURES = [
    picture(RNG.integers(0, 256, size, np.uint8)) for size in [(1, 1, 3), (1, 90, 3), (300, 2, 3), (40, 60, 3)] * 2
]
SOUNDS = [sound(RNG.integers(-(2**loud), 2**loud, n).astype(np.int16)) for loud, n in [(15, 1), (0, 40), (9, 9000)]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    splits = {"train": [TEXTS[:20], TEXTS[20:30]], "val": [TEXTS[30:]], "test": []}
    return dataset(tmp_path / "set", "text", splits, rejected=3, duplicates=2, near_duplicates=1, passed_over=7)


def test_figures_agree_with_the_documents(data: Path) -> None:
    figures = stats(data)
    histogram = np.bincount(np.frombuffer(b"".join(DOCUMENTS), np.uint8), minlength=256)
    splits = figures["splits"].values()
    assert np.array_equal(sum(np.array(split["histogram"]) for split in splits), histogram)
    assert figures["entropy_bits_per_byte"] == entropy_bits(histogram)
    assert sum(split["samples"] for split in splits) == figures["samples"] == 40
    assert figures["bytes"] == figures["histogram_bytes"] == figures["codec_bytes"] == sum(map(len, DOCUMENTS))
    train = figures["splits"]["train"]
    assert train["sources"]["in"] == {key: train[key] for key in train["sources"]["in"]}
    assert (train["min_bytes"], train["max_bytes"]) == (len(DOCUMENTS[0]), len(DOCUMENTS[29]))
    assert train["min_bytes"] <= train["median_bytes"] <= train["max_bytes"]
    assert train["distinct_bytes"] == 11
    assert train["shapes"] is None
    assert figures["splits"]["test"]["samples"] == figures["splits"]["test"]["entropy_bits_per_byte"] == 0
    json.dumps(figures)


def test_nothing_vanishes_from_the_sum(data: Path) -> None:
    figures = stats(data)
    parts = ("samples", "duplicates", "near_duplicates", "rejected")
    assert figures["found"] == sum(figures[key] for key in parts) == 46
    lines = list(table(figures))
    assert len(lines) == 1 + 3 + 3
    assert lines[1].split()[:4] == ["train", "in", "30", str(figures["splits"]["train"]["bytes"])]
    assert lines[4].endswith("found 46 = 40 samples + 2 duplicates + 1 near-duplicates + 3 rejected")
    assert lines[5] == "passed over 7, unused bytes 0"


def test_compressors_are_those_of_each_split_and_weigh_by_bytes(data: Path) -> None:
    figures = stats(data)
    assert "gzip_bpb" not in figures["splits"]["test"]
    bits = 0.0
    for name in ("train", "val"):
        split = figures["splits"][name]
        alone = baselines(open_split(data, name))
        assert {key: split[key] for key in ("gzip_bpb", "xz_bpb")} == {
            key: alone[key] for key in alone if key != "bytes"
        }
        bits += split["xz_bpb"] * split["bytes"]
    assert math.isclose(figures["xz_bpb"], bits / figures["bytes"])


def test_of_large_data_a_part_from_every_split_is_taken_and_told(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stats(data)
    monkeypatch.setattr(module, "HISTOGRAM_BYTES", 1200)
    monkeypatch.setattr(module, "CODEC_BYTES", 600)
    part = stats(data)
    for key, expected in (("histogram_bytes", 1200), ("codec_bytes", 600)):
        assert abs(part[key] - expected) < 120
        assert all(part["splits"][name][key] > expected / 5 for name in ("train", "val"))
    assert abs(part["entropy_bits_per_byte"] - whole["entropy_bits_per_byte"]) < 0.2
    said = list(table(part))[-1]
    assert f"on {part['histogram_bytes']} bytes, evenly spread; compressors on {part['codec_bytes']} bytes" in said
    assert stats(data, full=True) == whole
    assert "over all" in list(table(whole))[-1]


def test_shapes_of_images_and_seconds_of_audio(tmp_path: Path) -> None:
    images = stats(dataset(tmp_path / "images", "image", {"train": [PICTURES[:6]], "val": [PICTURES[:1]]}))
    assert images["splits"]["train"]["shapes"] == {
        "distinct": 4,
        "common": [[1, 1, 2], [1, 90, 2], [40, 60, 1], [300, 2, 1]],
    }
    assert images["splits"]["val"]["shapes"] == {"distinct": 1, "common": [[1, 1, 1]]}
    assert {"png_bpb", "webp_bpb"} <= images.keys()
    assert any("height x width 1 x 1: 2, 1 x 90: 2" in line for line in table(images))
    audio = stats(dataset(tmp_path / "audio", "audio", {"train": [SOUNDS]}, prep={"sample_rate": 16000}))
    assert audio["splits"]["train"]["shapes"] == {"sample_rate": 16000, "seconds": 9041 / 16000}
    assert "flac_bpb" in audio


def test_entropy_of_known_histograms() -> None:
    assert entropy_bits(np.ones(256, np.int64)) == 8.0
    assert entropy_bits(np.array([5, 5, 0])) == 1.0
    assert entropy_bits(np.array([7])) == 0.0
    assert entropy_bits(np.zeros(256, np.int64)) == 0.0


# ---- the page -----------------------------------------------------------------------------------------------------


def test_the_verb_draws_a_page_beside_the_manifest(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["stats", str(data), "--json"])
    assert end.value.code == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["picture"] == str(data / "stats.png")
    with Image.open(data / "stats.png") as page:
        assert page.size == (1700, 1150)
        page.load()
    assert not list(data.glob(".*"))
    assert verify(data, 1)[1] == []


@pytest.mark.parametrize(
    ("modality", "samples", "prep"),
    [
        ("text", [Made(content) for content in ODD], {}),
        ("image", PICTURES, {}),
        ("audio", SOUNDS, {"sample_rate": 16000}),
        ("audio", [Made(bytes(range(256)) * 2, [512], 8000)], {"sample_rate": 8000, "encoding": "mulaw8"}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_page_is_drawn_of_any_samples_without_a_warning(
    tmp_path: Path, modality: str, samples: list[Made], prep: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataset(tmp_path / "a $data$ set", modality, {"train": [samples], "val": []}, prep=prep)
    with pytest.raises(SystemExit) as end:
        main(["stats", str(data), f"--out={tmp_path / 'page.png'}", "--full"])
    assert end.value.code == 0, capsys.readouterr().err
    with Image.open(tmp_path / "page.png") as page:
        sheet = np.asarray(page.convert("L"))[110:1100, :1115]
    assert (sheet < 250).mean() > 0.01  # something is there
    assert not (data / "stats.png").exists()


def test_a_page_that_cannot_be_written_is_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, message in [
        (data / "nowhere" / "x.png", "nowhere/x.png: cannot be written: No such file or directory; choose another"),
        (data / "x.jpg", "expected a file that ends in .png"),
    ]:
        with pytest.raises(SystemExit) as end:
            main(["stats", str(data), f"--out={out}"])
        assert end.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not os.path.exists(data / "x.jpg")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 16))
def test_samples_are_spread_over_the_splits_and_within_them(numbers: list[int], count: int) -> None:
    sizes = {f"split{i}": n for i, n in enumerate(numbers)}
    found = chosen(sizes, count)
    assert len(found) == len(set(found)) == min(count, sum(numbers))
    assert all(0 <= i < sizes[name] for name, i in found)
    taken = {name: sum(split == name for split, _ in found) for name in sizes}
    least = min((taken[name] for name in sizes if taken[name] < sizes[name]), default=count)
    assert max(taken.values()) <= least + 1  # none has more than its share while another has samples left
    for name, n in taken.items():
        inside = [i for split, i in found if split == name]
        assert inside == sorted(inside)
        gaps = np.diff(inside)
        assert n < 2 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("head", "lines"),
    [
        (b"one\ntwo\r\nthree", ["one", "two", "three"]),
        (b"a\tb\0c\x1b", [r"a   b\x00c\x1b"]),
        ("é".encode(), ["é"]),
        ("é".encode()[:1], [""]),  # cut off
        (b"\xff\xc3(", [r"\xff\xc3("]),
        ("a\u200bb\u2028".encode(), [r"a\xe2\x80\x8bb\xe2\x80\xa8"]),
        (b"old\rmac", [r"old\x0dmac"]),
        (b"\\x00", [r"\x00"]),
    ],
)
def test_the_head_of_a_text_shows_what_is_not_printable_as_its_bytes(head: bytes, lines: list[str]) -> None:
    assert list(text_head(head)) == lines
