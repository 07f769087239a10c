"""muP: the table of rules, the identity at base, and what models at other widths are made with."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbtrain.config import Config, MupConfig
from mbtrain.engine import check_groups, parameter_groups
from mbtrain.errors import ConfigError
from mbtrain.model import build
from mbtrain.model.layers import role_of, rule_of
from mbtrain.model.loss import nats
from mbtrain.model.mup import ROLES, Rule, branch_multiplier, query_multiplier, rule
from mbtrain.widths import based, deepened, widened
from tests import tiny

MUP = MupConfig()
SHAPES = {
    "embedding": (257, 32),
    "tied": (257, 32),
    "position": (64, 32),
    "pad": (32,),
    "hidden": (128, 32),
    "project": (32, 16),
    "readout": (257, 32),
    "gain": (32,),
    "bias": (32,),
}


def times(shape: tuple[int, ...], role: str, out: int, width: int) -> tuple[int, ...]:
    """A shape with its widths multiplied: both of a matrix, the last one of tables and vectors."""
    return (shape[0] * out, shape[1] * width) if role in ("hidden", "project") else (*shape[:-1], shape[-1] * width)


# At a width of 4, an output of 4, a depth of 2: std, multiplier, LR, decay, eps. From reference tables, by hand.
TABLE = {
    "embedding": Rule(1, 1, 1, 1, 1 / 4),
    "tied": Rule(1, 1 / 4, 1, 1, 1 / 4),
    "position": Rule(1, 1, 1, 1, 1 / 4),
    "pad": Rule(1, 1, 1, 1, 1 / 4),
    "hidden": Rule(1 / 2, 1, 1 / 4, 4, 1 / 8),
    "project": Rule(1 / 2, 1, 1 / 4, 4, 1 / 4),
    "readout": Rule(1, 1 / 4, 1, 1, 1 / 4),
    "gain": Rule(1, 1, 1, 1, 1 / 8),
    "bias": Rule(1, 1, 1, 1, 1 / 8),
}


@pytest.mark.parametrize("role", ROLES)
def test_the_table(role: str) -> None:
    depth = 2.0 if role in ("hidden", "gain", "bias") else 1.0
    base = SHAPES[role]
    assert rule(role, times(base, role, 4, 4), base, MUP, depth) == TABLE[role]


@pytest.mark.parametrize(
    ("out", "width", "std", "lr", "eps"),
    [(4, 4, 1 / 2, 1 / 4, 1 / 4), (1, 2, 2**-0.5, 1 / 2, 1), (1, 8, 1 / 32**0.5, 1 / 8, 1), (4, 1, 1, 1, 1 / 4)],
)
def test_the_matrix_between_stages(out: int, width: int, std: float, lr: float, eps: float) -> None:
    """(32, 16) at base: hidden where both stages grow; input-like where the finer does; where the coarser does the std
    falls as 1/sqrt(m) until the matrix narrows, and as 1/m from there on, as a readout's."""
    base = SHAPES["project"]
    made = rule("project", times(base, "project", out, width), base, MUP)
    assert made.init_std == pytest.approx(std, rel=1e-12)
    assert replace(made, init_std=1.0) == Rule(1, 1, lr, 1 / lr, eps)


@given(st.sampled_from(ROLES), st.floats(0, 1), st.tuples(*[st.floats(-2, 2)] * 3), st.floats(0, 1), st.booleans())
def test_at_base_every_rule_is_one(
    role: str, e: float, abc: tuple[float, float, float], alpha: float, eps: bool
) -> None:
    mup = MupConfig(embedding_lr_power=e, readout=abc, depth_power=alpha, eps=eps)
    assert rule(role, SHAPES[role], SHAPES[role], mup) == Rule()
    assert branch_multiplier(mup, 1.0) == query_multiplier(mup, 16, 16) == 1


