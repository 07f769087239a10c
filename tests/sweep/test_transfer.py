"""From a sweep of a small model to the configuration of a large one, and the small model made of the large one.

pytest tests/sweep/test_transfer.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mbtrain import cli, config
from mbtrain.config import Config
from mbtrain.errors import ConfigError
from mbtrain.sweep import proxy, transfer
from mbtrain.sweep import spec as specs
from tests import tiny
from tests.sweep import made

LARGE = [
    {"patch_size": 4, "d_model": 256, "n_layers": 2, "n_heads": 16},
    {"patch_size": 1, "d_model": 128, "n_layers": 2, "n_heads": 8, "d_ff": 256},
]


def large(**sections: Any) -> Config:
    """Eight times as wide as what is swept."""
    return config.validate(large_tree(**sections))


def large_tree(**sections: Any) -> dict[str, Any]:
    """The same as a mapping."""
    tree = tiny.tree(**sections)
    return {**tree, "name": "large", "model": {**tree["model"], "stages": LARGE}}


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """The large experiment's file."""
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(large_tree()))
    return path


def swept(folder: Path, tree: Mapping[str, Any], loss: Any) -> Path:
    """A sweep of the large experiment at 1/8 of its width."""
    stages = [stage.model_dump() for stage in large().model.stages]
    return made.sweep(folder, loss, {"shrink": 8, **tree}, model={"stages": stages})


def best_at(log2: float) -> Any:
    """Losses whose optimum in the LR is known."""
    return lambda values, seed: made.bowl(float(values["optim.lr"]), log2 + 0.2 * seed, 3.0)


# --- The small model


def test_the_small_model_has_narrower_stages_and_heads_as_wide() -> None:
    small = proxy.proxy(large(), 8)
    assert [(s.d_model, s.n_heads, s.d_head, s.d_ff, s.n_layers) for s in small.model.stages] == [
        (32, 2, 16, None, 2),
        (16, 1, 16, 32, 2),
    ]
    assert [(s.base_d_model, s.base_n_layers, s.base_d_head) for s in small.model.stages] == [(32, 2, 16), (16, 2, 16)]
    assert proxy.proxy(large(), 1).model.stages[0].d_model == 256


def test_one_head_is_left_at_least_and_is_narrower() -> None:
    small = proxy.proxy(large(), 16)
    assert [(s.d_model, s.n_heads, s.base_d_head) for s in small.model.stages] == [(16, 1, 16), (8, 1, 8)]


@pytest.mark.parametrize(
    ("stages", "shrink", "message"),
    [
        ([{"patch_size": 1, "d_model": 100, "n_layers": 1, "n_heads": 1}], 8, r"stages\.0\.d_model: 100 has no 1/8"),
        ([{"patch_size": 1, "d_model": 96, "n_layers": 1, "n_heads": 12}], 8, r"n_heads: 12 heads have no 1/8"),
        ([{**LARGE[0], "d_ff": 300}, LARGE[1]], 8, r"stages\.0\.d_ff: 300 has no 1/8"),
        (LARGE, 128, r"256 / 128 is less than patch_size = 4.*at most 64"),
    ],
)
def test_what_does_not_divide(stages: list[dict[str, int]], shrink: int, message: str) -> None:
    tree = large_tree()
    tree["model"]["stages"] = stages
    with pytest.raises(ConfigError, match=message) as error:
        proxy.proxy(config.validate(tree), shrink)
    assert "\n" not in str(error.value)


def test_a_sweep_takes_it_by_an_option(experiment: Path) -> None:
    spec = specs.read(experiment, {"shrink": "8", "grid.optim.lr": "1e-3,2e-3"})
    made_of = specs.settings(spec, specs.planned(spec))
    assert len(made_of) == 2
    assert all(one.model == proxy.proxy(large(), 8).model for one in made_of.values())


# --- What the sweep found, on the large model


def test_there_and_back(tmp_path: Path, experiment: Path) -> None:
    """The large model's file: its own widths, the small one's as the base, and the parabola's LR."""
    sweep = swept(tmp_path / "s", {"grid": {"optim.lr": made.RATES}, "seeds": [0, 1, 2]}, best_at(-5.4))
    out = tmp_path / "large_mup.yaml"
    told = transfer.transfer(sweep, experiment, out)
    written, small = config.load(out), proxy.proxy(large(), 8)
    assert written.optim.lr == pytest.approx(2**-5.2, rel=1e-3)
    assert written.model.parametrization == "mup"
    for i, (stage, given) in enumerate(zip(written.model.stages, large().model.stages, strict=True)):
        assert (stage.d_model, stage.n_heads, stage.d_ff) == (given.d_model, given.n_heads, given.d_ff)
        assert written.model.base(i) == small.model.base(i)
        assert stage.d_model == 8 * written.model.base(i).d_model
    assert written.name == "large_mup"
    assert told.figures["standard_error"] == pytest.approx(0.2 / math.sqrt(3))
    assert told.figures["warnings"] == []
    # All else is as it was.
    before, after = large().model_dump(), written.model_dump()
    for tree in (before, after):
        del tree["model"]["stages"], tree["name"]
    assert (after["optim"].pop("lr"), before["optim"].pop("lr")) == (written.optim.lr, large().optim.lr)
    assert (after["model"].pop("parametrization"), before["model"].pop("parametrization")) == ("mup", "sp")
    assert after == before


