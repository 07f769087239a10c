"""Every shipped experiment loads, can be counted and cut, and says in its header how it is run.

pytest tests/test_configs.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mbtrain import config
from mbtrain.model.flops import count
from tests.launch import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))


def header(path: Path) -> str:
    """The comment lines at the top of a file, as one text."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def test_there_are_some() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_configuration(path: Path) -> None:
    """Loads; its whole form loads again to the same; parameters and FLOPs come out; one rank can run it."""
    settings = config.load(path)
    assert config.validate(config.load(path).model_dump(mode="json")) == settings
    counted = count(settings)
    assert counted.parameters > 0
    assert counted.training_per_byte > 0
    micro, accumulation = config.batch_shape(settings, 1)
    assert micro * accumulation == settings.train.global_batch_size
    config.step_limit(settings, counted.training_per_byte)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_header_says_the_command(path: Path) -> None:
    """A comment at the top with the command that runs this very file (or a script that does)."""
    said = header(path)
    assert "mbtrain " in said or "launch/" in said, said
    assert str(path.relative_to(ROOT)) in said or "launch/" in said, said


def test_names_are_their_own() -> None:
    """Two configurations of one name would train into the same run directory."""
    names = [config.load(path).name for path in CONFIGS]
    assert len(set(names)) == len(names), names
