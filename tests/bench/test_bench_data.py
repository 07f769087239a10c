"""`mbtrain bench data` measures what it says, on inputs that are what they say. Speeds themselves are no test.

pytest tests/bench/test_bench_data.py
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.verify import verify
from mbtrain.bench import VERBS, inputs, reading
from mbtrain.bench.data import Bench, Figure, Sizes, prepare, reader
from mbtrain.data.rows import Stream
from mbtrain.errors import ConfigError, MbtrainError
from mbtrain.media.image import decode
from mbtrain.shards import dataset_hash, load_manifest, open_split

MODULE = sys.modules["mbtrain.bench.data"]
TINY = Sizes(200_000, 20_000, 4, 2, 60, 100, 500, 900, 50, 2)


def bench(folder: Path, **given: Any) -> Bench:
    """A measurement of next to nothing in this folder."""
    return Bench(folder, TINY, 2, **{"text": "", "images": "", "config": "", **given})


# ---- inputs -------------------------------------------------------------------------------------------------------


def test_a_made_data_set_is_whole_by_verify_and_by_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SHARD_BYTES", 100_000)
    root = inputs.data_set(tmp_path / "set", {"train": 120, "val": 3}, 1000)
    manifest, problems = verify(root, 1)
    assert problems == []
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 120, "val": 3}
    assert len(manifest.splits["train"].shards) > 1
    split = open_split(root, "train")
    assert 500 <= split.lengths.min() < split.lengths.max() <= 1500
    with tarfile.open(root / "train" / "train-000000.tar") as tar:
        for i, member in enumerate(tar):
            file = tar.extractfile(member)
            assert file is not None
            assert file.read() == split.read(i)


def test_the_same_arguments_make_the_same_inputs(tmp_path: Path) -> None:
    sets = [inputs.data_set(tmp_path / name, {"train": 40}, 500) for name in "ab"]
    assert len({dataset_hash(load_manifest(root)) for root in sets}) == 1
    texts = [inputs.texts(tmp_path / name, 90_000) for name in "cd"]
    pictures = [inputs.pictures(tmp_path / name, 2) for name in "ef"]
    for folders in (texts, pictures):
        contents = [[path.read_bytes() for path in reading.files(str(folder))] for folder in folders]
        assert contents[0] == contents[1]
        assert len(set(contents[0])) == len(contents[0]) > 1


def test_a_sparse_data_set_takes_no_room_and_reads_as_zeros(tmp_path: Path) -> None:
    root = inputs.data_set(tmp_path, {"train": 2000}, 8192, sparse=True)
    tar = root / "train" / "train-000000.tar"
    assert tar.stat().st_size > 2000 * 8192 * 0.9
    assert tar.stat().st_blocks * 512 < 100_000
    split = open_split(root, "train")
    assert split.read(1999) == bytes(int(split.lengths[1999]))
    assert len({split.key(i) for i in range(5)}) == 5


def test_texts_have_the_bytes_that_were_asked_for_in_mixed_lengths(tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in reading.files(str(inputs.texts(tmp_path, 3_000_000)))]
    assert sum(sizes) == 3_000_000
    assert np.median(sizes) < np.mean(sizes) / 1.5


def test_the_pictures_have_a_photos_size_and_the_bare_loop_does_what_data_prep_does(tmp_path: Path) -> None:
    paths = reading.files(str(inputs.pictures(tmp_path, 3)))
    assert len(paths) == 3
    for path in paths:
        assert 20_000 < path.stat().st_size < 100_000
        assert reading.picture(path, 64) == decode(path.read_bytes(), 64).tobytes()


# ---- the measured process -----------------------------------------------------------------------------------------


def test_every_reader_gets_the_whole_data_set(tmp_path: Path) -> None:
    root = str(inputs.data_set(tmp_path, {"train": 50}, 2000))
    stored = sum(path.stat().st_size for path in (tmp_path / "train").glob("*.tar"))
    held = int(open_split(root, "train").lengths.sum())
    assert reading.read(f"{root}/train", "*.tar")["bytes"] == stored
    assert reading.sha256(f"{root}/train")["bytes"] > stored
    assert reading.copy(f"{root}/train", str(tmp_path / "copied"))["bytes"] > stored
    assert not (tmp_path / "copied").exists()
    assert reading.webdataset(root)["bytes"] == held
    assert held - 4 * 512 < reading.rows(root, 512, 4)["bytes"] <= held


def test_rows_go_on_where_the_last_call_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(inputs.data_set(tmp_path, {"train": 20}, 1000))
    asked: list[int] = []
    rows = Stream.rows
    monkeypatch.setattr(Stream, "rows", lambda self, at, seq_len: (asked.extend(at), rows(self, at, seq_len))[1])
    for _ in range(3):
        reading.rows(root, 256, 4)
    assert asked == list(range(len(asked)))


def test_the_process_answers_and_says_what_it_holds(tmp_path: Path) -> None:
    root = str(inputs.data_set(tmp_path, {"train": 300}, 1000, sparse=True))
    with reader() as ask:
        opened = ask("opening", root=root, seq_len=256, batch=4)
        assert min(opened[key] for key in ("import_s", "open_s", "resume_s")) > 0
        assert 2**24 < opened["peak_bytes"] < 2**30
        grown = ask("growth", root=root, seq_len=256, batch=2, n_batches=30)["resident_bytes"]
        assert set(grown) == {"10", "50", "100"}
        assert all(2**24 < value < 2**30 for value in grown.values())


# ---- figures ------------------------------------------------------------------------------------------------------


def test_a_figure_is_met_by_its_median() -> None:
    assert Figure("a", "s", [1.0, 9.0, 9.5], 9).met is True
    assert Figure("a", "s", [1.0, 9.0, 9.5], 9, at_most=True).met is True
    assert Figure("a", "s", [1.0, 8.9, 9.5], 9).met is False
    assert Figure("a", "s", [1.0]).met is None
    figure = Figure("speed", "MB/s", [151.0, 140.0, 160.0], 150)
    assert figure.as_json() == {"median": 151, "min": 140, "max": 160, "unit": "MB/s", "target": 150, "met": True}
    assert figure.line().split() == ["speed", "151", "MB/s", "(140", "to", "160)", ">=", "150:", "reached"]
    assert Figure("wait", "", [0.5], 0.01, at_most=True).line().endswith("<= 0.01: missed")


def test_what_a_job_costs_at_its_start_drops_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of known speed: 0.2 MB/s by one worker, 0.35 by two, after 50 and 80 ms."""

    def job(arguments: Sequence[str], out: Path) -> dict[str, float]:
        two = "--workers=2" in arguments
        n_bytes = sum(path.stat().st_size for path in reading.files(arguments[1]))
        return {"wall_s": (0.08 if two else 0.05) + n_bytes / (0.35e6 if two else 0.2e6), "cpu_s": n_bytes / 4e5}

    monkeypatch.setattr(MODULE, "prepare", job)
    figures = {figure.name: figure.as_json()["median"] for figure in MODULE.prep_text(bench(tmp_path))}
    assert figures["text, prep, one worker"] == pytest.approx(0.2)
    assert figures["text, prep, by CPU time"] == pytest.approx(0.4)
    assert figures["text, two workers against one"] == pytest.approx((0.05 + 0.2 / 0.2) / (0.08 + 0.2 / 0.35), rel=0.01)
    assert figures["text, start of one worker's job"] == pytest.approx(0.05)
    assert figures["text, prep, with its start"] == pytest.approx(0.2 / 1.05)
    assert min(figures[f"text, {name}"] for name in ("raw read", "read and hashed", "read, written and synced")) > 0


