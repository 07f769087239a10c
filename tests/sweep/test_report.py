"""`mbtrain sweep --report`: what it finds where the losses are known, and what it says of sweeps that lack something.

pytest tests/sweep/test_report.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mbtrain import cli, metrics
from mbtrain.errors import ConfigError
from mbtrain.sweep import Trial, report, scores, trials
from mbtrain.sweep.optimum import FAILS, OPEN, TRANSFERS, UNKNOWN
from tests.sweep import made

VARIANTS = {"sp": {"model.parametrization": "sp"}, "mup": {"model.parametrization": "mup"}}


def known_loss(values: Mapping[str, str], seed: int) -> float:
    """sp's optimum falls by 1.1 a doubling, muP's rises by 0.1; wider is better by 0.1 at its own best."""
    doublings = math.log2(float(values["width"]))
    best = -4.2 - 1.1 * doublings if values["variant"] == "sp" else -5.2 + 0.1 * doublings
    return made.bowl(float(values["optim.lr"]), best + 0.1 * seed, 3.5 - 0.1 * doublings)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants x 3 widths x 7 LRs x 2 seeds."""
    tree = {
        "grid": {"variant": VARIANTS, "optim.lr": made.RATES},
        "widths": {"factors": [1, 2, 4]},
        "seeds": [0, 1],
    }
    return made.sweep(tmp_path_factory.mktemp("sweeps") / "grid", known_loss, tree)


@pytest.fixture(scope="module")
def figures(grid: Path) -> dict[str, Any]:
    """What report.json has of it."""
    report.report(grid)
    return json.loads((grid / "report.json").read_text())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time of a report; only some tests look at them."""
    monkeypatch.setattr(report, "_draw", lambda *_: [])


def variant(figures: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The figures of one variant."""
    (found,) = [one for one in figures["variants"] if one["name"] == name]
    return dict(found)


def test_it_finds_the_optima_that_were_put_there(figures: dict[str, Any]) -> None:
    """Of parabolas, by each target; the mean of two seeds whose optima are 0.1 apart."""
    for target in scores.TARGETS:
        told = variant(figures, "mup")["targets"][target]
        assert [one["log2_lr"] for one in told["sizes"]] == pytest.approx([-5.15, -5.05, -4.95])
        assert told["shift"]["log2"] == pytest.approx(0.2)
        assert told["shift"]["per_doubling"] == pytest.approx(0.1)
        assert told["sizes"][0]["standard_error"] == pytest.approx(0.05)
        assert told["sizes"][0]["seeds"] == 2
        sp = variant(figures, "sp")["targets"][target]
        assert sp["shift"]["log2"] == pytest.approx(-2.2)
        assert sp["shift"]["log2_grid"] == -2


def test_the_verdicts(figures: dict[str, Any]) -> None:
    assert variant(figures, "mup")["verdict"] == TRANSFERS
    assert variant(figures, "sp")["verdict"] == FAILS
    assert variant(figures, "sp")["targets"]["val_last"]["sure"] is True


def test_wider_is_better_at_the_smallest_models_lr(figures: dict[str, Any]) -> None:
    mup, sp = variant(figures, "mup")["fixed_lr"], variant(figures, "sp")["fixed_lr"]
    assert mup["log2_lr"] == -5
    assert mup["wider_is_better"] is True
    assert mup["cost_percent"] == pytest.approx(0)  # the best of the grid is the same one
    assert sp["log2_lr"] == -4
    assert sp["wider_is_better"] is False
    own, fixed = sp["largest_at_its_best"], sp["largest_at_fixed"]
    assert sp["cost_percent"] == pytest.approx(100 * (fixed / own - 1))
    assert fixed > own


def test_sizes_are_told_by_their_models(figures: dict[str, Any]) -> None:
    shapes = [one["shape"] for one in variant(figures, "mup")["targets"]["val_last"]["sizes"]]
    assert shapes == ["32 + 16 wide", "64 + 32 wide", "128 + 64 wide"]


def test_it_writes_a_page_and_pictures(grid: Path, figures: dict[str, Any]) -> None:
    page = (grid / "report.md").read_text()
    assert figures["pictures"] == ["lr_loss.png", "best_lr.png", "fixed_lr.png"]
    for name in figures["pictures"]:
        assert (grid / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in page
    for line in page.splitlines():
        if line.startswith("| sp |") and "does not transfer" in line:
            break
    else:
        raise AssertionError(page)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)
    assert "mbtrain compare" in page


