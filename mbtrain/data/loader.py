"""Training batches, read ahead by a thread. The position of a step is all there is to save.

An optimizer step takes the next global_batch_size rows of the mixture, whatever the number of ranks: micro-step m of
rank r reads rows  m * (ranks * micro) + r * micro + [0, micro)  of them. So ranks' parts are disjoint, cover
everything, and no rank ever waits for one that ran out.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from mbtrain.data.mixture import Mixture


@dataclass(frozen=True)
class Shape:
    """How a global batch is cut: seq_len ids a row, micro rows a rank and micro-step, accumulation micro-steps."""

    seq_len: int
    micro: int
    accumulation: int
    rank: int
    ranks: int

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step, over all ranks."""
        return self.micro * self.accumulation * self.ranks

    @property
    def step_ids(self) -> int:
        """Ids that one optimizer step takes, over all ranks."""
        return self.seq_len * self.step_rows


@dataclass(frozen=True)
class Batch:
    """One rank's part of a micro-step.

    ids       int16 [micro, seq_len]
    mask      bool [micro, seq_len]: which ids count; None: all
    sources   int64 [micro]: the number of each row's source
    targets   ids that count in the whole optimizer step, over all ranks and micro-steps
    digest    sum of the rows' `row_digest`
    """

    ids: np.ndarray
    mask: np.ndarray | None
    sources: np.ndarray
    targets: int
    digest: int


def micro_batch(mixture: Mixture, shape: Shape, position: int, micro_step: int, targets: int) -> Batch:
    """This rank's rows in one micro-step of the optimizer step that begins at `position` (in ids) and has `targets`."""
    first = position // shape.seq_len + (micro_step * shape.ranks + shape.rank) * shape.micro
    rows = mixture.rows(first, shape.micro)
    digest = sum(row_digest(first + i, ids) for i, ids in enumerate(rows.ids))
    return Batch(rows.ids, rows.mask, rows.sources, targets, digest)


def row_digest(number: int, ids: np.ndarray) -> int:
    """64 bits of a hash of a row's number and its ids, int16 [T]: sums of these tell which rows were read."""
    content = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8)
    content.update(ids.tobytes())
    return int.from_bytes(content.digest(), "little")


@contextmanager
def batches(mixture: Mixture, shape: Shape, position: int, ahead: int = 4) -> Iterator[Iterator[Batch]]:
    """An endless iterator of micro-batches from `position` on, `ahead` of them read in advance by a thread.

    Whatever goes wrong in the thread is raised where the batch is asked for.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def read_ahead() -> None:
        at = position
        try:
            while True:
                targets = mixture.targets(at // shape.seq_len, shape.step_rows)
                for micro_step in range(shape.accumulation):
                    if not put(micro_batch(mixture, shape, at, micro_step, targets)):
                        return
                at += shape.step_ids
        except BaseException as error:
            put(error)

    def consume() -> Iterator[Batch]:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=read_ahead, name="loader", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        thread.join()
