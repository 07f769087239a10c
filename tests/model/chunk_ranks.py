"""Training in chunks against training whole, under DeepSpeed: `python -m tests.model.chunk_ranks OUT` on 2 ranks.

Rank 0 writes OUT, JSON: by case the greatest relative differences of losses, gradient norms, marks and weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbtrain import engine
from mbtrain.engine import Ranks
from mbtrain.model import build
from mbtrain.model.loss import nats
from tests import tiny
from tests.model.sequence_ranks import HEADS, SEQ_LEN, rows

# So wide that ZeRO-3 really takes the local stage's matrices away: those of up to 100,000 weights stay everywhere.
WIDE = [
    {"patch_size": 4, "d_model": 32, "n_layers": 1, "n_heads": 2},
    {"patch_size": 1, "d_model": 192, "n_layers": 2, "n_heads": 2},
]

# name -> what differs in the model; what differs in train
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero 0": ({}, {"zero_stage": 0}),
    "zero 1": ({}, {"zero_stage": 1}),
    "zero 2": ({"stages": HEADS, "isolate_documents": True}, {"zero_stage": 2, "sequence_parallel": 2}),
    "zero 3": ({"stages": WIDE, "cross_patch": 2}, {"zero_stage": 3}),
    "zero 3, tied": ({"stages": WIDE, "tied": True}, {"zero_stage": 3, "activation_checkpointing": True}),
    "autocast": ({}, {"zero_stage": 0, "precision": "autocast"}),
    "bf16": ({}, {"zero_stage": 1, "precision": "bf16"}),
}


def trained(ranks: Ranks, model: dict[str, Any], train: dict[str, Any], chunk_bytes: int) -> dict[str, list[float]]:
    """Two steps of two micro-steps each; every figure of them, and the weights afterwards."""
    shared = train.get("sequence_parallel", 1)
    batch = {"global_batch_size": 4 // shared, "micro_batch_size": 1, "precision": "fp32", "chunk_bytes": chunk_bytes}
    log = {"noise_scale": shared == 1}  # marks are then squared norms
    settings = tiny.make(
        2, "modern", SEQ_LEN, model=model, train={**batch, **train}, log=log, optim={"warmup_steps": 0}
    )
    torch.manual_seed(0)
    under = engine.Engine(settings, build(settings), ranks)
    under.module.train()
    mine = rows(4 // shared).tensor_split(under.readers)[under.reader].split(under.micro)
    found: dict[str, list[float]] = {"loss": [], "norm": [], "marks": []}
    for _ in range(2):
        for micro in mine:
            logits = under(micro)
            each = nats(logits, micro[:, under.columns])
            found["loss"].append(float(each.detach().double().sum()))
            under.backward(each.mean())
            if micro is not mine[-1]:
                under.step(0.0)
        found["marks"] += under.gradient_marks()
        found["norm"].append(under.step(1.0))
    found["in_chunks"] = [float(logits.ndim == 2)]
    found["weights"] = torch.cat([weight.flatten() for _, weight in under.weights()]).tolist()
    return found


def apart(a: list[float], b: list[float]) -> float:
    """The greatest difference, relative to the largest value."""
    x, y = Tensor(a), Tensor(b)
    return float((x - y).abs().max() / y.abs().max().clamp_min(1e-30))


def main(argv: list[str]) -> None:
    """argv: the file to write."""
    ranks = engine.start()
    found: dict[str, Any] = {}
    for name, (model, train) in CASES.items():
        chunked, whole = trained(ranks, model, train, 16), trained(ranks, model, train, SEQ_LEN)
        assert (chunked.pop("in_chunks"), whole.pop("in_chunks")) == ([1.0], [0.0])
        found[name] = {key: max(engine.gathered(apart(chunked[key], whole[key]))) for key in whole}
    if ranks.rank == 0:
        Path(argv[0]).write_text(json.dumps(found))
    engine.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
