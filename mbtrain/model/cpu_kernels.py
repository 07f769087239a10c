"""cpu_kernels.c in torch's graph: norms, attention inside patches, relu2, loss and embedding of bf16 tensors on a CPU.

Each gives what torch's own operations give, in one pass with fp32 inside, so it is nearer to the exact result: torch
rounds between operations, and adds up the gradients of norms' gains and of embeddings in bf16 (off by 25 % at 65,536
positions). `ready` says whether they stand in; where they are called the same is there in plain torch, too.

Legend: n rows · d features · b sequences · t positions · h heads · c features of a head · v classes
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mbtrain.model import compiled

# Positions up to which attention in one pass wins over torch's products: 1.6 times at 32, 3 at 8, 0.9 at 64.
LONGEST = 32
LANES = 16  # features come in multiples of this


class Heads(ctypes.Structure):
    """What is done to queries and keys of a head before they meet; of b sequences of t positions, h heads c wide.

    cos, sin: where rotary angles (t, c / 2) in fp32 lie, or None. scale: of scores.
    """

    _fields_ = (
        *((name, c_int64) for name in ("b", "t", "h", "c")),
        *((name, c_void_p) for name in ("cos", "sin")),
        ("qk_norm", c_int64),
        *((name, c_float) for name in ("query_multiplier", "scale")),
        ("threads", c_int64),
    )


def ready(x: Tensor, width: int = LANES) -> bool:
    """Whether these kernels take x, of this width: bf16 on a CPU, there is a library, and nobody traces."""
    return rounds(x) and width % LANES == 0 and _library() is not None


def rounds(x: Tensor) -> bool:
    """Whether torch's own operations on x, bf16 on a CPU, would add up gradients in bf16."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _library() -> ctypes.CDLL | None:
    return compiled.library("cpu_kernels", "-fopenmp")


def norm(x: Tensor, gain: Tensor | None, bias: Tensor | None, rms: bool) -> Tensor:
    """LayerNorm or, rms, RMSNorm over the last features; x (..., d) -> (..., d)."""
    return cast(Tensor, _Norm.apply(x, gain, bias, rms))


def relu2(x: Tensor) -> Tensor:
    """relu(x) ** 2."""
    return cast(Tensor, _Relu2.apply(x))


def nats(logits: Tensor, ids: Tensor) -> Tensor:
    """-ln p(ids): (n, v), (n,) -> (n,) in fp32."""
    return cast(Tensor, _Nats.apply(logits, ids))


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of a table (v, d), ids (...) -> (..., d), whose gradient is added up in fp32; with or without library."""
    return cast(Tensor, _Embedding.apply(ids, table))


def turned(
    qkv: Tensor, h: int, angles: tuple[Tensor, Tensor] | None, qk_norm: bool, query_multiplier: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (b, h, t, c) of (b, t, 3 h c): the first two normed, the first multiplied, both turned.

    angles: cos and sin (t, c / 2) in fp32 on the CPU, contiguous, or None.
    """
    return cast(tuple[Tensor, Tensor, Tensor], _Turned.apply(qkv, h, angles, qk_norm, query_multiplier))


def attention(
    qkv: Tensor, h: int, angles: tuple[Tensor, Tensor] | None, qk_norm: bool, query_multiplier: float
) -> Tensor:
    """Causal attention of what `turned` gives: (b, t, 3 h c) -> (b, t, h c). For short sequences: see LONGEST."""
    return cast(Tensor, _Attention.apply(qkv, h, angles, qk_norm, query_multiplier))


def _run(name: str, *values: Tensor | Heads | int | None) -> None:
    """Call a function of cpu_kernels.c; the number of threads is added where no Heads has it."""
    given: list[Any] = [
        c_int64(value)
        if isinstance(value, int)
        else ctypes.byref(value)
        if isinstance(value, Heads)
        else c_void_p(None if value is None else value.data_ptr())
        for value in values
    ]
    if not isinstance(values[0], Heads):
        given.append(c_int64(torch.get_num_threads()))
    getattr(_library(), name)(*given)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None, rms: bool) -> Tensor:
        x, d = x.contiguous(), x.shape[-1]
        y = torch.empty_like(x)
        _run("norm", x.numel() // d, d, x, gain, bias, int(rms), y)
        ctx.save_for_backward(x, gain)
        ctx.rms, ctx.has_bias = rms, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        dy, d = dy.contiguous(), x.shape[-1]
        dx, sums = torch.empty_like(x), torch.zeros(torch.get_num_threads(), 2, d)
        _run("norm_back", x.numel() // d, d, x, gain, int(ctx.rms), dy, dx, sums)
        gains, biases = sums.sum(dim=0).to(x.dtype)
        return dx, None if gain is None else gains, biases if ctx.has_bias else None, None


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _run("relu2", x.numel(), x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _run("relu2_back", x.numel(), x, dy.contiguous(), dx)
        return dx


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        logits, ids = logits.contiguous(), ids.contiguous()
        out, logs = torch.empty(2, *ids.shape)
        _run("nats", *logits.shape, logits, ids, out, logs)
        ctx.save_for_backward(logits, ids, logs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnats: Tensor) -> tuple[Tensor, None]:
        logits, ids, logs = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        _run("nats_back", *logits.shape, logits, ids, logs, dnats.contiguous(), dlogits)
        return dlogits, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(table)
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        dy, d = dy.contiguous(), dy.shape[-1]
        sums = torch.zeros(ctx.rows, d)
        if ready(dy, d):
            _run("embedding_back", ids.numel(), d, ids.contiguous(), dy, sums)
        else:
            sums.index_add_(0, ids.flatten(), dy.view(-1, d).float())
        return None, sums.to(dy.dtype)


def _heads(qkv: Tensor, h: int, angles: tuple[Tensor, Tensor] | None, qk_norm: bool, query_multiplier: float) -> Heads:
    """How cpu_kernels.c is told; it points to the angles, which the caller keeps."""
    b, t, width = qkv.shape
    c = width // (3 * h)
    cos, sin = (None, None) if angles is None else (angle.data_ptr() for angle in angles)
    return Heads(b, t, h, c, cos, sin, int(qk_norm), query_multiplier, c**-0.5, torch.get_num_threads())


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, h: int, *how: Any) -> tuple[Tensor, ...]:
        qkv = qkv.contiguous()
        ctx.heads, ctx.how = _heads(qkv, h, *how), how
        q, k, v = qkv.new_empty(3, len(qkv), h, qkv.shape[1], ctx.heads.c)
        _run("turn", ctx.heads, qkv, q, k, v)
        ctx.save_for_backward(qkv)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (qkv,) = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        _run("turn_back", ctx.heads, qkv, *(grad.contiguous() for grad in grads), dqkv)
        return dqkv, None, None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, h: int, *how: Any) -> Tensor:
        qkv = qkv.contiguous()
        ctx.heads, ctx.how = _heads(qkv, h, *how), how
        out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
        _run("attention", ctx.heads, qkv, out)
        ctx.save_for_backward(qkv)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (qkv,) = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        _run("attention_back", ctx.heads, qkv, dout.contiguous(), dqkv)
        return dqkv, None, None, None, None
