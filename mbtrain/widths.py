"""Families of a model: wider, deeper, and the model that the others are measured by. No torch.

Wider models have more heads of the same width, as muP's family needs (model/mup.py). What a stage is measured by,
its base_*, stays: `widened(based(config), 4)` is four times the model whose values are tuned.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal, cast

from mbtrain.config import Config, StageConfig, validate
from mbtrain.errors import ConfigError

Which = Literal["both", "global", "local"]
WAYS = ("both", "global", "local", "depth")  # in which a model can grow


def widened(config: Config, factor: float, which: Which = "both") -> Config:
    """The config with d_model, d_ff and n_heads multiplied: of all stages, of all but the last, or of the last alone.

    factor may be below 1, as 1/8. Raises ConfigError where a width or a number of heads would not be whole.
    """
    last = len(config.model.stages) - 1
    changed = {"both": range(last + 1), "global": range(max(last, 1)), "local": range(last, last + 1)}[which]
    exact = Fraction(factor).limit_denominator(4096)
    stages = [
        _wider(stage, exact, f"model.stages.{i}") if i in changed else stage.model_dump()
        for i, stage in enumerate(config.model.stages)
    ]
    return with_stages(config, stages)


def deepened(config: Config, factor: float) -> Config:
    """The config with n_layers of every stage multiplied. Raises ConfigError where layers would not be whole."""
    exact = Fraction(factor).limit_denominator(4096)
    return with_stages(
        config,
        [
            {**stage.model_dump(), "n_layers": _whole(stage.n_layers * exact, f"model.stages.{i}.n_layers", exact)}
            for i, stage in enumerate(config.model.stages)
        ],
    )


def grown(config: Config, factor: float, way: str) -> Config:
    """`deepened` for depth, else `widened`: one of WAYS. Raises as they do."""
    return deepened(config, factor) if way == "depth" else widened(config, factor, cast(Which, way))


def based(config: Config) -> Config:
    """The config as its own base: those base_* that no stage names are its width, depth and width per head."""
    return with_stages(
        config,
        [
            {
                **stage.model_dump(),
                "base_d_model": stage.base_d_model or stage.d_model,
                "base_n_layers": stage.base_n_layers or stage.n_layers,
                "base_d_head": stage.base_d_head or stage.d_head,
            }
            for stage in config.model.stages
        ],
    )


def with_stages(config: Config, stages: list[dict[str, Any]]) -> Config:
    """The config with other stages, validated anew."""
    tree = config.model_dump()
    return validate({**tree, "model": {**tree["model"], "stages": stages}})


def _wider(stage: StageConfig, factor: Fraction, where: str) -> dict[str, Any]:
    changed: dict[str, Any] = {
        "d_model": _whole(stage.d_model * factor, f"{where}.d_model", factor),
        "n_heads": _whole(stage.n_heads * factor, f"{where}.n_heads", factor),
    }
    if stage.d_ff is not None:
        changed["d_ff"] = _whole(stage.d_ff * factor, f"{where}.d_ff", factor)
    return {**stage.model_dump(), **changed}


def _whole(value: Fraction, where: str, factor: Fraction) -> int:
    if value.denominator != 1 or value < 1:
        raise ConfigError(f"{where}: {float(value):g} at {factor} of the size, expected a whole number above 0")
    return int(value)
