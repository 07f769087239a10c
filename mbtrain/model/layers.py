"""The parts of a transformer stage. Every parameter is given a role where it is made.

Legend: b batch (any leading sequences) · t positions · d features · h heads · c features of a head · f feed-forward
        k patches of a row · r positions in a patch · w chunks, or the width of a convolution

A role says what a parameter is, so that initialisation, weight decay and learning rates are read off it and not
off names or shapes: embedding, tied (one that gives logits, too), position, pad, hidden (matrices inside blocks),
project (between stages), readout, gain, bias. With the shape at base it gives the parameter's rule (mup.py).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mbtrain import vocab
from mbtrain.config import InitConfig, ModelConfig
from mbtrain.model import cpu_kernels, fused
from mbtrain.model.mup import ROLES, Rule, branch_multiplier, query_multiplier, rule
from mbtrain.model.sequence import WHOLE, Attend, Part

NORM_EPS = 1e-5
ROTARY_BASE = 10_000.0

# On CPU torch's flash kernel loses to plain products: forward and backward of 128 positions 6.2 ms against 1.75 ms in
# bf16, of 512 25 against 12; at 1024 it wins in fp32 and is level in bf16 (one thread, AVX512 with bf16).
_PLAIN_ATTENTION_MAX_T = 512

# Queries of a chunk of windowed attention: each chunk looks at window + chunk keys. Forward and backward of 4096
# positions of 4 heads with a window of 512: 177 ms with 128, 243 with 512 (fp32, one thread). With a mask in bf16 plain
# products win further up than above: the same takes 113 ms, 240 in torch's kernel.
_WINDOW_CHUNK = 128
_PLAIN_WINDOW_MAX_T = 2048

# Positions of a prompt that go through a feed-forward together: 12,500 of 256 features, relu2, 225 ms in one piece, 138
# in pieces of 512 (fp32, one thread).
_PROMPT_PIECE = 512


def parameter(role: str, tensor: Tensor, rule: Rule) -> nn.Parameter:
    """A trainable parameter that carries its role and rule. Raises ValueError for an unknown role."""
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}, expected one of {ROLES}")
    made = nn.Parameter(tensor)
    made.role, made.rule = role, rule  # type: ignore[attr-defined]
    return made


def role_of(name: str, param: nn.Parameter) -> str:
    """The role given to a parameter; one without a role is an error, never a guess by name."""
    role = getattr(param, "role", None)
    if role is None:
        raise ValueError(f"parameter {name} has no role; make it with mbtrain.model.layers.parameter")
    return cast(str, role)


def rule_of(name: str, param: nn.Parameter) -> Rule:
    """The rule of a parameter, which came with its role; ValueError where it has none."""
    role_of(name, param)
    return cast(Rule, param.rule)  # type: ignore[attr-defined]


def draw(shape: tuple[int, ...], std: float, init: InitConfig) -> Tensor:
    """A normal tensor of this std, cut at two std where the scheme says so (paper, appendix A.2)."""
    if init.scheme == "truncated":
        return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std)
    return nn.init.normal_(torch.empty(shape), std=std)


def matrix(
    role: str,
    shape: tuple[int, int],
    base: tuple[int, int],
    config: ModelConfig,
    *,
    scale: float = 1.0,
    depth: float = 1.0,
) -> nn.Parameter:
    """A weight (out, in), whose shape at base is `base`. At base: N(0, std) in the truncated scheme, N(0, 1/in) in the
    fan_in scheme, times scale. depth: of its stage relative to the base's, for what is inside blocks."""
    made = rule(role, shape, base, config.mup, depth)
    std = config.init.std if config.init.scheme == "truncated" else base[1] ** -0.5
    return parameter(role, draw(shape, std * scale * made.init_std, config.init), made)


def table(role: str, rows: int, width: int, base: int, config: ModelConfig) -> nn.Parameter:
    """An embedding-like table (rows, width), `base` wide at base."""
    std = config.init.std if config.init.scheme == "truncated" else config.init.embed_std
    return parameter(role, draw((rows, width), std, config.init), rule(role, (rows, width), (rows, base), config.mup))


