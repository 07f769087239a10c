"""The runner: trains the trials of a sweep side by side, each in a process of its own, until none is left.

Trials are forked from a server that has imported torch and DeepSpeed (warm.py), so that a trial of ten seconds does not
pay for five of imports. On GPUs each has one to itself; on CPU one core and one thread each, which is what is fastest
here by far (two trials with a thread each, against one after the other with two threads: docs/sweep.md).

A trial that is killed from outside is tried once more, from its last checkpoint. One that diverged, or whose mistake
another try would repeat, is noted and the sweep goes on.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil

from mbtrain import config as configuration
from mbtrain import metrics
from mbtrain.command import writing
from mbtrain.config import Config
from mbtrain.errors import ConfigError, DataError
from mbtrain.log import duration, say
from mbtrain.redact import one_line
from mbtrain.shards import load_manifest, whole_file
from mbtrain.signals import STOPPING, handled
from mbtrain.sweep import child, ship, state
from mbtrain.sweep import spec as specs
from mbtrain.sweep.child import Place
from mbtrain.sweep.spec import Planned, Spec, Stop

LOOK_PAUSE_S = 0.25  # between two looks at what the trials say
PATIENCE_S = 15.0  # with trials that another runner is at work on, when nothing else is left


@dataclass
class Running:
    """A trial at work. `high` counts its reports in a row that are too high, `doomed` says why it is being ended."""

    trial: Planned
    settings: Config
    slot: int
    process: Any
    began_s: float
    tail: metrics.Tail
    first_bpb: float | None = None
    high: int = 0
    doomed: str = ""


@dataclass
class Left:
    """What is still to be done, and what another runner is at work on."""

    queue: deque[Planned]
    busy: list[Planned] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)


def sweep(
    spec: Spec,
    folder: Path,
    *,
    share: tuple[int, int] | None = None,
    retry: bool = False,
) -> dict[str, Any]:
    """Train what is left of a sweep; returns its `figures`, and "stopped", and how many of its share are "unfinished".

    share   (i, n): of all trials only the i-th, i + n-th, ...; for file systems without locks
    retry   try those again that failed
    Raises ConfigError before anything starts: for the first trial whose configuration or data is not right, and for a
    folder that holds another sweep.
    """
    plan = specs.planned(spec)
    settings = specs.settings(spec, plan)
    _must_have_data(settings.values())
    prepare(spec, settings, folder)
    mine = plan if share is None else plan[share[0] :: share[1]]
    stopping: list[int] = []
    with handled(stopping.append, *STOPPING):  # trials save and end; at a second signal they are killed
        left = _what_is_left(mine, folder, retry)
        said = (
            f"{len(plan)} trials, {len(left.queue)} to do{'' if share is None else f' of the {len(mine)} of its share'}"
        )
        if left.queue:
            context, places = _places(spec)
            on = f"{places[0].threads} thread(s) each" if places[0].gpu is None else "a GPU each"
            say(folder, f"{spec.name}: {said}; {len(places)} at a time, {on}")
            with ship.shipping(folder, list(settings.values())):
                _work(spec, folder, settings, left, places, context, stopping)
        else:
            say(folder, f"{spec.name}: {said}")
            if ship.unsent(folder):
                with ship.shipping(folder, list(settings.values())):
                    pass
    mine_left = figures(mine, folder)["left"]
    return figures(plan, folder) | {"stopped": bool(stopping), "unfinished": mine_left}


def prepare(spec: Spec, settings: Mapping[str, Config], folder: Path) -> None:
    """Make the folder, or see that it holds this sweep, or a part of it.

    Raises ConfigError where a trial of the folder is not in the sweep any more, or has other settings there, and where
    the folder cannot be made or written to.
    """
    with writing(f"--out={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    with state.held(folder / ".lock", wait=True):
        if (folder / "sweep.yaml").is_file():
            _must_hold(settings, folder)
        tree: dict[str, Any] = {**spec.tree, "config": "experiment.yaml"}
        vocabulary = next(iter(settings.values())).model.vocabulary
        varied = {key for axis in spec.axes for point in axis.points.values() for key in point}
        if vocabulary is not None and "model.vocabulary" not in varied:  # it may lie beside the experiment's file
            tree["set"] = {**tree.get("set", {}), "model.vocabulary": str(Path(vocabulary).resolve())}
        experiment = spec.config.read_bytes()
        with whole_file(folder / "experiment.yaml") as out:
            out.write(experiment)
        with whole_file(folder / "sweep.yaml") as out:
            out.write(specs.to_yaml(tree).encode())


def figures(plan: Sequence[Planned], folder: Path) -> dict[str, Any]:
    """How many trials are there and how they stand, and the best: {"name", "val/bpb"} of the lowest val/bpb."""
    stands = {trial.name: state.status(state.run_of(folder, trial.name)) for trial in plan}
    scores = {
        name: score
        for name, status in stands.items()
        if status == "finished" and (score := state.score(state.run_of(folder, name))) is not None
    }
    best = min(scores, key=lambda name: scores[name], default=None)
    return {
        "folder": str(folder),
        "trials": len(plan),
        **{key: list(stands.values()).count(key) for key in ("finished", "failed", "diverged", "running")},
        "left": sum(status in ("waiting", "stopped") for status in stands.values()),
        "best": None if best is None else {"name": best, "val/bpb": scores[best]},
    }


def in_words(made: Mapping[str, Any]) -> Iterator[str]:
    """The figures as lines."""
    bad = "".join(f", {made[key]} {key}" for key in ("diverged", "failed", "running", "left") if made[key])
    yield f"{made['folder']}: {made['finished']} of {made['trials']} trials finished{bad}"
    if made["best"]:
        yield f"best: {made['best']['name']}, val/bpb {made['best']['val/bpb']:.4f}"


# --- Before the first trial -----------------------------------------------------------------------------------------


def _must_have_data(all_settings: Any) -> None:
    """Every data set and split that any trial names is there; its shards are checked by the trial."""
    looked: set[tuple[str, str, str]] = set()
    for settings in all_settings:
        data = settings.data
        for _, path in configuration.source_paths(settings):
            if (path, data.train_split, data.val_split) in looked:
                continue
            looked.add((path, data.train_split, data.val_split))
            known = load_manifest(path).splits
            for key, name in (("data.train_split", data.train_split), ("data.val_split", data.val_split)):
                if name not in known:
                    raise ConfigError(f"{key}: got {name!r}, expected one of {', '.join(known)} in {path}")


def _must_hold(settings: Mapping[str, Config], folder: Path) -> None:
    """What the folder has is a part of this sweep: a trial that was begun must not change under its name."""
    old = specs.read(folder)
    begun = [trial for trial in specs.planned(old) if (state.run_of(folder, trial.name) / "config.yaml").exists()]
    if gone := [trial.name for trial in begun if trial.name not in settings]:
        raise ConfigError(
            f"{folder}: its trial {gone[0]} is not in this sweep; a sweep in the same folder may only grow. Choose "
            "another --out, or put the values back"
        )
    for trial, was in zip(begun, specs.settings(old, begun).values(), strict=True):
        if differs := _difference(was, settings[trial.name]):
            raise ConfigError(
                f"{folder}: {differs} in trial {trial.name}, with which it was begun; choose another --out, or put it "
                "back"
            )


def _difference(old: Config, new: Config) -> str | None:
    """The first key whose value decides what is learnt, and differs."""
    unlearnt = {"log", "checkpoint", "sample"}
    was, now = (configuration.flat(one.model_dump(mode="json", exclude=unlearnt)) for one in (old, new))
    for key in {**was, **now}:
        if was.get(key) != now.get(key) and not (key.startswith("data") and key.endswith("path")):
            return f"{key}: got {now.get(key)}, expected {was.get(key)}"
    return None


def _what_is_left(plan: Sequence[Planned], folder: Path, retry: bool) -> Left:
    queue: deque[Planned] = deque()
    for trial in plan:
        run = state.run_of(folder, trial.name)
        noted = state.note_of(run).get("status")
        if (noted == "crashed" or (retry and noted == "failed")) and not state.is_held(run):
            state.forget(run)
        if state.status(run) not in state.OVER:
            queue.append(trial)
    return Left(queue)


def _places(spec: Spec) -> tuple[Any, list[Place]]:
    """How a trial's process is made, and where trials run: one on each GPU, or one on each core."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mbtrain.sweep.warm"])
    jobs, threads = spec.jobs, spec.threads
    gpus = _gpus(_exit_code(context, child.count_gpus))
    if gpus and _exit_code(context, child.try_gpu) != 0:  # its driver does not let a forked process in
        context = multiprocessing.get_context("spawn")
    if gpus:
        cores = len(os.sched_getaffinity(0)) // (jobs or len(gpus))
        return context, [Place(threads or max(1, cores), gpus[i % len(gpus)]) for i in range(jobs or len(gpus))]
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    return context, [Place(threads or 1, None)] * (jobs or max(1, cores // (threads or 1)))


def _exit_code(context: Any, target: Any) -> int:
    process = context.Process(target=target)
    process.start()
    process.join()
    return int(process.exitcode)


def _gpus(count: int) -> list[str]:
    """So many GPUs, as CUDA_VISIBLE_DEVICES names them."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in shown.split(",")] if shown else [str(i) for i in range(count)]
    return named[: max(count, 0)]


# --- The trials -----------------------------------------------------------------------------------------------------


def _work(
    spec: Spec,
    folder: Path,
    settings: Mapping[str, Config],
    left: Left,
    places: list[Place],
    context: Any,
    stopping: list[int],
) -> None:
    """Start trials while there are some and places are free; meet their ends. Returns when all are over or saved."""
    running: list[Running] = []
    with _saved_on_error(running):
        gave_up_s, told = math.inf, 0
        while True:
            while not stopping and len(running) < len(places) and (trial := _next(left, folder)):
                slot = min(set(range(len(places))) - {now.slot for now in running})
                run = state.run_of(folder, trial.name)
                args = (run, settings[trial.name], places[slot], spec.stop)
                process = context.Process(target=child.main, args=args, name=f"trial {trial.name}")
                process.start()
                tail = metrics.Tail(run / "metrics.jsonl")
                running.append(Running(trial, settings[trial.name], slot, process, time.monotonic(), tail))
                gave_up_s = math.inf
            if not running:
                if stopping or not left.busy:
                    break
                gave_up_s = min(gave_up_s, time.monotonic() + PATIENCE_S)
                if time.monotonic() > gave_up_s:
                    say(folder, f"{len(left.busy)} trials are left to another runner that is at work on them")
                    break
                time.sleep(LOOK_PAUSE_S)
                continue
            wait([now.process.sentinel for now in running], timeout=LOOK_PAUSE_S)
            for now in running:
                if not now.doomed and spec.stop:
                    _look(now, spec.stop)
            for now in [now for now in running if now.process.exitcode is not None]:
                running.remove(now)
                now.tail.close()
                _ended(now, folder, left, len(running), bool(stopping))
            if len(stopping) > told:
                told = len(stopping)
                for now in running:
                    (now.process.terminate if told == 1 else now.process.kill)()
                say(folder, f"told to stop; {len(running)} trials save and end" if told == 1 else "trials are killed")


@contextmanager
def _saved_on_error(running: list[Running]) -> Iterator[None]:
    """Whatever ends the runner, as a full disk, lets the trials save, while they can."""
    try:
        yield
    except BaseException:
        for now in running:
            now.process.terminate()
        raise


def _next(left: Left, folder: Path) -> Planned | None:
    """The next trial that nobody works on; those that others worked on come last."""
    if left.queue:
        return left.queue.popleft()
    free = (i for i, trial in enumerate(left.busy) if not state.is_held(state.run_of(folder, trial.name)))
    at = next(free, None)
    return None if at is None else left.busy.pop(at)


def _look(now: Running, stop: Stop) -> None:
    """End a trial whose loss has been far too high in two reports in a row after the warm-up."""
    try:
        records = now.tail.read()
    except DataError:  # the trial itself will say it
        return
    for record in records:
        bpb = record.get("train/bpb")
        if not isinstance(bpb, int | float):
            continue
        now.first_bpb = now.first_bpb or bpb
        late = record["step"] > now.settings.optim.warmup_steps
        now.high = now.high + 1 if late and stop.too_high(bpb, now.first_bpb) else 0
        if now.high >= 2:
            now.doomed = f"step {record['step']}: train/bpb rose from {now.first_bpb:.2f} to {bpb:.2f}"
            now.process.kill()  # nothing of it will be needed
            return


def _ended(now: Running, folder: Path, left: Left, running: int, stopping: bool) -> None:
    """Note how a trial ended, say it, and put it back where it is to be tried again."""
    trial, run, code = now.trial, state.run_of(folder, now.trial.name), now.process.exitcode
    now.process.close()
    if code == child.BUSY:
        left.busy.append(trial)
    if code in (child.BUSY, child.ELSEWHERE):
        return
    took_s = time.monotonic() - now.began_s
    if now.doomed:
        state.note_bad_end(run, "diverged", now.doomed)
    elif code not in (child.DONE, child.NOTED, child.STOPPED) and not stopping:
        crashes = int(state.note_of(run).get("crashes", 0)) + 1
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        reason = f"{how}, {_last_words(run / 'output.txt')}; see {run}/output.txt"
        state.note_bad_end(run, "failed" if crashes >= state.MOST_CRASHES else "crashed", reason, crashes)
        if crashes < state.MOST_CRASHES:
            say(folder, f"{trial.name}: {reason}; it is tried once more")
            left.queue.appendleft(trial)
            return
    elif code not in (child.DONE, child.NOTED):
        return
    left.took_s.append(took_s)
    _say_ended(trial.name, run, took_s, folder, left, running)


def _last_words(path: Path) -> str:
    """The last line that a process wrote."""
    try:
        lines = path.read_bytes()[-4000:].decode("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    return one_line(lines[-1], 200) if lines else "without a word"


def _say_ended(name: str, run: Path, took_s: float, folder: Path, left: Left, running: int) -> None:
    """One line: how many are done, what came out, how long it took, how long the rest will take."""
    status, score = state.status_unlocked(run), state.score(run)
    outcome = f"{status}: {state.note_of(run).get('reason', '')}" if status != "finished" else ""
    if status == "finished":
        outcome = "finished" if score is None else f"{score:.4f} bits/byte"
    done, rest = len(left.took_s), len(left.queue) + len(left.busy) + running
    each_s = math.fsum(left.took_s[-20:]) / len(left.took_s[-20:])
    ahead = f" · {duration(each_s * rest / max(1, running + 1))} left" if rest else ""
    say(folder, f"{done}/{done + rest} · {name} · {outcome} · {duration(took_s)}{ahead}")
