"""The C between matrix products gives what exact arithmetic gives on the same bf16 numbers, forward and backward.

pytest tests/model/test_cpu_kernels.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mbtrain.model import compiled, cpu_kernels
from mbtrain.model.layers import attend, kept_angles, look_up, rotate
from mbtrain.model.loss import nats
from tests import tiny
from tests.model.test_megabyte import randomised
from tests.model.test_native import VARIANTS

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# Rounded to bf16 a number is off by up to 0.4 %, many by 0.17 % of their norm.
ROUNDED = 3e-3


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads of torch, and therefore of the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without compiler."""
    monkeypatch.setenv("MBTRAIN_NATIVE", "0")
    compiled.library.cache_clear()
    yield
    monkeypatch.undo()
    compiled.library.cache_clear()


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that bf16 holds, in float64, that want a gradient."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return made.bfloat16().double().requires_grad_()


def apart(got: Tensor | None, wanted: Tensor | None) -> float:
    """Their difference relative to the second, by norms."""
    assert got is not None
    assert wanted is not None
    assert got.shape == wanted.shape
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def agree(
    own: Callable[..., tuple[Tensor, ...]], exact: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor | None]
) -> None:
    """Outputs and gradients of `own` in bf16 are those of `exact` in float64, but for the rounding of each result."""
    narrow = [None if x is None else x.detach().bfloat16().requires_grad_() for x in inputs]
    outputs, wanted = own(*narrow), exact(*inputs)
    grads = [random(*out.shape, seed=7 + i).detach() for i, out in enumerate(wanted)]
    for got, want in zip(outputs, wanted, strict=True):
        assert apart(got, want) < ROUNDED
    torch.autograd.backward(outputs, [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)])
    torch.autograd.backward(wanted, grads)
    for x, y in zip(narrow, inputs, strict=True):
        if x is not None and y is not None:
            assert apart(x.grad, y.grad) < ROUNDED


@needs_compiler
@pytest.mark.parametrize("shape", [(5, 16), (2, 7, 48), (300, 192)])
@pytest.mark.parametrize("given", ["plain", "gain", "gain and bias", "rms", "rms and gain"])
def test_norm(shape: tuple[int, ...], given: str, threads: int) -> None:
    rms, d = "rms" in given, shape[-1]
    gain = random(d, seed=1) if "gain" in given else None
    bias = random(d, seed=2) if "bias" in given else None

    def exact(x: Tensor, gain: Tensor | None, bias: Tensor | None) -> tuple[Tensor]:
        return (F.rms_norm(x, (d,), gain, 1e-5) if rms else F.layer_norm(x, (d,), gain, bias, 1e-5),)

    agree(lambda *given: (cpu_kernels.norm(*given, rms),), exact, [random(*shape), gain, bias])


@needs_compiler
def test_relu2(threads: int) -> None:
    agree(lambda x: (cpu_kernels.relu2(x),), lambda x: (F.relu(x).square(),), [random(9, 7, 16)])


@needs_compiler
@pytest.mark.parametrize("v", [256, 257, 5, 1])
def test_nats(v: int, threads: int) -> None:
    ids = torch.arange(40) % v
    logits = random(40, v, scale=4.0)
    if v == 1:
        assert torch.equal(cpu_kernels.nats(logits.detach().bfloat16(), ids), torch.zeros(40))
        return
    agree(lambda x: (cpu_kernels.nats(x, ids),), lambda x: (F.cross_entropy(x, ids, reduction="none"),), [logits])


@needs_compiler
def test_nats_of_uniform_logits_are_exact() -> None:
    ids = torch.arange(256)
    assert torch.allclose(cpu_kernels.nats(torch.zeros(256, 256).bfloat16(), ids), torch.tensor(256.0).log(), rtol=1e-7)
    far = torch.full((1, 256), -1e30).bfloat16()
    far[0, 3] = 0
    assert float(cpu_kernels.nats(far, torch.tensor([3]))) == 0.0


@pytest.mark.parametrize("d", [16, 48, 24])
def test_embedding(d: int, threads: int) -> None:
    ids = torch.randint(0, 20, (50, 60), generator=torch.Generator().manual_seed(3))
    agree(lambda x: (cpu_kernels.embedding(ids, x),), lambda x: (F.embedding(ids, x),), [random(21, d)])


HEADS = {
    "patch": {"t": 8, "h": 3, "c": 64},
    "odd": {"t": 5, "h": 2, "c": 48},
    "one position": {"t": 1, "h": 1, "c": 16},
    "long": {"t": 33, "h": 2, "c": 32},
    "wide": {"t": 3, "h": 1, "c": 128},
}


