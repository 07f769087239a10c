"""Subwords: nats are those of a naive loop over tokens, bytes are never lost, and a run is whole in itself.

pytest tests/model/test_subword.py
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_prep.vocabulary import vocabulary
from mbtrain import config, evaluate, evaluation, export, metrics, sample, tokens
from mbtrain.checkpoint import newest
from mbtrain.config import Config
from mbtrain.data.opening import open_sources
from mbtrain.errors import ConfigError, MbtrainError
from mbtrain.model import build
from mbtrain.model.loss import nats
from mbtrain.model.sequence import WHOLE
from mbtrain.model.subword import Subword
from mbtrain.request import Asked
from mbtrain.sample import Sampling, generate
from mbtrain.vocab import BOUNDARY, FILLING
from tests import launch, tiny
from tests.model.test_megabyte import randomised

SIZE = 280
T = 64
# Rows end early, with zeros behind zeros where the filling is not told from bytes.
ENDING = {"rows": "sample", "boundary": False}
WORDS = b"the byte model, row 12  patch\n stage \xc3\xa9t\xc3\xa9 \x00\x00\xff words row byte"


@pytest.fixture(scope="module")
def file(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vocabulary") / "words.json"
    assert vocabulary(shards, out, SIZE)["tokens"] == SIZE
    return out


def tree(file: Path, shards: Path | str = "unused", **sections: Any) -> dict[str, Any]:
    model = {"kind": "subword", "vocabulary": str(file), "vocabulary_size": SIZE, **sections.pop("model", {})}
    train = {"steps": 6, "global_batch_size": 8, **sections.pop("train", {})}
    data = {"path": str(shards), **sections.pop("data", {})}
    made = tiny.tree(1, seq_len=T, model=model, data=data, train=train, **sections)
    return {**made, "checkpoint": {"every_steps": 3, "keep_last": 10}}


def model_of(file: Path, **sections: Any) -> Subword:
    """In float64, with large random weights."""
    made = randomised(config.validate(tree(file, **sections)))
    assert isinstance(made, Subword)
    return made


def row_of(content: bytes | list[int], t: int = T) -> Tensor:
    ids = list(content)[:t]
    return torch.tensor([ids + [FILLING] * (t - len(ids))])


def naive(model: Subword, row: list[int]) -> list[float]:
    """A row's columns, one token at a time, each from the tokens before it alone; float64."""
    columns = [0.0] * len(row)
    real = [i for i in row if i != FILLING]
    ids = model.vocabulary.tokenizer.encode("".join(map(chr, real))).ids
    at = 0
    for k, token in enumerate(ids):
        prefix = torch.tensor([ids[:k] + [0]])  # what stands at k itself is not looked at
        p = model.transformer(prefix)[0, k].double().softmax(-1).tolist()
        at += 1 if token == model.vocabulary.boundary else len(model.vocabulary.contents[token])
        columns[at - 1] = -math.log(p[token])
    assert at == len(real)
    return columns


# ---- tokens --------------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 256), st.sampled_from(list(WORDS))), max_size=200))
def test_tokens_hold_every_id_of_any_row(file: Path, row: list[int]) -> None:
    known = tokens.load(file, SIZE)
    (found,) = known.encode(np.array([row], np.int16).reshape(1, -1))
    back = [BOUNDARY if i == known.boundary else list(known.contents[i]) for i in found]
    assert [i for part in back for i in (part if isinstance(part, list) else [part])] == row
    assert known.lengths[found].sum() == len(row)


def test_words_have_tokens_and_all_bytes_have_one(file: Path) -> None:
    known = tokens.load(file, SIZE)
    assert {bytes([b]) for b in range(256)} <= set(known.contents)
    assert b" patch" in known.contents
    assert len(known.encode([np.frombuffer(b"byte patch stage", np.uint8)])[0]) < 8


def test_a_row_ends_where_its_filling_begins(file: Path) -> None:
    known = tokens.load(file, SIZE)
    rows = torch.cat([row_of(b"byte "), row_of(b""), row_of(WORDS)]).numpy()
    assert known.encode(rows) == known.encode([rows[0, :5], rows[1, :0], np.array(list(WORDS[:T]))])
    with pytest.raises(ValueError, match="behind the filling"):
        known.encode(np.array([[1, FILLING, 2]]))


