"""Exact bits per byte: the sum of nats over all targets / ln 2 / real bytes, over a whole split in a fixed order.

Sums are float64 and over all ranks. The same number comes out at any number of ranks and any batch size, because
every row is scored once, rows do not see one another, and nothing is averaged before the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbtrain import checkpoint, config, vocab
from mbtrain.config import Config
from mbtrain.data.opening import Opened, open_sources
from mbtrain.data.rows import evaluation_batch, evaluation_rows
from mbtrain.errors import CheckpointError, DataError
from mbtrain.model import Model, build
from mbtrain.model.loss import nats


@dataclass(frozen=True)
class Score:
    """Sums over a split: nats over all targets (boundaries included) and real bytes, in all and by source."""

    nats: float
    bytes: int
    by_source: dict[str, tuple[float, int]]

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return self.nats / math.log(2) / self.bytes

    def metrics(self, key: str = "val/bpb") -> dict[str, float]:
        """{"val/bpb": ...}, and "val/<source>/bpb" where there are several sources."""
        out = {key: self.bpb}
        if len(self.by_source) > 1:
            place, name = key.split("/")
            for source, (nats_, bytes_) in self.by_source.items():
                out[f"{place}/{source}/{name}"] = nats_ / math.log(2) / bytes_
        return out


def score(
    logits_of: Callable[[Tensor], Tensor],
    sources: Sequence[Opened],
    *,
    seq_len: int,
    batch: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    reduce: Callable[[list[float]], list[float]] = lambda sums: sums,
    limit_bytes: int | None = None,
    columns: slice = slice(None),
) -> Score:
    """Score one split of each source in rows of seq_len that begin without context (the paper's basic evaluation).

    logits_of: ids (batch, seq_len) -> logits; called equally often on every rank, as ZeRO-3 needs.
    rank of ranks: which rows this process scores. Processes that share rows have the same ones, and each scores the
    columns that its logits are for. reduce sums a list over all processes. limit_bytes scores only the first rows, of
    each source its share of them. By source means: of the mixture where there are several, else of what mbtrain-prep
    was given.
    Raises DataError when nothing is scored; also, on the rank that could not read its part, after the others have been
    kept company to the end.
    """
    names = [source.name for source in sources] if len(sources) > 1 else sources[0].split.source_names
    sums = np.zeros((2, len(names)), np.float64)  # nats; real bytes (exact below 2**53)
    unread: DataError | None = None
    ids_in_all = sum(source.stream.ids_per_epoch for source in sources)
    with torch.inference_mode():
        for number, source in enumerate(sources):
            stream = source.stream
            limit = None if limit_bytes is None else math.ceil(limit_bytes * stream.ids_per_epoch / ids_in_all)
            rows = evaluation_rows(stream, seq_len, limit)
            for first in range(0, rows, batch * ranks):
                mine = list(range(first + rank * batch, min(first + (rank + 1) * batch, rows)))
                try:
                    ids, mask, of = evaluation_batch(stream, seq_len, mine, batch)
                except DataError as error:  # raised at the end: until then this rank keeps in step
                    unread = error
                    ids, mask, of = evaluation_batch(stream, seq_len, [], batch)
                tensor = torch.from_numpy(ids).to(device).long()
                ids, mask, of = ids[:, columns], mask[:, columns], of[:, columns]
                lost = nats(logits_of(tensor), tensor[:, columns]).double().cpu().numpy()[mask]
                of = np.full(len(lost), number) if len(sources) > 1 else of[mask]
                sums[0] += np.bincount(of, weights=lost, minlength=len(names))
                sums[1] += np.bincount(of[ids[mask] != vocab.BOUNDARY], minlength=len(names))
    sums = np.array(reduce(sums.ravel().tolist())).reshape(2, -1)
    if unread is not None:
        raise unread
    if sums[1].sum() == 0:
        raise DataError("evaluation: no bytes in this split; prepare it with a larger share of the data")
    by_source = {name: (float(sums[0, i]), int(sums[1, i])) for i, name in enumerate(names) if sums[1, i]}
    return Score(float(sums[0].sum()), int(sums[1].sum()), by_source)


def load_model(path: str | Path, device: torch.device) -> tuple[Model, Config, checkpoint.Checkpoint, Path]:
    """The model of a run's newest whole checkpoint (or of the checkpoint given) in fp32 and eval mode.

    Returns (model, its config, the checkpoint, the run directory). Raises CheckpointError.
    """
    run, found = checkpoint.find(path)
    settings = config.load(run / "config.yaml")
    model = build(settings)
    try:
        model.load_state_dict(checkpoint.load_weights(found))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{found.path}: does not fit {run}/config.yaml: {reason}") from error
    return model.to(device).eval(), settings, found, run


def evaluate_run(
    path: str | Path,
    *,
    split: str = "val",
    data: str | None = None,
    batch: int = 8,
    limit_bytes: int | None = None,
    precision: str = "as-trained",
) -> dict[str, Any]:
    """Score a run in this process: {"bpb", "nats", "bytes", "split", "step", "precision", "by_source"}.

    precision: as-trained computes as the training's own validation does; or fp32, bf16, autocast.
    Raises DataError for unknown splits, CheckpointError for a run that is not whole.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, settings, found, _ = load_model(path, device)
    if precision == "as-trained":
        stage0 = settings.train.precision == "bf16" and settings.train.zero_stage == 0
        precision = "autocast" if stage0 else settings.train.precision
    if precision in ("bf16", "fp16"):
        model = model.to(torch.bfloat16 if precision == "bf16" else torch.float16)

    def logits_of(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
            return model(ids)

    if data is not None:
        elsewhere = settings.data.model_copy(update={"path": data, "sources": ()})
        settings = settings.model_copy(update={"data": elsewhere})
    sources = open_sources(settings, split, seed=None)
    result = score(
        logits_of,
        sources,
        seq_len=settings.data.seq_len,
        batch=batch,
        device=device,
        limit_bytes=limit_bytes,
    )
    return {
        "bpb": result.bpb,
        "nats": result.nats,
        "bytes": result.bytes,
        "split": split,
        "step": found.progress.step,
        "precision": precision,
        "by_source": {name: n / math.log(2) / b for name, (n, b) in result.by_source.items()},
        # The same number by the name it has for images: a dimension is a byte.
        **({"bits_per_dimension": result.bpb} if all(s.split.modality == "image" for s in sources) else {}),
    }
