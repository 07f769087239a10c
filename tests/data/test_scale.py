"""Laws that must hold at size: a million samples open and resume by their index alone, and memory does not grow.

pytest tests/data/test_scale.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from mbtrain import shards
from mbtrain.bench import inputs
from mbtrain.bench.data import reader
from mbtrain.data.rows import Stream
from mbtrain.shards import Split, open_split
from mbtrain.vocab import BOUNDARY

MILLION = 1_000_000


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A million documents of 8 KiB on average; the tars are holes."""
    return inputs.data_set(tmp_path_factory.mktemp("million"), {"train": MILLION}, 8192, sparse=True)


def test_a_million_samples_open_and_resume_by_their_index_alone(million: Path) -> None:
    """In a fresh process. 200 MB are usual, of which Python with its libraries takes 90; more than 400 is a mistake."""
    split = open_split(million, "train")
    index = sum(path.stat().st_size for path in (million / "train").glob("*.parquet"))
    tars = sum(path.stat().st_size for path in (million / "train").glob("*.tar"))
    batch = 16 * 8192
    assert tars > 8e9
    with reader() as ask:
        got = ask("opening", root=str(million), seq_len=8192, batch=16)
    assert got["read_bytes"] < index + 2 * batch + 20e6, "beside the index and one batch: libraries and the manifest"
    assert got["peak_bytes"] < 400e6
    held = sum(array.nbytes for array in (split.lengths, split.source_index)) + split.lengths.nbytes
    assert held <= 20 * MILLION, "20 bytes a sample: length, offset and source"


def test_every_cut_of_a_million_samples_is_one_row(million: Path) -> None:
    stream = Stream(open_split(million, "train"), boundary=True, seed=3)
    n = stream.ids_per_epoch // 8192
    cuts = stream.positions(np.arange(n), 8192)
    np.testing.assert_array_equal(np.sort(cuts), np.arange(n) * 8192)
    np.testing.assert_array_equal(stream.positions(np.array([n // 2]), 8192), cuts[n // 2 : n // 2 + 1])


class Numbered:
    """A split of huge documents that nobody stores: byte `at` of document i is a function of both."""

    name = "made"

    def __init__(self, lengths: np.ndarray):
        self.lengths = lengths

    @staticmethod
    def byte(sample: int, at: np.ndarray) -> np.ndarray:
        return ((at * 31 + sample * 7919) % 251).astype(np.uint8)

    def read_many(self, samples: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> bytes:
        rows = zip(samples.tolist(), starts.tolist(), stops.tolist(), strict=True)
        return b"".join(self.byte(i, np.arange(start, stop)).tobytes() for i, start, stop in rows)


def test_positions_beyond_32_bits_are_read_as_the_naive_concatenation() -> None:
    """3 TB in 300,000 documents, some of them empty, some above 4 GiB."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 20_000_000, 300_000)
    lengths[rng.integers(0, len(lengths), 20)] = 5 * 2**30
    lengths[rng.integers(0, len(lengths), 20_000)] = rng.integers(0, 40, 20_000)
    stream = Stream(cast(Split, Numbered(lengths)), boundary=True, seed=1)
    epoch = stream.epoch(0)
    ends = np.cumsum(lengths[epoch.order] + 1)
    assert ends[-1] == stream.ids_per_epoch > 2**41
    long = np.flatnonzero(lengths[epoch.order] > 2**32)[0]
    at = np.array([2**31 - 5, 2**32 - 5, 2**41, ends[long] - 100, ends[long] - 2**32 - 7, ends[-1] - 300])
    rows, mask = stream.read_rows(at, 256)
    assert mask is None
    for position, row in zip(at.tolist(), rows, strict=True):
        for offset in (0, 1, 100, 254, 255):
            i = int(np.searchsorted(ends, position + offset, side="right"))
            sample, begin = int(epoch.order[i]), int(ends[i]) - int(lengths[epoch.order[i]]) - 1
            inside = position + offset - begin
            wanted = BOUNDARY if inside == lengths[sample] else Numbered.byte(sample, np.array([inside]))[0]
            assert row[offset] == wanted, (position, offset)


def test_many_reads_at_once_are_single_reads_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From more shards than may be open, and where a call returns less than it was asked for."""
    monkeypatch.setattr(inputs, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 3)
    split = open_split(inputs.data_set(tmp_path, {"train": 200}, 1000), "train")
    assert len(split.manifest.splits["train"].shards) > 10
    rng = np.random.default_rng(0)
    samples = rng.integers(0, len(split), 300)
    starts = rng.integers(0, 400, 300)
    stops = np.minimum(starts + rng.integers(0, 1200, 300), split.lengths[samples] + 1)  # some with a boundary's byte
    whole = [split.read(i) + b"?" for i in range(len(split))]
    wanted = b"".join(whole[i][a:b] for i, a, b in zip(samples, starts, stops, strict=True))
    meaning = np.ones(len(wanted), bool)
    meaning[(stops - starts).cumsum()[stops > split.lengths[samples]] - 1] = False
    assert 0 < (~meaning).sum() < len(samples)

    pread, before, held = os.pread, len(os.listdir("/proc/self/fd")), []

    def counted(descriptor: int, size: int, position: int) -> bytes:
        held.append(len(os.listdir("/proc/self/fd")) - before)
        return pread(descriptor, size, position)

    def short(descriptor: int, size: int, position: int) -> bytes:
        return pread(descriptor, -(-size // 2), position)

    split.close()
    for replaced in (counted, short):
        monkeypatch.setattr(os, "pread", replaced)
        got = split.read_many(samples, starts, stops)
        assert len(got) == len(wanted)
        assert (np.frombuffer(got, np.uint8) == np.frombuffer(wanted, np.uint8))[meaning].all()
    assert max(held) <= 3 + 1


def growth(folder: Path, documents: int, n_batches: int) -> float:
    """Bytes that the loader's process has more after so many batches than after a tenth of them."""
    root = str(inputs.data_set(folder, {"train": documents}, 8192))
    with reader() as ask:
        resident = ask("growth", root=root, seq_len=512, batch=8, n_batches=n_batches)["resident_bytes"]
    return resident["100"] - resident["10"]


def test_the_loader_does_not_grow_over_some_thousand_batches(tmp_path: Path) -> None:
    """Some 50 epochs of a small data set; a leak of a row's bytes a batch would be 2 MB and more."""
    assert growth(tmp_path, 60, 5000) < 1e6


@pytest.mark.slow
def test_the_loader_does_not_grow_over_a_hundred_thousand_batches(tmp_path: Path) -> None:
    assert growth(tmp_path, 2400, 100_000) < 1e6
