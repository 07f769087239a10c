"""Sequence parallelism: the ranks of a group share their rows, and each computes its own run of patches alone.

Legend: b batch · t positions of one rank · s positions of the row · h heads · c features of a head

Every rank has a row's ids whole (bytes are cheap) and the activations of its patches only. Finer stages run inside one
patch and need nobody. The coarsest stage's attention is Ulysses (Jacobs et al. 2023, arXiv 2309.14509): queries, keys
and values of t positions and all heads are exchanged for all positions and a share of the heads, and the result back.
So causality, and the mask that keeps documents apart, are those of the whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

# (q, k, v, dropout, mask) -> mixed, as layers.attend
Attend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


@dataclass(frozen=True)
class Part:
    """Which run of a row's patches this rank holds: the index-th of `parts` runs of equal length."""

    index: int = 0
    parts: int = 1

    def columns(self, n: int) -> slice:
        """This part of n columns: of a row's bytes, or of its patches. Raises ValueError where n cannot be cut."""
        if n % self.parts:
            raise ValueError(f"sequence parallelism: {n} columns, expected a multiple of the {self.parts} parts")
        width = n // self.parts
        return slice(self.index * width, (self.index + 1) * width)


WHOLE = Part()


def by_position(attend: Attend) -> Callable[..., Tensor]:
    """An attention over (b, h, s, c) as one over (b, s, h, c), the layout that is exchanged."""

    def local(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None) -> Tensor:
        q, k, v = (rearrange(x, "b s h c -> b h s c") for x in (q, k, v))
        return rearrange(attend(q, k, v, dropout, mask), "b h s c -> b s h c")

    return local


def by_head(exchanging: Callable[..., Tensor]) -> Attend:
    """DeepSpeed's DistributedAttention around `by_position`, as an attention over this rank's (b, h, t, c).

    Its forward takes q, k, v, the place of the batch dimension, rotary angles (ours are applied already), and what the
    local attention gets besides. The mask, (b, 1, s, s), is the whole row's: heads share it, so it is not exchanged.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None) -> Tensor:
        q, k, v = (rearrange(x, "b h t c -> b t h c") for x in (q, k, v))
        return rearrange(exchanging(q, k, v, 0, None, dropout, mask), "b t h c -> b h t c")

    return attend
