"""Work in processes, with progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from mbtrain.errors import DataError

_POLL_S = 0.2
_LINE_EVERY_S = 5.0

# A worker process's view of the counter that all of them share: it must be inherited, so it cannot be an argument.
_shared_count: Any = None


class Run(Protocol):
    """`run(function, jobs, label, total_bytes)` is [function(job, count) for job in jobs], in the order of jobs."""

    def __call__(
        self, function: Callable[[Any, Callable[[int], None]], Any], jobs: Sequence[Any], label: str, total_bytes: int
    ) -> list[Any]: ...


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(line: str) -> None:
    """One line of progress on stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@contextmanager
def worker_pool(workers: int) -> Iterator[Run]:
    """Give a `Run` over up to `workers` processes, started when first needed; a single job runs in this process.

    The processes end with this one, however it ends.

    Raises:
        DataError: (by `run`) a worker process died, or ran out of memory.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of Arrow in whatever state
    done = context.Value("q", 0)
    alive_there, alive_here = context.Pipe(duplex=False)
    pool: ProcessPoolExecutor | None = None

    def run(
        function: Callable[[Any, Callable[[int], None]], Any], jobs: Sequence[Any], label: str, total_bytes: int
    ) -> list[Any]:
        nonlocal pool
        if not jobs:
            return []
        with progress(label, total_bytes) as update:
            if workers == 1 or len(jobs) == 1:
                return _run_here(function, jobs, update)
            if pool is None:
                pool = ProcessPoolExecutor(workers, context, _enter_worker, (done, alive_there))
            # read without its lock: a worker that was killed may hold it
            before = done.get_obj().value
            futures = [pool.submit(_call, function, job) for job in jobs]
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, _POLL_S, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                update(done.get_obj().value - before)
            return [future.result() for future in futures]

    try:
        yield run
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, perhaps for want of memory; run the same command again, with fewer --workers: "
            "it goes on where it was"
        ) from None
    except MemoryError:
        raise DataError("out of memory; run the same command again with fewer --workers") from None
    except KeyboardInterrupt:
        alive_here.close()
        raise
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        alive_here.close()
        alive_there.close()


def _run_here(
    function: Callable[[Any, Callable[[int], None]], Any], jobs: Sequence[Any], update: Callable[[int], None]
) -> list[Any]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        update(done)

    return [function(job, count) for job in jobs]


def _enter_worker(done: Any, alive: Connection) -> None:
    global _shared_count
    _shared_count = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    threading.Thread(target=_exit_with_parent, args=(alive,), daemon=True).start()


def _exit_with_parent(alive: Connection) -> None:
    """End this worker when the other end of the pipe is closed: by the parent, or because the parent was killed.

    Without this, a worker whose parent was killed would wait for work for ever.
    """
    with suppress(EOFError, OSError):
        alive.recv_bytes()
    os._exit(1)


def _call(function: Callable[[Any, Callable[[int], None]], Any], job: Any) -> Any:
    return function(job, _count_shared)


def _count_shared(size: int) -> None:
    with _shared_count.get_lock():
        _shared_count.value += size


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Give a function to be told, as often as one likes, how many bytes are done so far."""
    start_s = time.monotonic()
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True) as bar:

            def move(done: int) -> None:
                bar.update(done - bar.n)

            yield move
        return

    last_s, last_done = start_s, 0

    def update(done: int) -> None:
        nonlocal last_s, last_done
        last_done, now_s = done, time.monotonic()
        if now_s - last_s >= _LINE_EVERY_S:
            last_s = now_s
            rate = done / (now_s - start_s)
            left = f"{max(0, total_bytes - done) / rate:.0f} s left" if rate else "no rate yet"
            say(f"{label}: {done / 1e6:.1f} of {total_bytes / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {left}")

    yield update
    elapsed_s = time.monotonic() - start_s
    say(f"{label}: {last_done / 1e6:.1f} MB in {elapsed_s:.1f} s, {last_done / 1e6 / max(elapsed_s, 1e-9):.1f} MB/s")
