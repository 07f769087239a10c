"""The small model on which a large one's values are tuned: all stages narrower, and the base that muP measures by."""

from __future__ import annotations

from typing import Any

from mbtrain.config import Config, StageConfig
from mbtrain.errors import ConfigError
from mbtrain.widths import based, with_stages


def proxy(config: Config, shrink: int) -> Config:
    """The config with every stage 1 / shrink as wide, as deep as before, as its own base.

    Heads stay as wide, and there are fewer of them; where less than one would be left there is one, which is narrower.
    Raises ConfigError naming the stage where a width or a number of heads does not divide.
    """
    stages = [_narrow(stage, shrink, f"model.stages.{i}") for i, stage in enumerate(config.model.stages)]
    return based(with_stages(config, stages))


def _narrow(stage: StageConfig, shrink: int, where: str) -> dict[str, Any]:
    for key in ("d_model", "d_ff"):
        value = getattr(stage, key)
        if value is not None and value % shrink:
            raise ConfigError(f"{where}.{key}: {value} has no 1/{shrink}; expected a multiple, or shrink by less")
    if stage.d_model // shrink < stage.patch_size:
        least = f"{where}.d_model: {stage.d_model} / {shrink} is less than patch_size = {stage.patch_size}"
        raise ConfigError(
            f"{least}, so that a byte would have no width; expected shrink of at most "
            f"{stage.d_model // stage.patch_size}"
        )
    if stage.n_heads > shrink and stage.n_heads % shrink:
        raise ConfigError(
            f"{where}.n_heads: {stage.n_heads} heads have no 1/{shrink}; expected a multiple, or shrink by less"
        )
    return {
        **stage.model_dump(exclude={"base_d_model", "base_n_layers", "base_d_head"}),
        "d_model": stage.d_model // shrink,
        "d_ff": None if stage.d_ff is None else stage.d_ff // shrink,
        "n_heads": max(1, stage.n_heads // shrink),
    }
