"""What is in a data set: samples, bytes and lengths by split and source, and the bytes' histogram."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.pool import progress
from mbtrain.shards import Split, load_manifest, open_split

_CHUNK_BYTES = 1024**2


def stats(root: Path) -> dict[str, Any]:
    """Figures of a data set, as JSON values; lengths are in bytes.

    Per split: `shards`, `histogram` (how often each byte value stands in it, 256 numbers), `entropy_bits_per_byte` (of
    that histogram: what a model without context needs at best), and per source `samples`, `bytes` and lengths.

    Raises:
        DataError: the data set is damaged.
    """
    manifest = load_manifest(root)
    splits: dict[str, Any] = {}
    total = sum(info.bytes for info in manifest.splits.values())
    with progress("stats", total) as update:
        done = 0
        for name, info in manifest.splits.items():
            split = open_split(root, name)
            histogram = np.zeros(256, np.int64)
            for size, counts in _histograms(split):
                histogram += counts
                done += size
                update(done)
            lengths_by_source = {
                source: split.lengths[split.source_index == number] for number, source in enumerate(split.source_names)
            }
            splits[name] = {
                "shards": len(info.shards),
                **_lengths(split.lengths),
                "entropy_bits_per_byte": entropy_bits(histogram),
                "distinct_bytes": int(np.count_nonzero(histogram)),
                "sources": {source: _lengths(lengths) for source, lengths in lengths_by_source.items()},
                "histogram": histogram.tolist(),
            }
            split.close()
    return {
        "modality": manifest.modality,
        "documents": manifest.documents,
        "samples": sum(info.samples for info in manifest.splits.values()),
        "bytes": total,
        "shards": sum(len(info.shards) for info in manifest.splits.values()),
        **manifest.counts,
        "splits": splits,
    }


def entropy_bits(histogram: np.ndarray) -> float:
    """Order-0 entropy of a histogram, in bits per byte; 0 where there is nothing."""
    share = histogram[histogram > 0] / max(1, int(histogram.sum()))
    return float(-(share * np.log2(share)).sum()) + 0.0  # + 0.0: not -0.0


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The figures as lines of text."""
    row = "{:<8} {:<24} {:>10} {:>16} {:>8} {:>10} {:>10} {:>12} {:>7} {:>9}"
    yield row.format("split", "source", "samples", "bytes", "min", "median", "mean", "max", "shards", "bits/byte")
    for name, split in figures["splits"].items():
        names = list(split["sources"])
        label = names[0] if len(names) == 1 else "(all)"
        lines = [(label, split, split["shards"], f"{split['entropy_bits_per_byte']:.4f}")]
        if len(names) > 1:
            lines += [(source, lengths, "", "") for source, lengths in split["sources"].items()]
        for source, lengths, shards, entropy in lines:
            numbers = (lengths["samples"], lengths["bytes"], lengths["min_bytes"])
            middle = (f"{lengths['median_bytes']:.0f}", f"{lengths['mean_bytes']:.0f}")
            yield row.format(name, source, *numbers, *middle, lengths["max_bytes"], shards, entropy)
    counts = ("duplicates", "rejected", "unused_bytes")
    yield f"{figures['modality']}, documents {figures['documents']}, " + ", ".join(f"{k} {figures[k]}" for k in counts)


def _histograms(split: Split) -> Iterator[tuple[int, np.ndarray]]:
    """(bytes, histogram) of the split's samples, a MiB at a time; small samples are counted together."""
    pending: list[bytes] = []
    size = 0
    for i, length in enumerate(split.lengths.tolist()):
        for start in range(0, length, _CHUNK_BYTES):
            pending.append(split.read(i, start, min(start + _CHUNK_BYTES, length)))
            size += len(pending[-1])
            if size >= _CHUNK_BYTES:
                yield size, np.bincount(np.frombuffer(b"".join(pending), np.uint8), minlength=256)
                pending, size = [], 0
    yield size, np.bincount(np.frombuffer(b"".join(pending), np.uint8), minlength=256)


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    some = len(lengths) > 0
    return {
        "samples": len(lengths),
        "bytes": int(lengths.sum()),
        "min_bytes": int(lengths.min()) if some else 0,
        "median_bytes": float(np.median(lengths)) if some else 0.0,
        "mean_bytes": float(lengths.mean()) if some else 0.0,
        "max_bytes": int(lengths.max()) if some else 0,
    }
