"""By what MLflow's pages sort, group and plot runs: tags and parameters that say what a run is.

mbtrain.group       the run's name without its seed: group by it, and MLflow draws the mean over seeds
mbtrain.kind .data .modality .seed .parameters      tags, to group and to filter by
mbtrain.parameters .training_flops_per_byte         also parameters, to plot a score against
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbtrain.config import Config

_SEED = re.compile(r"[_.-]s(?:eed)?_?\d+$")


def without_seed(name: str) -> str:
    """The name of a group of seeds: `lr3` of `lr3_s0`, `lr3-seed1`; a name that is a seed alone stays."""
    return _SEED.sub("", name) or name


def labels(settings: Config, sources: Sequence[tuple[str, str]], parameters: int) -> dict[str, str]:
    """Tags of a run; sources are (name, modality)."""
    return {
        "mbtrain.group": without_seed(settings.name),
        "mbtrain.kind": settings.model.kind,
        "mbtrain.data": " + ".join(name for name, _ in sources),
        "mbtrain.modality": " + ".join(dict.fromkeys(modality for _, modality in sources)),
        "mbtrain.seed": str(settings.train.seed),
        "mbtrain.parameters": str(parameters),
    }
