"""Schedules: warm-up, plateau, decay, ends; pure functions of the step and the share that is done.

pytest tests/test_schedule.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain.config import OptimConfig
from mbtrain.schedule import decay, lr_factor

KINDS = ("polynomial", "cosine", "wsd", "constant")
shares = st.floats(0, 1)


def optim(**values: Any) -> OptimConfig:
    return OptimConfig(**{"warmup_steps": 0, **values})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_decay_goes_from_1_to_the_floor(kind: str, floor: float) -> None:
    o = optim(schedule=kind, final_lr_ratio=floor)
    assert decay(o, 0.0) == 1
    assert decay(o, 1.0) == pytest.approx(1 if kind == "constant" else floor, abs=1e-12)


def test_decay_is_the_formula_in_the_middle() -> None:
    """Values by hand, so that a swapped sign or a missing floor shows."""
    assert decay(optim(schedule="polynomial"), 0.25) == 0.75
    assert decay(optim(schedule="polynomial", power=2.0, final_lr_ratio=0.5), 0.5) == 0.5 + 0.5 * 0.25
    assert decay(optim(schedule="cosine", final_lr_ratio=0.1), 0.5) == pytest.approx(0.1 + 0.9 * 0.5)
    assert decay(optim(schedule="cosine"), 0.25) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert decay(optim(schedule="wsd", decay_share=0.2), 0.9) == pytest.approx(0.5)
    assert decay(optim(schedule="wsd", decay_share=0.5, final_lr_ratio=0.2), 0.75) == pytest.approx(0.2 + 0.8 * 0.5)


@settings(deadline=None)
@given(share=shares, done=shares)
def test_wsd_is_flat_until_its_last_share_and_falls_after(share: float, done: float) -> None:
    factor = decay(optim(schedule="wsd", decay_share=share), done)
    if done <= 1 - share or share == 0:
        assert factor == 1
    else:
        assert factor == pytest.approx((1 - done) / share, abs=1e-9)


@settings(deadline=None)
@given(kind=st.sampled_from(KINDS), floor=shares, share=shares, power=st.floats(0.25, 4), a=shares, b=shares)
def test_decay_never_rises_and_stays_between_floor_and_1(
    kind: Any, floor: float, share: float, power: float, a: float, b: float
) -> None:
    o = optim(schedule=kind, final_lr_ratio=floor, decay_share=share, power=power)
    early, late = sorted((a, b))
    assert decay(o, early) >= decay(o, late) - 1e-9
    assert floor - 1e-9 <= decay(o, late) <= 1 + 1e-9


def test_warm_up_is_a_line_from_the_first_step_to_the_last_of_it() -> None:
    o = optim(schedule="constant", warmup_steps=4)
    assert [lr_factor(o, step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_factor(optim(schedule="constant"), 0, 0.0) == 1, "no warm-up: the first step is a full one"


@settings(max_examples=50, deadline=None)
@given(kind=st.sampled_from(KINDS), warmup=st.integers(0, 100), step=st.integers(0, 200), done=shares)
def test_warm_up_multiplies_the_decay(kind: Any, warmup: int, step: int, done: float) -> None:
    o = optim(schedule=kind, warmup_steps=warmup)
    assert lr_factor(o, step, done) == min(1, (step + 1) / warmup if warmup else 1) * decay(o, done)
    assert lr_factor(o, step, done) == lr_factor(o, step, done), "nothing is remembered"


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_outside_0_to_1_is_its_nearest_end(kind: str) -> None:
    """Minutes may run a little over; the LR must not turn negative, nor a power of a negative number complex."""
    o = optim(schedule=kind, power=0.5)
    assert lr_factor(o, 9, 1.001) == lr_factor(o, 9, 1.0)
    assert lr_factor(o, 9, -0.1) == lr_factor(o, 9, 0.0) == 1
