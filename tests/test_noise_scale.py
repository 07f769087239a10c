"""The gradient noise scale: its estimators by a naive reference, and as a training on several ranks logs it.

pytest tests/test_noise_scale.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain import checkpoint, config, metrics, noise_scale
from mbtrain.data.rows import Stream
from mbtrain.engine import parameter_groups
from mbtrain.errors import ConfigError
from mbtrain.model import build
from mbtrain.model.loss import nats
from mbtrain.schedule import lr_factor
from mbtrain.shards import open_split
from tests import launch, tiny
from tests.test_train import tree

STEPS = 4


def of_gradients(parts: np.ndarray, rows: int) -> tuple[float, float]:
    """The estimates from the micro-batches' gradients, [parts, parameters], by their norms alone."""
    part_squares = float((parts**2).sum())
    return noise_scale.estimated(part_squares, float((parts.mean(axis=0) ** 2).sum()), len(parts), rows)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_the_estimates_are_those_without_bias(parts: int, each: int, seed: int) -> None:
    """|G|^2: the mean product of two different micro-batches' gradients. S: rows a micro-batch x sample variance."""
    gradients = np.random.default_rng(seed).normal(1, 2, (parts, 7))
    signal, noise = of_gradients(gradients, parts * each)
    products = [gradients[i] @ gradients[j] for i in range(parts) for j in range(parts) if i != j]
    assert signal == pytest.approx(np.mean(products), rel=1e-9, abs=1e-9)
    assert noise == pytest.approx(each * gradients.var(axis=0, ddof=1).sum(), rel=1e-9)


def test_they_are_right_on_average_whatever_the_batch() -> None:
    """Rows drawn around a known gradient with a known covariance: both are found at each size of both batches."""
    draw = np.random.default_rng(0)
    mean, deviation = draw.normal(0, 0.3, 20), draw.uniform(0.5, 2, 20)
    for parts, each in ((2, 1), (2, 8), (16, 1)):
        rows = draw.normal(mean, deviation, (20_000, parts, each, 20))
        found = np.mean([of_gradients(step.mean(axis=1), parts * each) for step in rows], axis=0)
        assert found[0] == pytest.approx((mean**2).sum(), rel=0.05)
        assert found[1] == pytest.approx((deviation**2).sum(), rel=0.02)


def test_both_are_smoothed_before_they_are_divided() -> None:
    known: list[float] = []
    assert noise_scale.in_rows(known) is None
    known = noise_scale.smoothed(known, (2.0, 10.0))
    assert noise_scale.in_rows(known) == pytest.approx(5)
    known = noise_scale.smoothed(known, (4.0, 0.0))
    assert noise_scale.in_rows(known) == pytest.approx(10 * 0.99 / (2 * 0.99 + 4))
    assert noise_scale.in_rows(noise_scale.smoothed([], (-1.0, 3.0))) is None, "all noise: it says nothing"


def noisy(shards: Path, **train: Any) -> dict[str, Any]:
    train = {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, **train}
    return tree(shards, train=train, log={"noise_scale": True}, optim={"warmup_steps": 0, "lr": 1e-3})


