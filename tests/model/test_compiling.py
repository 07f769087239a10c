"""Compiled blocks compute what blocks compute, and few graphs do it; the backend is one that generates no code.

pytest tests/model/test_compiling.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from mbtrain.config import ConfigError
from mbtrain.model import build
from mbtrain.model.compiling import GRAPHS, compile_blocks, is_compiled
from mbtrain.model.loss import nats
from mbtrain.model.sparing import spare
from tests import tiny

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("sections", "on_cuda"),
    [
        ({}, True),
        ({"train": {"zero_stage": 1}}, True),
        ({"train": {"zero_stage": 3}}, False),
        ({"train": {"compile": False}}, False),
        ({"model": {"patching": "space"}}, False),
    ],
    ids=str,
)
def test_where_it_is_on_by_itself(sections: dict[str, Any], on_cuda: bool) -> None:
    settings = tiny.make(**sections)
    assert is_compiled(settings, CUDA) is on_cuda
    assert is_compiled(settings, CPU) is False
    assert is_compiled(tiny.make(train={"compile": True}), CPU) is True


def test_it_is_a_boolean_or_nothing() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile"):
        tiny.make(train={"compile": "perhaps"})


@pytest.mark.parametrize(
    ("train", "graphs"),
    # Three stages; in chunks the two finer ones with and without gradients, in whole chunks and in the last one.
    [({}, 3), ({"activation_checkpointing": True}, 3), ({"chunk_bytes": 32}, 1 + 2 * 2 * 2)],
    ids=["whole", "checkpointed", "in chunks"],
)
def test_loss_and_gradients_are_those_of_eager(train: dict[str, Any], graphs: int) -> None:
    settings = tiny.make(3, seq_len=40, train=train)
    ids = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build(settings).train()
        spare(model, settings)
        torch.compiler.reset()
        counters.clear()
        if compiled:
            compile_blocks(model, "aot_eager")
        for _ in range(2):  # nothing is compiled in the second step
            model.zero_grad()
            each = model(ids)
            nats(each, ids).mean().backward()
        found.append([param.grad for param in model.parameters()])
        if compiled:
            assert counters["stats"]["unique_graphs"] == graphs <= GRAPHS
            with torch.compiler.set_stance("force_eager"), torch.no_grad():  # as Engine.evaluating does
                model.eval()(ids[:1, :9])
            assert counters["stats"]["unique_graphs"] == graphs
    for one, other in zip(*found, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)
