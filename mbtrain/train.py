"""The training loop, readable from top to bottom. What surrounds it is in session.py.

One optimizer step:  micro-steps of forward and backward  ->  one sum over ranks (loss, bytes, clock, anything not
finite, any signal)  ->  stop all ranks alike, or update  ->  log, validate, sample, save. All ranks decide by the same
sums, so none is ever alone in a collective.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbtrain import session, vocab
from mbtrain.checkpoint import Progress
from mbtrain.config import Config
from mbtrain.data.loader import Batch, Shape, batches
from mbtrain.data.order import mix_numbers
from mbtrain.engine import gathered, total
from mbtrain.errors import CheckpointError, DataError, MbtrainError, NonFiniteError
from mbtrain.model.flops import count
from mbtrain.model.loss import nats
from mbtrain.schedule import lr_factor
from mbtrain.session import Session


@dataclass(frozen=True)
class Result:
    """How a training ended: status FINISHED, or KILLED by a signal after saving (then bpb is None)."""

    run: Path
    step: int
    bpb: float | None
    status: str


@dataclass(frozen=True)
class Sums:
    """One optimizer step over all ranks: nats, real bytes by source, rank 0's clock, whether a signal came."""

    nats: float
    source_bytes: list[int]
    elapsed_s: float
    stop: bool


def train(settings: Config, run: Path, *, resume: bool) -> Result:
    """Train to the first limit of the configuration. Every rank of the launcher calls this.

    run     the run directory; made when it is new
    resume  go on from its newest whole checkpoint, if it has one; False: it must not hold a run yet
    Raises ConfigError, DataError, CheckpointError before anything starts; NonFiniteError before a bad update.
    """
    with session.opened(settings, run, resume) as now:
        progress, stopped = _loop(now, now.progress)
        # A signal from here on finds the run saved and is passed over: ranks must not part ways on their own signals.
        bpb = None if stopped else session.final_score(now, progress)
        status = "KILLED" if stopped else "FINISHED"
        session.end(now, progress, status)
        return Result(run, progress.step, bpb, status)


def _loop(now: Session, progress: Progress) -> tuple[Progress, bool]:
    """Steps until a limit or a signal; returns where the run stands, saved, and whether a signal ended it."""
    settings, engine, ranks = now.settings, now.engine, now.ranks
    training_flops = count(settings).training_per_byte
    last_step = session.last_step(settings, now.mixture, now.progress)
    shape = Shape(settings.data.seq_len, engine.micro, engine.accumulation, ranks.rank, ranks.ranks)
    saved, stopped = progress, False
    window = session.Window(progress)
    engine.module.train()
    gc.collect()
    gc.freeze()  # what is alive now stays; later collections need not walk it
    now.clock.start(progress.elapsed_s)
    with batches(now.mixture, shape, progress.position) as feed:
        while (done := share_done(settings, progress, last_step)) < 1 and not stopped:
            lost = torch.zeros((), dtype=torch.float64, device=ranks.device)
            source_bytes = np.zeros(len(now.mixture.sources), np.int64)
            unread: MbtrainError | None = None
            batch = _nothing(shape)
            for micro_step in range(shape.accumulation):
                asked = time.perf_counter()
                try:
                    batch = batch if unread else next(feed)
                except MbtrainError as error:  # told to all ranks at the sum: until then this one keeps in step
                    unread, batch = error, _nothing(shape)
                window.waited_s += time.perf_counter() - asked
                source_bytes += _bytes_by_source(batch, len(source_bytes))
                ids = torch.from_numpy(batch.ids).to(ranks.device, non_blocking=True).long()
                # Dropout's numbers follow from the step alone, so a resumed run draws the same ones.
                torch.manual_seed(mix_numbers(settings.train.seed, progress.step, micro_step, ranks.rank))
                each = nats(engine(ids), ids)
                if batch.mask is None and batch.targets == shape.step_ids:
                    loss = each.mean()
                else:  # each id that counts weighs the same, in whichever micro-batch it stands
                    each = each * _counted(batch, each)
                    loss = each.sum() * (shape.accumulation * shape.ranks / batch.targets)
                engine.backward(loss)
                lost += each.detach().double().sum()
                if micro_step + 1 < shape.accumulation:
                    engine.step(0.0)
            sums = _agree(now, progress, float(lost), source_bytes, unread)
            factor = lr_factor(settings.optim, progress.step, done)
            norm = engine.step(factor)

            progress = replace(
                progress,
                step=progress.step + 1,
                position=progress.position + shape.step_ids,
                bytes=progress.bytes + sum(sums.source_bytes),
                source_bytes=[a + b for a, b in zip(progress.source_bytes, sums.source_bytes, strict=True)],
                elapsed_s=sums.elapsed_s,
                optimizer_steps=progress.optimizer_steps + 1,
            )
            stopped = sums.stop
            over = share_done(settings, progress, last_step) >= 1 or stopped
            window.add(sums.nats, batch.targets, shape.step_ids)
            if progress.step % settings.log.every_steps == 0 or over:
                session.report(now, window, progress, lr_factor=factor, grad_norm=norm, done=done, flops=training_flops)
                window = session.Window(progress)
            if over:
                break
            session.live(now, progress, share_done(settings, progress, last_step))
            minutes = settings.checkpoint.every_minutes
            if _due(progress.step, settings.checkpoint.every_steps) or (
                minutes is not None and progress.elapsed_s - saved.elapsed_s >= 60 * minutes
            ):
                session.save(now, progress)
                saved = progress
            if _due(progress.step, settings.eval.every_steps):
                session.validate(now, progress, limit_bytes=settings.eval.limit_bytes)
            if _due(progress.step, settings.sample.every_steps):
                session.sample(now, progress)
    if progress.step > saved.step and not session.save(now, progress):
        raise CheckpointError(f"{now.run}: the last checkpoint could not be written; see {now.run}/log.txt")
    return progress, stopped


