"""The one interface of all models, and how one is built.

A model is an nn.Module with

    forward(ids (b, t) int64) -> logits (b, t, v)     logits[:, i] predict ids[:, i] from ids[:, :i] alone; or nats
                                             (b, t) of a model whose targets are not bytes (subword). loss.nats
                                             takes either
    decoder(batch, compiled=True)            cached generation: .feed(ids (b, m)) -> logits (b, v) of the next byte;
                                             compiled=False: rounded as torch does everywhere
    vocab_size, seq_len, patch_size, config
    unit_bytes(ids)                          mean bytes of one position of the coarsest stage, where the content of
                                             the rows decides it (space patches, subwords); None elsewhere
    training_span(t, number)                 the columns of a row of t ids that are predicted in training, for the
                                             number of a draw; logits are then those of the columns alone, of ids up to
                                             their end (perceiver_ar). None: all of them
    share(part, attend)                      where ranks share rows (sequence.py): logits of part.columns(t) alone

and the functions beside it take any of them: loss.nats, flops.count. Training, evaluation and sampling know no model by
name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from mbtrain.config import Config
from mbtrain.model.megabyte import Megabyte

if TYPE_CHECKING:
    from mbtrain.model.perceiver import PerceiverAR
    from mbtrain.model.subword import Subword

Model: TypeAlias = "Megabyte | PerceiverAR | Subword"


def build(config: Config) -> Model:
    """The model that a configuration describes, freshly initialised from torch's current random state."""
    if config.model.kind == "perceiver_ar":
        from mbtrain.model.perceiver import PerceiverAR

        return PerceiverAR(config.model, config.vocab_size, config.data.seq_len)
    if config.model.kind == "subword":
        from mbtrain.model.subword import Subword

        return Subword(config.model, config.vocab_size, config.data.seq_len)
    if config.model.patching == "space":
        from mbtrain.model.space import SpaceMegabyte

        return SpaceMegabyte(config.model, config.vocab_size, config.data.seq_len)
    return Megabyte(config.model, config.vocab_size, config.data.seq_len)
