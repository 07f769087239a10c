"""Generation with one state per stage: the coarsest stage runs once a patch, the last once a byte, none again.

Legend: b batch · m new bytes · d features · v vocabulary · r position inside the coarser stage's position

After n bytes the next one is predicted from: stage 0 at position n // P_0, and each finer stage at slot
(n mod P_(s-1)) // P_s of the coarser stage's current position. A finer stage's cache is emptied whenever the coarser
stage moves on; nothing else ever is. A long prompt goes through the model's own blocks at once; one position at a time
goes through `one_more`, the same arithmetic on tensors that were looked up once: for so little work, looking them up
through modules and reshaping for long rows takes longer than the work. Tests hold both to the full forward pass.

With cross-patch attention the last stage keeps the last r positions of the patch before when the coarser stage moves
on. A patch that was not run position by position (a prompt) is run when the next one needs it: of those before the
present patch, one for each layer, further back no layer looks.

Where the model keeps documents apart, a boundary may come anywhere, in every row at its own place; the patch after it
starts a document, as in the full forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mbtrain.model import captured, native
from mbtrain.model.layers import (
    NORM_EPS,
    Block,
    LayerCache,
    Norm,
    Transformer,
    activate,
    document_starts,
    rotary_angles,
    rotate,
    same_document,
)

if TYPE_CHECKING:
    from mbtrain.model.megabyte import Megabyte, Slices, Stage

Angles = tuple[Tensor, Tensor]
OneMore = Callable[[Tensor, LayerCache, Angles | None, Tensor | None, Tensor | None], Tensor]


def one_more(block: Block) -> OneMore:
    """Block.forward in evaluation for the next position alone, (b, d).

    Takes x (b, d), the cache, the position's rotary angles, and where documents are kept apart: whether it starts one
    (b, 1) and where it may look (b, 1, 1, s).
    """
    attn, ffn = block.attn, block.ffn
    heads, width, qk_norm = attn.n_heads, attn.d_head, attn.qk_norm
    attn_norm, ffn_norm = _norm(block.attn_norm), _norm(block.ffn_norm)
    qkv, out, up, down = ((m.weight, m.bias) for m in (attn.qkv, attn.out, ffn.up, ffn.down))
    token_shift, activation, window = block.token_shift, ffn.activation, attn.window
    query_multiplier, branch_multiplier = attn.query_multiplier, block.branch_multiplier

    def step(x: Tensor, cache: LayerCache, angles: Angles | None, starts: Tensor | None, mask: Tensor | None) -> Tensor:
        normed = attn_norm(x)
        if token_shift:
            normed, cache.attn_last = _shift(normed, cache.attn_last, starts)
        qkv_ = F.linear(normed, *qkv).view(-1, 3, heads, width)
        qk = qkv_.narrow(1, 0, 2)
        if qk_norm:
            qk = torch.layer_norm(qk, (width,), eps=NORM_EPS)
        if angles is not None:
            qk = rotate(qk, *angles)
        q, k = qk.unbind(1)
        if query_multiplier != 1:
            q = q * query_multiplier
        n = cache.used
        cache.keys.select(2, n).copy_(k)
        cache.values.select(2, n).copy_(qkv_.select(1, 2))
        first = 0 if window is None else max(n + 1 - window, 0)
        keys, values = cache.keys.narrow(2, first, n + 1 - first), cache.values.narrow(2, first, n + 1 - first)
        mixed = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask)
        added = F.linear(mixed.reshape(x.shape), *out)
        x = x + (added if branch_multiplier == 1 else added * branch_multiplier)
        normed = ffn_norm(x)
        if token_shift:
            normed, cache.ffn_last = _shift(normed, cache.ffn_last, starts)
        added = F.linear(activate(F.linear(normed, *up), activation), *down)
        return x + (added if branch_multiplier == 1 else added * branch_multiplier)

    return step


def _norm(norm: Norm) -> Callable[[Tensor], Tensor]:
    if norm.rms:
        return norm.forward
    gain, bias = norm.gain, norm.bias
    return lambda x: torch.layer_norm(x, (x.shape[-1],), gain, bias, NORM_EPS)


def _shift(x: Tensor, before: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token shift of one position (b, d) after `before` (b, 1, d); returns it and what the next one needs."""
    half = x.shape[-1] // 2
    past = before.select(1, 0).narrow(1, half, half)
    if starts is not None:
        past = past.masked_fill(starts, 0)
    return torch.cat((x.narrow(1, 0, half), past), dim=-1), x.unsqueeze(1)


