"""Exact bits per byte: the same number at any batch size and number of ranks, equal to a naive sum in float64.

pytest tests/test_evaluate.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from data_prep.cli import main as prep
from mbtrain import evaluate, evaluation
from mbtrain.data.opening import Opened
from mbtrain.data.rows import Stream
from mbtrain.errors import CheckpointError, ConfigError, DataError
from mbtrain.model import Model, build
from mbtrain.modes import must_allow, must_keep_frames
from mbtrain.shards import Split, open_split
from mbtrain.vocab import BOUNDARY
from tests import launch, tiny
from tests.data.test_rows import concatenated, split_of
from tests.data.test_windows import naive_window
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
    figures = evaluation.evaluate_run(run, batch=7)
    assert figures["precision"] == "fp32", "as trained"
    model, _, _, _ = evaluate.load_model(run, CPU)
    assert figures["bpb"] == pytest.approx(scored(model, open_split(shards, "val")).bpb, abs=1e-6)
    assert evaluation.evaluate_run(run / "checkpoints" / "step_0000000004")["nats"] == pytest.approx(figures["nats"])
    assert figures["step"] == 4
    assert evaluation.evaluate_run(run, split="train")["bytes"] == int(open_split(shards, "train").lengths.sum())
    low = evaluation.evaluate_run(run, precision="bf16")["bpb"]
    assert low != figures["bpb"]
    assert low == pytest.approx(figures["bpb"], abs=0.05)
    with pytest.raises(DataError, match="no split 'dev'"):
        evaluation.evaluate_run(run, split="dev")
    with pytest.raises(DataError, match="manifest"):
        evaluation.evaluate_run(run, data=str(tmp_path / "gone"))


def test_weights_that_do_not_fit_the_configuration_are_one_line(run: Path) -> None:
    """Somebody edited config.yaml after the training."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["model"]["stages"][1]["n_layers"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(CheckpointError, match=r"step_0000000004: does not fit .*Missing key") as error:
        evaluate.load_model(run, CPU)
    assert "\n" not in str(error.value)


CONTRACT = {"bpb", "nats", "bytes", "split", "step", "precision", "weights", "by_source"}
KEYS = CONTRACT | {
    *("mode", "bpb_low", "bpb_high", "by_source_interval", "documents", "words", "word_perplexity"),
    *("by_position", "by_depth", "plot"),
}


def test_eval_json_has_the_contracts_keys(run: Path) -> None:
    ended = launch.mbtrain(["eval", str(run), "--json", "--batch=5"])
    figures = launch.last_json(ended.stdout)
    assert set(figures) == KEYS
    assert figures["bpb"] == pytest.approx(figures["nats"] / math.log(2) / figures["bytes"], rel=1e-12)
    assert set(figures["by_source"]) == {"words", "noise"}
    lines = ended.stdout.splitlines()
    assert lines[0] == f"val: {figures['bpb']:.6f} bits per byte over {figures['bytes']} bytes (step 4, basic)"
    assert f"{figures['bpb_low']:.4f} to {figures['bpb_high']:.4f}, by bootstrap over" in lines[1]
    assert any(line.startswith(f"  {figures['words']} words, perplexity ") for line in lines)
    assert Path(figures["plot"]).read_bytes()[:4] == b"\x89PNG"
    assert figures["plot"] == str(run / "plots" / "eval_val_basic.png")


# ---- modes --------------------------------------------------------------------------------------------------------


def byte_by_byte(model: Any, content: bytes, mode: str, *, apart: int = 0, **options: Any) -> np.ndarray:
    """Nats of each byte: documents of one byte each, packed; or documents of `apart` bytes with rows of their own."""
    whole = split_of([content[i : i + apart] for i in range(0, len(content), apart or 1)] if apart else [content])
    align = 32 if apart else 1
    source = Opened("set", whole, Stream(whole, boundary=False, seed=None, align=align))
    if not apart:
        single = split_of([bytes([byte]) for byte in content])
        source = Opened("set", single, Stream(single, boundary=False, seed=None))
    columns = {"seq_len": 32, "batch": 3, "device": CPU, "mode": mode, "details": True, **options}
    found = evaluate.score(model, [source], **columns).details
    assert found is not None
    if not apart:
        assert (found.documents[1] == 1).all(), "every byte once"
    return found.documents[0]


