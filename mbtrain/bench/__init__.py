"""Measurements: verbs of `mbtrain bench`, never timed tests. Nothing here imports torch before a verb runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mbtrain.bench.claims import claims
from mbtrain.bench.data import data
from mbtrain.bench.everyday import everyday
from mbtrain.bench.generation import generate
from mbtrain.bench.length import length
from mbtrain.bench.overhead import deepspeed
from mbtrain.bench.quality import quality
from mbtrain.bench.recipe import recipe
from mbtrain.bench.roofline import roofline
from mbtrain.bench.saving import saving
from mbtrain.bench.sequence import sequence
from mbtrain.bench.start import start
from mbtrain.bench.training import train

VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train,
    "quality": quality,
    "generate": generate,
    "deepspeed": deepspeed,
    "recipe": recipe,
    "data": data,
    "saving": saving,
    "start": start,
    "everyday": everyday,
    "sequence": sequence,
    "length": length,
    "roofline": roofline,
    "claims": claims,
}
