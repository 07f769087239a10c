"""The loss: cross-entropy in nats, per target."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mbtrain.model import cpu_kernels, fused


def nats(logits: Tensor, ids: Tensor) -> Tensor:
    """-ln p(ids) under logits: (b, t, v), (b, t) -> (b, t) in float32 at least (float64 stays float64).

    A model of other targets than ids gives nats (b, t) itself, and they are handed on.

    Nothing is left out and nothing averaged here: every id, byte 0 included, has its loss; masks come later.
    """
    if logits.ndim == 2:
        return _wide(logits)
    flat, wanted = rearrange(logits, "b t v -> (b t) v"), rearrange(ids, "b t -> (b t)")
    if fused.takes_logits(flat):
        return fused.nats(flat, wanted).view(ids.shape)
    if cpu_kernels.ready(flat):
        return cpu_kernels.nats(flat, wanted).view(ids.shape)
    return F.cross_entropy(_wide(flat), wanted, reduction="none").view(ids.shape)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()
