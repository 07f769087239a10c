"""New sources for a finished data set: nothing that stands in it moves.

pytest tests/data_prep/test_append.py
"""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.append import append
from data_prep.build import build, merge
from data_prep.recipe import Recipe, parse_split_bytes, parse_splits
from data_prep.text import text_modality
from data_prep.verify import verify
from mbtrain.errors import DataError
from mbtrain.shards import load_manifest, open_split
from tests.data_prep.test_build import Killed, contents, counts, digests, rejections

QUICK: dict[str, Any] = {"workers": 1, "group_bytes": 5000}
RECIPE = Recipe(splits=parse_splits("splits", "train=0.7,val=0.3"), shard_bytes=12_000, exclude=("skip",))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def fill(folder: Path, seed: int, number: int) -> Path:
    """A folder of `number` files, one that is to be skipped, and a record that is bad."""
    dice = random.Random(seed)
    folder.mkdir()
    for i in range(number):
        (folder / f"{i:02d}").write_bytes(dice.randbytes(dice.randrange(1, 2000)))
    (folder / "skip").write_text("skip")
    (folder / "records.jsonl").write_text(f'{{"text": "one of {seed}"}}\n{{oops\n')
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    fill(tmp_path / "old", 1, 40)
    build(text_modality("text"), [str(tmp_path / "old")], tmp_path / "out", RECIPE, **QUICK)
    return tmp_path / "out"


def documents(out: Path) -> dict[str, list[bytes]]:
    return {split: contents(out, split) for split in ("train", "val")}


def test_old_files_stay_and_new_samples_follow(data: Path, tmp_path: Path) -> None:
    before, old, first = digests(data), documents(data), load_manifest(data)
    more = fill(tmp_path / "more", 2, 30)
    shutil.copy(tmp_path / "old" / "05", more / "copy-of-old")
    shutil.copy(more / "06", more / "copy-of-new")
    manifest = append(data, [str(more)], **QUICK)

    after, new = digests(data), documents(data)
    untouched = [name for name in before if name not in ("manifest.json", "rejected.parquet")]
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}
    for split in old:
        assert new[split][: len(old[split])] == old[split]
        assert manifest.splits[split].shards[: len(first.splits[split].shards)] == first.splits[split].shards
    build(text_modality("text"), [str(tmp_path / "old"), str(more)], tmp_path / "both", RECIPE, **QUICK)
    assert {split: set(new[split]) for split in new} == {s: set(c) for s, c in documents(tmp_path / "both").items()}
    assert manifest.counts == load_manifest(tmp_path / "both").counts == counts(found=76, duplicates=2, rejected=2)
    assert rejections(data) == rejections(tmp_path / "both")
    assert open_split(data, "train").source_names == ["old", "more"]
    assert manifest.sources["files"] == 41
    assert [entry["files"] for entry in manifest.sources["appended"]] == [33]
    assert verify(data, 1)[1] == []


def test_it_may_be_done_again_and_again(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed in (2, 3):
        append(data, [str(fill(tmp_path / f"more{seed}", seed, 10))], **QUICK)
    before = digests(data)
    append(data, [str(tmp_path / "more2")], **QUICK)
    assert "these sources are appended already" in capsys.readouterr().err
    assert digests(data) == before
    assert len(load_manifest(data).sources["appended"]) == 2
    assert verify(data, 1)[1] == []
    with pytest.raises(DataError, match="finished data set with other sources"):
        build(text_modality("text"), [str(tmp_path / "old")], data, RECIPE, **QUICK)
    later_ns = (data / "manifest.json").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "more2" / "03", ns=(later_ns, later_ns))
    with pytest.raises(DataError, match=r"were appended, but .*03 is newer"):
        append(data, [str(tmp_path / "more2")], **QUICK)


def test_the_number_of_workers_and_the_grouping_change_nothing(data: Path, tmp_path: Path) -> None:
    more = fill(tmp_path / "more", 2, 30)
    shutil.copytree(data, tmp_path / "other")
    append(data, [str(more)], **QUICK)
    append(tmp_path / "other", [str(more)], workers=2, group_bytes=1000)
    assert digests(data) == digests(tmp_path / "other")


def test_nothing_new_is_counted_too(data: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "old", tmp_path / "again")
    samples = {name: split.samples for name, split in load_manifest(data).splits.items()}
    manifest = append(data, [str(tmp_path / "again")], **QUICK)
    assert {name: split.samples for name, split in manifest.splits.items()} == samples
    assert manifest.counts == counts(found=84, duplicates=41, rejected=2)
    assert verify(data, 1)[1] == []


def test_an_unfinished_append_stands_in_no_ones_way(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(data)
    more, other = fill(tmp_path / "more", 2, 10), fill(tmp_path / "other", 3, 10)

    def stop(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.append.finish", stop)
        with pytest.raises(Killed):
            append(data, [str(more)], **QUICK)
    assert verify(data, 1)[1] == []
    build(text_modality("text"), [str(tmp_path / "old")], data, RECIPE, **QUICK)
    assert merge(data, workers=1) is not None
    assert {name: digest for name, digest in digests(data).items() if not name.startswith(".")} == before
    with pytest.raises(DataError, match="unfinished append of other sources"):
        append(data, [str(other)], **QUICK)
    shutil.copytree(data, tmp_path / "second")
    append(tmp_path / "second", [str(other)], overwrite=True, **QUICK)
    assert verify(tmp_path / "second", 1)[1] == []
    append(data, [str(more)], **QUICK)
    append(data, [str(other)], **QUICK)
    assert verify(data, 1)[1] == []
    assert not (data / ".prep").exists()


def test_what_cannot_be_appended_to_is_named(data: Path, tmp_path: Path) -> None:
    more = fill(tmp_path / "more", 2, 10)
    with pytest.raises(DataError, match="no manifest"):
        append(tmp_path, [str(more)], **QUICK)
    with pytest.raises(DataError, match="1 of 12 cannot be read"):
        append(data, [str(more)], max_reject=0, **QUICK)
    (data / "train" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar: missing"):
        append(data, [str(more)], **QUICK)
    (tmp_path / "long").write_bytes(bytes(100))
    pieces = Recipe(splits=None, split_bytes=parse_split_bytes("split_bytes", "50,50"))
    build(text_modality("text"), [str(tmp_path / "long")], tmp_path / "pieces", pieces, **QUICK)
    with pytest.raises(DataError, match="one file in pieces"):
        append(tmp_path / "pieces", [str(more)], **QUICK)


@pytest.mark.parametrize("name", ["image", "audio"])
def test_a_modality_is_made_again_from_a_manifest(name: str) -> None:
    from data_prep.audio import audio_modality
    from data_prep.image import image_modality
    from data_prep.modalities import modality_of

    options = {"encoding": "mulaw8", "sample_rate": 8000, "segment_s": 1.5}
    made = image_modality(size=32, column="a.b") if name == "image" else audio_modality(**options)
    again = modality_of(name, made.options, "x")
    assert (again.name, again.column, again.suffixes, again.options) == (
        made.name,
        made.column,
        made.suffixes,
        made.options,
    )
    for wrong in ({**made.options, "column": 3, "more": 1}, {**made.options, "new": 1}, {}):
        with pytest.raises(DataError, match="x: made by another version"):
            modality_of(name, wrong, "x")
