"""What a coordinate check looks at: places in a model, and what one training gave there. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from mbtrain.config import ModelConfig

LAST = -1  # the last layer, in models of several depths


class Place(NamedTuple):
    """Where a tensor is: its stage, what it is there, and the number of its layer (None: not in a layer).

    part   input, attention, feed-forward, residual, slices (eq. 4's product), scores (q k), logits; of weights the
           parameter's own name, as in attn.qkv
    """

    stage: str
    part: str
    layer: int | None = None

    def __str__(self) -> str:
        layer = [] if self.layer is None else ["last" if self.layer == LAST else str(self.layer)]
        return " ".join([self.stage, self.part, *layer])


@dataclass
class Trained:
    """What one training gave, by step and place.

    sizes     mean |x|                                           changes   RMS of x now less x before the first step
    updates   RMS of (W now less W before the first step) x      losses    nats per target, before each step and after
    roles     of the weights in `updates`                                  the last
    """

    sizes: dict[int, dict[Place, float]] = field(default_factory=dict)
    changes: dict[int, dict[Place, float]] = field(default_factory=dict)
    updates: dict[int, dict[Place, float]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    roles: dict[Place, str] = field(default_factory=dict)


def stage_names(model: ModelConfig) -> list[str]:
    """What the stages of a configuration are called, coarse to fine."""
    n = len(model.stages)
    if n == 1:
        return ["model"]
    return ["global", *(f"middle {i}" if n > 3 else "middle" for i in range(1, n - 1)), "local"]


def of_last_layer(trained: Trained, model: ModelConfig) -> Trained:
    """Of places in layers those in the last one of their stage alone, so that models of several depths compare."""
    last = dict(zip(stage_names(model), (stage.n_layers - 1 for stage in model.stages), strict=True))

    def kept(values: dict[Place, float]) -> dict[Place, float]:
        return {_last(place): x for place, x in values.items() if place.layer in (None, last[place.stage])}

    def each(of: dict[int, dict[Place, float]]) -> dict[int, dict[Place, float]]:
        return {step: kept(values) for step, values in of.items()}

    roles = {_last(place): role for place, role in trained.roles.items()}
    return Trained(each(trained.sizes), each(trained.changes), each(trained.updates), trained.losses, roles)


def _last(place: Place) -> Place:
    return place if place.layer is None else place._replace(layer=LAST)
