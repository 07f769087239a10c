"""What a checkpoint is on disk: whole, hashed and named last, or it does not count. No pickle.

    RUN/checkpoints/step_0000001000/
        weights-00000-of-00002.safetensors     fp32 weights by parameter name
        moments-00000-of-00002.safetensors     "exp_avg.<name>", "exp_avg_sq.<name>"
        checkpoint.json                        step, position, counts, MLflow run, and sha256 of each file: written last

Parameters are whole, dealt to the ranks' files in turn; so any number of ranks, ZeRO stage or precision can read them.
The folder is written under another name and renamed when every file is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbtrain.errors import CheckpointError
from mbtrain.shards import file_sha256, sync_folder, whole_file

FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the weights and moments, all that going on needs.

    step             optimizer steps done
    position         next id of the training stream
    bytes            real bytes trained on (boundaries not counted)
    elapsed_s        time spent training, over all parts of the run
    optimizer_steps  updates that AdamW made
    source_bytes     real bytes trained on of each source, in the configuration's order
    loss_scaler      fp16's dynamic scale; empty otherwise
    """

    step: int = 0
    position: int = 0
    bytes: int = 0
    elapsed_s: float = 0.0
    optimizer_steps: int = 0
    dataset_hash: str = ""
    mlflow_run_id: str | None = None
    source_bytes: list[int] = field(default_factory=list)
    loss_scaler: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    progress: Progress
    files: tuple[str, ...]


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step_{step:010d}"


def share(state: Iterator[tuple[str, dict[str, Tensor]]], rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    """This rank's share of the parameters, by file.

    The iterator is collective, so every rank runs through all of it and keeps every ranks-th parameter.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for i, (name, whole) in enumerate(state):
        if i % ranks == rank:
            # A copy: what the engine gives may be its live weights, and two names may not share memory here.
            weights[name] = whole["weight"].clone(memory_format=torch.contiguous_format)
            for key in ("exp_avg", "exp_avg_sq"):
                moments[f"{key}.{name}"] = whole[key].clone(memory_format=torch.contiguous_format)
    return {"weights": weights, "moments": moments}


def write_share(folder: Path, mine: dict[str, dict[str, Tensor]], rank: int, ranks: int) -> dict[str, str]:
    """Write what `share` gave into `folder`; returns sha256 by file name. Raises OSError."""
    part = f"{rank:05d}-of-{ranks:05d}.safetensors"
    return {f"{kind}-{part}": _write_tensors(folder / f"{kind}-{part}", tensors) for kind, tensors in mine.items()}


def begin(run: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into; call on one rank."""
    folder = run / "checkpoints" / f".{name_of(step)}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish(folder: Path, progress: Progress, hashes: dict[str, str], keep_last: int) -> Path:
    """Name a folder whose files are all written; removes checkpoints beyond keep_last. Call on one rank."""
    record = {"format": FORMAT, "progress": asdict(progress), "sha256": hashes}
    record["self"] = _record_hash(record)
    write_atomically(folder / "checkpoint.json", json.dumps(record, indent=1).encode())
    final = folder.parent / name_of(progress.step)
    if final.exists():  # the same step saved again
        os.replace(final, folder.parent / f".{final.name}.old.tmp")
    os.replace(folder, final)
    sync_folder(final.parent)
    # Newer ones stand there only if they are damaged (this step was reached again); they must not push this one out.
    for old in [path for path in _candidates(final.parent) if path.name <= final.name][keep_last:]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in final.parent.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def verify(path: Path) -> Checkpoint:
    """Read a checkpoint's record and compare every file with its hash. Raises CheckpointError naming the file."""
    record_path = path / "checkpoint.json"
    try:
        record: dict[str, Any] = json.loads(record_path.read_bytes())
        if record["format"] != FORMAT:
            raise CheckpointError(f"{record_path}: format {record['format']}, this version reads {FORMAT}")
        if record.pop("self") != _record_hash(record):
            raise CheckpointError(f"{record_path}: its content is not what was written (its own hash differs)")
        progress = Progress(**record["progress"])
        hashes: dict[str, str] = dict(record["sha256"])
    except OSError as error:
        raise CheckpointError(f"{record_path}: {error.strerror}; this is not a whole checkpoint") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{record_path}: damaged ({error})") from error
    for name, expected in hashes.items():
        file = path / name
        if Path(name).name != name:
            raise CheckpointError(f"{record_path}: {name!r} is no plain file name")
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        try:
            found = file_sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
        if found != expected:
            raise CheckpointError(f"{file}: its content is not what was written (sha256 differs)")
    return Checkpoint(path, progress, tuple(hashes))


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that verifies, and what was wrong with the newer ones."""
    problems: list[str] = []
    for path in _candidates(run / "checkpoints"):
        try:
            return verify(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def find(path: str | Path) -> tuple[Path, Checkpoint]:
    """(run directory, checkpoint) of a run directory or of a checkpoint in it. Raises CheckpointError."""
    path = Path(path)
    if (path / "checkpoint.json").exists():
        return path.resolve().parent.parent, verify(path)
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"{path}: neither a run directory (no config.yaml) nor a checkpoint in one")
    found, problems = newest(path)
    if found is None:
        said = f" ({'; '.join(problems)})" if problems else ""
        raise CheckpointError(
            f"{path}: no whole checkpoint in it{said}; train it first: mbtrain train CONFIG --run={path}"
        )
    return path, found


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """fp32 weights by parameter name."""
    return _load(checkpoint, "weights-")


def load_state(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """By parameter name: {"weight", "exp_avg", "exp_avg_sq"}, fp32."""
    state = {name: {"weight": weight} for name, weight in load_weights(checkpoint).items()}
    for key, value in _load(checkpoint, "moments-").items():
        moment, name = key.split(".", 1)
        state[name][moment] = value
    return state


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for half of it."""
    with whole_file(path) as out:
        out.write(content)


def _record_hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    from safetensors.torch import save

    content = save(tensors)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _load(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for name in checkpoint.files:
        if name.startswith(prefix):
            tensors |= load_file(checkpoint.path / name)
    return tensors


def _candidates(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{10}", p.name)), reverse=True)
