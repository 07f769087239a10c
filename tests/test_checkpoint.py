"""Checkpoints: whole or not at all. A kill at any moment leaves the last good one; damage is found and the file named.

pytest tests/test_checkpoint.py
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mbtrain import checkpoint, config
from mbtrain.checkpoint import Progress, name_of
from mbtrain.config import Config
from mbtrain.errors import CheckpointError
from mbtrain.model import Model, build
from tests import launch, tiny


def state_of(model: Model) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What an engine gives: whole weights and moments by name."""
    for name, weight in model.state_dict().items():
        yield name, {"weight": weight, "exp_avg": weight * 2, "exp_avg_sq": weight.square()}


def write(run: Path, model: Model, progress: Progress, ranks: int = 1, keep_last: int = 10) -> Path:
    """A checkpoint as so many ranks write it."""
    folder = checkpoint.begin(run, progress.step)
    hashes: dict[str, str] = {}
    for rank in range(ranks):
        hashes |= checkpoint.write_share(folder, checkpoint.share(state_of(model), rank, ranks), rank, ranks)
    return checkpoint.finish(folder, progress, hashes, keep_last)


def made_run(run: Path, settings: Config, step: int = 4) -> Model:
    """A run directory with one checkpoint of a freshly initialised model, without training; returns the model."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.to_yaml(settings))
    torch.manual_seed(0)
    model = build(settings).eval()
    write(run, model, Progress(step=step))
    return model


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return build(tiny.make(1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 64])
def test_what_was_written_is_read_back_for_any_number_of_files(tmp_path: Path, model: Model, ranks: int) -> None:
    """Also when there are more ranks than parameters."""
    progress = Progress(
        step=7, position=2**40, bytes=9, elapsed_s=1.5, optimizer_steps=6, mlflow_run_id="x", loss_scaler={"a": 2.0}
    )
    path = write(tmp_path, model, progress, ranks)
    found = checkpoint.verify(path)
    assert found.progress == progress
    assert len(found.files) == 2 * ranks
    state = checkpoint.load_state(found)
    expected = dict(state_of(model))
    assert state.keys() == expected.keys() == checkpoint.load_weights(found).keys()
    for name, whole in expected.items():
        assert state[name].keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(state[name][key], value)


def test_tied_and_sliced_tensors_are_written_apart(tmp_path: Path) -> None:
    """The engine may give two names the same memory, or a view."""
    shared = torch.arange(12.0).view(3, 4)
    state = [(name, {"weight": t, "exp_avg": t, "exp_avg_sq": t}) for name, t in (("a", shared), ("b", shared.t()))]
    folder = checkpoint.begin(tmp_path, 1)
    hashes = checkpoint.write_share(folder, checkpoint.share(iter(state), 0, 1), 0, 1)
    path = checkpoint.finish(folder, Progress(step=1), hashes, 1)
    assert torch.equal(checkpoint.load_weights(checkpoint.verify(path))["b"], shared.t())


class Killed(BaseException):
    """The process ends here."""


def test_a_kill_at_any_write_rename_or_removal_leaves_a_good_checkpoint(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies before the n-th file-system call of a save, for every n, and once after: newest() is step 2 or step 4."""
    calls = {
        "replace": os.replace,
        "fsync": os.fsync,
        "rename": os.rename,
        "rmtree": checkpoint.shutil.rmtree,
        "mkdir": Path.mkdir,
        "open": Path.open,
    }
    outcomes = []
    for n in range(1, 100):
        run = tmp_path / str(n)
        write(run, model, Progress(step=2))
        left = n

        def dying(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name, original in calls.items():
                owner = {"rmtree": checkpoint.shutil, "mkdir": Path, "open": Path}.get(name, os)
                patch.setattr(owner, name, dying(original))
            try:
                write(run, model, Progress(step=4), ranks=2, keep_last=1)
                died = False
            except Killed:
                died = True
        found, problems = checkpoint.newest(run)
        assert found is not None, f"nothing left after dying at call {n}"
        assert not problems, "a half-written checkpoint never has a checkpoint's name"
        outcomes.append(found.progress.step)
        # The next save works, whatever was left lying about, and clears it away.
        write(run, model, Progress(step=6), keep_last=1)
        assert [p.name for p in (run / "checkpoints").iterdir()] == [name_of(6)]
        if not died:
            break
    assert outcomes == sorted(outcomes)
    assert {2, 4} == set(outcomes)
    assert len(outcomes) > 10, "the calls were really counted"


def test_the_same_step_saved_again_takes_the_place_of_the_old_one(tmp_path: Path, model: Model) -> None:
    write(tmp_path, model, Progress(step=2, bytes=1))
    write(tmp_path, model, Progress(step=2, bytes=2))
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.progress.bytes == 2


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_newest_stay(tmp_path: Path, model: Model, keep_last: int) -> None:
    """By number, not by time or by text: step 10 is newer than step 9."""
    for step in (8, 9, 10, 11):
        write(tmp_path, model, Progress(step=step), keep_last=keep_last)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == [name_of(step) for step in range(12 - keep_last, 12)]


def test_a_damaged_newer_one_does_not_push_out_the_one_just_written(tmp_path: Path, model: Model) -> None:
    """Gone on from step 2 because step 6 was damaged: step 4 must stay, though keep_last is 1."""
    for step in (2, 6):
        write(tmp_path, model, Progress(step=step))
    (tmp_path / "checkpoints" / name_of(6) / "checkpoint.json").unlink()
    path = write(tmp_path, model, Progress(step=4), keep_last=1)
    assert path.is_dir()
    found, problems = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.progress.step == 4
    assert len(problems) == 1
    assert not (tmp_path / "checkpoints" / name_of(2)).exists()


def record(path: Path, **changes: Any) -> None:
    """Change a checkpoint's record, and its own hash with it: what is found then is the change."""
    file = path / "checkpoint.json"
    content = {**json.loads(file.read_text()), **changes}
    del content["self"]
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**content, "self": own}))


