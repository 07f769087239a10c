"""The optimizers by name, as DeepSpeed takes them: over whole parameters, or over a rank's flat part of a group.

Each says by name what it keeps of every element (`kinds`), so that the engine can give it its state at the start, write
it by parameter and put it back into any number of ranks; and each can let a step pass (`paused`). What one keeps once,
not by element, are 0-dimensional tensors in its state.
"""

from __future__ import annotations

from typing import Any

import torch

from mbtrain.config import Config
from mbtrain.optim.adamw import AdamW
from mbtrain.optim.muon import Muon, Piece, split_groups
from mbtrain.optim.schedule_free import ScheduleFree

Optimizer = AdamW | Muon | ScheduleFree
CLASSES = (AdamW, Muon, ScheduleFree)
__all__ = ["CLASSES", "AdamW", "Muon", "Optimizer", "Piece", "ScheduleFree", "build", "set_lr"]


def build(groups: list[dict[str, Any]], config: Config) -> Optimizer:
    """The optimizer of optim.name over groups of parameters, which hold lr, lr_scale, weight_decay, maybe eps."""
    optim = config.optim
    if optim.name == "schedule_free":
        return ScheduleFree(groups, betas=optim.betas, eps=optim.eps)
    if optim.name == "adamw":
        return AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
    return Muon(
        split_groups(groups, optim),
        betas=optim.betas,
        eps=optim.eps,
        momentum=optim.muon_momentum,
        normalised=optim.name == "normuon",
        dtype=torch.float32 if config.train.precision == "fp32" else torch.bfloat16,
    )


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set every group's rate for the next step: lr times its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    if isinstance(optimizer, ScheduleFree):
        optimizer.lr = lr
