"""Sampling: probabilities, seeds, neighbours, ends. What is drawn follows the model's distribution exactly.

pytest tests/test_sample.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbtrain import sample
from mbtrain.model import Model
from mbtrain.sample import Sampling, as_text, choose, generate, probabilities
from mbtrain.vocab import BOUNDARY
from tests import launch, tiny
from tests.model.test_megabyte import randomised
from tests.test_checkpoint import made_run


def model_of(stages: int = 2, seq_len: int = 32, **data: Any) -> Model:
    """A float64 model with large random weights, so that its distributions are uneven."""
    return randomised(tiny.make(stages, seq_len=seq_len, data=data))


def without_boundary(model: Model) -> Model:
    """The same model, never predicting an end."""
    whole = model.logits

    def logits(x: Tensor) -> Tensor:
        out = whole(x).clone()
        out[..., BOUNDARY] = -torch.inf
        return out

    model.logits = logits  # type: ignore[method-assign]
    return model


# ---- one distribution ----------------------------------------------------------------------------------------------

logits_rows = st.lists(st.integers(-400, 400), min_size=2, max_size=20, unique=True).map(
    lambda row: torch.tensor([row], dtype=torch.float64) / 100
)


@settings(deadline=None)
@given(logits=logits_rows, temperature=st.floats(0.05, 5))
def test_without_cuts_it_is_the_softmax_at_that_temperature(logits: Tensor, temperature: float) -> None:
    p = probabilities(logits, Sampling(temperature))
    torch.testing.assert_close(p.double(), (logits / temperature).softmax(-1), atol=1e-5, rtol=1e-4)


@settings(deadline=None)
@given(logits=logits_rows, k=st.integers(1, 25))
def test_top_k_keeps_the_k_likeliest_in_their_ratios(logits: Tensor, k: int) -> None:
    p = probabilities(logits, Sampling(top_k=k))[0]
    kept = p > 0
    assert int(kept.sum()) == min(k, len(p))
    assert logits[0][kept].min() >= logits[0].topk(min(k, len(p))).values[-1]
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(p[kept].double(), logits[0][kept].softmax(-1), atol=1e-5, rtol=1e-4)


@settings(deadline=None)
@given(logits=logits_rows, top_p=st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: Tensor, top_p: float) -> None:
    whole = logits.float().softmax(-1)[0]
    p = probabilities(logits, Sampling(top_p=top_p))[0]
    kept = p > 0
    assert kept.any()
    assert float(whole[kept].sum()) >= min(top_p, 1) - 1e-5
    assert float(whole[kept].sum() - whole[kept].min()) < top_p + 1e-5, "without the least likely it does not reach"
    assert not kept.all() or top_p > 0.01
    if not kept.all():
        assert whole[kept].min() >= whole[~kept].max()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)


def test_top_k_is_cut_before_top_p() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    p = probabilities(logits, Sampling(top_k=2, top_p=0.5))  # of the two left, 4/7 reaches 0.5 alone
    torch.testing.assert_close(p, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(
        probabilities(logits, Sampling(top_k=2, top_p=0.6)), torch.tensor([[4 / 7, 3 / 7, 0.0, 0.0]])
    )


@settings(deadline=None)
@given(logits=logits_rows, u=st.floats(0.001, 1, exclude_max=True))
def test_temperature_0_and_its_limit_take_the_likeliest(logits: Tensor, u: float) -> None:
    likeliest = logits.argmax(-1)
    point = torch.tensor([[u]], dtype=torch.float64)
    assert choose(logits, point, Sampling(0.0)) == likeliest
    assert choose(logits, point, Sampling(1e-4)) == likeliest
    assert choose(logits, point, Sampling(top_k=1)) == likeliest
    assert choose(logits, point, Sampling(top_p=1e-9)) == likeliest


@settings(deadline=None)
@given(u=st.sampled_from([0.0, 1e-300, 0.5, 1 - 2**-53]), where=st.integers(0, 6))
def test_what_is_impossible_is_never_chosen(u: float, where: int) -> None:
    """At both ends of the line as well."""
    logits = torch.full((1, 7), -torch.inf)
    logits[0, where] = 3.0
    assert choose(logits, torch.tensor([[u]], dtype=torch.float64), Sampling()).tolist() == [where]


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.7), Sampling(top_k=5), Sampling(top_p=0.8)])
def test_choices_follow_the_probabilities(how: Sampling) -> None:
    """Chi-square of 200,000 choices with fixed seed against softmax; bound at about p = 1e-6."""
    n = 200_000
    torch.manual_seed(1)
    logits = torch.randn(1, 12) * 1.5
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=[5, 0])).random((n, 1)))
    counts = torch.bincount(choose(logits.expand(n, -1), uniform, how), minlength=12).double()
    expected = probabilities(logits, how)[0].double() * n
    possible = expected > 0
    assert counts[~possible].sum() == 0
    freedom = int(possible.sum()) - 1
    assert freedom >= 4
    statistic = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 12


# ---- whole continuations -------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    model = without_boundary(model_of())
    first = generate(model, [b"abc"], 24, Sampling(seed=1))
    assert first == generate(model, [b"abc"], 24, Sampling(seed=1))
    assert first != generate(model, [b"abc"], 24, Sampling(seed=2))
    assert len(first[0]) == 24
    rows = generate(model, [b"abc", b"abc"], 24, Sampling(seed=1))
    assert rows[0] == first[0]
    assert rows[0] != rows[1], "each row has numbers of its own"


def test_the_callers_random_state_is_neither_used_nor_moved() -> None:
    model = without_boundary(model_of())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, [b"abc"], 9, Sampling())
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert first == generate(model, [b"abc"], 9, Sampling())


def test_greedy_is_the_argmax_of_the_full_forward() -> None:
    """Byte by byte without any cache."""
    model = model_of(3)
    ids = [BOUNDARY, *b"ab"]
    expected = []
    with torch.no_grad():
        while len(expected) < 20:
            byte = int(model(torch.tensor([[*ids, 0]]))[0, -1].argmax())
            if byte == BOUNDARY:
                break
            expected.append(byte)
            ids.append(byte)
    assert len(expected) >= 1
    assert generate(model, [b"ab"], len(expected), Sampling(0.0)) == [bytes(expected)]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("boundary", [True, False])
def test_a_row_does_not_depend_on_its_neighbours(stages: int, boundary: bool) -> None:
    """Ragged prompts in one batch give the bytes of each alone; a row's numbers go with its place."""
    model = model_of(stages, boundary=boundary)
    prompts = [b"", b"a", b"hello", b"\0\xff\0", b"0123456789"]
    how = Sampling(seed=3)
    together = generate(model, prompts, 12, how)
    greedy = generate(model, prompts, 12, Sampling(0.0))
    for i, prompt in enumerate(prompts):
        others = [b"zz" * (i + 1)] * i
        assert generate(model, [*others, prompt], 12, how)[i] == together[i]
        assert generate(model, [prompt], 12, Sampling(0.0)) == [greedy[i]]
    assert any(together)