def test_its_header_says_where_it_comes_from(tmp_path: Path, experiment: Path) -> None:
    sweep = swept(tmp_path / "s", {"grid": {"optim.lr": made.RATES}}, best_at(-5.4))
    out = tmp_path / "out.yaml"
    told = transfer.transfer(sweep, experiment, out)
    header = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert f"#   mbtrain transfer {sweep} {experiment} --out={out}" in header
    assert "one seed" in told.lines[0]
    said = " ".join(line.removeprefix("# ") for line in header)
    assert "-5.40 by the parabola" in said
    assert "2x32 + 2x16" in said
    assert not any("WARNING" in line for line in header)


def test_the_best_of_other_keys_and_the_lr_at_it(tmp_path: Path, experiment: Path) -> None:
    """The best LR differs by the other key; that at its best counts. A label brings the keys that it sets."""

    def loss(values: Mapping[str, str], seed: int) -> float:
        decay = float(values["optim.weight_decay"])
        at = -4.4 if decay == 0.2 else -6.0
        worse = {"plain": 0.0, "gains": -0.3}[values["variant"]]
        return made.bowl(float(values["optim.lr"]), at, 3.0 + abs(decay - 0.2) + worse)

    labels = {
        "plain": {"model.parametrization": "sp", "model.block.norm_gain": False},
        "gains": {"model.parametrization": "mup", "model.block.norm_gain": True, "model.mup.readout": [0.5, 0.0, 0.5]},
    }
    tree = {"grid": {"optim.weight_decay": [0.1, 0.2, 0.4], "variant": labels, "optim.lr": made.RATES}}
    told = transfer.transfer(swept(tmp_path / "s", tree, loss), experiment, tmp_path / "out.yaml")
    written = config.load(tmp_path / "out.yaml")
    assert written.optim.weight_decay == 0.2
    assert written.optim.lr == pytest.approx(2**-4.4, rel=1e-3)
    assert written.model.block.norm_gain is True
    assert written.model.mup.readout == (0.5, 0.0, 0.5)
    assert told.figures["values"] == {"optim.weight_decay": "0.2", "model.block.norm_gain": "true"}
    assert told.figures["warnings"] == []


def test_of_several_widths_the_largest_counts_and_the_base_is_theirs(tmp_path: Path, experiment: Path) -> None:
    def loss(values: Mapping[str, str], seed: int) -> float:
        return made.bowl(float(values["optim.lr"]), -5.3 if values["width"] == "2" else -6.3, 3.0)

    tree = {
        "set": {"model.parametrization": "mup"},
        "grid": {"optim.lr": made.RATES},
        "widths": {"factors": [1, 2]},
    }
    transfer.transfer(swept(tmp_path / "s", tree, loss), experiment, tmp_path / "out.yaml")
    written = config.load(tmp_path / "out.yaml")
    assert written.optim.lr == pytest.approx(2**-5.3, rel=1e-3)
    assert [written.model.base(i).d_model for i in (0, 1)] == [32, 16]


@pytest.mark.parametrize(("best", "word"), [(-9.5, "low"), (0.0, "high")])
def test_an_open_optimum_is_a_warning(tmp_path: Path, experiment: Path, best: float, word: str) -> None:
    sweep = swept(tmp_path / "s", {"grid": {"optim.lr": made.RATES}}, best_at(best))
    told = transfer.transfer(sweep, experiment, tmp_path / "out.yaml")
    assert told.figures["edge"] == word
    header = [line for line in (tmp_path / "out.yaml").read_text().splitlines() if line.startswith("#")]
    assert f"the {word}est tried" in " ".join(line.removeprefix("# ") for line in header)
    assert any(line.startswith("warning: ") for line in told.lines)


def test_other_keys_at_their_edge_and_one_lr_are_warnings(tmp_path: Path, experiment: Path) -> None:
    def loss(values: Mapping[str, str], seed: int) -> float:
        return 3 + float(values["optim.weight_decay"])

    sweep = swept(tmp_path / "s", {"grid": {"optim.weight_decay": [0.0, 0.1, 0.2]}}, loss)
    told = transfer.transfer(sweep, experiment, tmp_path / "out.yaml")
    assert any("optim.weight_decay is at the edge" in warning for warning in told.figures["warnings"])
    assert any("one LR was tried" in warning for warning in told.figures["warnings"])
    written = config.load(tmp_path / "out.yaml")
    assert (written.optim.lr, written.optim.weight_decay) == (large().optim.lr, 0.0)


