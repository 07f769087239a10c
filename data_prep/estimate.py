"""What a job would make, from a look at a few of its files; nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.build import check_recipe, found_job
from data_prep.items import items
from data_prep.job import difference, read_mark
from data_prep.recipe import Recipe
from data_prep.sources import Item, Modality, Rejection, SourceFile, Unreadable
from data_prep.stage import GROUP_BYTES, REFERRED_BYTES
from mbtrain.shards import MANIFEST_NAME, load_manifest

_LARGEST = _OTHERS = 12
_SEEN = ("samples", "rejected", "bytes", "copied")
_BYTES_PER_FILE = 4 * 1024**2


def estimate(modality: Modality, sources: Sequence[str], out: Path, recipe: Recipe) -> dict[str, Any]:
    """What `build` would make of the same arguments.

    Returns source `files`, `bytes` and `groups` (which are read in parallel), and as estimates from the beginnings of
    `looked_at` files spread over the sources: `samples` and `rejected` (duplicates are not looked for), `sample_bytes`,
    samples, bytes and shards of each of `splits`, `disk_bytes` (shards, and what is staged until the end) beside
    `free_bytes`; and in `out` what is there.

    Raises:
        DataError: sources are missing.
    """
    out = out.absolute()
    check_recipe(modality.name, recipe)
    job = found_job(modality, sources, out, recipe, GROUP_BYTES)
    # the largest for themselves, for one of them may be most of it all, and the others by some of them
    largest = set(sorted(range(len(job.files)), key=lambda number: -job.files[number].size)[:_LARGEST])
    others = [file for number, file in enumerate(job.files) if number not in largest]
    step = max(1, len(others) // _OTHERS)
    strata = [[job.files[number]] for number in sorted(largest)] + [others]
    total = dict.fromkeys(_SEEN, 0.0)
    looked_at = 0
    for stratum in strata:
        chosen = stratum[step // 2 :: step][:_OTHERS] if stratum is others else stratum
        looks = [_look(modality, recipe, file) for file in chosen]
        looked_at += len(looks)
        seen = sum(look["source_bytes"] for look in looks)
        scale = sum(file.size for file in stratum) / seen if seen else len(stratum) / max(1, len(looks))
        for key in _SEEN:
            total[key] += scale * sum(look[key] for look in looks)
    samples, rejected, size, copied = (round(total[key]) for key in _SEEN)
    if recipe.split_bytes is not None:
        parts = {name: (-(-part // recipe.sample_bytes), part) for name, part in recipe.split_bytes}
    else:
        parts = {name: (round(samples * share), round(size * share)) for name, share in recipe.splits or ()}
    splits = {
        name: {
            "samples": number,
            "bytes": part,
            "shards": -(-(part + 768 * number) // recipe.shard_bytes),  # a header, and half a block of padding
        }
        for name, (number, part) in parts.items()
    }
    tars = sum(part + 768 * number for number, part in parts.values())
    existing = next(folder for folder in (out, *out.parents) if folder.is_dir())
    return {
        "files": len(job.files),
        "bytes": job.bytes,
        "groups": len(job.groups),
        "looked_at": looked_at,
        "samples": sum(number for number, _ in parts.values()) if recipe.split_bytes else samples,
        "rejected": rejected,
        "sample_bytes": sum(part for _, part in parts.values()),
        "splits": splits,
        "disk_bytes": tars + copied,
        "free_bytes": shutil.disk_usage(existing).free,
        "out": _what_is_there(out, {"modality": job.modality, "prep": job.prep_json}, job.mark()),
        "path": str(out),
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """The estimate for a reader."""
    looked = f"about, from a look at {figures['looked_at']} files"
    need, free = figures["disk_bytes"] / 1e6, figures["free_bytes"] / 1e6
    return [
        f"{figures['path']}: {figures['out']}; nothing was written",
        f"sources: {figures['files']} files, {figures['bytes']} bytes, read in {figures['groups']} groups",
        f"samples: {figures['samples']} of {figures['sample_bytes']} bytes, {figures['rejected']} rejected ({looked})",
        *(
            f"{name}: {split['samples']} samples, {split['bytes']} bytes, {split['shards']} shards"
            for name, split in figures["splits"].items()
        ),
        f"disk: {need:.1f} MB needed, {free:.1f} MB free{'' if need < free else ': too little'}",
    ]


def _look(modality: Modality, recipe: Recipe, file: SourceFile) -> dict[str, int]:
    """What the beginning of a file holds, and of how many of its source bytes that is."""
    read = 0
    seen = dict.fromkeys(_SEEN, 0)

    def count(more: int) -> None:
        nonlocal read
        read += more

    def enough() -> bool:
        return read >= _BYTES_PER_FILE and seen["samples"] > 0

    try:
        for item in items(file, modality.column, modality.wants, count):
            if isinstance(item, Item):
                _look_at_item(modality, recipe, file, item, seen, enough)
            elif isinstance(item, Rejection):
                seen["rejected"] += 1
            if enough():
                break
        else:
            read = file.size
    except Unreadable:
        seen["rejected"] += 1
    return {**seen, "source_bytes": min(read, file.size)}


def _look_at_item(
    modality: Modality,
    recipe: Recipe,
    file: SourceFile,
    item: Item,
    seen: dict[str, int],
    enough: Callable[[], bool],
) -> None:
    """Add an item's samples to what was seen."""
    filtered = modality.options.get("match") or modality.options.get("reject")
    if modality.name == "text" and item.plain and not filtered:  # there is no need to read it
        fits = recipe.min_bytes <= file.size <= recipe.max_bytes
        seen["samples" if fits else "rejected"] += 1
        seen["bytes"] += file.size * fits
        seen["copied"] += file.size * (fits and file.size < REFERRED_BYTES)
        return
    try:
        for sample in modality.decode(item):
            size = 0 if isinstance(sample, Rejection) else sum(map(len, sample.chunks))
            fits = recipe.min_bytes <= size <= recipe.max_bytes
            seen["samples" if fits else "rejected"] += 1
            seen["bytes"] += size * fits
            seen["copied"] += size * fits
            if enough():
                return
    except Unreadable:
        seen["rejected"] += 1


def _what_is_there(out: Path, new: dict[str, Any], mark: dict[str, Any]) -> str:
    if (out / MANIFEST_NAME).exists():
        manifest = load_manifest(out)
        what = difference({"modality": manifest.modality, "prep": manifest.prep}, new)
        same = not what.removeprefix("other sources")
        return f"holds a finished data set with {'the same options' if same else what}"
    if (other := read_mark(out)) is not None:
        what = difference(other, mark)
        return f"holds an unfinished job with {what}" if what else "holds this job, unfinished: it would go on"
    return "would be made" if not out.exists() else "would be filled"
