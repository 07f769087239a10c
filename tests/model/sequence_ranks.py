"""Ranks that share rows, against one rank alone: run as `python -m tests.model.sequence_ranks OUT` on each of 4 ranks.

Every rank has both in its hands: the model whole, over all rows, and its part of it, where 2 or 4 ranks share a row.
Rank 0 writes OUT, JSON: by case the greatest differences, and what was exchanged.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mbtrain import config, engine
from mbtrain.config import Config
from mbtrain.engine import Ranks
from mbtrain.model import build
from mbtrain.model.layers import Transformer
from mbtrain.model.loss import nats
from mbtrain.model.megabyte import Megabyte
from mbtrain.vocab import BOUNDARY
from tests import tiny

SEQ_LEN = 64
HEADS = [
    {"patch_size": 4, "d_model": 32, "n_layers": 2, "n_heads": 4},
    {"patch_size": 1, "d_model": 16, "n_layers": 2, "n_heads": 2},
]
ONE = [{"patch_size": 1, "d_model": 32, "n_layers": 2, "n_heads": 4}]
LAYERS = 2  # of every coarsest stage here

# name -> (stages, preset, what differs in the model)
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "paper": (2, "paper", {"stages": HEADS}),
    "modern": (2, "modern", {"stages": HEADS}),
    "three stages": (3, "modern", {}),
    "three stages, paper": (3, "paper", {}),
    "one stage": (1, "modern", {"stages": ONE}),
    "isolated, learned": (2, "paper", {"stages": HEADS, "isolate_documents": True}),
    "isolated, rotary": (3, "modern", {"isolate_documents": True}),
}


def rows(count: int, seq_len: int = SEQ_LEN) -> Tensor:
    """Random rows (count, seq_len) with document boundaries in them, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (count, seq_len), generator=generator)
    ids[:, 9::23] = BOUNDARY  # documents lie across the borders of parts
    return ids


def model_of(settings: Config, dtype: torch.dtype) -> Megabyte:
    """A model whose every parameter is away from its initial value."""
    torch.manual_seed(0)
    model = build(settings).double()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model.to(dtype)


