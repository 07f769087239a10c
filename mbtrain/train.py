"""The training loop, readable from top to bottom. What surrounds it is in session.py.

One optimizer step:  micro-steps of forward and backward  ->  one sum over ranks (loss, bytes, clock, anything not
finite, any signal)  ->  stop all ranks alike, or update  ->  log, validate, sample, save. All ranks decide by the same
sums, so none is ever alone in a collective.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbtrain import guard, noise_scale, session, vocab
from mbtrain.checkpoint import Progress
from mbtrain.config import Config
from mbtrain.data.loader import Batch, Shape, batches
from mbtrain.data.order import mix_numbers
from mbtrain.engine import gathered, total
from mbtrain.errors import CheckpointError, DataError, DivergedError, MbtrainError
from mbtrain.model.loss import nats
from mbtrain.schedule import batch_factor, lr_factor
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
    """One optimizer step over all ranks: nats, the ids that counted in them and the real bytes among those, real bytes
    of the rows by source, rank 0's clock, whether to stop, on how many ranks the pending checkpoint is on disk, the
    digest of the rows, the squared norms of the micro-batches' gradients, and what was not finite ("" if all was)."""

    nats: float
    targets: int
    predicted_bytes: int
    source_bytes: list[int]
    elapsed_s: float
    stop: bool
    written: int
    rows_digest: int
    part_squares: float
    trouble: str


@dataclass
class Step:
    """What this rank adds to a step's sums."""

    nats: Tensor
    source_bytes: np.ndarray
    targets: int = 0
    predicted_bytes: int = 0
    rows_digest: int = 0
    waited_s: float = 0.0
    unread: MbtrainError | None = None


def train(settings: Config, run: Path, *, resume: bool, alone: bool = True) -> Result:
    """Train to the first limit of the configuration. Every rank of the launcher calls this.

    run     the run directory; made when it is new
    resume  go on from its newest whole checkpoint, if it has one; False: it must not hold a run yet
    alone   False: it is one of many side by side, so its peak is not measured on CPU, its loss curve not drawn, and it
            is left to who calls this to send it to MLflow
    Raises ConfigError, DataError, CheckpointError before anything starts; DivergedError before a bad update.
    """
    with session.opened(settings, run, resume, alone) as now:
        progress, stopped = _loop(now, now.progress)
        # A signal from here on finds the run saved and is passed over: ranks must not part ways on their own signals.
        bpb = None if stopped else session.final_score(now, progress)
        status = "KILLED" if stopped else "FINISHED"
        session.end(now, progress, status)
        return Result(run, progress.step, bpb, status)


def _loop(now: Session, progress: Progress) -> tuple[Progress, bool]:
    """Steps until a limit or a signal; returns where the run stands, saved, and whether a signal ended it."""
    settings, engine, ranks = now.settings, now.engine, now.ranks
    training_flops = now.counted.training_per_byte
    last_step = session.last_step(settings, now.mixture, now.progress, training_flops)
    shape = Shape(settings.data.seq_len, engine.micro, engine.accumulation, engine.reader, engine.readers)
    of_batch = batch_factor(settings.optim, settings.train.global_batch_size)
    saved = tried = progress  # the last checkpoint that is on disk or on its way; the last that was due
    stopped = False
    window = session.Window(progress, now.saver.held_s)
    engine.module.train()
    gc.collect()
    gc.freeze()  # what is alive now stays; later collections need not walk it
    now.clock.start(progress.elapsed_s)
    with batches(now.mixture, shape, progress.position) as feed:
        while (done := share_done(settings, progress, last_step)) < 1 and not stopped:
            mine = _accumulate(now, progress, shape, feed)
            try:
                sums = _agree(now, progress, mine)
            except DataError:  # nothing was updated yet, on any rank
                if session.save(now, progress):
                    now.saver.close()
                raise
            window.waited_s += mine.waited_s
            progress = replace(
                progress,
                step=progress.step + 1,
                position=progress.position + shape.step_ids,
                elapsed_s=sums.elapsed_s,
                rows_digest=(progress.rows_digest + sums.rows_digest) % 2**64,
            )
            loss_nats = sums.nats / sums.targets if sums.targets else math.nan  # a span of filling alone
            trouble = sums.trouble or guard.spike(settings.guard, progress.recent_losses, loss_nats)
            if trouble:
                progress = replace(
                    progress, bad_steps=guard.with_bad(settings.guard, progress.bad_steps, progress.step)
                )
                _stop_if_told_so(settings, progress, trouble)
            factor = of_batch * lr_factor(settings.optim, progress.step - 1, done)
            norm = engine.step(factor, skip=bool(trouble))
            session.begun(now)
            if trouble:
                progress = session.skip(now, progress, trouble, loss_nats)
            else:
                progress = replace(
                    progress,
                    bytes=progress.bytes + sum(sums.source_bytes),
                    source_bytes=[a + b for a, b in zip(progress.source_bytes, sums.source_bytes, strict=True)],
                    optimizer_steps=progress.optimizer_steps + 1,
                    recent_losses=guard.remembered(settings.guard, progress.recent_losses, loss_nats),
                    noise=_noise(settings, progress.noise, sums, norm, engine.accumulation * engine.readers),
                )
                window.add(sums.nats, sums.targets, sums.predicted_bytes, shape.step_ids)
            if sums.written == ranks.ranks:
                now.saver.finish()
            stopped = sums.stop
            over = share_done(settings, progress, last_step) >= 1 or stopped
            if progress.step % settings.log.every_steps == 0 or over:
                numbers = {"lr_factor": factor, "grad_norm": float(norm), "done": done, "flops": training_flops}
                session.report(now, window, progress, **numbers)
                window = session.Window(progress, now.saver.held_s)
            if over:
                break
            session.live(now, progress, share_done(settings, progress, last_step))
            minutes = settings.checkpoint.every_minutes
            if _due(progress.step, settings.checkpoint.every_steps) or (
                minutes is not None and progress.elapsed_s - tried.elapsed_s >= 60 * minutes
            ):
                tried = progress
                saved = progress if session.save(now, progress) else saved
            if _due(progress.step, settings.eval.every_steps):
                session.validate(now, progress, limit_bytes=settings.eval.limit_bytes)
            if _due(progress.step, settings.sample.every_steps):
                session.sample(now, progress)
    begun = progress.step == saved.step or session.save(now, progress)
    if not (now.saver.close() and begun):
        raise CheckpointError(f"{now.run}: the last checkpoint could not be written; see {now.run}/log.txt")
    return progress, stopped


