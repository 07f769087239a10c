"""torch's optimizer without its guards against torch.compile, which import torch._dynamo: 1 s of CPU at each start."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class Eager(torch.optim.Optimizer):
    """An optimizer that no compiler traces: mbtrain compiles blocks of a model, never a step.

    torch wraps these methods so that a compiler passes them over, and imports the compiler at the first call. Below the
    wrapping they are the same functions.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)
