"""An evaluation never keeps more than one batch of logits, and of long batches only a chunk's.

pytest tests/test_evaluate_memory.py
"""

from __future__ import annotations

import random
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mbtrain import config
from mbtrain.data.windows import MODES
from mbtrain.model import build, sparing
from tests import launch, tiny
from tests.data.test_rows import split_of
from tests.test_evaluate import scored

VOCAB = 257
ROW = 32


class LiveLogits(TorchDispatchMode):
    """The most bytes of tensors (..., VOCAB) that ever were alive together, weights and their views left out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
        self.alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.now = self.most = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.ndim > 1 and tensor.shape[-1] == VOCAB:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.made += 1
                    self.alive[id(tensor)] = (weakref.ref(tensor), storage.data_ptr())
        held = {}
        for ref, place in self.alive.values():
            if (tensor := ref()) is not None:
                held[place] = tensor.untyped_storage().nbytes()
        self.alive = {key: value for key, value in self.alive.items() if value[0]() is not None}
        self.now = sum(held.values())
        self.most = max(self.most, self.now)
        return out


def documents(count: int = 12) -> list[bytes]:
    rng = random.Random(0)
    return [rng.randbytes(100) for _ in range(count)]


def at_most(rows: int) -> int:
    """Bytes of float32 logits of so many rows, and of their log-softmax."""
    return 2 * rows * ROW * VOCAB * 4


@pytest.mark.parametrize("mode", MODES)
def test_one_batch_of_logits_is_alive_at_a_time(mode: str) -> None:
    model = build(tiny.make(2)).eval()
    live = LiveLogits(model)
    before: list[int] = []

    def logits_of(ids: Tensor) -> Tensor:
        torch.zeros(1)  # an operation, at which it is seen what is alive
        before.append(live.now)
        out: Tensor = model(ids)
        return out

    with live:
        scored(logits_of, split_of(documents()), batch=3, mode=mode, patch_size=4)
    assert len(before) > 10
    assert live.made > len(before)
    assert set(before) == {0}
    assert live.most == at_most(3)


def test_what_is_kept_would_be_seen() -> None:
    """The measure can fail: of an evaluation that keeps the last batch's logits while it makes the next."""
    model = build(tiny.make(2)).eval()
    kept: list[Tensor] = []

    def logits_of(ids: Tensor) -> Tensor:
        kept[:] = [*kept[-1:], model(ids)]
        return kept[-1]

    with LiveLogits(model) as live:
        scored(logits_of, split_of(documents()), batch=3)
    assert live.most > at_most(3)


@pytest.mark.parametrize(("stages", "rows"), [(1, 2), (2, 2), (3, 4)])
def test_of_a_large_batch_only_a_chunk(stages: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While scoring, whatever the batch; the score is the same, and afterwards there are logits again."""
    monkeypatch.setattr(sparing, "CHUNK_BYTES", rows * ROW)
    settings = tiny.make(stages)
    model = build(settings).eval()
    found: list[float] = []
    most: list[int] = []
    for chunks in (False, True):
        inside: Callable[[], Any] = (lambda: sparing.scoring(model, settings)) if chunks else nullcontext
        with inside(), LiveLogits(model) as live:
            found.append(scored(model, split_of(documents()), batch=16).nats)
        most.append(live.most)
    assert found[1] == pytest.approx(found[0], rel=1e-7)
    assert most == [at_most(16), at_most(rows)]
    assert model(torch.zeros(1, ROW, dtype=torch.int64)).shape == (1, ROW, VOCAB)


IN_TRAINING = """
import sys
import torch
from mbtrain import config
from mbtrain.engine import Engine, start
from mbtrain.model import build, sparing
from mbtrain.model.loss import nats
from tests.data.test_rows import split_of
from tests.test_evaluate import scored
from tests.test_evaluate_memory import LiveLogits, documents

sparing.CHUNK_BYTES = 64
settings = config.load(sys.argv[1])
engine = Engine(settings, build(settings), start())
ids = torch.arange(4 * 32).view(4, 32)
for _ in range(2):
    engine.backward(nats(engine(ids), ids).mean())
    engine.step(1.0)
    with LiveLogits(engine.module) as live, engine.evaluating():
        scored(engine, split_of(documents()), batch=16)
        torch.zeros(1)  # an operation, at which it is seen what is alive
    print(live.made, live.most, live.now)
"""


def test_while_training_too_under_deepspeed(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(config.to_yaml(tiny.make(train={"zero_stage": 1, "precision": "fp32"})))
    command = [sys.executable, "-c", IN_TRAINING, str(path)]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True, check=False)
    lines = [[int(word) for word in line.split()] for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(lines) == 2, done.stderr
    for made, most, now in lines:
        assert made > 10
        assert most == at_most(2)
        assert now == 0
