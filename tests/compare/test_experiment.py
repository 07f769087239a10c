"""What MLflow has of an experiment comes back as runs that compare as their own directories do.

pytest tests/compare/test_experiment.py
"""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

from mbtrain import config, metrics, tracking
from mbtrain.compare import compare
from mbtrain.compare.reading import read
from mbtrain.errors import MbtrainError
from mbtrain.tracking import fetching
from mbtrain.tracking.labels import labels, without_seed
from tests import tiny
from tests.compare import made


def test_an_experiment_comes_back_and_a_sweep_has_a_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in tracking.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    folders = [made.run(tmp_path / name, floor=2 + i / 10, steps=20) for i, name in enumerate(("a_s0", "a_s1", "b"))]
    for folder in folders:
        (folder / "tracking.json").write_text(json.dumps({"experiment": "trial", "parent": "sweep"}))
        tracking.sync(folder, uri)
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        rows = store.execute("select key, value, run_uuid from tags").fetchall()
    (parent,) = {run for key, value, run in rows if (key, value) == ("mbtrain.parent_of", "sweep")}
    assert [value for key, value, _ in rows if key == "mlflow.parentRunId"] == [parent] * 3

    alone = compare(folders, tmp_path / "alone").runs
    both = compare(folders[:1], tmp_path / "both", experiment="trial", uri=uri).runs
    assert [run["name"] for run in both] == [run["name"] for run in alone]
    for here, there in zip(alone, both, strict=True):
        assert {**there, "run": ""} == pytest.approx({**here, "run": ""}), "but for where they are"
    assert {run["run"] for run in both} == {str(folders[0]), "trial/a_s1", "trial/b"}
    with pytest.raises(MbtrainError, match="'nothing': not there; there are Default, trial"):
        fetching._fetch_all(uri, "nothing", tmp_path)


def test_names_of_a_store_are_harmless_and_told_apart(tmp_path: Path) -> None:
    class Info:
        run_name, run_id = "../../x y", "1/2"

    class Found:
        info = Info

    assert fetching._folder(tmp_path, Found).name == "_.._x_y"
    assert fetching._folder(tmp_path, Found).name == "_.._x_y-1_2"
    assert {path.parent for path in tmp_path.iterdir()} == {tmp_path}


def test_a_server_that_names_a_path_here_has_no_file_read(tmp_path: Path) -> None:
    """It would be this user's own file, in a page that is passed on."""
    info = SimpleNamespace(run_id="1", artifact_uri="file:///etc", status="FINISHED")
    data = SimpleNamespace(metrics={"train/bpb": 1.0}, params={"a.b": "1"}, tags={"x": "y"})
    point = SimpleNamespace(step=3, timestamp=5000, value=math.inf)
    history = SimpleNamespace(tracking_uri="http://server", get_metric_history=lambda run, key: [point])
    fetching._write_run(history, SimpleNamespace(info=info, data=data), tmp_path)  # which has no list_artifacts
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("config.yaml", "environment.json", "metrics.jsonl", "status.json"),
    ]
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 3, "time_unix_s": 5.0, "train/bpb": math.inf}]


def test_a_process_that_says_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MbtrainError, match="no such file; expected the store"):
        fetching.fetch("x", f"sqlite:///{tmp_path}/none.db", tmp_path)
    monkeypatch.setattr(fetching, "LIMIT_S", 0.01)
    with pytest.raises(MbtrainError, match="no whole answer in 0 s"):
        fetching.fetch("x", "http://user:secret@127.0.0.1:9", tmp_path)


def test_params_are_a_configuration_again(tmp_path: Path) -> None:
    flat = read(made.run(tmp_path / "a"), "a").settings
    (tmp_path / "a" / "config.yaml").write_text(fetching._nested(flat))
    assert read(tmp_path / "a", "a").settings == flat
    assert config.load(tmp_path / "a" / "config.yaml").model == tiny.make().model


def test_labels() -> None:
    settings = config.validate({**tiny.tree(train={"seed": 7}), "name": "lr3_s7"})
    assert labels(settings, [("a", "text"), ("b", "text")], 10) == {
        "mbtrain.group": "lr3",
        "mbtrain.kind": "megabyte",
        "mbtrain.data": "a + b",
        "mbtrain.modality": "text",
        "mbtrain.seed": "7",
        "mbtrain.parameters": "10",
    }
    assert [without_seed(name) for name in ("x-seed12", "x.s1", "s1", "_s1", "gas2", "x_s")] == [
        *("x", "x", "s1", "_s1", "gas2", "x_s"),
    ]
