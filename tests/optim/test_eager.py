"""Optimizers without torch's guards against its compiler: the same updates, and a start that imports no compiler.

pytest tests/optim/test_eager.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mbtrain import config
from mbtrain.optim import AdamW
from tests import launch, tiny

TWO_STEPS = """
import sys
import torch
from mbtrain import config
from mbtrain.engine import Engine, start
from mbtrain.model import build
from mbtrain.model.loss import nats

settings = config.load(sys.argv[1])
engine = Engine(settings, build(settings), start())
ids = torch.arange(4 * 32).view(4, 32)
for _ in range(2):
    engine.backward(nats(engine(ids), ids).mean())
    engine.step(1.0)
print(engine.optimizer_steps(), sorted({"torch._dynamo", "torch._inductor", "sympy", "mlflow"} & set(sys.modules)))
"""


def weights_after(kind: Any, steps: int) -> torch.Tensor:
    """A parameter after so many steps on gradients that are the same each time this is called."""
    generator = torch.Generator().manual_seed(1)
    param = torch.nn.Parameter(torch.randn(7, 5, generator=generator))
    optimizer = kind([{"params": [param], "lr": 0.1, "weight_decay": 0.1}], betas=(0.8, 0.9), eps=1e-6, fused=True)
    if isinstance(optimizer, AdamW):
        optimizer.ready(optimizer.param_groups[0], param)
    for _ in range(steps):
        param.grad = torch.randn(7, 5, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
        assert param.grad is None
    assert param.is_leaf
    assert param.requires_grad
    return param.detach()


def test_its_steps_are_those_of_torchs_optimizer_bit_for_bit() -> None:
    ours, torchs = weights_after(AdamW, 5), weights_after(torch.optim.AdamW, 5)
    assert torch.equal(ours, torchs)
    assert not torch.equal(ours, weights_after(torch.optim.AdamW, 4))


@pytest.mark.parametrize(("name", "stage"), [("adamw", 1), ("muon", 2)])
def test_steps_under_deepspeed_import_no_compiler_and_no_mlflow(tmp_path: Path, name: str, stage: int) -> None:
    """Each took a second or two of every rank's start."""
    settings = tiny.make(optim={"name": name}, train={"zero_stage": stage, "precision": "bf16"})
    path = tmp_path / "tiny.yaml"
    path.write_text(config.to_yaml(settings))
    command = [sys.executable, "-c", TWO_STEPS, str(path)]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["2 []"], done.stdout + done.stderr
