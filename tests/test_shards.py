"""The shard format: what was prepared is read back byte for byte, and what is damaged is named.

pytest tests/test_shards.py
"""

import errno
import json
import multiprocessing
import os
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.build import build
from data_prep.recipe import Recipe, parse_splits
from data_prep.text import text_modality
from mbtrain import shards
from mbtrain.errors import DataError
from mbtrain.shards import dataset_hash, load_manifest, open_split, write_manifest

DOCUMENTS = [f"document {i} ".encode() * (1 + i * 7 % 50) for i in range(60)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of two sources in several shards, one split."""
    for i, document in enumerate(DOCUMENTS):
        folder = tmp_path / ("even" if i % 2 == 0 else "odd")
        folder.mkdir(exist_ok=True)
        (folder / f"{i:03d}.txt").write_bytes(document)
    recipe = Recipe(splits=parse_splits("splits", "train=1"), shard_bytes=8192)
    out = tmp_path / "out"
    build(text_modality("text"), [str(tmp_path / "even"), str(tmp_path / "odd")], out, recipe, workers=1)
    return out


def damage(path: Path, position: int) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit_manifest(root: Path, **changes: object) -> None:
    path = root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_reads_every_sample_by_number(data: Path) -> None:
    split = open_split(data, "train", check="full")
    expected = DOCUMENTS[::2] + DOCUMENTS[1::2]
    assert len(split) == 60
    assert len(split.manifest.splits["train"].shards) > 3
    assert [split.read(i) for i in range(60)] == expected
    assert split.lengths.dtype == np.int64
    assert split.lengths.tolist() == [len(document) for document in expected]
    assert [split.source_names[n] for n in split.source_index] == ["even"] * 30 + ["odd"] * 30
    assert split.read(5, 3, 9) == expected[5][3:9]
    assert split.read(5, 3) == expected[5][3:]
    assert split.read(5, 4, 4) == b""


def test_reading_outside_of_a_sample_is_an_error(data: Path) -> None:
    split = open_split(data, "train")
    for arguments in [(60,), (-1,), (0, -1), (0, 5, 4), (0, 0, int(split.lengths[0]) + 1)]:
        with pytest.raises(IndexError):
            split.read(*arguments)


def test_key_is_the_start_of_the_content_hash(data: Path) -> None:
    import hashlib

    split = open_split(data, "train")
    for i in (0, 17, 59):
        assert split.key(i) == hashlib.sha256(split.read(i)).hexdigest()[:32]


def test_open_files_are_bounded_and_threads_may_share_a_split(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    split = open_split(data, "train")
    before = len(os.listdir("/proc/self/fd"))
    expected = DOCUMENTS[::2] + DOCUMENTS[1::2]
    wrong: list[int] = []

    def reader(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 60, 300).tolist():
            if split.read(i) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    split.close()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert split.read(0) == expected[0]


def test_reads_after_a_fork_that_copied_a_held_lock(data: Path) -> None:
    split = open_split(data, "train")
    split.read(0)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with split._lock:
        child = context.Process(target=lambda: answers.put([split.read(0), split.read(59)]))
        child.start()
    child.join(10)
    assert child.exitcode == 0
    assert answers.get() == [split.read(0), split.read(59)]


def test_a_split_can_be_pickled(data: Path) -> None:
    split = open_split(data, "train")
    split.read(0)
    again = pickle.loads(pickle.dumps(split))  # noqa: S301 - our own bytes
    assert again.read(33) == split.read(33)


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.parquet"])
def test_a_cut_off_longer_or_missing_file_is_named(data: Path, name: str) -> None:
    path = data / "train" / name
    content = path.read_bytes()
    for change, word in [(content[:-1], "cut off"), (content + b"\0", "too long")]:
        path.write_bytes(change)
        with pytest.raises(DataError, match=f"{name}: {word}: expected .* bytes, got"):
            open_split(data, "train")
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        open_split(data, "train")


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.parquet"])
def test_a_flipped_bit_is_found_by_the_full_check(data: Path, name: str) -> None:
    path = data / "train" / name
    damage(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=f"{name}: changed: expected sha256"):
        open_split(data, "train", check="full")


def test_a_flipped_bit_in_a_page_of_the_index_is_found_without_the_full_check(data: Path) -> None:
    path = data / "train" / "train-000000.parquet"
    content = path.read_bytes()
    found = 0
    for position in range(4, len(content) - 8, 97):
        damage(path, position)
        try:
            split = open_split(data, "train")
        except DataError as error:
            assert "train-000000.parquet" in str(error)  # noqa: PT017 - either outcome is allowed
            found += 1
        else:  # in a column that is not read here
            assert split.read(0) == DOCUMENTS[0]
        path.write_bytes(content)
    assert found


def test_a_tar_that_is_cut_off_after_opening_is_named(data: Path) -> None:
    split = open_split(data, "train")
    os.truncate(data / "train" / "train-000000.tar", 515)
    with pytest.raises(DataError, match=r"train-000000\.tar: cut off: sample 0"):
        split.read(0)


def test_a_disk_that_fails_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a DataError, which all ranks are told of; an OSError would leave the others waiting in a collective."""
    split = open_split(data, "train")

    def fail(*_: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"train-\d{6}\.tar: cannot be read: Input/output error"):
        split.read(0)
    with pytest.raises(DataError, match=r"train-\d{6}\.tar: cannot be read: Input/output error"):
        split.read_many(np.array([0]), np.array([0]), np.array([1]))


def test_manifest_round_trip_and_hash(data: Path, tmp_path: Path) -> None:
    manifest = load_manifest(data)
    (tmp_path / "copy").mkdir()
    write_manifest(tmp_path / "copy", manifest)
    assert load_manifest(tmp_path / "copy") == manifest
    assert os.listdir(tmp_path / "copy") == ["manifest.json"]
    assert dataset_hash(manifest) == dataset_hash(replace(manifest, prep={}))
    train = manifest.splits["train"]
    other = replace(train, shards=(replace(train.shards[0], sha256_tar="0" * 64), *train.shards[1:]))
    assert dataset_hash(manifest) != dataset_hash(replace(manifest, splits={"train": other}))


def test_a_manifest_that_is_missing_cut_off_or_of_another_kind_is_an_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest"):
        load_manifest(tmp_path)
    with pytest.raises(DataError, match="expected a folder"):
        load_manifest(data / "manifest.json")
    with pytest.raises(DataError, match="no split 'valid'; this data set has train"):
        open_split(data, "valid")
    whole = (data / "manifest.json").read_text()
    good = json.loads(whole)["splits"]["train"]
    for changes, message in [
        ({"schema_version": 3}, "schema_version: expected 2, got 3"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"modality": "smell"}, "modality: expected one of text, image, audio, got 'smell'"),
        ({"documents": "some"}, "documents: expected 'whole' or 'pieces'"),
        ({"splits": {"train": {**good, "samples": 61}}}, "samples: expected 60 .* got 61"),
        ({"splits": {"train": {**good, "samples": "60"}}}, "samples: expected int, got str"),
        ({"splits": {"../train": good}}, "not a split's name"),
        ({"splits": {"train": {**good, "shards": good["shards"][1:]}}}, "expected shard train-000000"),
        ({"counts": {}}, "the key 'found' is missing"),
        ({"prep": {"size": 1}}, "changed: its own sha256 does not fit it"),
    ]:
        edit_manifest(data, **changes)
        with pytest.raises(DataError, match=message) as error:
            load_manifest(data)
        assert "\n" not in str(error.value)
        (data / "manifest.json").write_text(whole)
    (data / "manifest.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut off or not JSON"):
        load_manifest(data)


def test_a_file_gets_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write_half() -> None:
        with shards.whole_file(path) as out:
            out.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert os.listdir(tmp_path) == []
    with shards.whole_file(path) as out:
        out.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
