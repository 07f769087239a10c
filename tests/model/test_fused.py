"""The Triton kernels against the reference, in Triton's interpreter: no GPU is asked for.

pytest tests/model/test_fused.py; without Triton most of it is skipped (torch for CUDA brings it, for CPU it does not)
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mbtrain.model import build, cpu_kernels, fused, layers
from mbtrain.model.loss import nats
from tests import tiny
from tests.launch import ROOT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FOUND = importlib.util.find_spec("triton") is not None
inside = pytest.mark.skipif(not (FOUND and INTERPRETED), reason="run by the test in a process with TRITON_INTERPRET=1")

# Of the norm. Interpreted, bf16 is cut off and not rounded: twice the reference's own error.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
PATCHES = [(3, 2, 5, 24), (7, 3, 4, 64), (2, 1, 32, 128), (33, 2, 2, 16), (2, 2, 17, 80)]


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    got, wanted = got.detach(), wanted.detach()
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.skipif(not FOUND or INTERPRETED, reason="no Triton here, or inside the process that it starts")
def test_in_a_process_with_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@inside
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "v"), [(37, 257), (20, 256), (3, 600)])
def test_nats(n: int, v: int, dtype: torch.dtype) -> None:
    """Against float64, forward and backward; rows that do not fill a tile."""
    torch.manual_seed(n)
    logits = (3 * torch.randn(n, v)).to(dtype).requires_grad_()
    ids, wanted = torch.randint(0, v, (n,)), torch.rand(n)
    assert fused.takes_logits(logits)
    got = fused.nats(logits, ids)
    (grad,) = torch.autograd.grad(got, logits, wanted)
    exact = logits.detach().double().requires_grad_()
    reference = F.cross_entropy(exact, ids, reduction="none")
    assert got.dtype == torch.float32
    assert error(got, reference) < 1e-6
    assert grad.dtype == dtype
    assert error(grad, torch.autograd.grad(reference, exact, wanted.double())[0]) < TOLERANCE[dtype]


@inside
def test_nats_of_far_logits_are_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]]).repeat(3, 1)
    got = nats(logits.unsqueeze(0), torch.tensor([[0, 1, 2]]))
    assert got.tolist() == [[0.0, 2e4, 1e4]]


@inside
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", PATCHES, ids=str)
def test_attention_inside_patches(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Against float64, forward and backward; of views into one product, as a block gives them."""
    b, h, t, c = shape
    torch.manual_seed(t)
    leaves = [x.transpose(1, 2).detach() for x in torch.randn(b, t, 3, h, c).to(dtype).unbind(2)]
    leaves[0] = leaves[0].contiguous()  # a norm makes it so
    q, k, v = (x.requires_grad_() for x in leaves)
    wanted = torch.randn(b, h, t, c).to(dtype)
    assert fused.takes_patches(q, k)
    got = layers.attend(q, k, v, 0.0)
    grads = torch.autograd.grad(got, (q, k, v), wanted)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference = layers.attend_plainly(exact[0], exact[1], exact[2], 0.0)
    assert got.dtype == dtype
    assert error(got, reference) < TOLERANCE[dtype]
    for grad, each in zip(grads, torch.autograd.grad(reference, exact, wanted.double()), strict=True):
        assert error(grad, each) < TOLERANCE[dtype]


def patches_of_four(**train: Any) -> Any:
    """A tiny model whose stages both have heads as wide as the kernels take, and patches of 4 bytes."""
    stages = [
        {"patch_size": 4, "d_model": 32, "n_layers": 1, "n_heads": 2},
        {"patch_size": 1, "d_model": 32, "n_layers": 2, "n_heads": 2},
    ]
    return tiny.make(2, model={"stages": stages, "local_positions": "rotary"}, train=train)


@inside
@pytest.mark.parametrize("how", ["eager", "compiled", "autocast"])
def test_a_whole_model(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients with the kernels are those without; also where torch.compile traces the blocks."""
    monkeypatch.setattr(cpu_kernels, "rounds", lambda x: False)  # a GPU has not those
    settings = patches_of_four()
    torch.manual_seed(0)
    model = build(settings)
    ids = torch.randint(0, 257, (2, 32))

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            lost = nats(model(ids), ids).mean()
        return [lost, *torch.autograd.grad(lost, list(model.parameters()))]

    calls: list[str] = []
    for name in ("attend", "nats"):
        monkeypatch.setattr(fused, name, counted(getattr(fused, name), name, calls))
    if how == "compiled":
        torch.compiler.reset()
        fused.settle_for_compiler()
        for stage in model.stages:
            for block in stage.transformer.blocks:
                block.compile(backend="aot_eager", fullgraph=True)
    got = run()
    assert calls.count("nats") == 1
    assert calls.count("attend") >= 2  # a compiled block calls it when it is traced
    monkeypatch.setattr(fused, "_wanted", lambda device: False)
    if how == "compiled":
        torch.compiler.reset()
    reference = run()
    assert calls.count("nats") == 1
    for one, other in zip(got, reference, strict=True):
        assert error(one, other) < (3e-2 if how == "autocast" else 1e-5)


def counted(function: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def counting(*args: Any) -> Any:
        calls.append(name)
        return function(*args)

    return counting


@inside
def test_torch_finds_the_operators_in_order() -> None:
    """Their shapes without data, and their gradients, are as torch.compile needs them."""
    q, k, v = (torch.randn(2, 2, 4, 16, requires_grad=True) for _ in range(3))
    torch.library.opcheck(torch.ops.mbtrain.attend_short.default, (q, k, v))
    logits, ids = torch.randn(5, 257, requires_grad=True), torch.randint(0, 257, (5,))
    torch.library.opcheck(torch.ops.mbtrain.nats.default, (logits, ids))


@inside
def test_the_rest_goes_the_reference_way() -> None:
    q = torch.randn(2, 2, 4, 16)
    assert fused.takes_patches(q, q)
    assert not fused.takes_patches(q[:, :, :1], q)  # a step of generation
    assert not fused.takes_patches(q.double(), q.double())
    assert not fused.takes_patches(q[..., :8], q[..., :8])
    long = torch.randn(1, 1, 33, 16)
    assert not fused.takes_patches(long, long)
    assert not fused.takes_logits(torch.randn(2, 2000))
    assert layers.attend(q, q, q, 0.5).shape == q.shape  # dropout: the kernels have none


@pytest.mark.skipif(INTERPRETED, reason="inside the other process")
def test_nothing_changes_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fused.takes_logits(torch.randn(3, 257))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MBTRAIN_FUSED", "0")
    fused._found.cache_clear()
    assert not fused.takes_logits(torch.randn(3, 257))
    fused._found.cache_clear()
