"""One trial in a process of its own: hold its lock, train it, and say by exit status and RUN/trial.json how it went.

The process has a group of its own, so that Ctrl-C at a terminal reaches the runner alone, which then tells the trials
to save. If the runner is killed, this process notices: it saves and ends, and the next runner goes on.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mbtrain.config import Config
from mbtrain.errors import DivergedError, MbtrainError, PeersError
from mbtrain.redact import one_line
from mbtrain.sweep import state
from mbtrain.sweep.spec import Stop

DONE, NOTED, BUSY, ELSEWHERE, STOPPED, CRASHED = 0, 3, 4, 5, 143, 1
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Where a trial runs: threads on CPU, and the GPU as CUDA_VISIBLE_DEVICES has it (None: as the runner's)."""

    threads: int
    gpu: str | None


def main(run: Path, settings: Config, place: Place, stop: Stop | None) -> NoReturn:
    """Train one trial and end the process, with an exit status.

    DONE; NOTED in trial.json; BUSY: another process trains it; ELSEWHERE: another has trained it; STOPPED after saving;
    CRASHED.
    """
    os.setpgid(0, 0)
    _end_with_runner()
    run.mkdir(parents=True, exist_ok=True)
    _write_to(run / "output.txt")
    _settle(place)
    with state.held(run / state.LOCK) as ours:
        code = _train(run, settings, stop) if ours else BUSY
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # at once, with the lock: a thread that wakes while the interpreter ends would abort it


def count_gpus() -> NoReturn:
    """Exit status: how many GPUs a trial would see."""
    import torch

    os._exit(min(torch.cuda.device_count(), 255))


def try_gpu() -> NoReturn:
    """Exit status 0 if a process that was forked as a trial is can compute on a GPU."""
    import torch

    os._exit(int(torch.ones(1, device="cuda").sum().item() != 1))


def _train(run: Path, settings: Config, stop: Stop | None) -> int:
    if state.status_unlocked(run) in state.OVER:  # since our runner looked
        return ELSEWHERE
    from mbtrain.train import train

    try:
        result = train(settings, run, resume=True, alone=False)
    except DivergedError as error:
        state.note(run, "diverged", str(error))
        return NOTED
    except PeersError:
        traceback.print_exc()
        return CRASHED
    except MbtrainError as error:  # another try would end the same
        sys.stderr.write(f"mbtrain: {one_line(str(error))}\n")
        state.note(run, "failed", str(error))
        return NOTED
    except BaseException:
        traceback.print_exc()
        return CRASHED
    if result.status != "FINISHED":
        return STOPPED
    if result.bpb is None or not math.isfinite(result.bpb) or (stop and stop.too_high(result.bpb, state.first(run))):
        state.note(run, "diverged", f"val/bpb is {result.bpb} at the end")
        return NOTED
    return DONE


def _end_with_runner() -> None:
    """Have this process save and end when the runner is no more."""
    runner = multiprocessing.parent_process()

    def wait() -> None:
        if runner is not None:
            runner.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="runner", daemon=True).start()


def _write_to(path: Path) -> None:
    """What the trial says goes to a file: many at once would write over one another."""
    out = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, to in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(descriptor, to)
    os.close(out)
    os.close(nothing)


def _settle(place: Place) -> None:
    for key in _LAUNCHER:  # a trial is alone, wherever the sweep was started
        os.environ.pop(key, None)
    os.environ.pop("SLURM_PROCID", None)
    os.environ["OMP_NUM_THREADS"] = str(place.threads)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    import torch

    torch.set_num_threads(place.threads)
