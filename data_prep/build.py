"""From source files to a data set, in two passes; knows nothing of any modality.

    1  stage    each group of source files -> its samples' bytes and an index             (parallel over groups)
       plan     all indices -> which samples are kept, and the split and shard of each    (a pure function)
    2  write    each shard: tar and parquet, from the staged bytes                        (parallel over shards)
       finish   rejected.jsonl, then the manifest, then the staged work in DIR/.prep is removed

Every file appears under its name only when it is whole, and what is there is not done again. So a job that was killed
at any instant goes on where it was, and ends with the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.pool import Run, say, worker_pool
from data_prep.recipe import Recipe
from data_prep.sources import Modality, SourceFile, check_unchanged, digest, find_files
from data_prep.split import cut_pieces, cut_shards, first_occurrences, split_by_hash, tar_bytes
from data_prep.stage import GROUP_BYTES, StageJob, group_files, stage, stage_path, stage_schema
from data_prep.writer import ShardJob, plan_path, plan_schema, write_shard
from mbtrain.errors import DataError
from mbtrain.shards import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    ShardInfo,
    SplitInfo,
    check_files,
    load_manifest,
    sync_folder,
    whole_file,
    write_manifest,
)

REJECTED_NAME = "rejected.jsonl"
_PREP_NAME = ".prep"
_SHARD_FILE = re.compile(r"(.+)-\d{6}\.(tar|parquet)")
_OTHER_OUT = "choose another --out, or --overwrite this one"


def build(
    modality: Modality,
    sources: Sequence[str],
    out: Path,
    recipe: Recipe,
    *,
    workers: int,
    strict: bool = False,
    overwrite: bool = False,
    group_bytes: int = GROUP_BYTES,
) -> Manifest:
    """Make the data set `out` of `sources`, or go on with it, or find that it is made already.

    Args:
        modality: turns a source file into samples.
        sources: files and folders.
        out: the data set's folder.
        recipe: everything else that decides the bytes.
        workers: processes; has no influence on the bytes.
        strict: make anything that cannot be read or decoded an error.
        overwrite: remove a data set in `out` that is of other sources or another recipe, or is to be made again.
        group_bytes: source bytes that are staged together; has no influence on the bytes.

    Raises:
        DataError: sources are missing, changed or (with `strict`) bad; `out` holds something else; the disk is full.
    """
    out = out.absolute()
    with _output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            found = find_files(sources, recipe.include, recipe.exclude, out)
            total_mb = sum(file.size for file in found.files) / 1e6
            passed = "".join(f", {count} passed over ({reason})" for reason, count in found.skipped.items())
            say(f"sources: {len(found.files)} files, {total_mb:.1f} MB{passed}")
            finished = _start(out, modality, found.files, recipe, group_bytes, overwrite)
            if finished is not None:
                return finished
            with worker_pool(workers) as run:
                return _build(modality, found.files, out, recipe, run, strict, group_bytes)


def _build(
    modality: Modality,
    files: list[SourceFile],
    out: Path,
    recipe: Recipe,
    run: Run,
    strict: bool,
    group_bytes: int,
) -> Manifest:
    prep = out / _PREP_NAME
    groups = group_files(files, group_bytes)
    jobs = [
        StageJob(number, group, modality, recipe.min_bytes, recipe.max_bytes, prep)
        for number, group in enumerate(groups)
    ]
    run(stage, jobs, "read", sum(file.size for file in files))
    rejected = _collect_rejected(prep, len(jobs), strict)

    plan, duplicates, unused_bytes = _plan(prep, len(jobs), recipe, files)
    shard_jobs: list[ShardJob] = []
    for split, counts in plan.items():
        (out / split).mkdir(exist_ok=True)
        for number in range(len(counts)):
            shard_jobs.append(ShardJob(out, prep, modality.name, split, number, len(shard_jobs)))
    shards: list[ShardInfo] = run(write_shard, shard_jobs, "write", sum(sum(counts) for counts in plan.values()))

    splits = {}
    for split in plan:
        of_split = tuple(info for job, info in zip(shard_jobs, shards, strict=True) if job.split == split)
        splits[split] = SplitInfo(sum(i.samples for i in of_split), sum(i.bytes for i in of_split), of_split)
        if not of_split:
            say(f"warning: the split {split!r} is empty: there are too few samples for its share")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        modality=modality.name,
        documents="whole" if recipe.split_bytes is None else "pieces",
        prep=recipe.as_json(),
        sources={"files": len(files), "bytes": sum(file.size for file in files), "digest": digest(files)},
        counts={"duplicates": duplicates, "rejected": rejected, "unused_bytes": unused_bytes},
        splits=splits,
    )
    if rejected:
        say(f"warning: {rejected} rejected; what and why stands in {out / REJECTED_NAME}")
        with whole_file(out / REJECTED_NAME, prep / "tmp") as copy, open(prep / "rejected", "rb") as lines:
            shutil.copyfileobj(lines, copy)
    if unused_bytes:
        say(f"warning: the last {unused_bytes} bytes of {files[0].path} lie beyond the splits and are not used")
    for file in files:
        check_unchanged(file)
    write_manifest(out, manifest, prep / "tmp")
    shutil.rmtree(prep)
    return manifest


# ---- starting, going on, and finding it done ----------------------------------------------------------------------


def _start(
    out: Path, modality: Modality, files: list[SourceFile], recipe: Recipe, group_bytes: int, overwrite: bool
) -> Manifest | None:
    """Make `out` ready to go on in; returns the manifest if there is nothing left to do."""
    prep = out / _PREP_NAME
    mark: dict[str, Any] = {
        "modality": modality.name,
        "prep": recipe.as_json(),
        "sources": digest(files),
        "files": [[file.path, file.mtime_ns] for file in files],
        "group_bytes": group_bytes,
    }
    mark_path = prep / "job.json"
    if (out / MANIFEST_NAME).exists():
        if not overwrite:
            manifest = _check_finished(out, modality, files, recipe)
            shutil.rmtree(prep, ignore_errors=True)  # killed between the last two steps
            say(f"{out} is finished already, from the same sources and parameters: nothing to do")
            return manifest
        _clear(out)
    elif mark_path.exists():
        if (other := json.loads(mark_path.read_bytes())) == mark:
            shutil.rmtree(prep / "tmp", ignore_errors=True)
            (prep / "tmp").mkdir()
            say(f"{out}: going on with a job that was stopped")
            return None
        if not overwrite:
            what = "modality" if other.get("modality") != mark["modality"] else _difference(other["prep"], mark["prep"])
            raise DataError(f"{out}: holds an unfinished job with other {what or 'sources'}; {_OTHER_OUT}")
        _clear(out)
    elif any(_shard_files(out)):
        if not overwrite:
            raise DataError(f"{out}: holds shards without a manifest, so they are not known to be whole; {_OTHER_OUT}")
        _clear(out)
    shutil.rmtree(prep, ignore_errors=True)
    for folder in ("tmp", "stage", "shards"):
        (prep / folder).mkdir(parents=True)
    with whole_file(mark_path) as file:
        file.write(json.dumps(mark).encode())
    return None


def _check_finished(out: Path, modality: Modality, files: list[SourceFile], recipe: Recipe) -> Manifest:
    """The manifest of `out`, if it is what would be made now; else DataError.

    The manifest holds no times, so that it is the same on every machine; as with make, what is newer has changed.
    """
    manifest = load_manifest(out)
    what = "modality" if manifest.modality != modality.name else _difference(manifest.prep, recipe.as_json())
    if not what and manifest.sources.get("digest") != digest(files):
        what = "sources (their names, sizes or number differ)"
    if what:
        raise DataError(f"{out}: holds a finished data set with other {what}; {_OTHER_OUT}")
    made_ns = (out / MANIFEST_NAME).stat().st_mtime_ns
    if newer := next((file.path for file in files if file.mtime_ns > made_ns), None):
        raise DataError(f"{out}: holds a finished data set, but {newer} is newer; {_OTHER_OUT}")
    for split, info in manifest.splits.items():
        if problems := check_files(out / split, info):
            raise DataError(f"{problems[0]}; make the data set again with --overwrite")
    return manifest


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """`shard_bytes (64 there, 128 now)` for the first parameter that differs; empty if none does."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} ({json.dumps(old.get(key))} there, {json.dumps(new.get(key))} now)"
    return ""


