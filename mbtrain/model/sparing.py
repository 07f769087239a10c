"""Less memory for more work: what the configuration says is recomputed in the backward pass, and in which chunks.

A row of a megabyte has 1.2 GB of logits alone. Of a long row the coarsest stage sees all patches at once; what follows,
finer stages, logits and loss, runs inside patches, and is therefore computed for some patches at a time, which gives
nats in place of logits. In training a chunk is computed once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mbtrain.config import CHUNK_BYTES, Config, chunk_bytes
from mbtrain.model import Model
from mbtrain.model.layers import Transformer
from mbtrain.model.megabyte import Megabyte


def spare(model: Model, config: Config) -> None:
    """Let a model compute as train.activation_checkpointing and train.chunk_bytes say; to be called before it is used.

    Of a model in chunks, blocks are recomputed in the coarsest stage alone: the others' chunks are so already.
    """
    chunk = chunk_bytes(config)
    whole = [model.modules()]
    if chunk is not None and isinstance(model, Megabyte):
        model.chunk_bytes = chunk
        whole = [stage.modules() for stage in model.stages if stage.coarsest]
    for modules in whole:
        for module in modules:
            if isinstance(module, Transformer):
                module.checkpointing = config.train.activation_checkpointing


@contextmanager
def scoring(model: Model, config: Config) -> Iterator[None]:
    """Inside, a model gives nats in place of logits where it can be cut, made for some bytes of a batch at a time.

    Without a backward pass nothing is computed twice, and however many rows are scored at once, there are logits of
    CHUNK_BYTES (or of train.chunk_bytes, or of one patch of each row where that is more) and no others: in the model's
    precision, in float32 for their log-softmax, and that, 84 MB of a bf16 model. Other models keep those of a batch.
    """
    if not (isinstance(model, Megabyte) and config.model.in_chunks):
        yield
        return
    before = model.chunk_bytes
    model.chunk_bytes = min(before or CHUNK_BYTES, CHUNK_BYTES)
    try:
        yield
    finally:
        model.chunk_bytes = before
