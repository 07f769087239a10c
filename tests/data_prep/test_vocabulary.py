"""A vocabulary: the same data gives the same file, any bytes have tokens, and the file is whole or not there.

pytest tests/data_prep/test_vocabulary.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.vocabulary import PIECE_BYTES, pieces, vocabulary
from mbtrain import tokens
from mbtrain.errors import ConfigError, DataError
from mbtrain.shards import file_sha256, open_split
from tests.handmade import Made, dataset, picture

RNG = np.random.default_rng(0)
TEXT = "Der Bär trägt 12 Bücher; the bear carries 12 books.\n\tthe end\n".encode()
SAMPLES = [Made(TEXT * (i % 5 + 1) + RNG.bytes(9)) for i in range(30)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return dataset(tmp_path / "set", "text", {"train": [SAMPLES[:20], SAMPLES[20:]], "val": [[Made(b"zzzz" * 99)]]})


def run(args: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(args)
    return int(end.value.code or 0)


def test_the_verb_says_what_it_made(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "v.json"
    assert run(["vocabulary", str(data), f"--out={out}", "--size=280", "--json"]) == 0
    line, figures = capsys.readouterr().out.splitlines()
    got = json.loads(figures)
    assert line.startswith(f"{out}: 280 tokens of ")
    content = b"".join(sample.content for sample in SAMPLES)
    known = tokens.load(out, 280, got["sha256"])
    used = sum(len(known.encode([np.frombuffer(s.content, np.uint8)])[0]) for s in SAMPLES)
    assert got == {
        "tokens": 280,
        "bytes": len(content),
        "bytes_per_token": len(content) / used,
        "sha256": file_sha256(out),
        "path": str(out),
    }
    assert got["bytes_per_token"] > 1.5
    assert b"zz" not in known.contents, "the validation split is not looked at"
    assert [path.name for path in tmp_path.iterdir()].count("v.json") == 1
    assert not list(tmp_path.glob(".*"))


def test_the_same_data_gives_the_same_file_in_any_process(data: Path, tmp_path: Path) -> None:
    """Whatever the number of threads and the seed of Python's hashes."""
    vocabulary(data, tmp_path / "0.json", 400)
    for i, parallel in enumerate(("true", "false"), 1):
        command = [sys.executable, "-m", "data_prep", "vocabulary", str(data), f"--out={tmp_path / f'{i}.json'}"]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": str(i)}
        subprocess.run([*command, "--size=400"], env=environment, check=True, capture_output=True)
    assert len({file_sha256(tmp_path / f"{i}.json") for i in range(3)}) == 1


def test_tokens_are_parts_of_words_and_no_boundary_is_in_one(data: Path, tmp_path: Path) -> None:
    made = vocabulary(data, tmp_path / "v.json", 4096)
    assert 290 < made["tokens"] < 4096, "no more pairs stand there twice"
    known = tokens.load(tmp_path / "v.json", made["tokens"])
    assert {" Bücher".encode(), " trägt".encode(), b" books", b" 12", b" the"} <= set(known.contents)
    assert not any(b" " in word[1:] and word.strip() for word in known.contents)
    merges = json.loads((tmp_path / "v.json").read_text())["model"]["merges"]
    assert not any(tokens.BOUNDARY in part for merge in merges for part in merge)
    assert known.contents.count(b"") == 1


def test_a_limit_reads_a_fixed_draw_of_the_samples(data: Path, tmp_path: Path) -> None:
    split = open_split(data, "train")
    whole = [sample.content for sample in SAMPLES]
    assert list(pieces(split, None)) == whole
    drawn = list(pieces(split, 2000))
    assert sum(map(len, drawn)) == 2000
    assert drawn != whole[: len(drawn)]
    assert all(any(sample.startswith(piece) for sample in whole) for piece in drawn)
    assert list(pieces(split, 2000)) == drawn
    assert sorted(pieces(split, 10**9)) == sorted(whole)
    assert vocabulary(data, tmp_path / "a.json", 300, limit=2000)["bytes"] == 2000
    assert vocabulary(data, tmp_path / "b.json", 300, limit=10**9)["bytes"] == sum(map(len, whole))


def test_a_long_sample_is_read_in_parts(tmp_path: Path) -> None:
    long = b"ab " * (PIECE_BYTES // 2)
    split = open_split(dataset(tmp_path / "set", "text", {"train": [[Made(long), Made(b"x")]]}), "train")
    parts = list(pieces(split, None))
    assert b"".join(parts) == long + b"x"
    assert max(map(len, parts)) == PIECE_BYTES


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--size=300"], "--out: expected a file"),
        (["--out=v.json", "--size=256"], "--size: got 256, expected 257 or more"),
        (["--out=v.json", "--size=many"], "--size: expected a whole number"),
        (["--out=v.json", "--limit=x"], "--limit"),
        (["--out=v.json", "--sise=300"], "did you mean size"),
    ],
)
def test_a_slip_is_one_line(data: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert run(["vocabulary", str(data), *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_what_holds_no_text_is_refused(tmp_path: Path) -> None:
    pictures = dataset(tmp_path / "p", "image", {"train": [[picture(np.zeros((2, 2, 3), np.uint8))]]})
    with pytest.raises(DataError, match="holds image, expected text"):
        vocabulary(pictures, tmp_path / "v.json", 300)
    with pytest.raises(DataError, match="no bytes"):
        vocabulary(dataset(tmp_path / "e", "text", {"train": [[]]}), tmp_path / "v.json", 300)
    with pytest.raises(DataError, match="no split 'train'"):
        vocabulary(dataset(tmp_path / "n", "text", {"val": [[Made(b"a")]]}), tmp_path / "v.json", 300)
    with pytest.raises(ConfigError, match="--size"):
        vocabulary(pictures, tmp_path / "v.json", 3)


def test_the_file_is_whole_or_as_it_was(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.json"
    out.write_text("before")
    with pytest.raises(DataError, match="cannot be written"):
        vocabulary(data, tmp_path / "nowhere" / "v.json", 300)
    assert out.read_text() == "before"
    vocabulary(data, out, 300)
    assert json.loads(out.read_text())["model"]["type"] == "BPE"
