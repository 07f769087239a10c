"""Triton kernels for a GPU: cross-entropy over bytes, and causal attention inside short patches.

Legend: n rows of logits, or sequences (batch times heads) · v vocabulary · b batch · h heads · t positions · c features
        of a head · m rows of a tile

Both are bound by memory, not by arithmetic, so each reads its inputs once and writes its outputs once, and the backward
pass computes softmaxes anew in place of keeping them. Imported by fused.py alone, and only where Triton is there.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (arguments of @triton.jit functions are Triton's values, not Python's)

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOGITS_OF_A_TILE = 4096  # 8 rows of 512: 32 values a thread
# Positions of a tile of attention, 6 sequences of 5. Compiled for sm_90 in bf16 with 4 warps and heads 64 wide, the
# backward pass takes 64 registers and no stack; with tiles of 64 it takes 138, and 254 and stack for heads 128 wide.
TILE_ROWS = 32
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _logits_tile(logits, n, v, rows: tl.constexpr, width: tl.constexpr):
    """A tile of logits in fp32, -inf behind v; where it lies, and which of it is there."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, width)
    at = row[:, None] * v + column[None, :]
    there = (row[:, None] < n) & (column[None, :] < v)
    return tl.load(logits + at, mask=there, other=float("-inf")).to(tl.float32), row, column, at, there


@triton.jit
def _nats_forward(logits, ids, nats, n, v, rows: tl.constexpr, width: tl.constexpr):
    """nats = log sum exp(logits) - logits[id], of each row."""
    x, row, column, _, _ = _logits_tile(logits, n, v, rows, width)
    # Rows behind the last are -inf throughout: 0 in their place keeps them finite, and they are not stored.
    x = tl.where(row[:, None] < n, x, 0.0)
    wanted = tl.load(ids + row, mask=row < n, other=0)
    most = tl.max(x, axis=1)
    total = tl.log(tl.sum(tl.exp(x - most[:, None]), axis=1)) + most
    own = tl.sum(tl.where(column[None, :] == wanted[:, None], x, 0.0), axis=1)
    tl.store(nats + row, total - own, mask=row < n)


