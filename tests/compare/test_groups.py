"""Seeds are one group, data sets are apart, the best stands first, and what is said of equal cost is exact.

pytest tests/compare/test_groups.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mbtrain.compare import curves, groups, reading
from tests.compare import made


def read(root: Path, name: str, **how: object) -> reading.Run:
    return reading.read(made.run(root / name, **how), name)  # type: ignore[arg-type]


def test_seeds_are_one_group_with_mean_lowest_and_highest(tmp_path: Path) -> None:
    floors = {"lr3_s0": 2.0, "lr3_s1": 2.3, "lr3-seed2": 2.6, "lr4": 1.9, "s1": 3.0}
    runs = [read(tmp_path, name, floor=floor) for name, floor in floors.items()]
    (section,) = groups.sections(runs)
    assert [group.name for group in section.groups] == ["lr4", "lr3", "s1"]
    seeds = section.groups[1]
    end = made.bpb_at(100, 0.0) + 0.1
    assert seeds.score == groups.Spread(*(pytest.approx(value + end) for value in (2.3, 2.0, 2.6)))
    assert seeds.best.name == "lr3_s1"


def test_data_sets_are_apart_and_older_runs_join_their_data(tmp_path: Path) -> None:
    runs = [read(tmp_path, f"a{i}") for i in range(3)] + [read(tmp_path, "b", data="photos", modality="image")]
    older = made.run(tmp_path / "older")
    (older / "environment.json").write_text('{"data": [{"name": "books", "modality": "text"}]}')
    other = made.run(tmp_path / "other")
    environment = (other / "environment.json").read_text().replace("hash of books", "deadbeef0")
    (other / "environment.json").write_text(environment)
    books, *rest = groups.sections([*runs, reading.read(older, "older")])
    assert (books.title, len(books.groups), books.modality) == ("books", 4, "text")
    assert [section.title for section in rest] == ["photos"]
    titles = {section.title for section in groups.sections([*runs, reading.read(other, "other")])}
    assert titles == {"books (prepared as hash of )", "books (prepared as deadbeef)", "photos"}


def test_order_is_by_what_was_scored_then_by_score(tmp_path: Path) -> None:
    runs = [read(tmp_path, "worse", floor=3.0), read(tmp_path, "better", floor=2.0)]
    for name, keep in (("part", "val/partial_bpb"), ("training", "train/bpb"), ("nothing", "optim/lr")):
        folder = made.run(tmp_path / name, floor=1.0)
        text = (folder / "metrics.jsonl").read_text()
        for key in ("val/bpb", "val/partial_bpb", "train/bpb"):
            text = text if key == keep else text.replace(f'"{key}"', '"x"')
        (folder / "metrics.jsonl").write_text(text)
        runs.append(reading.read(folder, name))
    (section,) = groups.sections(runs)
    assert [group.name for group in section.groups] == ["better", "worse", "part", "training", "nothing"]
    assert [group.scored_on for group in section.groups[1:]] == ["whole split", "first part", "training", "nothing"]


def test_equal_cost_reads_the_curve_where_all_have_spent_the_same(tmp_path: Path) -> None:
    runs = [read(tmp_path, "short", floor=1.0, steps=80), read(tmp_path, "long", floor=2.0, steps=400)]
    (section,) = groups.sections(runs)
    of_axis = {cost.axis: cost for cost in groups.equal_costs(section.groups)}
    assert of_axis["bytes"].budget == 80 * made.STEP_BYTES
    assert of_axis["flops"].budget == 80 * made.STEP_BYTES * made.FLOPS_PER_BYTE
    for cost in of_axis.values():
        assert cost.bpb == pytest.approx((made.bpb_at(80, 1.0), made.bpb_at(80, 2.0)), abs=0.01)


def test_who_did_not_spend_it_has_no_value_at_equal_cost(tmp_path: Path) -> None:
    runs = [read(tmp_path, f"r{steps}", floor=1 + steps / 1000, steps=steps) for steps in (10, 100, 110, 120, 130)]
    (section,) = groups.sections(runs)
    cost = groups.equal_costs(section.groups)[0]
    assert cost.budget == 100 * made.STEP_BYTES
    known = {group.name for group, value in zip(section.groups, cost.bpb, strict=True) if math.isfinite(value)}
    assert known == {"r100", "r110", "r120", "r130"}


def test_only_settings_that_differ_are_told(tmp_path: Path) -> None:
    runs = [
        read(tmp_path, "a_s0", optim={"lr": 0.01}),
        read(tmp_path, "a_s1", optim={"lr": 0.01}, train={"seed": 1}),
        read(tmp_path, "b", optim={"lr": 0.02}, floor=3.0),
    ]
    (section,) = groups.sections(runs)
    assert groups.differences(section.groups) == [("train.seed", ["0, 1", "0"]), ("optim.lr", ["0.01", "0.02"])]
    assert groups.unlike(section.groups[0]) == []
    (mixed,) = groups.sections([runs[0], read(tmp_path, "a_s2", optim={"lr": 0.3})])
    assert groups.unlike(mixed.groups[0]) == ["optim.lr"]


def test_a_band_holds_every_seed_and_the_mean_is_theirs(tmp_path: Path) -> None:
    floors = (2.0, 2.5, 3.0)
    runs = [read(tmp_path, f"a_s{i}", floor=floor, steps=100 + i) for i, floor in enumerate(floors)]
    (section,) = groups.sections(runs)
    for panel in curves.panels(section.groups):
        line = panel.curves[0].train
        assert (line.low <= line.mean).all()
        assert (line.mean <= line.high).all()
        assert line.high - line.low == pytest.approx(np.full(len(line.x), 1.0), abs=0.01)
        assert line.mean - line.low == pytest.approx(np.full(len(line.x), 0.5), abs=0.01)
        validated = panel.curves[0].val
        assert (len(validated.x), validated.high[0] - validated.low[0]) == (1, pytest.approx(1.0, abs=0.01))


def test_panels_show_the_outcome_and_have_units(tmp_path: Path) -> None:
    runs = [read(tmp_path, "a"), read(tmp_path, "b", floor=2.5), read(tmp_path, "diverged", floor=900.0)]
    (section,) = groups.sections(runs)
    panels = {panel.axis: panel for panel in curves.panels(section.groups)}
    assert panels["bytes"].label == "bytes trained on (kB)"
    assert panels["flops"].label == "training compute (GFLOP)"
    assert panels["minutes"].label == "training time (min)"
    for panel in panels.values():
        assert not panel.log
        assert panel.y_limits[0] < 2.1 < 2.6 < panel.y_limits[1] < 8
        for ticks, (low, high) in ((panel.x_ticks, panel.x_limits), (panel.y_ticks, panel.y_limits)):
            assert 3 <= len(ticks) <= 8
            assert all(low <= place <= high for place, _ in ticks)
            assert len({label for _, label in ticks}) == len(ticks)
            assert all(float(label) == pytest.approx(place) for place, label in ticks)


def test_costs_that_are_far_apart_have_a_logarithmic_axis(tmp_path: Path) -> None:
    runs = [read(tmp_path, "short", steps=10), read(tmp_path, "long", steps=1000)]
    (section,) = groups.sections(runs)
    panel = curves.panels(section.groups)[0]
    assert panel.log
    assert [label for _, label in panel.x_ticks] == ["1", "10", "100", "1000"] or len(panel.x_ticks) >= 3


@pytest.mark.parametrize(
    ("axis", "value", "told"),
    [
        ("bytes", 999.0, "999 bytes"),
        ("bytes", 1.25e6, "1.25 MB"),
        ("flops", 1.81e12, "1.81 TFLOP"),
        ("flops", 1.25e6, "1.25 MFLOP"),
        ("minutes", 0.5, "0.5 min"),
        ("minutes", 150.0, "2.5 h"),
    ],
)
def test_amounts(axis: str, value: float, told: str) -> None:
    assert curves.amount(axis, value) == told