def readout(config: ModelConfig, vocab_size: int) -> nn.Parameter | None:
    """The matrix of logits, (v, d); None where they are the last stage's byte embedding's."""
    if config.tied:
        return None
    base = vocab_size, config.base(len(config.stages) - 1).d_model
    return matrix("readout", (vocab_size, config.stages[-1].d_model), base, config)


def pad(width: int, base: int, config: ModelConfig) -> nn.Parameter:
    """What stands where there is no byte before, (width,)."""
    made = rule("pad", (width,), (base,), config.mup)
    return parameter("pad", draw((width,), config.init.embed_std, config.init), made)


def look_up(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of a table (v, d) by number: ids (...) -> (..., d)."""
    return cpu_kernels.embedding(ids, table) if cpu_kernels.rounds(table) else F.embedding(ids, table)


def bias_of(width: int, base: int, config: ModelConfig, depth: float = 1.0) -> nn.Parameter | None:
    """A bias or shift (width,), zeros, where the block has them."""
    if not config.block.bias:
        return None
    return parameter("bias", torch.zeros(width), rule("bias", (width,), (base,), config.mup, depth))


class Norm(nn.Module):
    """LayerNorm or RMSNorm over features, with or without gain (and shift); x (..., d) -> (..., d)."""

    def __init__(self, width: int, base: int, config: ModelConfig, depth: float = 1.0):
        super().__init__()
        self.rms = config.block.norm == "rmsnorm"
        made = rule("gain", (width,), (base,), config.mup, depth)
        self.gain = parameter("gain", torch.ones(width), made) if config.block.norm_gain else None
        self.bias = None if self.rms else bias_of(width, base, config, depth)

    def forward(self, x: Tensor) -> Tensor:
        alike = self.gain is None or self.gain.dtype == x.dtype  # not under autocast
        if alike and cpu_kernels.ready(x, x.shape[-1]):
            return cpu_kernels.norm(x, self.gain, self.bias, self.rms)
        if alike and cpu_kernels.rounds(x) and self.gain is not None:
            # Torch's own norm would add up the gain's gradient in bf16, a product's gradient it sums in fp32.
            y = self.plain(x, None, None) * self.gain
            return y if self.bias is None else y + self.bias
        return self.plain(x, self.gain, self.bias)

    def plain(self, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """The norm in torch."""
        if self.rms:
            return F.rms_norm(x, x.shape[-1:], gain, NORM_EPS)
        return F.layer_norm(x, x.shape[-1:], gain, bias, NORM_EPS)


class Linear(nn.Module):
    """x (..., in) -> (..., out), with a bias where the block has biases."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None):
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass
class LayerCache:
    """What one block keeps between calls of generation: keys and values so far, and the last normed inputs.

    keys, values: (b, h, room, c), filled up to `used`, the first `before` of them those of the patch before
    (cross-patch attention); attn_last, ffn_last: (b, 1, d), for token shift.
    """

    keys: Tensor
    values: Tensor
    attn_last: Tensor
    ffn_last: Tensor
    used: int = 0
    before: int = 0

    @property
    def done(self) -> int:
        """Positions so far, of the present patch where the stage runs in patches."""
        return self.used - self.before

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.used = self.before = 0
        self.attn_last.zero_()
        self.ffn_last.zero_()

    def next_patch(self, cross_patch: int) -> None:
        """Keep the last `cross_patch` positions alone, those of a whole patch, as the patch before."""
        kept, back = slice(self.used - cross_patch, self.used), rotary_angles(-self.done, 1, *self._head)
        self.keys[:, :, :cross_patch] = rotate(self.keys[:, :, kept], *back)
        self.values[:, :, :cross_patch] = self.values[:, :, kept].clone()
        self.used = self.before = cross_patch
        self.attn_last.zero_()  # token shift stays inside patches
        self.ffn_last.zero_()

    @property
    def _head(self) -> tuple[int, torch.device]:
        return self.keys.shape[-1], self.keys.device


def rotary_angles(start: int, t: int, d_head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each (t, d_head / 2), of positions start .. start + t.

    In float64: at position 100,000 an angle in float32 is off by up to 0.004.
    """
    rates = ROTARY_BASE ** (-torch.arange(0, d_head, 2, device=device, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(start, start + t, device=device, dtype=torch.float64), rates)
    return angles.cos(), angles.sin()


@functools.lru_cache(maxsize=8)
def kept_angles(start: int, t: int, d_head: int) -> tuple[Tensor, Tensor]:
    """`rotary_angles` in float32 on the CPU, made once for all layers and steps."""
    with torch.inference_mode(False):
        cos, sin = rotary_angles(start, t, d_head, torch.device("cpu"))
        return cos.float(), sin.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: feature i is paired with i + c/2; x (b, h, t, c)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def normed_heads(q: Tensor, k: Tensor, qk_norm: bool, query_multiplier: float) -> tuple[Tensor, Tensor]:
    """Queries and keys (..., c), normed over each head where the block does so, and the queries multiplied."""
    if qk_norm:
        q, k = (F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) for x in (q, k))
    return (q if query_multiplier == 1 else q * query_multiplier), k


def shift_half(x: Tensor, before: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """Token shift: the second half of the features comes from the position before; zeros (or `before`) at the first.

    Zeros also where a document starts: starts (b, t), True there.
    """
    now, past = x.chunk(2, dim=-1)
    first = torch.zeros_like(past[:, :1]) if before is None else before.chunk(2, dim=-1)[1]
    past = torch.cat((first, past[:, :-1]), dim=1)
    if starts is not None:
        past = past.masked_fill(starts.unsqueeze(-1), 0)
    return torch.cat((now, past), dim=-1)


def document_starts(ids: Tensor, patch_size: int) -> Tensor:
    """Which patches start a document, (b, k): the first, and each after a patch that holds a boundary; ids (b, t)."""
    ends = rearrange(ids == vocab.BOUNDARY, "b (k p) -> b k p", p=patch_size).any(dim=-1)
    return torch.cat((torch.ones_like(ends[:, :1]), ends[:, :-1]), dim=1)


def same_document(starts: Tensor, t: int) -> Tensor:
    """Where the last t of s positions may look: (b, 1, t, s), True for earlier ones of their own document.

    starts (b, s) is True at the first position of every document.
    """
    numbers = starts.cumsum(dim=1)
    same = numbers[:, -t:, None] == numbers[:, None, :]
    return same.tril(starts.shape[1] - t).unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None) -> Tensor:
    """Causal attention; q (b, h, t, c) is the last t of the s positions of k and v (b, h, s, c).

    A mask (b, 1, t, s), True where a position may look, stands in place of plain causality and includes it.
    """
    t, s = q.shape[2], k.shape[2]
    if mask is None and dropout == 0 and fused.takes_patches(q, k):
        return fused.attend(q, k, v)
    if q.device.type == "cpu" and s <= _PLAIN_ATTENTION_MAX_T:
        return attend_plainly(q, k, v, dropout, mask)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if t == 1:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    if t == s:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(t, s, q.dtype, q.device), dropout_p=dropout)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None) -> Tensor:
    """`attend` in plain products, which hold all scores in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf)
    elif q.shape[2] > 1:
        scores = scores + causal_mask(q.shape[2], k.shape[2], scores.dtype, scores.device)
    weights = F.dropout(scores.softmax(dim=-1), dropout, training=dropout > 0)
    return weights @ v


def causal_mask(t: int, s: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(t, s): 0 where the last t of s positions may look, -inf where they may not."""
    return torch.full((t, s), -math.inf, dtype=dtype, device=device).triu(s - t + 1)


def attend_window(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float, mask: Tensor | None = None) -> Tensor:
    """As `attend`, each position looking at itself and the window - 1 before it alone.

    Chunks of queries look at themselves and so many positions before: the work grows as t (window + chunk). With a mask
    it is t x t: that of the mask.
    """
    t, s = q.shape[2], k.shape[2]
    if mask is not None:
        return attend(q, k, v, dropout, mask.triu(s - t - window + 1))
    if s <= window:
        return attend(q, k, v, dropout)
    w, before = min(window, t, _WINDOW_CHUNK), min(window, s - t)
    fill = (0, 0, 0, -t % w)
    chunked = rearrange(F.pad(q, fill), "b h (n w) c -> (b h) n w c", w=w)

    def looked_at(x: Tensor) -> Tensor:
        x = F.pad(x[:, :, s - t - before :], (0, 0, window - before, fill[-1]))
        return rearrange(x.unfold(2, window + w, w), "b h n c s -> (b h) n s c")

    chunk, own, key = (torch.arange(n, device=q.device) for n in (chunked.shape[1], w, window + w))
    near = (key > own[:, None]) & (key <= own[:, None] + window)
    there = key >= window - before - w * chunk[:, None]  # not the filling before the first position
    plainly = q.device.type == "cpu" and v.dtype == torch.bfloat16 and window + w <= _PLAIN_WINDOW_MAX_T
    look = attend_plainly if plainly else attend
    mixed = look(chunked, looked_at(k), looked_at(v), dropout, (near & there[:, None]).unsqueeze(0))
    return rearrange(mixed, "(b h) n w c -> b h (n w) c", b=q.shape[0])[:, :, :t]


def attend_across(q: Tensor, k: Tensor, v: Tensor, before: int, dropout: float, mask: Tensor) -> Tensor:
    """Causal attention inside patches that looks at the last `before` positions of the patch before, too.

    q, k, v (n, h, r, c) with n over the patches of rows, in their order; mask is `across_mask`'s. Keys are rotated by
    their place in their own patch: those of the patch before are turned back by r places.
    """
    k_before, v_before = (x[:, :, -before:].roll(1, dims=0) for x in (k, v))
    k_before = rotate(k_before, *rotary_angles(-k.shape[2], 1, k.shape[3], k.device))
    return attend(q, torch.cat((k_before, k), dim=2), torch.cat((v_before, v), dim=2), dropout, mask)


def across_mask(n: int, patches: int, r: int, before: int, device: torch.device) -> Tensor:
    """Where positions of n patches, `patches` to a row, look: (n, 1, r, before + r); before a row there is nothing."""
    mask = torch.ones((r, before + r), dtype=torch.bool, device=device).tril(before).repeat(n, 1, 1, 1)
    mask[::patches, :, :, :before] = False
    return mask


class Attention(nn.Module):
    """Multi-head causal attention with one matrix for queries, keys and values; x (b, t, d) -> (b, t, d).

    Where ranks share rows, x is this rank's `part` of the positions and `attend` looks at those of all ranks. With
    cross_patch (and rotary, which it needs) b runs over patches, the mask is `across_mask`'s.
    """

    def __init__(self, config: ModelConfig, index: int, rotary: bool, cross_patch: int = 0):
        super().__init__()
        stage, base = config.stages[index], config.base(index)
        self.n_heads, self.d_head = stage.n_heads, stage.d_head
        self.window, self.cross_patch = stage.window, cross_patch
        self.qk_norm, self.rotary, self.dropout = config.block.qk_norm, rotary, config.block.dropout
        self.part: Part = WHOLE
        self.attend: Attend = attend
        self.query_multiplier = query_multiplier(config.mup, stage.d_head, base.d_head)
        d, base_d = stage.d_model, base.d_model
        self.qkv = hidden((3 * d, d), (3 * base_d, base_d), config, index, parts=3)
        self.out = hidden((d, d), (base_d, base_d), config, index, last=True)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None, last: int | None = None
    ) -> Tensor:
        qkv = self.qkv(x)
        start = self.part.index * x.shape[1] if cache is None else cache.done
        if cpu_kernels.ready(qkv, self.d_head):
            angles = kept_angles(start, x.shape[1], self.d_head) if self.rotary else None
            how = self.n_heads, angles, self.qk_norm, self.query_multiplier
            if self._in_one_pass(x.shape[1]) and cache is None and mask is None:
                return cast(Tensor, self.out(cpu_kernels.attention(qkv, *how)))
            q, k, v = cpu_kernels.turned(qkv, *how)
        else:
            q, k, v = self.turned(qkv, start)
        if cache is not None:
            now = slice(cache.used, cache.used + x.shape[1])
            cache.keys[:, :, now], cache.values[:, :, now] = k, v
            k, v = cache.keys[:, :, : now.stop], cache.values[:, :, : now.stop]
        if last is not None:
            q, mask = q[:, :, -last:], None if mask is None else mask[:, :, -last:]
        dropout = self.dropout if self.training else 0.0
        if self.window is not None:
            mixed = attend_window(q, k, v, self.window, dropout, mask)
        elif self.cross_patch and cache is None:
            assert mask is not None
            mixed = attend_across(q, k, v, self.cross_patch, dropout, mask)
        else:
            look = self.attend if cache is None else attend  # generation is one rank's own
            mixed = look(q, k, v, dropout, mask)
        return cast(Tensor, self.out(rearrange(mixed, "b h t c -> b t (h c)")))

    def turned(self, qkv: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, h, t, c) of positions from start on: cpu_kernels.turned in torch."""
        q, k, v = rearrange(qkv, "b t (n h c) -> n b h t c", n=3, h=self.n_heads)
        q, k = normed_heads(q, k, self.qk_norm, self.query_multiplier)
        if self.rotary:
            cos, sin = rotary_angles(start, qkv.shape[1], self.d_head, qkv.device)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def _in_one_pass(self, t: int) -> bool:
        """Whether t positions are few, and look at all before them in their own sequence and nowhere else."""
        dropped = self.training and self.dropout > 0
        short = t <= min(cpu_kernels.LONGEST, self.window or t)
        return short and not dropped and not self.cross_patch and self.attend is attend


class FeedForward(nn.Module):
    """x (..., d) -> (..., d) through d_ff features; swiglu has d_ff of gate and d_ff of value."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        stage, base = config.stages[index], config.base(index)
        self.activation = config.block.activation
        rows = 2 if self.activation == "swiglu" else 1
        up = (rows * stage.ff_width, stage.d_model), (rows * base.ff_width, base.d_model)
        self.up = hidden(*up, config, index, parts=rows)
        self.down = hidden((stage.d_model, stage.ff_width), (base.d_model, base.ff_width), config, index, last=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(activate(self.up(x), self.activation)))


def activate(x: Tensor, kind: str) -> Tensor:
    """The feed-forward's nonlinearity; swiglu halves the features, the others keep them."""
    if kind == "swiglu":
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
    if kind == "relu2":
        if cpu_kernels.ready(x, x.shape[-1]):
            return cpu_kernels.relu2(x)
        return F.relu(x).square()
    if kind == "gelu":
        return F.gelu(x)
    return F.silu(x) if kind == "silu" else F.relu(x)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x)); x (b, t, d) -> (b, t, d).

    Where documents are kept apart, starts (b, t) and mask (b, 1, t, s) say it: see shift_half and attend.
    last_alone: no later block asks for other positions than the last: the rest only go into the cache, and of x come
    back the last or the last two.
    """

    def __init__(
        self, config: ModelConfig, index: int, rotary: bool, cross_patch: int = 0, attn: Attention | None = None
    ):
        super().__init__()
        self.token_shift, self.dropout = config.block.token_shift, config.block.dropout
        self.branch_multiplier = branch_multiplier(config.mup, depth_of(config, index))
        self.attn_norm = block_norm(config, index)
        self.attn = attn or Attention(config, index, rotary, cross_patch)
        self.ffn_norm = block_norm(config, index)
        self.ffn = FeedForward(config, index)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        starts: Tensor | None = None,
        mask: Tensor | None = None,
        last_alone: bool = False,
    ) -> Tensor:
        last = None if not last_alone else 2 if self.token_shift else 1
        normed = self.attn_norm(x)
        if self.token_shift:
            normed, kept = shift_half(normed, None if cache is None else cache.attn_last, starts), normed
            if cache is not None:
                cache.attn_last = kept[:, -1:]
        if last is not None:
            x, starts = x[:, -last:], None if starts is None else starts[:, -last:]
        x = x + self.branch(self.attn(normed, cache, mask, last))
        normed = self.ffn_norm(x)
        if self.token_shift:
            normed, kept = shift_half(normed, None if cache is None else cache.ffn_last, starts), normed
            if cache is not None:
                cache.ffn_last = kept[:, -1:]
        if cache is not None:  # a long prompt: pieces whose wide features stay in the cache take 0.6 of the time
            pieces = [self.ffn(piece) for piece in normed.split(_PROMPT_PIECE, dim=1)]
            return x + self.branch(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1))
        return x + self.branch(self.ffn(normed))

    def branch(self, x: Tensor) -> Tensor:
        """What a branch adds: its dropout, and muP's factor of depth."""
        x = F.dropout(x, self.dropout, self.training)
        return x if self.branch_multiplier == 1 else x * self.branch_multiplier