@triton.jit
def _nats_backward(logits, ids, grad, grad_logits, n, v, rows: tl.constexpr, width: tl.constexpr):
    """(softmax - onehot) times the row's gradient."""
    x, row, column, at, there = _logits_tile(logits, n, v, rows, width)
    x = tl.where(row[:, None] < n, x, 0.0)
    wanted = tl.load(ids + row, mask=row < n, other=0)
    scale = tl.load(grad + row, mask=row < n, other=0.0)
    p = tl.exp(x - tl.max(x, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]
    p = tl.where(column[None, :] == wanted[:, None], p - 1.0, p) * scale[:, None]
    tl.store(grad_logits + at, p.to(grad_logits.dtype.element_ty), mask=there)


@torch.library.custom_op("mbtrain::nats", mutates_args=())
def nats(logits: Tensor, ids: Tensor) -> Tensor:
    """-ln p(ids) of each row in fp32: logits (n, v) of at most 32 bits a value, ids (n,) int64 -> (n,)."""
    out = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    grid, sizes = _tiles(logits)
    _nats_forward[grid](logits.contiguous(), ids.contiguous(), out, *logits.shape, **sizes)
    return out


@torch.library.custom_op("mbtrain::nats_backward", mutates_args=())
def nats_backward(logits: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `nats` for the logits, in their dtype; grad (n,) fp32."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grid, sizes = _tiles(logits)
    _nats_backward[grid](logits.contiguous(), ids.contiguous(), grad.contiguous(), out, *logits.shape, **sizes)
    return out


def _tiles(logits: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """How many programs, and the shape of a tile: whole rows, filled up to a power of two."""
    n, v = logits.shape
    width = triton.next_power_of_2(v)
    rows = max(LOGITS_OF_A_TILE // width, 1)
    return (triton.cdiv(n, rows),), {"rows": rows, "width": width}


@nats.register_fake
def _(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)


@nats_backward.register_fake
def _(logits: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep_nats(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _of_nats(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return nats_backward(*ctx.saved_tensors, grad), None


nats.register_autograd(_of_nats, setup_context=_keep_nats)


@triton.jit
def _rows(x, sequence, position, feature, there, h, stride_b, stride_h, stride_t):
    """A tile (m, c) of x (b, h, t, c): of each row its sequence, b and h in one, and its position; zeros elsewhere."""
    base = (sequence // h).to(tl.int64) * stride_b + (sequence % h) * stride_h + position * stride_t
    return tl.load(x + base[:, None] + feature[None, :], mask=there, other=0.0)


@triton.jit
def _place(n, t: tl.constexpr, c: tl.constexpr, m: tl.constexpr, width: tl.constexpr):
    """What the rows of a tile are: as many whole sequences as fit, side by side."""
    row, feature = tl.arange(0, m), tl.arange(0, width)
    number, position = row // t, row % t
    sequence = tl.program_id(0) * (m // t) + number
    real = (number < m // t) & (sequence < n)
    there = real[:, None] & (feature[None, :] < c)
    # Every row sees itself, also one that is none: its softmax is then finite.
    seen = (number[:, None] == number[None, :]) & (position[:, None] >= position[None, :])
    return sequence, position, feature, there, seen


@triton.jit
def _product(a, b):
    """a (m, k) times b (k, n), in fp32."""
    if INTERPRETED:  # Triton 3.7's interpreter multiplies the bits of bf16; in fp32 its products are the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _weights(q, k, seen, scale):
    """Softmax of the scores that are seen, (m, m) in fp32."""
    scores = _product(q, tl.trans(k)) * scale
    scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def _attend_forward(
    q, k, v, out, n, h, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t,
    t: tl.constexpr, c: tl.constexpr, m: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    sequence, position, feature, there, seen = _place(n, t, c, m, width)
    q_ = _rows(q, sequence, position, feature, there, h, q_b, q_h, q_t)
    k_ = _rows(k, sequence, position, feature, there, h, k_b, k_h, k_t)
    v_ = _rows(v, sequence, position, feature, there, h, v_b, v_h, v_t)
    mixed = _product(_weights(q_, k_, seen, scale).to(v_.dtype), v_)
    base = (sequence // h).to(tl.int64) * out_b + (sequence % h) * out_h + position * out_t
    tl.store(out + base[:, None] + feature[None, :], mixed.to(out.dtype.element_ty), mask=there)


@triton.jit
def _attend_backward(
    q, k, v, grad, grad_q, grad_k, grad_v, n, h, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, grad_b, grad_h, grad_t, out_b, out_h, out_t,
    t: tl.constexpr, c: tl.constexpr, m: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    sequence, position, feature, there, seen = _place(n, t, c, m, width)
    q_ = _rows(q, sequence, position, feature, there, h, q_b, q_h, q_t)
    k_ = _rows(k, sequence, position, feature, there, h, k_b, k_h, k_t)
    v_ = _rows(v, sequence, position, feature, there, h, v_b, v_h, v_t)
    wanted = _rows(grad, sequence, position, feature, there, h, grad_b, grad_h, grad_t)
    p = _weights(q_, k_, seen, scale)
    of_p = _product(wanted, tl.trans(v_))
    of_scores = p * (of_p - tl.sum(p * of_p, axis=1)[:, None]) * scale
    of_v = _product(tl.trans(p.to(v_.dtype)), wanted)
    of_q = _product(of_scores.to(k_.dtype), k_)
    of_k = _product(tl.trans(of_scores.to(q_.dtype)), q_)
    base = (sequence // h).to(tl.int64) * out_b + (sequence % h) * out_h + position * out_t
    at = base[:, None] + feature[None, :]
    tl.store(grad_q + at, of_q.to(grad_q.dtype.element_ty), mask=there)
    tl.store(grad_k + at, of_k.to(grad_k.dtype.element_ty), mask=there)
    tl.store(grad_v + at, of_v.to(grad_v.dtype.element_ty), mask=there)


@torch.library.custom_op("mbtrain::attend_short", mutates_args=())
def attend_short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of many short sequences: q, k, v (b, h, t, c) of one dtype, t <= 32 -> (b, h, t, c).

    What comes back lies in memory as (b, t, h, c), so that heads are joined without a copy.
    """
    q, k, v = _dense(q), _dense(k), _dense(v)
    out = _heads_last(q)
    grid, sizes = _sequences(q)
    strides = (s for x in (q, k, v, out) for s in x.stride()[:3])
    _attend_forward[grid](q, k, v, out, *_scalars(q), *strides, **sizes)
    return out


@torch.library.custom_op("mbtrain::attend_short_backward", mutates_args=())
def attend_short_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attend_short` for q, k and v."""
    q, k, v, grad = _dense(q), _dense(k), _dense(v), _dense(grad)
    out = _heads_last(q), _heads_last(q), _heads_last(q)
    grid, sizes = _sequences(q)
    strides = (s for x in (q, k, v, grad, out[0]) for s in x.stride()[:3])
    _attend_backward[grid](q, k, v, grad, *out, *_scalars(q), *strides, **sizes)
    return out


def _dense(x: Tensor) -> Tensor:
    """x with its features side by side, copied only where they are not."""
    return x if x.stride(3) == 1 else x.contiguous()


def _heads_last(like: Tensor) -> Tensor:
    b, h, t, c = like.shape
    return like.new_empty((b, t, h, c)).transpose(1, 2)


def _scalars(q: Tensor) -> tuple[int, int, float]:
    """Sequences, heads, and what scores are multiplied with."""
    return q.shape[0] * q.shape[1], q.shape[1], q.shape[3] ** -0.5


def _sequences(q: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """How many programs, and the shape of a tile."""
    b, h, t, c = q.shape
    width = max(triton.next_power_of_2(c), 16)  # the least that tl.dot takes
    return (triton.cdiv(b * h, TILE_ROWS // t),), {"t": t, "c": c, "m": TILE_ROWS, "width": width}


@attend_short.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _heads_last(q)


@attend_short_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_last(q), _heads_last(q), _heads_last(q)


def _keep_attended(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _of_attended(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attend_short_backward(*ctx.saved_tensors, grad)


attend_short.register_autograd(_of_attended, setup_context=_keep_attended)
