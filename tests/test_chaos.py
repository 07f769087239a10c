"""The short form of the chaos trial; the long one: `pytest tests/test_chaos.py -m slow`, or python -m tests.chaos."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests import launch


@pytest.mark.parametrize(("kills", "seed"), [(10, 0), pytest.param(100, 1, marks=pytest.mark.slow)])
def test_killed_again_and_again_the_end_is_the_same(kills: int, seed: int) -> None:
    """Data prep, and training under ZeRO 1, 2 and 3, each kill followed by the same command."""
    command = [sys.executable, "-m", "tests.chaos", f"--kills={kills}", f"--seed={seed}"]
    done = subprocess.run(command, cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counted = re.search(r"(\d+) kills; (\d+) of (\d+) in training after the first step", done.stdout)
    assert counted, done.stdout
    made, late, training = map(int, counted.groups())
    assert 3 * made >= 2 * kills, f"too few came before the end\n{done.stdout}"
    assert 2 * late >= training, f"too many at the start to show anything\n{done.stdout}"
