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

_SHARE_EVERY_BYTES = 1024**2

# A worker process's view of the counters that all of them share: they must be inherited, so cannot be an argument.
_shared_counts: Any = None


class Progress(Protocol):
    """Is told of work that was done: bytes, and how many things were rejected on the way."""

    def __call__(self, size: int, rejected: int = 0, /) -> None: ...


Function = Callable[[Any, Progress], Any]


class Run(Protocol):
    """`run(function, jobs, label, total_bytes)` is [function(job, count) for job in jobs], in the order of jobs."""

    def __call__(self, function: Function, jobs: Sequence[Any], label: str, total_bytes: int) -> list[Any]: ...


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_pandas() -> None:
    """In a process of our own: keep pyarrow from importing pandas with its first array, for a fifth of a second."""

    class NoPandas:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "pandas":
                raise ModuleNotFoundError("No module named 'pandas'", name="pandas")

    finders: list[Any] = sys.meta_path
    finders.insert(0, NoPandas())


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
    done = context.Array("q", 2)
    alive_there, alive_here = context.Pipe(duplex=False)
    pool: ProcessPoolExecutor | None = None

    def run(function: Function, jobs: Sequence[Any], label: str, total_bytes: int) -> list[Any]:
        nonlocal pool
        if not jobs:
            return []
        with progress(label, total_bytes) as update:
            if workers == 1 or len(jobs) == 1:
                return _run_here(function, jobs, update)
            if pool is None:
                pool = ProcessPoolExecutor(workers, context, _enter_worker, (done, alive_there))
            # read without its lock: a worker that was killed may hold it
            before = list(done.get_obj())
            futures = [pool.submit(_call, function, job) for job in jobs]
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, _POLL_S, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                update(*(now - then for now, then in zip(done.get_obj(), before, strict=True)))
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


def _run_here(function: Function, jobs: Sequence[Any], update: Progress) -> list[Any]:
    done = bad = 0

    def count(size: int, rejected: int = 0) -> None:
        nonlocal done, bad
        done += size
        bad += rejected
        update(done, bad)

    return [function(job, count) for job in jobs]


def _enter_worker(done: Any, alive: Connection) -> None:
    global _shared_counts
    _shared_counts = done
    without_pandas()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    threading.Thread(target=_exit_with_parent, args=(alive,), daemon=True).start()


def _exit_with_parent(alive: Connection) -> None:
    """End this worker when the other end of the pipe is closed: by the parent, or because the parent was killed.

    Without this, a worker whose parent was killed would wait for work for ever.
    """
    with suppress(EOFError, OSError):
        alive.recv_bytes()
    os._exit(1)


def _call(function: Function, job: Any) -> Any:
    waiting = [0, 0]

    def share() -> None:
        with _shared_counts.get_lock():
            for number, size in enumerate(waiting):
                _shared_counts[number] += size
        waiting[:] = 0, 0

    def count(size: int, rejected: int = 0) -> None:
        waiting[0] += size
        waiting[1] += rejected
        if waiting[0] >= _SHARE_EVERY_BYTES:  # many small samples would wait for the lock more than they work
            share()

    result = function(job, count)
    share()
    return result


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Progress]:
    """Give a function to be told, as often as one likes, how many bytes are done and things rejected so far."""
    start_s = time.monotonic()
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True) as bar:

            def move(done: int, rejected: int = 0, /) -> None:
                if rejected:
                    bar.set_postfix(rejected=rejected, refresh=False)
                bar.update(done - bar.n)

            yield move
        return

    last_s, last_done, last_rejected = start_s, 0, 0

    def update(done: int, rejected: int = 0, /) -> None:
        nonlocal last_s, last_done, last_rejected
        last_done, last_rejected, now_s = done, rejected, time.monotonic()
        if now_s - last_s >= _LINE_EVERY_S:
            last_s = now_s
            rate = done / (now_s - start_s)
            left = f"{max(0, total_bytes - done) / rate:.0f} s left" if rate else "no rate yet"
            amount = f"{done / 1e6:.1f} of {total_bytes / 1e6:.1f} MB"
            say(f"{label}: {amount}, {rate / 1e6:.1f} MB/s, {left}{_rejects(rejected)}")

    yield update
    elapsed_s = time.monotonic() - start_s
    rate_mb = last_done / 1e6 / max(elapsed_s, 1e-9)
    say(f"{label}: {last_done / 1e6:.1f} MB in {elapsed_s:.1f} s, {rate_mb:.1f} MB/s{_rejects(last_rejected)}")


def _rejects(rejected: int) -> str:
    return f", {rejected} rejected" if rejected else ""
