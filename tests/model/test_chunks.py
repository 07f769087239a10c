"""A row in chunks has the nats and the gradients of the whole row, and never all of its logits.

pytest tests/model/test_chunks.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mbtrain import config
from mbtrain.config import CHUNK_BYTES, LONG_ROW_BYTES
from mbtrain.data.opening import open_sources
from mbtrain.errors import ConfigError
from mbtrain.evaluate import score
from mbtrain.model.chunks import Cut
from mbtrain.model.layers import Transformer
from mbtrain.model.loss import nats
from mbtrain.model.megabyte import Megabyte
from mbtrain.model.sparing import spare
from mbtrain.vocab import BOUNDARY
from tests import launch, tiny
from tests.model.test_megabyte import randomised

# stages, what differs in the model
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "two stages": (2, {}),
    "tied": (2, {"tied": True, "positions": "learned"}),
    "three stages": (3, {}),
    "cross-patch": (2, {"cross_patch": 2}),
    "cross-patch of three stages": (3, {"cross_patch": 2}),
    "isolated documents": (3, {"isolate_documents": True}),
    "token shift": (2, {"block": {"token_shift": True}, "cross_patch": 3}),
    "convolutions": (2, {"conv_encoder": [3, 5]}),
    "no local model": (2, {"without": "local"}),
    "no global model": (2, {"without": "global", "cross_patch": 3}),
    "transformer": (1, {"kind": "transformer"}),
    "tied transformer": (1, {"kind": "transformer", "tied": True}),
}


def made(case: str, dtype: torch.dtype = torch.float64, **model: Any) -> Megabyte:
    stages, changes = CASES[case]
    base = tiny.tree(stages)["model"]
    return randomised(tiny.make(stages, seq_len=64, model={**base, **changes, **model})).to(dtype).train()


def rows(b: int = 3, t: int = 64) -> Tensor:
    ids = torch.randint(0, 256, (b, t), generator=torch.Generator().manual_seed(1))
    ids[:, 9::23] = BOUNDARY
    return ids


def gradients(model: Megabyte, ids: Tensor, chunk_bytes: int | None) -> tuple[Tensor, list[Tensor]]:
    """Nats, and every gradient of a sum of them in which each byte counts differently."""
    model.chunk_bytes = chunk_bytes
    model.zero_grad()
    each = nats(model(ids), ids)
    weights = torch.linspace(0, 1, ids.numel(), dtype=each.dtype).view(ids.shape)
    (each * weights).sum().backward()
    return each.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("t", [64, 45])
def test_nats_and_gradients_are_those_of_the_whole_row(case: str, t: int) -> None:
    """Also of a row that ends inside a patch, and in chunks that do not divide it; in float64 to its precision."""
    model, ids = made(case), rows(t=t)
    whole, wanted = gradients(model, ids, None)
    assert whole.shape == ids.shape
    for chunk_bytes in (1, 3 * 24, 3 * 40):
        each, found = gradients(model, ids, chunk_bytes)
        torch.testing.assert_close(each, whole, rtol=1e-12, atol=1e-12)
        for got, grad in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-11, atol=1e-11 * float(grad.abs().max()))


@pytest.mark.parametrize("case", ["three stages", "cross-patch"])
def test_in_float32_the_difference_is_rounding(case: str) -> None:
    model, ids = made(case, torch.float32), rows()
    whole, wanted = gradients(model, ids, None)
    each, found = gradients(model, ids, 3 * 16)
    torch.testing.assert_close(each, whole, rtol=1e-6, atol=0)
    for got, grad in zip(found, wanted, strict=True):
        assert float((got - grad).abs().max()) <= 2e-6 * float(grad.abs().max())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gave, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            numbers = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.elements = max([self.elements, *numbers])
        return out


@pytest.mark.parametrize("case", ["two stages", "three stages", "cross-patch"])
def test_no_tensor_grows_with_the_row_as_its_logits_do(case: str) -> None:
    """Forward, backward and evaluation; the largest ones are logits, of the chunk or of the row."""
    model, chunk = made(case, torch.float32), 16
    for t in (128, 192):
        ids, largest = rows(1, t), {}
        for chunk_bytes in (chunk, None):
            with Largest() as seen:
                gradients(model, ids, chunk_bytes)
                with torch.no_grad():
                    model(ids)
            largest[chunk_bytes] = seen.elements
        assert largest[None] == t * model.vocab_size
        # Those of a chunk and of the two patches before it that cross-patch needs.
        assert largest[chunk] <= (chunk + 8) * model.vocab_size


def test_dropout_is_drawn_again_as_it_was_and_leaves_no_trace() -> None:
    model, ids = made("two stages", block={"dropout": 0.2}), rows()
    torch.manual_seed(5)
    each, found = gradients(model, ids, 3 * 16)
    after = torch.rand(3)
    torch.manual_seed(5)
    model.zero_grad()
    coarse = model.over_patches(ids)
    assert coarse is not None
    parts = [
        model.nats_of(ids[:, seen], coarse[:, patches], before) for _, seen, patches, before in Cut(4, 4, 0).pieces(64)
    ]
    kept = torch.cat(parts, dim=1)
    (kept * torch.linspace(0, 1, ids.numel(), dtype=kept.dtype).view(ids.shape)).sum().backward()
    torch.testing.assert_close(each, kept.detach())
    assert torch.equal(after, torch.rand(3)), "the random numbers after the backward pass"
    for got, param in zip(found, model.parameters(), strict=True):
        if param.grad is not None:
            torch.testing.assert_close(got, param.grad)


def test_the_second_computation_has_the_autocast_of_the_first() -> None:
    model, ids = made("two stages", torch.float32), rows()
    with torch.autocast("cpu", torch.bfloat16):
        whole = nats(model(ids), ids)
        model.chunk_bytes = 3 * 16
        each = nats(model(ids), ids)
    assert torch.equal(each, whole)
    coarse = model.over_patches(ids)
    model.zero_grad()
    each.sum().backward()  # outside of autocast, as backward passes are
    found = [param.grad.clone() for param in model.parameters() if param.grad is not None]
    model.zero_grad()
    whole.sum().backward()
    assert coarse is not None
    for got, param in zip(found, (p for p in model.parameters() if p.grad is not None), strict=True):
        assert float((got - param.grad).norm()) <= 0.02 * float(param.grad.norm())


def test_hooks_can_tell_a_part_of_a_gradient_from_the_whole() -> None:
    model, ids = made("two stages"), rows()
    seen: list[tuple[bool, Tensor]] = []
    weight = model.unembedding
    weight.register_hook(lambda grad: seen.append((model.in_chunks.in_part, grad.clone())))
    gradients(model, ids, 3 * 16)
    *parts, (last, whole) = seen
    assert [part for part, _ in parts] == [True] * 4
    assert not last
    torch.testing.assert_close(whole, torch.stack([grad for _, grad in parts]).sum(dim=0))


def test_two_ranks_train_in_chunks_as_they_train_whole(tmp_path: Path) -> None:
    """Under every ZeRO stage; steps, gradient norms, the engine's marks, and in fp32 the weights."""
    out = tmp_path / "found.json"
    ended = launch.end(launch.begin([str(out)], ranks=2, module="tests.model.chunk_ranks"))
    assert ended.codes == [0] * 2, ended.stderr
    for name, apart in json.loads(out.read_text()).items():
        low = name in ("autocast", "bf16")
        assert apart["loss"] <= (2e-3 if low else 1e-6), name
        assert apart["norm"] <= (2e-2 if low else 1e-5), name
        assert apart["marks"] <= (2e-2 if low else 1e-5), name
        assert low or apart["weights"] <= 1e-3, f"{name}: Adam makes much of gradients that are nearly 0"