def test_the_switches() -> None:
    wide = times(SHAPES["readout"], "readout", 1, 16)
    made = rule("readout", wide, SHAPES["readout"], MupConfig(readout=(0.5, 0.25, 0.75)))
    assert made == Rule(init_std=1 / 2, multiplier=1 / 4, lr=1 / 8, weight_decay=8, eps=1 / 4)
    wide = times(SHAPES["embedding"], "embedding", 1, 16)
    assert rule("embedding", wide, SHAPES["embedding"], MupConfig(embedding_lr_power=0.5)).lr == 1 / 4
    wide = times(SHAPES["hidden"], "hidden", 16, 16)
    assert rule("hidden", wide, SHAPES["hidden"], MupConfig(decay="coupled")).weight_decay == 1
    assert rule("hidden", wide, SHAPES["hidden"], MupConfig(eps=False)).eps == 1
    # CompleteP's other depths: nothing on branches and LR over depth; half of each.
    assert rule("hidden", wide, SHAPES["hidden"], MupConfig(depth_power=0), depth=4).lr == 1 / 64
    assert rule("gain", (32,), (32,), MupConfig(depth_power=0.5), depth=4).lr == 1 / 2
    assert branch_multiplier(MupConfig(depth_power=0.5), 4) == 1 / 2
    assert branch_multiplier(MUP, 4) == 1 / 4
    # q k sqrt(16) / 64 in all, of which 1 / sqrt(64) is attention's own.
    assert query_multiplier(MUP, 64, 16) == 1 / 2
    assert query_multiplier(MupConfig(attention_power=0.5), 64, 16) == 1


def test_an_unknown_role_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown role 'head'"):
        rule("head", (1,), (1,), MUP)


def made(parametrization: str, stages: int = 2, preset: str = "modern", **model: Any) -> Config:
    return tiny.make(stages, preset, model={"preset": preset, "parametrization": parametrization, **model})


def weights(config: Config) -> torch.nn.Module:
    torch.manual_seed(7)
    return build(config).eval()


def shown(model: torch.nn.Module, config: Config) -> list[tuple[Any, ...]]:
    groups = parameter_groups(model, config)
    return [(g["name"], g["lr"], g["lr_scale"], g["weight_decay"], g["eps"], len(g["params"])) for g in groups]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_at_base_mup_is_sp_bit_for_bit(stages: int, preset: str) -> None:
    sp, mup = made("sp", stages, preset), based(made("mup", stages, preset))
    a, b = weights(sp), weights(mup)
    for (name, one), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    ids = torch.randint(0, 256, (2, 32))
    assert torch.equal(a(ids), b(ids))
    assert shown(a, sp) == shown(b, mup)


def test_sp_does_not_look_at_the_base() -> None:
    sp = made("sp")
    wide = widened(based(sp), 2)
    plain = widened(sp, 2)
    assert shown(weights(wide), wide) == shown(weights(plain), plain)
    assert all(rule_of(name, param) == Rule() for name, param in weights(wide).named_parameters())
    for one, other in zip(weights(wide).parameters(), weights(plain).parameters(), strict=True):
        assert torch.equal(one, other)


