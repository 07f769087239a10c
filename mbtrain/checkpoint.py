"""What a checkpoint is on disk: whole, hashed and named last, or it does not count. No pickle.

    RUN/checkpoints/step_0000001000/
        weights-00000-of-00002.safetensors     fp32, "<name>@<start>": a stretch of a parameter, flat, from that element
        moments-00000-of-00002.safetensors     "exp_avg.<name>@<start>", "exp_avg_sq.<name>@<start>", or what else the
                                               optimizer keeps; "trained.<name>@<start>" where it evaluates averages
        checkpoint.json                        step, position, counts, MLflow run, shapes, sha256 of each file; last

Each rank writes what it owns under ZeRO; a reader takes any stretch of any parameter from all files together. So any
number of ranks, ZeRO stage or precision can read them. The folder is written under another name and renamed when every
file is on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbtrain.errors import CheckpointError
from mbtrain.shards import file_sha256, sync_folder, whole_file

FORMAT = 2
WEIGHT = "weight"  # what is evaluated, sampled from and exported
TRAINED = "trained"  # the weights that training goes on from, where those evaluated are averages
KINDS = (WEIGHT, "exp_avg", "exp_avg_sq")  # of AdamW
PIECE_BYTES = 1 << 24  # hashed and written at a time


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the weights and moments, all that going on needs.

    step             optimizer steps done, those without an update included
    position         next id of the training stream
    bytes            real bytes trained on (boundaries not counted)
    elapsed_s        time spent training, over all parts of the run
    optimizer_steps  updates that the optimizer made
    optimizer        what it keeps once, not of each element: schedule_free's sums
    source_bytes     real bytes trained on of each source, in the configuration's order
    loss_scaler      fp16's dynamic scale; empty otherwise
    rows_digest      sum, modulo 2**64, of a hash of each row read so far and its number: whatever the ranks and
                     batches, runs with the same sum have read the same rows, each as often
    recent_losses    the last good losses, nats a target, where spikes are looked for
    bad_steps        the last steps that were not finite or spiked
    noise            with log.noise_scale: the squared gradient and its noise, smoothed (noise_scale.py)
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
    rows_digest: int = 0
    recent_losses: list[float] = field(default_factory=list)
    bad_steps: list[int] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    optimizer: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: where it is, its progress, its files, and each parameter's shape."""

    path: Path
    progress: Progress
    files: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]


class Fragment(NamedTuple):
    """A stretch of one parameter, from element `start` on: by kind (weight, exp_avg, ...) flat fp32 tensors."""

    name: str
    start: int
    tensors: dict[str, Tensor]


Share = dict[str, dict[str, Tensor]]  # by file ("weights", "moments"), then by name in it


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step_{step:010d}"


def snapshot(fragments: Iterable[Fragment], into: Share) -> None:
    """Copy a rank's fragments to host memory; `into`, empty or of an earlier call, is filled and its memory used."""
    for name, start, tensors in fragments:
        for kind, tensor in tensors.items():
            file = into.setdefault("weights" if kind == "weight" else "moments", {})
            key = f"{name}@{start}" if kind == "weight" else f"{kind}.{name}@{start}"
            if key not in file:
                file[key] = torch.empty(tensor.shape, dtype=torch.float32)
            file[key].copy_(tensor)


def write_share(folder: Path, mine: Share, rank: int, ranks: int) -> dict[str, str]:
    """Write a rank's snapshot into `folder`; returns sha256 by file name. Raises OSError."""
    part = f"{rank:05d}-of-{ranks:05d}.safetensors"
    return {f"{kind}-{part}": _write_tensors(folder / f"{kind}-{part}", tensors) for kind, tensors in mine.items()}