def test_pictures_are_set_beside_pillows_own_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def jobs(parts: Any, rounds: int) -> Any:
        assert parts["pillow"]()["pictures"] == TINY.pictures
        alone = {"read": {"wall_s": 1.0}, "pillow": {"wall_s": 4.0, "cpu_s": 4.0, "pictures": TINY.pictures}}
        long = {f"job {n}": {"wall_s": 10 / n, "cpu_s": 9.0} for n in (1, 2)}
        short = {f"short {n}": {"wall_s": 8 - 0.5 * n, "cpu_s": 6.5} for n in (1, 2)}
        return {name: [{**took}] * rounds for name, took in {**alone, **long, **short}.items()}

    monkeypatch.setattr(MODULE.measure, "interleave", jobs)
    figures = {figure.name: figure.as_json() for figure in MODULE.prep_images(bench(tmp_path))}
    share = figures["images, share of Pillow's own speed"]
    assert share["median"] == pytest.approx(2 / 2.5)  # two pictures of four: 2 s by Pillow, 10 - 7.5 s by data prep
    assert share["met"] is False
    assert figures["images, share of Pillow's own speed, by CPU time"]["median"] == pytest.approx(2 / 2.5)
    assert figures["images, Pillow alone in a loop"]["median"] == pytest.approx(1)


def test_a_job_is_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    source = inputs.texts(tmp_path / "in", 20_000)
    took = prepare(["text", str(source), "--workers=1"], tmp_path / "out")
    assert took["wall_s"] > 0
    assert took["cpu_s"] > 0
    assert verify(tmp_path / "out", 1)[1] == []
    with pytest.raises(MbtrainError, match=r"bench: -m data_prep text .*: status 2: .*no/such"):
        prepare(["text", str(tmp_path / "no/such")], tmp_path / "out")


def test_a_quick_run_gives_every_figure_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = VERBS["data"](quick="true", parts="loading,memory", out=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    json.dumps(got)
    figures = got["figures"]
    assert figures["loading 8 KiB documents, 64 rows at a time"]["target"] == 1
    assert figures["loading 8 KiB documents, 64 rows to webdataset"]["target"] == 5
    assert figures["memory over 100 batches, more at the end"]["target"] == 1
    assert got["missed"] == [name for name, figure in figures.items() if figure["met"] is False]
    assert len(capsys.readouterr().out.splitlines()) == len(figures)


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for options, key in (({"parts": "text,sound"}, "--parts"), ({"out": str(tmp_path / "no")}, "--out")):
        with pytest.raises(ConfigError, match=key):
            VERBS["data"](**options)
    for option in ("text", "images"):
        with pytest.raises(ConfigError, match=f"--{option}"):
            VERBS["data"](**{option: str(tmp_path / "no")})
    (tmp_path / "readme.txt").write_text("no picture")
    with pytest.raises(MbtrainError, match=r"no file to read"):
        VERBS["data"](quick="true", parts="images", images=str(tmp_path))


@pytest.mark.slow
def test_a_quick_run_of_all_parts_ends_well(tmp_path: Path) -> None:
    got = VERBS["data"](quick="true", out=str(tmp_path))
    wait = got["figures"]["training, share of a step spent waiting"]
    assert 0 <= wait["median"] < 1
    assert got["figures"]["opening 1,000 samples and resuming"]["median"] > 0
