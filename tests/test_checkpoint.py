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
from safetensors.torch import load_file
from torch import Tensor

from mbtrain import checkpoint, config
from mbtrain.checkpoint import Fragment, Progress, name_of
from mbtrain.config import Config
from mbtrain.errors import CheckpointError
from mbtrain.model import Model, build
from tests import launch, tiny


def state_of(model: Model) -> dict[str, dict[str, Tensor]]:
    """Whole weights and moments by name."""
    return {
        name: {"weight": weight, "exp_avg": weight * 2, "exp_avg_sq": weight.square()}
        for name, weight in model.state_dict().items()
    }


def fragments_of(state: dict[str, dict[str, Tensor]], rank: int, ranks: int) -> Iterator[Fragment]:
    """What a rank's engine gives: its stretch of all parameters in a row, as ZeRO cuts them."""
    everything = sum(whole["weight"].numel() for whole in state.values())
    first, end = everything * rank // ranks, everything * (rank + 1) // ranks
    at = 0
    for name, whole in state.items():
        numel = whole["weight"].numel()
        mine = slice(max(first - at, 0), max(min(end - at, numel), 0))
        if mine.start < mine.stop:
            yield Fragment(name, mine.start, {kind: value.reshape(-1)[mine] for kind, value in whole.items()})
        at += numel


def write(
    run: Path,
    model: Model,
    progress: Progress,
    ranks: int = 1,
    keep_last: int = 10,
    keep_every_steps: int | None = None,
) -> Path:
    """A checkpoint as so many ranks write it, in a run that has just been taken up."""
    checkpoint.clear(run)
    folder = checkpoint.begin(run, progress.step)
    state = state_of(model)
    hashes: dict[str, str] = {}
    for rank in range(ranks):
        mine: checkpoint.Share = {}
        checkpoint.snapshot(fragments_of(state, rank, ranks), mine)
        hashes |= checkpoint.write_share(folder, mine, rank, ranks)
    shapes = {name: list(whole["weight"].shape) for name, whole in state.items()}
    path = checkpoint.finish(folder, progress, shapes, hashes, keep_last, keep_every_steps)
    checkpoint.sweep(run)
    return path


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
def test_what_was_written_is_read_back_from_any_number_of_files(tmp_path: Path, model: Model, ranks: int) -> None:
    progress = Progress(
        step=7,
        position=2**40,
        bytes=9,
        elapsed_s=1.5,
        optimizer_steps=6,
        mlflow_run_id="x",
        loss_scaler={"a": 2.0},
        rows_digest=2**64 - 1,
        recent_losses=[0.1, 5.0],
        bad_steps=[3],
    )
    path = write(tmp_path, model, progress, ranks)
    found = checkpoint.verify(path)
    assert found.progress == progress
    assert len(found.files) == 2 * ranks
    stored, expected = checkpoint.Stored(found), state_of(model)
    assert stored.shapes.keys() == expected.keys() == checkpoint.load_weights(found).keys()
    for name, whole in expected.items():
        for kind, value in whole.items():
            assert torch.equal(stored.whole(kind, name), value)
        if name.endswith("qkv.weight"):  # across the files' borders, and nothing at all
            assert torch.equal(stored.part("exp_avg", name, 3, 1000), whole["exp_avg"].reshape(-1)[3:1003])
            assert stored.part("exp_avg", name, 3, 0).numel() == 0


def test_the_files_are_what_safetensors_reads(tmp_path: Path, model: Model) -> None:
    """We write them ourselves; the library is the judge."""
    path = write(tmp_path, model, Progress(step=1), ranks=2)
    read = {}
    for file in sorted(path.glob("weights-*")):
        read |= load_file(file)
    for name, whole in state_of(model).items():
        pieces = sorted(
            (int(key.rpartition("@")[2]), value) for key, value in read.items() if key.startswith(f"{name}@")
        )
        assert torch.equal(torch.cat([value for _, value in pieces]).view(whole["weight"].shape), whole["weight"])