def test_which_rows_are_computed_in_chunks() -> None:
    def of(seq_len: int, **train: Any) -> int | None:
        return config.chunk_bytes(tiny.make(seq_len=seq_len, train=train))

    assert of(LONG_ROW_BYTES - 4) is None
    assert of(LONG_ROW_BYTES) == CHUNK_BYTES
    assert of(LONG_ROW_BYTES, sequence_parallel=2) is None, "a rank has half a row"
    assert of(2 * LONG_ROW_BYTES, sequence_parallel=2) == CHUNK_BYTES
    assert of(LONG_ROW_BYTES, chunk_bytes=LONG_ROW_BYTES) is None
    assert of(64, chunk_bytes=16) == 16
    space = {**tiny.tree()["model"], "patching": "space"}
    assert config.chunk_bytes(tiny.make(seq_len=LONG_ROW_BYTES, model=space)) is None
    with pytest.raises(ConfigError, match=r"train\.chunk_bytes: got 16, expected None"):
        tiny.make(model=space, train={"chunk_bytes": 16})


def test_blocks_of_chunks_are_not_recomputed_twice() -> None:
    def recomputed(chunk_bytes: int | None) -> list[bool]:
        train = {"activation_checkpointing": True, "chunk_bytes": chunk_bytes}
        model = randomised(settings := tiny.make(3, train=train))
        spare(model, settings)
        return [module.checkpointing for module in model.modules() if isinstance(module, Transformer)]

    assert recomputed(None) == [True, True, True]
    assert recomputed(16) == [True, False, False]


def test_a_score_in_chunks_is_the_score(shards: Path) -> None:
    settings = tiny.make(data={"path": str(shards)}, train={"chunk_bytes": 8})
    sources = open_sources(settings, "val", seed=None)
    model = randomised(settings)
    found = []
    for chunked in (False, True):
        if chunked:
            spare(model, settings)
            assert model(rows(2, 32)).shape == (2, 32), "nats"
        of = score(model, sources, seq_len=32, batch=4, device=torch.device("cpu"))
        found.append((of.nats, of.bytes))
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
