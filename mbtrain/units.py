"""How many bytes one position of the coarsest stage holds, where the text decides it: words, or tokens.

What a byte costs follows from it, and with it progress in FLOPs, train.flops and MFU.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mbtrain.config import Config, source_paths
from mbtrain.data.mixture import Mixture, mixture
from mbtrain.data.opening import open_sources
from mbtrain.model import Model, build
from mbtrain.model.flops import by_content

MEASURED_ROWS = 64


def measured_unit_bytes(model: Model, rows: Mixture) -> float | None:
    """Mean bytes of a position over the first 64 training rows; None for a model whose positions are all alike.

    A pure function of the data and the seed of its order: the same on every rank and after every resume.

    Raises:
        DataError: the rows cannot be read.
    """
    if not by_content(model.config):
        return None
    count = MEASURED_ROWS if rows.end is None else min(MEASURED_ROWS, rows.end)
    return model.unit_bytes(torch.from_numpy(rows.rows(0, count).ids).long())


def unit_bytes_at_hand(settings: Config) -> float | None:
    """As measured_unit_bytes, of a configuration alone; None as well where its data or its vocabulary is not there.

    Raises:
        ConfigError: what is there is not as configured.
        DataError: it cannot be read.
    """
    vocabulary = settings.model.vocabulary
    needed = [path for _, path in source_paths(settings)] + ([] if vocabulary is None else [vocabulary])
    if not by_content(settings.model) or not all(Path(path).exists() for path in needed):
        return None
    opened = open_sources(settings, settings.data.train_split, seed=settings.train.seed)
    with torch.device("meta"):  # no weight is looked at
        model = build(settings)
    return measured_unit_bytes(model, mixture(settings.data, [(source.name, source.stream) for source in opened]))
