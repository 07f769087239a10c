"""Checkpoints are written while training goes on: a step waits for a copy in memory, never for a disk.

begin    all ranks copy what they own of the state to host memory; a thread of each writes it to disk
written  this rank's part is on disk (or could not be written); the ranks sum these at each step
finish   once all are: rank 0 writes the record and gives the folder its name
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from mbtrain import checkpoint, tracking
from mbtrain.checkpoint import Progress, Share
from mbtrain.config import Config
from mbtrain.engine import Engine, from_rank_0, gathered
from mbtrain.log import duration, say


@dataclass(frozen=True)
class Pending:
    """A checkpoint on its way to disk. Times are by perf_counter; held_s is what the training waited for it."""

    folder: Path
    progress: Progress
    hashes: Future[dict[str, str]]
    began_s: float
    held_s: float


class Saver:
    """Writes the checkpoints of a run; one at a time. All methods but `written` are collective.

    A full disk or any other OSError, on any rank, leaves the last good checkpoint, is said, and the run goes on.
    """

    def __init__(self, run: Path, settings: Config, engine: Engine):
        self.run, self.keep, self.engine, self.ranks = run, settings.checkpoint, engine, engine.ranks
        self.pending: Pending | None = None
        self.held_s = 0.0
        self.copied: Share = {}
        self._copy()  # now, so that the first save need not wait for memory either
        self._thread = ThreadPoolExecutor(1, "saver", initializer=_yield_to_training)

    def begin(self, progress: Progress) -> bool:
        """Copy the state and have it written; False when not even a folder could be made."""
        self.finish()
        began_s = time.perf_counter()
        folder, problem = "", ""
        if self.ranks.rank == 0:
            try:
                folder = str(checkpoint.begin(self.run, progress.step))
            except OSError as error:
                problem = str(error)
        told = gathered((folder, problem, self.engine.optimizer_steps()))
        folder, problem, _ = told[0]
        if problem:
            self._say(progress.step, f"NOT saved, the last good stays: {problem}")
            return False
        whole = replace(
            progress,
            optimizer_steps=max(steps for _, _, steps in told),
            mlflow_run_id=tracking.run_id(self.run),
            loss_scaler=self.engine.loss_scaler_state(),
            optimizer=self.engine.optimizer_numbers(),
        )
        self._copy()
        rank, ranks = self.ranks.rank, self.ranks.ranks
        hashes = self._thread.submit(checkpoint.write_share, Path(folder), self.copied, rank, ranks)
        held_s = time.perf_counter() - began_s
        self.held_s += held_s
        self.pending = Pending(Path(folder), whole, hashes, began_s, held_s)
        return True

    def written(self) -> bool:
        """Whether this rank's part of the pending checkpoint is on disk, or failed."""
        return self.pending is not None and self.pending.hashes.done()

    def finish(self) -> bool:
        """Wait for the pending checkpoint, if there is one, and name it; True unless it could not be written."""
        pending, self.pending = self.pending, None
        if pending is None:
            return True
        began_s = time.perf_counter()
        hashes: dict[str, str] = {}
        problem = ""
        try:
            hashes = pending.hashes.result()
        except OSError as error:
            problem = f"rank {self.ranks.rank}: {error}"
        parts = gathered((hashes, problem))
        problems = [said for _, said in parts if said]
        if not problems and self.ranks.rank == 0:
            hashes = {name: value for of_rank, _ in parts for name, value in of_rank.items()}
            keep = (self.keep.keep_last, self.keep.keep_every_steps)
            try:
                checkpoint.finish(pending.folder, pending.progress, self.engine.shapes(), hashes, *keep)
            except OSError as error:
                problems = [str(error)]
        problems = from_rank_0(problems)
        if self.ranks.rank == 0:
            if problems:
                self._thread.submit(checkpoint.remove, pending.folder)
            self._thread.submit(checkpoint.sweep, self.run)
        held_s = time.perf_counter() - began_s
        self.held_s += held_s
        step, took_s = pending.progress.step, time.perf_counter() - pending.began_s
        if problems:
            self._say(step, f"NOT saved, the last good stays: {problems[0]}")
        else:
            held = f"training waited {pending.held_s + held_s:.3f} s"
            self._say(step, f"saved {checkpoint.name_of(step)} · took {duration(took_s)}, {held}")
        return not problems

    def close(self) -> bool:
        """Finish, and wait until outdated checkpoints are removed; as `finish`."""
        done = self.finish()
        self._thread.shutdown(wait=True)
        return done

    def _copy(self) -> None:
        checkpoint.snapshot(self.engine.fragments(), self.copied)

    def _say(self, step: int, text: str) -> None:
        if self.ranks.rank == 0:
            say(self.run, f"step {step} · {text}")


def _yield_to_training() -> None:
    """The thread takes what the training leaves of the cores (Linux: priorities are those of threads)."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
