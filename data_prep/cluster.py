"""Work on a Ray cluster: the same jobs as in processes here, as tasks on all its machines.

The data set's folder and the source files must have the same paths on all of them (a shared file system, or URLs), and
mbtrain must be installed there. A task whose machine is lost is run again; a job leaves nothing half done behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from data_prep.pool import Function, Run, progress, say
from mbtrain.errors import ConfigError, DataError

_RETRIES = 3
_POLL_S = 0.5
_WAITING_PER_WORKER = 4


@contextmanager
def ray_pool(workers: int) -> Iterator[Run]:
    """Give a `Run` over tasks on the cluster of RAY_ADDRESS, or else on a local one of `workers` cores.

    `workers` bounds the tasks at work at a time; 0: as many as there are cores.

    Raises:
        ConfigError: Ray is not installed.
        DataError: there is no such cluster, or (by `run`) a task failed for good.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine=ray: needs the package ray; pip install 'mbtrain[ray]'") from None

    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        else:
            ray.init(num_cpus=workers or None, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"--engine=ray: no cluster at {address or 'this machine'}: {reason}; see `ray status`"
        ) from None
    cores = int(ray.cluster_resources().get("CPU", 1))
    say(f"ray: {len(ray.nodes())} machines with {cores} cores")
    at_once = _WAITING_PER_WORKER * cores if workers == 0 else workers
    task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_task)

    def run(function: Function, jobs: Sequence[Any], label: str, total_bytes: int) -> list[Any]:
        results: list[Any] = [None] * len(jobs)
        done = bad = submitted = 0
        waiting: dict[Any, int] = {}
        with progress(label, total_bytes) as update:
            while submitted < len(jobs) or waiting:
                while submitted < len(jobs) and len(waiting) < at_once:
                    waiting[task.remote(function, jobs[submitted])] = submitted
                    submitted += 1
                finished, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_S)
                for reference in finished:
                    results[waiting.pop(reference)], size, rejected = ray.get(reference)
                    done, bad = done + size, bad + rejected
                update(done, bad)
        return results

    try:
        yield run
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"ray: {reason}; run the same command again: it goes on where it was") from None
    finally:
        ray.shutdown()


def _task(function: Function, job: Any) -> tuple[Any, int, int]:
    """A job's result, the bytes that it counted, and what it rejected."""
    done = bad = 0

    def count(size: int, rejected: int = 0, /) -> None:
        nonlocal done, bad
        done, bad = done + size, bad + rejected

    return function(job, count), done, bad
