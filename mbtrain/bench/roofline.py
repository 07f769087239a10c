"""`mbtrain bench roofline`: how near each part of a model is to what the machine can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mbtrain.bench import measure
from mbtrain.command import no_unknown, number
from mbtrain.config import Config
from mbtrain.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

Clock = Callable[[], float]


def roofline(
    *,
    config: str = "configs/bench/small.yaml",
    rounds: str = "15",
    threads: str = "1",
    data: str = "",
    **unknown: str,
) -> dict[str, Any]:
    """Forward and backward pass of each part of one rank's micro-batch, by itself, against two limits; medians.

    flops   useful operations over the fastest matrix product
    bytes   what must pass through memory over the speed of a copy: operands and results of every product, forward and
            backward, and of every operation between products once
    The floor of a part is the larger of the two for each product, and the bytes of the rest. One round measures every
    part, the product and the copy. Seconds are CPU time of the process with one thread, so that other work on the
    machine hardly counts, and by the clock with several. A part's inputs lie in the cache or not, as it happens.
    Raises ConfigError for options and configurations that do not fit.
    """
    no_unknown(roofline, unknown)
    n_rounds, n_threads = number("--rounds", rounds, int, 1), number("--threads", threads, int, 1)
    settings = measure.settings_of(config, data)
    if settings.model.kind != "megabyte" or settings.train.precision not in ("bf16", "fp32"):
        raise ConfigError(f"--config={config}: expected model.kind=megabyte and train.precision=bf16 or fp32")
    import torch

    from mbtrain import engine

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    torch.set_flush_denormal(True)
    engine.keep_memory()
    try:
        return measure.machine(n_threads) | {"config": config} | _measured(settings, n_rounds, n_threads)
    finally:  # the caller's arithmetic is its own
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def _measured(settings: Config, n_rounds: int, n_threads: int) -> dict[str, Any]:
    """Peak, bandwidth, and every part's row of the table."""
    import torch

    torch.manual_seed(settings.train.seed)
    clock = time.process_time if n_threads == 1 else time.perf_counter
    parts = _parts(settings)
    a = torch.ones(1024, 1024, dtype=parts[0].x.dtype)
    long, other = torch.ones(1 << 24), torch.empty(1 << 24)
    took: dict[str, list[float]] = {name: [] for name in ("product", "copy", *(part.name for part in parts))}
    for number_of in range(n_rounds + 1):
        now = {"product": min(_seconds(clock, lambda: a @ a) for _ in range(10))}
        now["copy"] = _seconds(clock, lambda: other.copy_(long))
        now |= {part.name: _seconds(clock, part.run) for part in parts}
        for name, seconds in now.items() if number_of else ():
            took[name].append(seconds)
    peak = 2 * 1024**3 / min(took["product"])
    bandwidth = 2 * long.numel() * 4 / min(took["copy"])
    rows = {part.name: part.held_against(statistics.median(took[part.name]), peak, bandwidth) for part in parts}
    whole = {key: sum(row[key] for row in rows.values()) for key in ("seconds", "floor_s", "flops", "product_s")}
    return {
        "precision": settings.train.precision,
        "rounds": n_rounds,
        "peak_flops": peak,
        "bytes_per_s": bandwidth,
        "parts": rows,
        "whole": whole
        | {"of_floor": whole["floor_s"] / whole["seconds"], "mfu": whole["product_s"] / whole["seconds"]},
    }


def _seconds(clock: Clock, call: Callable[[], Any]) -> float:
    began = clock()
    call()
    return clock() - began


@dataclass(frozen=True)
class _Part:
    """A module, what goes into it, and by formula what that takes.

    products    (rows, in, out) of each matrix product of the forward pass
    attention   operations of attention, forward and backward
    between     values that pass through memory between products, forward and backward
    """

    name: str
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    x: Tensor
    products: list[tuple[int, int, int]]
    between: float
    attention: float = 0.0

    def run(self) -> None:
        """Forward and backward pass, gradients of input and parameters."""
        out = self.forward(self.x)
        out.backward(out.detach())
        for tensor in (self.x, *self.module.parameters()):
            tensor.grad = None

    def held_against(self, seconds: float, peak: float, bandwidth: float) -> dict[str, float]:
        """This part's row of the table."""
        size = self.x.element_size()
        flops = 6 * sum(m * k * n for m, k, n in self.products) + self.attention
        each = [3 * max(2 * m * k * n / peak, size * (m * k + k * n + m * n) / bandwidth) for m, k, n in self.products]
        floor = sum(each) + self.attention / peak + size * self.between / bandwidth
        return {
            "seconds": seconds,
            "floor_s": floor,
            "of_floor": floor / seconds,
            "flops": flops,
            "product_s": flops / peak,
            "mfu": flops / peak / seconds,
        }


def _parts(settings: Config) -> list[_Part]:
    """Each stage's blocks, and logits with their loss, for one micro-batch."""
    import torch

    from mbtrain.config import batch_shape
    from mbtrain.model import build
    from mbtrain.model.flops import count
    from mbtrain.model.loss import nats
    from mbtrain.model.megabyte import Megabyte

    model = cast(Megabyte, build(settings))
    dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
    model.to(dtype).train()
    micro, _ = batch_shape(settings, 1)
    total = micro * settings.data.seq_len
    counted = count(settings)
    parts = []
    for i, (stage, made, of) in enumerate(zip(settings.model.stages, model.stages, counted.stages, strict=True)):
        t = (settings.data.seq_len if i == 0 else settings.model.stages[i - 1].patch_size) // stage.patch_size
        n, d, f = total // stage.patch_size, stage.d_model, stage.ff_width
        up = 2 * f if settings.model.block.activation == "swiglu" else f
        transformer = cast("nn.Module", made.transformer)
        parts.append(
            _Part(
                f"stage {i}: {stage.n_layers} x {d}, {t} positions of {stage.patch_size} bytes",
                transformer,
                transformer,
                torch.randn(n // t, t, d).to(dtype).requires_grad_(),
                [(n, d, 3 * d), (n, d, d), (n, d, up), (n, f, d)] * stage.n_layers,
                # Two norms (2 tensors forward, 3 back), attention (4; 7: its inputs again), activation, sums (3; 2).
                stage.n_layers * n * (2 * 5 * d + 11 * d + 2.5 * (up + f) + 2 * 5 * d) + 5 * n * d,
                3 * of.attention * total,
            )
        )
    v, d = model.vocab_size, settings.model.stages[-1].d_model
    ids = torch.randint(0, v, (1, total))
    x = torch.randn(1, total, d).to(dtype).requires_grad_()
    last = _Part("logits and loss", model, lambda x: nats(model.logits(x), ids), x, [(total, d, v)], 3 * total * v)
    return [*parts, last]
