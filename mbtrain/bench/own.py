"""mbtrain's side of `mbtrain bench`, in a process of its own; answers by the protocol that peer.py describes.

    python -m mbtrain.bench.own CONFIG MODE ROWS_FILE

MODE  engine    a step is what `mbtrain train` does: DeepSpeed, the sums over ranks, the checks for finite numbers
      rank      the same as one of several ranks, which RANK and so on name; they meet when asked to `join`
      bare      the same model, precision, optimizer and clipping in a plain torch loop
      generate  sample.generate in fp32

Rows come from a file of raw bytes, so that both sides train on the same ones.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbtrain import config, engine, hardware, optim, sample
from mbtrain.bench.peer import Handlers, clock, rows_at, serve
from mbtrain.bench.reading import memory
from mbtrain.config import Config
from mbtrain.data.order import mix_numbers
from mbtrain.errors import ConfigError
from mbtrain.model import Model, build, native
from mbtrain.model.compiling import compile_blocks, is_compiled
from mbtrain.model.loss import nats
from mbtrain.schedule import lr_factor

Step = Callable[[Tensor, float], float]


def engine_step(settings: Config, ranks: engine.Ranks) -> tuple[Step, Callable[[], dict[str, Tensor]]]:
    """A step as in train.py, (ids, LR factor) -> nats per id, and the fp32 weights so far."""
    _must_predict_whole_rows(settings)
    wrapped = engine.Engine(settings, build(settings), ranks)
    wrapped.module.train()
    done = [0]

    def step(ids: Tensor, factor: float) -> float:
        lost = torch.zeros((), dtype=torch.float64, device=ranks.device)
        mine = ids.chunk(wrapped.readers)[wrapped.reader].to(ranks.device)
        for micro_step, part in enumerate(mine.split(wrapped.micro)):
            torch.manual_seed(mix_numbers(settings.train.seed, done[0], micro_step, ranks.rank))
            each = nats(wrapped(part), part)
            wrapped.backward(each.mean())
            lost += each.detach().double().sum()
            if micro_step + 1 < wrapped.accumulation:
                wrapped.step(0.0)
        summed = engine.total([float(lost), sum(wrapped.gradient_marks()), 0.0, 0.0, 0.0, 0.0], ranks)
        wrapped.step(factor)
        done[0] += 1
        return summed[0] / ids.numel()

    return step, lambda: dict(wrapped.weights())


def _must_predict_whole_rows(settings: Config) -> None:
    """Raise ConfigError for a model that trains spans of its rows: these loops know no spans."""
    if settings.model.kind == "perceiver_ar":
        raise ConfigError("model.kind: got perceiver_ar, expected another; `mbtrain bench claims` trains it")


def bare_step(settings: Config, model: Model) -> tuple[Step, Callable[[], None]]:
    """The same update in a plain loop: bf16 weights with fp32 masters, or fp32; the optimizer asked for, clipping.

    The model is trained in place, and turned to bf16 where that is the precision. The second function, called after the
    last step, puts into it the weights that are evaluated, where those are averages.
    """
    _must_predict_whole_rows(settings)
    train = settings.train
    if train.precision not in ("bf16", "fp32"):
        raise ConfigError(f"train.precision: got {train.precision}, expected bf16 or fp32 for a bare loop")
    masters = [p.detach().clone() for p in model.parameters()] if train.precision == "bf16" else []
    groups = engine.parameter_groups(model, settings)
    if masters:
        place = {id(p): master for p, master in zip(model.parameters(), masters, strict=True)}
        for param in model.parameters():
            vars(place[id(param)]).update(vars(param))  # role, rule, parts
        for group in groups:
            group["params"] = [place[id(p)] for p in group["params"]]
        model.bfloat16()
    params = list(model.parameters())
    trained = masters or params
    optimizer = optim.build(groups, settings)
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.ready(group, param)
    micro, accumulation = config.batch_shape(settings, 1)
    model.train()

    def step(ids: Tensor, factor: float) -> float:
        lost = 0.0
        for part in ids.to(params[0].device).split(micro):
            loss = nats(model(part), part).mean() / accumulation
            loss.backward()
            lost += float(loss.detach())
        for master, param in zip(masters, params, strict=False):
            assert param.grad is not None
            master.grad, param.grad = param.grad.float(), None
        if train.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(trained, train.gradient_clipping)
        optim.set_lr(optimizer, settings.optim.lr * factor)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, param in zip(masters, params, strict=False):
                param.copy_(master)
        return lost

    @torch.no_grad()
    def finish() -> None:
        for weights, param in zip(trained, params, strict=True):
            param.copy_(optimizer.averaged(weights, optimizer.state[weights]))

    return step, finish


def handlers(settings: Config, mode: str, train_file: str) -> Handlers:
    """What mbtrain's worker answers in this mode."""
    if mode == "rank":
        made: Handlers = {}

        def join() -> dict[str, Any]:
            """Meet the other ranks, and answer as `engine` from then on."""
            made.update(handlers(settings, "engine", train_file))
            return {}

        made["join"] = join
        return made
    ranks = engine.start()  # in every other mode, too: threads, denormals and memory are then the same
    torch.manual_seed(settings.train.seed)
    if mode == "generate":
        return _generating(build(settings).eval().to(ranks.device))
    if mode == "bare":
        model = build(settings).to(ranks.device)
        if is_compiled(settings, ranks.device):
            compile_blocks(model)
        return _training(settings, train_file, ranks.device, bare_step(settings, model)[0], None)
    return _training(settings, train_file, ranks.device, *engine_step(settings, ranks))


