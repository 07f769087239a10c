"""PerceiverAR (Hawthorne et al. 2022, arXiv 2202.07765) as the rival in MEGABYTE's paper (Yu et al. 2023).

Legend: b batch · t bytes · n latents · j pass · d features · h heads · c features of a head · v vocabulary

A byte-level transformer whose first layer looks at all bytes before and whose other layers look at n positions alone.
A pass is n positions, its latents, at columns [j n/2, j n/2 + n). Layer 1 is cross-attention: queries of the latents,
keys and values of all positions up to each query. The other layers are causal self-attention among the latents. So

  input     x_i = E[byte i - 1] + E_pos[i - 1], a trainable pad at 0: position i predicts byte i
  layer 1   y_i = x_i + cross(norm(x_i); norm(x_0 .. x_i)), then its feed-forward
  others    ordinary blocks on y of one pass
  scoring   pass 0 gives all its columns, each later pass those of its last n/2 latents: every byte is predicted from
            its true prefix, by n/2 latents before it or more (the paper's sliding evaluation with stride n/2)
  training  one pass a row, and the loss on all its columns: the paper's random spans. Columns of the first and last n/2
            lie in one pass each, all others in two, and are drawn so often

y_i knows nothing of its pass: scoring computes layer 1 once for every position, and all passes after it as one batch.
As the paper says of its own, attention has ordinary dropout in place of the original's on cross-attention.

Operations of the forward pass, a multiply-add being two, of matrix products; a row has T bytes, T/(n/2) whole, u
features go up in the feed-forward (2 f for swiglu), f come down, m = 4 d^2 + d u + f d is a block's matrices, L layers.
Training, a row's mean over its passes, to be divided by T for a byte read (and to be taken three times):
  matrices   2 (n (2 d^2 + d u + f d) + (T + n)/2 * 2 d^2 + (L - 1) n m)
  attention  4 d (n (T + 1)/2 + (L - 1) n (n + 1)/2) for the allowed pairs; 4 d (n (T + n)/2 + (L - 1) n^2) for all
  readout    2 n d v
Scoring, a row, all passes, to be divided by T for a byte:
  matrices   2 (T m + (L - 1) (2 T - n) m)
  attention  4 d (T (T + 1)/2 + (L - 1) (2 T - n) (n + 1)/2) for the allowed pairs; 4 d (T^2 + (L - 1) (2 T - n) n)
  readout    2 T d v
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mbtrain.config import ModelConfig
from mbtrain.model.decode import second_half
from mbtrain.model.layers import (
    Block,
    LayerCache,
    Transformer,
    attend,
    hidden,
    look_up,
    normed_heads,
    pad,
    readout,
    rotary_angles,
    rotate,
    rule_of,
    table,
)
from mbtrain.model.mup import query_multiplier
from mbtrain.model.sequence import Attend, Part


class CrossAttention(nn.Module):
    """The last n of t positions look at all positions up to each: x (b, t, d) -> (b, n, d).

    Queries have a matrix of their own, so that the t - n others need none.
    """

    def __init__(self, config: ModelConfig, rotary: bool):
        super().__init__()
        stage, base = config.stages[0], config.base(0)
        self.n_heads, self.d_head = stage.n_heads, stage.d_head
        self.qk_norm, self.rotary, self.dropout = config.block.qk_norm, rotary, config.block.dropout
        self.query_multiplier = query_multiplier(config.mup, stage.d_head, base.d_head)
        d, base_d = stage.d_model, base.d_model
        self.q = hidden((d, d), (base_d, base_d), config, 0)
        self.kv = hidden((2 * d, d), (2 * base_d, base_d), config, 0, parts=2)
        self.out = hidden((d, d), (base_d, base_d), config, 0, last=True)

    def forward(self, x: Tensor, n: int, cache: LayerCache | None = None) -> Tensor:
        q = rearrange(self.q(x[:, x.shape[1] - n :]), "b n (h c) -> b h n c", h=self.n_heads)
        k, v = rearrange(self.kv(x), "b t (two h c) -> two b h t c", two=2, h=self.n_heads)
        q, k = normed_heads(q, k, self.qk_norm, self.query_multiplier)
        if self.rotary:
            cos, sin = rotary_angles(0 if cache is None else cache.used, x.shape[1], self.d_head, x.device)
            q, k = rotate(q, cos[-n:], sin[-n:]), rotate(k, cos, sin)
        if cache is not None:
            now = slice(cache.used, cache.used + x.shape[1])
            cache.keys[:, :, now], cache.values[:, :, now] = k, v
            k, v = cache.keys[:, :, : now.stop], cache.values[:, :, : now.stop]
        mixed = attend(q, k, v, self.dropout if self.training else 0.0)
        return cast(Tensor, self.out(rearrange(mixed, "b h n c -> b n (h c)")))


class CrossBlock(Block):
    """Layer 1: a block with cross-attention, for the last n of t positions, x (b, t, d) -> (b, n, d)."""

    def __init__(self, config: ModelConfig, rotary: bool):
        super().__init__(config, 0, rotary, attn=CrossAttention(config, rotary))  # type: ignore[arg-type]

    def forward(self, x: Tensor, n: int, cache: LayerCache | None = None) -> Tensor:  # type: ignore[override]
        x = x[:, x.shape[1] - n :] + self.branch(self.attn(self.attn_norm(x), n, cache))
        return x + self.branch(self.ffn(self.ffn_norm(x)))


class Latents(Transformer):
    """A transformer whose first block is a CrossBlock: `cross`, then `rest` of it on the latents of a pass."""

    def __init__(self, config: ModelConfig, *, rotary: bool):
        super().__init__(config, 0, rotary=rotary)
        self.blocks[0] = CrossBlock(config, rotary)

    def cross(self, x: Tensor, n: int, cache: LayerCache | None = None) -> Tensor:
        """Layer 1 of the last n positions, (b, t, d) -> (b, n, d); x follows what the cache holds, if any."""
        if self.checkpointing and self.training:
            return cast(Tensor, checkpoint(self.blocks[0], x, n, use_reentrant=False))
        x, t = self.blocks[0](x, n, cache), x.shape[1]
        if cache is not None:
            cache.used += t
        return x

    def rest(self, x: Tensor, caches: list[LayerCache] | None = None) -> Tensor:
        """The other layers and the final norm, on latents of one pass (or, with caches, the next ones of it)."""
        return self.run(x, caches, first=1)


class PerceiverAR(nn.Module):
    """ids (b, t) -> logits (b, t, v), logits[:, i] being for ids[:, i] given ids[:, :i]. Any t >= 1.

    In training mode ids end with a pass, `training_span`, and the logits are those of its columns alone, (b, n, v).
    seq_len bounds t only where positions are learned.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int):
        super().__init__()
        assert config.latents is not None
        d, base = config.stages[0].d_model, config.base(0).d_model
        self.config, self.vocab_size, self.seq_len = config, vocab_size, seq_len
        self.patch_size = 1
        self.latents, self.stride = config.latents, config.latents // 2
        self.embed = table("tied" if config.tied else "embedding", vocab_size, d, base, config)
        self.pad = pad(d, base, config)
        self.positions = table("position", seq_len, d, base, config) if config.positions == "learned" else None
        self.transformer = Latents(config, rotary=config.positions == "rotary")
        self.readout = readout(config, vocab_size)
        self.logit_multiplier = rule_of("readout", self.unembedding).multiplier

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        first = self.first_latent(t - 1)
        x = self.inputs(ids)
        if first == 0 or self.training:  # one pass alone
            return self.logits(self.transformer.rest(self.transformer.cross(x, t - first)))
        # A row that ends inside a pass is filled up; causality keeps the filling out of every logit that is returned.
        y = F.pad(self.transformer.cross(x, t), (0, 0, 0, -t % self.stride))
        passes = rearrange(y.unfold(1, self.latents, self.stride), "b j d n -> (b j) n d")
        z = rearrange(self.transformer.rest(passes), "(b j) n d -> b j n d", b=b)
        later = rearrange(z[:, :, self.stride :], "b j n d -> b (j n) d")
        return self.logits(torch.cat((z[:, 0, : self.stride], later), dim=1)[:, :t])

    def first_latent(self, column: int) -> int:
        """Where the pass begins that predicts this column in scoring."""
        return max(column // self.stride - 1, 0) * self.stride

    def training_span(self, t: int, number: int) -> slice:
        """The columns of a row of t ids that one draw trains: those of a pass, all passes being equally likely.

        number: 63 or 64 random bits. The module is then given ids[:, :span.stop].
        """
        start = number % (self.first_latent(t - 1) // self.stride + 1) * self.stride
        return slice(start, min(start + self.latents, t))

    def inputs(self, ids: Tensor) -> Tensor:
        """Every position before layer 1: the byte before it, and the pad in the first; (b, t) -> (b, t, d)."""
        h = self.embedded(ids[:, :-1], 0)
        return torch.cat((repeat(self.pad.to(h.dtype), "d -> b 1 d", b=ids.shape[0]), h), dim=1)

    def embedded(self, ids: Tensor, first: int) -> Tensor:
        """Bytes at columns from `first` on, (b, t) -> (b, t, d)."""
        h = look_up(ids, self.embed)
        return h if self.positions is None else h + self.positions[first : first + ids.shape[1]]

    def logits(self, x: Tensor) -> Tensor:
        """The last layer's output (..., d) -> logits (..., v)."""
        if self.logit_multiplier != 1:
            x = x * self.logit_multiplier
        return F.linear(x, self.unembedding)

    @property
    def unembedding(self) -> nn.Parameter:
        """The matrix of logits, (v, d)."""
        return self.embed if self.readout is None else self.readout

    def decoder(self, batch: int, compiled: bool = True) -> Decoder:
        """Cached generation for so many rows, by torch."""
        return Decoder(self, batch)

    def unit_bytes(self, ids: Tensor) -> None:
        """None: a position is one byte."""

    def share(self, part: Part, attend: Attend) -> None:
        """Raises ValueError: a pass is too short to be cut, and the configuration has refused it before."""
        raise ValueError("sequence parallelism: perceiver_ar computes one pass of a row, which ranks cannot share")


class Decoder:
    """Incremental logits of a batch of rows of equal length, equal to the full forward pass on the same bytes.

    Keys and values of layer 1 are kept for all positions, and its outputs; those of the other layers for the latents of
    the current pass. Every n/2 bytes the pass moves on: its first n/2 latents then go through the other layers anew.
    When a row reaches the model's seq_len, the decoder goes on from its last seq_len / 2 bytes as a new row.
    """

    def __init__(self, model: PerceiverAR, batch: int):
        self.model = model
        like = model.pad.detach()
        self.ids = torch.zeros((batch, model.seq_len), dtype=torch.int64, device=like.device)
        self.n = 0  # bytes so far
        self.cross = self._cache(batch, model.seq_len, like)
        self.rest = [self._cache(batch, model.latents, like) for _ in model.transformer.blocks[1:]]
        self.outputs = like.new_zeros((batch, model.seq_len, like.shape[0]))  # of layer 1
        self.first = 0  # latent of the current pass
        self.last: Tensor | None = None  # what the newest position came out as, (b, d)

    @torch.inference_mode()
    def feed(self, ids: Tensor) -> Tensor:
        """Take m >= 0 more bytes, (b, m); return the logits (b, v) of the byte after them."""
        model = self.model
        if self.n + ids.shape[1] >= model.seq_len:
            ids = second_half(self.ids[:, : self.n], ids, model.seq_len, model.patch_size)
            self._forget()
        self.ids[:, self.n : self.n + ids.shape[1]] = ids
        self.n += ids.shape[1]
        done, need = self.cross.used, self.n + 1
        if need > done:
            first = model.first_latent(self.n)
            # Of a long prompt only the pass at its end is looked at again.
            latents = need - max(done, first)
            self.outputs[:, need - latents : need] = model.transformer.cross(self._inputs(done), latents, self.cross)
            if first != self.first:
                self._begin_pass(first)
            begun = first + (self.rest[0].used if self.rest else need - first - 1)
            self.last = model.transformer.rest(self.outputs[:, begun:need], self.rest)[:, -1]
        assert self.last is not None
        return model.logits(self.last)

    def _cache(self, batch: int, room: int, like: Tensor) -> LayerCache:
        stage, unused = self.model.config.stages[0], like.new_zeros(0)  # no token shift here
        keys = like.new_zeros((batch, stage.n_heads, room, stage.d_head))
        return LayerCache(keys, torch.zeros_like(keys), unused, unused)

    def _inputs(self, done: int) -> Tensor:
        """Inputs of positions done .. n, (b, r, d)."""
        if done == 0:
            return self.model.inputs(self.ids[:, : self.n + 1])
        return self.model.embedded(self.ids[:, done - 1 : self.n], done - 1)

    def _begin_pass(self, first: int) -> None:
        self.first = first
        for cache in self.rest:
            cache.reset()

    def _forget(self) -> None:
        self.n = 0
        self.cross.reset()
        self._begin_pass(0)