def naive(shards: Path, settings: dict[str, Any]) -> list[float]:
    """The same training in float64, a gradient for each micro-batch; the noise scale after each step."""
    c = config.validate(settings)
    torch.manual_seed(c.train.seed)
    model = build(c).double()
    optimizer = torch.optim.AdamW(parameter_groups(model, c), betas=c.optim.betas, eps=c.optim.eps)
    stream = Stream(open_split(shards, "train"), boundary=True, seed=c.train.seed)
    rows, each = c.train.global_batch_size, c.train.micro_batch_size or 1
    signal = noise = 0.0
    out = []
    for step in range(STEPS):
        parts = []
        for first in range(step * rows, (step + 1) * rows, each):
            ids = torch.from_numpy(stream.rows(np.arange(first, first + each), c.data.seq_len)[0]).long()
            loss = nats(model(ids), ids).mean()
            parts.append(torch.autograd.grad(loss, list(model.parameters())))
        flat = torch.stack([torch.cat([grad.flatten() for grad in part]) for part in parts])
        n = len(flat)
        products = flat @ flat.T
        signal = 0.99 * signal + 0.01 * float(products.sum() - products.trace()) / (n * (n - 1))
        noise = 0.99 * noise + 0.01 * each * float(flat.var(dim=0).sum())
        out.append(noise / signal)
        for param, *grads in zip(model.parameters(), *parts, strict=True):
            param.grad = torch.stack(list(grads)).mean(dim=0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.train.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = c.optim.lr * group["lr_scale"] * lr_factor(c.optim, step, step / STEPS)
        optimizer.step()
    return out


def logged(run: Path) -> list[float]:
    return [line["optim/noise_scale"] for line in metrics.read(run / "metrics.jsonl") if "optim/noise_scale" in line]


@pytest.fixture(scope="module")
def expected(shards: Path) -> list[float]:
    return naive(shards, noisy(shards))


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (4, 1), (2, 2), (2, 3)])
def test_a_training_logs_what_a_naive_loop_in_float64_finds(
    shards: Path, tmp_path: Path, expected: list[float], ranks: int, stage: int
) -> None:
    """Four micro-batches, over micro-steps, ranks, or both; and the training is what it is without."""
    path, run = launch.config_file(tmp_path, noisy(shards, zero_stage=stage)), tmp_path / "run"
    launch.mbtrain(["train", str(path), f"--run={run}"], ranks=ranks)
    if ranks == 4:
        without = tmp_path / "without"
        launch.mbtrain(["train", str(path), f"--run={without}", "--log.noise_scale=false"], ranks=ranks)
        assert launch.losses(run) == launch.losses(without)
        assert not logged(without)
    assert len(expected) == STEPS
    assert min(expected) > 0.01, "of a size that can be compared"
    assert logged(run) == pytest.approx(expected, rel=1e-3)


def test_bf16_finds_it_about_as_well(shards: Path, tmp_path: Path, expected: list[float]) -> None:
    path, run = launch.config_file(tmp_path, noisy(shards, zero_stage=1, precision="bf16")), tmp_path / "run"
    launch.mbtrain(["train", str(path), f"--run={run}"], ranks=2)
    assert logged(run) == pytest.approx(expected, rel=0.1)


def test_a_resumed_run_goes_on_with_what_it_knew(shards: Path, tmp_path: Path) -> None:
    path, whole, cut = launch.config_file(tmp_path, noisy(shards)), tmp_path / "whole", tmp_path / "cut"
    launch.mbtrain(["train", str(path), f"--run={whole}"])
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / checkpoint.name_of(STEPS))
    launch.mbtrain(["train", str(path), f"--resume={cut}"])
    assert logged(cut) == logged(whole)
    assert len(logged(cut)) == STEPS


def test_it_is_refused_where_a_step_is_one_micro_batch_or_no_rank_has_a_rows_gradient() -> None:
    wanted = {"log": {"noise_scale": True}}
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: got 4, expected below 4, or two ranks, with log"):
        config.batch_shape(tiny.make(**wanted), 1)
    assert config.batch_shape(tiny.make(**wanted), 2) == (2, 1)
    assert config.batch_shape(tiny.make(**wanted, train={"micro_batch_size": 1}), 1) == (1, 4)
    with pytest.raises(ConfigError, match=r"log\.noise_scale: got True, expected false with train\.precision=fp16"):
        tiny.make(**wanted, train={"precision": "fp16", "zero_stage": 1})
    with pytest.raises(ConfigError, match=r"log\.noise_scale: .* train\.sequence_parallel=2"):
        tiny.make(**wanted, train={"sequence_parallel": 2})
