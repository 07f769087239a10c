"""Muon and NorMuon against their formulas in float64, and the law that their learning rate transfers over width.

pytest tests/optim/test_muon.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mbtrain import widths
from mbtrain.engine import parameter_groups
from mbtrain.model import build
from mbtrain.model.mup import Rule
from mbtrain.optim import AdamW, Muon, Piece, ScheduleFree
from mbtrain.optim import build as optimizer_of
from mbtrain.optim.muon import QUINTIC, STEPS, orthogonal
from tests import tiny


def svd_orthogonal(g: Tensor) -> Tensor:
    """The same iteration on the singular values themselves, which is all that it changes."""
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    a, b, c = QUINTIC
    s = s / s.square().sum().sqrt()
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def parameter(tensor: Tensor, role: str = "hidden", parts: int = 1) -> nn.Parameter:
    made = nn.Parameter(tensor)
    made.role, made.rule, made.parts = role, Rule(), parts  # type: ignore[attr-defined]
    return made


def muon(params: list[nn.Parameter], *, lr: float, decay: float = 0.0, **options: Any) -> Muon:
    group = {"params": params, "muon": True, "lr": lr, "lr_scale": 1.0, "weight_decay": decay, "eps": 1e-8}
    made = Muon([group], betas=(0.9, 0.95), eps=1e-8, **{"momentum": 0.9, "dtype": torch.float64, **options})
    for param in params:
        made.ready(made.param_groups[0], param)
    return made


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16), (3, 16, 24)])
def test_orthogonal_is_its_polynomial_of_the_singular_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    made = orthogonal(g)
    each = zip(made, g, strict=True) if g.ndim == 3 else [(made, g)]
    for got, of in each:
        torch.testing.assert_close(got, svd_orthogonal(of))
        values = torch.linalg.svdvals(got)
        assert values.max() < 1.25
        assert values.quantile(0.25) > 0.65


def test_orthogonal_survives_bf16_nothing_and_any_size() -> None:
    torch.manual_seed(0)
    g = torch.randn(32, 48)
    torch.testing.assert_close(orthogonal(g.bfloat16()).float(), svd_orthogonal(g).float(), atol=0.05, rtol=0)
    torch.testing.assert_close(orthogonal(g * 1e-4), orthogonal(g * 1e4), atol=1e-4, rtol=0)
    assert torch.equal(orthogonal(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_muon_is_its_formula_step_by_step() -> None:
    """Momentum in Nesterov's form, three matrices in one, decay, and the scale sqrt(out / in)."""
    torch.manual_seed(0)
    lr, decay, beta = 0.02, 0.1, 0.9
    param = parameter(torch.randn(36, 16, dtype=torch.float64), parts=3)
    optimizer = muon([param], lr=lr, decay=decay, momentum=beta)
    expected, momentum = param.detach().clone(), torch.zeros(36, 16, dtype=torch.float64)
    for _ in range(4):
        grad = torch.randn(36, 16, dtype=torch.float64)
        param.grad = grad.clone()
        optimizer.step()
        momentum = beta * momentum + (1 - beta) * grad
        mixed = beta * momentum + (1 - beta) * grad
        update = torch.cat([svd_orthogonal(part) for part in mixed.split(12)]) * math.sqrt(12 / 16)
        expected = (1 - lr * decay) * expected - lr * update
        torch.testing.assert_close(param.detach(), expected)


def test_of_a_square_matrix_muon_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = parameter(torch.randn(32, 32)), nn.Parameter(torch.zeros(32, 32))
    theirs.data.copy_(ours.data)
    start = ours.detach().clone()
    optimizer = muon([ours], lr=0.1, decay=0.1, momentum=0.95, dtype=torch.bfloat16)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95)
    for _ in range(3):
        ours.grad = torch.randn(32, 32)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert (ours - start).abs().mean() > 0.02
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)  # bf16 in another order


def test_normuon_evens_rows_and_keeps_the_size() -> None:
    torch.manual_seed(0)
    start = torch.randn(24, 40, dtype=torch.float64)
    grad = torch.randn(24, 40, dtype=torch.float64) * torch.logspace(-2, 0, 24, dtype=torch.float64)[:, None]
    made = {}
    for normalised in (False, True):
        param = parameter(start.clone())
        optimizer = muon([param], lr=1.0, normalised=normalised)
        param.grad = grad.clone()
        optimizer.step()
        made[normalised] = start - param.detach()
    rows = {kind: update.norm(dim=1) for kind, update in made.items()}
    assert rows[False].max() / rows[False].min() > 1.02
    torch.testing.assert_close(rows[True], rows[True].mean().expand(24))
    torch.testing.assert_close(made[True].norm(), made[False].norm())


def test_normuon_remembers_its_rows() -> None:
    """v <- beta v + (1 - beta) mean of squares, by row; kept by element."""
    torch.manual_seed(0)
    param = parameter(torch.randn(8, 12, dtype=torch.float64))
    optimizer = muon([param], lr=0.1, normalised=True, momentum=0.0)
    v = torch.zeros(8, 1, dtype=torch.float64)
    for _ in range(3):
        before, param.grad = param.detach().clone(), torch.randn(8, 12, dtype=torch.float64)
        o = svd_orthogonal(param.grad)
        optimizer.step()
        v = 0.95 * v + 0.05 * o.square().mean(dim=1, keepdim=True)
        torch.testing.assert_close(optimizer.state[param]["row_square"], v.expand(8, 12))
        even = o / v.sqrt()
        update = 0.1 * math.sqrt(8 / 12) * even * o.norm() / even.norm()
        torch.testing.assert_close(before - param.detach(), update, rtol=1e-4, atol=1e-7)