# ---- nats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "shift"), [("paper", False), ("modern", False), ("modern", True)])
def test_nats_are_those_of_a_naive_loop_over_tokens(file: Path, preset: str, shift: bool) -> None:
    model = model_of(file, model={"preset": preset, "block": {"token_shift": shift}})
    rng = np.random.default_rng(0)
    words = [*WORDS, BOUNDARY, *b" byte patch\xff\xfe row"][:T]
    rows = torch.cat([row_of(words), row_of(rng.integers(0, 257, T).tolist()), row_of(b"\0" * 20), row_of(b"")])
    found = model(rows)
    expected = torch.tensor([naive(model, row) for row in rows.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert found.shape == rows.shape
    assert nats(found, rows) is found, "the loss hands them on"
    assert (found[2, 20:] == 0).all(), "nothing stands in the filling"
    whole = [-(model.transformer(made)[0].log_softmax(-1)).gather(1, made.T).sum() for made in each_alone(model, rows)]
    torch.testing.assert_close(found.sum(1)[:3], torch.stack(whole), atol=1e-9, rtol=1e-10)


def each_alone(model: Subword, rows: Tensor) -> list[Tensor]:
    return [torch.tensor([ids]) for ids in model.vocabulary.encode(rows.numpy()) if ids]


def test_rows_do_not_see_one_another(file: Path) -> None:
    model = model_of(file)
    rows = torch.cat([row_of(WORDS), row_of(b"row"), row_of([BOUNDARY, *WORDS[3:]])])
    together = model(rows)
    for i in range(3):
        torch.testing.assert_close(model(rows[i : i + 1])[0], together[i], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(model(rows.flip(0)).flip(0), together, atol=1e-12, rtol=1e-12)


def test_a_later_token_changes_no_earlier_one(file: Path) -> None:
    model = model_of(file)
    before, after = b"the byte model, row 12", b" patch stage words"
    original = model(row_of(before + after))
    for other in (b" stage patch \0\xff", b"\nbyte", b""):
        changed = model(row_of(before + other))
        torch.testing.assert_close(changed[:, : len(before)], original[:, : len(before)], atol=1e-12, rtol=1e-12)
        assert not torch.allclose(changed[:, len(before) :], original[:, len(before) :])


def test_rows_of_one_id_have_no_more_than_all_probability(file: Path) -> None:
    model = model_of(file)
    with torch.no_grad():
        each = model(torch.arange(257).unsqueeze(1))
    assert 0.1 < float((-each).exp().sum()) < 1
    assert float(each.min()) > 0


def test_a_batch_of_nothing_has_gradients_of_every_parameter(file: Path) -> None:
    """As ZeRO's collectives need, where a rank has no rows left."""
    model = model_of(file)
    lost = model(torch.full((2, T), FILLING))
    assert lost.sum() == 0
    lost.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_unit_bytes_are_ids_by_tokens(file: Path) -> None:
    model = model_of(file)
    rows = torch.cat([row_of(WORDS), row_of(b"byte patch"), row_of(b"")])
    count = sum(len(made) for made in model.vocabulary.encode(rows.numpy()))
    assert model.unit_bytes(rows) == pytest.approx((len(WORDS[:T]) + 10) / count)


def test_what_is_asked_of_models_of_bytes_alone_is_refused(file: Path) -> None:
    model = model_of(file)
    assert model.training_span(T, 3) is None
    assert (model.vocab_size, model.seq_len, model.patch_size) == (257, T, 1)
    with pytest.raises(ConfigError, match="no distribution of the next byte"):
        model.decoder(1)
    with pytest.raises(ValueError, match="sequence parallelism"):
        model.share(WHOLE, lambda q, k, v, dropout, mask: q)
    with pytest.raises(ConfigError, match=r"train\.sequence_parallel"):
        config.validate(tree(file, train={"sequence_parallel": 2}))


# ---- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
def test_the_likeliest_tokens_are_those_of_the_whole_forward_pass(file: Path, shift: bool) -> None:
    """And beyond seq_len, of whole tokens within the last half of it."""
    model = model_of(file, model={"block": {"token_shift": shift}})
    prompt = b"the byte"
    (made,) = generate(model, [prompt], 150, Sampling(temperature=0), ends=False)
    ids = model.vocabulary.encode([np.array([BOUNDARY, *prompt])])[0]
    expected = b""
    while len(expected) < 150:
        if sum(model.vocabulary.lengths[ids]) >= T:
            while sum(model.vocabulary.lengths[ids]) > T // 2:
                del ids[0]
        logits = model.transformer(torch.tensor([[*ids, 0]]))[0, -1]
        logits[model.vocabulary.boundary] = -torch.inf
        ids.append(int(logits.argmax()))
        expected += model.vocabulary.contents[ids[-1]]
    assert made == expected[:150]


def test_a_row_is_its_own_and_is_drawn_by_its_seed(file: Path) -> None:
    model, how = model_of(file), Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=5)
    prompts = [b"the byte", b"", bytes(range(256))]  # the last is longer than a row
    made = generate(model, prompts, 100, how, ends=False)
    assert [len(row) for row in made] == [100] * 3, "beyond seq_len, too"
    assert generate(model, prompts[:1], 100, how, ends=False) == made[:1]
    assert generate(model, prompts, 37, how, ends=False) == [row[:37] for row in made]
    other = Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=6)
    assert generate(model, prompts, 100, other, ends=False) != made
    assert generate(model, [], 5, how) == []
    assert generate(model, [b"a"], 0, how) == [b""]


def test_a_boundary_ends_a_row_where_there_are_boundaries(file: Path) -> None:
    model = model_of(file)
    whole = model.transformer.logits

    def logits(x: Tensor) -> Tensor:
        out = whole(x).clone()
        out[..., model.vocabulary.boundary] = 1e3
        return out

    model.transformer.logits = logits  # type: ignore[method-assign]
    assert generate(model, [b"x"], 9, Sampling()) == [b""]
    assert len(generate(model, [b"x"], 9, Sampling(), ends=False)[0]) == 9
    model.vocab_size = 256  # pieces of one long file
    assert len(generate(model, [b"x"], 9, Sampling())[0]) == 9


# ---- a run ---------------------------------------------------------------------------------------------------------


def train(folder: Path, file: Path, shards: Path, *more: str, ranks: int = 1, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = launch.config_file(folder, tree(file, shards, **sections))
    launch.mbtrain(["train", str(path), f"--run={folder / 'run'}", *more], ranks=ranks)
    return folder / "run"


@pytest.fixture(scope="module")
def trained(file: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has its data, and nothing else: the vocabulary that it was given is gone."""
    folder = tmp_path_factory.mktemp("trained")
    own = folder / "own.json"
    shutil.copy(file, own)
    run = train(folder, own, shards, data=ENDING)
    own.unlink()
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The run, moved to a folder where it may be harmed."""
    return Path(shutil.copytree(trained, tmp_path / "moved"))


def model_in(run: Path) -> tuple[Subword, Config]:
    model, settings_, *_ = evaluate.load_model(run, torch.device("cpu"))
    assert isinstance(model, Subword)
    return model, settings_


def naive_bpb(model: Subword, settings_: Config) -> float:
    """Bits per byte of the validation split: row by row in float64, without batches, masks or fillings."""
    lost = bytes_ = 0.0
    for source in open_sources(settings_, "val", seed=None):
        stream = source.stream
        for at in range(0, stream.ids_per_epoch, T):
            ids, mask = stream.read_rows(np.array([at]), T, np.array([min(T, stream.ids_per_epoch - at)]))
            row = [int(i) for i in (ids[0] if mask is None else ids[0][mask[0]])]
            lost += float(model.double()(torch.tensor([row])).detach().sum())
            bytes_ += sum(i != BOUNDARY for i in row)
    return lost / math.log(2) / bytes_


def scores(run: Path) -> list[float]:
    return [line["val/bpb"] for line in metrics.read(run / "metrics.jsonl") if "val/bpb" in line]


def test_a_run_is_scored_exactly(run: Path) -> None:
    expected = naive_bpb(*model_in(run))
    assert scores(run) == [pytest.approx(expected, abs=1e-5)]
    assert evaluation.evaluate_run(run, batch=3)["bpb"] == pytest.approx(expected, abs=1e-5)
    losses = launch.losses(run)
    assert losses[-1] < losses[0]


def test_two_ranks_of_zero_stage_3_do_what_one_does(file: Path, shards: Path, tmp_path: Path, trained: Path) -> None:
    both = train(tmp_path, file, shards, "--train.zero_stage=3", ranks=2, data=ENDING)
    assert launch.losses(both) == pytest.approx(launch.losses(trained), abs=1e-5)
    assert scores(both) == pytest.approx(scores(trained), abs=1e-5)


@pytest.mark.parametrize(("batch", "boundary"), [(1, True), (5, False)])
def test_packed_rows_are_scored_exactly(file: Path, shards: Path, batch: int, boundary: bool) -> None:
    """The last one ends early, and the last batch has rows of nothing."""
    model, settings_ = model_of(file), config.validate(tree(file, shards, data={"boundary": boundary}))
    opened = open_sources(settings_, "val", seed=None)
    assert opened[0].stream.ids_per_epoch % T
    found = evaluate.score(model, opened, seq_len=T, batch=batch, device=torch.device("cpu"))
    assert found.bpb == pytest.approx(naive_bpb(model, settings_), rel=1e-12)
    assert found.bytes == opened[0].stream.bytes_per_epoch


def test_a_run_goes_on_by_itself(run: Path, file: Path, shards: Path, tmp_path: Path) -> None:
    losses, (found, _) = launch.losses(run), newest(run)
    assert found is not None
    shutil.rmtree(found.path)  # as if it had been killed before it was written
    path = launch.config_file(tmp_path, tree(tmp_path / "gone.json", shards, data=ENDING))
    launch.mbtrain(["train", str(path), f"--resume={run}"])
    assert launch.losses(run) == losses
    assert model_in(run)[1].model.vocabulary == str(run / "vocabulary.json")
    assert (run / "vocabulary.json").read_bytes() == file.read_bytes()


def test_a_run_does_not_go_on_with_another_vocabulary(run: Path, file: Path, shards: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    harmed(file, own)
    path = launch.config_file(tmp_path, tree(own, shards, data=ENDING))
    ended = launch.mbtrain(["train", str(path), f"--resume={run}", "--train.steps=7"], expect=2)
    assert "its model differs" in ended.stderr
    assert (run / "vocabulary.json").read_bytes() == file.read_bytes()


def test_an_export_has_its_vocabulary_and_notices_another(run: Path, file: Path, tmp_path: Path) -> None:
    model, _ = model_in(run)
    export.export_run(run, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    shutil.move(run, tmp_path / "gone")
    loaded = export.load(tmp_path / "elsewhere")
    ids = torch.tensor([list(b"any bytes \xff\x00")])
    assert torch.equal(loaded(ids), model(ids))
    harmed(file, tmp_path / "elsewhere" / "vocabulary.json")
    with pytest.raises(MbtrainError, match=r"vocabulary\.json: .*sha256"):
        export.load(tmp_path / "elsewhere")


def harmed(file: Path, to: Path) -> None:
    """As whole as the original, and as large, but two merges have changed places."""
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]
    to.write_text(json.dumps(content, ensure_ascii=False))


@pytest.mark.parametrize("harm", ["other", "cut off", "missing"])
def test_a_run_whose_vocabulary_is_harmed_says_so_in_a_line(run: Path, file: Path, harm: str) -> None:
    copy = run / "vocabulary.json"
    if harm == "other":
        harmed(file, copy)
    elif harm == "cut off":
        copy.write_bytes(copy.read_bytes()[:-100])
    else:
        copy.unlink()
    with pytest.raises(ConfigError) as error:
        evaluate.load_model(run, torch.device("cpu"))
    assert str(copy) in str(error.value)
    assert "\n" not in str(error.value)
    if harm == "other":
        ended = launch.mbtrain(["train", f"--resume={run}", "--train.steps=7"], expect=2)
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("mbtrain: ")]
        assert str(copy) in line


def test_a_vocabulary_lies_beside_its_configuration_or_in_the_working_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    path = launch.config_file(tmp_path / "here", tree(Path("words.json")))
    shutil.copy(file, tmp_path / "words.json")
    monkeypatch.chdir(tmp_path)
    assert config.load(path).model.vocabulary == "words.json"
    shutil.copy(file, tmp_path / "here" / "words.json")
    assert config.load(path).model.vocabulary == str(tmp_path / "here" / "words.json")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    build(config.load(path, {"model.vocabulary_sha256": digest}))
    with pytest.raises(ConfigError, match="changed or cut off"):
        build(config.load(path, {"model.vocabulary_sha256": digest[::-1]}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("missing", "cannot be read"),
        ("folder", "cannot be read"),
        ("empty", "not a file of mbtrain-prep vocabulary"),
        ("cut off", "not a file of mbtrain-prep vocabulary"),
        ("list", "not a file of mbtrain-prep vocabulary"),
        ("binary", "not a file of mbtrain-prep vocabulary"),
        ("a byte less", "not a file of mbtrain-prep vocabulary"),
        ("normalised", "not a file of mbtrain-prep vocabulary"),
        ("truncated rows", "not a file of mbtrain-prep vocabulary"),
        ("merge of nothing", "out of vocabulary"),
        ("another size", "expected 280"),
    ],
)
def test_what_is_no_vocabulary_is_one_line(file: Path, tmp_path: Path, harm: str, said: str) -> None:
    path, size = tmp_path / "v.json", SIZE
    content = json.loads(file.read_text())
    if harm == "folder":
        path.mkdir()
    elif harm == "a byte less":
        content["model"]["vocab"]["\u0101"] = content["model"]["vocab"].pop("\x07")
    elif harm == "normalised":
        content["normalizer"] = {"type": "Lowercase"}
    elif harm == "truncated rows":
        content["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    elif harm == "merge of nothing":
        content["model"]["merges"].append(["q", "\x01"])
    elif harm == "another size":
        size = 279
    if harm not in ("missing", "folder"):
        written = json.dumps(content).encode()
        path.write_bytes(
            {"empty": b"", "cut off": written[:-9], "list": b"[]", "binary": b"\xff\x00"}.get(harm, written)
        )
    with pytest.raises(ConfigError, match=said) as error:
        tokens.load(path, size)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_samples_come_from_a_run(run: Path) -> None:
    assert list((run / "samples").glob("*.txt"))
    made = sample.sample_run(run, Asked(prompt=b"the", n_bytes=20), Sampling())
    assert all(len(row) <= 20 for row in made.continuations)
    assert made.paths[0].read_bytes() == b"the" + made.continuations[0]
