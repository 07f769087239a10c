"""Whatever state a run is in, it is shown with what it has; what is missing is said; nothing else is looked at.

pytest tests/compare/test_reading.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mbtrain import metrics
from mbtrain.compare import reading
from mbtrain.errors import MbtrainError
from tests.compare import made


def test_a_finished_run(tmp_path: Path) -> None:
    run = reading.read(made.run(tmp_path / "a"), "a")
    assert run.score == pytest.approx(made.bpb_at(100, 2.0) + 0.1)
    assert len(run.train.bpb) == 100
    assert len(run.val.bpb) == len(run.partial.bpb) == 1
    assert run.spent("bytes") == 100 * made.STEP_BYTES
    assert run.flops_per_byte == made.FLOPS_PER_BYTE
    assert run.perf["perf/bytes_per_s"] == 5050.5
    assert run.perf["mem/peak_bytes"] == 1_000_100
    assert run.origin.kind == "megabyte"
    assert run.origin.stages == "2x32 every 4 B + 2x16"
    assert run.origin.parameters == 12345
    assert run.origin.status == "finished"
    assert [sample.content for sample in run.samples] == [b"a sample\n"]
    assert run.settings["model.stages.0.patch_size"] == "4"
    assert run.notes == ()


def test_a_validation_tells_no_flops_and_has_those_of_its_bytes(tmp_path: Path) -> None:
    run = reading.read(made.run(tmp_path / "a"), "a")
    assert run.val.costs["flops"].tolist() == [100 * made.STEP_BYTES * made.FLOPS_PER_BYTE]
    assert run.partial.costs["minutes"].tolist() == [0.5]


def test_a_run_of_an_older_schema(tmp_path: Path) -> None:
    """Bytes follow from the batch, minutes from the time of day; FLOPs are not known."""
    folder = made.damaged(made.run(tmp_path / "a"), metrics__jsonl=b"", environment__json=None)
    for step in (10, 20, 30):
        metrics.append(folder / "metrics.jsonl", step, {"time_unix_s": 1e9 + 60 * step, "train/bpb": 3.0})
    (folder / "config.yaml").write_text("model: {width: 3}\ntrain: {global_batch_size: 4}\ndata: {seq_len: 32}\n")
    run = reading.read(folder, "a")
    assert run.train.costs["bytes"].tolist() == [10 * 128, 20 * 128, 30 * 128]
    assert run.train.costs["minutes"].tolist() == [0, 10, 20]
    assert np.isnan(run.train.costs["flops"]).all()
    assert run.origin.parameters is None
    assert run.settings["model.width"] == "3"
    assert any("another version" in note for note in run.notes)


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = made.run(tmp_path / "a")
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    broken = [b"{half\n", b"[]\n", b"\xff\xfe\n", b'{"step": "x"}\n', b"\n"]
    path.write_bytes(b"".join([*lines[:50], *broken, *lines[50:], b'{"step": 101, "train/bp']))
    run = reading.read(folder, "a")
    assert len(run.train.bpb) == 100
    assert run.notes == ("5 damaged lines of metrics.jsonl left out",)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"metrics__jsonl": None}, "no metrics"),
        ({"metrics__jsonl": b""}, "no metrics"),
        ({"config__yaml": None}, "no configuration"),
        ({"config__yaml": b"{"}, "config.yaml is damaged"),
        ({"config__yaml": b"[1]"}, "config.yaml is damaged"),
        ({"config__yaml": b"a" * (2 << 20)}, "config.yaml is too large to be looked at"),
        ({"environment__json": b"[]"}, "environment.json is damaged"),
        ({"environment__json": b"{" * 99999}, "environment.json is damaged"),
        ({"status__json": b"1"}, "status.json is damaged"),
        ({"eval_val_basic__json": b'{"bpb": "x"}'}, "eval_val_basic.json tells no bpb"),
        ({"samples/step_0000000200__png": b"<svg>"}, "is no .png file"),
    ],
)
def test_what_is_missing_or_odd_is_said(tmp_path: Path, values: dict[str, bytes | None], note: str) -> None:
    run = reading.read(made.damaged(made.run(tmp_path / "a"), **values), "a")
    assert note in "; ".join(run.notes)


@pytest.mark.parametrize(
    "told",
    [
        {"tags": 3, "data": [7, {"name": [1], "modality": {}}], "model": {"parameters": "many"}, "device": [2]},
        {"tags": {"dataset_hash": 5}, "data": "text", "model": [1]},
    ],
)
def test_an_environment_of_other_kinds(tmp_path: Path, told: dict[str, object]) -> None:
    run = reading.read(made.damaged(made.run(tmp_path / "a"), environment__json=json.dumps(told).encode()), "a")
    assert run.score > 2


def test_values_that_are_no_numbers_are_no_points(tmp_path: Path) -> None:
    folder = made.damaged(made.run(tmp_path / "a"), metrics__jsonl=b"")
    odd = ['"nan"', '"text"', "true", "[1]", "null", "1" + "0" * 400]
    lines = [f'{{"step": {i}, "train/bpb": {value}, "val/bpb": {value}}}\n' for i, value in enumerate(odd)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    run = reading.read(folder, "a")
    assert not np.isfinite(run.train.bpb).any()
    assert math.isnan(run.spent("flops"))


def test_a_configuration_that_refers_to_itself_ends(tmp_path: Path) -> None:
    many = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    for text in ("a: &a {b: *a, c: *a}\n", "a: &a [*a, *a]\n", many):
        folder = made.run(tmp_path / str(len(text)))
        (folder / "config.yaml").write_text(text)
        settings = reading.read(folder, "a").settings
        assert all(len(value) <= 200 for value in settings.values())
        assert len(settings) <= reading.MAX_SETTINGS


def test_links_out_of_the_run_are_not_followed(tmp_path: Path) -> None:
    """A run directory that came from elsewhere may name any file of this user's; the page may be passed on."""
    (tmp_path / "secret.txt").write_text("of this user")
    folder = made.run(tmp_path / "a")
    for name in ("samples/step_0000000999.txt", "eval_val_x.json"):
        (folder / name).symlink_to(tmp_path / "secret.txt")
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(tmp_path / "secret.txt")
    run = reading.read(folder, "a")
    assert [sample.content for sample in run.samples] == [b"a sample\n"]
    assert "of this user" not in repr(run)


