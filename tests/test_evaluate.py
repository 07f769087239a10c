"""Exact bits per byte: the same number at any batch size and number of ranks, equal to a naive sum in float64.

pytest tests/test_evaluate.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from mbtrain import evaluate
from mbtrain.data.opening import Opened
from mbtrain.data.rows import Stream
from mbtrain.errors import CheckpointError, DataError
from mbtrain.model import Model, build
from mbtrain.shards import Split, open_split
from mbtrain.vocab import BOUNDARY
from tests import launch, tiny
from tests.data.test_rows import concatenated, split_of
from tests.model.test_megabyte import randomised
from tests.test_checkpoint import made_run

CPU = torch.device("cpu")
DOCUMENTS = [b"hello world", b"\0" * 40, b"x", b"", bytes(range(256)), b"y"]


def scored(model: Any, *splits: Split, boundary: bool = True, **options: Any) -> evaluate.Score:
    sources = [Opened(f"set{i}", split, Stream(split, boundary=boundary, seed=None)) for i, split in enumerate(splits)]
    return evaluate.score(model, sources, **{"seq_len": 32, "batch": 3, "device": CPU, **options})


def naive(model: Model, documents: Sequence[bytes], seq_len: int, boundary: bool = True) -> tuple[float, int]:
    """Row by row and byte by byte in Python floats: (nats, real bytes)."""
    ids = concatenated(documents, range(len(documents)), boundary)
    nats = 0.0
    with torch.no_grad():
        for first in range(0, len(ids), seq_len):
            row = ids[first : first + seq_len]
            p = model(torch.tensor([row])).double().log_softmax(-1)[0]
            for t, target in enumerate(row):
                nats -= float(p[t, target])
    return nats, sum(map(len, documents))


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("boundary", [True, False])
def test_the_score_is_the_naive_sum(stages: int, boundary: bool) -> None:
    model = randomised(tiny.make(stages, data={"boundary": boundary}))
    nats, bytes_ = naive(model, DOCUMENTS, 32, boundary)
    result = scored(model, split_of(DOCUMENTS), boundary=boundary)
    assert result.bytes == bytes_
    assert result.nats == pytest.approx(nats, rel=1e-12)
    assert result.bpb == pytest.approx(nats / math.log(2) / bytes_, rel=1e-12)


def test_the_same_number_at_any_batch_size_and_number_of_ranks() -> None:
    """To 1e-9 for a float64 model; ranks are added by hand, and are called equally often, as ZeRO-3 needs."""
    model = randomised(tiny.make(2))
    split = split_of(DOCUMENTS, [0, 1, 0, 0, 2, 1])
    whole = scored(model, split, batch=1)
    assert len(whole.by_source) == 3
    for batch in (2, 5, 100):
        assert scored(model, split, batch=batch).bpb == pytest.approx(whole.bpb, abs=1e-9)
    for ranks in (2, 3, 16):
        sums: list[list[float]] = []
        calls = []
        for rank in range(ranks):
            count = 0

            def counted(ids: Tensor) -> Tensor:
                nonlocal count
                count += 1
                return model(ids)

            def keep(mine: list[float], sums: list[list[float]] = sums) -> list[float]:
                sums.append(mine)
                return [1.0] * len(mine)  # so that a rank without bytes is no error here

            scored(counted, split, batch=2, rank=rank, ranks=ranks, reduce=keep)
            calls.append(count)
        assert len(set(calls)) == 1, "a rank that is called less often leaves the others waiting"
        total = [sum(of_ranks) for of_ranks in zip(*sums, strict=True)]
        result = scored(model, split, batch=2, rank=0, ranks=ranks, reduce=lambda mine, total=total: total)
        assert result.bpb == pytest.approx(whole.bpb, abs=1e-9)
        assert result.bytes == whole.bytes
        for name, (nats, bytes_) in whole.by_source.items():
            assert result.by_source[name] == (pytest.approx(nats, rel=1e-9), bytes_)


def test_a_rank_that_cannot_read_its_part_keeps_in_step_and_raises_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the others would wait for it in a collective of ZeRO-3, or in the sum."""
    model = randomised(tiny.make(2))
    split = split_of(DOCUMENTS)
    calls = {"model": 0, "reduce": 0}

    def counted(ids: Tensor) -> Tensor:
        calls["model"] += 1
        return model(ids)

    def sum_of_ranks(mine: list[float]) -> list[float]:
        calls["reduce"] += 1
        return mine

    scored(counted, split, batch=2, reduce=sum_of_ranks)
    whole = dict(calls)
    read_many = split.read_many

    def cut_off(samples: np.ndarray, *where: np.ndarray) -> bytes:
        if 1 in samples:
            raise DataError("1.tar: cut off")
        return read_many(samples, *where)

    monkeypatch.setattr(split, "read_many", cut_off)
    with pytest.raises(DataError, match=r"1\.tar: cut off"):
        scored(counted, split, batch=2, reduce=sum_of_ranks)
    assert calls == {name: 2 * count for name, count in whole.items()}


