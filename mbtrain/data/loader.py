"""Training batches, read ahead by a thread. The position of a step is all there is to save.

An optimizer step takes the next global_batch_size rows of the stream, whatever the number of ranks: micro-step m of
rank r reads rows  m * (ranks * micro) + r * micro + [0, micro)  of them. So ranks' parts are disjoint, cover
everything, and no rank ever waits for one that ran out.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from mbtrain.data.rows import Stream


@dataclass(frozen=True)
class Shape:
    """How a global batch is cut: seq_len ids a row, micro rows a rank and micro-step, accumulation micro-steps."""

    seq_len: int
    micro: int
    accumulation: int
    rank: int
    ranks: int

    @property
    def step_ids(self) -> int:
        """Ids that one optimizer step takes from the stream, over all ranks."""
        return self.seq_len * self.micro * self.accumulation * self.ranks


def micro_batch(stream: Stream, shape: Shape, position: int, micro_step: int) -> np.ndarray:
    """This rank's ids (micro, seq_len) in one micro-step of the optimizer step that begins at `position`."""
    first = position // shape.seq_len + (micro_step * shape.ranks + shape.rank) * shape.micro
    return np.stack([stream.row(first + i, shape.seq_len) for i in range(shape.micro)])


@contextmanager
def batches(stream: Stream, shape: Shape, position: int, ahead: int = 4) -> Iterator[Iterator[np.ndarray]]:
    """An endless iterator of micro-batches from `position` on, `ahead` of them read in advance by a thread.

    Whatever goes wrong in the thread is raised where the batch is asked for.
    """
    ready: queue.Queue[np.ndarray | BaseException] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(item: np.ndarray | BaseException) -> bool:
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
                for micro_step in range(shape.accumulation):
                    if not put(micro_batch(stream, shape, at, micro_step)):
                        return
                at += shape.step_ids
        except BaseException as error:
            put(error)

    def consume() -> Iterator[np.ndarray]:
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