def test_a_prompt_longer_than_a_row_does_not_depend_on_its_neighbours() -> None:
    """Greedy; 41 and 75 bytes at seq_len 32."""
    model = without_boundary(model_of())
    prompts = [bytes(range(41)), bytes(range(75))]
    together = generate(model, prompts, 12, Sampling(0.0))
    assert together == [generate(model, [prompt], 12, Sampling(0.0))[0] for prompt in prompts]


@pytest.mark.parametrize("length", [0, 3, 4, 30, 31, 32, 33, 100])
def test_prompts_of_any_length_are_continued_past_the_end_of_a_row(length: int) -> None:
    model = without_boundary(model_of())
    prompt = bytes(i % 256 for i in range(length))
    out = generate(model, [prompt], 70, Sampling())
    assert len(out[0]) == 70


@pytest.mark.parametrize("seq_len", [4, 8])
def test_a_row_as_short_as_a_patch_or_two(seq_len: int) -> None:
    assert len(generate(without_boundary(model_of(seq_len=seq_len)), [b"abc"], 20, Sampling())[0]) == 20


def test_a_row_ends_at_the_boundary_alone() -> None:
    """The boundary is no byte of the row; the other rows go on; none has more than n bytes."""
    model = model_of()
    whole = model.logits
    calls = 0

    def ending(x: Tensor) -> Tensor:
        """Row 0 ends as its fourth byte, row 1 at once, row 2 never."""
        nonlocal calls
        calls += 1
        out = whole(x).clone()
        out[..., BOUNDARY] = -torch.inf
        if calls == 4:
            out[0, BOUNDARY] = torch.inf
        if calls == 1:
            out[1, BOUNDARY] = torch.inf
        return torch.where(out == torch.inf, torch.full_like(out, 1e6), out)

    model.logits = ending  # type: ignore[method-assign]
    rows = generate(model, [b"ab", b"cd", b"ef"], 9, Sampling())
    assert [len(row) for row in rows] == [3, 0, 9]
    assert calls == 9, "and nothing is computed when all are done"


