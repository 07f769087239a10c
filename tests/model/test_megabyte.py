"""The model's laws: causality at every byte, equality with a naive reading of the equations, counts, odd inputs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mbtrain.config import Config
from mbtrain.model import build
from mbtrain.model.flops import count
from mbtrain.model.layers import role_of
from mbtrain.model.loss import nats
from mbtrain.model.megabyte import Megabyte, Slices
from mbtrain.model.mup import ROLES
from tests import naive, tiny

PRESETS = ("paper", "modern")


def randomised(config: Config, seed: int = 0) -> Megabyte:
    """A float64 model in eval mode whose every parameter, gains and biases too, is away from its initial value."""
    torch.manual_seed(seed)
    model = build(config).double()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return model.eval()


def naive_twin(model: Megabyte) -> tuple[naive.Spec, dict[str, Any]]:
    """The same model for the naive implementation."""
    c = model.config
    block = c.block
    spec = naive.Spec(
        stages=tuple(naive.StageSpec(s.patch_size, s.d_model, s.n_layers, s.n_heads, s.ff_width) for s in c.stages),
        vocab=model.vocab_size,
        norm=block.norm,
        norm_gain=block.norm_gain,
        activation=block.activation,
        bias=block.bias,
        qk_norm=block.qk_norm,
        positions=tuple(c.positions if i == 0 else c.local_positions for i in range(len(c.stages))),
        tied=c.tied,
        token_shift=block.token_shift,
        final_norm=c.final_norm,
        isolate_documents=c.isolate_documents,
        window=c.stages[0].window,
        cross_patch=c.cross_patch,
        conv=c.conv_encoder,
        without=c.without,
    )

    def array(x: torch.Tensor | None) -> np.ndarray | None:
        return None if x is None else x.detach().numpy()

    def norm(n: Any) -> dict[str, Any] | None:
        return None if n is None else {"gain": array(n.gain), "bias": array(n.bias)}

    def stage_params(stage: Any) -> dict[str, Any]:
        if isinstance(stage, Slices):
            return {"embed": array(stage.embed), "project": array(stage.project), "final_norm": norm(stage.final_norm)}
        return {
            "embed": array(stage.embed),
            "pos": array(stage.positions),
            "pad": array(stage.pad),
            "project": array(stage.project),
            "final_norm": norm(stage.transformer.final_norm),
            "conv": [
                {"weight": array(layer.weight), "bias": array(layer.bias)}
                for layer in (stage.convolutions.layers if stage.convolutions else ())
            ],
            "blocks": [
                {
                    "norm1": norm(b.attn_norm),
                    "qkv": array(b.attn.qkv.weight),
                    "qkv_bias": array(b.attn.qkv.bias),
                    "out": array(b.attn.out.weight),
                    "out_bias": array(b.attn.out.bias),
                    "norm2": norm(b.ffn_norm),
                    "up": array(b.ffn.up.weight),
                    "up_bias": array(b.ffn.up.bias),
                    "down": array(b.ffn.down.weight),
                    "down_bias": array(b.ffn.down.bias),
                }
                for b in stage.transformer.blocks
            ],
        }

    stages = [{}] * (c.without == "global") + [stage_params(stage) for stage in model.stages]
    return spec, {"stages": stages, "unembed": array(model.readout)}


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("t", [1, 7, 32])
def test_equals_the_equations_read_byte_by_byte(stages: int, preset: str, t: int) -> None:
    model = randomised(tiny.make(stages, preset))
    ids = torch.randint(0, 257, (1, t))
    spec, params = naive_twin(model)
    expected = naive.logits(ids[0].tolist(), params, spec)
    np.testing.assert_allclose(model(ids)[0].detach().numpy(), expected, atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    stages=st.sampled_from([1, 2, 3]),
    block=st.fixed_dictionaries(
        {
            "norm": st.sampled_from(["layernorm", "rmsnorm"]),
            "norm_gain": st.booleans(),
            "activation": st.sampled_from(["relu", "relu2", "gelu", "silu", "swiglu"]),
            "bias": st.booleans(),
            "qk_norm": st.booleans(),
            "token_shift": st.booleans(),
        }
    ),
    positions=st.sampled_from(["learned", "rotary", "none"]),
    local=st.sampled_from(["learned", "rotary", "none"]),
    tied=st.booleans(),
    final_norm=st.booleans(),
    t=st.integers(1, 24),
)
def test_every_choice_equals_the_equations(
    stages: int, block: dict, positions: str, local: str, tied: bool, final_norm: bool, t: int
) -> None:
    choice = {"block": block, "positions": positions, "local_positions": local, "tied": tied, "final_norm": final_norm}
    model = randomised(tiny.make(stages, model={**tiny.tree(stages)["model"], **choice}))
    ids = torch.randint(0, 257, (1, t))
    spec, params = naive_twin(model)
    expected = naive.logits(ids[0].tolist(), params, spec)
    np.testing.assert_allclose(model(ids)[0].detach().numpy(), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("stages", "preset", "training"), list(itertools.product([1, 2, 3], PRESETS, [False, True])))
def test_no_byte_moves_an_output_at_or_before_it(stages: int, preset: str, training: bool) -> None:
    base = tiny.tree(stages, preset)["model"]
    model = randomised(tiny.make(stages, preset, model={**base, "block": {"dropout": 0.0}})).train(training)
    ids = torch.randint(0, 257, (1, 24))
    before = model(ids)
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 257
        after = model(changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1]), f"byte {t} moved an output at or before itself"
        if t + 1 < ids.shape[1]:
            assert not torch.equal(after[:, t + 1], before[:, t + 1]), f"byte {t} is not seen by the next output"


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_last_byte_of_a_long_row_sees_the_first(stages: int) -> None:
    model = randomised(tiny.make(stages))
    ids = torch.randint(0, 257, (1, 32))
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 257
    assert not torch.equal(model(ids)[:, -1], model(changed)[:, -1])


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_row_of_any_length_gives_the_same_logits_as_its_extension(stages: int) -> None:
    model = randomised(tiny.make(stages))
    ids = torch.randint(0, 257, (2, 32))
    full = model(ids)
    for t in range(1, 33):
        torch.testing.assert_close(model(ids[:, :t]), full[:, :t], atol=1e-12, rtol=0)


@pytest.mark.parametrize("boundary", [False, True])
def test_uniform_logits_cost_exactly_8_bits(boundary: bool) -> None:
    model = build(tiny.make(2, "paper", data={"boundary": boundary}))
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    ids = torch.arange(256).view(8, 32)  # every byte value once
    bits = nats(model(ids).double(), ids) / math.log(2)
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(257) if boundary else 8.0), atol=1e-12, rtol=0)


def test_every_byte_value_is_scored_and_learned() -> None:
    config = tiny.make(2, data={"boundary": False})
    for ids in (torch.zeros((2, 32), dtype=torch.long), torch.full((2, 32), 255)):
        torch.manual_seed(0)
        model = build(config)
        loss = nats(model(ids), ids)
        assert (loss > 1.0).all()
        loss.mean().backward()
        assert model.readout is not None
        assert model.readout.grad is not None
        assert model.readout.grad[ids[0, 0]].abs().sum() > 0


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("choice", [{"preset": "paper"}, {"preset": "modern"}, {"block": {"activation": "swiglu"}}])
def test_parameters_and_flops_by_formula_and_by_counter(stages: int, choice: dict) -> None:
    config = tiny.make(stages, model={**tiny.tree(stages)["model"], **choice})
    model = build(config)
    assert count(config).parameters == sum(p.numel() for p in model.parameters())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros((3, config.data.seq_len), dtype=torch.long))
    by_formula = count(config, causal=False).forward_per_byte * 3 * config.data.seq_len
    assert counter.get_total_flops() == pytest.approx(by_formula, rel=1e-12)
    assert count(config).forward_per_byte < count(config, causal=False).forward_per_byte


def test_every_parameter_has_a_role() -> None:
    for stages, preset in itertools.product([1, 2, 3], PRESETS):
        for name, param in build(tiny.make(stages, preset)).named_parameters():
            assert role_of(name, param) in ROLES


def test_the_paper_preset_begins_as_the_paper_says() -> None:
    config = tiny.make(2, "paper")
    model = build(config)
    for name, param in model.named_parameters():
        if role_of(name, param) not in ("gain", "bias"):
            assert param.abs().max() <= 0.012 + 1e-9, name
            assert param.std().item() == pytest.approx(0.006 * 0.8796, rel=0.25), name
    assert model.readout is None, "eq. 6 ties the output to the last byte embedding"
    assert config.model.block.dropout == 0.1


def test_dropout_leaves_embeddings_alone() -> None:
    torch.manual_seed(0)
    model = build(tiny.make(2, "paper")).train()
    ids = torch.randint(0, 257, (1, 32))
    stage = model.stages[0]
    torch.testing.assert_close(stage.inputs(ids, None), stage.inputs(ids, None), atol=0, rtol=0)
    assert not torch.equal(model(ids), model(ids)), "dropout 0.1 works in training mode"


def test_activation_checkpointing_changes_no_gradient() -> None:
    ids = torch.randint(0, 257, (2, 32))
    grads = []
    for checkpointing in (False, True):
        model = randomised(tiny.make(3)).train()
        for stage in model.stages:
            stage.transformer.checkpointing = checkpointing
        nats(model(ids), ids).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
