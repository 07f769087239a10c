"""The paper's extensions and ablations, and windows: what each byte sees, equality with definitions, cached generation.

pytest tests/model/test_extensions.py
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mbtrain.config import ModelConfig
from mbtrain.errors import ConfigError
from mbtrain.model import build, layers
from mbtrain.model.decode import Decoder
from mbtrain.model.layers import attend, attend_window, role_of
from mbtrain.model.loss import nats
from mbtrain.model.megabyte import Megabyte
from tests import naive, tiny
from tests.model.test_megabyte import naive_twin, randomised

# 34 = 4 * 8 + 2 and 35 = 4 * 8 + 3: features are left over at the input and in the slices.
LEFT_OVER = [
    {"patch_size": 4, "d_model": 34, "n_layers": 2, "n_heads": 1},
    {"patch_size": 1, "d_model": 16, "n_layers": 2, "n_heads": 2},
]
LEFT_OVER_3 = [
    {"patch_size": 8, "d_model": 35, "n_layers": 1, "n_heads": 5},
    {"patch_size": 2, "d_model": 21, "n_layers": 1, "n_heads": 3},
    {"patch_size": 1, "d_model": 16, "n_layers": 1, "n_heads": 2},
]

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "cross 1": (2, {"cross_patch": 1}),
    "cross 3 rotary": (2, {"cross_patch": 3, "positions": "rotary", "local_positions": "rotary"}),
    "cross 4 none": (2, {"cross_patch": 4, "local_positions": "none"}),
    "cross 2 of three": (3, {"cross_patch": 2}),
    "cross 3, shift": (2, {"cross_patch": 3, "block": {"token_shift": True}}),
    "conv": (2, {"conv_encoder": [3, 5, 7]}),
    "conv learned biased": (2, {"conv_encoder": [2], "positions": "learned", "block": {"bias": True}}),
    "conv and cross of three": (3, {"conv_encoder": [3, 2], "cross_patch": 1}),
    "no local": (2, {"without": "local"}),
    "no local tied": (2, {"without": "local", "tied": True, "final_norm": False}),
    "no local, conv": (2, {"without": "local", "conv_encoder": [3, 5]}),
    "no global": (2, {"without": "global"}),
    "no global tied": (2, {"without": "global", "tied": True, "local_positions": "none"}),
    "no global, cross": (2, {"without": "global", "cross_patch": 3}),
    "window 1": (2, {"window": 1}),
    "window 2": (2, {"window": 2, "positions": "learned"}),
    "window of bytes": (1, {"window": 5}),
    "window, cross, conv": (2, {"window": 2, "cross_patch": 2, "conv_encoder": [3]}),
    "left over": (2, {"stages": LEFT_OVER}),
    "left over learned": (2, {"stages": LEFT_OVER, "positions": "learned", "cross_patch": 2, "conv_encoder": [3]}),
    "left over of three": (3, {"stages": LEFT_OVER_3, "positions": "learned"}),
    "left over, no local": (2, {"stages": LEFT_OVER, "without": "local"}),
    "left over, documents": (2, {"stages": LEFT_OVER, "positions": "learned", "isolate_documents": True}),
}
each_case = pytest.mark.parametrize("case", CASES)


def settled(case: str, preset: str = "modern", **more: Any) -> dict[str, Any]:
    """The model section of a case."""
    stages, choice = CASES[case]
    made = {**tiny.tree(stages)["model"], "preset": preset, **choice, **more}
    window = made.pop("window", None)
    made["stages"] = [{**made["stages"][0], **({"window": window} if window else {})}, *made["stages"][1:]]
    return made


def made(case: str, preset: str = "modern", seq_len: int = 32, **more: Any) -> Megabyte:
    """A case's model in float64, every parameter away from its initial value."""
    model = randomised(tiny.make(CASES[case][0], preset, seq_len, model=settled(case, preset, **more)))
    assert isinstance(model, Megabyte)
    return model