def test_snapshots_use_their_memory_again_and_hold_what_was_then(model: Model) -> None:
    state = state_of(model)
    mine: checkpoint.Share = {}
    checkpoint.snapshot(fragments_of(state, 0, 1), mine)
    where = {key: tensor.data_ptr() for key, tensor in mine["weights"].items()}
    before = {key: tensor.clone() for key, tensor in mine["weights"].items()}
    with torch.no_grad():
        for whole in state.values():
            whole["weight"] += 1
    assert all(torch.equal(mine["weights"][key], value) for key, value in before.items())
    checkpoint.snapshot(fragments_of(state, 0, 1), mine)
    assert {key: tensor.data_ptr() for key, tensor in mine["weights"].items()} == where
    assert all(torch.equal(mine["weights"][key], value + 1) for key, value in before.items())


@pytest.mark.parametrize("change", ["missing", "twice", "shifted"])
def test_stretches_that_do_not_make_a_parameter_whole_are_refused(tmp_path: Path, model: Model, change: str) -> None:
    """Though every file is as it was written: one rank wrote too little, too much, or to another place."""
    state = state_of(model)
    mine: checkpoint.Share = {}
    checkpoint.snapshot(fragments_of(state, 0, 1), mine)
    key = next(iter(mine["weights"]))
    tensor = mine["weights"].pop(key)
    if change == "twice":
        mine["weights"] |= {key: tensor, f"{key}1": tensor[1:]}
    if change == "shifted":
        mine["weights"][f"{key}1"] = tensor
    folder = checkpoint.begin(tmp_path, 1)
    shapes = {name: list(whole["weight"].shape) for name, whole in state.items()}
    found = checkpoint.verify(
        checkpoint.finish(folder, Progress(step=1), shapes, checkpoint.write_share(folder, mine, 0, 1), 1)
    )
    with pytest.raises(
        CheckpointError, match=re.escape(f"its stretches of weight {key.partition('@')[0]} do not make")
    ):
        checkpoint.Stored(found)


def test_a_checkpoint_of_another_model_is_refused_by_name_and_shape(tmp_path: Path, model: Model) -> None:
    found = checkpoint.verify(write(tmp_path, model, Progress(step=1)))
    shapes = {name: list(shape) for name, shape in found.shapes.items()}
    checkpoint.must_fit(found, shapes)
    name = next(iter(shapes))
    with pytest.raises(CheckpointError, match=f"{name}: got .*, expected 7x7"):
        checkpoint.must_fit(found, {**shapes, name: [7, 7]})
    with pytest.raises(CheckpointError, match="another: got nothing, expected 3"):
        checkpoint.must_fit(found, {**shapes, "another": [3]})
    del shapes[name]
    with pytest.raises(CheckpointError, match=f"{name}: got .*, expected nothing"):
        checkpoint.must_fit(found, shapes)


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


def test_those_of_every_so_many_steps_stay_for_good(tmp_path: Path, model: Model) -> None:
    for step in range(2, 15, 2):
        write(tmp_path, model, Progress(step=step), keep_last=2, keep_every_steps=4)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [name_of(n) for n in (4, 8, 12, 14)]


def test_what_a_link_points_to_is_never_removed(tmp_path: Path, model: Model) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    run = tmp_path / "run"
    write(run, model, Progress(step=2))
    for name in (f".{name_of(4)}.tmp", f".{name_of(2)}.old"):
        (run / "checkpoints" / name).symlink_to(precious)
    write(run, model, Progress(step=4), keep_last=1)
    assert (precious / "file").read_text() == "x"
    assert [p.name for p in (run / "checkpoints").iterdir()] == [name_of(4)]


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
    "another format": (lambda p: record(p, format=1), "format 1, this version reads 2"),
    "another format with other fields": (lambda p: record(p, format=9, progress={"x": 1}), "format 9, this version"),
    "no shapes": (lambda p: record(p, shapes=None), "checkpoint.json: damaged"),
    "shapes of words": (lambda p: record(p, shapes={"a": ["b"]}), "checkpoint.json: damaged"),
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