def change(path: Path, old: str, new: str) -> None:
    """Change a few characters of a checkpoint's record, which stays valid JSON."""
    file = path / "checkpoint.json"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def flip(file: Path, at: float = 0.5) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 1
    file.write_bytes(content)


WEIGHTS = "weights-00000-of-00001.safetensors"
MOMENTS = "moments-00000-of-00001.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda p: os.truncate(p / WEIGHTS, 100), f"{WEIGHTS}: its content is not what was written"),
    "flipped": (lambda p: flip(p / MOMENTS), f"{MOMENTS}: its content is not what was written"),
    "flipped at the end": (lambda p: flip(p / WEIGHTS, 0.9999), f"{WEIGHTS}: its content"),
    "emptied": (lambda p: os.truncate(p / MOMENTS, 0), f"{MOMENTS}: its content"),
    "missing": (lambda p: (p / MOMENTS).unlink(), f"{MOMENTS}: missing"),
    "a folder": (lambda p: ((p / MOMENTS).unlink(), (p / MOMENTS).mkdir()), f"{MOMENTS}: missing"),
    "no record": (lambda p: (p / "checkpoint.json").unlink(), "checkpoint.json: No such file"),
    "record cut off": (lambda p: os.truncate(p / "checkpoint.json", 50), "checkpoint.json: damaged"),
    "record no mapping": (lambda p: (p / "checkpoint.json").write_text("[]"), "checkpoint.json: damaged"),
    "record no UTF-8": (lambda p: (p / "checkpoint.json").write_bytes(b"\xff\xfe{"), "checkpoint.json: damaged"),
    "a digit of the record": (lambda p: change(p, '"step": 4', '"step": 5'), "checkpoint.json: its content is not"),
    "a record without its hash": (lambda p: change(p, '"self"', '"sel"'), "checkpoint.json: damaged"),
    "no hashes": (lambda p: record(p, sha256=None), "checkpoint.json: damaged"),
    "hashes a list": (lambda p: record(p, sha256=["a"]), "checkpoint.json: damaged"),
    "another format": (lambda p: record(p, format=2), "format 2, this version reads 1"),
    "another format with other fields": (lambda p: record(p, format=2, progress={"x": 1}), "format 2, this version"),
    "unknown progress": (lambda p: record(p, progress={"steps": 1}), "checkpoint.json: damaged"),
    "a path upwards": (lambda p: record(p, sha256={"../../config.yaml": "0"}), "is no plain file name"),
    "an absolute path": (lambda p: record(p, sha256={"/etc/hostname": "0"}), "is no plain file name"),
    "the folder itself": (lambda p: record(p, sha256={"..": "0"}), ".."),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_named_and_passed_over(tmp_path: Path, model: Model, kind: str) -> None:
    run = tmp_path / "run"
    write(run, model, Progress(step=2))
    path = write(run, model, Progress(step=4))
    checkpoint.verify(path)
    harm, words = DAMAGE[kind]
    harm(path)
    with pytest.raises(CheckpointError) as error:
        checkpoint.verify(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    found, problems = checkpoint.newest(run)
    assert found is not None
    assert found.progress.step == 2
    assert problems == [str(error.value)]


def test_find_takes_a_run_or_a_checkpoint_and_says_what_else_it_got(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made_run(run, tiny.make(1))
    path = run / "checkpoints" / name_of(4)
    assert checkpoint.find(run) == (run, checkpoint.verify(path))
    assert checkpoint.find(str(path))[0] == run.resolve()
    with pytest.raises(CheckpointError, match="neither a run directory"):
        checkpoint.find(tmp_path)
    with pytest.raises(CheckpointError, match="neither a run directory"):
        checkpoint.find(tmp_path / "gone")
    (path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=rf"no whole checkpoint in it .*{WEIGHTS}: missing.*train it first"):
        checkpoint.find(run)


def test_write_atomically_keeps_the_old_file_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    checkpoint.write_atomically(file, b"old")

    def killed(*args: object) -> None:
        raise Killed

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, killed)
            with pytest.raises(Killed):
                checkpoint.write_atomically(file, b"new")
        assert file.read_bytes() == b"old"
    checkpoint.write_atomically(file, b"new")
    assert file.read_bytes() == b"new"


def test_nothing_in_the_library_unpickles() -> None:
    """No file that a user gets from somebody else can run code: no torch.load, no pickle, no eval or exec."""
    forbidden = re.compile(r"torch\.load\b|\bpickle\b.*\bload|\bimport (pickle|dill|cloudpickle|joblib|shelve)\b")
    forbidden_calls = re.compile(r"(?<![\w.])(eval|exec)\(")
    files = [*(launch.ROOT / "mbtrain").rglob("*.py"), *(launch.ROOT / "data_prep").rglob("*.py")]
    assert len(files) > 30
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not forbidden.search(line), f"{file}:{number}"
            assert not forbidden_calls.search(line.replace("def eval(", "")), f"{file}:{number}"
            assert "allow_pickle=True" not in line, f"{file}:{number}"
            assert "yaml.load(" not in line, f"{file}:{number}"
