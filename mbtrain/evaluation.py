"""`mbtrain eval`: a run's score with its interval, words, and where its bits come from; alone or on many ranks.

The sums are evaluate.py's; here they become what a person reads, a picture and RUN/eval_<split>_<mode>.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mbtrain import checkpoint, config, intervals, plots
from mbtrain.agreement import joined, on_all_ranks
from mbtrain.config import Config, SourceConfig
from mbtrain.data.opening import Opened, open_sources
from mbtrain.data.words import count_words
from mbtrain.engine import Ranks, total
from mbtrain.evaluate import Details, Score, loaded, names_of, score
from mbtrain.model.sparing import scoring, spare
from mbtrain.modes import must_allow, must_keep_frames, must_resemble

FEW_DOCUMENTS = 20  # whose interval is known to be too narrow


@dataclass(frozen=True)
class _Asked:
    """A run and a split of it, open: what is to be scored, and by what."""

    run: Path
    settings: Config
    sources: list[Opened]
    logits_of: Callable[[Tensor], Tensor]
    step: int
    precision: str
    averages: bool


def evaluate_run(
    path: str | Path,
    *,
    split: str = "val",
    mode: str = "basic",
    data: str | None = None,
    batch: int = 8,
    limit_bytes: int | None = None,
    precision: str = "as-trained",
    last: bool = False,
) -> dict[str, Any]:
    """Score a run, alone or as one of the ranks of a launcher, and draw RUN/plots/eval_<split>_<mode>.png.

    precision: as-trained computes as the training's own validation does; or fp32, bf16, autocast. last: by the weights
    that were trained, where the run also keeps averages of them (optim.ema, schedule_free), which are scored else.
    Returns, on every rank,
      bpb, nats, bytes, split, mode, step, precision
      weights              averaged or last
      by_source            {name: bits per byte}
      bpb_low, bpb_high    95 % interval by bootstrap over documents (samples); None where there is one document alone
      by_source_interval   {name: [low, high] or None}
      documents            of which anything was scored
      words, word_perplexity    of text: runs of bytes that are no white space, and exp(nats / words), with the nats of
                           all text, its white space and boundaries too. None without words; the second also where it
                           is too large for a float
      by_position          [{"position", "bytes", "bpb"}] by t mod P in the model's patches; None where these are not
                           at fixed places
      by_depth             [{"from", "to", "bytes", "bpb"}] by the number of ids before it in its window, in octaves
      plot                 the picture's path; None where it could not be written
      bits_per_dimension   of images: bpb by the name that it has there
    Raises ConfigError for what this run cannot be asked, DataError for unknown splits, CheckpointError for a run that
    is not whole.
    """
    with joined() as ranks:

        def together(make: Callable[[], Any]) -> Any:
            return make() if ranks.ranks == 1 else on_all_ranks(make)

        def summed(values: list[float]) -> list[float]:
            return values if ranks.ranks == 1 else total(values, ranks)

        opened = together(lambda: _opened(path, split, mode, data, precision, last, ranks.device))
        settings, sources = opened.settings, opened.sources
        result: Score = together(
            lambda: score(
                opened.logits_of,
                sources,
                seq_len=settings.data.seq_len,
                batch=batch,
                device=ranks.device,
                rank=ranks.rank,
                ranks=ranks.ranks,
                reduce=summed,
                limit_bytes=limit_bytes,
                mode=mode,
                patch_size=settings.model.stages[0].patch_size,
                details=True,
            )
        )
        counted = together(lambda: _words(sources, result, ranks))
        words = int(sum(summed([float(counted)])))
        figures = {
            "bpb": result.bpb,
            "nats": result.nats,
            "bytes": result.bytes,
            "split": split,
            "mode": mode,
            "step": opened.step,
            "precision": opened.precision,
            "weights": "averaged" if opened.averages and not last else "last",
            "by_source": {name: n / math.log(2) / b for name, (n, b) in result.by_source.items()},
            **_intervals(sources, result),
            "words": words or None,
            "word_perplexity": _perplexity(sources, result, words),
            "by_position": _by_position(settings, result),
            "by_depth": _by_depth(result),
            # The same number by the name it has for images: a dimension is a byte.
            **({"bits_per_dimension": result.bpb} if all(s.split.modality == "image" for s in sources) else {}),
        }
        drawn = None
        if ranks.rank == 0:
            newest = Path(path).resolve() == opened.run.resolve() and not (last and opened.averages)
            drawn = _written(opened.run, figures, data, limit_bytes is not None, newest)
        return {**figures, "plot": drawn}


def lines_of(figures: Mapping[str, Any], *, partly: bool) -> Iterator[str]:
    """What evaluate_run found, as a person reads it; partly: not the whole split."""
    unit = "bits per byte" + (" (= bits per dimension)" if "bits_per_dimension" in figures else "")
    part = f"{'first part of ' if partly else ''}{figures['split']}"
    how = f"step {figures['step']}, {figures['mode']}{_by_which(figures)}"
    yield f"{part}: {figures['bpb']:.6f} {unit} over {figures['bytes']} bytes ({how})"
    if figures["bpb_low"] is None:
        yield "  no interval: it takes two documents, and this is one"
    else:
        ends = f"{figures['bpb_low']:.4f} to {figures['bpb_high']:.4f}"
        few = "; so few say little" if figures["documents"] < FEW_DOCUMENTS else ""
        yield f"  95 % interval {ends}, by bootstrap over {figures['documents']} documents{few}"
    for source, bpb in figures["by_source"].items() if len(figures["by_source"]) > 1 else ():
        interval = figures["by_source_interval"][source]
        yield f"  {source}: {bpb:.6f}" + ("" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})")
    if figures["words"]:
        perplexity = figures["word_perplexity"]
        yield f"  {figures['words']} words, perplexity {'too large' if perplexity is None else f'{perplexity:.6g}'}"
    if figures["plot"]:
        yield f"  by position and depth of context: {figures['plot']}"


def _by_which(figures: Mapping[str, Any]) -> str:
    return ", averaged weights" if figures["weights"] == "averaged" else ""


def _opened(
    path: str | Path, split: str, mode: str, data: str | None, precision: str, last: bool, device: torch.device
) -> _Asked:
    run, found = checkpoint.find(path)
    settings = config.load(run / "config.yaml")
    must_allow(settings, mode)
    if data is not None:
        must_resemble(run, settings, data)
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"path": data, "sources": ()})})
    sources = open_sources(settings, split, seed=None)
    must_keep_frames(settings, sources, mode)
    model = loaded(run, settings, found, device, last)
    spare(model, settings)
    if precision == "as-trained":
        stage0 = settings.train.precision == "bf16" and settings.train.zero_stage == 0
        precision = "autocast" if stage0 else settings.train.precision
    if precision in ("bf16", "fp16"):
        model = model.to(torch.bfloat16 if precision == "bf16" else torch.float16)

    def logits_of(ids: Tensor) -> Tensor:
        with scoring(model, settings), torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
            out: Tensor = model(ids)
            return out

    return _Asked(run, settings, sources, logits_of, found.progress.step, precision, checkpoint.Stored(found).averages)


def _each(sources: Sequence[Opened], details: Details) -> Iterator[tuple[Opened, np.ndarray]]:
    """Each source with its part of details.documents."""
    ends = np.cumsum([len(source.split) for source in sources])
    yield from zip(sources, np.split(details.documents, ends[:-1], axis=1), strict=True)


def _place(where: dict[str, int], nats_: float, bytes_: float) -> dict[str, Any]:
    """What was scored at a place: its real bytes, and bits per byte, None without any."""
    return {**where, "bytes": int(bytes_), "bpb": nats_ / math.log(2) / bytes_ if bytes_ else None}


def _intervals(sources: Sequence[Opened], result: Score) -> dict[str, Any]:
    assert result.details is not None
    nats_, bytes_ = result.details.documents
    if len(sources) > 1:
        of = np.repeat(np.arange(len(sources)), [len(source.split) for source in sources])
    else:
        of = sources[0].split.source_index
    apart = {name: of == i for i, name in enumerate(names_of(sources)) if name in result.by_source}
    low, high = intervals.of_bpb(nats_, bytes_) or (None, None)
    return {
        "bpb_low": low,
        "bpb_high": high,
        "by_source_interval": {name: _ends(intervals.of_bpb(nats_[its], bytes_[its])) for name, its in apart.items()},
        "documents": int(((nats_ != 0) | (bytes_ != 0)).sum()),
    }


def _ends(interval: tuple[float, float] | None) -> list[float] | None:
    """As JSON gives it back."""
    return None if interval is None else list(interval)


def _words(sources: Sequence[Opened], result: Score, ranks: Ranks) -> int:
    """Words in this rank's share of the texts, as far as they were scored: a document is scored from its start on."""
    assert result.details is not None
    return sum(
        count_words(source.split, range(ranks.rank, len(source.split), ranks.ranks), sums[1])
        for source, sums in _each(sources, result.details)
        if source.split.modality == "text"
    )


