"""`mbtrain eval-task` on runs that have learnt nothing: its figures, its entry, its mistakes.

pytest tests/tasks/test_report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.tasks import make_task
from mbtrain import cli, evaluation, metrics
from mbtrain.errors import ConfigError, DataError
from mbtrain.tasks.report import described, evaluate_task, lines_of, missed
from mbtrain.tasks.rules import TASKS, floor_nats_per_byte
from tests import tiny
from tests.handmade import Made, dataset
from tests.test_checkpoint import made_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        make_task(task, folder / task, seed=1, lines=40)
    return folder


def run_of(folder: Path, path: Path, stages: int = 2, seq_len: int = 64, **model: Any) -> Path:
    settings = tiny.make(stages, seq_len=seq_len, data={"path": str(path), "boundary": False}, model=model)
    made_run(folder / "run", settings)
    metrics.append(folder / "run" / "metrics.jsonl", 4, {"progress/minutes": 1.5})
    return folder / "run"


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_has_learnt_nothing_says_so(tmp_path: Path, data: Path, task: str) -> None:
    run = run_of(tmp_path, data / task)
    figures = evaluate_task(run, samples=3)
    assert figures["task"] == task, "the data set knows"
    assert figures["score"] == 0
    assert figures["learnt"] is False
    assert figures["samples"] == (30 if task == "actions" else 3)
    assert figures["floor_nats_per_byte"] == floor_nats_per_byte(task)
    scored = evaluation.evaluate_run(run, batch=3)
    assert figures["bpb"] == pytest.approx(scored["bpb"], rel=1e-5)
    assert figures["val_nats_per_byte"] * scored["bytes"] == pytest.approx(scored["nats"], rel=1e-5)
    assert (figures["minutes"], figures["step"], figures["dropout"]) == (1.5, 4, 0.0)
    json.dumps(figures)
    entry = "\n".join(lines_of(figures))
    for said in ("tokenizer   bytes", "32 + 16", "not learnt", f"mbtrain-prep task {task}", "--seed=1 --lines=40"):
        assert said in entry
    assert entry.isprintable() or all(line.rstrip() == line for line in entry.splitlines()[:12])


def test_the_verb_prints_the_entry_and_the_figures(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, data / "actions")
    with pytest.raises(SystemExit) as end:
        cli.main(["eval-task", str(run), "--samples=2", "--task=actions", "--json"])
    assert end.value.code == 0
    *entry, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures["scores"] == dict.fromkeys("0123456789", 0.0)
    assert figures["counts"] == dict.fromkeys("0123456789", 2)
    assert sum("  action " in line for line in entry) == 10
    again = evaluate_task(run, samples=2)
    assert {key: again[key] for key in ("sample", "wrong")} == {key: figures[key] for key in ("sample", "wrong")}


def test_any_text_has_a_loss_and_a_sample_but_no_score(tmp_path: Path) -> None:
    code = [Made(b"def one():\n    return 1\n" * 9), Made(b"x = 2\n" * 30)]
    run = run_of(tmp_path, dataset(tmp_path / "set", "text", {"train": [code], "val": [code]}))
    figures = evaluate_task(run)
    assert (figures["task"], figures["score"], figures["learnt"]) == ("code", None, None)
    assert figures["bpb"] > 1
    assert figures["sample"]
    entry = "\n".join(lines_of(figures))
    assert "verdict" not in entry
    assert "nats per byte of validation" in entry


@pytest.mark.parametrize(
    ("task", "error", "said"),
    [
        ("words", DataError, "line 1, .* is none of words"),
        ("addition", DataError, "is none of addition"),
        ("sums", ConfigError, "expected one of words, addition, actions, code"),
    ],
)
def test_another_task_than_the_datas_is_a_mistake(
    tmp_path: Path, data: Path, task: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        evaluate_task(run_of(tmp_path, data / "actions"), task=task, samples=1)


def test_what_is_missed_is_told_by_the_aims() -> None:
    """99 % of words; 99 % of the form and 90 % right; every action above 95 %, and the loss below 1.30."""
    words = {"task": "words", "scores": {}}
    assert not missed({**words, "score": 0.99})
    assert missed({**words, "score": 0.989})
    sums = {"task": "addition", "score": 0.9, "scores": {"form": 0.99}}
    assert not missed(sums)
    assert missed({**sums, "score": 0.899})
    assert missed({**sums, "scores": {"form": 0.98}})
    acts = {"task": "actions", "score": 1.0, "val_nats_per_byte": 1.29, "scores": dict.fromkeys("0123456789", 0.96)}
    assert not missed(acts)
    assert "4 (95.0%)" in missed({**acts, "scores": {**acts["scores"], "4": 0.95}})[0]  # type: ignore[dict-item]
    assert missed({**acts, "val_nats_per_byte": 1.3})


def test_what_is_not_known_of_a_run_is_said_so(tmp_path: Path, data: Path) -> None:
    run = run_of(tmp_path, data / "words", stages=1)
    (run / "metrics.jsonl").unlink()
    figures = evaluate_task(run, samples=1)
    assert figures["minutes"] is None
    assert figures["machine"] is None
    assert "unknown" in "\n".join(lines_of(figures))
    assert described.__doc__
