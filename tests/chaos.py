"""SIGKILL at random instants, again and again; after each the same command; then: is the end what it is without kills?

    python -m tests.chaos --kills=N [--seed=S] [--only=prep|train|resume|launcher] [--keep]

Legs: mbtrain-prep with two workers, text and images; training with two ranks over gloo under ZeRO 1, 2 and 3, in fp32
and bf16, dropout on, that validates, samples and saves every few steps, some of them with MLflow; and training under
the `deepspeed` launcher. A kill takes one rank, all, or all and the MLflow shipper; one worker, the job, or both; the
launcher or all below it. Its instant is drawn from the seed: a random time after the start or after a step, while a
validation or a checkpoint is being made, before the n-th file-system call, or at the rename that names a checkpoint.

After each kill: do the others end by themselves, how soon, with which status; is everything under a final name whole.
At the end: weights, moments, progress, metrics, samples and data sets as in an undisturbed run, bit for bit, nothing
left lying about, and one MLflow run with every step once. Exit status 1 on any difference, or fewer kills than asked.

Ranks and jobs are forked after their imports (tests/forks.py), but for those under the launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from mbtrain import checkpoint, metrics
from mbtrain.errors import MbtrainError
from tests import forks, launch, tiny

Kind = Literal["prep", "train", "launcher"]

RANKS = 2
SAVE, EVAL, SAMPLE, KEEP = 3, 2, 5, 1  # every so many steps; checkpoints kept
STEPS_A_KILL = 9
ALONE_S = 15.0  # the others end within this time after a kill, and with this status
LOST = 75
UNMET = "waiting for a rank not met yet"
# Of a metrics line: what tells how long something took or how much memory it had, not what came out.
TIMINGS = re.compile(r"time_unix_s|perf/|mem/|progress/minutes|.*_s$")
SHIPPED = re.compile(r"\.lock|\.mlflow\.lock|\.mlflow_sent\.json")


@dataclass(frozen=True)
class Leg:
    """A thing to disturb, and how often. `settings` are dotted overrides of the tiny configuration, or prep's verb."""

    name: str
    kind: Kind
    kills: int
    settings: tuple[str, ...] = ()
    only_at_start: bool = False


@dataclass
class Found:
    """What a leg showed: where its kills landed, how the others ended, what was wrong."""

    leg: Leg
    landed: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    others: list[tuple[float, int | str]] = field(default_factory=list)
    lingering: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    took_s: float = 0.0

    @property
    def kills(self) -> int:
        return sum(self.landed.values())


