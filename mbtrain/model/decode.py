"""Generation with one state per stage: the coarsest stage runs once a patch, the last once a byte, none again.

Legend: b batch · m new bytes · d features · v vocabulary · r position inside the coarser stage's position

After n bytes the next one is predicted from: stage 0 at position n // P_0, and each finer stage at slot
(n mod P_(s-1)) // P_s of the coarser stage's current position. A finer stage's cache is emptied whenever the coarser
stage moves on; nothing else ever is. The same code takes a long prompt at once and then a byte at a time.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mbtrain.model.layers import LayerCache
from mbtrain.model.megabyte import Megabyte, Stage


class Decoder:
    """Incremental logits of a batch of rows of equal length, equal to the full forward pass on the same bytes.

    When a row reaches the model's seq_len, the decoder goes on from its last seq_len / 2 bytes as a new row.
    """

    def __init__(self, model: Megabyte, batch: int):
        self.model = model
        self.stages = [cast(Stage, stage) for stage in model.stages]
        self.patch = self.stages[0].patch_size
        weight = self.stages[0].pad
        self.ids = torch.zeros((batch, model.seq_len), dtype=torch.int64, device=weight.device)
        self.n = 0
        self.caches: list[list[LayerCache]] = []
        for stage in self.stages:
            room = stage.slots or model.seq_len // self.patch + 1
            self.caches.append(stage.transformer.new_caches(batch, room, weight.detach()))
        self.outputs: list[Tensor | None] = [None] * len(self.stages)
        self.parents = [-1] * len(self.stages)

    @torch.inference_mode()
    def feed(self, ids: Tensor) -> Tensor:
        """Take m >= 0 more bytes, (b, m); return the logits (b, v) of the byte after them."""
        if self.n + ids.shape[1] >= self.model.seq_len:
            kept = self.model.seq_len // 2 // self.patch * self.patch
            ids = torch.cat((self.ids[:, : self.n], ids), dim=1)
            ids = ids[:, ids.shape[1] - kept :]
            self._forget()
        self.ids[:, self.n : self.n + ids.shape[1]] = ids
        self.n += ids.shape[1]
        parent: Tensor | None = None
        for s, stage in enumerate(self.stages):
            parent = self._advance(s, stage, parent)
        assert parent is not None
        return self.model.logits(parent)

    def _advance(self, s: int, stage: Stage, parent: Tensor | None) -> Tensor:
        """Bring one stage to the position that predicts byte n; returns its output there, (b, d)."""
        span = self.stages[s - 1].patch_size if s else self.model.seq_len + 1
        start = self.n // span * span  # first byte inside the coarser stage's current position
        caches = self.caches[s]
        if start != self.parents[s]:
            self.parents[s] = start
            for cache in caches:
                cache.reset()
        done, need = caches[0].used, (self.n - start) // stage.patch_size + 1
        if need > done:
            x = self._positions(stage, start, done, need)
            if parent is not None:
                x = stage.condition_slots(x, parent, done)
            self.outputs[s] = stage.transformer(x, caches)[:, -1]
        output = self.outputs[s]
        assert output is not None
        return output

    def _positions(self, stage: Stage, start: int, done: int, need: int) -> Tensor:
        """Inputs of positions done .. need (each the embedding of the one before it; the pad at 0), (b, r, d)."""
        first = start + max(done - 1, 0) * stage.patch_size
        ids = self.ids[:, first : start + (need - 1) * stage.patch_size]
        h = F.embedding(ids, stage.embed)
        if stage.coarsest and stage.positions is not None:
            h = h + stage.positions[first : first + ids.shape[1]]
        x = h.reshape(h.shape[0], -1, stage.pad.shape[0])
        return x if done else torch.cat((stage.first(x), x), dim=1)

    def _forget(self) -> None:
        self.n = 0
        self.parents = [-1] * len(self.stages)
