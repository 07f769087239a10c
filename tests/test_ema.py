"""Averaged weights (optim.ema): what the average is, that training goes on as without it, and who uses which weights.

pytest tests/test_ema.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain import checkpoint, evaluation, export, metrics
from mbtrain.checkpoint import TRAINED, WEIGHT, Stored
from mbtrain.errors import ConfigError
from mbtrain.schedule import ema_decay
from tests import launch, tiny
from tests.test_guard import SPIKY
from tests.test_train import tree

STEPS, SHARE = 6, 0.3


def profile(share: float, updates: int) -> np.ndarray:
    """How much the weights after each update count in the average after so many, by the recursion itself."""
    counts = np.zeros(updates)
    for i in range(updates):
        kept = ema_decay(share, i + 1)
        counts *= kept
        counts[i] = 1 - kept
    return counts


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), st.integers(20, 100))
def test_half_of_the_average_lies_on_the_last_share_of_the_updates(parts: int, last: int) -> None:
    """However many there were."""
    counts = profile(1 / parts, parts * last)
    assert counts.sum() == pytest.approx(1), "nothing of the weights before the first update"
    assert counts[-last:].sum() == pytest.approx(0.5, abs=0.01)
    assert (np.diff(counts) > -1e-12).all(), "newer ones never count less"


def test_at_one_half_it_is_the_plain_mean() -> None:
    assert profile(0.5, 37) == pytest.approx(np.full(37, 1 / 37))
    assert ema_decay(0.1, 1) == 0


def averaging(shards: Path, **sections: Any) -> dict[str, Any]:
    wanted = {
        "train": {"steps": STEPS},
        "optim": {"ema": SHARE},
        "checkpoint": {"every_steps": 1, "keep_last": 100},
        "eval": {"every_steps": 2},
        "sample": {"every_steps": 3, "bytes": 8},
    }
    return tree(shards, **{name: {**wanted.get(name, {}), **sections.get(name, {})} for name in {**wanted, **sections}})


def stored(run: Path, step: int) -> Stored:
    return Stored(checkpoint.verify(run / "checkpoints" / checkpoint.name_of(step)))


def trained(run: Path, ranks: int, *options: str, config: Path) -> Path:
    launch.mbtrain(["train", str(config), f"--run={run}", *options], ranks=ranks)
    return run


@pytest.mark.parametrize(
    ("ranks", "stage", "precision"), [(2, 0, "bf16"), (1, 1, "fp32"), (2, 2, "bf16"), (2, 3, "fp32")]
)
def test_training_goes_on_as_without_it_and_the_average_is_that_of_its_weights(
    shards: Path, tmp_path: Path, ranks: int, stage: int, precision: str
) -> None:
    """Losses, weights and moments to the bit, with averages swapped in and out between; the average in float64."""
    path = launch.config_file(tmp_path, averaging(shards, train={"zero_stage": stage, "precision": precision}))
    run = trained(tmp_path / "with", ranks, config=path)
    without = trained(tmp_path / "without", ranks, "--optim.ema=None", config=path)
    assert launch.losses(run) == launch.losses(without)
    (ours, theirs) = (stored(at, STEPS) for at in (run, without))
    assert ours.averages
    assert not theirs.averages
    by_step = [stored(run, step) for step in range(1, STEPS + 1)]
    counts = profile(SHARE, STEPS)
    for name in ours.shapes:
        assert torch.equal(ours.whole(TRAINED, name), theirs.whole(WEIGHT, name)), name
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.whole(kind, name), theirs.whole(kind, name)), (kind, name)
        weights = (count * at.whole(TRAINED, name).double() for count, at in zip(counts, by_step, strict=True))
        torch.testing.assert_close(ours.whole(WEIGHT, name).double(), sum(weights), atol=1e-6, rtol=1e-6)
    scores = [line for line in metrics.read(run / "metrics.jsonl") if "val/bpb" in line]
    plain = [line["val/bpb"] for line in metrics.read(without / "metrics.jsonl") if "val/bpb" in line]
    assert [line["val/last_bpb"] for line in scores] == plain
    assert len(plain) == STEPS // 2
    for last, key in ((False, "val/bpb"), (True, "val/last_bpb")):
        assert evaluation.evaluate_run(run, batch=3, last=last)["bpb"] == pytest.approx(scores[-1][key], abs=1e-6)
    assert abs(scores[-1]["val/bpb"] - scores[-1]["val/last_bpb"]) > 1e-3, "the claim is about two models"


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, ZeRO-1, with averages; to be copied and cut."""
    folder = tmp_path_factory.mktemp("ema")
    config = launch.config_file(folder, averaging(shards, train={"zero_stage": 1}))
    return trained(folder / "run", 1, config=config)


def cut_at(step: int, whole: Path, run: Path) -> Path:
    """The run as it was after this step."""
    shutil.copytree(whole, run)
    for gone in range(step + 1, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / checkpoint.name_of(gone))
    return run


