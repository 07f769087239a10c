"""The best learning rate of a curve, its shift over widths, and the verdict, on curves whose answer is known.

pytest tests/sweep/test_optimum.py
"""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mbtrain.sweep import optimum
from mbtrain.sweep.optimum import FAILS, OPEN, TRANSFERS, UNKNOWN, Optimum, Shift

GRID = range(-10, -2)
LOSSES = st.floats(1.0, 8.0)
CURVES = st.dictionaries(st.integers(-12, -1).map(float), LOSSES, min_size=1)


def bowl(best: float, floor: float = 3.0, steepness: float = 0.1) -> dict[float, float]:
    return {float(x): floor + steepness * (x - best) ** 2 for x in GRID}


def at(x: float, **other: float) -> Optimum:
    """A closed optimum."""
    return Optimum(round(x), x, 3.0, 3.0, parabola=True, **other)  # type: ignore[arg-type]


# --- The optimum of a curve


@settings(deadline=None)
@given(st.floats(-8.9, -4.1), st.floats(0.01, 10))
def test_the_vertex_of_a_parabola_is_found_exactly(best: float, steepness: float) -> None:
    found = optimum.best(bowl(best, 3.0, steepness))
    assert found.parabola
    assert found.edge == ""
    assert found.log2_lr == pytest.approx(best, abs=1e-6)
    assert found.vertex_loss == pytest.approx(3.0, abs=1e-6)
    assert abs(found.grid - best) <= 0.5 + 1e-9


def test_points_need_not_be_evenly_apart() -> None:
    curve = {x: 2 + (x + 5.3) ** 2 for x in (-9.0, -5.5, -5.0, -2.0)}
    assert optimum.best(curve).log2_lr == pytest.approx(-5.3)


@settings(deadline=None)
@given(CURVES)
def test_the_optimum_lies_within_its_bracket_and_no_deeper_than_it_can(curve: dict[float, float]) -> None:
    found = optimum.best(curve)
    assert found.loss == min(curve.values()) == curve[found.grid]
    assert found.vertex_loss <= found.loss
    xs = sorted(curve)
    place = xs.index(found.grid)
    if found.parabola:
        assert (xs[place - 1] + xs[place]) / 2 - 1e-9 <= found.log2_lr <= (xs[place] + xs[place + 1]) / 2 + 1e-9
        assert found.edge == ""
    else:
        assert found.log2_lr == found.grid
        assert found.edge == ("alone" if len(xs) == 1 else "low" if place == 0 else "high")


