"""The compiled step of a byte gives the full forward pass's logits, and what it does not cover goes through torch.

pytest tests/model/test_native.py
"""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch

from mbtrain.model import compiled, native
from mbtrain.model.decode import Decoder
from mbtrain.sample import Sampling, generate
from tests import tiny
from tests.model.test_megabyte import randomised

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

MUP = {"parametrization": "mup", "stages": [{**stage, "base_d_model": 8} for stage in tiny.STAGES[2]]}
ODD = [
    {**tiny.STAGES[2][0], "d_model": 44, "n_heads": 2},
    {**tiny.STAGES[2][1], "d_model": 66, "n_heads": 2, "d_ff": 100},
]
VARIANTS: dict[str, dict[str, Any]] = {
    "one stage": {"stages": tiny.STAGES[1]},
    "three stages": {"stages": tiny.STAGES[3]},
    "paper": {"preset": "paper"},
    "paper, three stages": {"preset": "paper", "stages": tiny.STAGES[3]},
    "token shift": {"block": {"token_shift": True}},
    "bias, without qk_norm": {"block": {"bias": True, "qk_norm": False}},
    "rmsnorm without gain": {"block": {"norm": "rmsnorm", "norm_gain": False}},
    **{kind: {"block": {"activation": kind}} for kind in native.ACTIVATIONS},
    "positions learned": {"positions": "learned", "local_positions": "rotary"},
    "positions none": {"positions": "none", "local_positions": "none"},
    "tied, no final norm": {"tied": True, "final_norm": False},
    "window": {"stages": [{**tiny.STAGES[2][0], "window": 3}, tiny.STAGES[2][1]]},
    "without global": {"without": "global"},
    "features left over": {"stages": ODD},
    "muP": MUP,
}


def model_of(seq_len: int = 32, **model: Any) -> Any:
    """A model in fp32 with large random weights."""
    return randomised(tiny.make(seq_len=seq_len, model={**tiny.tree()["model"], **model})).float()


def fed(decoder: Decoder, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Logits after each of these pieces of ids, (b, pieces, v)."""
    ends = torch.tensor(pieces).cumsum(0).tolist()
    return torch.stack([decoder.feed(ids[:, end - m : end]) for m, end in zip(pieces, ends, strict=True)], dim=1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("pieces", [[0] + [1] * 31, [7, 1, 1, 1, 4, 1, 1, 1, 0, 1, 8, 1, 1, 1, 1, 1]])
def test_logits_equal_the_full_forward(name: str, pieces: list[int]) -> None:
    """In bytes and in pieces among them, against float64."""
    model = model_of(**VARIANTS[name])
    ids = torch.randint(0, 257, (7, 32))
    with torch.no_grad():
        full = copy.deepcopy(model).double()(ids)
    decoder = Decoder(model, 7)
    assert decoder.native is not None
    got = fed(decoder, ids, pieces)
    expected = full[:, torch.tensor(pieces).cumsum(0)]
    torch.testing.assert_close(got.double(), expected, atol=2e-4 * float(expected.abs().max()), rtol=0)


def test_a_rows_bits_depend_neither_on_its_neighbours_nor_on_threads() -> None:
    model = model_of(block={"token_shift": True})
    ids = torch.randint(0, 257, (13, 20))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            decoder = Decoder(model, 13)
            assert decoder.native is not None
            assert len(decoder.native.parts) == count
            found.append(fed(decoder, ids, [3] + [1] * 17))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][:, 1:], found[1][:, 1:])
    decoder = Decoder(model, 13)
    decoder.feed(ids[:, :3])
    assert decoder.native is not None
    alone = Decoder(model, 1)
    alone.feed(ids[5:6, :3])
    for here, there in zip(alone.caches, decoder.caches, strict=True):  # torch rounds a prompt as it likes
        for one, many in zip(here, there, strict=True):
            for name in ("keys", "values", "attn_last", "ffn_last"):
                getattr(one, name).copy_(getattr(many, name)[5:6])
    assert alone.native is not None
    for one, many in zip(alone.native.outputs, decoder.native.outputs, strict=True):
        one.copy_(many[5:6])
    for t in range(3, 20):
        assert torch.equal(alone.feed(ids[5:6, t : t + 1])[0], decoder.feed(ids[:, t : t + 1])[5])


HOW = [Sampling(0.0), Sampling(seed=4), Sampling(0.3), Sampling(top_k=5, seed=1), Sampling(1.5, top_p=0.9)]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("ends", [True, False])
def test_what_is_generated_is_what_torch_generates(how: Sampling, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several lengths, past the end of a row, to the boundary or beyond it; in fp32 with a fixed seed."""
    model = model_of(stages=tiny.STAGES[3], block={"token_shift": True})
    prompts = [b"", b"hello", bytes(range(40)), b"abcdefgh"]
    fast = generate(model, prompts, 90, how, ends=ends)
    monkeypatch.setattr(native, "covers", lambda model: False)
    assert fast == generate(model, prompts, 90, how, ends=ends)
    assert any(fast)


def test_a_full_row_goes_on_from_its_second_half() -> None:
    model = model_of()
    decoder, slow = Decoder(model, 2), Decoder(model, 2, compiled=False)
    assert slow.native is None
    ids = torch.randint(0, 257, (2, 75))
    for t in range(75):
        new = ids[:, t : t + 1]
        torch.testing.assert_close(decoder.feed(new), slow.feed(new), atol=2e-3, rtol=1e-4)


OTHERS: dict[str, dict[str, Any]] = {
    "cross_patch": {"cross_patch": 2},
    "without local": {"without": "local"},
    "convolutions": {"conv_encoder": [3, 5]},
    "documents apart": {"isolate_documents": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_go_through_torch(name: str) -> None:
    assert Decoder(model_of(**OTHERS[name]), 1).native is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_go_through_torch(dtype: torch.dtype) -> None:
    assert Decoder(model_of().to(dtype), 1).native is None


@pytest.mark.parametrize("change", [{"MBTRAIN_NATIVE": "0"}, {"CC": "no-such-compiler"}, {"CC": "false"}])
def test_without_compiler_torch_does_it(change: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    compiled.library.cache_clear()
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert Decoder(model_of(), 1).native is None
        assert len(generate(model_of(), [b"ab"], 9, Sampling(), ends=False)[0]) == 9
    finally:
        monkeypatch.undo()
        compiled.library.cache_clear()
        native.library.cache_clear()


def test_an_id_that_is_no_byte_is_refused() -> None:
    decoder = Decoder(model_of(), 2)
    decoder.feed(torch.zeros((2, 0), dtype=torch.int64))
    for wrong in (257, -1):
        with pytest.raises(IndexError):
            decoder.feed(torch.tensor([[0], [wrong]]))
