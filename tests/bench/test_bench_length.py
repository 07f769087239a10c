"""`mbtrain bench length` measures a step at several lengths and fits its exponent.

pytest tests/bench/test_bench_length.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mbtrain import config
from mbtrain.bench import VERBS
from mbtrain.bench.length import FLAT_WIDTH, exponent, fits, flat_of, foreseen
from mbtrain.errors import ConfigError
from mbtrain.model.flops import count
from tests.bench.test_bench import tiny_file

ROOT = Path(__file__).parents[2]


def test_exponents_are_those_of_powers() -> None:
    xs = [2.0**i for i in range(10, 18)]
    assert exponent(xs, [3 * x**1.25 for x in xs]) == pytest.approx(1.25)
    assert exponent([8], [1]) is None
    bent = [{"bytes": x, "cpu_s": max(x, 2.0**14)} for x in xs]
    assert fits(bent)["exponent_of_longer_half"] == pytest.approx(1)
    assert fits(bent)["exponent"] < 0.6


def test_what_is_foreseen_has_a_linear_and_a_square_part() -> None:
    def cost(t: float) -> float:
        return 2e-4 * t + 1e-7 * t**2

    rows = [{"bytes": t, "cpu_s": cost(t)} for t in (1024, 8192, 16384)]
    assert foreseen(rows, 1_228_800) == pytest.approx(cost(1_228_800))
    assert foreseen(rows[:1], 4096) == pytest.approx(16 * cost(1024))
    falling = [{"bytes": 1024, "cpu_s": 1.0}, {"bytes": 2048, "cpu_s": 1.5}]
    assert foreseen(falling, 4096) == pytest.approx(3), "no less than as length"


def test_the_flat_transformer_has_about_as_many_parameters() -> None:
    settings = config.load(ROOT / "configs" / "bench" / "length.yaml")
    flat = flat_of(settings)
    assert (flat.model.kind, len(flat.model.stages), flat.model.stages[0].d_model) == ("transformer", 1, FLAT_WIDTH)
    assert count(flat).parameters == pytest.approx(count(settings).parameters, rel=0.1)
    assert flat.data == settings.data


def test_lengths_are_measured_fitted_and_drawn(tmp_path: Path) -> None:
    path, out = tiny_file(tmp_path, tmp_path), tmp_path / "length.png"
    figures = VERBS["length"](config=str(path), lengths="1026,4096", flat_cpu_s="1e-9", out=str(out))
    model, flat = figures["sides"]["model"]["by_length"], figures["sides"]["flat"]["by_length"]
    assert [row["bytes"] for row in model] == [1024, 4096], "whole patches"
    assert [row["bytes"] for row in flat] == [1026 // 4 * 4], "and no further: it would take too long"
    assert all(row["peak_bytes"] > row["base_bytes"] > 0 and row["cpu_s"] > 0 for row in model)
    assert figures["exponent"] > 0
    assert figures["flat_exponent"] is None
    assert figures["flat_foreseen_cpu_s"] == pytest.approx(16 * flat[0]["cpu_s"])
    assert out.read_bytes().startswith(b"\x89PNG")
    json.dumps(figures, allow_nan=False)


def test_it_reads_real_rows_and_goes_without_the_transformer(tmp_path: Path, shards: Path) -> None:
    path, out = tiny_file(tmp_path, shards), tmp_path / "length.png"
    figures = VERBS["length"](
        config=str(path), lengths="32,1024", flat_cpu_s="0", out=str(out), data=str(shards), threads="1"
    )
    assert set(figures["sides"]) == {"model"}
    assert figures["flat_exponent"] is figures["flat_foreseen_cpu_s"] is None
    assert out.exists()


def test_lengths_that_make_no_line_are_refused(tmp_path: Path) -> None:
    path = str(tiny_file(tmp_path, tmp_path))
    with pytest.raises(ConfigError, match="--lengths=4096: got one length"):
        VERBS["length"](config=path, lengths="4096")
    with pytest.raises(ConfigError, match="--lengths: got 2, expected 4 or more"):
        VERBS["length"](config=path, lengths="2,4096")
