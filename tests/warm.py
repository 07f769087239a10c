"""Imports what a start of `mbtrain` and `mbtrain-prep` imports, and does nothing else. See `tests.forks`."""

import importlib
import os

os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.pyplot  # noqa: F401  the loss curve at the end
import pyarrow.parquet  # noqa: F401
import torch._dynamo  # noqa: F401  with ZeRO-3, and where activations are recomputed

import data_prep.cli
import data_prep.image
import data_prep.text  # noqa: F401
from mbtrain import cli, engine, sample, train  # noqa: F401

engine.import_deepspeed()
for name in ("runtime.zero.muon.original_muon", "runtime.zero.stage_1_and_2", "runtime.zero.stage3"):
    importlib.import_module(f"deepspeed.{name}")