def _shard_files(out: Path) -> Iterator[Path]:
    """Files of shards in `out`: DIR/<split>/<split>-000000.tar and .parquet."""
    for folder in (entry for entry in out.iterdir() if entry.is_dir()):
        for path in folder.iterdir():
            if (match := _SHARD_FILE.fullmatch(path.name)) and match[1] == folder.name:
                yield path


def _clear(out: Path) -> None:
    """Remove a data set and nothing else; the manifest first, so that what is left never looks finished."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    sync_folder(out)
    (out / REJECTED_NAME).unlink(missing_ok=True)
    for path in list(_shard_files(out)):
        path.unlink()
        with suppress(OSError):  # not empty yet, or holds something else
            path.parent.rmdir()
    shutil.rmtree(out / _PREP_NAME, ignore_errors=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold `out` against a second job; the lock ends with this process."""
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another mbtrain-prep works on it; wait for it, or choose another --out") from None
        except OSError:
            pass  # some network file systems have no locks for folders; there the user takes care
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _output_errors(out: Path) -> Iterator[None]:
    """Errors of the file system while writing become one line; those of sources were dealt with where they arose."""
    try:
        yield
    except OSError as error:
        path = error.filename or out
        raise DataError(
            f"{path}: {error.strerror or error}; mend that, then run the same command again: it goes on where it was"
        ) from None


