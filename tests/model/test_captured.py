"""The step that a GPU captures gives the full forward pass's logits, run as it is on a CPU, and never asks the host.

pytest tests/model/test_captured.py
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mbtrain.model import captured
from mbtrain.model.decode import Decoder
from mbtrain.sample import Sampling, generate
from tests import tiny
from tests.model.test_megabyte import randomised
from tests.model.test_native import VARIANTS, fed

# What makes the host wait for the device, or the shape of a tensor depend on its content.
ASKING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "_to_copy")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU stands in for the GPU."""
    monkeypatch.setattr(captured, "covers", lambda model: True)


def model_of(seq_len: int = 32, **model: Any) -> Any:
    return randomised(tiny.make(seq_len=seq_len, model={**tiny.tree()["model"], **model}))  # float64


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("pieces", [[0] + [1] * 31, [7, 1, 1, 1, 4, 1, 1, 1, 0, 1, 8, 1, 1, 1, 1, 1]])
def test_logits_equal_the_full_forward(name: str, pieces: list[int]) -> None:
    """In bytes and in pieces among them."""
    model = model_of(**VARIANTS[name])
    ids = torch.randint(0, 257, (3, 32))
    with torch.no_grad():
        full = model(ids)
    decoder = Decoder(model, 3)
    assert isinstance(decoder.native, captured.Captured)
    got, expected = fed(decoder, ids, pieces), full[:, torch.tensor(pieces).cumsum(0)]
    torch.testing.assert_close(got, expected, atol=1e-10 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("how", [Sampling(0.0), Sampling(seed=4), Sampling(0.3), Sampling(top_k=5, seed=1)], ids=str)
@pytest.mark.parametrize("ends", [True, False])
def test_generation_makes_the_bytes_that_torch_makes(
    how: Sampling, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen on the device, too; prompts of unequal length, past the end of the row."""
    model = model_of(stages=tiny.STAGES[3], block={"token_shift": True}).float()
    prompts = [b"abc", b"", b"a longer one"]
    got = generate(model, prompts, 70, how, ends=ends)
    monkeypatch.setattr(model, "decoder", lambda batch: Decoder(model, batch, compiled=False))
    assert got == generate(model, prompts, 70, how, ends=ends)
    assert ends or [len(row) for row in got] == [70, 70, 70]


class Watching(TorchDispatchMode):
    """Counts operations, and refuses those that ask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        out = func(*args, **(kwargs or {}))
        if name == "_to_copy":
            assert out.device == args[0].device
        else:
            assert name not in ASKING, name
        return out


@torch.inference_mode()
def test_a_step_asks_nothing_and_is_one_of_few() -> None:
    """As many operations whatever the byte's number, but for which stages move: what a captured graph needs."""
    decoder = Decoder(model_of(stages=tiny.STAGES[3]), 1)
    step = decoder.native
    assert isinstance(step, captured.Captured)
    decoder.feed(torch.zeros((1, 3), dtype=torch.int64))
    counts: dict[int, set[tuple[tuple[str, int], ...]]] = {}
    for n in range(4, 28):
        step.n.fill_(n - 1)
        with Watching() as watching:
            step._play(n, (256, 1.0))
        moved = next(s for s, size in enumerate((8, 2, 1)) if n % size == 0)
        counts.setdefault(moved, set()).add(tuple(sorted(watching.seen.items())))
    assert sorted(counts) == [0, 1, 2]
    assert all(len(kinds) == 1 for kinds in counts.values())
    assert len(step.warm) == 3