@settings(max_examples=15, deadline=None)
@given(prompts=st.lists(st.binary(max_size=20), max_size=4), n=st.integers(0, 9), seed=st.integers(0, 2**63 - 1))
def test_never_more_than_n_bytes_and_never_fewer_rows(prompts: list[bytes], n: int, seed: int) -> None:
    rows = generate(SHARED, prompts, n, Sampling(seed=seed))
    assert len(rows) == len(prompts)
    assert all(len(row) <= n for row in rows)


SHARED = model_of(1)


def test_the_models_mode_is_given_back() -> None:
    """Dropout is off while bytes are drawn, and on again in a training that was interrupted for it."""
    model = randomised(tiny.make(2, "paper"))
    model.train()
    first = generate(model, [b"abc"], 8, Sampling())
    assert model.training
    model.eval()
    assert generate(model, [b"abc"], 8, Sampling()) == first
    assert not model.training


# ---- files and text ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_text_for_people_drops_nothing(content: bytes) -> None:
    """Every byte is there: as UTF-8, or as backslash x and two digits."""
    shown = as_text(content)
    rest = content
    for piece in split_as_text(shown, content):
        assert rest.startswith(piece)
        rest = rest[len(piece) :]
    assert rest == b""


def split_as_text(shown: str, content: bytes) -> list[bytes]:
    """The bytes that stand for each character or escape of what is shown; follows content where both could be meant."""
    pieces: list[bytes] = []
    at = i = 0
    while i < len(shown):
        escape = shown[i : i + 4]
        if escape.startswith("\\x") and not content[at:].startswith(b"\\x"):
            piece, i = bytes([int(escape[2:], 16)]), i + 4
        else:
            piece, i = shown[i].encode(), i + 1
        pieces.append(piece)
        at += len(piece)
    return pieces


def test_the_file_holds_prompt_and_continuation_as_raw_bytes(tmp_path: Path) -> None:
    """Also a prompt that is no UTF-8; by default under RUN/samples, with step and seed in its name."""
    made_run(tmp_path / "run", tiny.make(2))
    prompt = b"\xff\xfe\0def "
    written = sample.sample_run(tmp_path / "run", prompt, 20, Sampling(seed=5))
    assert written.path == tmp_path / "run" / "samples" / "step_0000000004_seed_5.txt"
    assert written.path.read_bytes() == prompt + written.continuation
    assert written.prompt == prompt
    assert written.bytes_per_s > 0
    there = sample.sample_run(tmp_path / "run", prompt, 20, Sampling(seed=5), tmp_path / "a" / "b.bin")
    assert there.path.read_bytes() == prompt + written.continuation


def test_sample_json_has_the_contracts_keys(tmp_path: Path) -> None:
    made_run(tmp_path / "run", tiny.make(2))
    (tmp_path / "prompt").write_bytes(b"\xff\0")
    options = [f"--prompt-file={tmp_path / 'prompt'}", "--bytes=9", "--temperature=1", "--top-k=40", "--top-p=0.9"]
    ended = launch.mbtrain(["sample", str(tmp_path / "run"), *options, f"--out={tmp_path / 'out'}", "--json"])
    figures = launch.last_json(ended.stdout)
    assert set(figures) == {"path", "bytes", "bytes_per_s"}
    content = (tmp_path / "out").read_bytes()
    assert content.startswith(b"\xff\0")
    assert figures["bytes"] == len(content) - 2 <= 9
    assert figures["path"] == str(tmp_path / "out")
    assert ended.stdout.startswith("\\xff\0")