@pytest.mark.parametrize("mode", ["basic", "sliding", "strided", "both"])
@pytest.mark.parametrize("stages", [2, 3])
def test_each_mode_is_its_naive_definition_byte_by_byte(mode: str, stages: int) -> None:
    """Every byte alone: its window by the definition, one forward pass of just that window up to the byte."""
    model = randomised(tiny.make(stages, data={"boundary": False}))
    content = np.random.default_rng(0).integers(0, 256, 119).astype(np.uint8).tobytes()
    patch = tiny.STAGES[stages][0]["patch_size"]
    found = byte_by_byte(model, content, mode, patch_size=patch)
    with torch.no_grad():
        for x, byte in enumerate(content):
            begin = naive_window(x, 32, patch, mode)
            p = model(torch.tensor([list(content[begin : x + 1])])).double().log_softmax(-1)
            assert found[x] == pytest.approx(-float(p[0, -1, byte]), abs=1e-9)


@pytest.mark.parametrize("mode", ["basic", "sliding", "strided", "both"])
def test_documents_with_rows_of_their_own_are_scored_from_themselves_alone(mode: str) -> None:
    """As images are: some fit one row, some go on in the next."""
    model = randomised(tiny.make(2, data={"boundary": False}))
    content = np.random.default_rng(1).integers(0, 256, 150).astype(np.uint8).tobytes()
    for size in (30, 50):
        found = byte_by_byte(model, content, mode, apart=size, patch_size=4)
        alone = [
            byte_by_byte(model, content[i : i + size], mode, patch_size=4).sum() for i in range(0, len(content), size)
        ]
        assert found == pytest.approx(np.array(alone), abs=1e-9)
        if size == 30 and mode == "sliding":
            assert found == pytest.approx(byte_by_byte(model, content, "basic", apart=size), abs=1e-12)


@pytest.mark.parametrize("mode", ["basic", "sliding", "strided", "both"])
def test_each_byte_is_predicted_from_its_true_prefix_alone(mode: str) -> None:
    """Whatever comes after a byte may change, its nats do not; what comes before it matters."""
    model = randomised(tiny.make(2, data={"boundary": False}))
    rng = np.random.default_rng(2)
    content = rng.integers(0, 256, 90).astype(np.uint8)
    nats = byte_by_byte(model, content.tobytes(), mode, patch_size=4)
    for x in (1, 4, 31, 33, 47, 66, 88):
        changed = content.copy()
        changed[x:] = rng.integers(0, 256, 90 - x)
        changed[x] = content[x] ^ 1
        other = byte_by_byte(model, changed.tobytes(), mode, patch_size=4)
        assert other[:x] == pytest.approx(nats[:x], abs=1e-12)
        assert (other[x:] != nats[x:]).any()


@pytest.mark.parametrize("mode", ["basic", "sliding", "strided", "both"])
def test_modes_agree_at_any_batch_size_and_number_of_ranks(mode: str) -> None:
    """Down to each document's sums."""
    model = randomised(tiny.make(2))
    split = split_of(DOCUMENTS, [0, 1, 0, 0, 2, 1])
    options: dict[str, Any] = {"mode": mode, "patch_size": 4, "details": True}
    whole = scored(model, split, batch=1, **options)
    assert whole.details is not None
    for batch in (3, 50):
        found = scored(model, split, batch=batch, **options)
        assert found.nats == pytest.approx(whole.nats, rel=1e-12)
        assert found.details is not None
        np.testing.assert_allclose(found.details.documents, whole.details.documents, atol=1e-9)
        np.testing.assert_allclose(found.details.columns, whole.details.columns, atol=1e-9)
    sums: list[list[float]] = []

    def keep(mine: list[float]) -> list[float]:
        sums.append(mine)
        return [1.0] * len(mine)

    for rank in range(3):
        scored(model, split, batch=2, rank=rank, ranks=3, reduce=keep, **options)
    total = [sum(of_ranks) for of_ranks in zip(*sums, strict=True)]
    found = scored(model, split, batch=2, ranks=3, reduce=lambda mine: total, **options)
    assert found.nats == pytest.approx(whole.nats, rel=1e-12)
    assert found.details is not None
    np.testing.assert_allclose(found.details.documents, whole.details.documents, atol=1e-9)


def test_details_add_up_to_the_score() -> None:
    """By document over two data sets, and by column."""
    model = randomised(tiny.make(2))
    splits = [split_of(DOCUMENTS), split_of([b"other" * 30, b"more"])]
    score = scored(model, *splits, details=True)
    plain = scored(model, *splits)
    assert plain.details is None
    assert (plain.nats, plain.bytes, plain.by_source) == (score.nats, score.bytes, score.by_source)
    assert score.details is not None
    for sums in (score.details.documents, score.details.columns):
        assert sums[0].sum() == pytest.approx(score.nats, rel=1e-12)
        assert sums[1].sum() == score.bytes
    assert score.details.documents[1].tolist() == [len(d) for d in [*DOCUMENTS, b"other" * 30, b"more"]]
    nats, _ = naive(model, [b"other" * 30, b"more"], 32)
    assert score.details.documents[0, len(DOCUMENTS) :].sum() == pytest.approx(nats, rel=1e-12)


