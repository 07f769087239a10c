"""Ranks that share rows compute what one rank computes alone: the same loss, the same gradients, the same training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mbtrain.data.opening import open_sources
from mbtrain.engine import Ranks, share_rows
from mbtrain.evaluate import score
from mbtrain.model.decode import Decoder
from mbtrain.model.layers import attend
from mbtrain.model.sequence import WHOLE, Part
from tests import launch, tiny
from tests.model.sequence_ranks import CASES, LAYERS
from tests.model.test_megabyte import randomised


def alone(*args: Any) -> Tensor:
    raise AssertionError("an exchange with other ranks")


def test_ranks_that_share_rows_have_the_loss_and_gradients_of_one_rank(tmp_path: Path) -> None:
    """Four real processes over gloo, two and four to a row; with two, two groups have rows of their own."""
    out = tmp_path / "found.json"
    ended = launch.end(launch.begin([str(out)], ranks=4, module="tests.model.sequence_ranks"))
    assert ended.codes == [0] * 4, ended.stderr
    found = json.loads(out.read_text())
    trained = {name: case for name, case in found.items() if name.startswith("zero")}
    cases = {name: case for name, case in found.items() if name not in trained}
    assert len(cases) == 3 * len(CASES) + 2
    for name, case in cases.items():
        exact = name.endswith("float64")
        assert case["loss"] <= (1e-12 if exact else 1e-6), name
        assert case["gradient"] <= (1e-12 if exact else 1e-5), name
        assert case["logits"] <= (1e-12 if exact else 1e-5), name
        assert case["evaluation"] <= (1e-12 if exact else 1e-5), name
        assert case["without_gradient"] == 0, f"{name}: ZeRO's sums need all gradients on all ranks"
        first, *others = case["exchanged"]
        assert all(other == first for other in others), f"{name}: every rank exchanges the same, in one order"
        # Queries, keys, values and the result, of the coarsest stage alone: forward, backward and where recomputed.
        assert len(first) == LAYERS * 4 * (3 if name.endswith("checkpointing") else 2), name
    assert set(trained) == {"zero 1", "zero 2", "zero 3"}
    for name, case in trained.items():
        assert case["loss"] <= 1e-6, name
        assert case["norm"] <= 1e-5, name


def test_parts_are_disjoint_and_cover_everything() -> None:
    for parts in (1, 2, 3, 4):
        columns = [list(range(12))[Part(i, parts).columns(12)] for i in range(parts)]
        assert [i for part in columns for i in part] == list(range(12))
        assert {len(part) for part in columns} == {12 // parts}
    assert WHOLE.columns(7) == slice(0, 7)
    with pytest.raises(ValueError, match="10 columns, expected a multiple of the 4 parts"):
        Part(0, 4).columns(10)


def test_one_rank_a_row_changes_nothing_and_needs_no_other() -> None:
    model = randomised(tiny.make())
    share_rows(model, Ranks(0, 1, 0, 1, torch.device("cpu")), 1)
    assert model.part == WHOLE
    assert all(block.attn.attend is attend for stage in model.stages for block in stage.transformer.blocks)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="2 heads, 4 parts"):
        randomised(tiny.make()).share(Part(0, 4), alone)
    shifted = randomised(tiny.make(model={**tiny.tree()["model"], "block": {"token_shift": True}}))
    with pytest.raises(ValueError, match="token_shift"):
        shifted.share(Part(0, 2), alone)
    model = randomised(tiny.make())
    model.share(Part(0, 2), alone)
    with pytest.raises(ValueError, match="rows of 12 bytes in patches of 4: no 2 equal parts"):
        model(torch.zeros((1, 12), dtype=torch.int64))


@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_generation_is_whole_on_every_rank(preset: str) -> None:
    ids = torch.randint(0, 256, (1, 21))
    expected = randomised(tiny.make(2, preset))(ids)
    model = randomised(tiny.make(2, preset))
    model.share(Part(1, 2), alone)
    decoder = Decoder(model, 1)
    logits = [decoder.feed(ids[:, :0]), decoder.feed(ids[:, :13])]
    logits += [decoder.feed(ids[:, i : i + 1]) for i in range(13, 20)]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, [0, *range(13, 21)]], atol=1e-9, rtol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_score_is_the_sum_over_parts_of_columns(shards: Path, parts: int) -> None:
    settings = tiny.make(data={"path": str(shards)})
    sources = open_sources(settings, "val", seed=None)
    torch.manual_seed(0)
    table = torch.randn(settings.data.seq_len, settings.vocab_size)

    def of(columns: slice) -> tuple[float, int]:
        got = score(
            lambda ids: table[columns].expand(len(ids), -1, -1),
            sources,
            seq_len=settings.data.seq_len,
            batch=3,
            device=torch.device("cpu"),
            columns=columns,
        )
        return got.nats, got.bytes

    nats, real = of(slice(None))
    shares = [of(Part(i, parts).columns(settings.data.seq_len)) for i in range(parts)]
    assert math.isclose(sum(share[0] for share in shares), nats, rel_tol=1e-12)
    assert sum(share[1] for share in shares) == real
    assert all(share[1] for share in shares)
