"""A sweep's file: which trials come of it, that their names stay when it grows, and what is refused.

pytest tests/sweep/test_spec.py
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain.errors import ConfigError
from mbtrain.sweep import spec as specs
from mbtrain.sweep.spec import Planned, Stop
from mbtrain.widths import WAYS
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment."""
    made = tmp_path_factory.mktemp("specs")
    (made / "tiny.yaml").write_text(yaml.safe_dump(tiny.tree()))
    return made


def read(folder: Path, tree: dict[str, Any], **options: str) -> specs.Spec:
    path = folder / "sweep_file.yaml"
    path.write_text(yaml.safe_dump({"name": "law", "config": "tiny.yaml", **tree}, sort_keys=False))
    return specs.read(path, {key.replace("__", "."): value for key, value in options.items()})


def plan(folder: Path, tree: dict[str, Any], **options: str) -> list[Planned]:
    return specs.planned(read(folder, tree, **options))


def key(trial: Planned) -> tuple[Any, ...]:
    return (*sorted(trial.values.items()), trial.seed)


VALUES = st.lists(
    st.sampled_from(["1e-3", "0.001", "2", "2.0", "a_b", "a-b", "a b", "[1, 2]"]), min_size=1, unique=True
)
LABELS = st.lists(st.sampled_from(["sp", "mup", "m_up", "x y", "x-y", "ä"]), min_size=1, max_size=3, unique=True)
SEEDS = st.lists(st.integers(0, 99), min_size=1, max_size=2, unique=True)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Grids over keys whose ends are alike, labels, widths, draws and seeds, in any combination."""
    keys = draw(st.lists(st.sampled_from(["optim.lr", "model.lr", "train.steps", "a.b_c"]), max_size=2, unique=True))
    grid: dict[str, Any] = {axis: draw(VALUES) for axis in keys}
    if draw(st.booleans()):
        labels = {label: {"data.seq_len": str(i)} for i, label in enumerate(draw(LABELS))}
        place = draw(st.integers(0, len(grid)))
        grid = dict([*list(grid.items())[:place], ("variant", labels), *list(grid.items())[place:]])
    tree: dict[str, Any] = {"grid": grid, "seeds": draw(SEEDS)}
    if draw(st.booleans()):
        tree["random"] = {"optim.eps": {"from": "1e-9", "to": "1e-6", "log": "true"}, "train.bytes": ["1", "2"]}
        tree["draws"] = draw(st.integers(1, 3))
    if draw(st.booleans()):
        tree["widths"] = {"factors": draw(st.permutations(["1", "2", "0.5"]))[: draw(st.integers(1, 3))]}
        tree["widths"]["which"] = draw(st.sampled_from(["both", ["global", "local"]]))
    return tree


@settings(max_examples=40, deadline=None)
@given(trees())
def test_every_combination_is_there_once_under_a_name_of_its_own(folder: Path, tree: dict[str, Any]) -> None:
    trials = plan(folder, tree)
    axes = [list(values) for values in tree["grid"].values()]
    if "widths" in tree:
        which = tree["widths"]["which"]
        axes = [*([] if isinstance(which, str) else [which]), tree["widths"]["factors"], *axes]
    draws = range(tree.get("draws", 1))
    expected = list(itertools.product(tree["seeds"], draws, *axes))
    got = [
        (trial.seed, *(trial.values[axis] for axis in trial.values if axis not in tree.get("random", ())))
        for trial in trials
    ]
    assert got == [
        (seed, *values) for seed, _, *values in expected
    ]  # all of them, the last axis fastest, seeds slowest
    names = [trial.name for trial in trials]
    assert len(set(names)) == len(names)
    for trial in trials:
        assert len(trial.name) <= specs.MOST_NAME_CHARS
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", trial.name)  # as Config.name has it


@settings(max_examples=30, deadline=None)
@given(trees(), st.data())
def test_names_and_draws_stay_when_a_sweep_grows(folder: Path, tree: dict[str, Any], data: st.DataObject) -> None:
    small = {key(trial): (trial.name, trial.changes) for trial in plan(folder, tree)}
    grown = {**tree, "grid": dict(tree["grid"]), "seeds": [100, *tree["seeds"]]}
    if "draws" in tree:
        grown["draws"] = tree["draws"] + data.draw(st.integers(0, 3))
    for axis, values in tree["grid"].items():
        if isinstance(values, list):
            grown["grid"][axis] = ["new_value", *values]
        else:
            grown["grid"][axis] = {"new_label": {"data.seq_len": "77"}, **values}
    large = {key(trial): (trial.name, trial.changes) for trial in plan(folder, grown)}
    assert len(large) > len(small)
    assert {at: large[at] for at in small} == small


def test_what_is_written_is_read_again_as_the_same_sweep(folder: Path) -> None:
    tree = {
        "set": {"optim.betas": [0.9, 0.95], "data.boundary": False},
        "grid": {"optim.lr": ["1.0e-3", 2e-3], "v": {"a": {"model.tied": True, "model.mup.readout": [1, 0.5, 0]}}},
        "random": {"optim.eps": {"from": 1e-9, "to": 1e-6, "log": True}},
        "draws": 2,
        "stop": {"bits": 7},
    }
    first = read(folder, tree, widths="1,2", seeds="3,4", train__steps="9")
    (folder / "again.yaml").write_text(specs.to_yaml(first.tree))
    again = specs.read(folder / "again.yaml")
    assert specs.planned(again) == specs.planned(first)
    assert (again.stop, again.sets) == (first.stop, first.sets) == (Stop(bits=7), again.sets)
    one = next(iter(specs.settings(again, specs.planned(again)).values()))
    assert (one.optim.betas, one.data.boundary, one.train.steps, one.optim.lr) == ((0.9, 0.95), False, 9, 1e-3)
    assert (one.model.tied, one.train.seed, one.log.parent) == (True, 3, "law")


def test_axes_on_the_command_line_are_those_of_a_file(folder: Path) -> None:
    said = specs.read(
        folder / "tiny.yaml",
        {
            "grid.optim.lr": "1e-3,2e-3",
            "grid.optim.betas": "[0.9, 0.95],[0.8, 0.9]",
            "random.optim.eps": "1e-9:1e-6:log",
            "random.optim.weight_decay": "0,0.1",
            "draws": "3",
            "seeds": "0,1",
            "widths": "1,2",
            "which": "global",
            "name": "law",
            "optim.warmup_steps": "7",
        },
    )
    tree = {
        "set": {"optim.warmup_steps": 7},
        "grid": {"optim.lr": ["1e-3", "2e-3"], "optim.betas": ["[0.9, 0.95]", "[0.8, 0.9]"]},
        "random": {"optim.eps": {"from": "1e-9", "to": "1e-6", "log": True}, "optim.weight_decay": ["0", "0.1"]},
        "draws": 3,
        "seeds": [0, 1],
        "widths": {"factors": [1, 2], "which": "global"},
    }
    written = read(folder, tree)
    assert specs.planned(said) == specs.planned(written)
    assert specs.settings(said, specs.planned(said)) == specs.settings(written, specs.planned(written))


def test_draws_lie_evenly_between_their_ends(folder: Path) -> None:
    ranges = {
        "optim.lr": {"from": "1e-4", "to": "1e-2", "log": "true"},
        "optim.eps": {"from": "0.", "to": "1."},
        "train.steps": {"from": "1", "to": "4"},
        "train.bytes": {"from": "1", "to": "20", "log": "true"},
        "optim.schedule": ["wsd", "cosine"],
    }
    drawn = [trial.values for trial in plan(folder, {"random": ranges, "draws": 1000})]
    logs = sorted(math.log10(float(values["optim.lr"])) for values in drawn)
    assert -4 <= logs[0] < -3.98
    assert -2.02 < logs[-1] <= -2
    for share in (0.25, 0.5, 0.75):  # the quantiles of 1,000 even draws are off by 0.016 of the range, one in three
        assert abs(logs[int(1000 * share)] - (-4 + 2 * share)) < 0.1
        assert abs(sorted(float(values["optim.eps"]) for values in drawn)[int(1000 * share)] - share) < 0.05
    counts = [sum(values["train.steps"] == str(n) for values in drawn) for n in range(6)]
    assert counts[0] == counts[5] == 0
    assert min(counts[1:5]) > 190
    whole = [int(values["train.bytes"]) for values in drawn]
    assert (min(whole), max(whole)) == (1, 20)
    both = sum(values["optim.schedule"] == "wsd" and float(values["optim.eps"]) < 0.5 for values in drawn)
    assert abs(both - 250) < 60  # one axis tells nothing of another
    other = plan(folder, {"random": ranges, "draws": 5, "draw_seed": 1})
    assert [trial.values for trial in other] != drawn[:5]


def test_a_width_axis_grows_the_stages_from_the_base_that_the_experiment_is(folder: Path) -> None:
    found = read(folder, {"widths": {"factors": [1, 2], "which": ["both", "global", "local", "depth"]}})
    made = specs.settings(found, specs.planned(found))
    shapes = {
        name: [(stage.d_model, stage.n_layers, stage.base_d_model) for stage in settings_.model.stages]
        for name, settings_ in made.items()
    }
    assert shapes["global_width2_s0"] == [(64, 2, 32), (16, 2, 16)]
    assert shapes["local_width2_s0"] == [(32, 2, 32), (32, 2, 16)]
    assert shapes["both_width2_s0"] == [(64, 2, 32), (32, 2, 16)]
    assert shapes["depth_width2_s0"] == [(32, 4, 32), (16, 4, 16)]
    assert len({str(shapes[f"{which}_width1_s0"]) for which in WAYS}) == 1


def test_a_base_that_is_named_in_part_is_else_the_experiment_itself(folder: Path) -> None:
    tree = tiny.tree()
    tree["model"]["stages"] = [{**stage, "base_d_model": 8} for stage in tree["model"]["stages"]]
    (folder / "named.yaml").write_text(yaml.safe_dump(tree))
    found = read(folder, {"config": "named.yaml", "widths": {"factors": [2], "which": "depth"}})
    (made,) = specs.settings(found, specs.planned(found)).values()
    assert [(s.n_layers, s.base_n_layers, s.base_d_model) for s in made.model.stages] == [(4, 2, 8)] * 2


def test_two_trials_never_share_a_name(folder: Path) -> None:
    """Of names that say nothing of their values the hash alone is left, which is short: it may be the same."""
    labels = {chr(0x4E00 + i): {"data.seq_len": i} for i in range(8000)}
    with pytest.raises(ConfigError, match=r"law: two trials have the name s0_[0-9a-f]{6}_s0; write"):
        plan(folder, {"grid": {"v": labels}})


def test_points_that_are_left_out_are_not_planned(folder: Path) -> None:
    grid = {"optim.lr": ["1", "2", "3"], "v": {"a": {"data.seq_len": 8}, "b": {"data.seq_len": 16}}}
    trials = plan(folder, {"grid": grid, "skip": [{"v": "a", "optim.lr": [1, 2]}], "seeds": [0, 1]})
    assert [trial.values["v"] + trial.values["optim.lr"] for trial in trials] == ["b1", "b2", "a3", "b3"] * 2


def test_samples_are_off_unless_somebody_wants_them(folder: Path) -> None:
    (folder / "loud.yaml").write_text(yaml.safe_dump(tiny.tree(sample={"at_end": True})))
    for tree, wanted in (({}, False), ({"set": {"sample.at_end": True}}, True), ({"config": "loud.yaml"}, True)):
        found = read(folder, tree)
        (made,) = specs.settings(found, specs.planned(found)).values()
        assert made.sample.at_end is wanted


def test_a_loss_is_too_high_when_it_rose_and_not_when_nothing_is_learnt_yet() -> None:
    stop = Stop(ratio=1.5, bits=8)
    assert not stop.too_high(8.4, 8.3)  # a small LR, at the start
    assert not stop.too_high(9.4, 9.4)  # a model that begins worse than knowing nothing
    assert stop.too_high(9.3, 8.3)
    assert not stop.too_high(5.9, 4.0)
    assert stop.too_high(6.1, 4.0)
    assert not stop.too_high(6.1, math.nan)


@pytest.mark.parametrize(
    ("tree", "options", "words"),
    [
        ({"grids": {}}, {}, r"sweep_file.yaml: grids: unknown key \(did you mean grid\?\)"),
        ({"config": "no.yaml"}, {}, r"config: there is no .*no.yaml"),
        ({"grid": {"variant": ["a"]}}, {}, "grid.variant: got a list, expected labels"),
        ({"grid": {"optim.lr": []}}, {}, "grid.optim.lr: got .*, expected a list of one or more"),
        ({"grid": {"optim.lr": ["1", "1"]}}, {}, "grid.optim.lr: got 1, 1, expected each once"),
        ({"grid": {"optim.lr": ["1"]}, "set": {"optim.lr": "1"}}, {}, "set.optim.lr: is set by optim.lr too"),
        ({"grid": {"optim.lr": ["1"], "v": {"a": {"optim.lr": 1}}}}, {}, "optim.lr: set by two axes, optim.lr and v"),
        ({"grid": {"seed": ["1"]}}, {}, "grid.seed: is no axis of the grid; see seeds"),
        ({"grid": {"v": {"a": {"train.seed": 1}}}}, {}, "v: sets train.seed, which a sweep sets itself"),
        ({"seeds": [0, 0]}, {}, "seeds: got .* expected each once"),
        ({"draws": 3}, {}, "random, draws: expected both"),
        ({}, {"random__optim__lr": "1:x", "draws": "1"}, "random.optim.lr.to: expected a number"),
        ({}, {"random__optim__lr": "0:1:log", "draws": "1"}, "random.optim.lr: .* with log: true both above 0"),
        ({}, {"random__optim__lr": "2:1", "draws": "1"}, "random.optim.lr: .*expected from < to"),
        ({"widths": {"factors": [1], "which": "wide"}}, {}, "widths.which: got wide, expected one of both, global"),
        ({"stop": {"ratios": 2}}, {}, "stop.ratios: unknown key"),
        ({"grid": {"optim.lr": ["1"]}, "skip": [{"lr": 1}]}, {}, "skip.0.lr: no such axis"),
        ({"seeds": [0, 1], "draws": 5001, "random": {"optim.lr": ["1"]}}, {}, "10002 trials, expected 10000 at most"),
        ({"jobs": [1]}, {}, "jobs: expected a whole number of at least 1, got \\['1'\\]"),
        ({"widths": {"factors": ["inf"]}}, {}, "widths.factors: got inf, expected a finite number"),
        ({"widths": [1, 2]}, {"which": "local"}, r"widths: got \['1', '2'\], expected a mapping"),
        ({"set": None}, {"train__steps": "1"}, "set: got null, expected a mapping"),
        ({}, {"jobs": "0"}, "jobs: expected a whole number of at least 1"),
        ({}, {"sede": "1"}, r"--sede: no such option \(did you mean seeds\?\)"),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(
    folder: Path, tree: dict[str, Any], options: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        plan(folder, tree, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid__optim__lr": "1e-3,x"}, r"trial lrx_s0 \(optim.lr=x\): optim.lr: got 'x'"),
        ({"grid__optim__lrr": "1"}, r"trial lrr1_s0 \(optim.lrr=1\): optim.lrr: unknown key .* did you mean lr"),
        ({"widths": "1,1.3"}, r"trial width1.3_s0 \(width=1.3\): model.stages.0.d_model: 41.6"),
        ({"grid__train__micro_batch_size": "2,3"}, r"size3_s0 \(train.micro_batch_size=3\): train.micro_batch_size"),
    ],
)
def test_a_trial_that_cannot_be_is_named_with_its_values(folder: Path, options: dict[str, str], words: str) -> None:
    found = read(folder, {}, **options)
    with pytest.raises(ConfigError, match=words):
        specs.settings(found, specs.planned(found))


def test_shares_are_counted_from_0() -> None:
    assert specs.share("2/3") == (2, 3)
    assert specs.share("") is None
    for text in ("3/3", "1", "a/b", "-1/2"):
        with pytest.raises(ConfigError, match="--share: got"):
            specs.share(text)
