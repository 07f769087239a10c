"""A run in a few lines: its score beside lossless compressors on the same bytes, its speed, where things are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mbtrain import codecs, config, metrics, tracking
from mbtrain.errors import MbtrainError
from mbtrain.shards import open_split

_CODECS = {
    "gzip": ("gzip -9", "all that it has seen of them as context"),
    "xz": ("xz -9e", "all that it has seen of them as context"),
    "png": ("PNG", "each image by itself, headers included"),
    "webp": ("WebP", "lossless, each image by itself, headers included"),
    "flac": ("FLAC -8", "each segment by itself, headers included"),
}


@dataclass(frozen=True)
class Baseline:
    """One source's validation split: its bytes, the model's score on it, and compressors' (`codecs.baselines`)."""

    name: str
    modality: str
    bytes: int
    bpb: float | None
    codecs: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """Bits per byte of the model on the validation split, the same by source, and the median training rate.

    gzip_bpb and xz_bpb are over all sources: the mean, each weighing as many bytes as it has.
    """

    step: int
    bpb: float
    bytes: int
    gzip_bpb: float
    xz_bpb: float
    bytes_per_s: float
    sources: list[Baseline]


def summarise(run: Path) -> Summary:
    """A run's last whole-split score, its rate, and compressors on the same bytes. Raises MbtrainError unscored."""
    settings = config.load(run / "config.yaml")
    lines = metrics.read(run / "metrics.jsonl")
    scored = [line for line in lines if "val/bpb" in line]
    if not scored:
        raise MbtrainError(f"{run}: no val/bpb yet; a training that reached its end has one: --resume={run}")
    rates = sorted(line["perf/bytes_per_s"] for line in lines if "perf/bytes_per_s" in line)
    paths = config.source_paths(settings)
    sources = []
    for name, path in paths:
        split = open_split(path, settings.data.val_split)
        bpb = scored[-1]["val/bpb"] if len(paths) == 1 else scored[-1].get(f"val/{name}/bpb")
        size = int(split.lengths.sum())
        sources.append(Baseline(name, split.modality, size, bpb, codecs.baselines(split)))
        split.close()
    return Summary(
        step=int(scored[-1]["step"]),
        bpb=scored[-1]["val/bpb"],
        bytes=sum(source.bytes for source in sources),
        gzip_bpb=_mean(sources, "gzip_bpb"),
        xz_bpb=_mean(sources, "xz_bpb"),
        bytes_per_s=rates[len(rates) // 2] if rates else math.nan,
        sources=sources,
    )


def lines_of(run: Path, figures: Summary) -> Iterator[str]:
    """The summary as a person reads it."""
    yield (
        f"validation    {figures.bpb:.4f} bits per byte{_dimensions(figures.sources)} over {figures.bytes} bytes, "
        + (f"after {figures.step} steps")
    )
    for source in figures.sources:
        if len(figures.sources) > 1:
            score = "not scored alone" if source.bpb is None else f"{source.bpb:.4f}{_dimensions([source])}"
            yield f"{source.name:<13} {score}, over {source.bytes} bytes"
        measured = int(source.codecs["bytes"])
        same = "the same bytes" if measured == source.bytes else f"the first {measured} bytes of them"
        for codec, (label, how) in _CODECS.items():
            if f"{codec}_bpb" in source.codecs:
                yield f"  {label:<11} {source.codecs[f'{codec}_bpb']:.4f} on {same}, {how}"
    yield f"speed         {figures.bytes_per_s:.0f} bytes/s in training (median)"
    yield f"run           {run}"
    request = tracking.store(run)
    if request is not None:
        yield f"MLflow store  {request}"
    yield "compare       mbtrain ui     then open http://127.0.0.1:5000"
    try:
        yield f"              this run: {tracking.compare_url([run])}"
    except MbtrainError as error:
        yield f"              {error}"


def _dimensions(sources: list[Baseline]) -> str:
    """Of pictures: a byte is one dimension, so the score is bits per dimension too."""
    return " = bits per dimension" if all(source.modality == "image" for source in sources) else ""


def _mean(sources: list[Baseline], key: str) -> float:
    measured = [source for source in sources if key in source.codecs]
    total = sum(source.bytes for source in measured)
    return sum(source.codecs[key] * source.bytes for source in measured) / total if total else math.nan