# ---- between the passes -------------------------------------------------------------------------------------------


def _collect_rejected(prep: Path, groups: int, strict: bool) -> int:
    """Gather the rejections in source order into .prep/rejected; returns how many there are.

    Raises:
        DataError: `strict`, and one is of something bad, not just empty, short or long.
    """
    number = 0
    with whole_file(prep / "rejected", prep / "tmp") as out:
        for group in range(groups):
            with open(stage_path(prep, group, "rejected"), "rb") as lines:
                for line in lines:
                    number += 1
                    out.write(line)
                    if strict and (item := json.loads(line))["bad"]:
                        place = " ".join(part for part in (item["source"], item["file"], item["where"]) if part)
                        raise DataError(f"{place}: {item['reason']}; mend or remove it, or leave out --strict")
    return number


def _plan(prep: Path, groups: int, recipe: Recipe, files: list[SourceFile]) -> tuple[dict[str, list[int]], int, int]:
    """Decide split and shard of every sample, and write the plan.

    Returns the bytes of each shard by split, the number of duplicates left out, and the bytes left over by split_bytes.
    """
    import pyarrow as pa

    tables = []
    for group in range(groups):
        with pa.memory_map(str(stage_path(prep, group, "index"))) as file:
            table = pa.ipc.open_file(file).read_all()
        tables.append(table.add_column(0, "stage", pa.array(np.full(len(table), group, np.int32))))
    rows = pa.concat_tables(tables)
    rows = rows.append_column("piece", pa.nulls(len(rows), pa.int64()))
    if len(rows) == 0:
        with open(prep / "rejected", "rb") as lines:
            reason = next((json.loads(line)["reason"] for line in lines), "no record in the sources")
        raise DataError(f"{files[0].path}: no sample in {len(files)} source files: {reason}; check SRC and the options")

    duplicates = unused_bytes = 0
    if recipe.split_bytes is None:
        hashes = _hash_matrix(rows)
        keep = np.flatnonzero(first_occurrences(hashes))
        duplicates = len(rows) - len(keep)
        split_numbers = split_by_hash(hashes[keep], [share for _, share in recipe.splits or ()])
        rows = rows.take(pa.array(keep[np.argsort(split_numbers, kind="stable")]))
        split_numbers = np.sort(split_numbers)
    else:
        rows, split_numbers, unused_bytes = _pieces(rows, recipe.split_bytes, recipe.sample_bytes, files)

    lengths = rows["bytes"].to_numpy()
    plan: dict[str, list[int]] = {}
    with whole_file(plan_path(prep), prep / "tmp") as out, pa.ipc.new_file(out, plan_schema()) as writer:
        for number, name in enumerate(recipe.split_names):
            first, last = np.searchsorted(split_numbers, [number, number + 1])
            plan[name] = []
            for start, stop in cut_shards(tar_bytes(lengths[first:last]), recipe.shard_bytes):
                part = rows.slice(first + start, stop - start).select(plan_schema().names).combine_chunks()
                writer.write_batch(part.to_batches()[0])
                plan[name].append(int(lengths[first + start : first + stop].sum()))
    return plan, duplicates, unused_bytes


def _hash_matrix(rows: Any) -> np.ndarray:
    """uint8 [n, 32]: the samples' hashes."""
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, 32)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in rows["hash"].chunks
        if len(chunk)
    ]
    return np.concatenate(parts)


def _pieces(
    rows: Any, split_bytes: Sequence[tuple[str, int]], sample_bytes: int, files: list[SourceFile]
) -> tuple[Any, np.ndarray, int]:
    """The plan's rows for the pieces of the one document in `rows`, their split numbers, and the bytes left over."""
    import pyarrow as pa

    path = files[0].path
    if len(rows) != 1 or len(files) != 1:
        raise DataError(
            f"{path}: split_bytes: expected one long file, got {len(files)} files with {len(rows)} documents; "
            "give one file, or use --splits"
        )
    document = rows.to_pylist()[0]
    wanted = sum(size for _, size in split_bytes)
    if document["bytes"] < wanted:
        raise DataError(f"{path}: split_bytes: expected {wanted} bytes or more, got {document['bytes']}; take less")
    offsets, lengths, split_numbers = cut_pieces([size for _, size in split_bytes], sample_bytes)
    count = len(offsets)
    columns = {
        "stage": pa.array(np.zeros(count, np.int32)),
        "offset": pa.array(offsets + document["offset"], pa.int64()),
        "bytes": pa.array(lengths, pa.int64()),
        "hash": pa.nulls(count, stage_schema().field("hash").type),
        "shape": pa.nulls(count, stage_schema().field("shape").type),
        "sample_rate": pa.nulls(count, pa.int32()),
        "source": pa.repeat(document["source"], count),
        "piece": pa.array(np.arange(count), pa.int64()),
    }
    return pa.table(columns, schema=plan_schema()), split_numbers, document["bytes"] - wanted
