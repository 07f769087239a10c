"""Exact bits per byte: the sum of nats over all targets / ln 2 / real bytes, over a whole split in a fixed order.

Sums are float64 and over all ranks. The same number comes out at any number of ranks and any batch size, because
every byte is scored once, windows do not see one another, and nothing is averaged before the end. Which windows they
are, by mode, is in data/windows.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbtrain import checkpoint, config, vocab
from mbtrain.config import Config
from mbtrain.data.opening import Opened
from mbtrain.data.windows import evaluation_batch, evaluation_windows
from mbtrain.errors import CheckpointError, DataError
from mbtrain.model import Model, build
from mbtrain.model.loss import nats


@dataclass(frozen=True)
class Details:
    """The same sums by document and by column, float64, [0] nats and [1] real bytes.

    documents  [2, n], of the samples of all sources, one source after the other in the order of their shards
    columns    [2, seq_len]: by the number of ids before the target in its window
    """

    documents: np.ndarray
    columns: np.ndarray


@dataclass(frozen=True)
class Score:
    """Sums over a split: nats over all targets (boundaries included) and real bytes, in all and by source."""

    nats: float
    bytes: int
    by_source: dict[str, tuple[float, int]]
    details: Details | None = None

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
    mode: str = "basic",
    patch_size: int = 1,
    details: bool = False,
) -> Score:
    """Score one split of each source in windows of seq_len (data/windows.py: basic, sliding, strided, both).

    logits_of: ids (batch, seq_len) -> logits, or nats; called equally often on every rank, as ZeRO-3 needs.
    rank of ranks: which windows this process scores. Processes that share rows have the same ones, and each scores the
    columns that its logits are for. reduce sums a list over all processes. limit_bytes scores only the first rows, of
    each source its share of them. By source means: of the mixture where there are several, else of what mbtrain-prep
    was given. patch_size: of the coarsest stage, whose borders the modes go by. details: sums by document and
    column too, which training does without.
    Raises DataError when nothing is scored; also, on the rank that could not read its part, after the others have been
    kept company to the end.
    """
    names = names_of(sources)
    sums = np.zeros((2, len(names)), np.float64)  # nats; real bytes (exact below 2**53)
    by_document = np.zeros((2, sum(len(source.split) for source in sources) if details else 0), np.float64)
    by_column = np.zeros((2, seq_len if details else 0), np.float64)
    unread: DataError | None = None
    ids_in_all = sum(source.stream.ids_per_epoch for source in sources)
    documents_before = 0
    with torch.no_grad():  # not inference_mode: what ZeRO-3 gathers in here may stay, and training goes on with it
        for number, source in enumerate(sources):
            stream = source.stream
            limit = None if limit_bytes is None else math.ceil(limit_bytes * stream.ids_per_epoch / ids_in_all)
            windows = evaluation_windows(stream, seq_len, mode=mode, patch_size=patch_size, limit_bytes=limit)
            for first in range(0, len(windows), batch * ranks):
                mine = range(first + rank * batch, min(first + (rank + 1) * batch, len(windows)))
                try:
                    ids, scored, samples = evaluation_batch(stream, seq_len, windows, mine, batch)
                except DataError as error:  # raised at the end: until then this rank keeps in step
                    unread = error
                    ids, scored, samples = evaluation_batch(stream, seq_len, windows, [], batch)
                tensor = torch.from_numpy(ids).to(device).long()
                ids, scored, samples = ids[:, columns], scored[:, columns], samples[:, columns]
                lost = nats(logits_of(tensor), tensor[:, columns]).double().cpu().numpy()[scored]
                real, sample = ids[scored] != vocab.BOUNDARY, samples[scored]
                of = np.full(len(lost), number) if len(sources) > 1 else source.split.source_index[sample]
                _add(sums, of, lost, real)
                if details and len(lost):
                    lowest = int(sample.min())  # samples in a batch are neighbours: as few sums as there are of them
                    here = by_document[:, documents_before + lowest : documents_before + int(sample.max()) + 1]
                    _add(here, sample - lowest, lost, real)
                    _add(by_column, np.nonzero(scored)[1], lost, real)
            documents_before += len(source.split) if details else 0
    parts = [part.ravel() for part in (sums, by_document, by_column)]
    reduced = np.split(np.array(reduce(np.concatenate(parts).tolist())), np.cumsum([part.size for part in parts])[:2])
    sums, by_document, by_column = (part.reshape(2, -1) for part in reduced)
    if unread is not None:
        raise unread
    if sums[1].sum() == 0:
        raise DataError("evaluation: no bytes in this split; prepare it with a larger share of the data")
    by_source = {name: (float(sums[0, i]), int(sums[1, i])) for i, name in enumerate(names) if sums[1, i]}
    found = Details(by_document, by_column) if details else None
    return Score(float(sums[0].sum()), int(sums[1].sum()), by_source, found)


def load_model(
    path: str | Path, device: torch.device, last: bool = False
) -> tuple[Model, Config, checkpoint.Checkpoint, Path]:
    """The model of a run's newest whole checkpoint (or of the checkpoint given) in fp32 and eval mode.

    Of its averaged weights, where it has some; last: of those that were trained.
    Returns (model, its config, the checkpoint, the run directory). Raises CheckpointError.
    """
    run, found = checkpoint.find(path)
    settings = config.load(run / "config.yaml")
    return loaded(run, settings, found, device, last), settings, found, run


def loaded(
    run: Path, settings: Config, found: checkpoint.Checkpoint, device: torch.device, last: bool = False
) -> Model:
    """A checkpoint's model in fp32 and eval mode. Raises CheckpointError where it does not fit the settings."""
    model = build(settings)
    try:
        model.load_state_dict(checkpoint.load_weights(found, last))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{found.path}: does not fit {run}/config.yaml: {reason}") from error
    return model.to(device).eval()


def share_of_validation(settings: Config, sources: Sequence[Opened]) -> float:
    """What validating in between takes, as a share of the time of training, by operations: a forward pass is a third.

    0.0 where there is none in between. With optim.ema it is made twice.
    """
    asked, train = settings.eval, settings.train
    if asked.every_steps is None:
        return 0.0
    split_bytes = sum(source.stream.bytes_per_epoch for source in sources)
    scored = min(split_bytes, asked.limit_bytes or split_bytes) * (1 if settings.optim.ema is None else 2)
    return scored / (3 * asked.every_steps * train.global_batch_size * settings.data.seq_len)


def names_of(sources: Sequence[Opened]) -> list[str]:
    """What scores are told apart by: the sources of a mixture, or those that the only one was prepared from."""
    return [source.name for source in sources] if len(sources) > 1 else sources[0].split.source_names


def _add(sums: np.ndarray, of: np.ndarray, lost: np.ndarray, real: np.ndarray) -> None:
    """Add nats, and 1 for each real byte, to the columns `of` of sums [2, n]."""
    sums[0] += np.bincount(of, weights=lost, minlength=sums.shape[1])
    sums[1] += np.bincount(of[real], minlength=sums.shape[1])