class Transformer(nn.Module):
    """A causal stack of blocks with a final norm; x (b, t, d) -> (b, t, d).

    starts (b, s), over all positions so far, those in the caches and those of other ranks that share the row too, is
    True where a document starts: given it, no position sees another document. The price is a mask in place of the fast
    path that knows causality alone.

    With cross_patch (paper, section 2.3.2) b runs over the patches of rows, `patches` to a row, and each position looks
    in every layer at so many last positions of the patch before in its row, too; rotary positions must be on.
    """

    def __init__(self, config: ModelConfig, index: int, *, rotary: bool, cross_patch: int = 0):
        super().__init__()
        self.stage, self.cross_patch = config.stages[index], cross_patch
        self.checkpointing = False
        self.blocks = nn.ModuleList(Block(config, index, rotary, cross_patch) for _ in range(self.stage.n_layers))
        self.final_norm = final_norm(config, index)

    def forward(
        self,
        x: Tensor,
        caches: list[LayerCache] | None = None,
        starts: Tensor | None = None,
        patches: int = 1,
        last_alone: bool = False,
    ) -> Tensor:
        apart: tuple[Tensor | None, ...] = ()
        if starts is not None:
            looking = starts.shape[1] if caches is None else x.shape[1]
            apart = (starts[:, -x.shape[1] :], same_document(starts, looking))
        elif self.cross_patch and caches is None:
            apart = (None, across_mask(x.shape[0], patches, x.shape[1], self.cross_patch, x.device))
        return self.run(x, caches, *apart, last_alone=last_alone)

    def run(
        self,
        x: Tensor,
        caches: list[LayerCache] | None,
        *apart: Tensor | None,
        first: int = 0,
        last_alone: bool = False,
    ) -> Tensor:
        """The blocks from `first` on, whose caches these are, and the final norm; apart: Block's starts and mask.

        last_alone, with caches: the last position is all that is asked for; of the others the last block then makes
        keys and values and no more.
        """
        t = x.shape[1]
        for i, block in enumerate(list(self.blocks)[first:]):
            if caches is not None and last_alone and block is self.blocks[-1]:
                x = block(x, caches[i], *apart, last_alone=True)
            elif caches is not None:
                x = block(x, caches[i], *apart)
            elif self.checkpointing and self.training:
                x = checkpoint(block, x, None, *apart, use_reentrant=False)
            else:
                x = block(x, None, *apart)
        for cache in caches or ():
            cache.used += t
        return self.normed(x)

    def normed(self, x: Tensor) -> Tensor:
        """The final norm of what the last block gave, where there is one."""
        return x if self.final_norm is None else cast(Tensor, self.final_norm(x))

    def new_caches(self, batch: int, room: int, like: Tensor) -> list[LayerCache]:
        """Empty caches for `room` positions, of the dtype and on the device of `like`."""
        heads = (batch, self.stage.n_heads, room, self.stage.d_head)
        last = (batch, 1, self.stage.d_model)
        return [
            LayerCache(like.new_zeros(heads), like.new_zeros(heads), like.new_zeros(last), like.new_zeros(last))
            for _ in self.blocks
        ]


