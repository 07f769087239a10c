"""A run in a few lines: its score beside general compressors on the same bytes, its speed, where things are."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mbtrain import config, metrics, tracking
from mbtrain.errors import MbtrainError
from mbtrain.shards import open_split


@dataclass(frozen=True)
class Summary:
    """Bits per byte of the model and of compressors on the validation split; the median training rate."""

    step: int
    bpb: float
    bytes: int
    gzip_bpb: float
    xz_bpb: float
    bytes_per_s: float


def summarise(run: Path) -> Summary:
    """A run's last whole-split score, its rate, and compressors on the same bytes. Raises MbtrainError unscored."""
    settings = config.load(run / "config.yaml")
    lines = metrics.read(run / "metrics.jsonl")
    scored = [line for line in lines if "val/bpb" in line]
    if not scored:
        raise MbtrainError(f"{run}: no val/bpb yet; a training that reached its end has one: --resume={run}")
    rates = sorted(line["perf/bytes_per_s"] for line in lines if "perf/bytes_per_s" in line)
    split = open_split(settings.data.path, settings.data.val_split)
    content = b"".join(split.read(i) for i in range(len(split)))
    return Summary(
        step=int(scored[-1]["step"]),
        bpb=scored[-1]["val/bpb"],
        bytes=len(content),
        gzip_bpb=8 * len(gzip.compress(content, 9)) / len(content),
        xz_bpb=8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content),
        bytes_per_s=rates[len(rates) // 2] if rates else float("nan"),
    )


def lines_of(run: Path, figures: Summary) -> Iterator[str]:
    """The summary as a person reads it."""
    yield f"validation    {figures.bpb:.4f} bits per byte over {figures.bytes} bytes, after {figures.step} steps"
    yield f"  gzip -9     {figures.gzip_bpb:.4f} on the same bytes"
    yield f"  xz -9e      {figures.xz_bpb:.4f} on the same bytes, with all that it has seen of them as context"
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