def legs(kills: int, only: str | None) -> list[Leg]:
    """Share the kills out."""
    train = [
        ("ZeRO-1 fp32, MLflow", ("--train.zero_stage=1", "--train.precision=fp32", "--log.mlflow=true")),
        ("ZeRO-2 bf16", ("--train.zero_stage=2", "--train.precision=bf16")),
        ("ZeRO-3 fp32", ("--train.zero_stage=3", "--train.precision=fp32")),
        ("ZeRO-3 bf16, MLflow", ("--train.zero_stage=3", "--train.precision=bf16", "--log.mlflow=true")),
        ("ZeRO-2 fp32", ("--train.zero_stage=2", "--train.precision=fp32")),
        ("ZeRO-1 bf16", ("--train.zero_stage=1", "--train.precision=bf16")),
    ]
    if kills < 40:  # a short form cannot afford MLflow's start, 3 s of a core each time
        train = [(name.removesuffix(", MLflow"), settings[:2]) for name, settings in train]
    shares = {"prep": 0.25, "launcher": 0.04 if kills >= 40 else 0.0}
    counts = {kind: round(kills * share) for kind, share in shares.items()}
    counts["train"] = kills - sum(counts.values())
    if only is not None:
        counts = {"train" if only == "resume" else only: kills}
    made = []
    if prep := counts.get("prep", 0):
        made.append(Leg("prep text, 2 workers", "prep", prep - prep // 3, ("text",)))
        made.append(Leg("prep image, 2 workers", "prep", prep // 3, ("image", "--size=16")))
    if training := counts.get("train", 0):
        many = min(len(train) if kills >= 40 else 3, max(1, training // 2))
        for i, (name, settings) in enumerate(train[:many]):
            share = training // many + (i < training % many)
            made.append(Leg(name, "train", share, settings, only == "resume"))
    if counts.get("launcher"):
        under = ("--train.zero_stage=2", "--train.precision=bf16")
        made.append(Leg("ZeRO-2 bf16, deepspeed", "launcher", counts["launcher"], under))
    return [leg for leg in made if leg.kills]


# ---- what is common to all legs -----------------------------------------------------------------------------------


def wait_until(happened: Callable[[], Any], ended: Callable[[], bool], timeout_s: float = 180.0) -> bool:
    """Wait for something in steps of two milliseconds; False when all ended before or it took too long."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        if ended() or time.monotonic() > deadline:
            return bool(happened())
        time.sleep(0.002)
    return True


def found_in(folder: Path, pattern: str) -> list[Path]:
    """What matches in a folder in which others work: a folder that vanishes meanwhile holds nothing."""
    return [folder / name for name in glob.glob(pattern, root_dir=folder)]


def contents(root: Path) -> dict[str, str]:
    """sha256 of every file under a folder."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differing(what: str, expected: dict[Any, Any], got: dict[Any, Any]) -> list[str]:
    """A line for the first of the keys in which two mappings differ."""
    keys = [key for key in expected.keys() | got.keys() if expected.get(key) != got.get(key)]
    if not keys:
        return []
    first = min(keys, key=str)
    return [f"{what}: {len(keys)} differ, first {first}: expected {expected.get(first)}, got {got.get(first)}"]


def alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(pids: Sequence[int]) -> None:
    """SIGKILL to each."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ending(pids: Sequence[int], status: Callable[[int], int | str], limit_s: float) -> list[tuple[float, int | str]]:
    """(seconds, exit status) of each that ends by itself; of those that do not, and are killed: "still there"."""
    began = time.monotonic()
    left = list(pids)
    ended: list[tuple[float, int | str]] = []
    while left and time.monotonic() - began < limit_s:
        for pid in [pid for pid in left if not alive(pid)]:
            left.remove(pid)
            ended.append((time.monotonic() - began, status(pid)))
        time.sleep(0.005)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)  # a forked one writes to its log where it stands
    time.sleep(0.5 if left else 0)
    kill(left)
    return ended + [(limit_s, "still there") for _ in left]


# ---- training -----------------------------------------------------------------------------------------------------


@dataclass
class Started:
    """Ranks at work, forked or under a launcher."""

    pids: list[int]  # of the ranks
    launchers: list[int]
    ended: Callable[[], bool]
    status: Callable[[int], int | str]


class Training:
    """A run directory and the one command that starts it and goes on with it."""

    def __init__(self, leg: Leg, root: Path, name: str, config: Path):
        self.leg, self.run, self.log = leg, root / name, root / f"{name}.log"
        self.store = root / f"{name}.db"
        # Ranks whose launcher alone was killed go on: they must not come to the end meanwhile.
        steps = (STEPS_A_KILL if leg.kind == "train" else 60) * leg.kills + 12
        tracked = [f"--log.mlflow_uri=sqlite:///{self.store}"] if "--log.mlflow=true" in leg.settings else []
        self.argv = ["train", str(config), f"--run={self.run}", "--resume", f"--train.steps={steps}"]
        self.argv += [*leg.settings, *tracked]
        self.steps = steps
        self.death: forks.Death | None = None

    @contextlib.contextmanager
    def started(self, death: forks.Death | None = None, dying: int = 0) -> Iterator[Started]:
        """Start the command; whatever is left of it at the end is killed."""
        began = self._launched() if self.leg.kind == "launcher" else self._forked(death, dying)
        try:
            yield began
        finally:
            kill([pid for pid in [*began.launchers, *began.pids] if alive(pid)])
            wait_until(lambda: not any(alive(pid) for pid in [*began.launchers, *began.pids]), lambda: False, 10)

    def _forked(self, death: forks.Death | None, dying: int) -> Started:
        place = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(launch.free_port())
        processes = {}
        for rank in range(RANKS):
            its = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = forks.start("mbtrain", self.argv, self.log, its, death if rank == dying else None)
            assert process.pid is not None
            processes[process.pid] = process

        def status(pid: int) -> int | str:
            processes[pid].join(5)
            code = processes[pid].exitcode
            return "no status" if code is None else code

        return Started(list(processes), [], lambda: all(p.exitcode is not None for p in processes.values()), status)

    def _launched(self) -> Started:
        bin_ = Path(sys.executable).parent
        launcher = [bin_ / "deepspeed", f"--num_gpus={RANKS}", f"--master_port={launch.free_port()}"]
        command = [*map(str, launcher), "--module", "mbtrain", *self.argv]
        env = launch.environment(PATH=f"{bin_}:{os.environ['PATH']}")
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        ranks: list[int] = []
        launchers: list[int] = []

        def all_there() -> bool:
            launchers[:], ranks[:] = [process.pid], []
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    line = child.cmdline()
                    if "deepspeed.launcher.launch" in line:
                        launchers.append(child.pid)
                    elif any(arg.startswith("--local_rank=") for arg in line):
                        ranks.append(child.pid)
            return (len(launchers), len(ranks)) == (2, RANKS)

        wait_until(all_there, lambda: process.poll() is not None)
        return Started(ranks, launchers, lambda: process.poll() is not None, lambda pid: "gone")

    def finish(self, timeout_s: float = 300) -> list[str]:
        """Let it go to its end; what went wrong."""
        with self.started() as now:
            wait_until(now.ended, lambda: False, timeout_s)
            codes = [now.status(pid) for pid in now.pids]
        if not wait_until(lambda: self.status() == "FINISHED", lambda: True):
            return [f"not finished: status {self.status()}, exit {codes}; {self.said()}"]
        if self.leg.kind == "train" and codes != [0] * RANKS:
            return [f"finished with exit status {codes}"]
        return []

    def status(self) -> str:
        """Of status.json, or empty."""
        with contextlib.suppress(OSError, ValueError):
            return str(json.loads((self.run / "status.json").read_text())["status"])
        return ""

    def said(self) -> str:
        """The last lines of what the ranks said."""
        with contextlib.suppress(OSError):
            return " | ".join(self.log.read_text().splitlines()[-3:])
        return ""

    def said_since(self, size: int) -> str:
        """What the ranks said after so many bytes of the log."""
        with self.log.open("rb") as log:
            log.seek(size)
            return log.read().decode(errors="replace")

    def lines(self, since: float = 0.0) -> list[dict[str, Any]]:
        """Metrics lines written since a time."""
        with contextlib.suppress(MbtrainError):
            return [r for r in metrics.read(self.run / "metrics.jsonl") if r["time_unix_s"] >= since]
        return []

    def last_step(self, since: float) -> int:
        """The last step of a line written since a time; -1 without one."""
        last = None
        with contextlib.suppress(MbtrainError):
            last = metrics.last(self.run / "metrics.jsonl")
        return int(last["step"]) if last and last["time_unix_s"] >= since else -1

    def names(self, pattern: str) -> set[str]:
        """Names among the checkpoints."""
        return {path.name for path in found_in(self.run / "checkpoints", pattern)}

    def at_work(self) -> set[tuple[str, int]]:
        """Checkpoints being written: folders under another name, each with its number, not its age."""
        found = set()
        for path in found_in(self.run / "checkpoints", ".step_*"):
            with contextlib.suppress(OSError):
                found.add((path.name, path.stat().st_ino))
        return found

    def sound(self) -> list[str]:
        """Whether all that has a final name is whole: checkpoints, metrics (each step once)."""
        wrong = []
        for name in self.names("step_*"):
            try:
                checkpoint.verify(self.run / "checkpoints" / name)
            except MbtrainError as error:
                wrong.append(f"corrupt: {error}")
        if (self.run / "metrics.jsonl").exists():
            try:
                lines = Counter((r["step"], *sorted(r)) for r in metrics.read(self.run / "metrics.jsonl"))
                wrong += [f"metrics: step {line[0]} stands there {n} times" for line, n in lines.items() if n > 1][:3]
            except MbtrainError as error:
                wrong.append(f"corrupt: {error}")
        return wrong

    def shippers(self) -> list[int]:
        """The MLflow shippers of this run."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if any(arg.startswith("mbtrain.tracking") for arg in line) and str(self.run) in line:
                found.append(process.pid)
        return found


def values(lines: list[dict[str, Any]]) -> list[tuple[tuple[int, str], str]]:
    """((step, key), value) of all that was measured but times and memory; nan equals nan."""
    return [
        ((line["step"], key), repr(value))
        for line in lines
        for key, value in line.items()
        if key != "step" and not TIMINGS.match(key)
    ]


def state(run: Path) -> tuple[dict[str, Any], list[str]]:
    """The newest checkpoint: hashes of its files and its progress but for times; the names of all."""
    found, problems = checkpoint.newest(run)
    assert found is not None, problems
    record = json.loads((found.path / "checkpoint.json").read_text())
    progress = {k: v for k, v in record["progress"].items() if k not in ("elapsed_s", "mlflow_run_id")}
    rest = {k: v for k, v in record.items() if k not in ("progress", "self")}
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    return {"path": found.path.name, "progress": progress, **rest}, names


def same_run(whole: Training, broken: Training) -> list[str]:
    """In what a run that was killed differs from an undisturbed one."""
    (expected, names), (got, names_got) = state(whole.run), state(broken.run)
    wrong = differing("last checkpoint", expected, got)
    wrong += [] if names == names_got else [f"checkpoints: expected {names}, got {names_got}"]
    wrong += differing("metrics", dict(values(whole.lines())), dict(values(broken.lines())))
    wrong += differing("samples", contents(whole.run / "samples"), contents(broken.run / "samples"))
    files = {path for path in contents(broken.run) if not path.startswith(("samples/", "checkpoints/"))}
    hidden = [path for path in files if Path(path).name.startswith(".") or ".tmp" in path or ".old" in path]
    wrong += [f"left lying about: {path}" for path in hidden if not SHIPPED.fullmatch(path)]
    files_whole = {path for path in contents(whole.run) if not path.startswith(("samples/", "checkpoints/"))}
    wrong += [f"files: {sorted(files_whole ^ files)} in one of the two only"] if files_whole != files else []
    return wrong


def in_mlflow(training: Training) -> list[str]:
    """Whether the store has one run, and each value of metrics.jsonl once."""
    wait_until(lambda: not training.shippers(), lambda: False, 90)
    done = subprocess.run(
        [sys.executable, "-m", "mbtrain", "sync", str(training.run)],
        env=launch.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    wrong = [] if done.returncode == 0 else [f"mbtrain sync: {done.stderr}"]
    with contextlib.closing(sqlite3.connect(training.store)) as store:
        runs = store.execute("SELECT run_uuid, status FROM runs").fetchall()
        points = store.execute("SELECT step, key, value FROM metrics WHERE is_nan = 0").fetchall()
    wrong += [] if len(runs) == 1 else [f"MLflow: {len(runs)} runs, expected one"]
    wrong += [] if {status for _, status in runs} == {"FINISHED"} else [f"MLflow: {runs}, expected FINISHED"]
    times = Counter((step, key) for step, key, _ in points)
    wrong += [f"MLflow: {point} is there {n} times" for point, n in times.items() if n > 1][:3]
    expected = {
        (line["step"], key): float(value)
        for line in training.lines()
        for key, value in line.items()
        if key not in ("step", "time_unix_s") and not TIMINGS.match(key)
    }
    got = {(step, key): value for step, key, value in points if not TIMINGS.match(key)}
    return wrong + differing("MLflow", expected, got)


STARTING, LOADED = "starting", "loaded, before the first step"
AIMS = ("start", "start call", "step", "step", "evaluate", "evaluate", "save", "save", "call", "call")
AIMS += ("renaming", "renamed")


def kill_training(training: Training, rng: random.Random, found: Found, start_s: float) -> None:
    """One start and one kill; what was seen goes into `found`."""
    leg = training.leg
    last = found.kills + 1 == leg.kills and not leg.only_at_start  # after the last step, before the end
    aim = rng.choice(AIMS[:2] if leg.only_at_start else ("step", "call", "evaluate") if last else AIMS)
    death, dying = None, 0
    if aim in ("start call", "call", "renaming", "renamed") and leg.kind == "train":
        dying = rng.choice([0, 0, 1]) if aim == "call" else 0
        kind = {"renaming": "renaming", "renamed": "renamed"}.get(aim, "event")
        death = forks.Death(training.run, kind, rng.randint(1, 14 if dying == 0 else 4))  # type: ignore[arg-type]
        death.nth = death.nth if kind == "event" else 1
        death.armed.value = aim == "start call"
    began, log_size = time.time(), training.log.stat().st_size if training.log.exists() else 0
    before = training.names("step_*"), training.at_work()
    whom = rng.choice(["all", "all", "one", "one", "all and shipper"])
    if leg.kind == "launcher":
        whom = ("one", "launcher", "launcher and all")[found.kills % 3]
    with training.started(death, dying) as now:
        pids = list(now.pids)
        victims = pids if whom.startswith("all") else [pids[dying if death else rng.randrange(RANKS)]]
        if whom.startswith("launcher"):
            victims = now.launchers[:1] if whom == "launcher" else [*now.launchers, *now.pids]
        shippers = training.shippers() if whom == "all and shipper" else []
        if death is not None and len(victims) > 1:
            for i, pid in enumerate(pid for pid in pids if pid != pids[dying]):
                death.peers[i] = pid
        if aim == "start":
            time.sleep(rng.uniform(0, start_s))
        elif aim != "start call":
            first = max((int(name[5:]) for name in before[0]), default=0) + rng.randint(1, 4)
            first = training.steps if last else first
            wait_until(lambda: training.last_step(began) >= first, now.ended)
        if death is not None:
            death.armed.value = 1
            wait_until(lambda: not alive(pids[dying]), now.ended, 20)
            kill(victims)  # those that the hook could not know
        else:
            due = {
                "evaluate": lambda: training.last_step(began) % EVAL == 0,
                "save": lambda: any(name.endswith(".tmp") for name, _ in training.at_work() - before[1]),
            }.get(aim)
            if due is not None:
                wait_until(due, now.ended, 10)
            if aim != "start":
                time.sleep(rng.uniform(0, 0.06 if aim == "step" else 0.02))
            kill(victims)
        kill(shippers)
        if leg.kind == "launcher" and now.ended() and training.status():
            return  # it was over before
        others = [pid for pid in [*now.launchers, *pids] if pid not in victims]
        seen = ending(others, now.status, 3.0 if whom == "launcher" else ALONE_S)
        codes = [now.status(pid) for pid in victims if pid in pids]
    if leg.kind == "train" and -signal.SIGKILL not in codes:
        if codes != [0] * len(codes):
            found.wrong.append(f"ended by itself before the kill, exit {codes}; {training.said()}")
        return
    where = landed(training, began, log_size, before)
    name = whom if whom.startswith("launcher") else "all ranks" if len(victims) > 1 else "rank"
    found.landed[where] += 1
    found.victims[name] += 1
    if "in init_process_group" in training.said_since(log_size):
        # Not lost to the others yet, but late: they wait for it as for any slow one (engine.COLLECTIVE_TIMEOUT).
        seen = [(seconds, UNMET if status == "still there" else status) for seconds, status in seen]
    found.others += seen
    if leg.kind == "train":
        for _, status in seen:
            if status not in (LOST, UNMET):
                how = f"is {status}" if isinstance(status, str) else f"ended with {status}"
                found.lingering.append(f"{where}: the other rank {how}, expected {LOST} within {ALONE_S:.0f} s")
    lost = max(before[0], default="") > max(training.names("step_*"), default="")
    wrong = training.sound() + ([f"checkpoint {max(before[0])} is gone, and nothing newer is there"] if lost else [])
    found.wrong += [f"after a kill ({where}): {text}" for text in wrong]


def landed(training: Training, began: float, log_size: int, before: tuple[set[str], set[tuple[str, int]]]) -> str:
    """Where a kill hit, by what the run's folder and log show."""
    fresh = training.lines(began)
    if not fresh:
        return LOADED if "data:" in training.said_since(log_size) else STARTING
    new = {name for name, _ in training.at_work() - before[1]}
    finals = training.names("step_*")
    if any(name.endswith(".old") for name in new) or (finals - before[0] and len(finals) > KEEP):
        return "between rename and clean-up"
    last = fresh[-1]["step"]
    keys = {key for line in fresh if line["step"] == last for key in line}
    if last == training.steps:
        where = "after the last step"
    elif last % EVAL == 0 and not any(key.startswith("val/") for key in keys):
        where = "evaluating"
    elif last % SAMPLE == 0 and not (training.run / "samples" / f"{checkpoint.name_of(last)}.txt").exists():
        where = "sampling"
    else:
        where = "in a step"
    return f"{where} + saving" if any(name.endswith(".tmp") for name in new) else where


def train_leg(leg: Leg, root: Path, rng: random.Random, shards: Path) -> Found:
    """Disturb a training, and compare its end."""
    found, began = Found(leg), time.monotonic()
    config = launch.config_file(root, tree(shards))
    whole, broken = Training(leg, root, "whole", config), Training(leg, root, "broken", config)
    found.wrong += whole.finish()
    if found.wrong:
        return found
    starts = [line["time_unix_s"] for line in whole.lines()[:1]]
    start_s = starts[0] - (root / "config.yaml").stat().st_mtime
    for _ in range(2 * leg.kills + 2):  # a kill may come too late, and another is made
        if found.kills < leg.kills and not found.wrong:
            kill_training(broken, rng, found, start_s)
    found.wrong += broken.finish() if not found.wrong else []
    found.wrong += broken.sound()
    if not found.wrong:
        found.wrong += same_run(whole, broken)
        found.wrong += in_mlflow(broken) if "--log.mlflow=true" in leg.settings else []
    kill(whole.shippers() + broken.shippers())
    found.took_s = time.monotonic() - began
    return found


def tree(shards: Path) -> dict[str, Any]:
    """The tiny model with dropout; validates, samples and saves often."""
    return tiny.tree(
        2,
        model={"block": {"dropout": 0.1}},
        data={"path": str(shards)},
        train={"global_batch_size": 4, "lost_after_s": 5},
        checkpoint={"every_steps": SAVE, "keep_last": KEEP, "every_minutes": None},
        eval={"every_steps": EVAL, "limit_bytes": 1000, "batch_size": 16},
        sample={"every_steps": SAMPLE, "bytes": 4},
    )


# ---- data prep ----------------------------------------------------------------------------------------------------


def sources(root: Path, verb: str) -> Path:
    """Files to make a data set of."""
    rng = random.Random(1)
    folder = root / f"raw_{verb}"
    folder.mkdir()
    if verb == "text":
        for i in range(240):
            words = [rng.choice(["byte", "patch", "stage", "model", "row"]) for _ in range(rng.randint(100, 1200))]
            (folder / f"{i:03d}.txt").write_text(" ".join(words))
        return folder
    from PIL import Image

    for i in range(240):
        Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize((96, 96)).save(folder / f"{i:03d}.png")
    return folder


class Prep:
    """A data set's folder and the one command that makes it and goes on with it."""

    def __init__(self, leg: Leg, root: Path, name: str, raw: Path):
        self.out, self.log = root / name, root / f"{name}.log"
        verb, *options = leg.settings
        size = "20000" if verb == "text" else "6000"
        self.argv = [verb, str(raw), f"--out={self.out}", "--splits=train=0.8,val=0.2", f"--shard-bytes={size}"]
        self.argv += ["--workers=2", *options]

    def start(self, death: forks.Death | None = None) -> forks.ForkServerProcess:
        """Start it, as two workers below one process."""
        return forks.start("data_prep", self.argv, self.log, {"GROUP_BYTES": "40000", "OMP_NUM_THREADS": "1"}, death)

    def done(self) -> int:
        """Files that were made so far, staged or final."""
        return sum(len(found_in(self.out, pattern)) for pattern in (".prep/stage/*.index", "*/*.tar"))

    def where(self) -> str:
        """What its folder shows of how far it is."""
        prep = self.out / ".prep"
        if (self.out / "manifest.json").exists():
            return "between manifest and clean-up" if prep.exists() else "after the end"
        if not (prep / "job.json").exists():
            return "starting"
        if found_in(self.out, "*/*.parquet"):
            return "second pass"
        return "planned" if found_in(prep, "plan*") else "first pass"


def prep_leg(leg: Leg, root: Path, rng: random.Random, _: Path) -> Found:
    """Disturb a data prep, and compare its end."""
    found, began = Found(leg), time.monotonic()
    raw = sources(root, leg.settings[0])
    whole, broken = Prep(leg, root, "whole", raw), Prep(leg, root, "broken", raw)
    process = whole.start()
    process.join(120)
    if process.exitcode:
        found.wrong.append(f"exit {process.exitcode}: {whole.log.read_text()[-300:]}")
        return found
    expected = contents(whole.out)
    while found.kills < leg.kills and not found.wrong:
        found.wrong += prep_round(broken, rng, found, expected)
        shutil.rmtree(broken.out)
    found.took_s = time.monotonic() - began
    return found


def prep_round(prep: Prep, rng: random.Random, found: Found, expected: dict[str, str]) -> list[str]:
    """Kill the making of a data set until it is made all the same, or there were kills enough; what is wrong then."""
    while found.kills < found.leg.kills and not (prep.out / "manifest.json").exists() and not found.wrong:
        kill_prep(prep, rng, found, expected)
    process = prep.start()
    process.join(120)
    if process.exitcode:
        return [f"exit {process.exitcode}: {prep.log.read_text()[-300:]}"]
    wrong = differing("data set", expected, contents(prep.out))
    command = [sys.executable, "-m", "data_prep", "verify", str(prep.out)]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True)
    return wrong if done.returncode == 0 else [*wrong, f"mbtrain-prep verify: {done.stderr}"]


def kill_prep(prep: Prep, rng: random.Random, found: Found, expected: dict[str, str]) -> None:
    """One start and one kill of the job, one of its workers, or all."""
    aim = rng.choice(["start", "work", "work", "work", "call", "end"])
    whom = rng.choice(["job", "worker", "all"]) if aim in ("start", "work") else "job"
    death = forks.Death(prep.out, "event", rng.randint(1, 12)) if aim in ("call", "end") else None
    tars = sum(name.endswith(".tar") for name in expected)
    before = prep.done()
    process = prep.start(death)
    pid = process.pid
    assert pid is not None

    def ended() -> bool:
        return process.exitcode is not None

    if aim == "start":
        time.sleep(rng.uniform(0, 0.5))
    elif aim == "end":
        wait_until(lambda: len(found_in(prep.out, "*/*.tar")) >= tars - 1, ended)
    else:
        more = before + rng.randint(1, 12)
        wait_until(lambda: prep.done() >= more, ended)
    if aim == "work":
        time.sleep(rng.uniform(0, 0.02))
    workers = []
    with contextlib.suppress(psutil.NoSuchProcess):
        workers = [child.pid for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]
    if death is not None:
        death.armed.value = 1
        wait_until(lambda: not alive(pid), ended, 20)
        victims = [pid]
    else:
        victims = {"job": [pid], "worker": workers[:1] or [pid], "all": [pid, *workers]}[whom]
        kill(victims)

    def status(other: int) -> int | str:
        if other == pid:
            process.join(5)
            return process.exitcode or 0
        return "gone"

    seen = ending([other for other in [pid, *workers] if other not in victims], status, ALONE_S)
    process.join(5)
    if pid in victims and process.exitcode != -signal.SIGKILL:
        if process.exitcode:
            found.wrong.append(f"ended by itself, exit {process.exitcode}; {prep.log.read_text()[-300:]}")
        return
    where = prep.where()
    if where == "after the end":
        return
    found.landed[where] += 1
    found.victims["worker" if victims[0] != pid else "job and workers" if len(victims) > 1 else "job"] += 1
    found.others += seen
    if any(code == "still there" for _, code in seen):
        found.lingering.append(f"{where}: after the kill of the {whom} another was still at work after {ALONE_S:.0f} s")
    for name, digest in contents(prep.out).items():
        if not name.startswith(".") and expected.get(name) != digest:
            found.wrong.append(f"after a kill ({where}): {name} is not what it is in the undisturbed data set")


# ---- the whole ----------------------------------------------------------------------------------------------------


def trial(kills: int, seed: int, only: str | None, root: Path) -> list[Found]:
    """All legs, one after the other, each in a folder of its own under `root`."""
    shards = root / "shards"
    raw = sources(root, "text")
    made = forks.start(
        "data_prep",
        ["text", str(raw), f"--out={shards}", "--splits=train=0.98,val=0.02", "--workers=1"],
        root / "prep.log",
        {},
    )
    made.join(60)
    assert made.exitcode == 0, (root / "prep.log").read_text()
    results = []
    for number, leg in enumerate(legs(kills, only)):
        folder = root / f"leg{number}"
        folder.mkdir()
        run = prep_leg if leg.kind == "prep" else train_leg
        result = run(leg, folder, random.Random(f"{seed} {leg.name}"), shards)
        results.append(result)
        say(row(result))
        for text in [*result.wrong[:6], *(f"{n} x {text}" for text, n in Counter(result.lingering).items())]:
            say(f"    {text}")
    return results


def row(found: Found) -> str:
    """A line of the table."""
    landed_ = ", ".join(f"{name} {n}" for name, n in found.landed.most_common())
    victims = ", ".join(f"{name} {n}" for name, n in found.victims.most_common())
    others = found.others
    slowest = f"within {max(s for s, _ in others):.1f} s" if others else "none"
    codes = Counter(str(code) for _, code in others)
    statuses = "".join(f", {n} x {code}" for code, n in codes.items())
    outcome = "equal" if not found.wrong else "DIFFERS"
    return (
        f"| {found.leg.name} | {found.kills} of {found.leg.kills} | {landed_} | {victims} | {slowest}{statuses} "
        f"| {outcome} | {found.took_s:.0f} s |"
    )


def say(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="kill, restart, compare")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["prep", "train", "resume", "launcher"])
    parser.add_argument("--keep", action="store_true", help="leave the folders where they are")
    options = parser.parse_args(argv)
    # In memory where there is such a folder: what a killed process has written stays either way, only syncing waits.
    memory = "/dev/shm" if "TMPDIR" not in os.environ and os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="chaos-", dir=memory))
    say(f"seed {options.seed}, {options.kills} kills, in {root}")
    say("| what | kills | where they landed | who was killed | others that ended by themselves | the end | took |")
    say("|---|---|---|---|---|---|---|")
    try:
        results = trial(options.kills, options.seed, options.only, root)
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    kills = sum(found.kills for found in results)
    late = sum(
        n
        for found in results
        if found.leg.kind != "prep"
        for where, n in found.landed.items()
        if where not in (STARTING, LOADED)
    )
    trained = sum(found.kills for found in results if found.leg.kind != "prep")
    wrong = sum(len(found.wrong) + len(found.lingering) for found in results)
    say(f"{kills} kills; {late} of {trained} in training after the first step of that start; {wrong} things wrong")
    # On a slow machine some come too late: their run had ended. Most must be made, or the trial shows little.
    return 0 if not wrong and 3 * kills >= 2 * options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
