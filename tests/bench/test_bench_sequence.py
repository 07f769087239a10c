"""`mbtrain bench sequence` measures two ranks on one row against one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mbtrain.bench import VERBS
from mbtrain.errors import ConfigError
from tests.bench.test_bench import tiny_file


def test_two_ranks_halve_what_is_kept_and_find_the_same(tmp_path: Path) -> None:
    path = tiny_file(tmp_path, tmp_path)
    figures = VERBS["sequence"](config=str(path), seq="16384", ranks="1,2", steps="1")
    assert set(figures["by_ranks"]) == {"1", "2"}
    assert figures["loss_difference"] < 1e-6
    assert figures["grad_norm_difference"] < 1e-5
    assert figures["kept_share"]["1"] == 1
    assert 0.5 <= figures["kept_share"]["2"] < 0.55
    assert all(figures["by_ranks"][n]["peak_bytes"] > figures["by_ranks"][n]["kept_bytes"] / 2 for n in ("1", "2"))
    assert len(figures["by_ranks"]["2"]["peak_bytes_of_each"]) == 2
    json.dumps(figures)


def test_rows_that_cannot_be_cut_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.sequence_parallel"):
        VERBS["sequence"](config=str(tiny_file(tmp_path, tmp_path)), seq="12", ranks="2")
