"""Where patches end if words end them: SpaceByte's rule (Slagle 2024, arXiv 2404.14408, section 2).

Legend: b batch · t bytes

A byte is spacelike if it is no ASCII letter or digit and no UTF-8 continuation byte (0x80 .. 0xBF). A patch ends after
a spacelike byte that follows none, and after the document boundary. Ours: it ends when it is as long as patches may be,
so that a file without spaces costs what any file costs. Whether a patch starts at byte t is thus decided by the bytes
before t alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mbtrain import vocab


class Patches(NamedTuple):
    """Where the bytes of rows stand; each (b, t): whether a patch starts there, its number, the place in it."""

    starts: Tensor
    number: Tensor
    place: Tensor

    def columns(self, which: slice) -> Patches:
        """Those of some of the bytes."""
        return Patches(self.starts[:, which], self.number[:, which], self.place[:, which])


def patches(ids: Tensor, longest: int) -> Patches:
    """Of these bytes and of the one after them: ids (b, t), t >= 0, gives (b, t + 1); longest in bytes."""
    starts = F.pad(ends(ids), (1, 0), value=True)
    starts = _since(starts) % longest == 0
    return Patches(starts, starts.cumsum(dim=1) - 1, _since(starts))


def ends(ids: Tensor) -> Tensor:
    """After which bytes a patch ends by the rule, whatever its length; ids (b, t) -> (b, t) bool."""
    space = spacelike(ids)
    follows_none = torch.cat((torch.ones_like(space[:, :1]), ~space[:, :-1]), dim=1)
    return (space & follows_none) | (ids == vocab.BOUNDARY)


def spacelike(ids: Tensor) -> Tensor:
    """Which ids are no letter, no digit and no UTF-8 continuation byte; the boundary is spacelike. Same shape."""
    word = _between(ids, ord("0"), ord("9")) | _between(ids, ord("A"), ord("Z")) | _between(ids, ord("a"), ord("z"))
    return ~(word | _between(ids, 0x80, 0xBF))


def mean_patch_bytes(ids: Any, longest: int) -> float:
    """Mean bytes of the patches of these rows, the last of each counted as far as it goes.

    ids (b, t), t >= 1, numpy or torch; longest: of a patch, in bytes.
    """
    starts = patches(torch.as_tensor(ids), longest).starts[:, :-1]
    return starts.numel() / int(starts.sum())


def _between(ids: Tensor, first: int, last: int) -> Tensor:
    return (ids >= first) & (ids <= last)


def _since(starts: Tensor) -> Tensor:
    """How many positions after the last start each stands, 0 at one; starts (b, t), True at t = 0."""
    t = torch.arange(starts.shape[1], device=starts.device)
    return t - torch.where(starts, t, 0).cummax(dim=1).values