def begin(run: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into; call on one rank."""
    folder = run / "checkpoints" / f".{name_of(step)}.tmp"
    remove(folder)
    folder.mkdir(parents=True)
    return folder


def finish(
    folder: Path,
    progress: Progress,
    shapes: Mapping[str, list[int]],
    hashes: Mapping[str, str],
    keep_last: int,
    keep_every_steps: int | None = None,
) -> Path:
    """Name a folder whose files are all written, and take their names from checkpoints that are not to be kept.

    Call on one rank; `sweep` then frees the space.
    """
    record = {"format": FORMAT, "progress": asdict(progress), "shapes": dict(shapes), "sha256": dict(hashes)}
    record["self"] = _record_hash(record)
    write_atomically(folder / "checkpoint.json", json.dumps(record, indent=1).encode())
    final = folder.parent / name_of(progress.step)
    if final.exists():  # the same step saved again
        _retire(final)
    os.replace(folder, final)
    sync_folder(final.parent)
    retire_older(final, keep_last, keep_every_steps)
    return final


def retire_older(newest_: Path, keep_last: int, keep_every_steps: int | None = None) -> None:
    """Take their names from checkpoints that are not to be kept beside this one, the newest that is whole."""
    # Newer ones stand there only if they are damaged (this step was reached again); they must not push this one out.
    for old in [path for path in _candidates(newest_.parent) if path.name <= newest_.name][keep_last:]:
        if not keep_every_steps or int(old.name.removeprefix("step_")) % keep_every_steps:
            _retire(old)


def sweep(run: Path) -> None:
    """Remove what has lost its name: replaced and outdated checkpoints."""
    for leftover in (run / "checkpoints").glob(".step_*.old"):
        remove(leftover)


def remove(folder: Path) -> None:
    """Remove a folder that has no final name, if it is there; never what a link points to."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def clear(run: Path) -> None:
    """Remove what a process that died left half written: in the run's folders, everything without a final name."""
    for leftover in (run / "checkpoints").glob(".step_*"):
        remove(leftover)
    for folder in (run, run / "samples", run / "plots"):
        for file in folder.glob(".*.tmp"):
            if file.is_file():  # a folder may be an export at work
                file.unlink(missing_ok=True)


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
        _must_be_of_their_kinds(progress)
        hashes: dict[str, str] = dict(record["sha256"])
        shapes = {name: tuple(int(n) for n in shape) for name, shape in record["shapes"].items()}
    except OSError as error:
        raise CheckpointError(f"{record_path}: {error.strerror}; this is not a whole checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    return Checkpoint(path, progress, tuple(hashes), shapes)


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


class Stored:
    """The state in a checkpoint's files, read stretch by stretch; nothing is held but maps of the files.

    Raises CheckpointError when the stretches of a parameter do not make it whole.
    """

    def __init__(self, checkpoint: Checkpoint):
        from safetensors import SafetensorError, safe_open

        self.path, self.shapes = checkpoint.path, checkpoint.shapes
        # By (kind, name): start, end, the open file, and the tensor's name in it; in order.
        self._stretches: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        try:
            for file_name in checkpoint.files:
                file = safe_open(checkpoint.path / file_name, framework="pt")
                weights = file_name.startswith("weights-")
                for key in file.keys():  # noqa: SIM118
                    kind, full = ("weight", key) if weights else key.split(".", 1)
                    name, _, start = full.rpartition("@")
                    (numel,) = file.get_slice(key).get_shape()
                    self._stretches.setdefault((kind, name), []).append((int(start), int(start) + numel, file, key))
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(f"{self.path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
        for name in self.shapes:
            self._stretches.setdefault((WEIGHT, name), [])  # which must be there; the rest is up to must_hold
        for (kind, name), stretches in self._stretches.items():
            shape = self.shapes.get(name, ())
            stretches.sort(key=lambda stretch: stretch[:2])
            ends = [0, *(end for _, end, _, _ in stretches)]
            if [start for start, *_ in stretches] != ends[:-1] or ends[-1] != math.prod(shape):
                raise CheckpointError(f"{self.path}: its stretches of {kind} {name} do not make {list(shape)}")

    @property
    def averages(self) -> bool:
        """Whether weights were evaluated that are averages, beside those that were trained."""
        return any(kind == TRAINED for kind, _ in self._stretches)

    def must_hold(self, kinds: Mapping[str, tuple[str, ...]], optimizer: str) -> None:
        """Raise CheckpointError where the state of a parameter is not by these kinds, those of this optimizer."""
        held: dict[str, list[str]] = {}
        for kind, name in self._stretches:
            if kind != WEIGHT:
                held.setdefault(name, []).append(kind)
        for name, expected in kinds.items():
            got = sorted(held.get(name, []))
            if got != sorted(expected):
                raise CheckpointError(
                    f"{self.path}: is another optimizer's: of {name} it has {', '.join(got) or 'nothing'}, expected "
                    f"{', '.join(expected)} for optim.name={optimizer}; go on with its own, or begin another run"
                )

    def part(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start .. start + numel of what is kept of a parameter under this kind, flat, fp32."""
        pieces = [
            file.get_slice(key)[max(start - first, 0) : min(start + numel, end) - first]
            for first, end, file, key in self._stretches[kind, name]
            if first < start + numel and start < end
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0), *pieces])

    def whole(self, kind: str, name: str) -> Tensor:
        """All of what is kept of a parameter under this kind, in its shape, fp32."""
        shape = self.shapes[name]
        return self.part(kind, name, 0, math.prod(shape)).view(shape)


def load_weights(checkpoint: Checkpoint, last: bool = False) -> dict[str, Tensor]:
    """fp32 weights by parameter name: those that are evaluated; last: those trained, where the others are averages."""
    stored = Stored(checkpoint)
    kind = TRAINED if last and stored.averages else WEIGHT
    return {name: stored.whole(kind, name) for name in checkpoint.shapes}


def must_fit(checkpoint: Checkpoint, shapes: Mapping[str, list[int]]) -> None:
    """Raise CheckpointError where a checkpoint's parameters are not those of a model, given by name and shape."""
    for name in {**checkpoint.shapes, **shapes}:
        there, here = checkpoint.shapes.get(name), shapes.get(name)
        if there is None or here is None or list(there) != list(here):
            got, expected = (
                "nothing" if shape is None else "x".join(map(str, shape)) or "a number" for shape in (there, here)
            )
            raise CheckpointError(f"{checkpoint.path}: does not fit the model: {name}: got {got}, expected {expected}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for half of it."""
    with whole_file(path) as out:
        out.write(content)


def _must_be_of_their_kinds(progress: Progress) -> None:
    """Raise TypeError for a value that is of another type than its default."""
    for key, default in asdict(Progress()).items():
        kinds = {float: (float, int), type(None): (str, type(None))}.get(type(default), (type(default),))
        if type(getattr(progress, key)) not in kinds:
            raise TypeError(f"{key}: got {getattr(progress, key)!r}")


def _record_hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _retire(folder: Path) -> None:
    """Take the name from a checkpoint: from now on it does not count, wherever its removal may be cut off."""
    gone = folder.with_name(f".{folder.name}.old")
    remove(gone)
    os.replace(folder, gone)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and return its sha256, piece by piece: another thread's steps go on meanwhile.

    (safetensors' own writer holds the interpreter while it copies everything into one string.)
    """
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * 4
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    opening = json.dumps(header).encode()
    opening += b" " * (-len(opening) % 8)
    digest = hashlib.sha256()
    content: Any
    with path.open("wb") as file:
        for content in (len(opening).to_bytes(8, "little") + opening, *(t.numpy() for t in tensors.values())):
            view = memoryview(content).cast("B")
            for first in range(0, len(view), PIECE_BYTES):
                piece = view[first : first + PIECE_BYTES]
                digest.update(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _candidates(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{10}", p.name)), reverse=True)
