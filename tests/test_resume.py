"""Going on somewhere else: on another number of ranks, at another ZeRO stage, in another precision or micro-batch.

A run of six steps is cut off after three, and each other shape goes on from there. Losses must agree with the run that
was not cut off within the noise of summation order; the data that was read must be the same to the row.

pytest tests/test_resume.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mbtrain import checkpoint
from tests import launch
from tests.test_train import tree

STEPS, CUT = 6, 3
ROWS = 12  # a multiple of 1, 2, 3 and 4 ranks
# fp32: other ranks add the same numbers in another order, and Adam divides by small second moments in the first steps.
NOISE = {"fp32": 2e-5, "bf16": 0.03, "autocast": 0.03}

# from ranks, stage, precision -> to ranks, stage, precision, micro-batch. Each number of ranks and each stage is left
# and reached, with odd cuts (3 ranks) in both directions.
SHAPES = [
    ((1, 0, "fp32"), (2, 1, "fp32", None)),
    ((1, 2, "fp32"), (3, 3, "fp32", 2)),
    ((2, 1, "fp32"), (4, 2, "fp32", 1)),
    ((2, 3, "fp32"), (1, 0, "fp32", 4)),
    ((3, 2, "fp32"), (2, 3, "fp32", 3)),
    ((3, 3, "fp32"), (4, 1, "fp32", None)),
    ((4, 0, "fp32"), (3, 2, "fp32", None)),
    ((4, 3, "fp32"), (1, 1, "fp32", 6)),
    ((2, 2, "bf16"), (3, 3, "fp32", None)),
    ((3, 1, "fp32"), (2, 1, "bf16", None)),
    ((2, 3, "bf16"), (1, 2, "autocast", None)),
    ((1, 0, "autocast"), (2, 0, "bf16", 3)),
]


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, ZeRO-0, fp32, from the first step to the last."""
    folder = tmp_path_factory.mktemp("undisturbed")
    launch.mbtrain(["train", str(config(shards, folder)), f"--run={folder / 'run'}"])
    return folder / "run"


def config(shards: Path, folder: Path) -> Path:
    settings = tree(
        shards,
        train={"steps": STEPS, "global_batch_size": ROWS, "zero_stage": 0},
        checkpoint={"every_steps": CUT},
        log={"mlflow": False},
    )
    return launch.config_file(folder, settings)


def options(stage: int, precision: str, micro: int | None) -> list[str]:
    return [f"--train.zero_stage={stage}", f"--train.precision={precision}", f"--train.micro_batch_size={micro}"]


def shape_name(shape: tuple[Any, ...]) -> str:
    return "-".join(map(str, shape))


@pytest.mark.parametrize(("before", "after"), SHAPES, ids=lambda shape: shape_name(shape))
def test_a_run_goes_on_in_any_other_shape(
    shards: Path,
    tmp_path: Path,
    undisturbed: Path,
    before: tuple[int, int, str],
    after: tuple[int, int, str, int | None],
) -> None:
    path, run = config(shards, tmp_path), tmp_path / "run"
    ranks, stage, precision = before
    # The schedule knows the last step, so the first part runs to the end as well, and its end is taken away.
    launch.mbtrain(["train", str(path), f"--run={run}", *options(stage, precision, None)], ranks=ranks)
    shutil.rmtree(run / "checkpoints" / checkpoint.name_of(STEPS))
    to_ranks, to_stage, to_precision, micro = after
    resumed = ["train", str(path), f"--resume={run}", *options(to_stage, to_precision, micro)]
    ended = launch.mbtrain(resumed, ranks=to_ranks)
    assert f"at step {CUT}" in ended.stderr
    noise = max(NOISE[precision], NOISE[to_precision])
    assert launch.losses(run) == pytest.approx(launch.losses(undisturbed), abs=noise)
    assert rows_read(run, STEPS) == rows_read(undisturbed, STEPS)
    assert rows_read(run, CUT) == rows_read(undisturbed, CUT) != rows_read(run, STEPS)


def rows_read(run: Path, step: int) -> tuple[int, int, int]:
    """The digest of all rows read up to a step, which knows no order and no ranks; and how far the data has come."""
    progress = checkpoint.verify(run / "checkpoints" / checkpoint.name_of(step)).progress
    return progress.rows_digest, progress.position, progress.bytes


def test_the_digest_tells_a_row_read_twice_or_skipped() -> None:
    import numpy as np

    from mbtrain.data.loader import row_digest

    rows = np.arange(40, dtype=np.int16).reshape(4, 10)
    whole = [row_digest(i, row) for i, row in enumerate(rows)]
    assert len(set(whole)) == 4
    assert row_digest(0, rows[1]) not in whole, "the number counts"
    assert all(0 <= digest < 2**64 for digest in whole)
    assert row_digest(3, rows[3].copy()) == whole[3]
