"""What launches and waits are measured from: real trainings, and the shares of their parts.

pytest tests/bench/test_bench_start.py
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mbtrain import config
from mbtrain.bench import launching
from mbtrain.errors import ConfigError, MbtrainError
from tests import tiny
from tests.bench.test_bench import tiny_file

start, everyday = import_module("mbtrain.bench.start"), import_module("mbtrain.bench.everyday")  # not the verbs


def test_start_takes_a_launch_apart(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians over the rounds after the first, by launcher; parts add up to the time since the launch."""
    asked: list[tuple[str, int]] = []

    def trained(settings: Any, options: Any, *, until: int, ranks: int, threads: int, launcher: str) -> Any:
        assert (settings.log.every_steps, until, threads) == (1, 1, 1)
        asked.append((launcher, ranks))
        late = [100.0, 1.0, 3.0, 2.0][(len(asked) - 1) // 2]
        line = {"step": 1, "time_unix_s": 10.0 + late, "start/imports_s": 0.4, "start/step_s": 0.2}
        return launching.Trained(10.0, [{**line, "start/in_all_s": 0.6, "start/cpu_s": 0.5}])

    monkeypatch.setattr(start, "trained", trained)
    path = tiny_file(tmp_path, shards)
    found = start.start(config=str(path), data="", launcher="deepspeed,none", ranks="3", rounds="3")
    assert asked == [("deepspeed", 3), ("none", 3)] * 4
    assert found["first_step_s"] == pytest.approx(2)
    assert found["by_launcher"]["none"] == pytest.approx(
        {"first_step_s": 2, "launcher_s": 1.4, "imports_s": 0.4, "step_s": 0.2, "cpu_s": 0.5}
    )
    assert 0 < found["help_cpu_s"] < 5
    with pytest.raises(ConfigError, match="--launcher: expected some of deepspeed, torchrun, none"):
        start.start(launcher="srun")


def test_a_real_training_on_one_rank_and_its_waits(tmp_path: Path, shards: Path) -> None:
    path = tiny_file(tmp_path, shards, log={"every_steps": 2, "mlflow": False})
    found = everyday.everyday(config=str(path), data="", steps="9", ranks="1")
    assert min(found[key] for key in ("step_s", "log_s", "save_s", "eval_s", "sample_s")) > 0
    assert found["log_share"] == pytest.approx(found["log_s"] / (2 * found["step_s"]))
    assert found["between_share"] == 0, "the configuration asks for none in between"
    assert 0 < found["end_share"] < 1


def test_shares_are_those_of_the_configurations_own_cadence() -> None:
    settings = tiny.make(train={"steps": 1000}, eval={"every_steps": 50}, checkpoint={"every_minutes": 1})
    found = {"step_s": 0.5, "log_s": 0.01, "save_s": 0.6, "eval_s": 5.0, "sample_s": 1.0}
    line = {"step": 10, "progress/flops": 1e6}
    shares = everyday._shares(settings.model_copy(update={"log": config.LogConfig(every_steps=10)}), found, [line])
    assert shares["log_share"] == pytest.approx(0.01 / 5)
    assert shares["save_share"] == pytest.approx(0.6 / 60)
    assert shares["between_share"] == pytest.approx(5 / 25)
    assert shares["end_share"] == pytest.approx(6 / 506)


def test_a_training_that_ends_early_is_said_in_one_line(tmp_path: Path, shards: Path) -> None:
    settings = config.load(tiny_file(tmp_path, shards))
    with pytest.raises(MbtrainError, match=r"ended early: mbtrain: data\.val_split: got 'none'"):
        launching.trained(settings, ["--data.val_split=none"], until=1, ranks=1, threads=1)
