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


def batch_factor(optim: OptimConfig, rows: int) -> float:
    """Factor on the LR for batches of so many rows, by optim.batch_rule: (rows / batch_base) ** (0, 1/2 or 1).

    Linear is what SGD asks for far below the noise scale (Goyal et al. 2017, arXiv 1706.02677), the square root what
    Adam does (Malladi et al. 2022, arXiv 2205.10287); betas stay as they are.
    """
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[optim.batch_rule]
    return float((rows / optim.batch_base) ** power) if optim.batch_base and power else 1.0


def ema_decay(share: float, update: int) -> float:
    """What update number `update` (from 1) leaves of optim.ema's average: (1 - 1 / update) ** p.

    Weights after update i count in proportion to i ** (p - 1), or nearly. p is such that half of the average lies on
    the last `share` of the updates, however many there were: the average grows with the run, and the start needs no
    rule of its own (Karras et al. 2024, arXiv 2312.02696, section 3.1). 1/2: the plain mean of all.
    """
    return float((1 - 1 / update) ** (math.log(0.5) / math.log(1 - share)))


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
