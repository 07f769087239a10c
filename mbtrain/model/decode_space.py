"""Cached generation of the model of space.py: in every row of a batch patches end at bytes of their own.

Legend: b batch, or those of its rows whose patch ended · m new bytes · p byte in patch · d features · v vocabulary
        k patches · s keys · h heads · c features of a head

A prompt goes through the model's own blocks at once. From then on, for each byte: in the rows whose patch it ended, the
coarse stage goes one position on, over keys gathered from each row's own; and the local stage goes one position on in
all rows, over the keys of its last bytes, masked to each row's patch. Positions are as in the full forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mbtrain.model.decode import angles_of, one_more, second_half
from mbtrain.model.layers import Block, LayerCache
from mbtrain.model.patching import ends, patches

if TYPE_CHECKING:
    from mbtrain.model.space import SpaceMegabyte


class SpaceDecoder:
    """Incremental logits of a batch of rows of equal length, equal to the full forward pass on the same bytes.

    When a row reaches the model's seq_len, the decoder goes on from its last seq_len / 2 bytes as a new row.
    """

    def __init__(self, model: SpaceMegabyte, batch: int):
        self.model = model
        self.coarse, self.local = model.coarse.transformer, model.local.transformer
        self.coarse_steps = [one_more(cast(Block, block)) for block in self.coarse.blocks]
        self.local_steps = [one_more(cast(Block, block)) for block in self.local.blocks]
        self.like = model.filler.detach()
        self.coarse_angles = angles_of(self.coarse, model.seq_len, self.like)
        self.local_angles = angles_of(self.local, model.seq_len, self.like)
        self.rows = torch.arange(batch, device=self.like.device)
        self.ids = torch.zeros((batch, model.seq_len), dtype=torch.int64, device=self.like.device)
        self.n = 0
        self.coarse_caches: list[LayerCache] = []
        self.local_caches: list[LayerCache] = []
        self.first = self.done = torch.zeros_like(self.rows)  # of each row's patch the first byte, and the number
        self.output = self.like  # of the coarse stage, for each row's patch, (b, d)
        self.turned = 0  # the position of the first local key, as its rotary angle has it

    @torch.inference_mode()
    def feed(self, ids: Tensor) -> Tensor:
        """Take m >= 0 more bytes, (b, m); return the logits (b, v) of the byte after them."""
        began, m = bool(self.local_caches), ids.shape[1]
        if self.n + m >= self.model.seq_len:
            ids = second_half(self.ids[:, : self.n], ids, self.model.seq_len, self.model.patch_size)
            self.n, began = 0, False
        self.ids[:, self.n : self.n + ids.shape[1]] = ids
        self.n += ids.shape[1]
        return self.model.logits(self._next() if began and m == 1 else self._begin())

    def _begin(self) -> Tensor:
        """Run both stages over all bytes so far; returns the local stage's output for byte n, (b, d)."""
        n, model = self.n, self.model
        ids = self.ids[:, :n]
        where = patches(ids, model.patch_size)
        k = int(where.number[:, -1].max()) + 1
        self.done, self.first = where.number[:, -1].clone(), n - where.place[:, -1]
        self.coarse_caches = self.coarse.new_caches(len(ids), 2 * k, self.like)
        coarse = self.coarse(model.coarse_inputs(ids, where.columns(slice(n)), k), self.coarse_caches)
        self.output = coarse[self.rows, self.done].clone()

        # What byte n and those after it can see through all layers begins so many bytes before it.
        layers = len(self.local.blocks) if model.config.cross_patch else 1
        self.turned = max(n - layers * model.back, 0)
        seen = slice(self.turned, n + 1)
        x = model.local_inputs(F.pad(ids, (1, 0))[:, seen], where.columns(seen), coarse)
        t = torch.arange(x.shape[1], device=x.device)
        first = (model.looks_from(where)[:, seen] - self.turned).clamp(min=0)
        mask = ((t >= first.unsqueeze(-1)) & (t <= t.unsqueeze(-1))).unsqueeze(1)
        self.local_caches = self.local.new_caches(len(ids), max(x.shape[1], 2 * model.back) + 1, self.like)
        self.turned = 0  # the blocks counted rotary positions from the first key
        return self.local.run(x, self.local_caches, None, mask)[:, -1]

    def _next(self) -> Tensor:
        """Go on by the byte before n; returns the local stage's output for byte n, (b, d)."""
        n, model = self.n, self.model
        ended = ends(self.ids[:, max(n - 2, 0) : n])[:, -1] | (n - self.first == model.patch_size)
        rows = ended.nonzero().squeeze(1)
        if len(rows):
            self._next_patch(rows)
        place = n - self.first
        width = self.output.shape[-1] // model.patch_size
        slices = self.output[:, : width * model.patch_size].view(len(place), -1, width)[self.rows, place]
        x = model.conditioned(self.ids[:, n - 1], place, slices)
        self._slide()
        used = self.local_caches[0].used
        looked_at = torch.arange(used + 1, device=x.device) >= used - place.unsqueeze(1) - model.config.cross_patch
        table, at = self.local_angles, used + self.turned
        angles = None if table is None else (table[0][at], table[1][at])
        for step, cache in zip(self.local_steps, self.local_caches, strict=True):
            x = step(x, cache, angles, None, looked_at[:, None, None])
            cache.used += 1
        return self.local.normed(x)

    def _slide(self) -> None:
        """Where many local keys are kept, keep those alone that the next position may look at."""
        back, used = self.model.back, self.local_caches[0].used
        if used <= 2 * back:
            return
        for cache in self.local_caches:
            for kept in (cache.keys, cache.values):
                kept[:, :, :back] = kept[:, :, used - back : used].clone()
            cache.used = back
        self.turned += used - back

    def _next_patch(self, rows: Tensor) -> None:
        """Bring the coarse stage to the patch that begins at byte n, in these rows, (b,)."""
        in_slots = self.first[rows].unsqueeze(1) + torch.arange(self.model.patch_size, device=rows.device)
        x = self.model.joined(self.ids[rows], in_slots.clamp(max=self.n - 1), in_slots >= self.n).squeeze(1)
        self.done[rows] += 1
        self.first[rows] = self.n
        at = self.done[rows]
        longest = int(at.max())
        table, window = self.coarse_angles, self.coarse.stage.window
        angles = None if table is None else (table[0][at, None, None], table[1][at, None, None])
        width = longest if window is None else min(longest, window - 1)
        keys = at.unsqueeze(1) - width + torch.arange(width, device=at.device)  # of each row the last so many
        mask = F.pad(keys >= 0, (0, 1), value=True)[:, None, None]
        for step, cache in zip(self.coarse_steps, self.coarse_caches, strict=True):
            if longest == cache.keys.shape[2]:
                cache.keys, cache.values = (F.pad(kept, (0, 0, 0, longest)) for kept in (cache.keys, cache.values))
            if len(self.rows) == 1:  # nothing to gather
                cache.used = longest
                x = step(x, cache, angles, None, None)
                continue
            own = LayerCache(*_gathered(cache, rows, keys.clamp(min=0)), cache.attn_last, cache.ffn_last, used=width)
            x = step(x, own, angles, None, mask)
            cache.keys[rows, :, at], cache.values[rows, :, at] = own.keys[:, :, width], own.values[:, :, width]
        self.output[rows] = self.coarse.normed(x)


def _gathered(cache: LayerCache, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of some rows, (b,), at positions of each, (b, s): (b, h, s + 1, c), with room for one more."""
    keys, values = (
        F.pad(kept[rows.unsqueeze(1), :, which].transpose(1, 2), (0, 0, 0, 1)) for kept in (cache.keys, cache.values)
    )
    return keys, values