class CausalConvolution(Linear):
    """x (b, d, t) -> (b, o, t), of each position and the width - 1 before it; the weight is a matrix (o, d width)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, width: int):
        super().__init__(weight, bias)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        weight = rearrange(self.weight, "o (d w) -> o d w", w=self.width)
        return F.conv1d(F.pad(x, (self.width - 1, 0)), weight, self.bias)


class CausalConvolutions(nn.Module):
    """The paper's convolutional patch encoder (section 2.3.1): causal 1-D convolutions of bytes, x (b, t, d) -> same.

    The paper gives the widths, 3, 5 and 7, and no more. Ours: all d features wide; h + conv(h), then h + conv(relu(h));
    no norm. They begin small beside the residual path, so that the stack begins near the identity: as every matrix in
    the truncated scheme; in fan_in N(0, 1/(width d)), and where branches are scaled, over sqrt(2 n) for n of them.
    Before a row there are zeros.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.widths = config.conv_encoder
        d, base = config.stages[0].d_byte, config.base(0).d_byte
        scale = (2 * len(self.widths)) ** -0.5 if config.init.residual == "scaled" else 1.0
        self.layers = nn.ModuleList(
            CausalConvolution(
                matrix("hidden", (d, d * w), (base, base * w), config, scale=scale), bias_of(d, base, config), w
            )
            for w in self.widths
        )

    @property
    def reach(self) -> int:
        """How many bytes before itself a byte's output depends on."""
        return sum(width - 1 for width in self.widths)

    def forward(self, x: Tensor) -> Tensor:
        h = rearrange(x, "b t d -> b d t")
        for i, layer in enumerate(self.layers):
            h = h + layer(h if i == 0 else F.relu(h))
        return rearrange(h, "b d t -> b t d")


