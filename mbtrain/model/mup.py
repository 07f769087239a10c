"""How initialisation, learning rate and the like follow from a parameter's role and shape: muP, stage by stage.

The maximal update parametrization (Yang et al. 2022, arXiv 2203.03466; for Adam and any shape by its spectral form,
Yang et al. 2023, arXiv 2310.17813) with CompleteP's depth (Dey et al. 2025, arXiv 2505.01618). All is relative to a
base shape, where the values of a configuration hold as they are: there mup is sp bit for bit. Each stage of a
multiscale model has its own base, so a stage alone may grow; the matrix between two stages is a hidden one where both
grow, a readout where only the coarser does, an input where only the finer does, by one formula.
"""

from __future__ import annotations

from dataclasses import dataclass

from mbtrain.config import MupConfig

ROLES = ("embedding", "tied", "position", "pad", "hidden", "project", "readout", "gain", "bias")
VECTORS = ("embedding", "position", "pad")  # whose input is one-hot


@dataclass(frozen=True)
class Rule:
    """Factors on what a parameter has at its base shape: std at init, LR, weight decay, eps, and what it gives."""

    init_std: float = 1.0
    multiplier: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    depth_lr: float = 1.0  # the part of lr that is the depth's: all of it where updates have their matrix's size (Muon)


def rule(role: str, shape: tuple[int, ...], base_shape: tuple[int, ...], mup: MupConfig, depth: float = 1.0) -> Rule:
    """The rule of a parameter of this role and shape.

    shape, base_shape  (out, in) of matrices, (rows, width) of tables, (width,) of vectors
    depth              for what is inside blocks: layers of the stage relative to its base; else 1

    With i, o and m the ratios of a matrix's in and out and of a table's width to the base's, l the depth, and e,
    (a, b, c) and alpha MupConfig's powers:

    role                      init std                multiplier  LR               eps
    embedding, position, pad  1                       1           m^-e             1/m
    tied (gives logits too)   1                       1/m         1                1/m
    hidden, project           i^-1/2 s / s of base    1           l^(alpha-1) / i  l^-alpha / o
    readout                   m^-b                    m^-a        m^-c             m^-a
    gain, bias                1                       1           l^(alpha-1)      l^-alpha / m

    with s = min(1, out / in)^1/2 of the shape itself: a matrix that narrows has its singular values made as large as
    one that widens by smaller elements. (The shape's, not the ratios': where a family begins does not matter.)
    Weight decay: 1 over the LR's part that is the width's (m^e, i, m^c), so that LR times decay is as at base; with
    decay=coupled 1. With eps=false all of the last column is 1. LRs are those of Adam-like optimizers. The widths are
    D_0 / P in the coarsest stage's tables and in the matrix after it, D_0 in its transformer. Where the sp form of the
    configuration divides the branches' last matrices by the root of the layers, the base's layers count.
    Raises ValueError for an unknown role.
    """
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}, expected one of {ROLES}")
    ratios = [have / base for have, base in zip(shape, base_shape, strict=True)]
    width = ratios[-1]
    in_blocks_lr, in_blocks_eps = depth ** (mup.depth_power - 1), depth**-mup.depth_power
    if role in VECTORS:
        made = Rule(lr=width**-mup.embedding_lr_power, eps=1 / width)
    elif role == "tied":
        made = Rule(multiplier=1 / width, eps=1 / width)
    elif role == "readout":
        a, b, c = mup.readout
        made = Rule(init_std=width**-b, multiplier=width**-a, lr=width**-c, eps=width**-a)
    elif role in ("gain", "bias"):
        made = Rule(eps=1 / width)
    else:
        narrowing = _narrowing(shape) / _narrowing(base_shape)
        made = Rule(init_std=width**-0.5 * narrowing, lr=1 / width, eps=1 / ratios[0])
    return Rule(
        init_std=made.init_std,
        multiplier=made.multiplier,
        lr=made.lr * in_blocks_lr,
        weight_decay=1 / made.lr if mup.decay == "rescaled" else 1.0,
        eps=made.eps * in_blocks_eps if mup.eps else 1.0,
        depth_lr=in_blocks_lr,
    )


def _narrowing(shape: tuple[int, ...]) -> float:
    """min(1, out / in)^1/2 of a matrix (out, in)."""
    return min(1.0, shape[0] / shape[1]) ** 0.5


def branch_multiplier(mup: MupConfig, depth: float) -> float:
    """On what each branch of a block adds to the residual stream: depth^-alpha."""
    return depth**-mup.depth_power


def query_multiplier(mup: MupConfig, d_head: int, base_d_head: int) -> float:
    """On queries, whose products with keys are then divided by the root of d_head: base^(p - 1/2) / d_head^p in all."""
    return float((base_d_head / d_head) ** (mup.attention_power - 0.5))