def test_what_mup_says_nothing_of_is_listed(tmp_path: Path, experiment: Path) -> None:
    sweep = swept(tmp_path / "s", {"grid": {"optim.lr": made.RATES}, "set": {"train.steps": 2}}, best_at(-5.4))
    told = transfer.transfer(sweep, experiment, tmp_path / "out.yaml", {"optim.weight_decay": "0.3"})
    (warning,) = told.figures["warnings"]
    assert "train.steps 2 -> 4" in warning
    assert "optim.weight_decay 0.1 -> 0.3" in warning
    assert "stages" not in warning
    assert config.load(tmp_path / "out.yaml").optim.weight_decay == 0.3


def test_another_kind_of_model_is_refused(tmp_path: Path, experiment: Path) -> None:
    sweep = swept(tmp_path / "s", {"grid": {"optim.lr": made.RATES}}, best_at(-5.4))
    with pytest.raises(ConfigError, match=r"patches of \[8, 1\] bytes, expected the sweep's, \[4, 1\]"):
        transfer.transfer(sweep, experiment, tmp_path / "out.yaml", {"model.stages.0.patch_size": "8"})
    assert not (tmp_path / "out.yaml").exists()


def test_a_window_is_a_value_like_any_other(tmp_path: Path, experiment: Path) -> None:
    """Of a stage, and yet nothing that grows with the model."""
    key, lrs = "model.stages.0.window", made.RATES[:3]
    tree = {"grid": {key: [2, 4, 8], "optim.lr": lrs}}
    sweep = swept(tmp_path / "s", tree, lambda values, _: 3 + abs(int(values[key]) - 4) + float(values["optim.lr"]))
    told = transfer.transfer(sweep, experiment, tmp_path / "out.yaml")
    assert config.load(tmp_path / "out.yaml").model.stages[0].window == 4
    assert told.figures["values"] == {key: "4"}
    other = swept(tmp_path / "t", {"set": {key: 2}, "grid": {"optim.lr": lrs}}, lambda values, _: 3.0)
    told = transfer.transfer(other, experiment, tmp_path / "out.yaml")
    assert any("model.stages.0.window 2 -> None" in warning for warning in told.figures["warnings"])


def test_the_command_of_the_header_is_the_one_that_was_given(tmp_path: Path, experiment: Path) -> None:
    sweep = swept(tmp_path / "a b\nc", {"grid": {"optim.lr": made.RATES}}, best_at(-5.4))
    out = tmp_path / "out.yaml"
    transfer.transfer(sweep, experiment, out, {"train.steps": "9"})
    header = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert header[2:4] == [f"#   mbtrain transfer '{tmp_path}/a b", f"# c' {experiment} --out={out} --train.steps=9"]
    assert config.load(out).train.steps == 9


def test_an_unfinished_sweep_is_refused(tmp_path: Path, experiment: Path) -> None:
    sweep = swept(tmp_path / "s", {"grid": {"optim.lr": made.RATES}}, lambda *_: None)
    with pytest.raises(ConfigError, match="expected finished trials"):
        transfer.transfer(sweep, experiment, tmp_path / "out.yaml")
    with pytest.raises(ConfigError, match=r"no sweep\.yaml"):
        transfer.transfer(tmp_path, experiment, tmp_path / "out.yaml")


def test_a_sweep_in_which_a_seed_diverged_at_every_lr_is_refused(tmp_path: Path, experiment: Path) -> None:
    tree = {"grid": {"optim.lr": made.RATES}, "seeds": [0, 1]}
    sweep = swept(tmp_path / "s", tree, lambda values, seed: 3.0 if seed else math.inf)
    with pytest.raises(ConfigError, match="expected an LR at which no seed diverged, found none"):
        transfer.transfer(sweep, experiment, tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()


def test_the_verb(tmp_path: Path, experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = swept(tmp_path / "s", {"grid": {"optim.lr": made.RATES}}, best_at(-5.4))

    def call(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["transfer", *args])
        told = capsys.readouterr()
        return int(end.value.code or 0), told.out + told.err

    out = tmp_path / "out.yaml"
    status, text = call(str(sweep), str(experiment), f"--out={out}", "--json")
    figures = json.loads(text.splitlines()[-1])
    assert status == 0
    assert figures["lr"] == config.load(out).optim.lr
    assert figures["log2_lr"] == pytest.approx(-5.4)
    assert figures["edge"] == ""
    status, text = call(str(sweep), str(experiment))
    assert status == 2
    assert "--out" in text
    status, text = call(str(sweep), f"--out={out}")
    assert status == 2
    assert "expected a sweep's folder and an experiment" in text
    assert call(str(sweep), str(experiment), f"--out={tmp_path}/no/such/out.yaml")[0] == 2


def test_the_transferred_model_is_the_small_one_where_it_is_as_small(tmp_path: Path) -> None:
    """At base muP is SP: the transferred configuration, made as small as the base, has its very shapes and values."""
    sweep = swept(tmp_path / "s", {"grid": {"optim.lr": made.RATES}}, best_at(-5.4))
    small = proxy.proxy(large(), 8)
    written = transfer.under_mup(large(), transfer.best(sweep).small)
    again = proxy.proxy(written, 8)
    assert again.model.stages == small.model.stages
