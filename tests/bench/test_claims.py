"""A plan is read row by row, run once, and told as it came out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mbtrain import config
from mbtrain.bench.claims import Row, claims, overrides, read_plan, table
from mbtrain.errors import ConfigError
from mbtrain.model.flops import count
from tests import tiny

PLAN = Path(__file__).parents[2] / "configs" / "claims" / "plan.yaml"
ROWS = read_plan(PLAN)


def loaded(row: Row) -> config.Config:
    return config.load(row.config, overrides(row))


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_every_row_of_the_shipped_plan_loads_and_spends_the_same_flops(row: Row) -> None:
    settings = loaded(row)
    budget = 1e13 if row.config.stem in ("novels", "code") else 5e12
    assert settings.train.flops == budget
    assert count(settings).training_per_byte * settings.train.global_batch_size * settings.data.seq_len < budget / 100


@pytest.mark.parametrize("data", ["novels", "code", "clothing64", "librispeech"])
def test_the_rivals_cost_what_megabyte_costs_to_within_a_factor(data: str) -> None:
    """Bytes predicted for the same operations; a perceiver predicts its latents alone."""
    costs = {}
    for row in ROWS:
        if row.name.split("/")[0] == data and row.name.split("/")[1] in (
            "megabyte",
            "transformer",
            "window",
            "perceiver",
            "space",
            "subword",
        ):
            settings = loaded(row)
            read = settings.data.seq_len / (settings.model.latents or settings.data.seq_len)
            costs[row.name] = count(settings).training_per_byte * read
    cost = costs[f"{data}/megabyte"]
    assert len(costs) == (6 if data in ("novels", "code") else 4)
    assert all(0.6 < other / cost < 3 for other in costs.values()), costs


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a: [1]", "a: got"),
        ("a: {}", "a: got {}, expected config"),
        ("a: {config: x.yaml, colour: red}", "expected config, and set and seeds"),
        ("a: {config", "cannot be read"),
    ],
)
def test_a_wrong_plan_is_one_line(tmp_path: Path, content: str, line: str) -> None:
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_plan(tmp_path / "plan.yaml")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_are_trained_once_and_tabled(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny.tree(2, data={"path": str(shards)}, train={"steps": 2})
    (tmp_path / "tiny.yaml").write_text(config.to_yaml(config.validate(tree)))
    plan = {"first/wide": {"config": "tiny.yaml", "seeds": [1], "set": {"model.stages.0.d_model": 64}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**plan, "first/broken": {"config": "none.yaml"}}))
    options = {"plan": str(tmp_path / "plan.yaml"), "runs": str(tmp_path / "runs"), "jobs": "1"}
    assert claims(**options) == {"rows": 2, "runs": 2, "failed": 1}
    run = tmp_path / "runs" / "first" / "wide_s1"
    settings = config.load(run / "config.yaml")
    assert (settings.train.seed, settings.model.stages[0].d_model, settings.log.mlflow) == (1, 64, False)
    scored = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bpb = next(line["val/bpb"] for line in scored if "val/bpb" in line)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"| first/wide | {bpb:.4f} | 1 |")
    assert len(lines) == 3, "a row without a finished run is not told"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("subprocess.run", never)
    assert claims(**options, only="wide") == {"rows": 1, "runs": 1, "failed": 0}


def test_the_table_gives_the_mean_and_range_over_seeds(tmp_path: Path) -> None:
    row = Row("x", PLAN, {}, (1, 2, 3))
    for seed, bpb in ((1, 2.0), (2, 2.5), (3, 99.0)):
        run = row.run(tmp_path, seed)
        run.mkdir()
        (run / "config.yaml").write_text(config.to_yaml(tiny.make()))
        (run / "status.json").write_text(json.dumps({"status": "FINISHED" if seed < 3 else "FAILED", "message": ""}))
        lines = [{"step": 1, "progress/bytes": 10, "progress/flops": 2e7}, {"step": 1, "val/bpb": bpb}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = list(table([row], tmp_path))[-1]
    assert told.startswith("| x | 2.2500 (2.0000 to 2.5000) | 2 |")
    assert "| 2.00M |" in told
