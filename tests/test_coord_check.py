"""The coordinate check: muP's slopes stay in their bands, SP's do not, and rules that are broken on purpose are found.

pytest tests/test_coord_check.py

Four widths and two seeds (the bands' own) where everything must be in its band; one seed of three widths where a
fault must show, whose slopes are near 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.vocabulary import vocabulary
from mbtrain import cli
from mbtrain import coord_check as check
from mbtrain.config import BaseStage, Config, ModelConfig
from mbtrain.coord_check.batch import fixed_batch, shortened
from mbtrain.coord_check.measure import Watch, trained
from mbtrain.coord_check.places import Place
from mbtrain.coord_check.slopes import Slope, fit
from mbtrain.errors import ConfigError
from mbtrain.model import build, layers
from mbtrain.model.loss import nats
from mbtrain.model.megabyte import slices
from mbtrain.model.mup import Rule, rule
from tests import tiny

STAGES: dict[int, list[dict[str, int]]] = {
    1: [{"patch_size": 1, "d_model": 32, "n_layers": 2, "n_heads": 2}],
    2: [
        {"patch_size": 4, "d_model": 64, "n_layers": 2, "n_heads": 4},
        {"patch_size": 1, "d_model": 32, "n_layers": 2, "n_heads": 2},
    ],
}
LR = 2**-7


def family(parametrization: str = "mup", stages: int = 2, preset: str = "modern", **model: Any) -> Config:
    return tiny.make(
        stages,
        preset,
        seq_len=64,
        model={"stages": STAGES[stages], "parametrization": parametrization, **model},
        optim={"lr": LR, "betas": [0.9, 0.95]},
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def found(config: Config, which: str, *, quick: bool = False, factors: tuple[float, ...] = ()) -> tuple[Slope, ...]:
    factors = factors or ((1, 4) if quick else (1, 2, 4, 8))
    steps, seeds = (3, 1) if quick else (5, 2)
    return check.measured(config, which, factors, steps=steps, seeds=seeds, lr=LR)[1]


def outside(slopes: tuple[Slope, ...], what: str) -> dict[tuple[str, str], float]:
    """The slope furthest outside its band of each (stage, part)."""
    return {s.place[:2]: s.slope for s in sorted(slopes, key=lambda s: s.outside) if s.what == what and s.outside}


@pytest.mark.parametrize("which", ["both", "global", "local"])
def test_mup_stays_in_its_bands(which: str) -> None:
    slopes = found(family(), which)
    assert not [s for s in slopes if s.outside]
    assert {s.place for s in slopes if s.what == "update"} >= {Place("local", "project"), Place("local", "readout")}


def test_sp_leaves_them() -> None:
    """The positive control: a check that cannot see SP fail sees nothing."""
    slopes = found(family("sp"), "both", quick=True)
    steepest = {t: max(s.slope for s in slopes if s.what == "change" and s.step == t) for t in (1, 3)}
    assert steepest[1] > 0.8
    assert steepest[3] > 1.2
    assert min(s.slope for s in slopes if s.role == "hidden") > 0.4


def test_mup_holds_in_depth_where_sp_does_not() -> None:
    assert not [s for s in found(family(), "depth", quick=True) if s.outside]
    worst = max(found(family("sp"), "depth", quick=True), key=lambda s: s.outside)
    assert worst.place.part == "residual"
    assert worst.slope > 0.5


Broken = Callable[[Rule, float], Rule]


@pytest.mark.parametrize(
    ("role", "broken", "what", "where", "slope"),
    [
        ("project", lambda made, m: replace(made, lr=1.0), "update", ("local", "project"), 0.9),
        ("hidden", lambda made, m: replace(made, lr=1.0), "update", ("local", "ffn.down"), 1.0),
        ("hidden", lambda made, m: replace(made, init_std=1.0), "size", ("global", "attention"), 0.9),
        ("readout", lambda made, m: replace(made, multiplier=1.0), "update", ("local", "readout"), 0.9),
        ("embedding", lambda made, m: replace(made, lr=1 / m), "update", ("global", "embed"), -1.0),
    ],
)
def test_a_broken_rule_is_found_and_named(
    role: str, broken: Broken, what: str, where: tuple[str, str], slope: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def altered(of: str, shape: tuple[int, ...], base: tuple[int, ...], *args: Any) -> Rule:
        made = rule(of, shape, base, *args)
        return broken(made, shape[-1] / base[-1]) if of == role else made

    monkeypatch.setattr(layers, "rule", altered)
    slopes = found(family(), "both", quick=True)
    assert outside(slopes, what)[where] == pytest.approx(slope, abs=0.5)


def test_a_stage_by_another_ones_width_is_found_where_that_one_grows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stage is scaled by the first one's width: where both grow nothing is wrong with that."""
    right = ModelConfig.base

    def base(self: ModelConfig, stage: int) -> BaseStage:
        ratio = self.stages[0].d_model / right(self, 0).d_model
        d_model, d_byte, ff_width, *rest = right(self, stage)
        if stage == 0:
            return right(self, 0)
        return BaseStage(*(int(x / ratio) for x in (d_model, d_byte, ff_width)), *rest)

    monkeypatch.setattr(ModelConfig, "base", base)
    wrong = outside(found(family(), "global", quick=True), "update")
    assert wrong["local", "attn.qkv"] < -0.6
    assert not [place for place in wrong if place[0] == "global"]


