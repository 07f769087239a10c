"""Damage of every kind is found and named.

pytest tests/data_prep/test_verify.py
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.build import build
from data_prep.recipe import Recipe, parse_splits
from data_prep.stats import entropy_bits, stats, table
from data_prep.text import text_modality
from data_prep.verify import verify
from mbtrain.shards import Manifest, file_sha256, load_manifest, write_manifest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of 40 documents in two splits and several shards."""
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i:02d}").write_bytes(f"{i} ".encode() * (i + 1))
    recipe = Recipe(splits=parse_splits("splits", "train=0.7,val=0.3"), shard_bytes=6000)
    build(text_modality("text"), [str(tmp_path / "in")], tmp_path / "out", recipe, workers=1)
    return tmp_path / "out"


def problems(data: Path) -> list[str]:
    return verify(data, 1)[1]


def accept(data: Path) -> Manifest:
    """Write the manifest anew from the files as they are, as one would who wants to deceive."""
    manifest = load_manifest(data)
    splits = {}
    for name, split in manifest.splits.items():
        shards = []
        for shard in split.shards:
            tar, parquet = data / name / f"{shard.name}.tar", data / name / f"{shard.name}.parquet"
            sizes = {"size_tar": tar.stat().st_size, "size_parquet": parquet.stat().st_size}
            shards.append(replace(shard, **sizes, sha256_tar=file_sha256(tar), sha256_parquet=file_sha256(parquet)))
        splits[name] = replace(split, shards=tuple(shards))
    write_manifest(data, replace(manifest, splits=splits))
    return manifest


def test_a_whole_data_set_has_no_problems(data: Path) -> None:
    manifest, found = verify(data, 2)
    assert found == []
    assert manifest == load_manifest(data)


@pytest.mark.parametrize("position", [0, 512, -1])
def test_a_flipped_bit_in_a_tar_is_found(data: Path, position: int) -> None:
    path = data / "train" / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    changed, reason = problems(data)
    assert changed.startswith(f"{path}: changed: expected sha256")
    assert reason.startswith(f"{path}: ")
    word = {0: "header is not as the index says", 512: "its hash is not", -1: "end-of-archive mark"}[position]
    assert word in reason
    accept(data)
    assert problems(data) == [reason]


def test_cut_off_missing_and_additional_files_are_found(data: Path) -> None:
    folder = data / "train"
    os.truncate(folder / "train-000000.tar", 700)
    os.truncate(folder / "train-000001.parquet", 300)
    (folder / "train-000002.tar").unlink()
    shutil.copy(data / "val" / "val-000000.tar", folder / "train-000099.tar")
    found = problems(data)
    for name, word in [
        ("train-000000.tar", "cut off"),
        ("train-000001.parquet", "cut off"),
        ("train-000002.tar", "missing"),
        ("train-000099.tar", "not in the manifest"),
    ]:
        assert any(f"{name}: {word}" in line for line in found)
    assert not any("val-" in line for line in found)


def test_content_in_two_splits_and_repeated_keys_are_found(data: Path) -> None:
    manifest = load_manifest(data)
    shard = manifest.splits["val"].shards[0]
    for end in ("tar", "parquet"):
        for path in (data / "train").glob(f"*.{end}"):
            path.unlink()
        shutil.copy(data / "val" / f"val-000000.{end}", data / "train" / f"train-000000.{end}")
    value = json.loads((data / "manifest.json").read_text())
    value["splits"]["train"] = {
        "samples": shard.samples,
        "bytes": shard.bytes,
        "shards": [{**asdict(shard), "name": "train-000000"}],
    }
    (data / "manifest.json").write_text(json.dumps(value))
    found = problems(data)
    assert sum("stands twice" in line for line in found) == shard.samples
    assert sum("stands in two splits" in line for line in found) == shard.samples
    assert len(found) == 2 * shard.samples


def test_stats_agree_with_the_documents(data: Path) -> None:
    figures = stats(data)
    documents = [f"{i} ".encode() * (i + 1) for i in range(40)]
    histogram = np.bincount(np.frombuffer(b"".join(documents), np.uint8), minlength=256)
    both = figures["splits"].values()
    assert np.array_equal(sum(np.array(split["histogram"]) for split in both), histogram)
    assert sum(split["samples"] for split in both) == figures["samples"] == 40
    assert figures["bytes"] == sum(map(len, documents))
    train = figures["splits"]["train"]
    assert train["sources"]["in"] == {key: train[key] for key in train["sources"]["in"]}
    assert train["min_bytes"] <= train["median_bytes"] <= train["max_bytes"]
    assert train["distinct_bytes"] == 11
    lines = list(table(figures))
    assert len(lines) == 1 + 2 + 1
    assert lines[1].split()[:4] == ["train", "in", str(train["samples"]), str(train["bytes"])]


def test_entropy_of_known_histograms() -> None:
    assert entropy_bits(np.ones(256, np.int64)) == 8.0
    assert entropy_bits(np.array([5, 5, 0])) == 1.0
    assert entropy_bits(np.array([7])) == 0.0
    assert entropy_bits(np.zeros(256, np.int64)) == 0.0
