"""A summary shows what a run's metrics say, beside compressors on the very bytes that were scored.

pytest tests/test_summary.py
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbtrain import config, metrics
from mbtrain.cli import main
from mbtrain.errors import MbtrainError
from mbtrain.shards import open_split
from mbtrain.summary import lines_of, summarise
from tests import tiny
from tests.handmade import Made, dataset, picture, sound

RNG = np.random.default_rng(0)
TEXTS = [Made(b"some words and some more words " * n) for n in (3, 7, 20)]
PICTURES = [picture(RNG.integers(0, 9, (8, 8, 3), np.uint8)) for _ in range(5)]
SOUNDS = [sound(RNG.integers(-99, 99, 4000).astype(np.int16)) for _ in range(2)]


def run_of(root: Path, data: dict[str, Any], scores: dict[str, float]) -> Path:
    run = root / "run"
    run.mkdir()
    settings = tiny.make(data={"path": None, "boundary": False, **data})
    (run / "config.yaml").write_text(config.to_yaml(settings))
    for step, rate in enumerate((100, 300, 200)):
        metrics.append(run / "metrics.jsonl", step, {"perf/bytes_per_s": rate, "train/bpb": 5.0})
    metrics.append(run / "metrics.jsonl", 3, {"val/bpb": 9.0})
    metrics.append(run / "metrics.jsonl", 4, scores)
    return run


def test_a_text_run_beside_gzip_and_xz(tmp_path: Path) -> None:
    path = dataset(tmp_path / "set", "text", {"train": [[Made(b"other")]], "val": [TEXTS[:1], TEXTS[1:]]})
    run = run_of(tmp_path, {"path": str(path)}, {"val/bpb": 2.5})
    figures = summarise(run)
    content = b"".join(sample.content for sample in TEXTS)
    assert (figures.step, figures.bpb, figures.bytes, figures.bytes_per_s) == (4, 2.5, len(content), 200)
    assert figures.gzip_bpb == 8 * len(gzip.compress(content, 9)) / len(content)
    lines = list(lines_of(run, figures))
    assert lines[0] == f"validation    2.5000 bits per byte over {len(content)} bytes, after 4 steps"
    assert [line.split()[0] for line in lines[1:3]] == ["gzip", "xz"]
    assert all("on the same bytes" in line for line in lines[1:3])
    assert not any(word in "".join(lines) for word in ("PNG", "FLAC", "dimension"))


def test_an_image_run_beside_png_and_webp_and_in_bits_per_dimension(tmp_path: Path) -> None:
    path = dataset(tmp_path / "set", "image", {"val": [PICTURES]}, prep={"size": 8})
    run = run_of(tmp_path, {"path": str(path)}, {"val/bpb": 3.0})
    lines = list(lines_of(run, summarise(run)))
    assert lines[0].startswith("validation    3.0000 bits per byte = bits per dimension over 960 bytes")
    assert [line.split()[0] for line in lines[1:5]] == ["gzip", "xz", "PNG", "WebP"]


def test_a_mixture_by_source(tmp_path: Path) -> None:
    prose = dataset(tmp_path / "prose", "text", {"val": [TEXTS]})
    speech = dataset(tmp_path / "speech", "audio", {"val": [SOUNDS]}, prep={"sample_rate": 16000})
    sources = [{"name": "books", "path": str(prose)}, {"path": str(speech)}]
    run = run_of(tmp_path, {"sources": sources}, {"val/bpb": 4.0, "val/books/bpb": 1.5})
    figures = summarise(run)
    books, spoken = figures.sources
    assert (books.name, books.modality, books.bpb) == ("books", "text", 1.5)
    assert (spoken.name, spoken.modality, spoken.bpb) == ("speech", "audio", None)
    assert figures.bytes == books.bytes + spoken.bytes
    bits = sum(source.bytes * source.codecs["xz_bpb"] for source in figures.sources)
    assert figures.xz_bpb == pytest.approx(bits / figures.bytes)
    lines = list(lines_of(run, figures))
    assert lines[1] == f"books         1.5000, over {books.bytes} bytes"
    assert lines[4] == f"speech        not scored alone, over {spoken.bytes} bytes"
    assert lines[7].startswith("  FLAC")


def test_a_part_of_a_large_split_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbtrain import codecs

    path = dataset(tmp_path / "set", "text", {"val": [TEXTS]})
    split = open_split(path, "val")
    part = codecs.baselines(split, 100)
    monkeypatch.setattr(codecs, "baselines", lambda split: part)
    run = run_of(tmp_path, {"path": str(path)}, {"val/bpb": 2.0})
    assert "on the first 100 bytes of them" in list(lines_of(run, summarise(run)))[1]


def test_the_verb_and_a_run_that_was_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dataset(tmp_path / "set", "image", {"val": [PICTURES]})
    run = run_of(tmp_path, {"path": str(path)}, {"val/bpb": 2.0})
    with pytest.raises(SystemExit) as end:
        main(["summary", str(run), "--json"])
    assert end.value.code == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["bpb"], said["bytes"]) == (2.0, 960)
    assert set(said["sources"][0]["codecs"]) == {"bytes", "gzip_bpb", "xz_bpb", "png_bpb", "webp_bpb"}
    (run / "metrics.jsonl").unlink()
    metrics.append(run / "metrics.jsonl", 1, {"train/bpb": 5.0})
    with pytest.raises(MbtrainError, match="no val/bpb yet"):
        summarise(run)