def _accumulate(now: Session, progress: Progress, shape: Shape, feed: Iterator[Batch]) -> Step:
    """The micro-steps of one step, forward and backward; returns what this rank adds to the sums."""
    engine, device = now.engine, now.ranks.device
    nothing = _nothing(shape)
    batch = nothing
    mine = Step(torch.zeros((), dtype=torch.float64, device=device), np.zeros(len(now.mixture.sources), np.int64))
    for micro_step in range(shape.accumulation):
        asked = time.perf_counter()
        try:
            batch = nothing if mine.unread else next(feed)
        except MbtrainError as error:  # told to all ranks at the sum: until then this one keeps in step
            mine.unread, batch = error, nothing
        mine.waited_s += time.perf_counter() - asked
        # The columns that are predicted, where those are a part of the row: the same on all ranks, and after a resume.
        number = mix_numbers(now.settings.train.seed, progress.step, micro_step)
        span = engine.module.training_span(shape.seq_len, number)
        columns, seen = (engine.columns, None) if span is None else (span, span.stop)
        if engine.counts_rows:
            mine.source_bytes += _bytes_by_source(batch, len(mine.source_bytes))
            mine.targets += _targets(batch, span)
            mine.predicted_bytes += int(_real(batch)[:, span or slice(None)].sum())
            mine.rows_digest += batch.digest
        ids = _sent(batch.ids[:, :seen], device).long()
        # Dropout's numbers follow from the step alone, so a resumed run draws the same ones.
        torch.manual_seed(mix_numbers(now.settings.train.seed, progress.step, micro_step, now.ranks.rank))
        each = nats(engine(ids), ids[:, columns])
        if batch.mask is None and batch.targets == shape.step_ids:
            loss = each.mean()
        else:  # each id that counts weighs the same, in whichever micro-batch it stands
            each = each * _counted(batch, columns, each)
            # How many count in the spans of other ranks and micro-steps is known too late. All spans are equally wide,
            # and this is their share of the rows' targets; it scales the gradient alone, what is reported is exact.
            share = 1.0 if span is None else (span.stop - span.start) / shape.seq_len
            loss = each.sum() * (shape.accumulation * now.ranks.ranks / (batch.targets * share))
        engine.backward(loss)
        mine.nats += each.detach().double().sum()
        if micro_step + 1 < shape.accumulation:
            engine.step(0.0)
    return mine


def share_done(settings: Config, progress: Progress, last_step: int | None) -> float:
    """The share of the run that is behind, by the limit that is nearest; at 1 it is over."""
    shares = [] if last_step is None else [progress.step / last_step]
    if settings.train.minutes is not None:
        shares.append(progress.elapsed_s / (60 * settings.train.minutes))
    return max(shares)


