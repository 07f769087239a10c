"""Optimizers as they are used: every ZeRO stage, several ranks, resume, a bad step.

pytest tests/optim
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mbtrain import checkpoint, evaluation, metrics
from mbtrain.checkpoint import Stored
from mbtrain.errors import CheckpointError
from tests import launch
from tests.test_train import tree

STEPS, CUT = 6, 3
NAMES = ("normuon", "schedule_free")  # normuon has all that muon has
# Ranks add gradients in another order; what is nearly 0 is made as large as the rest by Newton-Schulz and by Adam.
NOISE = {"fp32": 1e-3, "bf16": 0.05}


def config(shards: Path, folder: Path, name: str, **train: Any) -> Path:
    settings = tree(
        shards,
        train={"steps": STEPS, "global_batch_size": 12, "zero_stage": 0, **train},
        checkpoint={"every_steps": CUT},
        optim={"name": name, "lr": 5e-3, "schedule": "constant"},
        eval={"every_steps": 2},
    )
    return launch.config_file(folder, settings)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One rank, ZeRO-0, fp32, by optimizer."""
    runs = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        launch.mbtrain(["train", str(config(shards, folder, name)), f"--run={folder / 'run'}"])
        runs[name] = folder / "run"
    return runs


def scores(run: Path) -> list[float]:
    return [line["val/bpb"] for line in metrics.read(run / "metrics.jsonl") if "val/bpb" in line]


def state(run: Path, step: int) -> dict[tuple[str, str], torch.Tensor]:
    """Everything in a checkpoint, by kind and name."""
    stored = Stored(checkpoint.verify(run / "checkpoints" / checkpoint.name_of(step)))
    return {(kind, name): stored.whole(kind, name) for kind, name in stored._stretches}


@pytest.mark.parametrize(
    ("name", "stage", "precision", "ranks"),
    [
        ("normuon", 1, "fp32", 3),
        ("normuon", 3, "fp32", 2),
        ("normuon", 2, "bf16", 2),
        ("schedule_free", 1, "bf16", 2),
        ("schedule_free", 3, "fp32", 2),
    ],
)
def test_zero_stages_agree_with_one_rank(
    shards: Path, tmp_path: Path, undisturbed: dict[str, Path], name: str, stage: int, precision: str, ranks: int
) -> None:
    """The losses, what is validated in between, what is kept of every element; and one rank goes on from it."""
    run, expected = tmp_path / "run", undisturbed[name]
    path = config(shards, tmp_path, name, zero_stage=stage, precision=precision)
    launch.mbtrain(["train", str(path), f"--run={run}"], ranks=ranks)
    noise = NOISE[precision]
    assert launch.losses(run) == pytest.approx(launch.losses(expected), abs=noise)
    assert launch.losses(run)[-1] < launch.losses(run)[0] - 0.1, "it trains"
    assert scores(run) == pytest.approx(scores(expected), abs=noise)
    said = evaluation.evaluate_run(run, batch=3)["bpb"]
    assert said == pytest.approx(scores(run)[-1], abs=1e-6 if precision == "fp32" else 0.02)
    if precision != "fp32":
        return
    mine, theirs = state(run, CUT), state(expected, CUT)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-3, rtol=0.02, msg=lambda text, key=key: f"{key}: {text}")
    shutil.rmtree(run / "checkpoints" / checkpoint.name_of(STEPS))
    launch.mbtrain(["train", str(config(shards, tmp_path, name)), f"--resume={run}"])
    assert scores(run) == pytest.approx(scores(expected), abs=noise)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_bitwise_the_same(
    shards: Path, tmp_path: Path, undisturbed: dict[str, Path], name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed[name], run)
    shutil.rmtree(run / "checkpoints" / checkpoint.name_of(STEPS))
    ended = launch.mbtrain(["train", str(config(shards, tmp_path, name)), f"--resume={run}"])
    assert f"at step {CUT}" in ended.stderr
    assert launch.losses(run) == launch.losses(undisturbed[name])
    assert scores(run) == scores(undisturbed[name])
    mine, theirs = state(run, STEPS), state(undisturbed[name], STEPS)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_averages_are_evaluated_and_another_point_is_trained(undisturbed: dict[str, Path]) -> None:
    kept = state(undisturbed["schedule_free"], STEPS)
    apart = [
        name for kind, name in kept if kind == "weight" and not torch.equal(kept[kind, name], kept["trained", name])
    ]
    assert len(apart) == sum(kind == "weight" for kind, _ in kept)
    for name in apart:  # y = (1 - beta) z + beta x
        expected = 0.1 * kept["z", name] + 0.9 * kept["weight", name]
        torch.testing.assert_close(kept["trained", name], expected, atol=1e-6, rtol=1e-5)


def test_another_optimizers_run_is_refused(shards: Path, tmp_path: Path, undisturbed: dict[str, Path]) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed["normuon"], run)
    ended = launch.mbtrain(["train", str(config(shards, tmp_path, "adamw")), f"--resume={run}"], expect=2)
    assert "optim.name: got adamw, expected normuon" in ended.stderr
    found, _ = checkpoint.newest(run)
    assert found is not None
    with pytest.raises(CheckpointError, match=r"another optimizer's: of .* expected exp_avg, exp_avg_sq for .*=adamw"):
        Stored(found).must_hold(dict.fromkeys(found.shapes, ("exp_avg", "exp_avg_sq")), "adamw")
