"""Muon (Jordan et al. 2024): the momentum of a matrix, with its singular values made 1, is the update; AdamW the rest.

    M  <- beta M + (1 - beta) G               G the gradient, in Nesterov's form: N = (1 - beta) G + beta M
    O   = U V^T of N = U S V^T, nearly: five steps of a quintic Newton-Schulz iteration, S in 0.7 .. 1.2
    W  <- (1 - lr decay) W - lr sqrt(out / in) O

All as in torch.optim.Muon but the last factor: an update of spectral size sqrt(out / in) moves features as much at
every width (Yang et al. 2023, arXiv 2310.17813), so that the LR's relative factor is 1 where Adam's is 1 / width, and
only depth's part of it is left. Matrices that hold several (queries, keys and values; gate and value) are several here.

NorMuon (Li et al. 2025, arXiv 2510.05491): rows of O are divided by the root of their mean squares over time, and O is
brought back to its size.

Under ZeRO a rank has stretches of a group's momentum. It hands them to all (`Shared`), so that every matrix is whole
where a part of it is owned: with ZeRO 1 and 2 that is also how the work is divided.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mbtrain.config import OptimConfig
from mbtrain.optim.adamw import AdamW

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: the steepest at 0 that stays near 1
STEPS = 5
MATRIX_ROLES = ("hidden", "project")


class Piece(NamedTuple):
    """A matrix of a flat part: its shape, how many it holds, and `length` elements of it that this rank owns.

    They lie from element `at` on in the flat part, and from element `start` on in the matrix.
    """

    shape: tuple[int, int]
    parts: int
    at: int
    start: int
    length: int


def split_groups(groups: list[dict[str, Any]], optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups with matrices apart from the rest, marked by "muon"; theirs is depth's part of the LR, times muon_lr.

    Their weight decay is over muon_lr: what a step takes off the weights is as with AdamW at its base width.
    """
    made = []
    for group in groups:
        rest = [param for param in group["params"] if getattr(param, "role", None) not in MATRIX_ROLES]
        matrices: dict[float, list[Tensor]] = {}  # by depth's part
        for param in group["params"]:
            if getattr(param, "role", None) in MATRIX_ROLES:
                matrices.setdefault(param.rule.depth_lr, []).append(param)
        decay = optim.weight_decay / optim.muon_lr if group["weight_decay"] else 0.0
        for depth_lr, params in sorted(matrices.items()):
            lr_scale = depth_lr * optim.muon_lr
            made.append({**group, "params": params, "muon": True, "lr_scale": lr_scale, "weight_decay": decay})
        if rest:
            made.append({**group, "params": rest, "muon": False})
    return made


def orthogonal(matrices: Tensor) -> Tensor:
    """U V^T of each of (..., rows, columns), nearly: singular values in 0.7 .. 1.2, in the dtype given."""
    a, b, c = QUINTIC
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x.reshape(-1, *x.shape[-2:]).squeeze(0)
    add = torch.addmm if x.ndim == 2 else torch.baddbmm  # one matrix by itself takes three quarters of the time
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrices.shape)


class Muon(AdamW):
    """Groups marked "muon" are updated by their matrices, the others by AdamW. `pieces` has each flat part's matrices.

    pieces  by parameter that is stepped; one that is missing here is a whole matrix by itself
    shared  whether ranks own parts of matrices: then all of them step the same flat parts in the same order
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        normalised: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self.momentum, self.normalised, self.dtype = momentum, normalised, dtype
        self.pieces: dict[Tensor, list[Piece]] = {}
        self.shared = False

    def kinds(self, group: dict[str, Any]) -> tuple[str, ...]:
        """What is kept of each element of this group's parameters, by name."""
        if not group["muon"]:
            return super().kinds(group)
        return ("momentum", "row_square") if self.normalised else ("momentum",)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, or none."""
        if self.paused:
            return None
        all_groups = self.param_groups
        for group in all_groups:
            for param in group["params"] if group["muon"] else ():
                if param.grad is not None:
                    self._update(param, param.grad, group)
        self.param_groups = [group for group in all_groups if not group["muon"]]
        try:
            return super().step()
        finally:
            self.param_groups = all_groups

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, weights = self.state[param], param.view(-1)
        state["momentum"].lerp_(grad, 1 - self.momentum)
        mixed = grad.lerp(state["momentum"], self.momentum).view(-1).to(self.dtype)
        pieces = self.pieces.get(param) or [_all_of(param)]
        wholes = self._wholes(pieces, mixed)
        squares = self._row_squares(pieces, state["row_square"].view(-1)) if self.normalised else []
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        for i, piece in enumerate(pieces):
            if not piece.length:
                continue
            rows, columns = piece.shape
            o = orthogonal(wholes[i].view(piece.parts, rows // piece.parts, columns))
            mine, own = slice(piece.at, piece.at + piece.length), slice(piece.start, piece.start + piece.length)
            if self.normalised:
                o, of_rows = _with_even_rows(
                    o.to(weights.dtype), squares[i].view(piece.parts, -1, 1), group["betas"][1]
                )
                state["row_square"].view(-1)[mine] = of_rows.expand_as(o).reshape(-1)[own]
            scale = math.sqrt(rows / piece.parts / columns)
            weights[mine].add_(o.reshape(-1)[own], alpha=-group["lr"] * scale)

    def _wholes(self, pieces: list[Piece], flat: Tensor) -> list[Tensor]:
        """Each matrix whole, as a vector, of what all ranks have of it in their flat parts. Collective where shared."""
        if not self.shared:
            return [flat[piece.at : piece.at + piece.length] for piece in pieces]
        wholes = [flat.new_zeros(math.prod(piece.shape)) for piece in pieces]
        together = torch.cat(wholes)
        wholes = list(together.split([whole.numel() for whole in wholes]))
        for piece, whole in zip(pieces, wholes, strict=True):
            whole[piece.start : piece.start + piece.length] = flat[piece.at : piece.at + piece.length]
        dist.all_reduce(together)  # each element is one rank's, the others add zeros: exact in any dtype
        return wholes

    def _row_squares(self, pieces: list[Piece], flat: Tensor) -> list[Tensor]:
        """What is kept of each matrix's rows, of the copies by element that ranks own. Collective where shared."""
        made = []
        for piece in pieces:
            whole = flat.new_zeros(math.prod(piece.shape))
            whole[piece.start : piece.start + piece.length] = flat[piece.at : piece.at + piece.length]
            made.append(whole.view(piece.shape).amax(dim=1))
        if not self.shared:
            return made
        together = torch.cat(made)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return list(together.split([rows.numel() for rows in made]))


def _all_of(param: Tensor) -> Piece:
    """A parameter that is one whole matrix."""
    rows, columns = param.shape
    return Piece((rows, columns), getattr(param, "parts", 1), 0, 0, param.numel())


def _with_even_rows(o: Tensor, before: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """NorMuon's o (n, rows, columns), as large as before, and its rows' mean squares over time, (n, rows, 1)."""
    squares = before.lerp(o.square().mean(dim=-1, keepdim=True), 1 - beta)
    even = o / (squares.sqrt() + 1e-8)
    return even * (o.norm(dim=(-2, -1), keepdim=True) / even.norm(dim=(-2, -1), keepdim=True)), squares
