"""The shipped experiments of the small tasks: three models of each, whose windows reach as far as the rules do.

pytest tests/tasks/test_tasks_configs.py
"""

from __future__ import annotations

import re

import pytest

from mbtrain import config
from mbtrain.config import Config
from mbtrain.tasks.rules import TASKS
from tests.launch import ROOT

FOLDER = ROOT / "configs" / "tasks"
# The longest stretch of bytes that a rule spans: three words and a first letter; a line; two lines of actions.
REACH = {"words": 3 * 8 + 1, "addition": 17, "actions": (8 + 1 + 3 + 2) + (8 + 1 + 3)}
EACH = [(task, kind) for task in TASKS for kind in ("", "_transformer", "_bpe")]


def load(task: str, kind: str) -> Config:
    return config.load(FOLDER / f"{task}{kind}.yaml")


@pytest.mark.parametrize(("task", "kind"), EACH)
def test_each_task_has_three_models(task: str, kind: str) -> None:
    settings = load(task, kind)
    assert settings.model.kind == {"": "megabyte", "_transformer": "transformer", "_bpe": "subword"}[kind]
    assert settings.name == f"{task}{kind}"
    assert settings.data.path == f"shards/{task}"
    assert not settings.data.boundary
    assert settings.model.parametrization == "mup"
    assert all(stage.base_d_model == stage.d_model for stage in settings.model.stages), "the LR was found at this width"


@pytest.mark.parametrize(("task", "kind"), EACH)
def test_it_can_look_as_far_back_as_the_rules_reach(task: str, kind: str) -> None:
    """In bytes, through the layers; of MEGABYTE inside the patch before."""
    settings = load(task, kind)
    model = settings.model
    if kind == "":
        assert model.cross_patch + 1 >= REACH[task]
        assert model.stages[0].patch_size > 2 * REACH[task]
    else:
        window = model.stages[0].window
        assert window is not None
        assert 1 + model.stages[0].n_layers * (window - 1) >= REACH[task]
    assert settings.data.seq_len > 4 * REACH[task]


@pytest.mark.parametrize(("task", "kind"), EACH)
def test_its_header_has_every_command_and_what_came_out(task: str, kind: str) -> None:
    text = (FOLDER / f"{task}{kind}.yaml").read_text()
    for said in (f"mbtrain-prep task {task}", f"configs/tasks/{task}{kind}.yaml", f"eval-task runs/{task}{kind}"):
        assert said in text
    assert re.search(r"\d minutes", text)
    assert re.search(r"\d %", text)
    assert ("mbtrain-prep vocabulary" in text) == (kind == "_bpe")
