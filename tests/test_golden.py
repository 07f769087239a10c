"""The golden curve: what training gave in plain torch and fp32 is what every faster path gives.

The numbers below were printed by `python -m tests.test_golden` with MBTRAIN_NATIVE=0.

pytest tests/test_golden.py
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from mbtrain import engine
from mbtrain.bench.own import engine_step
from mbtrain.config import Config
from mbtrain.schedule import lr_factor
from tests import tiny

STEPS = 60
# Bits per byte before each fourth update.
GOLDEN = [
    8.6162,
    7.6638,
    6.7221,
    5.9076,
    4.9852,
    4.2781,
    3.6397,
    3.1472,
    2.666,
    2.3454,
    2.064,
    1.8478,
    1.6476,
    1.5391,
    1.405,
]
STAGES = [
    {"patch_size": 8, "d_model": 64, "n_layers": 2, "n_heads": 2},
    {"patch_size": 1, "d_model": 32, "n_layers": 2, "n_heads": 1},
]


def settings_of(**train: Any) -> Config:
    """A small model with everything that has a fast path."""
    return tiny.make(
        seq_len=64,
        model={**tiny.tree()["model"], "stages": STAGES},
        train={"steps": STEPS, "global_batch_size": 8, "precision": "fp32", "zero_stage": 1, **train},
        optim={"lr": 6e-3, "warmup_steps": 5, "embedding_lr": 4, "betas": [0.9, 0.95]},
    )


def rows(step: int) -> torch.Tensor:
    """A batch of (8, 64) bytes: sawtooths of several slopes, the same on every machine."""
    number = np.arange(8)[:, None] + 8 * step
    return torch.from_numpy(((np.arange(64)[None] * (number % 3 + 1) + number * 37) % 64).astype(np.int64))


def curve(settings: Config, ranks: engine.Ranks) -> list[float]:
    """Bits per byte before each fourth update of the engine."""
    torch.manual_seed(3)
    step, _ = engine_step(settings, ranks)
    lost = [step(rows(i), lr_factor(settings.optim, i, i / STEPS)) for i in range(STEPS)]
    return [round(nats / float(np.log(2)), 4) for nats in lost[::4]]


# How far a path may be from the curve, in bits per byte: what its rounding does and no more.
PATHS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({}, 5e-4),
    "fp32, four micro-steps": ({"micro_batch_size": 2}, 5e-4),
    "fp32, blocks recomputed": ({"activation_checkpointing": True}, 5e-4),
    "fp32, in chunks": ({"chunk_bytes": 128}, 5e-4),
    "fp32, stage 0": ({"zero_stage": 0}, 5e-4),
    "fp32, stage 2": ({"zero_stage": 2}, 5e-4),
    "bf16": ({"precision": "bf16"}, 0.02),
    "bf16, four micro-steps": ({"precision": "bf16", "micro_batch_size": 2}, 0.02),
    "bf16, in chunks": ({"precision": "bf16", "chunk_bytes": 128}, 0.02),
    "bf16, stage 2": ({"precision": "bf16", "zero_stage": 2}, 0.02),
    "bf16, stage 3": ({"precision": "bf16", "zero_stage": 3}, 0.02),
    "autocast": ({"precision": "autocast"}, 0.02),
}


@functools.cache
def curves(native: bool) -> dict[str, list[float]]:
    """Every path's curve, made in one process; native: with the compiled kernels, where there is a compiler."""
    names = [name for name in PATHS if native or "bf16" in name]
    env = {**os.environ, "MBTRAIN_NATIVE": str(int(native)), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "tests.test_golden", *names]
    made: dict[str, list[float]] = json.loads(subprocess.check_output(run, env=env, timeout=300))
    return made


@pytest.mark.parametrize("name", PATHS)
def test_every_path_follows_the_curve(name: str) -> None:
    follows(name, native=True)


@pytest.mark.parametrize("name", [name for name in PATHS if "bf16" in name])
def test_without_compiled_kernels_too(name: str) -> None:
    follows(name, native=False)


def follows(name: str, native: bool) -> None:
    """A path's curve is GOLDEN but for what its rounding does."""
    got = curves(native)[name]
    assert max(abs(a - b) for a, b in zip(got, GOLDEN, strict=True)) < PATHS[name][1]


if __name__ == "__main__":
    ranks = engine.start()
    asked = sys.argv[1:] or ["fp32"]
    json.dump({name: curve(settings_of(**PATHS[name][0]), ranks) for name in asked}, sys.stdout)