def test_float32_agrees_to_1e_6_at_any_batch_size() -> None:
    torch.manual_seed(0)
    model = build(tiny.make(3)).eval()
    scores = [scored(model, split_of(DOCUMENTS), batch=batch).bpb for batch in (1, 2, 3, 7, 64)]
    assert max(scores) - min(scores) < 1e-6


def test_a_uniform_model_needs_exactly_8_bits() -> None:
    """Without boundaries; all 256 values, an all-zero file and one-byte documents alike."""

    def uniform(ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 256, dtype=torch.float64)

    for documents in (DOCUMENTS, [b"\0" * 100], [b"a"], [b"a", b"\0", b"\xff"]):
        assert scored(uniform, split_of(documents), boundary=False).bpb == pytest.approx(8, abs=1e-12)


def test_boundaries_cost_nats_and_are_no_bytes() -> None:
    """Three documents of one byte each: six targets of ln 257, over three bytes."""

    def uniform(ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 257, dtype=torch.float64)

    result = scored(uniform, split_of([b"a", b"\0", b"c"]), seq_len=4)
    assert result.bytes == 3
    assert result.nats == pytest.approx(6 * math.log(257), rel=1e-12)
    assert result.bpb == pytest.approx(2 * math.log2(257), rel=1e-12)


def test_zero_bytes_are_scored_like_any_other() -> None:
    """Where 0 is a padding id, an all-zero file costs nothing; here each costs what the model says."""

    def sure_of_ones(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 257, dtype=torch.float64)
        logits[..., 1] = 20.0
        return logits

    zeros = scored(sure_of_ones, split_of([b"\0" * 50]), boundary=False)
    ones = scored(sure_of_ones, split_of([b"\1" * 50]), boundary=False)
    assert zeros.bytes == ones.bytes == 50
    assert zeros.bpb == pytest.approx(20 / math.log(2), abs=1e-5)
    assert ones.bpb < 1e-5


def test_a_masked_target_is_never_counted_whatever_the_model_says_of_it() -> None:
    """The filling of the last row costs nothing, even where the model finds it impossible."""

    def no_zeros(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 257, dtype=torch.float64)
        logits[..., 0] = -torch.inf
        return logits

    result = scored(no_zeros, split_of([b"abc"]))
    assert result.nats == pytest.approx(4 * math.log(256))


def test_sources_sum_to_the_whole(shards: Path) -> None:
    model = randomised(tiny.make(2))
    split = open_split(shards, "val")
    result = scored(model, split)
    assert set(result.by_source) == set(split.source_names)
    assert len(result.by_source) == 2
    assert sum(nats for nats, _ in result.by_source.values()) == pytest.approx(result.nats, rel=1e-12)
    assert sum(bytes_ for _, bytes_ in result.by_source.values()) == result.bytes == int(split.lengths.sum())
    metrics = result.metrics()
    assert set(metrics) == {"val/bpb", *(f"val/{name}/bpb" for name in split.source_names)}
    assert min(metrics.values()) < metrics["val/bpb"] < max(metrics.values())
    for name, (_, bytes_) in result.by_source.items():
        mine = split.source_index == split.source_names.index(name)
        assert bytes_ == int(split.lengths[mine].sum())


