"""Documents are their own bytes; filters leave whole documents out and change none.

pytest tests/data_prep/test_text.py
"""

import itertools
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import text
from data_prep.sources import Item, Rejection, Sample
from data_prep.text import text_modality
from mbtrain.errors import ConfigError


def decoded(content: bytes, match: str = "", reject: str = "") -> Sample | Rejection:
    chunks = (content[i : i + 3] for i in range(0, len(content), 3))
    modality = pickle.loads(pickle.dumps(text_modality("text", match=match, reject=reject)))  # noqa: S301
    (sample,) = modality.decode(Item("x", "line 3", chunks, plain=True))
    assert sample.where == "line 3"
    return sample


@given(
    st.binary(max_size=20), st.sampled_from(["", "a", "^a+$", r"[\x00-\x1f]", "é"]), st.sampled_from(["", "b", r"\xff"])
)
def test_a_document_is_kept_whole_if_match_is_found_and_reject_is_not(content: bytes, match: str, reject: str) -> None:
    keep = bool(re.search(match.encode(), content)) and not (reject and re.search(reject.encode(), content))
    sample = decoded(content, match, reject)
    assert isinstance(sample, Sample) == keep
    if isinstance(sample, Sample):
        assert b"".join(sample.chunks) == content
        assert (sample.plain, sample.shape, sample.sample_rate) == (True, None, None)


def test_what_is_left_out_is_named_and_is_not_bad() -> None:
    assert decoded(b"abc", match="x+") == Rejection("line 3", "does not match 'x+'", bad=False)
    assert decoded(b"abc", reject="b.") == Rejection("line 3", "matches 'b.'", bad=False)
    assert isinstance(decoded("né".encode(), match="é$"), Sample)


def test_a_document_too_long_to_be_filtered_is_rejected_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_FILTERED_BYTES", 100)
    assert isinstance(decoded(b"a" * 100, match="a"), Sample)
    (rejection,) = text_modality("text", match="a").decode(Item("x", "", itertools.repeat(b"a")))
    assert rejection == Rejection("", "longer than 100 bytes, the most that is filtered")


def test_without_a_filter_a_document_is_streamed() -> None:
    (sample,) = text_modality("text").decode(Item("x", "", itertools.repeat(b"x")))
    assert isinstance(sample, Sample)
    assert next(sample.chunks) == b"x"


def test_options_stand_in_the_manifest_and_wrong_ones_name_themselves() -> None:
    modality = text_modality("a.b", match="x", reject="y")
    assert (modality.name, modality.column) == ("text", "a.b")
    assert modality.options == {"column": "a.b", "match": "x", "reject": "y"}
    assert modality.wants("whatever.xyz")
    for key, wrong in [("match", "("), ("reject", "[z-a]"), ("match", "a{2,1}"), ("match", "\ud800")]:
        with pytest.raises(ConfigError, match=f"--{key}: expected a regular expression, got "):
            text_modality("text", **{key: wrong})
