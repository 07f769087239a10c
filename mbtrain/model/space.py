"""MEGABYTE with patches that end where words do (patching.py): two stages, and what is not said here is megabyte.py's.

Legend: b batch · t bytes · k patches · p byte in patch · d features · v vocabulary · h heads · c features of a head
        n chunks of a row · i byte in chunk · w bytes that a chunk looks at

Coarse position k is patch k - 1, its bytes embedded side by side from the left with a trainable row, the filler, in
every slot that they leave empty; position 0 is the trainable pad. Its output is cut in slices, and byte p of patch k
gets slice p. (SpaceByte itself has no slices: it adds a patch's output to one byte of a byte-level transformer.)

The local stage has one position for each byte, in one flat row. In place of one row per patch, most of it empty, its
attention runs over chunks of that row, masked to the byte's own patch and, with cross_patch, so many bytes before it.
With patches of full length alone the model is Megabyte, weight for weight.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mbtrain.config import ModelConfig
from mbtrain.model.decode_space import SpaceDecoder
from mbtrain.model.layers import Block, attend, look_up, pad
from mbtrain.model.megabyte import Megabyte, Stage
from mbtrain.model.patching import Patches, mean_patch_bytes, patches
from mbtrain.model.sequence import Attend, Part

# Bytes of a chunk of the local attention, at least. Between 8 and 48 the time of a step differs by 4 %, as noise does.
_CHUNK = 32


def windowed(chunk: int, back: int) -> Attend:
    """Attention of t positions to at most `back` positions before themselves, in time proportional to t.

    In place of layers.attend, for as many queries as keys; its mask is `window_mask` of the same chunk and back.
    """

    def look(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None) -> Tensor:
        b, t, fill = q.shape[0], q.shape[2], -q.shape[2] % chunk
        q = rearrange(F.pad(q, (0, 0, 0, fill)), "b h (n i) c -> (b n) h i c", i=chunk)
        k, v = (F.pad(x, (0, 0, back, fill)).unfold(2, back + chunk, chunk) for x in (k, v))
        k, v = (rearrange(x, "b h n c w -> (b n) h w c") for x in (k, v))
        return rearrange(attend(q, k, v, dropout, mask), "(b n) h i c -> b h (n i) c", b=b)[:, :, :t]

    return look


def window_mask(first: Tensor, chunk: int, back: int) -> Tensor:
    """Where the positions of each chunk look, ((b n), 1, i, w) bool: from `first` (b, t) up to themselves."""
    t = first.shape[1]
    here = torch.arange(t + -t % chunk, device=first.device)
    # A position that only fills up the last chunk looks at itself: looking nowhere would make it no number.
    filled = torch.cat((first, here[t:].expand(len(first), -1)), dim=1)
    here = here.view(-1, chunk, 1)
    there = here[:, :1] - back + torch.arange(back + chunk, device=first.device)
    mask = (there >= rearrange(filled, "b (n i) -> b n i 1", i=chunk)) & (there <= here)
    return rearrange(mask, "b n i w -> (b n) 1 i w")


class SpaceMegabyte(Megabyte):
    """ids (b, t) -> logits (b, t, v), logits[:, i] being for ids[:, i] given ids[:, :i]. Any t >= 1.

    patch_size is that of the longest patch. seq_len bounds t only where the coarse stage has learned positions.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int):
        super().__init__(config, vocab_size, seq_len)
        self.back = self.patch_size - 1 + config.cross_patch
        self.chunk = max(_CHUNK, self.back)
        self.filler = pad(self.coarse.d_byte, config.base(0).d_byte, config)
        for block in self.local.transformer.blocks:
            attention = cast(Block, block).attn
            # Bytes before the patch are among those that the window's mask lets it look at.
            attention.attend, attention.cross_patch = windowed(self.chunk, self.back), 0

    @property
    def coarse(self) -> Stage:
        """The stage of patches."""
        return cast(Stage, self.stages[0])

    @property
    def local(self) -> Stage:
        """The stage of bytes."""
        return cast(Stage, self.stages[1])

    def share(self, part: Part, attend: Attend) -> None:
        """Not for this model. Raises ValueError."""
        raise ValueError("sequence parallelism: patching=space cuts rows at words, not in equal parts")

    def unit_bytes(self, ids: Any) -> float:
        """Mean bytes of one position of the coarse stage in these rows, ids (b, t), numpy or torch, t >= 1."""
        return mean_patch_bytes(ids, self.patch_size)

    def decoder(self, batch: int, compiled: bool = True) -> SpaceDecoder:  # type: ignore[override]
        """Cached generation of `batch` rows of equal length, each with patches of its own, by torch."""
        return SpaceDecoder(self, batch)

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        where = patches(ids, self.patch_size).columns(slice(t))
        k = int(where.number.max()) + 1  # rows of fewer patches are filled up; causality keeps that out of their logits
        coarse = self.coarse.transformer(self.coarse_inputs(ids, where, k))
        x = self.local_inputs(F.pad(ids, (1, -1)), where, coarse)
        mask = window_mask(self.looks_from(where), self.chunk, self.back)
        return self.logits(self.local.transformer.run(x, None, None, mask))

    def coarse_inputs(self, ids: Tensor, where: Patches, k: int) -> Tensor:
        """Eqs. 1 and 2: k positions, each the patch before it, (b, k, d), of ids (b, t) in less than k + 1 patches.

        In a row of fewer patches the positions after them hold fillers alone.
        """
        p, t = self.patch_size, torch.arange(ids.shape[1], device=ids.device)
        in_slots = t.new_full((len(ids), k * p), -1)
        in_slots = in_slots.scatter(1, where.number * p + where.place, t.expand_as(ids))[:, :-p]
        x = self.joined(ids, in_slots.clamp(min=0), in_slots < 0)
        return torch.cat((self.coarse.first(x), x), dim=1)

    def joined(self, ids: Tensor, in_slots: Tensor, empty: Tensor) -> Tensor:
        """Whole patches, (b, k, d): which of the bytes ids (b, t) is in each of their slots, (b, (k p)), and if any."""
        h = look_up(ids.gather(1, in_slots), self.coarse.embed)
        if self.coarse.positions is not None:
            h = h + look_up(in_slots, self.coarse.positions)
        return self.coarse.joined(torch.where(empty.unsqueeze(-1), self.filler.to(h.dtype), h))

    def local_inputs(self, before: Tensor, where: Patches, coarse: Tensor) -> Tensor:
        """Eq. 4 for each byte, (b, t, d): before (b, t) is the byte before each, coarse (b, k, D) as it came out."""
        p = self.patch_size
        width = coarse.shape[-1] // p
        slices = rearrange(coarse[..., : width * p], "b k (p d) -> b (k p) d", p=p)
        slot = (where.number * p + where.place).unsqueeze(-1)
        return self.conditioned(before, where.place, slices.gather(1, slot.expand(-1, -1, width)))

    def conditioned(self, before: Tensor, place: Tensor, slices: Tensor) -> Tensor:
        """Eq. 4 of bytes (...): the byte before each, its place in its patch, its slice (..., D / p) -> (..., d)."""
        stage = self.local
        assert stage.project is not None
        x = look_up(before, stage.embed)
        x = torch.where((place == 0).unsqueeze(-1), stage.pad.to(x.dtype), x) + F.linear(slices, stage.project)
        return x if stage.positions is None else x + look_up(place, stage.positions)

    def looks_from(self, where: Patches) -> Tensor:
        """The first byte that each one's local position looks at, (b, t): `cross_patch` before its patch."""
        t = torch.arange(where.place.shape[1], device=where.place.device)
        return (t - where.place - self.config.cross_patch).clamp(min=0)
