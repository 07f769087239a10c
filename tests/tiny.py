"""Tiny configurations for tests: full in structure, small in size."""

from __future__ import annotations

from typing import Any

from mbtrain import config
from mbtrain.config import Config

STAGES: dict[int, list[dict[str, int]]] = {
    1: [{"patch_size": 1, "d_model": 16, "n_layers": 2, "n_heads": 2}],
    2: [
        {"patch_size": 4, "d_model": 32, "n_layers": 2, "n_heads": 2},
        {"patch_size": 1, "d_model": 16, "n_layers": 2, "n_heads": 2},
    ],
    3: [
        {"patch_size": 8, "d_model": 32, "n_layers": 2, "n_heads": 4},
        {"patch_size": 2, "d_model": 24, "n_layers": 1, "n_heads": 2},
        {"patch_size": 1, "d_model": 16, "n_layers": 2, "n_heads": 2},
    ],
}


def tree(stages: int = 2, preset: str = "modern", seq_len: int = 32, **sections: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries; keyword sections are laid over it."""
    base: dict[str, Any] = {
        "name": "tiny",
        "model": {"preset": preset, "stages": STAGES[stages]},
        "data": {"path": "unused", "seq_len": seq_len},
        "train": {"steps": 4, "global_batch_size": 4, "precision": "fp32", "zero_stage": 0},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "log": {"every_steps": 1, "mlflow": False},
    }
    for name, section in sections.items():
        base[name] = {**base[name], **section} if isinstance(base.get(name), dict) else section
    return base


def make(stages: int = 2, preset: str = "modern", seq_len: int = 32, **sections: Any) -> Config:
    """A validated tiny configuration."""
    return config.validate(tree(stages, preset, seq_len, **sections))