def rows(b: int, t: int) -> Tensor:
    return torch.randint(0, 256, (b, t), generator=torch.Generator().manual_seed(0))


@each_case
@pytest.mark.parametrize("preset", ["modern", "paper"])
def test_equals_its_definition_byte_by_byte(case: str, preset: str) -> None:
    model = made(case, preset)
    ids = rows(1, 22)
    spec, params = naive_twin(model)
    ends = [0, 1, 5, 8, 13, 21]
    expected = np.stack([naive.next_logits(ids[0, :t].tolist(), params, spec) for t in ends])
    np.testing.assert_allclose(model(ids)[0, ends].detach().numpy(), expected, atol=1e-9, rtol=0)


# ------------------------------------------------------------------------------------------------ what each byte sees


def seen(config: ModelConfig, t: int, *, handed_on: bool = True) -> np.ndarray:
    """(t, t): does the prediction of byte i depend on byte j? Followed from layer to layer, for one or two stages."""
    first, last = config.stages[0], config.stages[-1]
    p, reach = first.patch_size, sum(width - 1 for width in config.conv_encoder)
    parents: list[set[int]] = []
    if config.without != "global":
        parents = [set(range(max(0, (k - 1) * p - reach), k * p)) if k else set() for k in range((t - 1) // p + 1)]
        for _ in range(first.n_layers):
            window = first.window or len(parents)
            parents = [set().union(*parents[max(0, k - window + 1) : k + 1]) for k in range(len(parents))]
    if len(config.stages) == 1:
        out = parents
    else:
        own = [{i - 1} if i % p and config.without != "local" else set() for i in range(t)]
        handed = [parents[i // p] if parents and handed_on else set() for i in range(t)]
        out = [a | b for a, b in zip(own, handed, strict=True)]
        for _ in range(last.n_layers if config.without != "local" else 0):
            out = [set().union(*out[max(0, i // p * p - config.cross_patch) : i + 1]) for i in range(t)]
    return np.array([[j in out[i] for j in range(t)] for i in range(t)])


def moved(model: Megabyte, t: int) -> np.ndarray:
    """(t, t): does changing byte j move the logits of byte i, by however little?"""
    ids = rows(1, t)
    before = model(ids)
    table = np.zeros((t, t), dtype=bool)
    for j in range(t):
        changed = ids.clone()
        changed[0, j] = (changed[0, j] + 1) % 256
        table[:, j] = (model(changed) != before).any(dim=-1)[0].numpy()
    return table


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] < 3 and "documents" not in case])
def test_each_byte_sees_what_it_should_and_nothing_else(case: str) -> None:
    model = made(case).train()
    np.testing.assert_array_equal(moved(model, 30), seen(model.config, 30))


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] == 3])
def test_no_byte_of_three_stages_sees_itself_or_later_ones(case: str) -> None:
    np.testing.assert_array_equal(moved(made(case), 26), np.tri(26, k=-1, dtype=bool))


@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_cross_patch_attention_looks_r_positions_back_in_every_layer(r: int) -> None:
    """The global model hands nothing on here, so that all that is seen of earlier patches is seen by the local one."""
    model = made("cross 1", cross_patch=r)
    with torch.no_grad():
        model.stages[1].project.zero_()
    np.testing.assert_array_equal(moved(model, 24), seen(model.config, 24, handed_on=False))


def test_cross_patch_positions_are_relative() -> None:
    """Without a global model a patch knows nothing of its place in the row but that there is a patch before it."""
    model = made("no global, cross")
    ids = rows(2, 32)
    layers_, p = model.config.stages[1].n_layers, model.patch_size
    whole, cut = model(ids), model(ids[:, p:])
    torch.testing.assert_close(cut[:, layers_ * p :], whole[:, (layers_ + 1) * p :], atol=1e-12, rtol=0)
    assert (cut[:, :p] - whole[:, p : 2 * p]).abs().amax() > 1e-3, "of the first patch's, none is before it"


def test_convolutions_reach_12_bytes_back_and_know_no_position() -> None:
    stage = made("conv learned biased", conv_encoder=[3, 5, 7]).stages[0]
    assert stage.convolutions.reach == 12
    h = torch.randn(1, 40, 8, dtype=torch.float64)
    changed = h.clone()
    changed[:, 20] += 1
    where = (stage.convolutions(changed) != stage.convolutions(h)).any(dim=-1)[0].nonzero().squeeze(1)
    assert where.tolist() == list(range(20, 33))
    torch.testing.assert_close(stage.convolutions(h[:, 5:])[:, 12:], stage.convolutions(h)[:, 17:], atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------- cached generation


@each_case
@pytest.mark.parametrize("prompt", [0, 7, 18])
def test_generation_equals_the_full_forward_at_every_step(case: str, prompt: int) -> None:
    model = made(case)
    ids = rows(3, 31)
    full = model(torch.cat((ids, ids[:, :1]), dim=1))
    decoder = model.decoder(3)
    got = [decoder.feed(ids[:, :prompt])] + [decoder.feed(ids[:, t : t + 1]) for t in range(prompt, 31)]
    torch.testing.assert_close(torch.stack(got, dim=1), full[:, prompt:], atol=1e-9, rtol=0)


@each_case
@pytest.mark.parametrize("pieces", [[1, 1, 20, 1], [0, 7, 9], [16, 3, 4]])
def test_bytes_may_come_in_pieces(case: str, pieces: list[int]) -> None:
    model = made(case, "paper")
    ids = rows(2, sum(pieces) + 1)
    full, decoder, n = model(ids), Decoder(model, 2), 0
    for piece in pieces:
        logits = decoder.feed(ids[:, n : n + piece])
        n += piece
        torch.testing.assert_close(logits, full[:, n], atol=1e-9, rtol=0)


@each_case
def test_a_full_row_goes_on_from_its_second_half(case: str) -> None:
    model = made(case)
    ids = rows(1, 45)
    decoder = Decoder(model, 1)
    decoder.feed(ids[:, :30])
    for t in range(30, 45):
        logits = decoder.feed(ids[:, t : t + 1])
        if t in (31, 32, 37, 44):
            expected = model(torch.cat((ids[:, 16 : t + 1], ids[:, :1]), dim=1))[:, -1]
            torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


def test_a_long_prompt_runs_the_local_model_in_few_patches() -> None:
    """Cross-patch attention of two layers looks two patches back: what came earlier is not run."""
    model = made("cross 4 none", seq_len=128)
    decoder, runs = Decoder(model, 1), []
    model.stages[1].transformer.register_forward_hook(lambda *_: runs.append(1))
    decoder.feed(rows(1, 102))
    assert len(runs) == 3
    runs.clear()
    decoder.feed(rows(1, 1))
    assert runs == [], "one byte is one step"


# ------------------------------------------------------------------------------------------------------------ windows


def banded(t: int, s: int, window: int) -> Tensor:
    i, j = torch.arange(s - t, s)[:, None], torch.arange(s)
    return ((j <= i) & (j > i - window)).view(1, 1, t, s)


@settings(max_examples=60, deadline=None)
@given(t=st.integers(1, 40), before=st.integers(0, 20), window=st.integers(1, 50), chunk=st.sampled_from([3, 8, 128]))
def test_a_window_is_attention_with_a_band_for_a_mask(t: int, before: int, window: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layers, "_WINDOW_CHUNK", chunk)
        q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (t, t + before, t + before))
        expected = attend(q, k, v, 0.0, banded(t, t + before, window))
        torch.testing.assert_close(attend_window(q, k, v, window, 0.0), expected, atol=1e-12, rtol=0)
        masked = attend_window(q, k, v, window, 0.0, banded(t, t + before, 10**6))
        torch.testing.assert_close(masked, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_of_torch_s_kernel_and_of_plain_products_agree(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 1300, 16).to(dtype) for _ in range(3))
    expected = attend(q.double(), k.double(), v.double(), 0.0, banded(1300, 1300, 600))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(attend_window(q, k, v, 600, 0.0).double(), expected, atol=tolerance, rtol=0)


def test_the_work_of_a_window_grows_as_the_row() -> None:
    def flops(t: int) -> int:
        q = torch.randn(1, 1, t, 8)
        with FlopCounterMode(display=False) as counter:
            attend_window(q, q, q, 16, 0.0)
        return counter.get_total_flops()

    assert flops(2048) == 4 * flops(512) == 2048 * 4 * 8 * (16 + 16)


# ----------------------------------------------------------------------------------------------------------- training


@each_case
def test_every_parameter_is_used_and_has_a_role(case: str) -> None:
    model = made(case).train()
    ids = rows(2, 32)
    ids[:, 13] = 256 if model.config.isolate_documents else ids[:, 13]
    nats(model(ids), ids).mean().backward()
    for name, param in model.named_parameters():
        role_of(name, param)
        assert param.grad is not None, name
        assert param.grad.abs().sum() > 0, name


@each_case
def test_activation_checkpointing_changes_no_gradient(case: str) -> None:
    ids, grads = rows(2, 32), []
    for checkpointing in (False, True):
        model = made(case).train()
        for module in model.modules():
            if isinstance(module, layers.Transformer):
                module.checkpointing = checkpointing
        nats(model(ids), ids).mean().backward()
        grads.append([param.grad for param in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["no local", "no global, cross", "window, cross, conv", "left over learned"])
def test_it_begins_near_a_uniform_guess_and_learns_under_autocast(case: str) -> None:
    torch.manual_seed(0)
    model = build(tiny.make(CASES[case][0], "paper", model=settled(case, "paper", init={"std": 0.02}))).train()
    ids, losses = rows(4, 32), []
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nats(model(ids), ids).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(257), abs=0.2)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("preset", ["modern", "paper"])
def test_convolutions_begin_near_the_identity_in_scale(preset: str) -> None:
    torch.manual_seed(0)
    stages = [{**tiny.STAGES[2][0], "d_model": 256}, tiny.STAGES[2][1]]
    model = build(tiny.make(2, preset, model=settled("conv", preset, stages=stages)))
    h = torch.randn(4, 64, 64)
    out = model.stages[0].convolutions(h)
    assert 1.0 < out.std() / h.std() < 1.5
    assert torch.corrcoef(torch.stack((h.flatten(), out.flatten())))[0, 1] > 0.75


def test_names_of_parameters_are_those_of_old_checkpoints() -> None:
    block = [f"{part}.weight" for part in ("attn.qkv", "attn.out", "ffn.up", "ffn.down")]
    block += ["attn_norm.gain", "ffn_norm.gain"]
    expected = {"readout", "stages.1.project", "stages.1.positions"}
    for s in (0, 1):
        expected |= {f"stages.{s}.{name}" for name in ("embed", "pad", "transformer.final_norm.gain")}
        expected |= {f"stages.{s}.transformer.blocks.{i}.{name}" for i in (0, 1) for name in block}
    assert set(build(tiny.make(2)).state_dict()) == expected


def test_the_interface_of_all_models() -> None:
    model = made("cross 1")
    assert model.unit_bytes(rows(1, 8)) is None
    assert model.training_span(32, 3) is None
    given = torch.rand(2, 3, dtype=torch.bfloat16)
    assert nats(given, rows(2, 3)).dtype == torch.float32, "nats of a model that gives nats"
    assert torch.equal(nats(given, rows(2, 3)), given.float())


def test_cross_patch_needs_an_even_width_of_heads() -> None:
    stages = [tiny.STAGES[2][0], {"patch_size": 1, "d_model": 15, "n_layers": 1, "n_heads": 3}]
    tiny.make(2, model=settled("cross 1", stages=stages, cross_patch=0))
    with pytest.raises(ConfigError, match=r"model\.stages\.1\.n_heads: got 3, expected an even width"):
        tiny.make(2, model=settled("cross 1", stages=stages))
