"""What native.py and captured.py share: the models that have a step of one byte, and how it goes on from torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mbtrain.model.layers import LayerCache

if TYPE_CHECKING:
    from mbtrain.model.megabyte import Megabyte


def is_plain(model: Megabyte) -> bool:
    """Neither the paper's extensions nor documents kept apart, and nobody has laid something over `logits`."""
    config = model.config
    extended = config.cross_patch or config.conv_encoder or config.isolate_documents
    return config.without != "local" and not extended and "logits" not in vars(model)


class Steps:
    """The stages' outputs (b, d), and what caches keep for token shift, in memory that stays where it is."""

    def __init__(self, outputs: list[Tensor], caches: list[list[LayerCache]]):
        self.outputs = outputs
        self.lasts = [(cache, cache.attn_last, cache.ffn_last) for layers in caches for cache in layers]

    def take(self, outputs: list[Tensor | None]) -> None:
        """Go on from where torch has brought the stages: their outputs, and what caches keep for token shift."""
        for own, output in zip(self.outputs, outputs, strict=True):
            if output is not None:
                own.copy_(output)
        for cache, attn_last, ffn_last in self.lasts:
            cache.attn_last = attn_last.copy_(cache.attn_last)
            cache.ffn_last = ffn_last.copy_(cache.ffn_last)