def share_done(settings: Config, progress: Progress, last_step: int | None) -> float:
    """The share of the run that is behind, by the limit that is nearest; at 1 it is over."""
    shares = [] if last_step is None else [progress.step / last_step]
    if settings.train.minutes is not None:
        shares.append(progress.elapsed_s / (60 * settings.train.minutes))
    return max(shares)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _nothing(shape: Shape) -> Batch:
    """What stands in for a batch that could not be read; its gradients are never used."""
    ids = np.zeros((shape.micro, shape.seq_len), np.int16)
    return Batch(ids, np.zeros(ids.shape, bool), np.zeros(shape.micro, np.int64), shape.step_ids)


def _bytes_by_source(batch: Batch, sources: int) -> np.ndarray:
    """Real bytes of each source in a batch, int64 [sources]."""
    real = batch.ids != vocab.BOUNDARY
    real = real if batch.mask is None else real & batch.mask
    return np.bincount(batch.sources, weights=real.sum(axis=1), minlength=sources).astype(np.int64)


def _counted(batch: Batch, like: Tensor) -> Tensor:
    """1.0 for each id that counts, 0.0 for filling, (b, t)."""
    if batch.mask is None:
        return torch.ones_like(like)
    return torch.from_numpy(batch.mask).to(like.device, like.dtype)


def _agree(now: Session, progress: Progress, lost: float, by_source: np.ndarray, unread: MbtrainError | None) -> Sums:
    """Sum a step over ranks before its update, and spread signals and trouble.

    Raises on all ranks alike: DataError when any could not read its part, NonFiniteError before a bad update.
    """
    engine, ranks = now.engine, now.ranks
    bad = engine.bad_parameters()
    finite = math.isfinite(lost)
    elapsed = now.clock.read() if ranks.rank == 0 else 0.0
    counts = [float(not finite), float(sum(bad)), float(unread is not None), float(bool(now.stopping))]
    sums = total([lost if finite else 0.0, elapsed, *counts, *by_source.tolist()], ranks)
    nats_, elapsed, bad_losses, bad_gradients, unread_parts, stops, *bytes_ = sums
    if unread_parts:
        said = [f"rank {i}: {text}" for i, text in enumerate(gathered(str(unread or ""))) if text]
        raise DataError(f"step {progress.step + 1}: {'; '.join(said[:4])}")
    if bad_losses or bad_gradients:
        names = list(engine.names.values())
        causes = [] if finite else [f"rank {ranks.rank}: the loss is {lost}"]
        causes += [f"rank {ranks.rank}: gradient of {name}" for name, times in zip(names, bad, strict=True) if times][
            :3
        ]
        listed = "; ".join(cause for of_rank in gathered(causes) for cause in of_rank[:4])
        raise NonFiniteError(
            f"step {progress.step + 1}: not finite: {listed}. All ranks stopped before the update and the last "
            f"checkpoint is good; try a smaller optim.lr, a longer optim.warmup_steps or train.precision=fp32"
        )
    return Sums(nats_, [int(n) for n in bytes_], elapsed, stops > 0)
