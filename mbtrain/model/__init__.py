"""The one interface of all models, and how one is built.

A model is an nn.Module with

    forward(ids (b, t) int64) -> logits (b, t, v)     logits[:, i] predict ids[:, i] from ids[:, :i] alone
    vocab_size, seq_len, config
    share(part, attend)                      where ranks share rows (sequence.py): logits of part.columns(t) alone

and the functions beside it take any of them: loss.nats, decode.Decoder, flops.count. Training, evaluation and
sampling know no model by name.
"""

from __future__ import annotations

from mbtrain.config import Config
from mbtrain.model.megabyte import Megabyte

Model = Megabyte


def build(config: Config) -> Model:
    """The model that a configuration describes, freshly initialised from torch's current random state."""
    return Megabyte(config.model, config.vocab_size, config.data.seq_len)
