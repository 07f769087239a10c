"""A function of whole patches, computed for some of them at a time, and once more for its gradients.

Legend: b batch · t bytes · k patches · p bytes of a patch · d features

Not torch's checkpoint once for each chunk, for two reasons, both measured (docs/performance.md): what the graph keeps
of each chunk lies between the large tensors of the next and leaves holes in the heap, and where weights are bf16, the
chunks' gradients would be added up in bf16. Here nothing is kept, and they are added up in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# (ids (b, t), coarse (b, k, d) or None, bytes that are not asked for at their begin) -> (b, t - those)
Run = Callable[[Tensor, Tensor | None, int], Tensor]


@dataclass(frozen=True)
class Cut:
    """How rows are cut: `width` patches of so many bytes at a time, that begin `reach` (<= width) patches earlier."""

    patch_bytes: int
    width: int
    reach: int

    def pieces(self, t: int) -> Iterator[tuple[slice, slice, slice, int]]:
        """Of each chunk of rows of t bytes: its bytes; those it looks at, and their patches; by how many it begins
        too early."""
        p, step = self.patch_bytes, self.width * self.patch_bytes
        for first in range(0, t, step):
            last = min(first + step, t)
            before = min(self.reach * p, first)
            yield slice(first, last), slice(first - before, last), slice((first - before) // p, last // p), before


class InChunks(nn.Module):
    """`run` of whole rows, ids (b, t) and coarse (b, k, d) -> (b, t) in float32 at least, chunk by chunk.

    owners: the modules whose parameters run uses. A parameter's gradient comes once and whole, as from any function;
    on the way hooks of the parameter see those of the chunks, and `in_part` is then true.
    """

    def __init__(self, run: Run, owners: Callable[[], Iterable[nn.Module]]):
        super().__init__()
        self.run, self.owners = run, owners  # no children: parameters have their names elsewhere
        self.cut = Cut(1, 1, 0)
        self.in_part = False

    def forward(self, ids: Tensor, coarse: Tensor | None) -> Tensor:
        # Read as attributes: where ZeRO-3 has them elsewhere, it learns that they are needed here, in backward too.
        params = [getattr(of, name) for of in self.owners() for name, p in of._parameters.items() if p is not None]
        if torch.is_grad_enabled():
            found: Tensor = _Recomputed.apply(self, self.cut, ids, coarse, *params)  # type: ignore[no-untyped-call]
            return found
        return _forward(self.run, self.cut, ids, coarse)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of: InChunks, cut: Cut, ids: Tensor, coarse: Tensor | None, *params: nn.Parameter) -> Tensor:
        ctx.of, ctx.cut, ctx.params = of, cut, params
        ctx.save_for_backward(ids, coarse)
        ctx.autocast, ctx.random = _autocast(ids.device), _random_state(ids.device)
        return _forward(of.run, cut, ids, coarse)

    @staticmethod
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ids, coarse = ctx.saved_tensors
        of_coarse = None if coarse is None else torch.zeros_like(coarse)
        sums: list[Tensor | None] = [None] * len(ctx.params)
        with ctx.autocast(), _random(ids.device, ctx.random), torch.enable_grad(), _in_part(ctx.of):
            for own, seen, patches, before in ctx.cut.pieces(ids.shape[1]):
                part = [] if coarse is None else [coarse[:, patches].detach().requires_grad_()]
                each = ctx.of.run(ids[:, seen], part[0] if part else None, before)
                wanted_here = wanted[:, own].to(each.dtype)
                grads = list(torch.autograd.grad(each, [*ctx.params, *part], wanted_here, allow_unused=True))
                del each
                if of_coarse is not None:
                    of_coarse[:, patches] += grads.pop()
                sums = [_added(total, grad) for total, grad in zip(sums, grads, strict=True)]
        typed = [total if total is None else total.to(p.dtype) for total, p in zip(sums, ctx.params, strict=True)]
        return None, None, None, of_coarse, *typed


@torch.no_grad()
def _forward(run: Run, cut: Cut, ids: Tensor, coarse: Tensor | None) -> Tensor:
    found: Tensor | None = None
    for own, seen, patches, before in cut.pieces(ids.shape[1]):
        each = run(ids[:, seen], None if coarse is None else coarse[:, patches], before)
        if found is None:  # one tensor from the start on: pieces kept between the chunks would leave holes
            found = each.new_empty(ids.shape)
        found[:, own] = each
    assert found is not None
    return found


@contextmanager
def _in_part(of: InChunks) -> Iterator[None]:
    of.in_part = True
    try:
        yield
    finally:
        of.in_part = False


def _added(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """A sum in float32 at least."""
    if grad is None:
        return total
    if total is None:
        return grad.to(torch.float32 if grad.dtype.itemsize < 4 else grad.dtype, copy=True)
    return total.add_(grad)


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the backward pass compute under the autocast of now."""
    kind = device.type
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled=on, cache_enabled=False)


def _random_state(device: torch.device) -> Tensor:
    """That of the generator that dropout draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _random(device: torch.device, state: Tensor) -> Iterator[None]:
    """Inside, random numbers are those that followed `state`; afterwards they go on as if nothing had been."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
