"""What a trial's process has imported before it is one: each is forked from a server that imported this, once.

A start of `mbtrain train` spends seconds importing torch and DeepSpeed. The server does nothing else: it starts no
thread, makes no process group, and asks no GPU for anything (a forked process could not use one that was).
"""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # no pool of threads here, which a fork would not have; a trial sets its own
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # "is there a GPU?" is answered without starting CUDA

import einops._torch_specific  # noqa: F401
import pyarrow.parquet  # noqa: F401

from mbtrain import engine, train  # noqa: F401
from mbtrain.sweep import child  # noqa: F401

engine.import_all()
gc.collect()
gc.freeze()  # so that a trial's collections leave these pages alone, and they stay shared