@pytest.mark.usefixtures("undrawn")
def test_the_verb_prints_the_figures(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", str(grid), "--report", "--json"])
    assert end.value.code == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert any(line.startswith("mup: transfers") for line in lines)
    assert {one["name"] for one in json.loads(last)["variants"]} == {"sp", "mup"}


@pytest.mark.usefixtures("undrawn")
def test_an_optimum_at_the_edge_is_open(tmp_path: Path) -> None:
    def loss(values: Mapping[str, str], seed: int) -> float:
        return made.bowl(float(values["optim.lr"]), -9.5 if values["width"] == "4" else -8, 3.0)

    tree = {"grid": {"optim.lr": made.RATES}, "widths": {"factors": [1, 4]}}
    (told,) = report.report(made.sweep(tmp_path / "s", loss, tree)).figures["variants"]
    assert told["verdict"] == OPEN
    assert [one["edge"] for one in told["targets"]["val_last"]["sizes"]] == ["", "low"]
    assert told["targets"]["val_last"]["shift"]["open_at"] == [4]
    assert ", low edge" in (tmp_path / "s" / "report.md").read_text()


def test_diverged_failed_and_missing_trials(tmp_path: Path) -> None:
    """The highest rate diverges at width 4: infinitely bad, so it bounds the optimum. The lowest is not there yet."""

    def loss(values: Mapping[str, str], seed: int) -> float | None:
        lr = math.log2(float(values["optim.lr"]))
        if lr == -9:
            return None
        if values["width"] == "4" and lr > -5:
            return math.inf
        return made.bowl(2**lr, -5, 3.0)

    tree = {"grid": {"optim.lr": made.RATES}, "widths": {"factors": [1, 4]}}
    folder = made.sweep(tmp_path / "s", loss, tree)
    damaged = next(t.run for t in trials(folder) if t.values == {"width": "1", "optim.lr": str(2.0**-8)})
    (damaged / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    found = report.report(folder)
    (told,) = found.figures["variants"]
    largest = told["targets"]["val_last"]["sizes"][1]
    assert (largest["log2_grid"], largest["edge"], largest["parabola"]) == (-5, "", False)
    assert found.figures["trials"] == {"diverged": 2, "finished": 10, "waiting": 2}
    assert len(found.figures["notes"]) == 1
    page = found.path.read_text()
    assert "nonsense" in page
    json.loads((folder / "report.json").read_text(), parse_constant=lambda text: pytest.fail(text))


@pytest.mark.usefixtures("undrawn")
def test_a_variant_of_one_width_has_no_verdict(tmp_path: Path) -> None:
    """Where the others are left out of the sweep."""
    tree = {
        "grid": {"variant": VARIANTS, "optim.lr": made.RATES},
        "widths": {"factors": [1, 2]},
        "skip": [{"variant": "sp", "width": "2"}],
    }
    found = report.report(made.sweep(tmp_path / "s", known_loss, tree))
    sp, mup = (variant(found.figures, name) for name in VARIANTS)
    assert (sp["verdict"], mup["verdict"]) == (None, TRANSFERS)
    assert sp["fixed_lr"]["wider_is_better"] is None
    assert found.lines[0] == "sp: best LR -4.20 (2^-4): 3.5020"
    (row,) = [line for line in found.path.read_text().splitlines() if line.startswith("| sp | -4.20")]
    assert row.endswith("|  |  | 0.00 % |  |")


def test_a_sweep_of_which_all_diverged_has_no_optimum(tmp_path: Path) -> None:
    tree = {"grid": {"optim.lr": made.RATES}, "widths": {"factors": [1, 2]}}
    found = report.report(made.sweep(tmp_path / "s", lambda *_: math.inf, tree))
    assert found.figures["trials"] == {"diverged": 14}
    assert [one["verdict"] for one in found.figures["variants"]] == [UNKNOWN]


@pytest.mark.parametrize(("label", "size"), [("8", 8), ("w8", 8), ("0.5", 0.5), (".5", 0.5), ("1e1", 10), ("big", 0)])
def test_a_size_is_the_number_in_a_label(label: str, size: float) -> None:
    assert scores.size_of(label) == size


def test_an_lr_axis_without_widths(tmp_path: Path) -> None:
    folder = made.sweep(
        tmp_path / "s", lambda v, _: made.bowl(float(v["optim.lr"]), -5.3, 3.0), {"grid": {"optim.lr": made.RATES}}
    )
    found = report.report(folder)
    assert [path.name for path in found.pictures] == ["lr_loss.png"]
    (told,) = found.figures["variants"]
    assert told["targets"]["val_last"]["sizes"][0]["log2_lr"] == pytest.approx(-5.3)
    assert "verdict" not in told
    assert any("-5.30" in line for line in found.lines)


@pytest.mark.usefixtures("undrawn")
def test_depth_is_called_so(tmp_path: Path) -> None:
    layers = {n: {"model.stages.0.n_layers": n, "model.stages.1.n_layers": n} for n in (2, 4)}
    tree = {"grid": {"depth": layers, "optim.lr": made.RATES[:3]}}
    folder = made.sweep(tmp_path / "s", lambda v, _: made.bowl(float(v["optim.lr"]), -8, 3.0), tree)
    report.report(folder)
    page = (folder / "report.md").read_text()
    assert "## The best LR against depth" in page
    assert "4 (4 + 4 deep)" in page


def test_a_sweep_of_other_keys_is_a_table(tmp_path: Path) -> None:
    """Trials by score, means over seeds with the lowest and the highest, and the mean effect of each axis."""

    def loss(values: Mapping[str, str], seed: int) -> float:
        return 3.0 + float(values["optim.weight_decay"]) + (values["kind"] == "b") + 0.2 * seed

    tree = {
        "grid": {
            "optim.weight_decay": [0.1, 0.5],
            "kind": {"a": {"model.block.norm_gain": True}, "b": {"model.block.norm_gain": False}},
        },
        "seeds": [0, 1],
    }
    found = report.report(made.sweep(tmp_path / "s", loss, tree))
    assert found.pictures == ()
    assert found.figures["variants"] == []
    best = found.figures["groups"][0]
    assert best["values"] == {"optim.weight_decay": "0.1", "kind": "a"}
    assert [best[key] for key in ("val/bpb", "low", "high", "seeds")] == pytest.approx([3.2, 3.1, 3.3, 2])
    assert [row["val/bpb"] for row in found.figures["groups"]] == pytest.approx([3.2, 3.6, 4.2, 4.6])
    effects = found.figures["axes"]
    assert [row["mean"] for row in effects["kind"]] == pytest.approx([3.4, 4.4])
    assert [row["mean"] for row in effects["optim.weight_decay"]] == pytest.approx([3.7, 4.1])
    assert [row["trials"] for row in effects["kind"]] == [4, 4]


def test_draws_are_no_variants(tmp_path: Path) -> None:
    tree = {
        "random": {
            "optim.lr": {"from": "1e-4", "to": "1e-2", "log": "true"},
            "optim.weight_decay": {"from": "0.01", "to": "1", "log": "true"},
        },
        "draws": 6,
    }
    found = report.report(made.sweep(tmp_path / "s", lambda v, _: 3 + float(v["optim.lr"]), tree))
    assert found.figures["variants"] == []
    assert [row["val/bpb"] for row in found.figures["groups"]] == sorted(r["val/bpb"] for r in found.figures["groups"])


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no sweep\.yaml"):
        report.report(tmp_path)
    folder = made.sweep(tmp_path / "s", lambda *_: None, {"grid": {"optim.lr": made.RATES}})
    with pytest.raises(ConfigError, match="7 waiting"):
        report.report(folder)


def test_names_are_no_mathematics_and_no_markup(tmp_path: Path) -> None:
    tree = {
        "grid": {"variant": {"$a|b$": {"model.block.norm_gain": True}, "c": {}}, "optim.lr": made.RATES[:3]},
        "widths": {"factors": [1, 2]},
    }
    folder = made.sweep(tmp_path / "s", lambda v, _: made.bowl(float(v["optim.lr"]), -8, 3.0), tree)
    report.report(folder)
    assert "| $a\\|b$ |" in (folder / "report.md").read_text()


# --- The four targets


def losses_of(tmp_path: Path, lines: list[dict[str, Any]], status: str = "finished") -> dict[str, float]:
    for i, line in enumerate(lines, start=1):
        metrics.append(tmp_path / "metrics.jsonl", i, line)
    return scores.losses(Trial("t", {}, 0, tmp_path, status))


def test_the_four_targets(tmp_path: Path) -> None:
    """Of 200 lines the last 10 (5 %), and the lowest mean of 10 in a row."""
    train = [5.0] * 100 + [2.0] * 10 + [4.0] * 80 + [3.0] * 9 + [3.1]
    lines: list[dict[str, Any]] = [{"train/bpb": value} for value in train]
    lines[99]["val/partial_bpb"] = 2.5
    lines[119]["val/bpb"] = 2.8
    lines[-1]["val/bpb"] = 3.2
    assert losses_of(tmp_path, lines) == pytest.approx(
        {"val_last": 3.2, "val_best": 2.5, "train_last": 3.01, "train_best": 2.0}
    )


def test_of_few_lines_the_last_five_count(tmp_path: Path) -> None:
    found = losses_of(tmp_path, [{"train/bpb": float(value)} for value in (9, 1, 2, 3, 4, 5)])
    assert (found["train_last"], found["train_best"]) == (3.0, 3.0)
    assert math.isnan(found["val_last"])


def test_a_diverged_run_has_its_best_and_no_last(tmp_path: Path) -> None:
    lines = [{"train/bpb": value} for value in [3.0] * 5 + [math.nan] * 5]
    assert losses_of(tmp_path, lines, "diverged") == {
        "val_last": math.inf,
        "val_best": math.inf,
        "train_last": math.inf,
        "train_best": 3.0,
    }


@pytest.mark.parametrize("status", ["waiting", "running", "stopped", "failed"])
def test_a_run_that_is_not_at_its_end_has_no_losses(tmp_path: Path, status: str) -> None:
    assert all(map(math.isnan, losses_of(tmp_path, [{"train/bpb": 3.0, "val/bpb": 3.0}], status).values()))


def test_a_run_that_diverged_at_once_is_infinitely_bad(tmp_path: Path) -> None:
    assert set(losses_of(tmp_path, [], "diverged").values()) == {math.inf}
