"""Schedule-free AdamW against its sequences written out, in float64.

pytest tests/optim/test_schedule_free.py
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mbtrain.errors import ConfigError
from mbtrain.optim import ScheduleFree
from tests import tiny


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_is_its_three_sequences(decay: float) -> None:
    """x, y and z of the paper, with a warm-up and a group of another LR."""
    torch.manual_seed(0)
    beta, beta2, eps, scale = 0.9, 0.95, 1e-8, 3.0
    param = nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    group = {"params": [param], "lr": 0.0, "lr_scale": scale, "weight_decay": decay}
    optimizer = ScheduleFree([group], betas=(beta, beta2), eps=eps)
    optimizer.ready(optimizer.param_groups[0], param)
    z = x = param.detach().clone()
    y, v, total, largest = z, torch.zeros_like(z), 0.0, 0.0
    for t in range(1, 9):
        lr = 0.01 * min(1.0, t / 4) * (1.0 if t < 7 else 0.5)
        optimizer.lr = lr
        optimizer.param_groups[0]["lr"] = lr * scale
        grad = torch.randn(7, 5, dtype=torch.float64) + y
        param.grad = grad.clone()
        optimizer.step()
        corrected = math.sqrt(1 - beta2**t)
        largest = max(largest, lr * corrected)
        total += largest**2
        v = beta2 * v + (1 - beta2) * grad**2
        z = z - lr * scale * corrected * (grad / (v.sqrt() + eps) + decay * y)
        c = largest**2 / total
        x = (1 - c) * x + c * z
        y = (1 - beta) * z + beta * x
        torch.testing.assert_close(param.detach(), y)
        torch.testing.assert_close(optimizer.state[param]["z"], z)
        torch.testing.assert_close(optimizer.averaged(param, optimizer.state[param]), x)


def test_the_average_converges_where_the_last_point_does_not() -> None:
    """On a quadratic with noise, with a constant LR: what the method is for."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.full((64,), 3.0))
    optimizer = ScheduleFree([{"params": [param], "lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.0}], (0.9, 0.95), 1e-8)
    optimizer.ready(optimizer.param_groups[0], param)
    optimizer.lr = 0.1
    for _ in range(800):
        param.grad = param.detach() + torch.randn(64)
        optimizer.step()

    def error(weights: Tensor) -> float:
        return float(weights.square().mean())

    state = optimizer.state[param]
    assert error(optimizer.averaged(param, state)) < 0.2 * error(state["z"])


def test_a_schedule_that_falls_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"optim\.schedule: got wsd, expected constant with optim\.name=schedule_free"
    ):
        tiny.make(optim={"name": "schedule_free", "schedule": "wsd"})