def test_an_update_is_what_a_products_weight_has_moved() -> None:
    """Against products made by hand: of a matrix of a block, of eq. 4's and of the readout."""
    torch.manual_seed(0)
    config = family()
    model, ids = build(config), torch.randint(0, 256, (2, 16))
    watch = Watch(model, config.model)
    with watch.looking():
        nats(model(ids), ids)
    sizes, changes, updates = watch.taken()
    assert sizes[Place("local", "logits")] == pytest.approx(model(ids).abs().mean().item(), rel=1e-6)
    assert set(changes.values()) == set(updates.values()) == {0.0}

    first, project = model.stages[0].transformer, model.stages[1].project  # type: ignore[union-attr]
    qkv, given = first.blocks[1].attn.qkv, {}  # type: ignore[index, union-attr]
    moved = {weight: 0.1 * torch.randn_like(weight) for weight in (qkv.weight, project)}
    with torch.no_grad():
        for weight, by in moved.items():
            weight += by  # type: ignore[misc]
    qkv.register_forward_pre_hook(lambda _, args: given.update(qkv=args[0]))
    first.register_forward_hook(lambda _, args, out: given.update(slices=slices(out.flatten(0, 1), 4)))
    with watch.looking():
        nats(model(ids), ids)
    _, changes, updates = watch.taken()
    for place, x, by in (
        (Place("global", "attn.qkv", 1), given["qkv"], moved[qkv.weight]),
        (Place("local", "project"), given["slices"], moved[project]),
    ):
        assert updates[place] == pytest.approx((x @ by.T).square().mean().sqrt().item(), rel=1e-5)
    assert changes[Place("global", "residual", 0)] == 0
    assert changes[Place("global", "residual", 1)] > 0


