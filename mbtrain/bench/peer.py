"""The peer's side of `mbtrain bench`: MEGABYTE-pytorch 0.3.6 as shipped, in a process of its own environment.

Run by `PYTHON -I mbtrain/bench/peer.py SHAPE` where PYTHON is the interpreter that launch/peer.sh made. There is no
mbtrain there, so this file imports nothing of it, and the line protocol that both sides speak stands here.

Protocol: a request is one JSON line on stdin, {"do": NAME, ...}; the answer is one JSON line on stdout and holds wall_s
and cpu_s, the seconds (of the clock, and of all the process's threads) that the request took, beside what was asked
for. Before the first request the worker sends one line {"ready": true}. The end of stdin ends the worker.

The recipe is lucidrains' train.py: fp32, flash_attn=True, Adam with a constant LR of 2e-4, batch 4, losses of 4 batches
summed (not averaged) before a step, gradients clipped at 0.5.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Handlers = dict[str, Callable[..., dict[str, Any]]]

LEARNING_RATE = 2e-4
ACCUMULATE = 4
CLIP = 0.5


def serve(make: Callable[[], Handlers]) -> None:
    """Build the handlers, say ready, and answer requests until stdin ends. Whatever else prints goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as answers:
        os.dup2(2, 1)
        handlers = make()
        answers.write(json.dumps({"ready": True}) + "\n")
        for line in sys.stdin:
            request = json.loads(line)
            handler = handlers[request.pop("do")]
            wall, cpu = time.perf_counter(), time.process_time()
            answer = handler(**request)
            took = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            answers.write(json.dumps({**took, **answer}) + "\n")


def clock(name: str) -> float:
    """Seconds of one of the two clocks that work is limited by: wall, or cpu of this process."""
    return time.process_time() if name == "cpu" else time.perf_counter()


def rows_at(path: str, number: int, rows: int, seq_len: int) -> Any:
    """The `number`-th batch of a file of raw bytes as int64 (rows, seq_len); the file is read round and round."""
    import numpy as np

    content = np.memmap(path, dtype=np.uint8, mode="r")
    batches = len(content) // (rows * seq_len)
    first = number % batches * rows * seq_len
    return content[first : first + rows * seq_len].astype(np.int64).reshape(rows, seq_len)


def handlers(shape: dict[str, Any]) -> Handlers:
    """What the peer answers. shape: measure.peer_shape, rows a batch, seed, threads, file of rows."""
    import torch
    import torch.nn.functional as F
    from MEGABYTE_pytorch import MEGABYTE

    torch.set_num_threads(shape["threads"])
    torch.manual_seed(shape["seed"])
    lengths = tuple(shape["max_seq_len"])
    model = MEGABYTE(
        num_tokens=256,
        dim=tuple(shape["dim"]),
        depth=tuple(shape["depth"]),
        max_seq_len=lengths,
        heads=shape["heads"],
        flash_attn=True,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    seq_len = 1
    for length in lengths:
        seq_len *= length
    done = {"batches": 0, "steps": 0}

    def batch() -> Any:
        ids = torch.from_numpy(rows_at(shape["train"], done["batches"], shape["rows"], seq_len))
        done["batches"] += 1
        return ids

    def step(accumulate: int) -> float:
        model.train()
        for _ in range(accumulate):
            loss = model(batch(), return_loss=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        done["steps"] += 1
        return float(loss)

    def describe() -> dict[str, Any]:
        return {"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__}

    def steps(n: int) -> dict[str, Any]:
        """n optimizer steps of one batch each."""
        return {"loss_nats": [step(1) for _ in range(n)][-1]}

    def train(seconds: float, by: str) -> dict[str, Any]:
        """Train by the script's recipe until so many seconds of a clock are over."""
        began = clock(by)
        while clock(by) - began < seconds:
            step(ACCUMULATE)
        return {"steps": done["steps"], "bytes": done["batches"] * shape["rows"] * seq_len}

    @torch.inference_mode()
    def score(path: str, windows: int, seq_len: int) -> dict[str, Any]:
        """Nats over all bytes of the file's first windows, byte 0 and each window's first byte included.

        The peer's own loss ignores byte 0, and its forward without a loss leaves out the first position; so the logits
        of all positions are taken where they are made, in the order in which its training loss pairs them with bytes.
        """
        seen: list[Any] = []
        hook = model.to_logits.register_forward_hook(lambda module, given, logits: seen.append(logits))
        model.eval()
        nats = 0.0
        for number in range(windows):
            ids = torch.from_numpy(rows_at(path, number, 1, seq_len))
            model(ids)
            logits = seen.pop()  # (b, ..., n + 1, v): in every innermost group the start token's position comes first
            first = logits[(slice(None), *(0,) * (logits.ndim - 2), slice(None))]
            after = logits[..., 1:, :].reshape(1, seq_len, -1)
            every = torch.cat((first.unsqueeze(1), after[:, :-1]), dim=1)
            nats += float(F.cross_entropy(every[0].double(), ids[0], reduction="sum"))
        hook.remove()
        return {"nats": nats, "bytes": windows * seq_len}

    @torch.inference_mode()
    def generate(rows: int) -> dict[str, Any]:
        """The peer's generate(): always a whole row of seq_len bytes, the whole model again for every byte."""
        model.eval()
        made = model.generate(default_batch_size=rows)
        return {"bytes": int(made.numel())}

    @torch.inference_mode()
    def forward(rows: int, length: int) -> dict[str, Any]:
        """One forward pass over rows of so many bytes, which is what generate() does for the next byte of each."""
        model.eval()
        model(torch.randint(1, 256, (rows, length)))
        return {}

    every: Handlers = {
        "describe": describe,
        "steps": steps,
        "train": train,
        "score": score,
        "generate": generate,
        "forward": forward,
    }
    return every


def main(argv: list[str]) -> None:
    """argv: the file that holds the shape as JSON."""
    shape = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    serve(lambda: handlers(shape))


if __name__ == "__main__":
    main(sys.argv[1:])
