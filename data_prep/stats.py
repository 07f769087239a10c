"""What is in a data set: samples, bytes and lengths by split and source, where the rest went, and how it compresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.pool import progress
from mbtrain.codecs import baselines, excerpt, read_parts
from mbtrain.shards import COUNTS, Manifest, Split, load_manifest, open_split

# What is looked at of larger data sets, unless all is asked for: a second's work, and ten seconds' at xz's pace.
HISTOGRAM_BYTES = 256 * 1024**2
CODEC_BYTES = 8 * 1024**2
_PLACES = 16

CODEC_LABELS = {"gzip": "gzip -9", "xz": "xz -9e", "png": "PNG", "webp": "WebP", "flac": "FLAC"}
_COMMON_SHAPES = 5


def stats(root: Path, full: bool = False) -> dict[str, Any]:
    """Figures of a data set, as JSON values; lengths are in bytes.

    In all and per split: `samples`, `bytes`, `shards`, lengths, `entropy_bits_per_byte` (of the bytes' histogram: what
    a model without context needs at best), and lossless compressors as `gzip_bpb`, `xz_bpb` and those of the modality
    (see `mbtrain.codecs`). These are taken on `histogram_bytes` and `codec_bytes`: all, or of a large data set with
    `full` False a part that is evenly spread over each split.
    In all besides: the manifest's counts, with found = samples + duplicates + near_duplicates + rejected.
    Per split besides: `histogram` (how often each byte value was seen, 256 numbers), `distinct_bytes`, `shapes` (see
    `_shapes`), and per source samples and lengths.

    Raises:
        DataError: the data set is damaged.
    """
    manifest = load_manifest(root)
    total = sum(info.bytes for info in manifest.splits.values())
    splits: dict[str, Any] = {}
    with progress("stats", total + total if full else min(total, HISTOGRAM_BYTES) + min(total, CODEC_BYTES)) as update:
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            update(done)

        for name, info in manifest.splits.items():
            split = open_split(root, name)
            splits[name] = {"shards": len(info.shards), **_lengths(split.lengths), "shapes": _shapes(split)}
            splits[name] |= _measured(split, None if full or not total else info.bytes / total, count)
            splits[name]["sources"] = {
                source: _lengths(split.lengths[split.source_index == number])
                for number, source in enumerate(split.source_names)
            }
            split.close()
    return {
        "modality": manifest.modality,
        "documents": manifest.documents,
        "samples": sum(info.samples for info in manifest.splits.values()),
        "bytes": total,
        "shards": sum(len(info.shards) for info in manifest.splits.values()),
        **_counts(manifest),
        **_over_splits(list(splits.values())),
        "splits": splits,
    }


def entropy_bits(histogram: np.ndarray) -> float:
    """Order-0 entropy of a histogram, in bits per byte; 0 where there is nothing."""
    share = histogram[histogram > 0] / max(1, int(histogram.sum()))
    return float(-(share * np.log2(share)).sum()) + 0.0  # + 0.0: not -0.0


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The figures as lines of text."""
    row = "{:<8} {:<24} {:>10} {:>16} {:>8} {:>10} {:>10} {:>12} {:>7} {:>9}"
    yield row.format("split", "source", "samples", "bytes", "min", "median", "mean", "max", "shards", "entropy")
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
        if shapes := shapes_said(split["shapes"]):
            yield f"{'':<8} {shapes}"
    yield f"{figures['modality']}, documents {figures['documents']}: {sum_said(figures)}"
    yield f"passed over {figures['passed_over']}, unused bytes {figures['unused_bytes']}"
    scores = ", ".join(f"{label} {bpb:.4f}" for label, bpb in scores_of(figures))
    entropy_on, codecs_on = (extent_said(figures, key) for key in ("histogram_bytes", "codec_bytes"))
    on = entropy_on if entropy_on == codecs_on else f"{entropy_on}; compressors {codecs_on}"
    yield f"bits per byte: {scores} ({on})"


def sum_said(figures: dict[str, Any]) -> str:
    """`found 9 = 6 samples + 1 duplicates + 0 near-duplicates + 2 rejected`."""
    parts = ("samples", "duplicates", "near_duplicates", "rejected")
    return f"found {figures['found']} = " + " + ".join(f"{figures[key]} {key.replace('_', '-')}" for key in parts)