def _training(
    settings: Config,
    train_file: str,
    device: torch.device,
    step: Step,
    weights: Callable[[], dict[str, Tensor]] | None,
) -> Handlers:
    rows, seq_len = settings.train.global_batch_size, settings.data.seq_len
    done = [0]
    gc.collect()
    gc.freeze()  # as train.py does

    def advance(share: float) -> float:
        ids = torch.from_numpy(rows_at(train_file, done[0], rows, seq_len))
        lost = step(ids, lr_factor(settings.optim, done[0], share))
        done[0] += 1
        return lost

    def steps(n: int) -> dict[str, Any]:
        """n optimizer steps."""
        losses = [advance(0.0) for _ in range(n)]
        if device.type == "cuda":
            torch.cuda.synchronize()  # the last update
        return {"loss_nats": losses[-1]}

    def train(seconds: float, by: str) -> dict[str, Any]:
        """Train until so many seconds of a clock are over; the LR follows the share of them."""
        began = clock(by)
        while (spent := clock(by) - began) < seconds:
            advance(spent / seconds)
        return {"steps": done[0], "bytes": done[0] * rows * seq_len}

    def score(path: str, windows: int, seq_len: int) -> dict[str, Any]:
        """Nats over all bytes of the file's first windows of seq_len, by the fp32 weights, as `mbtrain eval` does."""
        assert weights is not None
        model = build(settings)
        model.load_state_dict(weights())
        model.eval().to(device)
        summed = 0.0
        with torch.inference_mode():
            for number in range(windows):
                ids = torch.from_numpy(rows_at(path, number, 1, seq_len)).to(device)
                summed += float(nats(model(ids), ids).double().sum())
        return {"nats": summed, "bytes": windows * seq_len}

    def peaks() -> dict[str, Any]:
        """The most operations per second that products reach here and now, by precision; a GPU's by its data sheet."""
        return {precision: hardware.peak_flops(device, precision) or math.nan for precision in ("bf16", "fp32")}

    def most() -> dict[str, Any]:
        """The most memory that this process has held; on a GPU, there."""
        held = hardware.peak_memory_bytes(device) if device.type == "cuda" else memory("VmHWM")
        return {"peak_bytes": held}

    made: Handlers = {"steps": steps, "train": train, "peaks": peaks, "memory": most}
    if weights is not None:
        made["score"] = score
    return made


def _generating(model: Model) -> Handlers:
    def generate(rows: int, n_bytes: int) -> dict[str, Any]:
        """Rows of n_bytes from nothing."""
        made = sample.generate(model, [b""] * rows, n_bytes, sample.Sampling())
        return {"bytes": sum(map(len, made)), "compiled": native.library() is not None}

    def first_byte(prompt_bytes: int) -> dict[str, Any]:
        """One byte after a prompt."""
        prompt = np.random.Generator(np.random.Philox(key=prompt_bytes)).bytes(prompt_bytes)
        return {"bytes": len(sample.generate(model, [prompt], 1, sample.Sampling())[0])}

    return {"generate": generate, "first_byte": first_byte}


def main(argv: list[str]) -> None:
    """argv: configuration file, mode, file of rows."""
    path, mode, rows_file = argv
    settings = config.load(Path(path))
    serve(lambda: handlers(settings, mode, rows_file))


if __name__ == "__main__":
    main(sys.argv[1:])
