"""Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682): averaging in place of a schedule that falls.

    u   = g / (sqrt(v) + eps) + decay y       g the gradient at y, v the mean of its squares
    z  <- z - lr u                            the sequence that takes the steps
    x  <- (1 - c) x + c z                     its average, which is evaluated; c = w / sum of w, w = (largest lr)^2
    y   = (1 - beta) z + beta x               where the next gradient is taken: the weights while training

lr has the factor sqrt(1 - beta2^t), as the authors' code has in place of v's correction. x is not kept: it is
(y - (1 - beta) z) / beta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mbtrain.optim.eager import Eager


class ScheduleFree(Eager):
    """Parameters are y. `lr`, the rate that all groups' rates are multiples of, is to be set before each step."""

    paused = False
    averages = True
    lr = 0.0

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float):
        super().__init__(groups, {"betas": betas, "eps": eps})

    def kinds(self, group: dict[str, Any]) -> tuple[str, ...]:
        """What is kept of each element of this group's parameters, by name."""
        return ("z", "exp_avg_sq")

    def ready(self, group: dict[str, Any], param: Tensor) -> None:
        """Give a parameter (or flat part of some) of this group the state before its first step."""
        once = {name: torch.zeros((), dtype=torch.float64) for name in ("step", "largest_lr", "weight_sum")}
        self.state[param] = {**once, "z": param.detach().clone(), "exp_avg_sq": torch.zeros_like(param)}

    def averaged(self, y: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The weights that are evaluated, x, of any stretch of the weights and of the state by kind; a new tensor."""
        beta = self.defaults["betas"][0]
        return torch.lerp(y.detach(), state["z"], 1 - 1 / beta) if beta else state["z"].clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, or none."""
        for group in [] if self.paused else self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, y: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta, beta2) = self.state[y], group["betas"]
        step = int(state["step"].add_(1))
        correction = math.sqrt(1 - beta2**step)
        largest = max(float(state["largest_lr"]), self.lr * correction)
        state["largest_lr"].fill_(largest)
        weight = largest**2
        total = float(state["weight_sum"].add_(weight))
        c = weight / total if total else 0.0
        lr = group["lr"] * correction
        z, squares = state["z"], state["exp_avg_sq"]
        squares.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = torch.addcdiv(y * group["weight_decay"], grad, squares.sqrt().add_(group["eps"]))
        y.lerp_(z, c).add_(update, alpha=lr * (beta * (1 - c) - 1))
        z.add_(update, alpha=-lr)