def angles_of(transformer: Transformer, positions: int, like: Tensor) -> Angles | None:
    """Rotary angles of so many positions, of the dtype and on the device of `like`; None where there are none."""
    attention = cast(Block, transformer.blocks[0]).attn
    if not attention.rotary:
        return None
    cos, sin = rotary_angles(0, positions, attention.d_head, like.device)
    return cos.to(like.dtype), sin.to(like.dtype)


def kept_bytes(seq_len: int, patch_size: int) -> int:
    """What a decoder keeps of a row that is full: half of it, in whole patches."""
    return seq_len // 2 // patch_size * patch_size


def second_half(seen: Tensor, ids: Tensor, seq_len: int, patch_size: int) -> Tensor:
    """The end of the bytes seen (b, n) and those to come, ids (b, m), with which a decoder goes on as a new row."""
    ids = torch.cat((seen, ids), dim=1)
    return ids[:, ids.shape[1] - kept_bytes(seq_len, patch_size) :]


class Decoder:
    """Incremental logits of a batch of rows of equal length, equal to the full forward pass on the same bytes.

    When a row reaches the model's seq_len, the decoder goes on from its last seq_len / 2 bytes as a new row.
    compiled: single bytes go through native.c or, on a GPU, captured.py, where they cover the model; else all through
    torch.
    """

    def __init__(self, model: Megabyte, batch: int, compiled: bool = True):
        self.model = model
        without_local = model.config.without == "local"
        self.slices = cast("Slices", model.stages[-1]) if without_local else None
        self.stages = [cast("Stage", stage) for stage in model.stages][: -1 if without_local else None]
        self.patch = model.patch_size
        self.cross_patch = model.config.cross_patch
        weight = self.stages[0].pad
        self.ids = torch.zeros((batch, model.seq_len), dtype=torch.int64, device=weight.device)
        self.n = 0
        self.caches: list[list[LayerCache]] = []
        for stage in self.stages:
            room = stage.slots + stage.transformer.cross_patch or model.seq_len // self.patch + 1
            self.caches.append(stage.transformer.new_caches(batch, room, weight.detach()))
        self.steps = [[one_more(cast(Block, block)) for block in stage.transformer.blocks] for stage in self.stages]
        self.angles = [
            angles_of(stage.transformer, caches[0].keys.shape[2], weight)
            for stage, caches in zip(self.stages, self.caches, strict=True)
        ]
        self.outputs: list[Tensor | None] = [None] * len(self.stages)
        self.parents = [-1] * len(self.stages)
        parts = (model, self.ids, self.stages, self.caches, self.angles)
        library = native.library() if compiled and native.covers(model) else None
        self.native: native.Native | captured.Captured | None = native.Native(library, *parts) if library else None
        if compiled and captured.covers(model):
            self.native = captured.Captured(*parts)

    @torch.inference_mode()
    def feed(self, ids: Tensor) -> Tensor:
        """Take m >= 0 more bytes, (b, m); return the logits (b, v) of the byte after them."""
        if self.n + ids.shape[1] >= self.model.seq_len:
            ids = second_half(self.ids[:, : self.n], ids, self.model.seq_len, self.patch)
            self._forget()
        self.ids[:, self.n : self.n + ids.shape[1]] = ids
        before, self.n = self.n, self.n + ids.shape[1]
        if self.native is not None:
            if self.parents[0] >= 0 and ids.shape[1] == 1:
                if not 0 <= int(ids.min()) <= int(ids.max()) < self.model.vocab_size:
                    raise IndexError(f"ids: got {ids.flatten().tolist()}, expected 0 to {self.model.vocab_size - 1}")
                return self.native.step(self.n)
            self._recall(self.native.outputs, before)
            output = self._advance_all()
            self.native.take(self.outputs)
            return self.model.logits(output)
        if self.cross_patch:
            end = self.n
            for stop in self._whole_patches(before, end):
                self.n = stop
                self._advance_all()
            self.n = end
        return self.model.logits(self._advance_all())

    @torch.inference_mode()
    def run(self, logits: Tensor, points: Tensor, possible: int, temperature: float) -> tuple[Tensor, Tensor] | None:
        """Choose and take bytes by themselves, without Python, as Native.run does: as many as the row has room for.

        None where there is no such way, or no room.
        """
        m = min(points.shape[1], self.model.seq_len - 1 - self.n)
        if self.native is None or m <= 0:
            return None
        made, logits = self.native.run(self.n, logits, points[:, :m], possible, temperature)
        self.n += m
        return made, logits

    def _recall(self, outputs: list[Tensor], n: int) -> None:
        """Note where the stages are, which native steps have brought to byte n, and what they gave."""
        for s, (stage, caches) in enumerate(zip(self.stages, self.caches, strict=True)):
            if self.parents[s] >= 0:
                self.outputs[s] = outputs[s]
                self.parents[s] = n // self._span(stage) * self._span(stage)
                for cache in caches:
                    cache.used = (n - self.parents[s]) // stage.patch_size + 1

    def _span(self, stage: Stage) -> int:
        """Bytes of one position of the coarser stage."""
        return stage.slots * stage.patch_size or self.model.seq_len + 1

    def _whole_patches(self, before: int, end: int) -> Iterator[int]:
        """Where the last stage must have been, on the way from byte `before` to `end`: the last bytes of patches."""
        stage = self.stages[-1]
        size = stage.slots * stage.patch_size
        first = max(before // size, end // size - len(stage.transformer.blocks))
        yield from range((first + 1) * size - 1, end // size * size, size)

    def _advance_all(self) -> Tensor:
        """Bring all stages to byte n; returns the last one's output there, (b, d)."""
        parent: Tensor | None = None
        for s, stage in enumerate(self.stages):
            parent = self._advance(s, stage, parent)
        assert parent is not None
        if self.slices is None:
            return parent
        width = parent.shape[-1] // self.slices.slots
        return self.slices.read(parent.narrow(-1, self.n % self.slices.slots * width, width))

    def _advance(self, s: int, stage: Stage, parent: Tensor | None) -> Tensor:
        """Bring one stage to the position that predicts byte n; returns its output there, (b, d)."""
        span, caches = self._span(stage), self.caches[s]
        start = self.n // span * span  # first byte inside the coarser stage's current position
        if start != self.parents[s]:
            r = stage.transformer.cross_patch
            whole = r > 0 and self.parents[s] >= 0 and start == self.parents[s] + span and caches[0].done == stage.slots
            self.parents[s] = start
            for cache in caches:
                if whole:
                    cache.next_patch(r)
                else:
                    cache.reset()
        done, need = caches[0].done, (self.n - start) // stage.patch_size + 1
        if need > done:
            starts = None
            if stage.coarsest and self.model.config.isolate_documents:
                starts = document_starts(self.ids[:, : need * stage.patch_size], stage.patch_size)
            x = self._positions(stage, start, done, need, starts)
            if not stage.coarsest:
                x = stage.condition_slots(x, parent, done)
            one = need == done + 1
            self.outputs[s] = (
                self._one_more(s, stage, x[:, 0], starts)
                if one
                else stage.transformer(x, caches, starts, last_alone=True)[:, -1]
            )
        output = self.outputs[s]
        assert output is not None
        return output

    def _one_more(self, s: int, stage: Stage, x: Tensor, starts: Tensor | None) -> Tensor:
        """Transformer.forward for the next position alone, (b, d)."""
        caches, table = self.caches[s], self.angles[s]
        n = caches[0].used
        angles = None if table is None else (table[0][caches[0].done], table[1][caches[0].done])
        mask = None if starts is None else same_document(starts, 1)
        now = None if starts is None else starts[:, -1:]
        for step, cache in zip(self.steps[s], caches, strict=True):
            x = step(x, cache, angles, now, mask)
            cache.used = n + 1
        return stage.transformer.normed(x)

    def _positions(self, stage: Stage, start: int, done: int, need: int, starts: Tensor | None) -> Tensor:
        """Inputs of positions done .. need (each the embedding of the one before it; the pad at 0), (b, r, d).

        starts (b, need) in stage 0 where documents are kept apart: the pad stands there, too.
        """
        first = start + max(done - 1, 0) * stage.patch_size
        last = start + (need - 1) * stage.patch_size
        if stage.convolutions is None or first == last:
            h = F.embedding(self.ids[:, first:last], stage.embed)
        else:  # they look back further than this patch, but no further than their reach
            seen = max(first - stage.convolutions.reach, 0)
            h = stage.convolutions(F.embedding(self.ids[:, seen:last], stage.embed))[:, first - seen :]
        if stage.coarsest and stage.positions is not None and starts is None:
            h = h + stage.positions[first:last]
        x = h.reshape(h.shape[0], -1, stage.patch_size * stage.d_byte)
        x = F.pad(x, (0, stage.left_over)) if stage.left_over else x
        if stage.coarsest and stage.positions is not None and starts is not None:
            x = x + stage.positions_from(starts)[:, max(done - 1, 0) : need - 1]
        x = x if done else torch.cat((stage.first(x), x), dim=1)
        return x if starts is None else stage.restart(x, starts[:, done:])

    def _forget(self) -> None:
        self.n = 0
        self.parents = [-1] * len(self.stages)
