"""The loss: cross-entropy in nats, per target."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mbtrain.model import cpu_kernels


def nats(logits: Tensor, ids: Tensor) -> Tensor:
    """-ln p(ids) under logits: (b, t, v), (b, t) -> (b, t) in float32 at least (float64 stays float64).

    A model of other targets than ids gives nats (b, t) itself, and they are handed on.

    Nothing is left out and nothing averaged here: every id, byte 0 included, has its loss; masks come later.
    """
    if logits.ndim == 2:
        return logits if logits.dtype.itemsize >= 4 else logits.float()
    flat, targets = rearrange(logits, "b t v -> (b t) v"), rearrange(ids, "b t -> (b t)")
    if cpu_kernels.ready(flat):
        return cpu_kernels.nats(flat, targets).view(ids.shape)
    flat = flat if flat.dtype.itemsize >= 4 else flat.float()
    return F.cross_entropy(flat, targets, reduction="none").view(ids.shape)
