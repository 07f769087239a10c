"""AdamW as torch has it, fused, that can let a step pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mbtrain.optim.eager import Eager


class AdamW(Eager, torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) that, while paused, makes no step: DeepSpeed then clears its gradients."""

    paused = False
    averages = False  # whether other weights are evaluated than those that are trained

    def kinds(self, group: dict[str, Any]) -> tuple[str, ...]:
        """What is kept of each element of this group's parameters, by name."""
        return ("exp_avg", "exp_avg_sq")

    def ready(self, group: dict[str, Any], param: Tensor) -> None:
        """Give a parameter (or flat part of some) of this group the state before its first step."""
        self.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            **{kind: torch.zeros_like(param, memory_format=torch.preserve_format) for kind in self.kinds(group)},
        }

    def averaged(self, weights: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The weights that are evaluated, of any stretch of the weights and of the state by kind: the same."""
        return weights

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, or none."""
        return None if self.paused else _STEP(self, closure)


_STEP = inspect.unwrap(torch.optim.AdamW.step)  # see Eager
