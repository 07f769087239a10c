"""A start says what it takes, once, in parts that add up.

pytest tests/test_startup.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mbtrain import metrics
from mbtrain.startup import Startup
from tests import launch, tiny


def test_age_counts_from_the_begin_of_the_process() -> None:
    """Not from this module's import: what was imported before is what takes long."""
    program = "import time; time.sleep(0.5)\nfrom mbtrain.startup import age_s; print(age_s())"
    began_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], env=launch.environment(), capture_output=True, check=True)
    assert 0.5 <= float(done.stdout) <= time.monotonic() - began_s + 0.02


def test_parts_add_up_and_only_the_first_time_counts() -> None:
    startup = Startup()
    for part in ("imports", "step", "step"):
        startup.done(part)
        time.sleep(0.02)
    found = startup.metrics()
    assert set(found) == {"start/imports_s", "start/step_s", "start/in_all_s", "start/cpu_s"}
    assert found["start/in_all_s"] == pytest.approx(found["start/imports_s"] + found["start/step_s"], abs=0.002)
    assert found["start/step_s"] > 0.01


def test_a_training_reports_its_start_once_for_each_process(shards: Path, tmp_path: Path) -> None:
    tree = tiny.tree(data={"path": str(shards)}, train={"steps": 3}, eval={"every_steps": 4}, sample={"at_end": False})
    path, run = launch.config_file(tmp_path, tree), tmp_path / "run"
    launch.mbtrain(["train", str(path), f"--run={run}"], ranks=2)
    launch.mbtrain(["train", f"--resume={run}", "--train.steps=5", "--eval.every_steps=1000"])
    lines = [line for line in metrics.read(run / "metrics.jsonl") if "train/bpb" in line]
    assert [line["step"] for line in lines if "start/in_all_s" in line] == [1, 4]
    for line in (lines[0], lines[3]):
        parts = {key: value for key, value in line.items() if key.startswith("start/")}
        in_all = parts.pop("start/in_all_s")
        assert parts.pop("start/cpu_s") > 0
        assert sum(parts.values()) == pytest.approx(in_all, abs=0.01)
        assert min(parts.values()) >= 0
        assert [key[6:-2] for key in parts] == ["imports", "ranks_met", "data", "engine", "peak", "tracking", "step"]
    said = (run / "log.txt").read_text()
    assert said.count("first step ") == 2
    assert said.count("eval: validation every 4 steps takes some ") == 1  # the second was told to make it rarer
