"""A Ray cluster makes the same bytes. Slow: Ray takes ten seconds to start.

pytest -m slow tests/data_prep/test_cluster.py
"""

import builtins
import random
from pathlib import Path
from typing import Any

import pytest

from data_prep.build import build
from data_prep.recipe import Recipe, parse_splits
from data_prep.text import text_modality
from mbtrain.errors import ConfigError, DataError
from tests.data_prep.test_build import digests

RECIPE = Recipe(splits=parse_splits("splits", "train=0.8,val=0.2"), shard_bytes=20_000)


def make(sources: Path, out: Path, **options: Any) -> None:
    build(text_modality("text"), [str(sources)], out, RECIPE, **{"workers": 2, "group_bytes": 4000, **options})


@pytest.mark.slow
def test_a_cluster_makes_the_same_bytes_and_gives_one_line_for_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("ray")
    dice = random.Random(1)
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i:02d}").write_bytes(dice.randbytes(dice.randrange(1, 3000)))
    (tmp_path / "in" / "bad.jsonl").write_text("{oops\n")
    make(tmp_path / "in", tmp_path / "ray", engine="ray")
    assert "1 rejected" in capsys.readouterr().err
    make(tmp_path / "in", tmp_path / "one", workers=1)
    assert digests(tmp_path / "ray") == digests(tmp_path / "one")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.build.stage", failing_stage)
        with pytest.raises(DataError, match=r"^x: this task fails; mend it$"):
            make(tmp_path / "in", tmp_path / "failed", engine="ray")


def failing_stage(job: Any, count: Any) -> None:
    """Stands for a source that changed."""
    raise DataError("x: this task fails; mend it")


def test_ray_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("x")
    import_module = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return import_module(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'mbtrain\[ray\]'"):
        make(tmp_path / "x", tmp_path / "out", engine="ray")
