"""What the ranks can do: `python -m mbtrain.doctor.step REQUEST`, started as a training's ranks are.

REQUEST is {"config", "overrides", "limit_s"} as step_request writes it; without "config" only sums over the ranks are
timed. The step is the training's own: mbtrain.engine, on random bytes of the
configuration's shape. Rank 0 writes lines `mbtrain-doctor {...}` on stdout, one for the sums and one for each rank: a
launcher carries stdout here from every host, while a folder there may be another than here.

On CPU memory is measured twice. First with a C library that gives back at once what is freed: that is what tensors
need, as max_memory_allocated says it on a GPU. Then as training has it, keeping freed memory: that is what is resident.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import signal
import socket
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbtrain import config, engine, hardware
from mbtrain.config import Config
from mbtrain.doctor.step_request import MARK, decoded
from mbtrain.engine import Engine, Ranks
from mbtrain.errors import MbtrainError
from mbtrain.model import build
from mbtrain.model.loss import nats

LARGE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
STEPS = 3  # timed; the ones before, which allocate, are not


def run(request: dict[str, Any]) -> None:
    """Join the ranks, time sums over them, then real steps; rank 0 writes the figures. Every rank calls this."""
    settings = config.load(request["config"], request["overrides"]) if request.get("config") else None
    ranks = engine.start()
    try:
        here = {"host": socket.gethostname(), "local_rank": ranks.local_rank, "device": ranks.device.type}
        found = here | {"flops": _product_flops(ranks)}
        sums = _sums(ranks)
        if ranks.rank == 0:
            _write(sums | {"kind": "sums", "ranks": ranks.ranks, "backend": torch.distributed.get_backend()})
        if settings is not None:
            found |= measured(settings, ranks)
        for rank, of_rank in enumerate(engine.gathered(found)):
            if ranks.rank == 0:
                _write({"kind": "rank", "rank": rank} | of_rank)
    finally:
        engine.stop()


def _product_flops(ranks: Ranks) -> float:
    """Operations a second in a matrix product: the same work on every rank, so a slow one stands out."""
    if ranks.device.type == "cpu":
        return hardware.measured_peak(torch.float32, size=512)
    a = torch.ones(4096, 4096, dtype=torch.bfloat16, device=ranks.device)
    took = []
    for _ in range(10):
        began = _now(ranks)
        a @ a
        took.append(_now(ranks) - began)
    return 2 * 4096**3 / min(took)


def _sums(ranks: Ranks) -> dict[str, Any]:
    """The median time of a small all-reduce in seconds, and the bandwidth of a large one in bytes a second.

    The bandwidth is the bus's, as nccl-tests count it: each rank sends and receives 2 (n - 1) / n of the bytes.
    """
    large_bytes = LARGE_BYTES[ranks.device.type]
    times = {}
    for size, rounds in ((4, 30), (large_bytes, 6)):
        tensor = torch.zeros(size // 4, device=ranks.device)
        took = []
        for _ in range(rounds):
            began = _now(ranks)
            torch.distributed.all_reduce(tensor)
            took.append(_now(ranks) - began)
        times[size] = statistics.median(took[len(took) // 3 :])
    share = 2 * (ranks.ranks - 1) / ranks.ranks
    bandwidth = share * large_bytes / times[large_bytes] if ranks.ranks > 1 else None
    return {"latency_s": times[4], "large_bytes": large_bytes, "large_s": times[large_bytes], "bandwidth": bandwidth}


def measured(settings: Config, ranks: Ranks) -> dict[str, Any]:
    """Real steps on this rank: seconds of each part (medians), the loss, and memory in bytes. Every rank calls this.

    base_bytes   resident before there was a model          states_bytes     weights and optimizer, after the start
    peak_bytes   most that tensors needed                   resident_bytes   most that the process held (CPU)

    All but the first are growth over the first. On CPU it holds the libraries that DeepSpeed loads at its start, too.
    """
    wrapped, memory, figures = started(settings, ranks)
    memory.keep_freed()
    draw = torch.Generator().manual_seed(wrapped.reader)
    _step(wrapped, ranks, draw)
    times = [_step(wrapped, ranks, draw)[1] for _ in range(STEPS)]
    medians = {key: statistics.median(of[key] for of in times) for key in times[0]}
    return figures | medians | {"resident_bytes": memory.peak()}


def started(settings: Config, ranks: Ranks) -> tuple[Engine, Memory, dict[str, float]]:
    """A model after its first two steps: its engine, what tells its memory, and the figures of memory so far."""
    gc.collect()
    memory = Memory(ranks)
    torch.manual_seed(settings.train.seed)
    wrapped = Engine(settings, build(settings), ranks)
    wrapped.module.train()
    states = memory.now()
    memory.reset_peak()
    draw = torch.Generator().manual_seed(wrapped.reader)
    for _ in range(2):  # ZeRO-3 fetches weights ahead from its second step on
        loss = _step(wrapped, ranks, draw)[0]
    figures = {"loss": loss, "base_bytes": memory.base, "states_bytes": states, "peak_bytes": memory.peak()}
    return wrapped, memory, figures


def _step(wrapped: Engine, ranks: Ranks, draw: torch.Generator) -> tuple[float, dict[str, float]]:
    """One optimizer step as in train.py; the mean loss of this rank, and the seconds of its parts."""
    spent = dict.fromkeys(("forward_s", "backward_s", "update_s"), 0.0)
    lost: list[Tensor] = []
    engine.total([0.0], ranks)  # all begin at once, so that a slow rank shows in its own times
    at = began = _now(ranks)

    def lap(part: str) -> None:
        nonlocal at
        now = _now(ranks)
        spent[part] += now - at
        at = now

    seq_len = wrapped.config.data.seq_len
    for micro_step in range(wrapped.accumulation):
        ids = torch.randint(0, 256, (wrapped.micro, seq_len), generator=draw).to(ranks.device)
        span = wrapped.module.training_span(seq_len, -1)  # the last of all: the most of memory
        if span is not None:
            ids = ids[:, : span.stop]
        loss = nats(wrapped(ids), ids[:, span or wrapped.columns]).mean()
        lap("forward_s")
        wrapped.backward(loss)
        lap("backward_s")
        lost.append(loss.detach())
        if micro_step + 1 < wrapped.accumulation:
            wrapped.step(0.0)
    engine.total([0.0, *wrapped.gradient_marks()], ranks)
    wrapped.step(1e-3)
    lap("update_s")
    return float(torch.stack(lost).mean()), spent | {"whole_s": _now(ranks) - began}


class Memory:
    """What this process holds, in bytes above `base`, when it was made: allocated on a GPU, else resident."""

    def __init__(self, ranks: Ranks):
        self.device = ranks.device
        if self.device.type == "cpu":
            _give_back_freed()
        self.base = self._read("VmRSS")
        self.reset_peak()

    def now(self) -> int:
        """What it holds now."""
        return self._read("VmRSS") - self.base

    def peak(self) -> int:
        """The most that it held since the last reset."""
        return self._read("VmHWM") - self.base

    def reset_peak(self) -> None:
        """Begin a new peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):  # where it is not allowed, the peak may be an older one
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def keep_freed(self) -> None:
        """From now on as in training: on CPU the C library keeps what is freed."""
        if self.device.type == "cpu":
            engine.keep_memory()

    def _read(self, key: str) -> int:
        if self.device.type == "cuda":
            of = torch.cuda.memory_allocated if key == "VmRSS" else torch.cuda.max_memory_allocated
            return int(of(self.device))
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
        return int(found[1]) * 1024 if found else 0


def _give_back_freed() -> None:
    """Let glibc return freed memory at once: the opposite of engine.keep_memory."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(-1, 1 << 16)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def _now(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return time.perf_counter()


def _write(value: dict[str, Any]) -> None:
    # In one write of less than a pipe's 4096 bytes, so that no other rank's line gets between.
    os.write(1, (MARK + json.dumps(value) + "\n").encode())


def main() -> None:
    """One rank. A user's mistake is one line of rank 0's, and exit status 2."""
    request = decoded(sys.argv[-1])  # DeepSpeed's launcher puts --local_rank=N before it
    signal.alarm(int(request["limit_s"]))  # ends this rank, wherever it hangs and whoever started it
    try:
        run(request)
    except MbtrainError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{' '.join(str(error).split())}\n")
        sys.stderr.flush()
        os._exit(2)
    sys.stderr.flush()
    os._exit(0)  # at once, as in cli.train: a thread of the process group may abort a slow end


if __name__ == "__main__":
    main()
