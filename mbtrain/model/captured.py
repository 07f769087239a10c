"""The decoder's step of one byte on a GPU: a fixed list of kernels on tensors that stay where they are, in CUDA graphs.

Legend: b batch · m new bytes · d features · h heads · c features of a head · v vocabulary · i position in the coarser
        stage's position, in stage 0 in the row

A byte's arithmetic takes microseconds there, launching it from Python a hundred times as long. So the place in the row,
the choice of the byte and what is looked at are tensors, nothing in a step asks the host, and a step is one of a few:
that in which the stages from number `first` on move (the last one alone within a patch, all at the coarsest's ends).
Each kind runs once as it is, is captured the second time, and replayed from then on. Where there is no GPU (tests) it
runs as it is every time.

Caches, bytes and angles are the Decoder's own, as native.py has them on a CPU. Keys behind a position are masked, not
cut off: so their memory holds finite numbers, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mbtrain.model.layers import NORM_EPS, Block, LayerCache, activate
from mbtrain.model.steps import Steps, is_plain

if TYPE_CHECKING:
    from mbtrain.model.megabyte import Megabyte, Stage

Choice = tuple[int, float]  # only the first so many ids come, at this temperature


def covers(model: Megabyte) -> bool:
    """Whether this module has the model's step: on a GPU, not its extensions or kept apart documents."""
    return is_plain(model) and next(model.parameters()).device.type == "cuda"


