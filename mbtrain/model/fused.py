"""Which work goes to the Triton kernels of gpu_kernels.py: on a GPU where Triton is there, unless MBTRAIN_FUSED=0.

The reference stays where it was, loss.nats and layers.attend; with TRITON_INTERPRET=1 (a switch of Triton's own) the
kernels also run on a CPU, slowly, which is how tests hold them to it.
"""

from __future__ import annotations

import functools
import importlib
import os

import torch
from torch import Tensor

from mbtrain.model import compiled

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_IDS = 1024
MOST_POSITIONS = 32
HEAD_WIDTHS = range(16, 129)


@functools.cache
def _found() -> bool:
    if os.environ.get("MBTRAIN_FUSED") == "0" or compiled.compiler() is None:  # Triton builds its launchers with one
        return False
    try:
        importlib.import_module("mbtrain.model.gpu_kernels")
    except ImportError:
        return False
    return True


def _wanted(device: str) -> bool:
    """Whether work on this kind of device is for the kernels, which are then known to torch."""
    return (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and _found()


def settle_for_compiler() -> None:
    """Tell torch.compile that the choice never changes. Not at import: that would load the compiler, seconds of it."""
    global _wanted
    _wanted = torch.compiler.assume_constant_result(_wanted)


def _runs(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.numel() > 0 and _wanted(x.device.type)


def takes_logits(logits: Tensor) -> bool:
    """Whether `nats` of gpu_kernels.py computes these logits (n, v)."""
    return logits.shape[-1] <= MOST_IDS and _runs(logits)


def nats(logits: Tensor, ids: Tensor) -> Tensor:
    """-ln p(ids) in fp32: logits (n, v), ids (n,) -> (n,). No fp32 copy of the logits is made."""
    return torch.ops.mbtrain.nats(logits, ids)


def takes_patches(q: Tensor, k: Tensor) -> bool:
    """Whether `attend` computes this causal attention without mask and dropout; q, k (b, h, t, c)."""
    return 1 < q.shape[2] <= MOST_POSITIONS and q.shape == k.shape and q.shape[3] in HEAD_WIDTHS and _runs(q)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention inside short patches, (b, h, t, c) each -> (b, h, t, c) in v's dtype.

    Under autocast the norm of queries and keys gives fp32; v is what a product made of it.
    """
    return torch.ops.mbtrain.attend_short(q.to(v.dtype), k.to(v.dtype), v)