@pytest.mark.parametrize(("ranks", "stage", "noise"), [(1, 1, 0.0), (2, 3, 1e-4), (2, 0, 1e-4)])
def test_a_resumed_run_goes_on_with_its_average(
    whole: Path, tmp_path: Path, ranks: int, stage: int, noise: float
) -> None:
    """To the bit on as many ranks; on others within the noise of summation order."""
    run = cut_at(3, whole, tmp_path / "run")
    launch.mbtrain(["train", f"--resume={run}", f"--train.zero_stage={stage}"], ranks=ranks)
    ours, theirs = stored(run, STEPS), stored(whole, STEPS)
    for name in ours.shapes:
        for kind in (WEIGHT, TRAINED):
            torch.testing.assert_close(ours.whole(kind, name), theirs.whole(kind, name), atol=noise, rtol=0)
    assert launch.losses(run) == pytest.approx(launch.losses(whole), abs=noise)


def test_averaging_may_begin_or_end_at_a_resume(whole: Path, tmp_path: Path) -> None:
    """It begins at the weights; given up, training goes on from the last weights, not from the average."""
    ended = cut_at(3, whole, tmp_path / "ended")
    launch.mbtrain(["train", f"--resume={ended}", "--optim.ema=None"])
    assert launch.losses(ended) == launch.losses(whole)
    assert not stored(ended, STEPS).averages
    name = next(iter(stored(ended, STEPS).shapes))
    assert torch.equal(stored(ended, STEPS).whole(WEIGHT, name), stored(whole, STEPS).whole(TRAINED, name))
    for step in (5, 6):
        shutil.rmtree(ended / "checkpoints" / checkpoint.name_of(step))
    launch.mbtrain(["train", f"--resume={ended}", f"--optim.ema={SHARE}"])
    assert launch.losses(ended) == launch.losses(whole)
    expected = stored(whole, 4).whole(TRAINED, name).double()
    for step in (5, 6):
        expected += (1 - ema_decay(SHARE, step)) * (stored(whole, step).whole(TRAINED, name).double() - expected)
    torch.testing.assert_close(stored(ended, STEPS).whole(WEIGHT, name).double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_bad_step_does_not_count(shards: Path, tmp_path: Path, policy: str) -> None:
    """Skipped, the average stays; rewound, it is again what it was."""
    sections = {"train": {"steps": 16}, "guard": {"policy": policy, **SPIKY}, "eval": {"every_steps": None}}
    run = trained(tmp_path / "run", 1, config=launch.config_file(tmp_path, averaging(shards, **sections)))
    bad = {line["step"]: line for line in metrics.read(run / "metrics.jsonl") if "guard/bad_loss_nats" in line}
    assert bad, "the trial shows nothing without a spike"
    name = next(iter(stored(run, 1).shapes))
    averages: dict[int, Any] = {0: torch.zeros((), dtype=torch.float64)}
    for step in range(1, 17):
        before = int(bad.get(step, {}).get("guard/rewound_to", step - 1))
        averages[step] = averages[before]
        now = checkpoint.verify(run / "checkpoints" / checkpoint.name_of(step))
        if step not in bad:
            weights = Stored(now).whole(TRAINED, name).double()
            averages[step] = averages[before].lerp(weights, 1 - ema_decay(SHARE, now.progress.optimizer_steps))
        torch.testing.assert_close(Stored(now).whole(WEIGHT, name).double(), averages[step], atol=1e-6, rtol=1e-6)


def test_export_and_sample_take_the_average_unless_told_otherwise(whole: Path, tmp_path: Path) -> None:
    of_run = stored(whole, STEPS)
    for options, kind in (([], WEIGHT), (["--weights=last"], TRAINED)):
        out = tmp_path / kind
        launch.mbtrain(["export", str(whole), f"--out={out}", *options])
        for name, weight in export.load(out).state_dict().items():
            assert torch.equal(weight, of_run.whole(kind, name))
    drawn = []
    for which in ("averaged", "last"):
        launch.mbtrain(["sample", str(whole), f"--weights={which}", f"--out={tmp_path / which}", "--temperature=1"])
        drawn.append((tmp_path / which).read_bytes())
    assert drawn[0] != drawn[1]


def test_the_score_of_the_last_weights_is_not_kept_as_the_runs(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    said = launch.mbtrain(["eval", str(run), "--weights=last"]).stdout
    assert not (run / "eval_val_basic.json").exists()
    assert "averaged" not in said
    ended = launch.mbtrain(["eval", str(run), "--json"])
    assert (run / "eval_val_basic.json").exists()
    assert "averaged weights)" in ended.stdout
    assert launch.last_json(ended.stdout)["weights"] == "averaged"
    wrong = launch.mbtrain(["eval", str(run), "--weights=ema"], expect=2)
    assert "--weights: expected averaged or last, got 'ema'" in wrong.stderr


@pytest.mark.parametrize("wrong", [0.0, 0.999, 1.0])
def test_a_decay_for_each_step_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match=r"optim\.ema: got "):
        tiny.make(optim={"ema": wrong})


def test_schedule_free_averages_by_itself() -> None:
    with pytest.raises(ConfigError, match=r"optim\.ema: got 0\.1, expected None with optim\.name=schedule_free"):
        tiny.make(optim={"ema": 0.1, "name": "schedule_free", "schedule": "constant"})