@needs_compiler
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("whole", [True, False], ids=["attention", "turned"])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("turns", [True, False])
def test_attention(name: str, whole: bool, qk_norm: bool, turns: bool, threads: int) -> None:
    t, h, c = HEADS[name].values()
    angles = kept_angles(2, t, c) if turns else None

    def exact(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.view(4, t, 3, h, c).permute(2, 0, 3, 1, 4)
        if qk_norm:
            q, k = F.layer_norm(q, (c,), eps=1e-5), F.layer_norm(k, (c,), eps=1e-5)
        q = q * 0.75
        if angles:
            q, k = rotate(q, *angles), rotate(k, *angles)
        return (attend(q, k, v, 0.0).transpose(1, 2).reshape(4, t, h * c),) if whole else (q, k, v)

    def own(qkv: Tensor) -> tuple[Tensor, ...]:
        how = (h, angles, qk_norm, 0.75)
        return (cpu_kernels.attention(qkv, *how),) if whole else cpu_kernels.turned(qkv, *how)

    agree(own, exact, [random(4, t, 3 * h * c)])


@needs_compiler
def test_what_is_not_a_number_stays_none() -> None:
    x = torch.randn(4, 16).bfloat16()
    x[1, 3] = torch.nan
    for out in (cpu_kernels.norm(x, None, None, False), cpu_kernels.relu2(x)):
        assert out.isnan().any(dim=1).tolist() == [False, True, False, False]
    assert cpu_kernels.nats(x, torch.zeros(4, dtype=torch.int64)).isnan().tolist() == [False, True, False, False]
    qkv = torch.randn(2, 4, 48).bfloat16()
    qkv[1, 2, 20] = torch.nan  # of a key
    out = cpu_kernels.attention(qkv, 1, None, True, 1.0)
    assert out.isnan().any(dim=-1).tolist() == [[False] * 4, [False, False, True, True]]
    top = torch.tensor([3.4e38, -3.4e38, torch.inf, 0.0] * 4).bfloat16()
    assert torch.equal(cpu_kernels.relu2(top), F.relu(top).square())


@needs_compiler
def test_an_id_that_is_no_class_has_no_nats_and_touches_nothing() -> None:
    logits = torch.zeros(3, 16).bfloat16().requires_grad_()
    out = cpu_kernels.nats(logits, torch.tensor([0, 16, -1]))
    assert out.isnan().tolist() == [False, True, True]
    out[0].backward()
    assert logits.grad is not None
    assert float(logits.grad[1:].abs().sum()) == 0


def gradients(table: Tensor, gain: Tensor, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of a table and of a norm's gain, by what a model calls."""
    model = randomised(tiny.make())
    norm = model.stages[1].transformer.blocks[0].attn_norm
    norm.gain.data = gain
    (norm(x) * x).sum().backward()
    table = table.requires_grad_()
    (look_up(ids, table) * x).sum().backward()
    return norm.gain.grad, table.grad


@pytest.mark.parametrize("library", [True, False])
def test_gradients_over_many_positions_are_added_up_in_fp32(library: bool, request: pytest.FixtureRequest) -> None:
    """In bf16 sums stand still where a summand is less than half a unit of theirs: after some 256 positions."""
    if not library:
        request.getfixturevalue("no_library")
    x = (torch.randn(16_384, 16, generator=torch.Generator().manual_seed(0)).abs() + 0.5).bfloat16()
    table, gain = torch.ones(4, 16), torch.ones(16)
    ids = torch.zeros(16_384, dtype=torch.int64)
    exact = gradients(table.double(), gain.double(), x.double(), ids)
    own = gradients(table.bfloat16(), gain.bfloat16(), x, ids)
    for got, wanted in zip(own, exact, strict=True):
        assert apart(got, wanted) < 0.01
    plain = torch.ones(16).bfloat16().requires_grad_()
    (F.layer_norm(x, (16,), plain) * x).sum().backward()
    assert apart(plain.grad, exact[0]) > 0.05, "torch has mended it: the kernels' reason is speed alone"


def stepped(settings: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Nats of a random model, its weights rounded to bf16, on random rows, and all gradients of their mean, flat."""
    model = randomised(settings).bfloat16().to(dtype)
    ids = torch.randint(0, model.vocab_size - 1, (3, 32), generator=torch.Generator().manual_seed(1))
    each = nats(model(ids), ids)
    each.mean().backward()
    return each.detach(), torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@needs_compiler
@pytest.mark.parametrize("name", VARIANTS)
def test_models_come_nearer_to_fp32_than_with_plain_torch(name: str, request: pytest.FixtureRequest) -> None:
    stages = [{**stage, "d_model": 64, "n_heads": 2} for stage in tiny.STAGES[2]]
    settings = tiny.make(model={**tiny.tree()["model"], "stages": stages, **VARIANTS[name]})
    exact, own = stepped(settings, torch.float64), stepped(settings, torch.bfloat16)
    request.getfixturevalue("no_library")
    plain = stepped(settings, torch.bfloat16)
    for got, torchs, wanted in zip(own, plain, exact, strict=True):
        assert apart(got, wanted) < 1.15 * apart(torchs, wanted) + 1e-4
        assert apart(got, wanted) < 0.3


@needs_compiler
def test_the_kernels_are_used() -> None:
    """Else all of the above compares torch with torch."""
    model = randomised(tiny.make(model={**tiny.tree()["model"], "stages": [
        {"patch_size": 4, "d_model": 32, "n_layers": 1, "n_heads": 2},
        {"patch_size": 1, "d_model": 16, "n_layers": 1, "n_heads": 1},
    ]})).bfloat16()  # fmt: skip
    loss = nats(model(torch.zeros(1, 32, dtype=torch.int64)), torch.zeros(1, 32, dtype=torch.int64)).mean()
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [parent for parent, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    assert {"_NormBackward", "_AttentionBackward", "_Relu2Backward", "_NatsBackward", "_EmbeddingBackward"} <= names
