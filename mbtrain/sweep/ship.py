"""All trials of a sweep to MLflow, by one process: `python -m mbtrain.sweep SWEEP`, until its stdin is closed.

A run that is trained by itself has a shipper of its own, which spends seconds importing mlflow. That is too much for a
trial of ten seconds on one core, so here one process follows the folder: it sends each trial when it is over, and one
that takes long every minute. It yields to the trials in everything, ends soon after the runner, and leaves to the next
`mbtrain sweep` what it could not send. All trials stand below one parent run of the sweep's name.

    SWEEP/mlflow.log       what it says
    SWEEP/.mlflow.json     size and time of each trial's metrics.jsonl when it was last sent
    SWEEP/.mlflow.lock     held by the one process at work
"""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbtrain import tracking
from mbtrain.config import Config
from mbtrain.errors import MbtrainError
from mbtrain.log import say
from mbtrain.redact import one_line
from mbtrain.sweep import state
from mbtrain.tracking import files

PAUSE_S = 2.0  # between two looks at the folder
AGAIN_S = 60.0  # between two sendings of a trial that goes on
DEADLINE_S = 60.0  # after the runner's end, while MLflow is out of reach
WAIT_S = 30.0  # of the runner, at its end

log = logging.getLogger("mbtrain.tracking")


@contextmanager
def shipping(folder: Path, settings: Sequence[Config]) -> Iterator[None]:
    """Send what is trained inside, while it is trained and for a while after, where log.mlflow says so."""
    if not any(each.log.mlflow for each in settings):
        yield
        return
    shipper = None
    try:
        command = ["mbtrain.sweep", str(folder.resolve())]
        shipper = tracking.spawn(command, folder / "mlflow.log", stdin=subprocess.PIPE)
    except OSError as error:  # the trials are worth more
        say(folder, f"MLflow gets nothing for now ({error}); the next `mbtrain sweep {folder}` sends it")
    try:
        yield
    finally:
        if shipper is not None:
            _wait(shipper, folder)


def unsent(folder: Path) -> bool:
    """Whether a trial that wants to be in MLflow has more than was sent of it."""
    sent = _sent(folder)
    return any(_news(trial.run, sent) for trial in state.trials(folder))


def main(argv: Sequence[str]) -> None:
    """`python -m mbtrain.sweep SWEEP`: send until stdin is closed, which the runner's end does, and MLflow has all."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends soon after the runner
    folder = Path(argv[0])
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    tracking.stand_back()
    with state.held(folder / ".mlflow.lock", wait=True):  # another runner's may be at work
        sys.exit(follow(folder, sys.stdin.fileno()))


def follow(folder: Path, runner: int) -> int:
    """Send what is new, trial by trial; 0 once the runner's pipe is closed and all is sent, 1 if time was over before.

    runner: the descriptor that can be read when the runner has ended.
    """
    at_s: dict[str, float] = {}
    trials = state.trials(folder)
    ended_s, failures = math.inf, 0
    while True:
        ended = _closed(runner, 0 if ended_s < math.inf else min(PAUSE_S * 2**failures, AGAIN_S))
        ended_s = min(ended_s, time.monotonic()) if ended else math.inf
        sent, whole = _sent(folder), True
        for trial in trials:
            again = time.monotonic() - at_s.get(trial.name, time.monotonic()) > AGAIN_S
            if not _news(trial.run, sent):
                continue
            if state.is_held(trial.run) and not again:
                at_s.setdefault(trial.name, time.monotonic())
                continue
            at_s[trial.name] = time.monotonic()
            was = _signatures(trial.run)
            try:
                tracking.sync(trial.run)
            except MbtrainError as error:
                log.warning("%s", one_line(str(error), 500))
                failures, whole = min(failures + 1, 5), False
                break
            failures = 0
            sent[trial.name] = was
            files.write_json(folder / ".mlflow.json", sent)
        if ended and whole:
            return 0
        if time.monotonic() > ended_s + DEADLINE_S:
            return 1
        if ended:
            time.sleep(PAUSE_S)


def _closed(descriptor: int, seconds: float) -> bool:
    """Whether the other end of a pipe is closed within so many seconds."""
    ready, _, _ = select.select([descriptor], [], [], seconds)
    return bool(ready) and not os.read(descriptor, 1)


def _sent(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / ".mlflow.json") or {}


def _signatures(run: Path) -> list[Any]:
    return [files.signature(run / name) for name in ("metrics.jsonl", "status.json")]


def _news(run: Path, sent: dict[str, Any]) -> bool:
    """Whether a run that asked to be in MLflow has something that was not sent."""
    if files.signature(run / "tracking.json") is None or files.signature(run / "metrics.jsonl") is None:
        return False
    return sent.get(run.name) != _signatures(run)


def _wait(shipper: subprocess.Popen[bytes], folder: Path) -> None:
    if shipper.stdin:
        shipper.stdin.close()
    try:
        shipper.wait(WAIT_S)
    except subprocess.TimeoutExpired:
        say(folder, f"MLflow has not got everything after {WAIT_S:.0f} s; its shipper goes on ({folder}/mlflow.log)")
