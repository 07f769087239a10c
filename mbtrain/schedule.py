"""Learning-rate schedules: pure functions of the step and of the share of the run that is done. No torch.

The result is a factor on every parameter group's own LR, so that groups keep their ratios.
"""

from __future__ import annotations

import math

from mbtrain.config import OptimConfig


def lr_factor(optim: OptimConfig, step: int, done: float) -> float:
    """Factor on the LR for optimizer step `step` (from 0), when the share `done` (0 to 1) of the run is behind.

    Linear warm-up over the first warmup_steps times the schedule's decay over the whole run.
    """
    warmup = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    return warmup * decay(optim, min(max(done, 0.0), 1.0))


def decay(optim: OptimConfig, done: float) -> float:
    """The schedule without warm-up: 1 at the start, final_lr_ratio at the end (constant: always 1)."""
    floor = optim.final_lr_ratio
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "polynomial":
        return floor + (1 - floor) * (1 - done) ** optim.power
    if optim.schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    if optim.decay_share == 0 or done <= 1 - optim.decay_share:
        return 1.0
    return floor + (1 - floor) * (1 - done) / optim.decay_share
