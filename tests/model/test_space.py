"""Space patches: the rule, the model against a naive reading of its definition, causality, generation.

pytest tests/model/test_space.py
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain import vocab
from mbtrain.config import Config
from mbtrain.model import build
from mbtrain.model.layers import Transformer
from mbtrain.model.loss import nats
from mbtrain.model.megabyte import Megabyte
from mbtrain.model.patching import mean_patch_bytes, patches
from mbtrain.model.sequence import Part
from mbtrain.model.space import SpaceMegabyte
from tests import naive, tiny
from tests.model.test_megabyte import naive_twin, randomised

P = 4
# Short and long words, runs of spaces, UTF-8, brackets, a boundary after a letter and after a space, zeros.
TEXT = [*b"a  bc, d", *"éf".encode(), *b"(gh))1234567", vocab.BOUNDARY, *b"k ", vocab.BOUNDARY, *b"\0\0\0\0\0z"]
CHOICES: list[dict[str, Any]] = [
    {"preset": "paper"},
    {"preset": "modern"},
    {"cross_patch": 3},
    {"cross_patch": 4, "positions": "learned", "local_positions": "none", "tied": True, "block": {"norm": "rmsnorm"}},
    {"positions": "none", "local_positions": "rotary", "final_norm": False, "block": {"activation": "swiglu"}},
    {"window": 3},
]
LEFT_OVER: dict[str, Any] = {"d_model": 34, "positions": "learned"}  # 34 features in 4 slots


def settled(choice: dict[str, Any], seq_len: int = 40, patching: str = "space") -> Config:
    stages = [dict(stage) for stage in tiny.STAGES[2]]
    stages[0] |= {key: choice[key] for key in ("window", "d_model") if key in choice}
    model = {"stages": stages, "patching": patching, **{k: v for k, v in choice.items() if k not in stages[0]}}
    return tiny.make(seq_len=seq_len, model=model)


def made(choice: dict[str, Any], seq_len: int = 40) -> SpaceMegabyte:
    model = randomised(settled(choice, seq_len))
    assert isinstance(model, SpaceMegabyte)
    return model


def rows(*texts: list[int], t: int) -> torch.Tensor:
    return torch.tensor([text[:t] for text in texts])


# ---------------------------------------------------------------------------------------------------------- the rule


def is_space(byte: int) -> bool:
    return not (byte < 0x80 and chr(byte).isalnum()) and not 0x80 <= byte < 0xC0


def cut(prefix: list[int], longest: int) -> list[list[int]]:
    """The patches of these bytes, one after the other; the last is the one that the next byte belongs to."""
    out: list[list[int]] = [[]]
    for i, byte in enumerate(prefix):
        out[-1].append(byte)
        ruled = byte == vocab.BOUNDARY or (is_space(byte) and not (i > 0 and is_space(prefix[i - 1])))
        if ruled or len(out[-1]) == longest:
            out.append([])
    return out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"the cat, sat", [b"the ", b"cat,", b" sat", b""]),
        (b"a  b\n\nc", [b"a ", b" b\n", b"\nc"]),
        (b"f(x)[0]", [b"f(", b"x)", b"[0]", b""]),
        ("né à".encode(), [b"n\xc3", b"\xa9 ", b"\xc3\xa0"]),  # a leading byte is spacelike, a continuation is not
        ("日本".encode(), [b"\xe6", b"\x97\xa5\xe6", b"\x9c\xac"]),
        (b"abcdefgh i", [b"abcd", b"efgh", b" ", b"i"]),
        (b"  x", [b" ", b" x"]),
        (b"\0\0\0\0\0\0", [b"\0", b"\0\0\0\0", b"\0"]),
        (b"aaaaa", [b"aaaa", b"a"]),
    ],
)
def test_patches_end_where_words_do(text: bytes, expected: list[bytes]) -> None:
    assert [bytes(patch) for patch in cut(list(text), P)] == expected
    where = patches(torch.tensor([list(text)]), P)
    starts = np.cumsum([0] + [len(patch) for patch in expected[:-1]]).tolist()
    assert where.starts[0].nonzero().squeeze(1).tolist() == starts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([32, 33, 65, 97, 0x80, 0xBF, 0xC0, 0, 255, 256]), max_size=24), st.integers(1, 6))
def test_patches_are_those_of_the_bytes_one_by_one(text: list[int], longest: int) -> None:
    where = patches(torch.tensor([text], dtype=torch.int64).view(1, -1), longest)
    for t in range(len(text) + 1):
        whole = cut(text[:t], longest)
        assert (int(where.number[0, t]), int(where.place[0, t])) == (len(whole) - 1, len(whole[-1]))
        assert bool(where.starts[0, t]) == (not whole[-1])


def test_every_value_is_classed() -> None:
    for byte in range(257):
        ended = bool(patches(torch.tensor([[97, byte]]), 9).starts[0, 2])
        assert ended == (byte == 256 or is_space(byte)), byte
    assert bool(patches(torch.tensor([[32, 256]]), 9).starts[0, 2]), "a boundary ends a patch after a space, too"


def test_unit_bytes_is_the_mean_patch() -> None:
    model = made({})
    ids = np.array([list(b"a bc def ghi"), [97] * 12])
    assert mean_patch_bytes(ids, P) == 24 / (4 + 3)
    assert model.unit_bytes(torch.from_numpy(ids)) == 24 / (4 + 3)


# --------------------------------------------------------------------------------------------------------- the model


def naive_attention(ys: list[np.ndarray], block: Any, spec: naive.Spec, s: int, first: list[int]) -> list[np.ndarray]:
    """Position i looks at first[i] .. i."""
    stage, d = spec.stages[s], spec.stages[s].d_model
    out = [np.zeros(d) for _ in ys]
    qkv = [naive.affine(block["qkv"], block["qkv_bias"], y) for y in ys]
    for head in range(stage.n_heads):
        q, k, v = ([x[at * d + head * stage.d_head :][: stage.d_head] for x in qkv] for at in range(3))
        if spec.qk_norm:
            q, k = ([naive.rms_normalise(x - x.mean()) for x in xs] for xs in (q, k))
        if spec.positions[s] == "rotary":
            q, k = ([naive.rotate(x, i) for i, x in enumerate(xs)] for xs in (q, k))
        for i in range(len(ys)):
            looked_at = range(first[i], i + 1)
            weights = naive.softmax([float(q[i] @ k[j]) / math.sqrt(stage.d_head) for j in looked_at])
            mixed = sum(w * v[j] for w, j in zip(weights, looked_at, strict=True))
            out[i][head * stage.d_head : (head + 1) * stage.d_head] = mixed
    return [naive.affine(block["out"], block["out_bias"], z) for z in out]


def naive_transformer(xs: list[np.ndarray], p: Any, spec: naive.Spec, s: int, first: list[int]) -> list[np.ndarray]:
    for block in p["blocks"]:
        normed = [naive.norm(x, block["norm1"], spec.norm) for x in xs]
        xs = [x + a for x, a in zip(xs, naive_attention(normed, block, spec, s, first), strict=True)]
        normed = [naive.norm(x, block["norm2"], spec.norm) for x in xs]
        xs = [x + naive.ffn(n, block, spec.stages[s], spec.activation) for x, n in zip(xs, normed, strict=True)]
    return [naive.norm(x, p["final_norm"], spec.norm) for x in xs] if spec.final_norm[s] else xs


def naive_logits(prefix: list[int], model: SpaceMegabyte) -> np.ndarray:
    """The logits (v,) of the byte after these, made of nothing else."""
    spec, params = naive_twin(model)
    c, (coarse, local) = model.config, params["stages"]
    if c.cross_patch:  # the last stage's positions are then rotary, whether it has a table besides or not
        spec = replace(spec, positions=(spec.positions[0], "rotary"))
    filler, width = model.filler.detach().numpy(), c.stages[0].d_model // P
    whole = cut(prefix, P)

    positions, t = [coarse["pad"]], 0
    for patch in whole[:-1]:
        slots = [filler] * P
        for i, byte in enumerate(patch):
            slots[i] = coarse["embed"][byte] + (coarse["pos"][t + i] if coarse["pos"] is not None else 0)
        t += len(patch)
        positions.append(np.concatenate(slots))
    window = c.stages[0].window or len(positions)
    out = naive_transformer(positions, coarse, spec, 0, [max(0, i + 1 - window) for i in range(len(positions))])

    xs, first = [], []
    for k, patch in enumerate(whole):
        start = len(xs)
        for place in range(len(patch) + (k + 1 == len(whole))):
            x = local["pad"] if place == 0 else local["embed"][patch[place - 1]]
            x = x + local["project"] @ out[k][place * width : (place + 1) * width]
            xs.append(x if local["pos"] is None else x + local["pos"][place])
            first.append(max(0, start - c.cross_patch))
    last = naive_transformer(xs, local, spec, 1, first)[-1]
    table = local["embed"] if spec.tied else params["unembed"]
    return np.array(table @ last)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_equals_its_definition_byte_by_byte(choice: dict[str, Any]) -> None:
    model = made(choice)
    expected = np.stack([naive_logits(TEXT[:t], model) for t in range(len(TEXT))])
    np.testing.assert_allclose(model(torch.tensor([TEXT]))[0].detach().numpy(), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("choice", [{"preset": "paper"}, {}, {"cross_patch": 3}, {"window": 3}, LEFT_OVER], ids=str)
def test_patches_of_full_length_are_megabyte(choice: dict[str, Any]) -> None:
    model = made(choice)
    fixed = build(settled(choice, patching="fixed")).double().eval()
    assert type(fixed) is Megabyte
    fixed.load_state_dict({name: x for name, x in model.state_dict().items() if name != "filler"})
    ids = torch.randint(ord("a"), ord("z") + 1, (3, 37))
    torch.testing.assert_close(model(ids), fixed(ids), atol=1e-10, rtol=0)


@pytest.mark.parametrize("choice", [{}, {"cross_patch": 4, "preset": "paper", "block": {"dropout": 0.0}}], ids=str)
@pytest.mark.parametrize("to", [ord(" "), ord("q"), 0x80, vocab.BOUNDARY])
def test_no_byte_moves_an_output_at_or_before_it(choice: dict[str, Any], to: int) -> None:
    model = made(choice).train()
    ids = torch.tensor([TEXT])
    before = model(ids)
    for t, byte in enumerate(TEXT):
        changed = ids.clone()
        changed[0, t] = to if byte != to else to + 1 if to < 256 else 32
        after = model(changed)
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-11, rtol=0)
        if t + 1 < len(TEXT):
            assert (after[:, t + 1] - before[:, t + 1]).abs().max() > 1e-6, f"byte {t} is not seen by the next output"


@pytest.mark.parametrize("t", [0, 1, 2, 7, 16, 21])
def test_probabilities_of_all_next_bytes_sum_to_one(t: int) -> None:
    """Each is read where that byte stands, so that one which looked at itself would be found out."""
    model = made({"cross_patch": 2})
    ids = torch.cat((torch.tensor(TEXT[:t]).long().expand(257, -1), torch.arange(257).unsqueeze(1)), dim=1)
    assert math.isclose(nats(model(ids), ids)[:, -1].neg().exp().double().sum().item(), 1.0, abs_tol=1e-6)


@pytest.mark.parametrize("t", [1, 2, 9, 31])
def test_rows_do_not_see_one_another(t: int) -> None:
    model = made({"preset": "paper"})
    ids = rows(TEXT, [97] * 31, [32, 97] * 16, [256] * 31, [0] * 31, t=t)
    together = model(ids)
    for i in range(len(ids)):
        torch.testing.assert_close(together[i], model(ids[i : i + 1])[0], atol=1e-11, rtol=0)
    torch.testing.assert_close(model(rows(TEXT, t=31))[:, :t], together[:1], atol=1e-11, rtol=0)


def test_every_parameter_learns_and_checkpointing_changes_nothing() -> None:
    model = made({"cross_patch": 2, "positions": "learned"}).train()
    ids = rows(TEXT, [*b"word word, words"] * 2, t=31)
    gradients = []
    for checkpointing in (False, True):
        for module in model.modules():
            if isinstance(module, Transformer):
                module.checkpointing = checkpointing
        model.zero_grad()
        nats(model(ids), ids).mean().backward()
        gradients.append([param.grad.clone() for param in model.parameters() if param.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    assert all(bool(g.abs().sum() > 0) and bool(g.isfinite().all()) for g in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-12, rtol=0)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_trains_in_bf16(weights: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build(settled({"cross_patch": 2})).train()
    ids = rows(TEXT, [0] * 31, t=31)
    exact = model(ids)
    model = model.to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        logits = model(ids)
    nats(logits, ids).mean().backward()
    assert (logits.float() - exact).norm() < 0.025 * exact.norm()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_ranks_cannot_share_its_rows() -> None:
    with pytest.raises(ValueError, match="patching=space"):
        made({}).share(Part(0, 2), lambda q, k, v, dropout, mask: q)


# --------------------------------------------------------------------------------------------------------- generation

OTHERS = ([*b"another row of text, with words"], [97] * 31, [32, 97] * 16)


@pytest.mark.parametrize("choice", [*CHOICES, LEFT_OVER], ids=str)
@pytest.mark.parametrize(("prompt", "batch"), [(0, 4), (1, 1), (13, 4), (21, 1)])
def test_generation_equals_the_full_forward_at_every_step(choice: dict[str, Any], prompt: int, batch: int) -> None:
    model = made(choice)
    ids = rows(TEXT, *OTHERS, t=31)[:batch]
    full = model(torch.cat((ids, ids[:, :1]), dim=1))
    decoder = model.decoder(batch)
    got = [decoder.feed(ids[:, :prompt])] + [decoder.feed(ids[:, t : t + 1]) for t in range(prompt, 31)]
    torch.testing.assert_close(torch.stack(got, dim=1), full[:, prompt:], atol=1e-9, rtol=0)


def test_bytes_may_come_in_pieces_of_any_size() -> None:
    model = made({"cross_patch": 3})
    ids = rows(TEXT, *OTHERS, t=31)
    decoder = model.decoder(4)
    n = 0
    for piece in (0, 5, 1, 1, 11, 0, 1, 2, 1):
        logits = decoder.feed(ids[:, n : n + piece])
        n += piece
        torch.testing.assert_close(logits, model(ids[:, : n + 1])[:, n], atol=1e-9, rtol=0)


def test_a_long_row_is_generated_as_it_is_scored() -> None:
    """Long enough for every cache to be moved and enlarged."""
    model = made({"cross_patch": 1}, seq_len=160)
    torch.manual_seed(1)
    ids = torch.tensor([32, 97, 98, 99, 256])[torch.randint(0, 5, (3, 150))]
    full = model(ids)
    decoder = model.decoder(3)
    for t in range(149):
        logits = decoder.feed(ids[:, t : t + 1])
        torch.testing.assert_close(logits, full[:, t + 1], atol=1e-9, rtol=0)


def test_a_full_row_goes_on_from_its_second_half() -> None:
    model = made({}, seq_len=32)
    torch.manual_seed(1)
    ids = torch.tensor([32, 97, 98])[torch.randint(0, 3, (2, 70))]
    decoder = model.decoder(2)
    for t in range(70):
        logits = decoder.feed(ids[:, t : t + 1])
        if t in (31, 40):
            expected = model(ids[:, 16 : t + 2])[:, t - 15]
            torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    assert model.decoder(2).feed(ids).shape == (2, 257), "a prompt longer than a row"