def _perplexity(sources: Sequence[Opened], result: Score, words: int) -> float | None:
    """exp(nats of all text / words); None without words, or where no float is large enough."""
    assert result.details is not None
    if not words:
        return None
    text = sum(float(sums[0].sum()) for of, sums in _each(sources, result.details) if of.split.modality == "text")
    with suppress(OverflowError):
        return math.exp(text / words)
    return None


def _by_position(settings: Config, result: Score) -> list[dict[str, Any]] | None:
    assert result.details is not None
    patch_size = settings.model.stages[0].patch_size
    if patch_size == 1 or settings.model.patching != "fixed":
        return None
    of_position = rearrange(result.details.columns, "s (k p) -> s k p", p=patch_size).sum(axis=1)
    return [_place({"position": i}, *sums) for i, sums in enumerate(of_position.T.tolist())]


def _by_depth(result: Score) -> list[dict[str, Any]]:
    """0, 1, 2 to 3, 4 to 7, ... ids before the target in its window; those of which something was scored."""
    assert result.details is not None
    columns = result.details.columns
    out = []
    for octave in range(columns.shape[1].bit_length()):
        start, stop = 2**octave // 2, min(2**octave, columns.shape[1])
        nats_, bytes_ = columns[:, start:stop].sum(axis=1).tolist()
        if bytes_:
            out.append(_place({"from": start, "to": stop - 1}, nats_, bytes_))
    return out