def test_a_flat_part_holds_many_matrices() -> None:
    """As ZeRO lays them out, with filling behind them."""
    torch.manual_seed(0)
    shapes = [(6, 10), (12, 4)]
    whole = [
        parameter(torch.randn(shape, dtype=torch.float64), parts=parts)
        for shape, parts in zip(shapes, (1, 2), strict=True)
    ]
    flat = nn.Parameter(torch.cat([*(param.detach().reshape(-1) for param in whole), torch.zeros(5).double()]))
    options = {"lr": 0.1, "decay": 0.2, "normalised": True}
    apart, together = muon(whole, **options), muon([flat], **options)
    together.pieces[flat] = [Piece((6, 10), 1, 0, 0, 60), Piece((12, 4), 2, 60, 0, 48)]
    for _ in range(2):
        for param in whole:
            param.grad = torch.randn_like(param)
        flat.grad = torch.cat([*(param.grad.reshape(-1) for param in whole if param.grad is not None), torch.zeros(5)])
        apart.step()
        together.step()
    torch.testing.assert_close(flat[:108], torch.cat([param.reshape(-1) for param in whole]))


@pytest.mark.parametrize("name", ["adamw", "muon", "normuon", "schedule_free"])
def test_a_paused_step_changes_nothing(name: str) -> None:
    settings = tiny.make(2, optim={"name": name, "schedule": "constant"})
    model = build(settings)
    optimizer = optimizer_of(parameter_groups(model, settings), settings)
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.ready(group, param)
            param.grad = torch.randn_like(param)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = {(i, key): value.clone() for i, of in enumerate(optimizer.state.values()) for key, value in of.items()}
    optimizer.paused = True
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for i, of in enumerate(optimizer.state.values()):
        assert all(torch.equal(value, kept[i, key]) for key, value in of.items())
    optimizer.paused = False
    if isinstance(optimizer, ScheduleFree):
        optimizer.lr = settings.optim.lr
    optimizer.step()
    assert not any(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_matrices_of_blocks_and_between_stages_are_muons_and_nothing_else(name: str) -> None:
    settings = tiny.make(3, optim={"name": name, "embedding_lr": 4.0, "weight_decay": 0.1, "muon_lr": 5.0})
    model = build(settings)
    optimizer = optimizer_of(parameter_groups(model, settings), settings)
    assert isinstance(optimizer, Muon)
    seen = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            seen[id(param)] = group["muon"]
            assert group["muon"] == (param.role in ("hidden", "project"))
            if group["muon"]:
                assert (group["lr_scale"], group["weight_decay"]) == (5.0, pytest.approx(0.1 / 5.0))
    assert len(seen) == len(list(model.parameters()))
    assert {True, False} == set(seen.values())
    fused = {name: param.parts for name, param in model.named_parameters() if param.role == "hidden"}
    assert all(parts == (3 if "qkv" in name else 1) for name, parts in fused.items())


def test_the_lr_is_the_same_at_every_width_where_adams_falls() -> None:
    made = {}
    for factor in (1, 4):
        for name in ("adamw", "muon"):
            base = tiny.make(2, optim={"name": name, "muon_lr": 5.0}, model={"parametrization": "mup"})
            settings = widths.widened(widths.based(base), factor)
            optimizer = optimizer_of(parameter_groups(build(settings), settings), settings)
            scales = {g["lr_scale"] for g in optimizer.param_groups for p in g["params"] if p.role == "hidden"}
            made[name, factor] = scales
    assert made["adamw", 1] == {1.0}
    assert made["adamw", 4] == {0.25}
    assert made["muon", 1] == made["muon", 4] == {5.0}


def test_an_update_moves_features_as_much_at_every_width() -> None:
    """What the LR of Muon transfers by; AdamW's at one LR moves them in proportion to the width."""
    torch.manual_seed(0)

    def moved(width: int, out: int, kind: str) -> float:
        param = parameter(torch.zeros(out, width))
        x = torch.randn(width)
        param.grad = torch.outer(torch.randn(out), x) / out + 1e-3 * torch.randn(out, width) / out
        if kind == "muon":
            muon([param], lr=0.01, dtype=torch.float32).step()
        else:
            AdamW([param], lr=0.01, weight_decay=0.0).step()
        return float((param.detach() @ x).square().mean().sqrt())

    for kind, growth in (("muon", 1.0), ("adamw", 8.0)):
        for ratio in (1, 4):
            wide, narrow = moved(512, 512 * ratio, kind), moved(64, 64 * ratio, kind)
            assert wide / narrow == pytest.approx(growth, rel=0.3), (kind, ratio)
    assert moved(256, 256, "muon") == pytest.approx(0.01, rel=0.35), "the LR is the step, within singular values' range"
