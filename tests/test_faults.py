"""Faults injected into real runs, one by one. What each leads to stands in docs/failures.md.

pytest tests/test_faults.py
pytest tests/test_faults.py -m slow     a rank stopped, a tracking server that never answers
"""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mbtrain import checkpoint, metrics
from tests import faults, launch, tiny

LOST_AFTER_S = 5
Begin = Callable[..., list[launch.Forked]]
LONG = 100_000  # steps: until something ends it


def config(shards: Path, folder: Path, **sections: Any) -> Path:
    base: dict[str, Any] = {
        "data": {"path": str(shards)},
        "train": {"steps": LONG, "global_batch_size": 4, "zero_stage": 1, "lost_after_s": LOST_AFTER_S},
        "checkpoint": {"every_steps": 2, "keep_last": 50},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return launch.config_file(folder, tiny.tree(2, **base))


@pytest.fixture
def begin() -> Iterator[Begin]:
    """`launch.begin`; what is still there after the test is killed."""
    begun: list[launch.Forked] = []

    def start(args: list[str], ranks: int = 1) -> list[launch.Forked]:
        begun.extend(launch.begin(args, ranks))  # type: ignore[arg-type]
        return begun[-ranks:]

    yield start
    for process in begun:
        process.kill()


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")), default=0)


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


# ---- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint to damage in each way, and one more."""
    folder = tmp_path_factory.mktemp("saved")
    steps = 2 * len(faults.DAMAGE) + 2
    launch.mbtrain(["train", str(config(shards, folder, train={"steps": steps})), f"--run={folder / 'run'}"])
    return folder


def test_every_damaged_checkpoint_is_named_and_the_next_older_taken(saved: Path, tmp_path: Path) -> None:
    """All but the oldest are damaged, each in another way; gone on from the oldest, the run ends as it did."""
    whole, run = saved / "run", tmp_path / "run"
    shutil.copytree(whole, run)
    for i, (pattern, harm, _) in enumerate(faults.DAMAGE):
        harm(next((run / "checkpoints" / checkpoint.name_of(2 * i + 4)).glob(pattern)))
    halves = [run / ".status.json.0a.tmp", run / "samples" / ".step_0000000002.txt.0a.tmp", run / "plots" / ".a.tmp"]
    for half in halves:  # as a kill leaves them
        half.write_bytes(b"half")
    ended = launch.mbtrain(["train", str(saved / "config.yaml"), f"--run={run}", "--resume"])
    lines = [line for line in ended.stderr.splitlines() if "not used" in line]
    assert len(lines) == len(faults.DAMAGE)
    newest_first = reversed(list(enumerate(faults.DAMAGE)))
    for line, (i, (pattern, _, said)) in zip(lines, newest_first, strict=True):
        path = str(run / "checkpoints" / checkpoint.name_of(2 * i + 4))
        assert path in line
        assert said in line, line
        assert pattern.rstrip("*") in line
    assert f"going on from {run}/checkpoints/{checkpoint.name_of(2)} at step 2" in ended.stderr
    assert launch.losses(run) == launch.losses(whole)
    for path in sorted((run / "checkpoints").iterdir()):
        checkpoint.verify(path)
    assert not [half for half in halves if half.exists()]
    last = checkpoint.name_of(newest_step(whole))
    for file in (whole / "checkpoints" / last).glob("*.safetensors"):
        assert (run / "checkpoints" / last / file.name).read_bytes() == file.read_bytes()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(saved: Path, tmp_path: Path) -> None:
    """It is refused with what to do, and stays as it is."""
    run = tmp_path / "run"
    shutil.copytree(saved / "run", run)
    for path in (run / "checkpoints").iterdir():
        faults.flip(path / "checkpoint.json")
    before = contents(run)
    ended = launch.mbtrain(["train", str(saved / "config.yaml"), f"--run={run}", "--resume"], expect=2)
    assert len(ended.stderr.splitlines()) == 1
    assert f"{run}: none of its {len(faults.DAMAGE) + 1} checkpoints is whole" in ended.stderr
    assert f"remove {run}/checkpoints to begin anew" in ended.stderr
    assert contents(run) == before


KILLED_AT_THE_SAMPLE = """
import sys
from pathlib import Path
from mbtrain.cli import main
from tests import forks
death = forks.Death(Path(sys.argv[1]) / "samples")
death.armed.value = 1
forks.die_at(death)
main(sys.argv[2:])
"""


def test_a_kill_between_the_last_score_and_the_last_sample_loses_neither(saved: Path, tmp_path: Path) -> None:
    """A run that is done but for these makes both when it is taken up again."""
    whole, run = saved / "run", tmp_path / "run"
    command = ["train", str(saved / "config.yaml"), f"--run={run}", "--resume"]
    program = [sys.executable, "-c", KILLED_AT_THE_SAMPLE, str(run), *command]
    killed = subprocess.run(program, env=launch.environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert newest_step(run) == newest_step(whole)
    launch.mbtrain(command)
    scores = [
        [line["val/bpb"] for line in metrics.read(r / "metrics.jsonl") if "val/bpb" in line] for r in (run, whole)
    ]
    assert scores[0] == scores[1]
    assert contents(run / "samples") == contents(whole / "samples") != {}


def test_a_kill_before_the_last_clean_up_leaves_no_checkpoint_too_many(saved: Path, tmp_path: Path) -> None:
    """The run is over when it is taken up again and saves no more, so the start does what the last save did not."""
    run = tmp_path / "run"
    shutil.copytree(saved / "run", run)
    newest, *_ = sorted((path.name for path in (run / "checkpoints").iterdir()), reverse=True)
    launch.mbtrain(["train", f"--resume={run}", "--checkpoint.keep_last=1", "--checkpoint.keep_every_steps=10"])
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        checkpoint.name_of(10),
        checkpoint.name_of(20),
        newest,
    }


# ---- a full disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    try:
        with faults.small_disk(tmp_path / "disk", 8 << 20) as folder:
            yield folder
    except OSError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")


def test_a_full_disk_costs_checkpoints_but_not_the_run(disk: Path, shards: Path, tmp_path: Path, begin: Begin) -> None:
    """It goes on, says so, keeps the last good one and its metrics; with room again, it saves, and has lost no line."""
    run = disk / "run"
    settings = config(shards, tmp_path, checkpoint={"every_steps": 4, "keep_last": 1})
    processes = begin(["train", str(settings), f"--run={run}"], 2)
    launch.wait_for(lambda: newest_step(run), processes)
    ballast = faults.fill(disk)
    launch.wait_for(lambda: processes[0].said().count("NOT saved, the last good stays") >= 2, processes)
    good, problems = checkpoint.newest(run)
    assert good is not None
    assert not problems
    launch.wait_for(lambda: processes[0].said().count("lines wait in memory") >= 2, processes)
    assert "No space left on device" in processes[0].said()
    ballast.unlink()
    launch.wait_for(lambda: newest_step(run) > good.progress.step, processes)
    processes[1].send_signal(signal.SIGTERM)
    ended = launch.end(processes, timeout_s=60)
    assert ended.codes == [143, 143], ended.stderr
    steps = [line["step"] for line in metrics.read(run / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1)), "every step once, in order"
    found, problems = checkpoint.newest(run)
    assert found is not None
    assert not problems
    assert found.progress.step == steps[-1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [checkpoint.name_of(steps[-1])]


# ---- ranks that are gone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "gone", "limit_s"),
    [
        (signal.SIGKILL, 1, 15),
        pytest.param(signal.SIGKILL, 0, 15, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, LOST_AFTER_S + 15, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, LOST_AFTER_S + 15, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_gone_ends_the_others_with_its_name(
    shards: Path, tmp_path: Path, begin: Begin, sent: signal.Signals, gone: int, limit_s: float
) -> None:
    run = tmp_path / "run"
    processes = begin(["train", str(config(shards, tmp_path)), f"--run={run}"], 2)
    launch.wait_for(lambda: newest_step(run), processes)
    began = time.monotonic()
    processes[gone].send_signal(sent)
    other = processes[1 - gone]
    _, stderr = other.communicate(timeout=limit_s)
    took_s = time.monotonic() - began
    processes[gone].kill()  # a stopped one still holds the run
    processes[gone].communicate()
    assert other.returncode == 75, stderr
    assert re.search(rf"rank {gone} on \S+ \(pid {processes[gone].pid}\)", stderr), stderr
    assert took_s < limit_s
    for path in (run / "checkpoints").glob("step_*"):
        checkpoint.verify(path)
    again = launch.mbtrain(["train", f"--resume={run}", f"--train.steps={newest_step(run) + 2}"], ranks=2)
    assert "going on from" in again.stderr


# ---- shards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", [faults.flip, Path.unlink], ids=["flipped", "removed"])
def test_a_shard_that_changes_under_a_training_is_found_at_the_next_start(
    shards: Path, tmp_path: Path, begin: Begin, harm: Any
) -> None:
    """Contents are hashed at each start, not at each read: the run at work goes on, the next start is refused.

    (A shard that is cut off ends the run at once: tests/test_train.py.)
    """
    copied, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, copied)
    settings = config(copied, tmp_path)
    processes = begin(["train", str(settings), f"--run={run}"])
    launch.wait_for(lambda: newest_step(run), processes)
    tar = next((copied / "train").glob("*.tar"))
    harm(tar)
    at = newest_step(run)
    launch.wait_for(lambda: newest_step(run) > at + 4, processes)
    processes[0].send_signal(signal.SIGTERM)
    assert launch.end(processes).codes == [143]
    before = contents(run)
    ended = launch.mbtrain(["train", str(settings), f"--run={run}", "--resume"], expect=2)
    assert len(ended.stderr.splitlines()) == 1
    assert str(tar) in ended.stderr
    assert contents(run) == before


# ---- a tracking server --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tracking_server_that_never_answers_costs_no_step_and_no_metric(shards: Path, tmp_path: Path) -> None:
    """Median step with it and without, interleaved; afterwards `mbtrain sync` brings everything to another store."""
    medians: dict[bool, list[float]] = {True: [], False: []}
    with faults.silent_server() as (uri, accepted):
        for number in range(4):
            hung = number % 2 == 0
            run = tmp_path / f"run{number}"
            log = {"mlflow": True, "mlflow_uri": uri} if hung else {"mlflow": False}
            settings = config(shards, tmp_path, train={"steps": 400}, log=log, checkpoint={"every_steps": 100})
            # Rank 1 leaves at once, rank 0 gives the shipper its time: a wait that the watch must not take for a loss.
            launch.mbtrain(["train", str(settings), f"--run={run}"], ranks=2)
            lines = [line for line in metrics.read(run / "metrics.jsonl") if "perf/step_s" in line]
            medians[hung].append(statistics.median(line["perf/step_s"] for line in lines))
        assert accepted, "it was really asked"
    with_it, without = (statistics.median(medians[hung]) for hung in (True, False))
    assert with_it < 1.5 * without, medians
    run = tmp_path / "run0"
    store = tmp_path / "store.db"
    deadline = time.monotonic() + 90
    while True:  # the shipper goes on trying for a while after the run
        ended = launch.mbtrain(["sync", str(run), f"--uri=sqlite:///{store}"], expect=None)
        if ended.codes == [0] or time.monotonic() > deadline:
            break
        assert "a shipper is sending this run" in ended.stderr
        time.sleep(2)
    assert ended.codes == [0], ended.stderr
    with sqlite3.connect(store) as opened:
        got = opened.execute("SELECT step FROM metrics WHERE key = 'train/loss_nats' ORDER BY step").fetchall()
    assert [step for (step,) in got] == list(range(1, 401))
