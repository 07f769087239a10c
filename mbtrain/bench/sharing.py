"""One rank of `mbtrain bench sequence`, in a process of its own; answers by the protocol that peer.py describes.

    python -m mbtrain.bench.sharing CONFIG

It is ready before it joins the other ranks, for it is asked only when all are there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mbtrain import config, engine
from mbtrain.bench.peer import Handlers, serve
from mbtrain.bench.reading import memory
from mbtrain.config import Config
from mbtrain.model import Model, build
from mbtrain.model.loss import nats
from mbtrain.model.megabyte import Megabyte
from mbtrain.model.sparing import spare


def handlers(settings: Config) -> Handlers:
    """What a rank answers: first join, then step and kept."""
    made: list[Model] = []
    seq_len, parts = settings.data.seq_len, settings.train.sequence_parallel

    def forward(t: int) -> Tensor:
        """This rank's share of the nats per byte of a row of t bytes, each of its columns."""
        [model] = made
        torch.manual_seed(0)
        ids = torch.randint(0, 256, (1, t))
        return nats(model(ids), ids[:, cast(Megabyte, model).part.columns(t)]) / t

    def join() -> dict[str, Any]:
        """Meet the other ranks; make the model and, by a short row, its gradients and what else is made once."""
        ranks = engine.start()
        torch.manual_seed(settings.train.seed)
        model = build(settings)
        engine.share_rows(model, ranks, parts)
        spare(model, settings)
        made.append(model.train())
        forward(model.patch_size * parts).sum().backward()
        return {"most_bytes": memory("VmHWM")}

    def step() -> dict[str, Any]:
        """Forward and backward of a row: memory before, the most so far, seconds, and sums over ranks."""
        [model] = made
        model.zero_grad(set_to_none=False)
        base = memory("VmRSS")
        dist.barrier()
        began = time.perf_counter()
        each = forward(seq_len)
        each.sum().backward()
        took, most = time.perf_counter() - began, memory("VmHWM")
        lost = float(each.detach().double().sum())
        summed = torch.cat([torch.tensor([lost], dtype=torch.float64), *_gradients(model)])
        dist.all_reduce(summed)
        return {
            "base_bytes": base,
            "most_bytes": most,
            "step_s": took,
            "loss_nats": float(summed[0]),
            "grad_norm": float(summed[1:].norm()),
        }

    def kept() -> dict[str, Any]:
        """The bytes of tensors, other than weights, that forward keeps for backward."""
        weights = {param.untyped_storage().data_ptr() for param in made[0].parameters()}
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            each = forward(seq_len)
        del each  # until here the graph kept its tensors, and their places, apart
        return {"kept_bytes": sum(found.values())}

    return {"join": join, "step": step, "kept": kept}


def _gradients(model: Model) -> list[Tensor]:
    return [param.grad.double().flatten() for param in model.parameters() if param.grad is not None]


def main(argv: list[str]) -> None:
    """argv: the configuration file."""
    settings = config.load(Path(argv[0]))
    serve(lambda: handlers(settings))


if __name__ == "__main__":
    main(sys.argv[1:])