def test_evaluations_and_their_intervals(tmp_path: Path) -> None:
    folder = made.run(tmp_path / "a")
    told = {"bpb": 2.1, "bpb_low": 2.0, "bpb_high": 2.2, "bytes": 5, "split": "test", "mode": "sliding", "step": 100}
    (folder / "eval_test_sliding.json").write_text(json.dumps(told))
    (folder / "eval_val_basic.json").write_text(json.dumps({**told, "bpb_low": None, "bpb_high": None, "step": 7}))
    run = reading.read(folder, "a")
    assert run.evaluated[0] == reading.Evaluated("test", "sliding", 2.1, 2.0, 2.2)
    assert math.isnan(run.evaluated[1].low)
    assert run.notes == ("eval_val_basic.json is of step 7, the run of 100",)


def test_what_names_a_run(tmp_path: Path) -> None:
    folder = made.run(tmp_path / "a")
    (folder / "checkpoints" / "step_0000000100").mkdir(parents=True)
    assert reading.find(folder / "checkpoints" / "step_0000000100") == reading.find(folder) == folder
    for path in (tmp_path, tmp_path / "not there", "x" * 5000, tmp_path / "a" / "config.yaml"):
        with pytest.raises(MbtrainError, match="expected a run directory"):
            reading.find(path)


def test_the_newest_samples_of_each_kind(tmp_path: Path) -> None:
    folder = made.run(tmp_path / "a")
    for step, suffix, content in ((300, "png", made.png()), (400, "wav", made.wav()), (50, "txt", b"old")):
        (folder / "samples" / f"step_{step:010d}.{suffix}").write_bytes(content)
    (folder / "samples" / ".hidden.txt").write_bytes(b"somebody's work")
    assert [sample.suffix for sample in reading.read(folder, "a").samples] == [".wav", ".png"]