def _noise(settings: Config, known: list[float], sums: Sums, norm: float | Tensor, parts: int) -> list[float]:
    """What Progress.noise is after a step; as it was where it is not asked for."""
    if not settings.log.noise_scale:
        return known
    rows = settings.train.global_batch_size
    return noise_scale.smoothed(known, noise_scale.estimated(sums.part_squares, float(norm) ** 2, parts, rows))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _nothing(shape: Shape) -> Batch:
    """What stands in for a batch that could not be read; its gradients are never used."""
    ids = np.zeros((shape.micro, shape.seq_len), np.int16)
    return Batch(ids, np.zeros(ids.shape, bool), np.zeros(shape.micro, np.int64), shape.step_ids, 0)


def _bytes_by_source(batch: Batch, sources: int) -> np.ndarray:
    """Real bytes of each source in a batch, int64 [sources]."""
    return np.bincount(batch.sources, weights=_real(batch).sum(axis=1), minlength=sources).astype(np.int64)


def _real(batch: Batch) -> np.ndarray:
    """Which ids are bytes that count, bool [micro, seq_len]: no boundaries, no filling."""
    real = batch.ids != vocab.BOUNDARY
    return real if batch.mask is None else real & batch.mask


def _targets(batch: Batch, span: slice | None) -> int:
    """How many ids count in these columns of a batch, or in all."""
    columns = span or slice(None)
    return batch.ids[:, columns].size if batch.mask is None else int(batch.mask[:, columns].sum())


def _counted(batch: Batch, columns: slice, like: Tensor) -> Tensor:
    """1.0 for each id that counts, 0.0 for filling, (b, t)."""
    if batch.mask is None:
        return torch.ones_like(like)
    return _sent(batch.mask[:, columns], like.device).to(like.dtype)


def _sent(content: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device; on a GPU without waiting for what it is at, as only pinned memory can be copied."""
    tensor = torch.from_numpy(content)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _agree(now: Session, progress: Progress, mine: Step) -> Sums:
    """Sum a step over ranks before its update, and spread signals and trouble.

    Raises DataError on all ranks alike when any could not read its part.
    """
    engine, ranks = now.engine, now.ranks
    marks = engine.gradient_marks()
    bad = [not math.isfinite(mark) for mark in marks]
    lost = float(mine.nats)
    finite = math.isfinite(lost)
    elapsed = now.clock.read() if ranks.rank == 0 else 0.0
    high, low = divmod(mine.rows_digest % 2**64, 2**32)  # sums of halves are exact in float64
    flags = [float(session.told_to_stop(now)), float(now.saver.written()), float(mine.unread is not None)]
    counts = [float(not finite), float(sum(bad)), float(high), float(low)]
    counts += [float(mine.targets), float(mine.predicted_bytes), 0.0 if any(bad) else math.fsum(marks)]
    sums = total([lost if finite else 0.0, elapsed, *flags, *counts, *mine.source_bytes.tolist()], ranks)
    nats_, elapsed, stops, written, unread_parts, bad_losses, bad_gradients, high_, low_, *counted = sums
    if unread_parts:
        said = [f"rank {i}: {text}" for i, text in enumerate(gathered(str(mine.unread or ""))) if text]
        raise DataError(f"step {progress.step + 1}: {'; '.join(said[:4])}")
    trouble = ""
    if bad_losses or bad_gradients:
        names = list(engine.names.values())
        causes = [] if finite else [f"rank {ranks.rank}: the loss is {lost}"]
        causes += [f"rank {ranks.rank}: gradient of {name}" for name, times in zip(names, bad, strict=True) if times][
            :3
        ]
        trouble = "not finite: " + "; ".join(cause for of_rank in gathered(causes) for cause in of_rank[:4])
        nats_ = float("nan") if bad_losses else nats_
    digest = (int(high_) * 2**32 + int(low_)) % 2**64
    targets, predicted, part_squares, *of_sources = counted
    bytes_ = [int(n) for n in of_sources]
    whole = (nats_, int(targets), int(predicted), bytes_, elapsed, stops > 0, round(written), digest, part_squares)
    return Sums(*whole, trouble)


def _stop_if_told_so(settings: Config, progress: Progress, trouble: str) -> None:
    """Raise DivergedError where the guard's policy is to stop, or bad steps have become too many."""
    policy, limit = settings.guard.policy, settings.guard.limit
    if policy != "stop" and len(progress.bad_steps) < limit:
        return
    so_many = "" if policy == "stop" else f", the last of guard.limit = {limit} bad steps"
    raise DivergedError(
        f"step {progress.step}: {trouble}{so_many}. All ranks stopped before the update and the last checkpoint is "
        f"good; try a smaller optim.lr, a longer optim.warmup_steps, train.precision=fp32, or guard.policy=rewind"
    )
