"""Damage of every kind is found and named; and other programs read the shards.

pytest tests/data_prep/test_verify.py
"""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.cli import main
from data_prep.verify import VerifyJob, check_shard, verify
from mbtrain.errors import DataError
from mbtrain.shards import Manifest, file_sha256, load_manifest, open_split, write_manifest
from tests.handmade import Made, dataset, picture, sound

RNG = np.random.default_rng(0)
TEXTS = [Made(f"{i} ".encode() * (1 + 37 * i % 200)) for i in range(12)]
PICTURES = [picture(RNG.integers(0, 256, (h, w, 3), np.uint8)) for h, w in [(8, 8), (5, 7), (1, 40), (16, 3)]]
SOUNDS = [sound(RNG.integers(-9999, 9999, frames).astype(np.int16)) for frames in (700, 1, 256, 300)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three shards in two splits, and something that was rejected."""
    splits = {"train": [TEXTS[:5], TEXTS[5:9]], "val": [TEXTS[9:]]}
    return dataset(tmp_path / "set", "text", splits, rejected=3, duplicates=2)


def problems(data: Path) -> list[str]:
    return verify(data, 1)[1]


def files(data: Path) -> list[Path]:
    return sorted(path for path in data.rglob("*") if path.is_file())


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


def edit_index(path: Path, row: int, **changes: Any) -> None:
    """Write other values into a row of an index."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row] |= changes
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def flip(path: Path, position: int, mask: int) -> bytes:
    """Flip bits of one byte; returns the content that was."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[position] ^= mask
    path.write_bytes(changed)
    return before


# ---- what is whole ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modality", "samples", "prep"),
    [("text", TEXTS, {}), ("image", PICTURES, {"size": None}), ("audio", SOUNDS, {"sample_rate": 16000})],
)
def test_a_whole_data_set_has_no_problems_and_other_programs_read_it(
    tmp_path: Path, modality: str, samples: list[Made], prep: dict[str, Any]
) -> None:
    import webdataset

    data = dataset(tmp_path / "set", modality, {"train": [samples[:2], samples[2:]]}, prep=prep)
    manifest, found = verify(data, 2)
    assert found == []
    assert manifest == load_manifest(data)

    split = open_split(data, "train")
    expected = {split.key(i): split.read(i) for i in range(len(split))}
    assert list(expected.values()) == [sample.content for sample in samples]
    extension = {"text": "text", "image": "rgb", "audio": "pcm"}[modality]
    tars = sorted(str(path) for path in (data / "train").glob("*.tar"))
    read = {item["__key__"]: item[extension] for item in webdataset.WebDataset(tars, shardshuffle=False)}
    assert read == expected
    (tmp_path / "unpacked").mkdir()
    for tar in tars:
        subprocess.run(["tar", "-xf", tar, "-C", str(tmp_path / "unpacked")], check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "unpacked").iterdir()} == {
        f"{key}.{extension}": content for key, content in expected.items()
    }


# ---- one byte -----------------------------------------------------------------------------------------------------


def test_any_changed_byte_of_the_manifest_is_found(data: Path) -> None:
    path = data / "manifest.json"
    whole = path.read_bytes()
    rng = random.Random(1)
    for position in range(len(whole)):
        flip(path, position, rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)]))
        with pytest.raises(DataError, match=r"manifest\.json") as error:
            load_manifest(data)
        assert "\n" not in str(error.value)
        path.write_bytes(whole)
    for other in (whole + b"\n", whole + b" ", whole[:-1], b" " + whole, whole.replace(b'": ', b'" : ', 1), b""):
        path.write_bytes(other)
        with pytest.raises(DataError, match=r"manifest\.json"):
            load_manifest(data)


def test_any_flipped_byte_of_a_data_set_is_found_and_its_file_named(data: Path) -> None:
    rng = random.Random(2)
    for path in files(data):
        size = path.stat().st_size
        for position in {0, 511, size - 1, *(rng.randrange(size) for _ in range(30))}:
            content = flip(path, position, 1 << rng.randrange(8))
            try:
                found = problems(data)
            except DataError as error:
                found = [str(error)]
            assert found, (path, position)
            assert all(line.startswith(f"{path}: ") for line in found), (path, position, found)
            assert not any("\n" in line for line in found)
            path.write_bytes(content)
    assert problems(data) == []


def test_any_flipped_byte_of_a_tar_names_the_sample_that_it_lies_in(data: Path) -> None:
    """Of its header, its content and its padding; past the last sample, the end-of-archive mark."""
    manifest = load_manifest(data)
    shard = manifest.splits["train"].shards[0]
    path = data / "train" / f"{shard.name}.tar"
    rows = pq.read_table(path.with_suffix(".parquet")).to_pylist()
    job = VerifyJob(data / "train", shard, "text", {})
    rng = random.Random(3)
    named = set()
    for position in rng.sample(range(path.stat().st_size), 600):
        content = flip(path, position, rng.randrange(1, 256))
        changed, *reasons = check_shard(job, lambda size: None).problems
        inside = [row["key"] for row in rows if position < row["offset"] + -(-row["bytes"] // 512) * 512]
        name = inside[0] if inside else "the end-of-archive mark"
        assert changed.startswith(f"{path}: changed: expected sha256")
        assert [name in reason for reason in reasons] == [True], (position, reasons)
        named.add(name)
        path.write_bytes(content)
    assert len(named) == len(rows) + 1


def test_a_flip_that_the_manifest_was_made_to_accept_is_found_in_the_sample(data: Path) -> None:
    path = data / "train" / "train-000001.tar"
    for position, word in [(0, "header is not as the index says"), (512, "its hash is not"), (-1, "end-of-archive")]:
        content = flip(path, position, 4)
        accept(data)
        (reason,) = problems(data)
        assert reason.startswith(f"{path}: ")
        assert word in reason
        path.write_bytes(content)


# ---- files --------------------------------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_or_too_long_is_found(data: Path) -> None:
    rng = random.Random(4)
    for path in files(data):
        content = path.read_bytes()
        changes = [content[: rng.randrange(len(content))] for _ in range(8)]
        for change in [b"", content[:-1], content + b"\0", content + bytes(10240), content[512:], *changes]:
            path.write_bytes(change)
            try:
                found = problems(data)
            except DataError as error:
                found = [str(error)]
            assert found, path
            assert all(line.startswith(f"{path}: ") for line in found), found
        path.write_bytes(content)


def test_a_cut_off_tar_names_the_first_sample_that_is_not_whole(data: Path) -> None:
    path = data / "train" / "train-000000.tar"
    rows = pq.read_table(path.with_suffix(".parquet")).to_pylist()
    os.truncate(path, rows[2]["offset"] + 3)
    size, sample = problems(data)
    assert size.startswith(f"{path}: cut off: expected")
    assert sample == f"{path}: {rows[2]['key']}: cut off, and the 2 samples after it are missing"


def test_missing_and_additional_files_are_found(data: Path) -> None:
    shutil.copy(data / "val" / "val-000000.tar", data / "train" / "train-000099.tar")
    (data / "train" / "train-000001.tar").unlink()
    (data / "val" / "val-000000.parquet").unlink()
    (data / "rejected.parquet").unlink()
    (data / "test").mkdir()
    (data / "test" / "test-000000.tar").touch()
    (data / "stats.png").touch()
    assert problems(data) == [
        f"{data}/train/train-000001.tar: missing",
        f"{data}/val/val-000000.parquet: missing",
        f"{data}/rejected.parquet: missing, and 3 were rejected",
        f"{data}/test/test-000000.tar: not in the manifest",
        f"{data}/train/train-000099.tar: not in the manifest",
    ]


def test_rejections_that_do_not_fit_the_manifest_are_found(data: Path, tmp_path: Path) -> None:
    path, manifest = data / "rejected.parquet", load_manifest(data)
    pq.write_table(pq.read_table(path).slice(1), path)
    assert [line.split(": ")[1] for line in problems(data)] == ["changed"]
    write_manifest(data, replace(manifest, rejected_sha256=file_sha256(path)))
    assert problems(data) == [f"{path}: expected 3 rows, one of each that was rejected, got 2"]
    other = dataset(tmp_path / "other", "text", {"train": [TEXTS]})
    shutil.copy(path, other / path.name)
    assert problems(other) == [f"{other / path.name}: not in the manifest, by which nothing was rejected"]


# ---- what does not fit together -----------------------------------------------------------------------------------


def test_an_index_that_does_not_fit_its_tar_is_found(tmp_path: Path) -> None:
    """Two shards of samples of the same lengths, with their indices exchanged."""
    samples = [Made(bytes([i]) * 600) for i in range(20)]
    data = dataset(tmp_path / "set", "text", {"train": [samples[:10], samples[10:]]})
    first, second = (data / "train" / f"train-{number:06d}.parquet" for number in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000.\.parquet: .*; prepare the data again"):
        open_split(data, "train", check="full")
    changed, *reasons = problems(data)[:7]
    assert ": expected" in changed  # another size or sha256
    assert all(line.startswith(f"{first}: ") for line in reasons)  # since the tar is as it was made
    accept(data)
    found = problems(data)
    assert len(found) == 2 * (5 + 1)
    assert found[0].endswith("the tar's header is not as the index says")
    assert found[5] == f"{first.with_suffix('.tar')}: and 15 more"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 513}, "the index says offset 513, expected 512"),
        ({"offset": -5}, "the index says offset -5, expected 512"),
        ({"bytes": 7}, "its padding is not zero|its hash is not"),
        ({"bytes": -1}, "expected a length, got -1 bytes"),
        ({"bytes": 2**32}, "cut off, and the 4 samples after it are missing"),
        ({"key": "a/b"}, "header is not as the index says"),
        ({"key": "x" * 101}, "no name for a tar's member"),
        ({"key": "\u00e9"}, "no name for a tar's member"),
        ({"key": None}, "no value in column 'key', row 0"),
        ({"hash": "0" * 64}, "its hash is not as the index says"),
        ({"modality": "image"}, "expected modality text, got image"),
        ({"shape": [1, 2, 3]}, "expected neither shape nor sample rate"),
    ],
)
def test_a_wrong_value_in_an_index_is_found(data: Path, changes: dict[str, Any], message: str) -> None:
    import re

    path = data / "train" / "train-000000.parquet"
    edit_index(path, 0, **changes)
    accept(data)
    found = problems(data)
    assert any(re.search(message, line) for line in found), found
    assert all("train-000000." in line for line in found)


def test_an_index_that_lost_a_column_is_named(data: Path) -> None:
    path = data / "train" / "train-000000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["hash"]), path)
    accept(data)
    assert [line.startswith(f"{path}: the index cannot be read") for line in problems(data)] == [True]


@pytest.mark.parametrize(
    ("modality", "samples", "prep", "changes"),
    [
        ("image", PICTURES, {}, {"shape": [8, 7, 3]}),
        ("image", PICTURES, {}, {"shape": [64, 1, 1]}),
        ("image", PICTURES, {}, {"shape": None}),
        ("image", PICTURES, {}, {"sample_rate": 1}),
        ("audio", SOUNDS, {"sample_rate": 16000}, {"sample_rate": 8000}),
        ("audio", SOUNDS, {"sample_rate": 16000}, {"shape": [701]}),
        ("audio", SOUNDS, {"sample_rate": 16000, "encoding": "mulaw8"}, {}),
    ],
)
def test_a_shape_or_rate_that_does_not_fit_is_found(
    tmp_path: Path, modality: str, samples: list[Made], prep: dict[str, Any], changes: dict[str, Any]
) -> None:
    data = dataset(tmp_path / "set", modality, {"train": [samples]}, prep=prep)
    path = data / "train" / "train-000000.parquet"
    edit_index(path, 0, **changes)
    accept(data)
    found = problems(data)
    assert found[0].startswith(f"{path}: ")
    assert "do not fit" in found[0]


def test_content_in_two_splits_and_repeated_keys_are_found(tmp_path: Path) -> None:
    data = dataset(tmp_path / "set", "text", {"train": [TEXTS[:6], TEXTS[5:6]], "val": [TEXTS[4:6]]})
    train, second, val = (data / name for name in ("train/train-000000", "train/train-000001", "val/val-000000"))
    keys = [row["key"] for row in pq.read_table(f"{val}.parquet").to_pylist()]
    found = problems(data)
    assert len(found) == 4
    for key, other in zip(keys, (val, second), strict=True):
        assert any(
            line == f"{train}.parquet: the key {key} stands twice, there and in {other}.parquet" for line in found
        )
        assert any(line.startswith(f"{train}.parquet: the document with hash {key}") for line in found)


def test_many_problems_of_a_kind_are_counted_not_listed(tmp_path: Path) -> None:
    data = dataset(tmp_path / "set", "text", {"train": [TEXTS], "val": [TEXTS]})
    found = problems(data)
    assert len(found) == 2 * (5 + 1)
    assert sum("and 7 more" in line for line in found) == 2


# ---- the verb -----------------------------------------------------------------------------------------------------


def another_version(data: Path) -> str:
    path = data / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 1}))
    return r"manifest\.json: schema_version: expected 2, got 1; prepare the data again"


def flipped(data: Path) -> str:
    path = data / "train" / "train-000000.tar"
    row = pq.read_table(path.with_suffix(".parquet")).to_pylist()[3]
    flip(path, row["offset"] + 1, 1)
    return f"{row['key']}: changed: its hash is not as the index says"


def missing(data: Path) -> str:
    (data / "val" / "val-000000.tar").unlink()
    return r"val-000000\.tar: missing; copy the data set again, or make it again with --overwrite"


@pytest.mark.parametrize("damage", [another_version, flipped, missing])
def test_the_verb_says_file_cause_and_remedy_and_exits_with_2(
    data: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], str]
) -> None:
    import re

    message = damage(data)
    with pytest.raises(SystemExit) as end:
        main(["verify", str(data), "--workers=1"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert re.search("again", said.splitlines()[-1])