def test_several_data_sets_are_scored_apart_and_together() -> None:
    """By the names of the mixture, whatever the sources inside them; each as it is scored alone."""
    model = randomised(tiny.make(2))
    splits = [split_of(DOCUMENTS, [0, 1, 0, 0, 2, 1]), split_of([b"other" * 30, b"more"])]
    alone = [scored(model, split) for split in splits]
    both = scored(model, *splits)
    assert list(both.by_source) == ["set0", "set1"]
    for score, (nats, bytes_) in zip(alone, both.by_source.values(), strict=True):
        assert nats == pytest.approx(score.nats, rel=1e-12)
        assert bytes_ == score.bytes
    assert both.nats == pytest.approx(sum(score.nats for score in alone), rel=1e-12)
    assert set(both.metrics()) == {"val/bpb", "val/set0/bpb", "val/set1/bpb"}
    part = scored(model, *splits, limit_bytes=64)
    assert all(0 < part.by_source[name][1] < both.by_source[name][1] for name in both.by_source)


def test_one_source_is_not_listed_apart() -> None:
    score = evaluate.Score(math.log(2) * 6, 2, {"all": (math.log(2) * 6, 2)})
    assert score.metrics() == {"val/bpb": pytest.approx(3)}
    assert score.metrics("val/partial_bpb") == {"val/partial_bpb": pytest.approx(3)}


def test_a_limit_scores_whole_rows_from_the_front() -> None:
    model = randomised(tiny.make(2))
    nats, _ = naive(model, [b"hello world", b"\0" * 20], 32)  # the first 32 ids, and one boundary in a second row
    first = scored(model, split_of(DOCUMENTS), limit_bytes=10)
    ids = concatenated(DOCUMENTS, range(len(DOCUMENTS)), True)[:32]
    assert first.bytes == sum(i != BOUNDARY for i in ids)
    with torch.no_grad():
        p = model(torch.tensor([ids])).log_softmax(-1)[0]
    assert first.nats == pytest.approx(-sum(float(p[t, i]) for t, i in enumerate(ids)), rel=1e-12)
    assert nats > first.nats


@pytest.mark.parametrize("documents", [[], [b""], [b"", b""]])
@pytest.mark.parametrize("boundary", [True, False])
def test_a_split_without_bytes_is_an_error(documents: list[bytes], boundary: bool) -> None:
    model = build(tiny.make(1, data={"boundary": boundary}))
    with pytest.raises(DataError, match="no bytes in this split"):
        scored(model, split_of(documents), boundary=boundary)


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Path:
    made_run(tmp_path / "run", tiny.make(2, data={"path": str(shards)}))
    return tmp_path / "run"


def test_evaluate_run_is_the_score_of_its_checkpoint(run: Path, shards: Path, tmp_path: Path) -> None:
    figures = evaluate.evaluate_run(run, batch=7)
    assert figures["precision"] == "fp32", "as trained"
    model, _, _, _ = evaluate.load_model(run, CPU)
    assert figures["bpb"] == pytest.approx(scored(model, open_split(shards, "val")).bpb, abs=1e-6)
    assert evaluate.evaluate_run(run / "checkpoints" / "step_0000000004")["nats"] == pytest.approx(figures["nats"])
    assert figures["step"] == 4
    assert evaluate.evaluate_run(run, split="train")["bytes"] == int(open_split(shards, "train").lengths.sum())
    low = evaluate.evaluate_run(run, precision="bf16")["bpb"]
    assert low != figures["bpb"]
    assert low == pytest.approx(figures["bpb"], abs=0.05)
    with pytest.raises(DataError, match="no split 'dev'"):
        evaluate.evaluate_run(run, split="dev")
    with pytest.raises(DataError, match="manifest"):
        evaluate.evaluate_run(run, data=str(tmp_path / "gone"))


def test_weights_that_do_not_fit_the_configuration_are_one_line(run: Path) -> None:
    """Somebody edited config.yaml after the training."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["model"]["stages"][1]["n_layers"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(CheckpointError, match=r"step_0000000004: does not fit .*Missing key") as error:
        evaluate.load_model(run, CPU)
    assert "\n" not in str(error.value)


def test_eval_json_has_the_contracts_keys(run: Path) -> None:
    ended = launch.mbtrain(["eval", str(run), "--json", "--batch=5"])
    figures = launch.last_json(ended.stdout)
    assert {"bpb", "nats", "bytes", "split", "step", "precision", "by_source"} == set(figures)
    assert figures["bpb"] == pytest.approx(figures["nats"] / math.log(2) / figures["bytes"], rel=1e-12)
    assert set(figures["by_source"]) == {"words", "noise"}
    lines = ended.stdout.splitlines()
    assert lines[0].startswith(f"val: {figures['bpb']:.6f} bits per byte over {figures['bytes']} bytes")