class Captured(Steps):
    """A decoder's step and what it works on; the same calls as native.Native."""

    def __init__(
        self,
        model: Megabyte,
        ids: Tensor,
        stages: list[Stage],
        caches: list[list[LayerCache]],
        angles: list[tuple[Tensor, Tensor] | None],
    ):
        like, (b, seq_len) = stages[0].pad.detach(), ids.shape
        super().__init__([like.new_zeros((b, stage.transformer.stage.d_model)) for stage in stages], caches)
        self.model, self.ids, self.stages, self.caches = model, ids, stages, caches
        self.n = ids.new_zeros(1)  # bytes so far
        self.points = torch.zeros((b, seq_len), dtype=torch.float64, device=ids.device)
        self.logits = like.new_zeros((b, model.vocab_size))
        self.turns = [None if table is None else doubled(*table) for table in angles]
        self.keys = [torch.arange(layers[0].keys.shape[2], device=ids.device) for layers in caches]
        self.bytes = [torch.arange(-stage.patch_size, 0, device=ids.device) for stage in stages]
        self.blocks = [[one_more(cast(Block, block)) for block in stage.transformer.blocks] for stage in stages]
        self.warm: set[tuple[int, Choice | None]] = set()
        self.graphs: dict[tuple[int, Choice | None], torch.cuda.CUDAGraph] = {}

    def step(self, n: int) -> Tensor:
        """Bring all stages from byte n - 1 to byte n, whose logits (b, v) come back."""
        self.n.fill_(n)
        self._play(n, None)
        return self.logits.clone()

    def run(self, n: int, logits: Tensor, points: Tensor, possible: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Choose the bytes from n on at points, float64 (b, m), the first by logits (b, v), and bring all stages there.

        Returns the bytes (b, m) and the logits of the byte after them. Only the first `possible` bytes come. The host
        waits for nothing.
        """
        m = points.shape[1]
        self.n.fill_(n)
        self.points[:, n : n + m] = points
        self.logits.copy_(logits)
        for number in range(n + 1, n + m + 1):
            self._play(number, (possible, temperature))
        return self.ids[:, n : n + m].clone(), self.logits.clone()

    def _play(self, n: int, choice: Choice | None) -> None:
        """The step that ends at byte n, of its kind."""
        kind = next(s for s, stage in enumerate(self.stages) if n % stage.patch_size == 0), choice
        if kind in self.graphs:
            self.graphs[kind].replay()
        elif self.ids.device.type != "cuda" or kind not in self.warm:
            self._step(*kind)
            self.warm.add(kind)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may copy meanwhile
                self._step(*kind)
            self.graphs[kind] = graph
            graph.replay()  # capturing computes nothing

    def _step(self, first: int, choice: Choice | None) -> None:
        """Choose byte n, where a choice is to be made, and bring the stages from `first` on to the byte after it."""
        if choice is not None:
            chosen = chosen_at(self.logits[:, : choice[0]], self.points.index_select(1, self.n), choice[1])
            self.ids.index_copy_(1, self.n, chosen)
            self.n.add_(1)
        for s in range(first, len(self.stages)):
            self._advance(s)
        self.logits.copy_(self.model.logits(self.outputs[-1]))

    def _advance(self, s: int) -> None:
        """Bring a stage to the next position, the one that begins at byte n."""
        stage, width = self.stages[s], self.stages[s].transformer.stage.d_model
        i = self.n // stage.patch_size
        i = i if stage.coarsest else i % stage.slots
        begins = i == 0  # (1,)
        before = (self.n + self.bytes[s]).clamp(min=0)
        h = F.embedding(self.ids.index_select(1, before), stage.embed)
        if stage.coarsest and stage.positions is not None:
            h = h + stage.positions.index_select(0, before)
        x = torch.where(begins, stage.pad, F.pad(h.flatten(1), (0, width - h.shape[1] * h.shape[2])))
        if not stage.coarsest:
            if stage.project is not None:
                part = stage.project.shape[1]
                slices = self.outputs[s - 1][:, : stage.slots * part].view(len(x), stage.slots, part)
                x = x + F.linear(slices.index_select(1, i).squeeze(1), stage.project)
            if stage.positions is not None:
                x = x + stage.positions.index_select(0, i)
        turn = self.turns[s]
        angles = None if turn is None else (turn[0].index_select(0, i), turn[1].index_select(0, i))
        for block, cache in zip(self.blocks[s], self.caches[s], strict=True):
            x = block(x, cache, angles, i, self.keys[s], begins)
        self.outputs[s].copy_(stage.transformer.normed(x))


def chosen_at(logits: Tensor, points: Tensor, temperature: float) -> Tensor:
    """The id of each row (b, 1) at points (b, 1) of its cumulative distribution: sample.choose without cuts."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    total = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1).double().cumsum(dim=-1)
    return torch.searchsorted(total, points * total[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)


def doubled(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary angles of all features (t, c): x turned is x cos + (x with its halves exchanged) sin."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


Step = Callable[[Tensor, LayerCache, tuple[Tensor, Tensor] | None, Tensor, Tensor, Tensor], Tensor]


def one_more(block: Block) -> Step:
    """As decode.one_more, at a position that is a tensor.

    Takes x (b, d), the cache, that position's angles (`doubled`), the position i (1,), the numbers of all keys, and
    whether the stage begins anew (1,).
    """
    attn, ffn = block.attn, block.ffn
    heads, width, window = attn.n_heads, attn.d_head, attn.window

    def step(
        x: Tensor,
        cache: LayerCache,
        angles: tuple[Tensor, Tensor] | None,
        i: Tensor,
        keys: Tensor,
        begins: Tensor,
    ) -> Tensor:
        normed = block.attn_norm(x)
        if block.token_shift:
            normed = shift(normed, cache.attn_last, begins)
        qkv = F.linear(normed, attn.qkv.weight, attn.qkv.bias).view(-1, 3, heads, width)
        qk = qkv[:, :2]
        if attn.qk_norm:
            qk = F.layer_norm(qk, (width,), eps=NORM_EPS)
        if angles is not None:
            qk = qk * angles[0] + qk.roll(width // 2, dims=-1) * angles[1]
        q, k = qk.unbind(1)
        if attn.query_multiplier != 1:
            q = q * attn.query_multiplier
        cache.keys.index_copy_(2, i, k.unsqueeze(2))
        cache.values.index_copy_(2, i, qkv[:, 2].unsqueeze(2))
        seen = keys <= i if window is None else (keys <= i) & (keys > i - window)
        mixed = F.scaled_dot_product_attention(
            q.unsqueeze(2), cache.keys, cache.values, attn_mask=seen.view(1, 1, 1, -1)
        )
        x = x + block.branch(F.linear(mixed.reshape(x.shape), attn.out.weight, attn.out.bias))
        normed = block.ffn_norm(x)
        if block.token_shift:
            normed = shift(normed, cache.ffn_last, begins)
        added = activate(F.linear(normed, ffn.up.weight, ffn.up.bias), ffn.activation)
        return x + block.branch(F.linear(added, ffn.down.weight, ffn.down.bias))

    return step


def shift(x: Tensor, before: Tensor, begins: Tensor) -> Tensor:
    """Token shift of one position (b, d) after `before` (b, 1, d), zeros where the stage begins; x is kept there."""
    half = x.shape[-1] // 2
    shifted = torch.cat((x[:, :half], before[:, 0, half:].masked_fill(begins, 0)), dim=-1)
    before.copy_(x.unsqueeze(1))
    return shifted