# ---- a run's figures ----------------------------------------------------------------------------------------------


def test_figures_of_a_run(run: Path, shards: Path) -> None:
    figures = evaluation.evaluate_run(run, mode="both")
    split = open_split(shards, "val")
    documents = [split.read(i) for i in range(len(split))]
    assert figures["documents"] == len(documents)
    assert figures["bpb_low"] < figures["bpb"] < figures["bpb_high"]
    for name, bpb in figures["by_source"].items():
        low, high = figures["by_source_interval"][name]
        assert low < bpb < high
    assert figures["words"] == sum(len(document.split()) for document in documents)
    assert math.log(figures["word_perplexity"]) == pytest.approx(figures["nats"] / figures["words"], rel=1e-9)
    assert [place["position"] for place in figures["by_position"]] == [0, 1, 2, 3]
    assert sum(place["bytes"] for place in figures["by_position"]) == figures["bytes"]
    depths = figures["by_depth"]
    assert [row["from"] for row in depths] == [0, 1, 2, 4, 8, 16]
    assert [row["to"] for row in depths] == [0, 1, 3, 7, 15, 31]
    assert sum(row["bytes"] for row in depths) == figures["bytes"]
    assert sum(row["bpb"] * row["bytes"] for row in depths) / figures["bytes"] == pytest.approx(figures["bpb"])
    assert depths[0]["bytes"] == 1, "one window begins without context"
    told = json.loads((run / "eval_val_both.json").read_text())
    assert told == figures
    # Of a part, of other data and of an older checkpoint there is a picture, and nothing for `compare`.
    evaluation.evaluate_run(run, mode="sliding", limit_bytes=100)
    evaluation.evaluate_run(run, mode="sliding", data=str(shards))
    assert evaluation.evaluate_run(run / "checkpoints" / "step_0000000004", mode="sliding")["plot"]
    assert [path.name for path in run.glob("eval_*")] == ["eval_val_both.json"]
    names = {"eval_val_both.png", *(f"eval_val_sliding{of}.png" for of in ("", "_part", "_shards"))}
    assert {path.name for path in (run / "plots").iterdir()} == names


def test_what_there_is_not_is_null(tmp_path: Path) -> None:
    """One document has no interval; without patches there are no positions; noise has no words to speak of."""
    (tmp_path / "one.txt").write_bytes(b"x" * 5000)
    with pytest.raises(SystemExit):
        prep(["text", str(tmp_path / "one.txt"), f"--out={tmp_path / 'shards'}", "--splits=val=1.0"])
    made_run(tmp_path / "run", tiny.make(1, data={"path": str(tmp_path / "shards")}))
    figures = evaluation.evaluate_run(tmp_path / "run")
    assert figures["bpb_low"] is figures["bpb_high"] is figures["by_position"] is None
    assert set(figures["by_source_interval"].values()) == {None}
    assert (figures["documents"], figures["words"], figures["word_perplexity"]) == (1, 1, None), "e ** 20,000"
    said = list(evaluation.lines_of(figures, partly=False))
    assert said[1] == "  no interval: it takes two documents, and this is one"
    assert said[2] == "  1 words, perplexity too large"


def test_a_run_directory_that_takes_nothing_costs_the_picture_alone(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation.plots, "evaluation", full)
    assert evaluation.evaluate_run(run)["plot"] is None
    assert "the picture was NOT written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["basic", "both"])
def test_two_ranks_give_the_number_of_one(run: Path, mode: str) -> None:
    """Real processes over gloo; rank 0 alone speaks."""
    alone = evaluation.evaluate_run(run, mode=mode)
    ended = launch.mbtrain(["eval", str(run), f"--mode={mode}", "--batch=3", "--json"], ranks=2)
    assert ended.stdout.count("bits per byte") == 1
    figures = launch.last_json(ended.stdout)
    assert set(figures) == KEYS
    for key, value in alone.items():
        if isinstance(value, float):
            assert figures[key] == pytest.approx(value, rel=1e-6), key
    assert figures["bpb"] == pytest.approx(alone["bpb"], abs=1e-6)
    assert (figures["bytes"], figures["words"], figures["documents"]) == (
        alone["bytes"],
        alone["words"],
        alone["documents"],
    )
    bits = [[place["bpb"] for place in of["by_position"]] for of in (figures, alone)]
    assert bits[0] == pytest.approx(bits[1], abs=1e-6)


