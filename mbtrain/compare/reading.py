"""A run directory -> what is shown of it. What cannot be read is left out and noted; no run alone is refused.

Run directories may come from others: of every file the size, the kind and the types are checked, links that lead out of
the run are not followed, and nothing is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mbtrain import config, metrics, plots
from mbtrain.errors import MbtrainError
from mbtrain.redact import one_line

AXES = ("bytes", "flops", "minutes")

MAX_FILE_BYTES = 1 << 20  # of a configuration, an environment or an evaluation
MAX_SETTINGS = 2000
MAX_SAMPLE_BYTES = {".txt": 8 << 10, ".png": 3 << 20, ".wav": 3 << 20}
MAX_SAMPLES = 2  # of a run
_MAGIC = {".txt": b"", ".png": b"\x89PNG\r\n\x1a\n", ".wav": b"RIFF"}
_MODALITY = {".txt": "text", ".png": "image", ".wav": "audio"}
_PERF = ("perf/bytes_per_s", "perf/mfu", "mem/peak_bytes")
_READ = ("step", "time_unix_s", "train/bpb", *_PERF, *(f"progress/{axis}" for axis in AXES))
_ENDS = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}


@dataclass(frozen=True)
class Points:
    """Bits per byte in the order in which they were written, and what had been spent by then: float64 [n] each.

    costs: by axis of AXES; nan where that is not known.
    """

    bpb: np.ndarray
    costs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Evaluated:
    """What `mbtrain eval` measured: bits per byte with the ends of their interval, nan where there is none."""

    split: str
    mode: str
    bpb: float
    low: float
    high: float


@dataclass(frozen=True)
class Sample:
    """One file of RUN/samples; `content` is None where it is too large to be shown."""

    name: str
    suffix: str
    content: bytes | None


@dataclass(frozen=True)
class Origin:
    """What a run is: kind of model, its stages in words, parameters (None: not known), data, seed, and its end."""

    kind: str
    stages: str
    parameters: int | None
    data: tuple[str, ...]
    modality: str
    dataset_hash: str
    device: str
    status: str


@dataclass(frozen=True)
class Run:
    """One run. train, val (of the whole split) and partial (of its first part) may hold no points.

    perf      medians of perf/bytes_per_s and perf/mfu, and the largest mem/peak_bytes; nan where no line tells them
    settings  the configuration, flat, with dotted keys
    notes     what could not be read, and what is missing
    """

    path: Path
    name: str
    origin: Origin
    train: Points
    val: Points
    partial: Points
    perf: Mapping[str, float]
    evaluated: tuple[Evaluated, ...]
    settings: Mapping[str, str]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]

    @property
    def score(self) -> float:
        """The last whole-split validation; nan without one."""
        return float(self.val.bpb[-1]) if len(self.val.bpb) else math.nan

    def spent(self, axis: str) -> float:
        """The most bytes, FLOPs or minutes that a line tells; nan where none does."""
        costs = [c for points in (self.train, self.val, self.partial) for c in points.costs[axis] if math.isfinite(c)]
        return float(max(costs, default=math.nan))

    @property
    def flops_per_byte(self) -> float:
        """Training FLOPs for each byte trained on, as the run counted both."""
        spent_bytes = self.spent("bytes")
        return self.spent("flops") / spent_bytes if spent_bytes > 0 else math.nan


def find(path: str | Path) -> Path:
    """The run directory that a path (a run directory or a checkpoint in it) names. Raises MbtrainError for no run."""
    folder = Path(path)
    try:
        folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        if any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            return folder
    except OSError:  # a name that no file can have
        pass
    raise MbtrainError(f"{path}: expected a run directory, found neither config.yaml nor metrics.jsonl in it")


def read(folder: Path, name: str) -> Run:
    """What a run directory holds, under the name that it is shown by. Never raises for what is in it."""
    notes: list[str] = []
    tree = _settings(folder, notes)
    environment = _json(folder / "environment.json", notes) or {}
    records = _records(folder, notes)
    costs = _costs(records, tree)
    samples = tuple(_samples(folder, notes))
    train, val = _points(records, costs, "train/bpb"), _points(records, costs, "val/bpb")
    if not len(val.bpb):
        notes.append("no validation of the whole split")
    return Run(
        path=folder,
        name=name,
        origin=_origin(folder, tree, environment, samples, notes),
        train=train,
        val=val,
        partial=_points(records, costs, "val/partial_bpb"),
        perf=_perf(records),
        evaluated=tuple(_evaluated(folder, max((r["step"] for r in records), default=0), notes)),
        settings=dict(_flat(tree)),
        samples=samples,
        notes=tuple(notes),
    )


def number(value: Any) -> float:
    """A number as a float; nan for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _settings(folder: Path, notes: list[str]) -> dict[str, Any]:
    content = _content(folder / "config.yaml", MAX_FILE_BYTES, notes)
    if content is None:
        notes.append("no configuration")
        return {}
    try:
        tree = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        notes.append("config.yaml is damaged")
        return {}
    return tree