def depth_of(config: ModelConfig, index: int) -> float:
    """Layers of a stage relative to its base's."""
    return config.stages[index].n_layers / config.base(index).n_layers


def hidden(
    shape: tuple[int, int],
    base: tuple[int, int],
    config: ModelConfig,
    index: int,
    last: bool = False,
    parts: int = 1,
) -> Linear:
    """A linear layer (out, in) inside a stage's blocks; last: the one whose result is added to the residual stream.

    parts: matrices that this one holds, one below the other (an optimizer of matrices takes each by itself).
    """
    scaled = last and config.init.residual == "scaled"
    scale = float((2 * config.base(index).n_layers) ** -0.5) if scaled else 1.0
    depth = depth_of(config, index)
    weight = matrix("hidden", shape, base, config, scale=scale, depth=depth)
    weight.parts = parts  # type: ignore[attr-defined]
    return Linear(weight, bias_of(shape[0], base[0], config, depth))


def block_norm(config: ModelConfig, index: int) -> Norm:
    """A norm before a branch of a stage's blocks."""
    stage, base = config.stages[index], config.base(index)
    return Norm(stage.d_model, base.d_model, config, depth_of(config, index))


def final_norm(config: ModelConfig, index: int) -> Norm | None:
    """The norm after a stage's last block, where models have one."""
    if not config.final_norm:
        return None
    return Norm(config.stages[index].d_model, config.base(index).d_model, config)
