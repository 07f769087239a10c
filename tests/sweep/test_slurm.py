"""launch/sweep.slurm: what it starts, what it makes of notices and exit statuses. Slurm's commands are stand-ins.

pytest tests/sweep/test_slurm.py
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.test_scripts import make, requeued, slurm_job, stand_in, starts, wait_for

ARRAY = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.fixture
def venv(tmp_path: Path) -> str:
    program = f'#!/bin/sh\nexec {sys.executable} -m mbtrain "$@"\n'
    return str(make(tmp_path / "venv" / "bin" / "mbtrain", program).parents[1])


@pytest.mark.parametrize(("code", "share"), [(0, ""), (1, "1"), (2, "")])
def test_a_task_sweeps_and_ends_as_the_sweep_does(code: int, share: str, tmp_path: Path, venv: str) -> None:
    stand_in(tmp_path, [str(code)])
    script = ROOT / "launch" / "sweep.slurm"
    ended = slurm_job(tmp_path, script, ["c.yaml", "--seeds=0,1"], VENV=venv, PYTHONPATH="", SHARE=share, **ARRAY)
    assert (ended.wait(60), requeued(tmp_path)) == (code, False), (tmp_path / "said").read_text()
    (begun,) = starts(tmp_path)
    assert begun["args"] == ["sweep", "c.yaml", "--seeds=0,1", *(["--share=2/4"] if share else [])]


@pytest.mark.parametrize(
    ("number", "deed", "code", "again"),
    [
        (signal.SIGUSR1, "wait 143", 143, True),
        (signal.SIGUSR1, "wait 0", 0, False),  # it was at its end
        (signal.SIGTERM, "wait 143", 143, False),
    ],
)
def test_a_notice_is_handed_on_and_the_task_comes_back_only_to_make_room(
    number: signal.Signals, deed: str, code: int, again: bool, tmp_path: Path, venv: str
) -> None:
    stand_in(tmp_path, [deed])
    running = slurm_job(tmp_path, ROOT / "launch" / "sweep.slurm", ["c"], VENV=venv, PYTHONPATH="", **ARRAY)
    wait_for(lambda: (tmp_path / "waiting-0").exists(), running)
    running.send_signal(number)
    assert (running.wait(60), requeued(tmp_path)) == (code, again), (tmp_path / "said").read_text()
    assert (tmp_path / "told-0").read_text() == number.name
