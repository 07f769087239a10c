"""Words are what bytes.split() makes of whole documents, whatever is read at a time.

pytest tests/data/test_words.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain.data import words
from mbtrain.data.words import count_words
from mbtrain.shards import Split

texts = st.lists(st.lists(st.sampled_from([b"a", b" ", b"\n", b"\xc2\xa0", b"\0", b"\v"]), max_size=9).map(b"".join))


def split_of(documents: list[bytes], kind: str) -> Split:
    made = SimpleNamespace(
        documents=kind,
        lengths=np.array([len(d) for d in documents], np.int64),
        read=lambda i, start=0, stop=None: documents[i][start:stop],
    )
    return cast(Split, made)


@settings(max_examples=200, deadline=None)
@given(documents=texts, at_once=st.integers(1, 5))
def test_words_are_what_split_makes_of_documents(documents: list[bytes], at_once: int) -> None:
    """And of one long file in pieces, whether or not a word lies across the border."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(words, "READ_BYTES", at_once)
        numbers = range(len(documents))
        sizes = np.array([len(d) for d in documents], np.float64)
        assert count_words(split_of(documents, "whole"), numbers, sizes) == sum(len(d.split()) for d in documents)
        pieces = [d for d in documents if d]
        whole = len(b"".join(pieces).split())
        sizes = np.array([len(d) for d in pieces], np.float64)
        assert count_words(split_of(pieces, "pieces"), range(len(pieces)), sizes) == whole
        halves = [count_words(split_of(pieces, "pieces"), range(i, len(pieces), 2), sizes) for i in (0, 1)]
        assert sum(halves) == whole, "ranks count apart"


def test_only_what_was_scored_is_counted() -> None:
    split = split_of([b"one two three", b"four five"], "whole")
    assert count_words(split, range(2), np.array([7.0, 0.0])) == 2
    assert count_words(split, range(2), np.array([4.0, 1.0])) == 2
