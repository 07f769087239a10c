"""Bad steps: which they are (pure), and what all ranks then do (real runs).

pytest tests/test_guard.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbtrain import checkpoint, guard, metrics
from mbtrain.config import GuardConfig
from tests import launch
from tests.test_train import same_end, tree

LOOKING = GuardConfig(spike=4.0, window=8)


def test_a_loss_far_above_the_last_ones_is_a_spike() -> None:
    recent = [1.0, 1.2, 0.8, 1.0]  # mean 1, deviation 0.1414
    assert guard.spike(LOOKING, recent, 1.56) is None
    said = guard.spike(LOOKING, recent, 1.57)
    assert said is not None
    assert "1.5700 nats" in said
    assert "the last 4, 1.0000" in said
    assert guard.spike(LOOKING, recent, 0.0) is None, "a fall is none"


def test_a_step_without_targets_has_no_loss_to_look_at() -> None:
    recent = [1.0, 1.2, 0.8, 1.0]
    assert guard.spike(LOOKING, recent, float("nan")) is None
    assert guard.remembered(LOOKING, recent, float("nan")) == recent


def test_nothing_is_a_spike_without_the_setting_or_before_half_a_window() -> None:
    assert guard.spike(GuardConfig(), [1.0] * 64, 1e9) is None
    assert guard.spike(LOOKING, [1.0] * 3, 1e9) is None
    assert guard.spike(LOOKING, [1.0] * 4, 1e9) is not None


@given(st.lists(st.floats(0, 20), max_size=40))
def test_what_is_remembered_is_the_end_of_all_losses(losses: list[float]) -> None:
    recent: list[float] = []
    for loss in losses:
        recent = guard.remembered(LOOKING, recent, loss)
    assert recent == losses[-8:]
    assert guard.remembered(GuardConfig(), losses, 1.0) == []


def test_bad_steps_are_forgotten_after_a_window() -> None:
    bad: list[int] = []
    for step in (1, 2, 9, 10, 30):
        bad = guard.with_bad(LOOKING, bad, step)
    assert guard.with_bad(LOOKING, [1, 2], 9) == [2, 9]
    assert bad == [30]


# Some rows of this data set are noise, and a sudden ten-fold learning rate is not needed: a policy is tried on a spike
# bound so tight that ordinary steps pass it.
SPIKY: dict[str, Any] = {"spike": 0.01, "window": 4, "limit": 100}


@pytest.mark.parametrize("policy", ["skip", "rewind"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_ranks_step_over_a_spike_alike(shards: Path, tmp_path: Path, policy: str, stage: int) -> None:
    """The run goes on to its end; weights, steps and data stand where the policy says, and metrics tell of it."""
    if (policy == "skip") == (stage == 3):
        pytest.skip("each policy at two or three stages is enough")
    settings = tree(
        shards,
        train={"steps": 14, "zero_stage": stage, "precision": "bf16" if stage == 2 else "fp32"},
        guard={"policy": policy, **SPIKY},
        checkpoint={"every_steps": 2, "keep_last": 100},
    )
    run = tmp_path / "run"
    ended = launch.mbtrain(["train", str(launch.config_file(tmp_path, settings)), f"--run={run}"], ranks=2)
    lines = metrics.read(run / "metrics.jsonl")
    bad = [line for line in lines if "guard/bad_loss_nats" in line]
    assert bad, "the trial shows nothing without a spike"
    steps = [line["step"] for line in lines if "train/loss_nats" in line]
    assert steps == list(range(1, 15)), "every step is there once, bad ones too"
    found, _ = checkpoint.newest(run)
    assert found is not None
    progress = found.progress
    assert progress.step == 14
    assert progress.position == 14 * 8 * 32, "the data of a bad step is stepped over"
    assert f"step {bad[0]['step']} · the loss of" in ended.stderr
    if policy == "skip":
        assert progress.optimizer_steps == 14 - len(bad)
        assert "no update" in ended.stderr
        return
    first = bad[0]
    to = int(first["guard/rewound_to"])
    assert to == (first["step"] - 1) // 2 * 2, "the last checkpoint before it"
    for line in bad:
        if line["step"] % 2:
            continue
        # Saved right after the rewind: weights and moments are those of the checkpoint that was put back, to the bit.
        back = checkpoint.Stored(_at(run, int(line["guard/rewound_to"])))
        after = checkpoint.Stored(_at(run, line["step"]))
        assert (
            _at(run, line["step"]).progress.optimizer_steps
            == _at(run, int(line["guard/rewound_to"])).progress.optimizer_steps
        )
        for name in back.shapes:
            for kind in checkpoint.KINDS:
                assert torch.equal(back.whole(kind, name), after.whole(kind, name)), (kind, name)
        break
    else:
        pytest.fail("no bad step was a saved one; change the data's seed")


def _at(run: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.verify(run / "checkpoints" / checkpoint.name_of(step))


@pytest.mark.parametrize(("policy", "said"), [("stop", "spikes"), ("skip", "the last of guard.limit = 2 bad steps")])
def test_stopping_is_one_line_on_all_ranks(shards: Path, tmp_path: Path, policy: str, said: str) -> None:
    settings = tree(shards, train={"steps": 40}, guard={**SPIKY, "window": 20, "policy": policy, "limit": 2})
    run = tmp_path / "run"
    path = launch.config_file(tmp_path, settings)
    ended = launch.mbtrain(["train", str(path), f"--run={run}"], ranks=2, expect=2)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("mbtrain: ")]
    assert said in line
    assert "All ranks stopped before the update" in line
    assert json.loads((run / "status.json").read_text())["status"] == "FAILED"


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_resumed_run_meets_the_same_spikes(shards: Path, tmp_path: Path, policy: str) -> None:
    """The losses that spikes are measured by are part of the state; everything after step 7 is lost and made again."""
    settings = tree(shards, train={"steps": 16}, guard={"policy": policy, **SPIKY}, checkpoint={"every_steps": 7})
    path = launch.config_file(tmp_path, settings)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch.mbtrain(["train", str(path), f"--run={whole}"])
    shutil.copytree(whole, broken)
    for step in (14, 16):
        shutil.rmtree(broken / "checkpoints" / checkpoint.name_of(step))
    launch.mbtrain(["train", str(path), f"--resume={broken}"])
    bad = [line["step"] for line in metrics.read(whole / "metrics.jsonl") if "guard/bad_loss_nats" in line]
    assert any(step > 7 for step in bad)
    same_end(whole, broken, 16, files=2)
