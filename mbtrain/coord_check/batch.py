"""The one batch that a coordinate check trains on: a few short rows of the configuration's own data."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from mbtrain import vocab
from mbtrain.config import Config, source_paths
from mbtrain.data.mixture import mixture
from mbtrain.data.opening import open_sources
from mbtrain.errors import DataError

ROWS, ROW_BYTES = 8, 64
LATENTS = 32
LEAST_PATCHES = 4  # of the coarsest stage in a row: its attention must have something to look at
LEAST_ROWS = 2


def shortened(settings: Config) -> Config:
    """The configuration for rows of some 64 bytes, without dropout, by plain AdamW in fp32; widths are as they were.

    Rows of many-byte patches are longer (four patches), those of tokens four times as long, and there are fewer of them
    then. What is no width and only costs time is cut with the rows: perceiver_ar keeps 32 latents.
    """
    model = settings.model
    patch = model.stages[0].patch_size
    wanted = max(ROW_BYTES * (4 if model.kind == "subword" else 1), LEAST_PATCHES * patch)
    latents = None if model.latents is None else min(model.latents, LATENTS)
    unit = patch if latents is None else latents // 2
    seq_len = min(-(-wanted // unit) * unit, settings.data.seq_len)
    rows = min(ROWS, max(LEAST_ROWS, ROWS * ROW_BYTES // seq_len))
    block = model.block.model_copy(update={"dropout": 0.0})
    return settings.model_copy(
        update={
            "model": model.model_copy(update={"block": block, "latents": latents}),
            "data": settings.data.model_copy(update={"seq_len": seq_len}),
            "train": settings.train.model_copy(
                update={"global_batch_size": rows, "micro_batch_size": None, "sequence_parallel": 1}
            ),
            "optim": settings.optim.model_copy(update={"name": "adamw", "batch_rule": "none"}),
        }
    )


def fixed_batch(settings: Config) -> tuple[Tensor, Tensor, str]:
    """The first training rows of a configuration, cut to those of `shortened`, and where they are from.

    Returns ids int64 (b, t), which of them count, bool (b, t), and the data's name. Without data: the sources of
    Python's standard library, so that a check needs no preparation.

    Raises:
        ConfigError, DataError: the data is there, and cannot be read as configured.
    """
    short = shortened(settings)
    rows, seq_len = short.train.global_batch_size, short.data.seq_len
    paths = [path for _, path in source_paths(settings)]
    if not all(Path(path).exists() for path in paths):
        ids = torch.frombuffer(bytearray(_standard_library(rows, seq_len)), dtype=torch.uint8).long()
        return ids.view(rows, seq_len), torch.ones(rows, seq_len, dtype=torch.bool), "Python's standard library"
    opened = open_sources(settings, settings.data.train_split, seed=settings.train.seed)
    read = mixture(settings.data, [(source.name, source.stream) for source in opened]).rows(0, rows)
    ids = torch.from_numpy(read.ids).long()[:, :seq_len]
    counts = torch.ones(ids.shape, dtype=torch.bool) if read.mask is None else torch.from_numpy(read.mask)[:, :seq_len]
    return ids, counts & (ids != vocab.FILLING), ", ".join(paths)


def _standard_library(rows: int, row_bytes: int) -> bytes:
    """Rows of Python's own source files, each from the middle of another file, the first ones by name."""
    pieces: list[bytes] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_bytes()
        if len(text) >= 2 * row_bytes:
            pieces.append(text[len(text) // 2 :][:row_bytes])
        if len(pieces) == rows:
            return b"".join(pieces)
    raise DataError(f"data: nothing at its path, and {len(pieces)} Python sources in its place, expected {rows}")