def _records(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The numbers of metrics.jsonl that are shown; of very many lines only some, see plots.thinned."""
    path, damaged = folder / "metrics.jsonl", 0

    def whole() -> Iterator[dict[str, Any]]:
        nonlocal damaged
        for record in metrics.salvage(path):
            if record is None:
                damaged += 1
                continue
            yield {key: value if key == "step" else number(value) for key, value in record.items()}

    if not _ours(folder, path):
        notes.append("no metrics")
        return []
    try:
        records = plots.thinned(whole(), _READ)
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read ({error.strerror})")
        return []
    if damaged:
        notes.append(f"{damaged} damaged line{'s' if damaged > 1 else ''} of metrics.jsonl left out")
    if not records:
        notes.append("no metrics")
    return records


def _costs(records: list[dict[str, Any]], tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Bytes, FLOPs and minutes that were spent by each line, float64 [n] each.

    Older runs do not tell all of them: bytes then follow from the step and the batch, minutes from the time of day. A
    validation's line tells no FLOPs: they are those of its bytes.
    """
    steps = np.array([number(record["step"]) for record in records])
    row_bytes = number(_at(tree, "train", "global_batch_size")) * number(_at(tree, "data", "seq_len"))
    if any("progress/bytes" in record for record in records):
        bytes_ = np.array(plots.bytes_seen(records))
    else:
        bytes_ = steps * row_bytes
    told = np.array([record.get("progress/flops", math.nan) for record in records])
    known = np.isfinite(told) & (bytes_ > 0)
    flops = np.full(len(records), math.nan)
    if known.any():
        flops = np.where(known, told, bytes_ * (told[known][-1] / bytes_[known][-1]))
    return {"bytes": bytes_, "flops": flops, "minutes": np.array(plots.minutes_of(records))}


def _points(records: list[dict[str, Any]], costs: Mapping[str, np.ndarray], key: str) -> Points:
    bpb = np.array([record.get(key, math.nan) for record in records])
    there = np.array([key in record for record in records], bool)
    return Points(bpb[there], {axis: costs[axis][there] for axis in AXES})


def _perf(records: list[dict[str, Any]]) -> dict[str, float]:
    out = {}
    for key in _PERF:
        values = [record[key] for record in records if math.isfinite(record.get(key, math.nan))]
        middle = max if key.startswith("mem/") else np.median
        out[key] = float(middle(values)) if values else math.nan
    return out


def _origin(
    folder: Path,
    tree: Mapping[str, Any],
    environment: Mapping[str, Any],
    samples: Iterable[Sample],
    notes: list[str],
) -> Origin:
    stages = _at(tree, "model", "stages")
    stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    older = "megabyte" if len(stages) > 1 else "transformer" if stages else "unknown"  # before there were kinds
    tags = environment.get("tags")
    tags = tags if isinstance(tags, dict) else {}
    sources = environment.get("data")
    sources = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    names = [_word(source.get("name")) for source in sources] or [
        Path(_word(path)).name for path in [_at(tree, "data", "path")] if path
    ]
    modalities = [_word(source.get("modality")) for source in sources] or [_MODALITY[s.suffix] for s in samples]
    parameters = number(_at(environment, "model", "parameters"))
    return Origin(
        kind=_word(_at(tree, "model", "kind")) or older,
        stages=" + ".join(_stage(stage) for stage in stages[:8]),
        parameters=int(parameters) if math.isfinite(parameters) else _counted(folder, notes),
        data=tuple(names),
        modality=" and ".join(dict.fromkeys(modalities)) or "unknown",
        dataset_hash=_word(tags.get("dataset_hash")),
        device=_word(environment.get("device")),
        status=_status(folder, notes),
    )


def _stage(stage: Mapping[str, Any]) -> str:
    """As the training's own log says it: `3x256 every 4 B`."""
    layers, width, patch = (_word(stage.get(key)) or "?" for key in ("n_layers", "d_model", "patch_size"))
    return f"{layers}x{width}" if patch == "1" else f"{layers}x{width} every {patch} B"


def _counted(folder: Path, notes: list[str]) -> int | None:
    """Parameters by formula; None for a configuration that this version does not know."""
    if not (folder / "config.yaml").is_file():
        return None
    try:
        settings = config.load(folder / "config.yaml")
    except (MbtrainError, ValueError, RecursionError):
        notes.append("config.yaml is of another version of mbtrain: shown as it is")
        return None
    from mbtrain.model.flops import count

    try:
        return count(settings).parameters
    except (MbtrainError, ArithmeticError):
        return None


def _status(folder: Path, notes: list[str]) -> str:
    if (folder / "status.json").exists():
        end = (_json(folder / "status.json", notes) or {}).get("status")
        return _ENDS.get(str(end), "unknown")
    return "no end told"


def _evaluated(folder: Path, last_step: int, notes: list[str]) -> Iterator[Evaluated]:
    for path in sorted(folder.glob("eval_*.json"))[:20]:
        told = _json(path, notes) or {}
        bpb = number(told.get("bpb"))
        if not math.isfinite(bpb):
            notes.append(f"{one_line(path.name, 60)} tells no bpb")
            continue
        if number(told.get("step")) < last_step:
            notes.append(f"{one_line(path.name, 60)} is of step {_word(told.get('step'))}, the run of {last_step}")
        low, high = number(told.get("bpb_low")), number(told.get("bpb_high"))
        yield Evaluated(_word(told.get("split")) or "?", _word(told.get("mode")) or "?", bpb, low, high)


def _samples(folder: Path, notes: list[str]) -> Iterator[Sample]:
    """The newest by their steps; among those of one step, the training's own first."""
    try:
        paths = [path for path in (folder / "samples").iterdir() if path.suffix in _MAGIC and path.name[0] != "."]
    except OSError:
        return
    paths = [path for path in paths if _ours(folder, path)]
    paths.sort(key=lambda path: (path.name.partition(".")[0][:15], -len(path.name), path.name), reverse=True)
    for path in paths[:MAX_SAMPLES]:
        content: bytes | None = None
        try:
            if path.stat().st_size <= MAX_SAMPLE_BYTES[path.suffix] or path.suffix == ".txt":
                with path.open("rb") as file:
                    content = file.read(MAX_SAMPLE_BYTES[path.suffix])
        except OSError:
            continue
        if content is not None and not content.startswith(_MAGIC[path.suffix]):
            notes.append(f"samples/{one_line(path.name, 60)} is no {path.suffix} file")
            continue
        yield Sample(path.name, path.suffix, content)


def _flat(value: Any, prefix: str = "", budget: list[int] | None = None) -> Iterator[tuple[str, str]]:
    """Leaves with dotted keys, as the command line takes them; at most so many, for YAML can refer to itself."""
    budget = [MAX_SETTINGS] if budget is None else budget
    if isinstance(value, dict) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        if prefix and budget[0] > 0:
            budget[0] -= 1
            yield prefix, _leaf(value)
        return
    budget[0] -= 1
    for key, item in items:
        if budget[0] <= 0 or prefix.count(".") > 20:
            return
        yield from _flat(item, f"{prefix}.{_word(key)}" if prefix else _word(key), budget)


def _leaf(value: Any) -> str:
    if isinstance(value, str):
        return one_line(value, 200)
    try:  # piece by piece: a list may hold itself, or the same list a billion times
        return one_line("".join(islice(json.JSONEncoder(default=str).iterencode(value), 200)), 200)
    except (ValueError, RecursionError, TypeError):
        return "?"


def _at(tree: Mapping[str, Any], section: str, key: str) -> Any:
    inner = tree.get(section)
    return inner.get(key) if isinstance(inner, dict) else None


def _word(value: Any) -> str:
    """A short text or number as one line; nothing for anything else."""
    return one_line(str(value), 100) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _ours(folder: Path, path: Path) -> bool:
    """Whether it is a plain file of the run: a link may name any file of this user's."""
    try:
        return path.is_file() and path.resolve().is_relative_to(folder.resolve())
    except OSError:
        return False


def _content(path: Path, limit: int, notes: list[str]) -> bytes | None:
    """A small file of the run; None where it is not there or too large, the latter with a note."""
    if not _ours(path.parent, path):
        return None
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror})")
        return None
    if len(content) > limit:
        notes.append(f"{path.name} is too large to be looked at")
        return None
    return content


def _json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    content = _content(path, MAX_FILE_BYTES, notes)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{one_line(path.name, 60)} is damaged")
        return None
    return value