def test_on_two_ranks_a_mistake_is_said_once(run: Path) -> None:
    ended = launch.mbtrain(["eval", str(run), "--split=dev"], ranks=2, expect=2)
    assert ended.stderr.count("no split 'dev'") == 1
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("mode", "changes", "said"),
    [
        (
            "strided",
            {"stages": tiny.STAGES[1]},
            "--mode=strided: expected basic or sliding: the run's model has no pat",
        ),
        ("both", {"stages": [{**tiny.STAGES[2][0], "patch_size": 3}, tiny.STAGES[2][1]]}, "3 bytes, which have no hal"),
        ("strided", {"patching": "space"}, "with model.patching=space patches lie where words end"),
        ("both", {"isolate_documents": True}, "with model.isolate_documents every document begins at a patch"),
        ("diagonal", {}, "--mode: expected one of basic, sliding, strided, both, got 'diagonal'"),
    ],
)
def test_modes_that_a_model_has_not(mode: str, changes: dict[str, Any], said: str) -> None:
    settings = tiny.make(2, seq_len=48, model={"stages": tiny.STAGES[2], **changes})
    with pytest.raises(ConfigError) as error:
        must_allow(settings, mode)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    must_allow(settings, "basic")
    must_allow(settings, "sliding")


def test_other_data_is_of_the_same_modality(run: Path, tmp_path: Path) -> None:
    """By environment.json, or by the run's own data where nothing tells."""
    picture = tmp_path / "pictures"
    picture.mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4), (i, 2, 3)).save(picture / f"{i}.png")
    with pytest.raises(SystemExit):
        prep(["image", str(picture), f"--out={tmp_path / 'dots'}", "--size=4", "--splits=val=1.0"])
    said = r"--data=.*dots: holds image, expected text, which .*run was trained on"
    with pytest.raises(ConfigError, match=said):
        evaluation.evaluate_run(run, data=str(tmp_path / "dots"))
    (run / "environment.json").write_text(json.dumps({"data": [{"modality": "audio"}]}))
    with pytest.raises(ConfigError, match="holds image, expected audio"):
        evaluation.evaluate_run(run, data=str(tmp_path / "dots"))


def test_a_run_without_checkpoint_and_a_split_without_bytes_are_one_line(run: Path, tmp_path: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    with pytest.raises(CheckpointError, match="no whole checkpoint in it; train it first") as error:
        evaluation.evaluate_run(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("patch", "mode", "wrong"), [(4, "strided", False), (2, "strided", True), (2, "both", True)])
def test_windows_do_not_begin_inside_a_frame(patch: int, mode: str, wrong: bool) -> None:
    """16-bit sound is two bytes a frame: in patches of 2 the second pass would read every frame backwards."""
    stages = [{**tiny.STAGES[2][0], "patch_size": patch}, tiny.STAGES[2][1]]
    settings = tiny.make(2, model={"stages": stages}, data={"boundary": False})
    prepared = SimpleNamespace(prep={"encoding": "pcm16"})
    split = SimpleNamespace(modality="audio", manifest=prepared, lengths=np.array([20, 20]))
    sources: Any = [SimpleNamespace(split=split)]
    must_keep_frames(settings, sources, "sliding")
    if wrong:
        with pytest.raises(ConfigError, match=f"--mode={mode}: expected basic: windows would begin 1 bytes later"):
            must_keep_frames(settings, sources, mode)
    else:
        must_keep_frames(settings, sources, mode)


def test_the_share_of_validation_is_that_of_its_operations() -> None:
    """A forward pass is a third of a step's operations by byte; with averages it is made twice."""
    split = split_of([b"a" * 480])
    sources = [Opened("one", split, Stream(split, boundary=True, seed=None))]

    def share(**sections: Any) -> float:
        return evaluate.share_of_validation(tiny.make(2, **sections), sources)  # rows of 32 bytes, 4 of them a step

    assert share() == 0
    assert share(eval={"every_steps": 10}) == pytest.approx(480 / 3 / (10 * 4 * 32))
    assert share(eval={"every_steps": 10, "limit_bytes": 48}) == pytest.approx(48 / 3 / (10 * 4 * 32))
    assert share(eval={"every_steps": 10}, optim={"ema": 0.1}) == pytest.approx(2 * 480 / 3 / (10 * 4 * 32))
