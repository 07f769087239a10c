"""The loss: cross-entropy in nats, per target."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def nats(logits: Tensor, ids: Tensor) -> Tensor:
    """-ln p(ids) under logits: (b, t, v), (b, t) -> (b, t) in float32 at least (float64 stays float64).

    Nothing is left out and nothing averaged here: every id, byte 0 included, has its loss; masks come later.
    """
    flat = rearrange(logits, "b t v -> (b t) v")
    flat = flat if flat.dtype.itemsize >= 4 else flat.float()
    return F.cross_entropy(flat, rearrange(ids, "b t -> (b t)"), reduction="none").view(ids.shape)