KINDS: dict[str, dict[str, Any]] = {
    "transformer": {"kind": "transformer", "stages": [STAGES[1][0] | {"window": 8}]},
    "perceiver_ar": {"kind": "perceiver_ar", "latents": 8, "stages": STAGES[1]},
    "space": {"patching": "space"},
    "convolutions": {"conv_encoder": [3, 5], "cross_patch": 2},
    "no local model": {"without": "local"},
    "no global model": {"without": "global", "cross_patch": 2},
    "paper": {"preset": "paper"},
    "three stages": {"stages": tiny.STAGES[3]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_can_be_looked_at(kind: str) -> None:
    config = tiny.make(2, seq_len=64, model={"parametrization": "mup", "stages": STAGES[2], **KINDS[kind]})
    ids, counts, _ = fixed_batch(config)
    one = trained(shortened(config), ids, counts, seed=0, lr=LR, at=(0, 1))
    parts = {place.part for place in one.sizes[0]}
    assert parts >= {"attention", "feed-forward", "residual", "input", "scores", "logits"}
    assert all(math.isfinite(x) for of in (one.sizes, one.changes, one.updates) for x in of[1].values())
    matrices = [place for place, role in one.roles.items() if role in ("hidden", "project", "readout")]
    assert min(one.updates[1][place] for place in matrices) > 0
    assert len(one.losses) == 2


def test_a_subword_model_can_be_looked_at(shards: Path, tmp_path: Path) -> None:
    vocabulary(shards, tmp_path / "words.json", 280)
    kind = {"kind": "subword", "vocabulary": str(tmp_path / "words.json"), "vocabulary_size": 280}
    config = tiny.make(1, seq_len=1024, data={"path": str(shards)}, model={"stages": STAGES[1], **kind})
    ids, counts, _ = fixed_batch(config)
    assert ids.shape == (2, 256)  # of tokens there are fewer
    one = trained(shortened(config), ids, counts, seed=0, lr=LR, at=(0, 1))
    assert one.changes[1][Place("model", "logits")] > 0
    assert one.updates[1][Place("model", "readout")] > 0


def test_a_matrix_that_no_product_shows_is_an_error() -> None:
    config = family()
    watch = Watch(build(config), config.model)
    with watch.looking(), pytest.raises(ConfigError, match="readout takes part in no product that can be watched"):
        watch.taken()


def test_rows_are_short_and_widths_are_not_touched() -> None:
    perceiver = tiny.make(1, seq_len=1024, model={"kind": "perceiver_ar", "latents": 512, "stages": STAGES[1]})
    short = shortened(perceiver)
    assert (short.data.seq_len, short.model.latents, short.train.global_batch_size) == (64, 32, 8)
    assert short.model.stages == perceiver.model.stages
    stages = [{"patch_size": 48, "d_model": 96, "n_layers": 1, "n_heads": 2}, STAGES[2][1]]
    short = shortened(tiny.make(2, seq_len=4800, model={"stages": stages, "block": {"dropout": 0.1}}))
    assert (short.data.seq_len, short.train.global_batch_size, short.model.block.dropout) == (192, 2, 0.0)


def test_the_batch_is_the_datas_first_rows(shards: Path) -> None:
    config = tiny.make(2, seq_len=128, data={"path": str(shards)})
    ids, counts, name = fixed_batch(config)
    assert (tuple(ids.shape), name) == ((8, 64), str(shards))
    assert counts.all()
    assert torch.equal(ids, fixed_batch(config)[0])
    code, _, elsewhere = fixed_batch(tiny.make(2, seq_len=128))
    assert elsewhere == "Python's standard library"
    assert b"def " in bytes(code.flatten().tolist())


def test_a_power_law_has_its_power_as_slope() -> None:
    assert fit([1, 2, 4, 8], [3 * x**-0.5 for x in (1, 2, 4, 8)]) == pytest.approx(-0.5)
    assert math.isnan(fit([1, 2], [1.0, math.inf]))


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["coord-check", *args])
    told = capsys.readouterr()
    return int(end.value.code or 0), told.out, told.err


def test_the_verb_says_what_is_wrong_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wide.yaml"
    path.write_text(json.dumps(tiny.tree(2, seq_len=64, name="wide")))
    asked = [str(path), "--widths=1,4", "--steps=2", "--seeds=1", f"--out={tmp_path / 'out'}", "--json"]
    status, out, err = command(capsys, *asked)
    figures = json.loads(out.splitlines()[-1])
    assert status == 1
    assert "FAILED" in out
    assert "The parametrization is sp, which is expected to fail" in err
    assert not figures["passed"]
    assert (tmp_path / "out" / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "| local ffn.down | hidden |" in (tmp_path / "out" / "report.md").read_text()


def test_a_model_that_diverges_has_left_its_bands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses that are no numbers are drawn, told and JSON."""
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(tiny.tree(2, seq_len=64)))
    asked = [str(path), "--widths=1,2", "--steps=2", "--seeds=1", "--lr=1e20", f"--out={tmp_path / 'out'}", "--json"]
    status, out, err = command(capsys, *asked)
    figures = json.loads(out.splitlines()[-1], parse_constant=lambda text: pytest.fail(text))
    assert (status, figures["passed"]) == (1, False)
    assert "slope not a finite number, or 0, expected" in err
    assert (tmp_path / "out" / "both.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_made_is_found_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(tiny.tree(2, seq_len=64)))
    status, _, err = command(capsys, str(path), "--widths=1,2", f"--out={path}/out")
    assert status == 2
    assert err == f"mbtrain: --out={path}/out: cannot be written (Not a directory); choose another place\n"


@pytest.mark.parametrize(
    ("stages", "asked", "said"),
    [
        (2, "--widths=2", "--widths: expected two or more factors above 0, as in 1/4,1/2,1,2, got '2'"),
        (2, "--widths=1,1e999", "--widths: expected two or more factors above 0, as in 1/4,1/2,1,2, got '1,1e999'"),
        (2, "--which=some", "--which: expected all, both, global, local, depth, got 'some'"),
        (1, "--which=global", "--which=global: expected both or depth: this model has one stage"),
        (2, "--widths=1/64,1", "expected a whole number above 0"),
        (2, "--sizes=1,2", "--sizes: no such option"),
    ],
)
def test_a_mistake_is_one_line(
    stages: int, asked: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(tiny.tree(stages, seq_len=64)))
    status, _, err = command(capsys, str(path), asked, f"--out={tmp_path / 'out'}")
    assert status == 2
    assert said in err.splitlines()[-1]