@settings(deadline=None)
@given(CURVES, st.floats(-3, 3), st.floats(0.1, 10), st.randoms())
def test_moving_and_stretching_a_curve_moves_its_optimum(
    curve: dict[float, float], move: float, stretch: float, random: object
) -> None:
    values = sorted(curve.values())
    assume(all(b - a > 1e-3 for a, b in zip(values, values[1:], strict=False)))
    items = list(curve.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    moved = optimum.best({x + move: 1 + stretch * y for x, y in items})
    assert moved.log2_lr == pytest.approx(optimum.best(curve).log2_lr + move, abs=1e-6)
    assert moved.edge == optimum.best(curve).edge


@pytest.mark.parametrize(("best", "edge"), [(-12.0, "low"), (-10.0, "low"), (-3.0, "high"), (0.0, "high")])
def test_an_optimum_at_the_edge_is_said_to_be_there(best: float, edge: str) -> None:
    found = optimum.best(bowl(best))
    assert found.edge == edge
    assert not found.parabola
    assert found.log2_lr == found.grid


def test_one_point_bounds_nothing() -> None:
    assert optimum.best({-5.0: 3.0}).edge == "alone"
    assert math.isnan(optimum.best({}).log2_lr)
    assert math.isnan(optimum.best({-5.0: math.nan, -4.0: math.inf}).log2_lr)


def test_a_run_that_diverged_bounds_the_optimum_without_a_parabola() -> None:
    curve = {-7.0: 3.4, -6.0: 3.1, -5.0: math.inf}
    found = optimum.best(curve)
    assert (found.grid, found.log2_lr, found.edge, found.parabola) == (-6.0, -6.0, "", False)


def test_a_loss_that_is_not_known_bounds_nothing() -> None:
    assert optimum.best({-7.0: 3.4, -6.0: 3.1, -5.0: math.nan}).edge == "high"
    # and one in the middle is passed over
    assert optimum.best({-7.0: 3.5, -6.5: math.nan, -6.0: 3.0, -5.0: 3.5}).log2_lr == pytest.approx(-6.0)


def test_a_flat_curve_has_its_lowest_rate_and_three_equal_points_their_middle() -> None:
    assert optimum.best({-7.0: 3.0, -6.0: 3.0, -5.0: 3.0}).grid == -7.0
    assert optimum.best({-8.0: 3.1, -7.0: 3.0, -6.0: 3.0, -5.0: 3.1}).log2_lr == pytest.approx(-6.5)


# --- Seeds


def test_seeds_give_the_optimum_of_their_mean_and_the_spread_of_their_own() -> None:
    bests = [-6.3, -6.0, -5.6]
    found = optimum.of_seeds([bowl(best) for best in bests])
    assert found.seeds == 3
    assert found.log2_lr == pytest.approx(statistics.mean(bests))  # of parabolas of one steepness
    assert found.error == pytest.approx(statistics.stdev(bests) / math.sqrt(3))


def test_one_seed_claims_no_error() -> None:
    assert math.isnan(optimum.of_seeds([bowl(-6)]).error)
    assert optimum.of_seeds([bowl(-6)]) == optimum.best(bowl(-6))
    assert math.isnan(optimum.of_seeds([]).grid)


def test_a_rate_at_which_one_seed_diverged_is_not_the_best() -> None:
    steady, fragile = {-7.0: 3.4, -6.0: 3.2, -5.0: 3.0}, {-7.0: 3.4, -6.0: 3.2, -5.0: math.inf}
    found = optimum.of_seeds([steady, fragile])
    assert (found.grid, found.edge) == (-6.0, "")


def test_a_rate_that_a_seed_lacks_is_left_out() -> None:
    """The second seed is worse throughout; without it the rate would look better for that alone."""
    first, second = bowl(-6.0, 3.0), bowl(-6.0, 4.0)
    del second[-8.0]
    assert optimum.of_seeds([first, second]).log2_lr == pytest.approx(-6.0)
    second[-8.0] = math.nan  # the same: not at its end yet
    assert optimum.of_seeds([first, second]).log2_lr == pytest.approx(-6.0)


def test_a_seed_whose_optimum_is_at_the_edge_tells_no_spread() -> None:
    assert math.isnan(optimum.of_seeds([bowl(-6.0), bowl(-11.0)]).error)


# --- The shift over widths


@settings(deadline=None)
@given(st.floats(-2, 2), st.integers(2, 5))
def test_a_steady_shift_is_found_as_such(per_doubling: float, n: int) -> None:
    optima = {2.0**i: at(-6 + per_doubling * i) for i in range(n)}
    moved = optimum.shift(optima)
    assert moved.slope == pytest.approx(per_doubling, abs=1e-9)
    assert moved.log2_lr == pytest.approx(per_doubling * (n - 1), abs=1e-9)
    assert moved.largest == pytest.approx(abs(per_doubling) * (n - 1), abs=1e-9)
    assert moved.open == ()


def test_the_largest_difference_may_be_in_between() -> None:
    moved = optimum.shift({1: at(-6.0), 2: at(-7.2), 4: at(-6.1)})
    assert moved.log2_lr == pytest.approx(-0.1)
    assert moved.largest == pytest.approx(1.2)
    assert moved.largest_grid == 1


def test_the_error_of_the_shift_is_of_both_ends_and_its_interval_students() -> None:
    moved = optimum.shift({1: at(-6.0, error=0.3, seeds=3), 8: at(-6.5, error=0.4, seeds=3)})
    assert moved.error == pytest.approx(0.5)
    assert moved.freedom == 4
    assert moved.interval == pytest.approx((-0.5 - 2.776 * 0.5, -0.5 + 2.776 * 0.5))
    assert math.isnan(optimum.shift({1: at(-6.0), 8: at(-6.5, error=0.4, seeds=3)}).interval[0])


def test_no_widths_have_no_shift() -> None:
    with pytest.raises(ValueError, match="no widths"):
        optimum.shift({})
    assert math.isnan(optimum.shift({1: at(-6)}).log2_lr)
    assert optimum.verdict(optimum.shift({1: at(-6)})) == UNKNOWN


# --- Verdicts


@pytest.mark.parametrize(
    ("last", "expected"), [(-6.0, TRANSFERS), (-6.9, TRANSFERS), (-5.1, TRANSFERS), (-7.1, FAILS), (-9.1, FAILS)]
)
def test_at_most_a_factor_of_two_transfers(last: float, expected: str) -> None:
    assert optimum.verdict(optimum.shift({1: at(-6.0), 8: at(last)})) == expected


def test_the_grids_best_counts_too() -> None:
    """Two steps of the grid are no transfer, however near the parabolas' vertices are."""
    assert optimum.verdict(optimum.shift({1: at(-5.51), 8: at(-6.49)})) == TRANSFERS
    assert optimum.verdict(Shift(-2.0, -1.0, 1.0, 2.0, -0.3, math.nan, 0)) == FAILS


@pytest.mark.parametrize("last", [-6.0, -10.0])
def test_an_open_optimum_opens_the_verdict(last: float) -> None:
    opened = optimum.best({last: 3.0, last + 1: 3.1})
    moved = optimum.shift({1: at(-6.0), 8: opened})
    assert moved.open == (8,)
    assert optimum.verdict(moved) == OPEN
    unknown = optimum.shift({1: at(-6.0), 2: at(-6.0), 8: optimum.best({})})
    assert (unknown.open, unknown.missing) == ((), (8,))
    assert optimum.verdict(unknown) == UNKNOWN


def test_a_verdict_is_sure_where_the_whole_interval_is_on_its_side() -> None:
    def ends(last: float, error: float) -> Shift:
        return optimum.shift({1: at(-6.0, error=error, seeds=3), 8: at(last, error=error, seeds=3)})

    assert optimum.is_sure(ends(-6.2, 0.05)) is True
    assert optimum.is_sure(ends(-9.0, 0.05)) is True
    assert optimum.is_sure(ends(-6.9, 0.2)) is False
    assert optimum.is_sure(optimum.shift({1: at(-6.0), 8: at(-6.2)})) is None


# --- Arithmetic


def test_slope_and_falls() -> None:
    assert optimum.slope([0, 1, 2], [5, 3, 1]) == pytest.approx(-2)
    assert math.isnan(optimum.slope([1, 1], [1, 2]))
    assert optimum.falls([3.0, 2.0, 1.0])
    assert not optimum.falls([3.0, 3.0, 1.0])
    assert not optimum.falls([3.0, math.nan])


def test_students_quantiles() -> None:
    """Against the integral of the density, by Simpson's rule."""

    def inside(t: float, freedom: int, n: int = 2000) -> float:
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        values = [scale * (1 + (t * i / n) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(n + 1)]
        weights = [1, *(4 if i % 2 else 2 for i in range(1, n)), 1]
        return 2 * t / n / 3 * sum(w * v for w, v in zip(weights, values, strict=True))

    for freedom in range(1, 16):
        assert inside(optimum.student(freedom), freedom) == pytest.approx(0.95, abs=2e-4)
    assert math.isnan(optimum.student(0))
    assert optimum.student(1000) == optimum.student(15)
