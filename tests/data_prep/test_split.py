"""Which samples are kept, and the split and shard of each: laws of pure functions.

pytest tests/data_prep/test_split.py
"""

import hashlib
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.recipe import Recipe, parse_size, parse_split_bytes, parse_splits
from data_prep.split import cut_pieces, cut_shards, first_occurrences, split_by_hash, tar_bytes
from mbtrain.errors import ConfigError

SHARES = [Fraction(9, 10), Fraction(1, 20), Fraction(1, 20)]


def hashes(contents: list[bytes]) -> np.ndarray:
    joined = b"".join(hashlib.sha256(content).digest() for content in contents)
    return np.frombuffer(joined, np.uint8).reshape(-1, 32)


@given(st.lists(st.binary(max_size=2), max_size=40))
def test_first_occurrences_are_those_of_a_plain_loop(contents: list[bytes]) -> None:
    expected = [content not in contents[:i] for i, content in enumerate(contents)]
    assert first_occurrences(hashes(contents)).tolist() == expected


def test_hashes_that_differ_in_their_last_byte_only_are_not_equal() -> None:
    rows = np.zeros((3, 32), np.uint8)
    rows[1, 31] = 1
    assert first_occurrences(rows).tolist() == [True, True, False]


@given(st.lists(st.sampled_from([bytes([0] * 8 + [i] * 24) for i in range(3)] + [bytes([1] * 32)]), max_size=20))
def test_different_hashes_that_begin_alike_are_not_equal(rows: list[bytes]) -> None:
    expected = [row not in rows[:i] for i, row in enumerate(rows)]
    assert first_occurrences(np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32)).tolist() == expected


def test_shares_of_a_hash_split_are_met() -> None:
    numbers = split_by_hash(hashes([str(i).encode() for i in range(20000)]), SHARES)
    share = np.bincount(numbers, minlength=3) / 20000
    assert np.allclose(share, [0.9, 0.05, 0.05], atol=0.01)


def test_bounds_of_a_hash_split_are_exact() -> None:
    rows = np.zeros((4, 32), np.uint8)
    for row, position in enumerate([0, 2**63 - 1, 2**63, 2**64 - 1]):
        rows[row, :8] = np.frombuffer(position.to_bytes(8, "big"), np.uint8)
    assert split_by_hash(rows, [Fraction(1, 2), Fraction(1, 2)]).tolist() == [0, 0, 1, 1]
    assert split_by_hash(rows, [Fraction(1)]).tolist() == [0, 0, 0, 0]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(1, 20))
def test_pieces_cover_each_split_in_order(split_bytes: list[int], sample_bytes: int) -> None:
    offsets, lengths, numbers = cut_pieces(split_bytes, sample_bytes)
    assert offsets[0] == 0
    assert (offsets[1:] == (offsets + lengths)[:-1]).all()
    assert (np.diff(numbers) >= 0).all()
    assert lengths.max() <= sample_bytes
    assert np.bincount(numbers, lengths).tolist() == split_bytes


@given(st.lists(st.integers(0, 3000), max_size=50), st.integers(1, 20000))
def test_each_shard_is_closed_by_the_sample_that_fills_it(lengths: list[int], shard_bytes: int) -> None:
    sizes = tar_bytes(np.array(lengths, np.int64))
    cuts = cut_shards(sizes, shard_bytes)
    assert [row for start, stop in cuts for row in range(start, stop)] == list(range(len(lengths)))
    for number, (start, stop) in enumerate(cuts):
        assert sizes[start : stop - 1].sum() < shard_bytes
        assert sizes[start:stop].sum() >= shard_bytes or number == len(cuts) - 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ("64k", 64000), ("64Ki", 65536), ("256M", 256_000_000), ("1.5G", 1_500_000_000), ("1MiB", 2**20)]
    + [("90_000", 90000), ("2T", 2 * 10**12), ("100B", 100)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--x", text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "1e6", "64KB2", "i", "5i", "٣"])
def test_what_is_no_size_is_an_error_that_names_its_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--x: expected a size"):
        parse_size("--x", text)


def test_splits_are_exact_fractions() -> None:
    assert parse_splits("--splits", "train=0.9,val=0.05,test=0.05") == tuple(
        zip(("train", "val", "test"), SHARES, strict=True)
    )
    assert parse_splits("--splits", "a=1/3, b=2/3") == (("a", Fraction(1, 3)), ("b", Fraction(2, 3)))
    assert parse_split_bytes("--split-bytes", "90M,5M") == (("train", 90_000_000), ("val", 5_000_000))
    assert parse_split_bytes("--split-bytes", "a=1,b=2") == (("a", 1), ("b", 2))


@pytest.mark.parametrize(
    "text",
    ["train=0.9", "train=0.9,val=0.2", "train", "train=1,train=0", "Train=1", "a.b=1", "train=0,val=1", "train=x", ""],
)
def test_what_is_no_split_is_an_error_that_names_its_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--splits: "):
        parse_splits("--splits", text)


def test_a_recipe_is_read_back_exactly_from_a_manifest() -> None:
    thirds = parse_splits("--splits", "a=1/3,b=0.1,c=17/30")
    for recipe in (
        Recipe(splits=thirds, shard_bytes=5, include=("*.py",), min_bytes=3, max_bytes=9, near_dups=0.5),
        Recipe(splits=None, split_bytes=(("train", 5), ("val", 2)), sample_bytes=3, exclude=("a", "b/**")),
    ):
        value = json.loads(json.dumps({**recipe.as_json(), "column": "text"}))
        assert Recipe.from_json(value) == recipe
    assert Recipe(splits=thirds).as_json()["splits"] == {"a": "1/3", "b": 0.1, "c": "17/30"}
    with pytest.raises(KeyError):
        Recipe.from_json({})


def test_a_recipe_is_checked() -> None:
    shares = (("train", Fraction(1)),)
    for wrong in [
        {"splits": None},
        {"splits": shares, "split_bytes": (("train", 5),)},
        {"splits": None, "split_bytes": (("train", 5),), "min_bytes": 2},
        {"splits": shares, "min_bytes": 0},
        {"splits": shares, "min_bytes": 9, "max_bytes": 8},
        {"splits": shares, "max_bytes": 8**11},
        {"splits": shares, "shard_bytes": 0},
        {"splits": shares, "sample_bytes": 0},
    ]:
        with pytest.raises(ConfigError, match=r"expected|no meaning"):
            Recipe(**wrong)
