"""Schedules: warm-up, plateau, decay, ends; pure functions of the step and the share that is done.

pytest tests/test_schedule.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain import metrics
from mbtrain.config import OptimConfig
from mbtrain.errors import ConfigError
from mbtrain.schedule import batch_factor, decay, lr_factor
from tests import launch, tiny

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


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_the_lr_follows_the_batch_by_its_rule(rule: Any, factor: float) -> None:
    o = optim(batch_rule=rule, batch_base=16)
    assert batch_factor(o, 64) == factor
    assert batch_factor(o, 4) == 1 / factor
    assert batch_factor(o, 16) == 1
    assert batch_factor(optim(), 64) == 1


def test_a_rule_without_a_base_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.batch_base: got None, expected the rows at which optim\.lr holds"):
        optim(batch_rule="sqrt")
    assert optim(batch_base=16).batch_rule == "none", "so that a sweep can hold the base"


def test_the_lr_that_is_logged_is_the_one_applied(shards: Path, tmp_path: Path) -> None:
    """Four times the batch at its rule is twice the LR without one: the same update, and the same losses."""
    train = {"steps": 3, "global_batch_size": 8}
    tree = tiny.tree(data={"path": str(shards)}, train=train, optim={"lr": 1e-3, "schedule": "cosine"})
    path = launch.config_file(tmp_path, tree)
    ruled, plain = tmp_path / "ruled", tmp_path / "plain"
    launch.mbtrain(["train", str(path), f"--run={ruled}", "--optim.batch_rule=sqrt", "--optim.batch_base=2"])
    launch.mbtrain(["train", str(path), f"--run={plain}", "--optim.lr=2e-3"])
    read = [metrics.read(run / "metrics.jsonl") for run in (ruled, plain)]
    lrs = [[line["optim/lr"] for line in lines if "optim/lr" in line] for lines in read]
    assert lrs[0] == pytest.approx(lrs[1])
    assert lrs[0][1] == pytest.approx(2e-3 * 0.75), "cosine after a third of the run"
    assert launch.losses(ruled) == pytest.approx(launch.losses(plain), abs=1e-6)