# Ratios of D_G, D_L to base in the three families; what is relative to each stage's own base.
@pytest.mark.parametrize(("which", "g", "w"), [("both", 4, 4), ("global", 4, 1), ("local", 1, 4)])
@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_each_stage_is_measured_by_its_own_base(which: Any, g: int, w: int, preset: str) -> None:
    base = based(made("mup", 2, preset, block={"norm_gain": True}))
    wide = widened(base, 4, which)
    model, small = weights(wide), dict(weights(base).named_parameters())
    groups = {id(p): group for group in parameter_groups(model, wide) for p in group["params"]}
    for name, param in model.named_parameters():
        of_global = name.startswith("stages.0.")
        m = g if of_global else w
        role, lr, eps, std, decay = role_of(name, param), 1.0, 1 / m, 1.0, 0.0
        if role == "hidden":
            lr, std, decay = 1 / m, m**-0.5, 0.1 * m
        elif role == "project":
            lr, std, decay, eps = 1 / g, g**-0.5 * min(1.0, 2 * w / g) ** 0.5, 0.1 * g, 1 / w
        elif role == "readout":
            decay, std = 0.1, 1.0
        group = groups[id(param)]
        assert group["lr_scale"] == lr, name
        assert group["weight_decay"] == decay, name
        assert group["eps"] == 1e-8 * eps, name
        if role not in ("gain", "bias") and param.numel() > 500:
            ratio = float(param.detach().std() / small[name].detach().std())
            assert ratio == pytest.approx(std, rel=0.15), name
    multiplier = getattr(model, "logit_multiplier")  # noqa: B009
    assert multiplier == 1 / w


def test_deeper_models_follow_completep() -> None:
    base = based(made("mup", 2, block={"norm_gain": True, "bias": True}))
    deep = deepened(base, 4)
    model = weights(deep)
    assert {block.branch_multiplier for stage in model.stages for block in stage.transformer.blocks} == {1 / 4}
    assert all(group["lr_scale"] == 1 for group in parameter_groups(model, deep)), "alpha = 1 leaves LRs alone"
    half = deepened(based(made("mup", 2, mup={"depth_power": 0.5}, block={"norm_gain": True})), 4)
    for name, param in weights(half).named_parameters():
        inside = ".blocks." in name
        assert rule_of(name, param).lr == (1 / 2 if inside else 1), name
        assert rule_of(name, param).eps == (1 / 2 if inside else 1), name
    # Branches begin as the base's layers say, not as their own number does.
    small = dict(weights(base).named_parameters())
    for name, param in model.named_parameters():
        if "ffn.down.weight" in name and name in small:
            assert float(param.detach().std()) == pytest.approx(float(small[name].detach().std()), rel=0.15)


def losses(config: Config, steps: int = 12) -> list[float]:
    """Training losses of one fixed batch in float64, by torch's AdamW in the engine's groups."""
    model = weights(config).double().train()
    groups = parameter_groups(model, config)
    for group in groups:
        group["lr"] *= group["lr_scale"]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(3))
    out = []
    for _ in range(steps):
        loss = nats(model(ids), ids).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(float(loss.detach()))
    return out


def test_readouts_of_one_exponent_train_alike() -> None:
    """Adam does not see the scale of gradients: (a, b, c) and (a - t, b + t, c + t) are one training run."""
    optim = {"lr": 1e-2, "eps": 1e-30, "weight_decay": 0.1}
    runs = []
    for abc in ([1, 0, 0], [0.5, 0.5, 0.5], [0, 1, 1]):
        model = {"parametrization": "mup", "mup": {"readout": abc}}
        runs.append(losses(widened(based(tiny.make(2, model=model, optim=optim)), 4)))
    assert runs[0] == pytest.approx(runs[1], rel=1e-9)
    assert runs[0] == pytest.approx(runs[2], rel=1e-9)
    assert runs[0][-1] < runs[0][0] - 0.5
    other = losses(
        widened(based(tiny.make(2, model={"parametrization": "mup", "mup": {"readout": [1, 0.5, 0]}}, optim=optim)), 4)
    )
    assert other[-1] != pytest.approx(runs[0][-1], rel=1e-3), "the claim is about the exponent"


MODELS: dict[str, dict[str, Any]] = {
    "megabyte": {"preset": "modern"},
    "tied": {"preset": "paper", "block": {"dropout": 0.0}},
    "cross": {"cross_patch": 4},
    "space": {"patching": "space"},
    "convolutions": {"conv_encoder": [3, 5]},
    "without local": {"without": "local"},
    "without global": {"without": "global", "cross_patch": 4},
    "perceiver": {"kind": "perceiver_ar", "latents": 8, "stages": [tiny.STAGES[1][0]]},
    "window": {"kind": "transformer", "stages": [{**tiny.STAGES[1][0], "window": 6}]},
}


