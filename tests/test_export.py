"""Export: three lines load it, its logits are the run's bit for bit, and damage is one line.

pytest tests/test_export.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from mbtrain import evaluate, export
from mbtrain.errors import CheckpointError, ConfigError
from mbtrain.shards import file_sha256
from tests import launch, tiny
from tests.test_checkpoint import flip, made_run


@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_three_lines_load_what_the_run_has(tmp_path: Path, preset: str) -> None:
    """Tied weights and untied ones; the preset's dropout is off."""
    original = made_run(tmp_path / "run", tiny.make(2, preset))
    assert export.export_run(tmp_path / "run", tmp_path / "out") == tmp_path / "out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "SHA256SUMS",
        "config.yaml",
        "weights.safetensors",
    ]

    model = export.load(tmp_path / "out")
    logits = model(torch.tensor([list(b"any bytes")]))

    assert torch.equal(logits, original(torch.tensor([list(b"any bytes")])))
    assert not model.training
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}, "nothing is left lying about"


def test_a_checkpoint_in_a_run_can_be_exported_to_a_folder_far_below(tmp_path: Path) -> None:
    made_run(tmp_path / "run", tiny.make(1))
    out = export.export_run(tmp_path / "run" / "checkpoints" / "step_0000000004", tmp_path / "a" / "b")
    assert export.load(out).vocab_size == 257


@pytest.mark.parametrize("there", ["folder", "file", "run"])
def test_what_exists_is_not_touched(tmp_path: Path, there: str) -> None:
    made_run(tmp_path / "run", tiny.make(1))
    out = tmp_path / there
    if there == "folder":
        out.mkdir()
    elif there == "file":
        out.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="exists already"):
        export.export_run(tmp_path / "run", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_reload_differently_are_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(tmp_path / "run", tiny.make(1))
    load = export.load

    def wrong(path: Path) -> Any:
        model = load(path)
        with torch.no_grad():
            next(model.parameters())[0] += 1e-3
        return model

    monkeypatch.setattr(export, "load", wrong)
    with pytest.raises(CheckpointError, match="other logits"):
        export.export_run(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("harm", ["header", "cut off", "missing", "empty", "edited", "other model", "no config"])
def test_damage_is_one_line(tmp_path: Path, harm: str) -> None:
    made_run(tmp_path / "run", tiny.make(1))
    out = export.export_run(tmp_path / "run", tmp_path / "out")
    weights = out / "weights.safetensors"
    if harm == "header":
        flip(weights, 0.0)
    elif harm == "cut off":
        os.truncate(weights, weights.stat().st_size - 4)
    elif harm == "missing":
        weights.unlink()
    elif harm == "empty":
        os.truncate(weights, 0)
    elif harm in ("edited", "other model"):
        config, sums = out / "config.yaml", out / "SHA256SUMS"
        old = file_sha256(config)
        config.write_text(config.read_text().replace("n_layers: 2", "n_layers: 3"))
        if harm == "other model":  # exported by somebody with tools of his own: whole, but it does not fit
            sums.write_text(sums.read_text().replace(old, file_sha256(config)))
    else:
        (out / "config.yaml").unlink()
    with pytest.raises(CheckpointError) as error:
        export.load(out)
    assert "\n" not in str(error.value)
    named = "config.yaml" if harm in ("edited", "no config") else "weights.safetensors"
    assert str(out / named) in str(error.value)


def test_a_flipped_bit_among_the_weights_is_found(tmp_path: Path) -> None:
    made_run(tmp_path / "run", tiny.make(1))
    out = export.export_run(tmp_path / "run", tmp_path / "out")
    flip(out / "weights.safetensors", 0.7)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: its content is not what was exported"):
        export.load(out)


def test_sums_that_say_nothing_of_a_file_do_not_vouch_for_it(tmp_path: Path) -> None:
    made_run(tmp_path / "run", tiny.make(1))
    out = export.export_run(tmp_path / "run", tmp_path / "out")
    (out / "SHA256SUMS").write_text("")
    with pytest.raises(CheckpointError, match="its content is not what was exported"):
        export.load(out)
    (out / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="not a whole export"):
        export.load(out)


def test_sha256sum_reads_the_sums(tmp_path: Path) -> None:
    made_run(tmp_path / "run", tiny.make(1))
    out = export.export_run(tmp_path / "run", tmp_path / "out")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)


def test_a_run_without_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    made_run(tmp_path / "run", tiny.make(1))
    next((tmp_path / "run").glob("checkpoints/*/weights-*")).unlink()
    ended = launch.mbtrain(["export", str(tmp_path / "run"), f"--out={tmp_path / 'out'}"], expect=2)
    assert ended.stderr.startswith("mbtrain: ")
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_exported_configuration_is_the_runs(tmp_path: Path) -> None:
    made_run(tmp_path / "run", tiny.make(2, "paper"))
    out = export.export_run(tmp_path / "run", tmp_path / "out")
    assert (out / "config.yaml").read_text() == (tmp_path / "run" / "config.yaml").read_text()
    _, settings, _, _ = evaluate.load_model(tmp_path / "run", torch.device("cpu"))
    assert export.load(out).config == settings.model
