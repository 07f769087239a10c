"""Sweeps that are really trained: killed and gone on with, shared by two runners, with trials that diverge or crash.

pytest tests/sweep/test_run.py
"""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mbtrain import metrics
from mbtrain import tracking as mbtrain_tracking
from mbtrain.errors import ConfigError, MbtrainError
from mbtrain.sweep import run as runner
from mbtrain.sweep import ship, state, trials
from mbtrain.sweep import spec as specs
from mbtrain.tracking import files
from tests import forks, launch, tiny
from tests.test_cli import run as command

WAIT_S = 120.0


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    """An experiment of half a second."""
    tree = tiny.tree(stages=1, data={"path": str(shards)}, checkpoint={"every_minutes": None})
    return launch.config_file(tmp_path, tree)


def wait_for(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def sweep(config: Path, folder: Path, retry: bool = False, **options: str) -> dict[str, Any]:
    """A sweep in this process."""
    given = {key.replace("__", "."): value for key, value in options.items()}
    return runner.sweep(specs.read(config, given), folder, retry=retry)


def begin(config: Path, folder: Path, **options: str) -> Any:
    """`mbtrain sweep` in another process."""
    args = ["sweep", str(config), f"--out={folder}", *(f"--{key.replace('__', '.')}={v}" for key, v in options.items())]
    return forks.start("mbtrain", args, folder.parent / "said.txt", launch.environment())


def steps(run: Path) -> int:
    last = metrics.last(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else None
    return last["step"] if last else 0


def begun(run: Path) -> int:
    """How many processes have trained it."""
    return (run / "output.txt").read_text().count("M parameters (")


def stands(folder: Path) -> dict[str, str]:
    return {trial.name: trial.status for trial in trials(folder)}


def test_a_sweep_that_is_told_to_stop_saves_and_goes_on_where_it_was(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "swept"
    options = {"grid__optim__lr": "1e-3,2e-3", "train__steps": "90", "jobs": "1"}
    cut, never = (folder / "runs" / f"lr{lr}_s0" for lr in ("1e-3", "2e-3"))

    def stop() -> None:
        wait_for(lambda: steps(cut) > 2)
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # the runner's own
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    made = sweep(config, folder, **options)
    thread.join()
    reached = steps(cut)
    assert 2 < reached < 90
    assert list(stands(folder).values()) == ["stopped", "waiting"]
    assert (made["finished"], made["left"], made["unfinished"], made["stopped"]) == (0, 2, 2, True)

    made = sweep(folder, folder)
    assert (made["finished"], made["left"], made["unfinished"], made["stopped"]) == (2, 0, 0, False)
    assert [begun(run) for run in (cut, never)] == [2, 1]
    assert f"going on from {cut}/checkpoints/step_{reached:010d}" in (cut / "output.txt").read_text()
    for trial in trials(folder):
        told = [line["step"] for line in metrics.read(trial.run / "metrics.jsonl") if "train/bpb" in line]
        assert told == list(range(1, 91))
        assert (trial.status, trial.values["optim.lr"]) == ("finished", re.findall("lr(.*)_s", trial.name)[0])
    scores = {trial.name: state.score(trial.run) for trial in trials(folder)}
    best = min(scores, key=lambda name: scores[name] or 9.0)
    assert made["best"] == {"name": best, "val/bpb": scores[best]}
    assert sweep(folder, folder)["finished"] == 2
    assert [begun(run) for run in (cut, never)] == [2, 1]  # what is done is not done again


def test_of_two_runners_one_is_killed_and_the_other_takes_over(config: Path, tmp_path: Path) -> None:
    """Nothing is trained twice at once. The killed one's trial notices, and saves; the other goes on with it."""
    folder = tmp_path / "swept"
    options = {"grid__optim__lr": "1e-3,2e-3,3e-3,4e-3", "train__steps": "24", "jobs": "1"}
    other = begin(config, folder, **options)
    wait_for(lambda: steps(folder / "runs" / "lr1e-3_s0") > 0)

    def kill() -> None:
        wait_for(lambda: [*map(state.is_held, folder.glob("runs/*"))].count(True) == 2)
        os.kill(other.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    made = sweep(config, folder, **options)
    thread.join()
    other.join(WAIT_S)
    assert other.exitcode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    assert list(stands(folder).values()) == ["finished"] * 4, (folder / "log.txt").read_text()
    assert (made["failed"], made["left"]) == (0, 0)
    starts = {trial.name: begun(trial.run) for trial in trials(folder)}
    again = [name for name, count in starts.items() if count == 2]
    assert sum(starts.values()) == 4 + len(again) <= 5
    for name in again:
        assert "going on from" in (folder / "runs" / name / "output.txt").read_text()
    ended = re.findall(r"/\d+ · (lr\S+) · [\d.]+ bits", (folder / "log.txt").read_text())
    assert len(set(ended)) == len(ended) >= 3  # each said once, by the one that trained it to its end


def kill_trials(folder: Path, name: str, times: int) -> threading.Thread:
    """Kill the process of a trial as often once it has made a step."""

    def kill() -> None:
        for _ in range(times):
            had = steps(folder / "runs" / name)
            wait_for(lambda: steps(folder / "runs" / name) > had and multiprocessing.active_children())  # noqa: B023
            for process in multiprocessing.active_children():
                if process.name == f"trial {name}":
                    process.kill()
                    process.join()

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_trials_that_crash_or_diverge_are_noted_and_the_others_go_on(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "swept"
    # 1e30 is not finite at once, 30 makes the loss rise without end, 1e-3 is killed once and 2e-3 each time.
    options = {"grid__optim__lr": "1e30,30,1e-3,2e-3,3e-3", "train__steps": "16", "jobs": "1"}
    options |= {"optim__schedule": "constant", "train__gradient_clipping": "0"}

    def killing() -> None:
        kill_trials(folder, "lr1e-3_s0", 1).join()
        kill_trials(folder, "lr2e-3_s0", 2).join()

    thread = threading.Thread(target=killing)
    thread.start()
    made = sweep(config, folder, **options)
    thread.join()
    assert list(stands(folder).values()) == ["diverged", "diverged", "finished", "failed", "finished"]
    assert (made["diverged"], made["failed"], made["finished"]) == (2, 1, 2)
    assert made["best"]["name"] in ("lr1e-3_s0", "lr3e-3_s0")
    infinite, high, killed_once, killed_twice, _ = (state.note_of(trial.run) for trial in trials(folder))
    assert "not finite" in infinite["reason"] or "bpb" in infinite["reason"]
    assert "train/bpb rose" in high["reason"] or "val/bpb is" in high["reason"]
    assert (killed_once["status"], killed_once["crashes"]) == ("crashed", 1)
    assert killed_twice["crashes"] == state.MOST_CRASHES
    assert killed_twice["reason"].startswith("SIGKILL, ")
    assert json.loads((folder / "runs" / "lr2e-3_s0" / "status.json").read_text())["status"] == "FAILED"

    again = sweep(folder, folder)  # what is over is over
    assert (again["failed"], again["diverged"], begun(folder / "runs" / "lr2e-3_s0")) == (1, 2, 2)
    mended = sweep(folder, folder, retry=True)  # it goes on from where it was saved, or from its start
    assert (mended["failed"], mended["diverged"], mended["finished"]) == (0, 2, 3)


def test_a_folder_may_grow_and_not_change_and_be_shared_out(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "swept"
    args = ["sweep", str(config), f"--out={folder}", "--grid.optim.lr=1e-3", "--train.steps=1"]
    assert command(*args) == 0
    with pytest.raises(ConfigError, match=r"trial lr1e-3_s0 is not in this sweep; a sweep .* may only grow"):
        sweep(config, folder, grid__optim__lr="2e-3", train__steps="1")
    with pytest.raises(ConfigError, match=r"optim.warmup_steps: got 1, expected 2 in trial lr1e-3_s0"):
        sweep(config, folder, grid__optim__lr="1e-3", train__steps="1", optim__warmup_steps="1")
    capfd.readouterr()
    assert command(*args, "--seeds=0,1", "--share=0/2") == 0  # whose trial is done
    assert list(stands(folder).values()) == ["finished", "waiting"]
    assert command(*args, "--seeds=0,1", "--json", "--share=1/2") == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (figures["trials"], figures["finished"], figures["folder"]) == (2, 2, str(folder))
    assert begun(folder / "runs" / "lr1e-3_s0") == 1
    assert yaml.safe_load((folder / "sweep.yaml").read_text())["seeds"] == ["0", "1"]
    assert yaml.safe_load((folder / "runs" / "lr1e-3_s1" / "config.yaml").read_text())["log"]["parent"] == "tiny"


def test_a_bad_end_is_noted_although_somebody_looks_at_the_trial(tmp_path: Path) -> None:
    """Who asks whether a trial is running holds its lock for a moment."""
    (tmp_path / state.LOCK).touch()
    looking = os.open(tmp_path / state.LOCK, os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_SH)
    timer = threading.Timer(0.1, os.close, (looking,))
    timer.start()
    state.note_bad_end(tmp_path, "diverged", "it rose")
    timer.join()
    assert state.status(tmp_path) == "diverged"
    with state.held(tmp_path / state.LOCK):  # by another trial's process, which has taken it up
        state.note_bad_end(tmp_path, "failed", "it crashed")
    assert state.status(tmp_path) == "diverged"


def test_a_loss_that_is_no_number_is_nobodys_best(tmp_path: Path, config: Path) -> None:
    """Of a trial that was killed after its last line, before it could be noted."""
    plan = specs.planned(specs.read(config, {"grid.optim.lr": "1,2"}))
    for trial, loss in zip(plan, (math.nan, 3.0), strict=True):
        run = state.run_of(tmp_path, trial.name)
        run.mkdir(parents=True)
        metrics.append(run / "metrics.jsonl", 1, {"val/bpb": loss})
        (run / "status.json").write_text('{"status": "FINISHED"}')
    assert runner.figures(plan, tmp_path)["best"] == {"name": "lr2_s0", "val/bpb": 3.0}


def test_a_folder_that_cannot_be_made_is_one_line(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("sweep", str(config), f"--out={config}/swept", "--train.steps=1") == 2
    assert f"--out={config}/swept: cannot be written (Not a directory)" in capfd.readouterr().err


def test_nothing_starts_when_any_trial_has_no_data(config: Path, tmp_path: Path) -> None:
    with pytest.raises(MbtrainError, match=r"nowhere.*no manifest"):
        sweep(config, tmp_path / "swept", grid__data__path=f"{tmp_path}/nowhere")
    with pytest.raises(ConfigError, match=r"data.val_split: got 'no', expected one of train, val"):
        sweep(config, tmp_path / "swept", grid__data__val_split="val,no")
    assert not (tmp_path / "swept").exists()
    with pytest.raises(ConfigError, match=r"expected the folder of a sweep, found no sweep\.yaml"):
        trials(tmp_path)


def test_one_process_sends_every_trial_once(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trials start no shipper of their own; what MLflow did not take is sent by the next."""
    folder = tmp_path / "swept"

    def unable(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no processes left")

    monkeypatch.setattr(mbtrain_tracking, "spawn", unable)
    sweep(config, folder, seeds="0,1", train__steps="1", log__mlflow="true", log__experiment="mine")
    assert "MLflow gets nothing for now (no processes left)" in (folder / "log.txt").read_text()
    assert ship.unsent(folder)
    for trial in trials(folder):
        request = files.read_json(trial.run / "tracking.json") or {}
        assert (request["experiment"], request["run_name"], request["parent"]) == ("mine", trial.name, "tiny")
        assert not (trial.run / "mlflow.log").exists()

    sent: list[str] = []

    def sync(run: Path) -> None:
        sent.append(run.name)
        if len(sent) == 2:
            raise MbtrainError("MLflow is away")

    monkeypatch.setattr(mbtrain_tracking, "sync", sync)
    monkeypatch.setattr(ship, "PAUSE_S", 0.01)
    reading, writing = os.pipe()
    os.close(writing)  # the runner has ended
    assert ship.follow(folder, reading) == 0
    assert sent == ["s0", "s1", "s1"]
    assert not ship.unsent(folder)
    monkeypatch.setattr(mbtrain_tracking, "sync", lambda run: (_ for _ in ()).throw(MbtrainError("away")))
    monkeypatch.setattr(ship, "DEADLINE_S", 0.05)
    (folder / ".mlflow.json").unlink()
    assert ship.follow(folder, reading) == 1
    os.close(reading)


def test_the_process_that_sends_ends_with_the_runner(config: Path, tmp_path: Path) -> None:
    """By its stdin, which closes when the runner dies, however that is."""
    folder = tmp_path / "swept"
    sweep(config, folder, train__steps="1")
    started = mbtrain_tracking.spawn(["mbtrain.sweep", str(folder)], tmp_path / "said.txt", stdin=subprocess.PIPE)
    assert started.stdin is not None
    time.sleep(0.2)
    assert started.poll() is None
    started.stdin.close()
    assert started.wait(WAIT_S) == 0, (tmp_path / "said.txt").read_text()