def _written(run: Path, figures: dict[str, Any], data: str | None, partly: bool, newest: bool) -> str | None:
    """Draw the picture; and, of the newest checkpoint and a whole split of the run's own data, write the figures.

    A run directory that takes nothing costs the files and a line, not the score.
    """
    name = f"eval_{figures['split']}_{figures['mode']}"
    of = ("" if data is None else f"_{SourceConfig(path=data).label}") + ("_part" if partly else "")
    low, high = figures["bpb_low"], figures["bpb_high"]
    within = "" if low is None else f" ({low:.4f} to {high:.4f})"
    part = f"{'first part of ' if partly else ''}{figures['split']}{f' of {data}' if data else ''}"
    how = f"{figures['mode']}{_by_which(figures)}"
    title = f"{run.resolve().name}: {figures['bpb']:.4f}{within} bits per byte, {part}, {how}"
    try:
        target = run / "plots" / f"{name}{of}.png"
        plots.evaluation(target, title, figures["by_position"], figures["by_depth"])
        if newest and data is None and not partly:
            checkpoint.write_atomically(run / f"{name}.json", json.dumps({**figures, "plot": str(target)}).encode())
    except OSError as error:
        sys.stderr.write(f"mbtrain: {run}: the picture was NOT written: {error.strerror}\n")
        return None
    return str(target)