def checkpointed(model: Megabyte, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, Transformer):
            module.checkpointing = on


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def compare(whole: Megabyte, parted: Megabyte, ids: Tensor, ranks: Ranks, parts: int) -> dict[str, Any]:
    """Loss and gradients of all rows: of one model, and summed over ranks, each with its columns of its group's rows.

    Returns the greatest relative differences of loss, logits and any parameter's gradient; in how many (rank,
    parameter) pairs there is no gradient; and of every rank's exchanges the sizes in order.
    """
    groups = ranks.ranks // parts
    mine = ids.tensor_split(groups)[ranks.rank // parts]
    own = parted.part.columns(ids.shape[1])
    for model in (whole, parted):
        model.train()
        model.zero_grad(set_to_none=True)
    exchanged: list[list[int]] = []
    exchange = dist.all_to_all_single

    def counting(output: Tensor, input: Tensor, **kwargs: Any) -> Any:
        exchanged.append(list(input.shape))
        return exchange(output, input, **kwargs)

    alone = whole(ids)
    (nats(alone, ids).sum() / ids.numel()).backward()
    dist.all_to_all_single = counting
    try:
        logits = parted(mine)
        lost = nats(logits, mine[:, own]).sum() / ids.numel()
        lost.backward()
    finally:
        dist.all_to_all_single = exchange
    reference = alone.tensor_split(groups)[ranks.rank // parts][:, own]
    loss = lost.detach().double().clone()
    dist.all_reduce(loss)
    none = sum(param.grad is None for param in parted.parameters())
    worst = 0.0
    for a, b in zip(parted.parameters(), whole.parameters(), strict=True):
        grad = torch.zeros_like(a) if a.grad is None else a.grad.clone()
        dist.all_reduce(grad)
        assert b.grad is not None
        worst = max(worst, relative(grad, b.grad))
    gathered = engine.gathered((relative(logits.detach(), reference.detach()), none, exchanged))
    expected = float(nats(alone.detach(), ids).double().sum() / ids.numel())
    return {
        "loss": abs(float(loss) - expected) / expected,
        "logits": max(one[0] for one in gathered),
        "gradient": worst,
        "without_gradient": sum(one[1] for one in gathered),
        "exchanged": [one[2] for one in gathered],
    }


def case(name: str, dtype: torch.dtype, ranks: Ranks, parts: int, *, checkpointing: bool = False) -> dict[str, Any]:
    """One of CASES, whole and shared."""
    stages, preset, changes = CASES[name]
    base = tiny.tree(stages, preset, SEQ_LEN)
    block = {**changes.get("block", {}), "dropout": 0.0}
    tree = {**base, "model": {**base["model"], **changes, "block": block}}
    whole = model_of(config.validate(tree), dtype)
    parted = copy.deepcopy(whole)  # roles are lost, and not needed
    engine.share_rows(parted, ranks, parts)
    checkpointed(parted, checkpointing)
    found = compare(whole, parted, rows(2 * (ranks.ranks // parts)), ranks, parts)
    parted.eval()
    with torch.inference_mode():
        ids = rows(1)
        difference = relative(parted(ids), whole.eval()(ids)[:, parted.part.columns(SEQ_LEN)])
    found["evaluation"] = max(engine.gathered(difference))
    return found


def trained(ranks: Ranks, zero_stage: int, *, checkpointing: bool = False) -> dict[str, Any]:
    """Steps under DeepSpeed, rows shared by two ranks, against a bare torch loop over all rows on one.

    Returns the greatest relative differences of losses and gradient norms over the steps.
    """
    train = {
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "sequence_parallel": 2,
        "zero_stage": zero_stage,
        "precision": "fp32",
        "activation_checkpointing": checkpointing,
    }
    model = {"preset": "paper", "stages": HEADS, "isolate_documents": True, "block": {"dropout": 0.0}}
    settings = tiny.make(2, "paper", SEQ_LEN, model=model, train=train)
    whole = model_of(settings, torch.float32)
    under = engine.Engine(settings, model_of(settings, torch.float32), ranks)
    under.module.train()
    optimizer = torch.optim.AdamW(engine.parameter_groups(whole, settings), betas=settings.optim.betas)
    ids = rows(4)
    mine = ids.tensor_split(under.readers)[under.reader].split(under.micro)
    worst = {"loss": 0.0, "norm": 0.0}
    for _ in range(3):
        lost = torch.zeros((), dtype=torch.float64)
        for micro in mine:
            each = nats(under(micro), micro[:, under.columns])
            under.backward(each.mean())
            lost += each.detach().double().sum()
            if micro is not mine[-1]:
                under.step(0.0)
        loss = engine.total([float(lost)], ranks)[0] / ids.numel()
        norm = under.step(1.0)
        optimizer.zero_grad()
        expected = nats(whole(ids), ids).mean()
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), settings.train.gradient_clipping)
        optimizer.step()
        worst["loss"] = max(worst["loss"], abs(loss / float(expected.detach()) - 1))
        worst["norm"] = max(worst["norm"], abs(norm / float(expected_norm) - 1))
    return {key: max(engine.gathered(value)) for key, value in worst.items()}


def main(argv: list[str]) -> None:
    """argv: the file to write."""
    ranks = engine.start()
    found: dict[str, Any] = {}
    for parts in (2, 4):
        for name in CASES:
            found[f"{parts} {name} float32"] = case(name, torch.float32, ranks, parts)
    for name in CASES:
        found[f"4 {name} float64"] = case(name, torch.float64, ranks, 4)
    for name in ("paper", "isolated, rotary"):
        found[f"2 {name} checkpointing"] = case(name, torch.float32, ranks, 2, checkpointing=True)
    for stage in (1, 2, 3):
        found[f"zero {stage}"] = trained(ranks, stage, checkpointing=stage == 3)
    if ranks.rank == 0:
        Path(argv[0]).write_text(json.dumps(found))
    engine.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