@pytest.mark.parametrize("name", MODELS)
def test_generation_is_the_forward_pass_at_other_widths(name: str) -> None:
    """With every multiplier in use: logits, branches and queries."""
    config = based(tiny.make(2, model={"parametrization": "mup", **MODELS[name]}))
    stages = [{**stage.model_dump(), "base_d_head": 2} for stage in config.model.stages]
    tree = config.model_dump()
    deep = deepened(widened(tiny.config.validate({**tree, "model": {**tree["model"], "stages": stages}}), 2), 2)
    model = weights(deep)
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)  # or what attention looks at would hardly matter
        full, decoder = model(ids), model.decoder(2)
        got = torch.stack([decoder.feed(ids[:, i - 1 : i] if i else ids[:, :0]) for i in range(20)], dim=1)
    assert torch.allclose(got, full, atol=2e-4 * float(full.abs().max()))
    assert model.logit_multiplier == 1 / 2
    attentions = [module for module in model.modules() if hasattr(module, "query_multiplier")]
    assert all(module.query_multiplier == (2 / module.d_head) ** 0.5 != 1 for module in attentions)
    blocks = [module for module in model.modules() if hasattr(module, "branch_multiplier")]
    assert {module.branch_multiplier for module in blocks} == {1 / 2}


def test_groups_that_were_changed_are_noticed() -> None:
    config = widened(based(made("mup")), 2)
    groups = parameter_groups(weights(config), config)
    check_groups(groups, [dict(group) for group in groups])
    with pytest.raises(RuntimeError, match="groups were changed"):
        check_groups(groups, [{**group, "lr_scale": 1.0} for group in groups])
    with pytest.raises(RuntimeError, match="groups were changed"):
        check_groups(groups, groups[1:])


def test_uniform_logits_cost_eight_bits_at_any_width() -> None:
    """A readout of zeros: the multiplier changes nothing."""
    config = widened(based(made("mup")), 4)
    model = weights(config)
    with torch.no_grad():
        model.unembedding.zero_()
        ids = torch.randint(0, 256, (2, 32))
        each = nats(model(ids), ids)
    assert each.mean() / math.log(2) == pytest.approx(math.log2(257), abs=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"tied": True, "mup": {"embedding_lr_power": 0.5}}, "model.mup.embedding_lr_power"),
        ({"stages": [{**tiny.STAGES[2][0], "base_d_model": 2}, tiny.STAGES[2][1]]}, "model.stages.0.base_d_model"),
        ({"stages": [tiny.STAGES[2][0], {**tiny.STAGES[2][1], "d_ff": 24, "base_d_model": 6, "n_heads": 1}]}, ""),
        ({"mup": {"readout": [1, 0]}}, "model.mup.readout"),
    ],
)
def test_what_cannot_be_is_refused(model: dict[str, Any], message: str) -> None:
    if not message:
        tiny.make(2, model={"parametrization": "mup", **model})  # 24 of 16 in proportion: 9 of 6
        model = {"stages": [tiny.STAGES[2][0], {**tiny.STAGES[2][1], "d_ff": 24, "base_d_model": 5}]}
        message = "model.stages.1.base_d_model"
    with pytest.raises(ConfigError, match=message):
        tiny.make(2, model={"parametrization": "mup", **model})


def test_widths_that_are_not_whole_are_refused() -> None:
    config = made("mup")
    assert widened(widened(config, 8), 1 / 8) == config
    with pytest.raises(ConfigError, match=r"model\.stages\.0\.n_heads: 0\.5 at 1/4"):
        widened(config, 1 / 4)
    with pytest.raises(ConfigError, match=r"model\.stages\.0\.n_layers"):
        deepened(config, 1 / 4)