def scores_of(figures: dict[str, Any]) -> list[tuple[str, float]]:
    """(label, bits per byte) of the entropy and of each compressor that was measured."""
    codecs = [(label, figures[f"{name}_bpb"]) for name, label in CODEC_LABELS.items() if f"{name}_bpb" in figures]
    return [("entropy", figures["entropy_bits_per_byte"]), *codecs]


def extent_said(figures: dict[str, Any], key: str) -> str:
    """On which bytes figures were taken: `histogram_bytes` or `codec_bytes`."""
    measured = figures[key]
    return f"over all {measured} bytes" if measured == figures["bytes"] else f"on {measured} bytes, evenly spread"


def shapes_said(shapes: dict[str, Any] | None) -> str:
    """A split's shapes in words; empty for text."""
    if shapes is None:
        return ""
    if "common" not in shapes:
        return f"{shapes['seconds']:.1f} s at {shapes['sample_rate']} Hz"
    common = ", ".join(f"{height} x {width}: {n}" for height, width, n in shapes["common"])
    more = f", and {shapes['distinct'] - len(shapes['common'])} more" if shapes["distinct"] > _COMMON_SHAPES else ""
    return f"height x width {common}{more}"


def _measured(split: Split, share: float | None, count: Callable[[int], None]) -> dict[str, Any]:
    """Histogram, entropy and compressors of a split; `share` of what is looked at of the data set, or None: all."""
    counted, compressed = (
        None if share is None else max(1, round(limit * share)) for limit in (HISTOGRAM_BYTES, CODEC_BYTES)
    )
    parts = excerpt(split.lengths, counted, _PLACES)
    histogram = np.zeros(256, np.int64)
    for chunk in read_parts(split, parts):
        histogram += np.bincount(np.frombuffer(chunk, np.uint8), minlength=256)
        count(len(chunk))
    codecs = baselines(split, compressed, _PLACES, count)
    return {
        "entropy_bits_per_byte": entropy_bits(histogram),
        "distinct_bytes": int(np.count_nonzero(histogram)),
        "histogram_bytes": int(histogram.sum()),
        "codec_bytes": codecs.pop("bytes"),
        **codecs,
        "histogram": histogram.tolist(),
    }


def _over_splits(splits: list[dict[str, Any]]) -> dict[str, Any]:
    """The same figures over all splits: of the sum of the histograms; of compressors the mean over their bytes."""
    histogram = np.sum([split["histogram"] for split in splits], axis=0) if splits else np.zeros(256, np.int64)
    out = {
        "entropy_bits_per_byte": entropy_bits(histogram),
        "histogram_bytes": int(histogram.sum()),
        "codec_bytes": sum(split["codec_bytes"] for split in splits),
    }
    for codec in CODEC_LABELS:
        measured = [split for split in splits if f"{codec}_bpb" in split]
        # if a split lacks it, the others' mean would be of other bytes than the rest of the figures
        if measured and len(measured) == sum(split["bytes"] > 0 for split in splits):
            weighed = sum(split[f"{codec}_bpb"] * split["bytes"] for split in measured)
            out[f"{codec}_bpb"] = weighed / sum(split["bytes"] for split in measured)
    return out


def _counts(manifest: Manifest) -> dict[str, int]:
    return {key: manifest.counts[key] for key in COUNTS}


def _shapes(split: Split) -> dict[str, Any] | None:
    """Of images `distinct` shapes and of the most `common` [height, width, samples]; of audio seconds and Hz."""
    if split.modality == "audio":
        prep = split.manifest.prep
        rate, width = int(prep.get("sample_rate", 16_000)), 1 if prep.get("encoding") == "mulaw8" else 2
        return {"sample_rate": rate, "seconds": int(split.lengths.sum()) / width / rate}
    if split.modality != "image" or not len(split):
        return None
    if (size := split.common_image_size()) is not None:
        return {"distinct": 1, "common": [[*size, len(split)]]}
    sizes = np.array([split.image_size(i) for i in range(len(split))])
    distinct, numbers = np.unique(sizes, axis=0, return_counts=True)
    first = np.argsort(-numbers, kind="stable")[:_COMMON_SHAPES]
    return {"distinct": len(distinct), "common": np.column_stack([distinct, numbers])[first].tolist()}


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
