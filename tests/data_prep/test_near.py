"""Near-duplicates: estimates against exact Jaccard similarities, and what a data set without them holds.

pytest tests/data_prep/test_near.py
"""

import builtins
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasketch")

from data_prep.append import append
from data_prep.build import build
from data_prep.near import SIGNATURE_BYTES, first_of_their_kind, signature
from data_prep.recipe import Recipe, parse_splits
from data_prep.text import text_modality
from data_prep.verify import verify
from mbtrain.errors import ConfigError
from tests.data_prep.test_build import contents, counts, digests

WORDS = ("the", "of", "and", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are", "with", "his", "this")


def prose(seed: int, words: int) -> bytes:
    dice = random.Random(seed)
    return " ".join(dice.choice(WORDS) + str(dice.randrange(30)) for _ in range(words)).encode()


def jaccard(one: bytes, other: bytes) -> float:
    a, b = ({text[i : i + 8] for i in range(len(text) - 7)} for text in (one, other))
    return len(a & b) / len(a | b)


def estimated(one: bytes, other: bytes) -> float:
    a, b = (np.frombuffer(signature(text), "<u4") for text in (one, other))
    return float((a == b).mean())


def test_estimates_are_near_the_exact_similarity() -> None:
    whole = prose(0, 3000)
    errors = []
    for share in (0.02, 0.1, 0.3, 0.6, 1.0):
        other = whole[: int(len(whole) * share)] + prose(1, int(3000 * (1 - share)))
        errors.append(estimated(whole, other) - jaccard(whole, other))
    assert max(map(abs, errors)) < 0.12  # three standard errors
    assert estimated(whole, whole) == 1
    assert len(signature(whole)) == SIGNATURE_BYTES


def test_a_signature_does_not_depend_on_how_long_stretches_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    document = prose(0, 500)
    expected = signature(document)
    monkeypatch.setattr("data_prep.near._BATCH_SHINGLES", 77)
    assert signature(document) == expected
    assert signature(document[:31]) == b""


def test_the_first_of_a_kind_is_kept_and_only_what_is_kept_counts() -> None:
    rows = np.random.default_rng(0).integers(0, 2**32, (5, 128), np.uint32)
    rows[1] = rows[0]
    rows[1, :10] += 1  # 0.92 like row 0
    rows[2] = rows[1]
    rows[2, 60:75] += 1  # 0.88 like row 1, but 0.80 like row 0
    signed = np.ones(5, bool)
    assert first_of_their_kind(rows, signed, 0.85).tolist() == [True, False, True, True, True]
    assert first_of_their_kind(rows, signed, 0.85, old=2).tolist() == [True, True, False, True, True]
    assert first_of_their_kind(rows, ~signed, 0.85).all()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i:02d}").write_bytes(prose(i, 300))
        (tmp_path / "in" / f"{i:02d}-copy").write_bytes(prose(i, 300))
        (tmp_path / "in" / f"{i:02d}-near").write_bytes(prose(i, 300).replace(b"this", b"that", 2) + b"!")
        (tmp_path / "in" / f"{i:02d}-tiny").write_bytes(b"tiny %d" % i)
    return tmp_path / "in"


def make(sources: Path, out: Path, **options: Any) -> Any:
    recipe = Recipe(splits=parse_splits("splits", "train=0.5,val=0.5"), near_dups=0.8)
    return build(text_modality("text"), [str(sources)], out, recipe, **{"workers": 1, "group_bytes": 9000, **options})


def test_near_duplicates_are_left_out_and_counted(sources: Path, tmp_path: Path) -> None:
    manifest = make(sources, tmp_path / "out")
    assert manifest.counts == counts(found=48, duplicates=12, near_duplicates=12)
    kept = set(contents(tmp_path / "out", "train") + contents(tmp_path / "out", "val"))
    assert kept == {prose(i, 300) for i in range(12)} | {b"tiny %d" % i for i in range(12)}
    assert manifest.prep["near_dups"] == 0.8
    make(sources, tmp_path / "other", workers=2, group_bytes=10**9)
    assert digests(tmp_path / "out") == digests(tmp_path / "other")
    assert verify(tmp_path / "out", 1)[1] == []


def test_what_is_appended_is_compared_with_what_is_there(sources: Path, tmp_path: Path) -> None:
    make(sources, tmp_path / "out")
    more = tmp_path / "more"
    more.mkdir()
    (more / "near").write_bytes(prose(3, 300) + b"?")
    (more / "new").write_bytes(prose(99, 300))
    manifest = append(tmp_path / "out", [str(more)], workers=1)
    assert manifest.counts == counts(found=50, duplicates=12, near_duplicates=13)
    assert manifest.sources["appended"][0]["files"] == 2


def test_it_is_for_text_and_needs_its_package(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.image import image_modality

    recipe = Recipe(splits=parse_splits("splits", "train=1"), near_dups=0.8)
    with pytest.raises(ConfigError, match="near-duplicates of text, and this is image"):
        build(image_modality(size=8), [str(sources)], tmp_path / "x", recipe, workers=1)
    for wrong in (0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="near_dups: expected a similarity"):
            Recipe(splits=recipe.splits, near_dups=wrong)
    import_module = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "datasketch":
            raise ImportError(name)
        return import_module(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'mbtrain\[near\]'"):
        make(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()
