"""From source files to a data set, in two passes; knows nothing of any modality.

    1  stage    each group of source files -> an index of its samples, and their bytes    (parallel over groups)
       plan     all indices -> which samples are kept, and the split and shard of each    (a pure function)
    2  write    each shard: tar and parquet, from the staged bytes                        (parallel over shards)
       finish   rejected.parquet, then the manifest, then the staged work in DIR/.prep is removed

Every file appears under its name only when it is whole, and what is there is not done again. So a job that was killed
at any instant goes on where it was, and ends with the same bytes; so does one that was done in parts, by any number of
machines that share a file system.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from data_prep.job import PREP_NAME, Job, difference, load_job, read_mark
from data_prep.locks import file_lock, folder_lock
from data_prep.plan import Plan, load_plan, make_plan
from data_prep.pool import Run, say, worker_pool
from data_prep.recipe import Recipe
from data_prep.rejected import check_rejected, write_rejected
from data_prep.sources import Modality, check_unchanged, digest, find_files
from data_prep.stage import GROUP_BYTES, StageJob, stage
from data_prep.writer import ShardJob, write_shard, written
from mbtrain.errors import ConfigError, DataError
from mbtrain.shards import (
    MANIFEST_NAME,
    REJECTED_NAME,
    SCHEMA_VERSION,
    Manifest,
    ShardInfo,
    SplitInfo,
    check_counts,
    check_files,
    file_sha256,
    load_manifest,
    shard_name,
    sync_folder,
    write_manifest,
)

ENGINES = ("local", "ray")
_SHARD_FILE = re.compile(r"(.+)-\d{6}\.(tar|parquet)")
_OTHER_OUT = "choose another --out, or --overwrite this one"

Part = tuple[int, int]


def build(
    modality: Modality,
    sources: Sequence[str],
    out: Path,
    recipe: Recipe,
    *,
    workers: int,
    engine: str = "local",
    max_reject: float = 1.0,
    overwrite: bool = False,
    group_bytes: int = GROUP_BYTES,
) -> Manifest:
    """Make the data set `out` of `sources`, or go on with it, or find that it is made already.

    Args:
        modality: turns what is in a source file into samples.
        sources: files, folders and URLs.
        out: the data set's folder.
        recipe: everything else that decides the bytes.
        workers: processes; has no influence on the bytes.
        engine: of `ENGINES`: where they run.
        max_reject: largest share of what the sources hold that may be unreadable; beyond it nothing is made.
        overwrite: remove a data set in `out` that is of other sources or another recipe, or is to be made again.
        group_bytes: source bytes that are staged together; has no influence on the bytes.

    Raises:
        DataError: sources are missing, changed or too bad; `out` holds something else; the disk is full.
        ConfigError: something that the recipe or engine needs is not installed.
    """
    out = out.absolute()
    check_recipe(modality.name, recipe)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with folder_lock(out):
            job = found_job(modality, sources, out, recipe, group_bytes)
            if (finished := _start(job, overwrite, alone=True)) is not None:
                return finished
            with engine_pool(engine, workers) as run:
                read_pass(job, modality, run, job.missing())
                check_rejected(job.prep, len(job.groups), job.files, max_reject)
                plan = make_plan(job.prep, len(job.groups), job.recipe, job.files[0].path)
                jobs = shard_jobs(job, plan)
                shards = write_pass(jobs, run)
            return finish(job, plan, jobs, shards)


def build_part(
    modality: Modality,
    sources: Sequence[str],
    out: Path,
    recipe: Recipe,
    part: Part,
    *,
    workers: int,
    engine: str = "local",
    group_bytes: int = GROUP_BYTES,
) -> dict[str, int]:
    """Read part i of n of the sources, in no need of the other parts; `merge` makes the data set of them.

    The parts may run at once, on machines that share the file system of `out`, and each may be killed and run again.

    Returns the numbers of source `files` and `bytes` of this part, and of its `groups`.

    Raises:
        DataError: as in `build`; or the part is at work already.
    """
    out = out.absolute()
    check_recipe(modality.name, recipe)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with folder_lock(out, shared=True):
            job = found_job(modality, sources, out, recipe, group_bytes)
            numbers = range(part[0], len(job.groups), part[1])
            if _start(job, overwrite=False, alone=False) is None:
                with _part_lock(job.prep, part, "part"):
                    _part_path(job.prep, part).touch()
                    with engine_pool(engine, workers) as run:
                        missing = set(job.missing())
                        read_pass(job, modality, run, [number for number in numbers if number in missing])
                say(f"part {part[0]}/{part[1]} is read; when all are: mbtrain-prep merge {out}")
            files = [file for number in numbers for file in job.groups[number]]
            return {"files": len(files), "bytes": sum(file.size for file in files), "groups": len(numbers)}


def merge(
    out: Path, *, workers: int, engine: str = "local", max_reject: float = 1.0, part: Part | None = None
) -> Manifest | None:
    """Make the data set of parts that were all read; with `part`, only write share i of n of its shards.

    Such shares may be written at once; a merge without `part` after them finishes the data set. Returns its manifest;
    None with `part`.

    Raises:
        DataError: parts are not done yet, or as in `build`.
    """
    out = out.absolute()
    with output_errors(out), folder_lock(_folder(out), shared=part is not None):
        mark = read_mark(out)
        if (out / MANIFEST_NAME).exists():
            manifest = load_manifest(out)  # first: of one that cannot be read nothing is said, and nothing removed
            if part is None and (mark is None or mark.get("base") is None):
                shutil.rmtree(out / PREP_NAME, ignore_errors=True)  # killed between the last two steps
            say(f"{out} is finished already: nothing to do")
            return manifest
        if mark is None:
            raise DataError(f"{out}: no part was read here; run mbtrain-prep text (image, audio) ... --part=i/n first")
        job = load_job(out)
        if missing := job.missing():
            raise DataError(f"{out}: {_undone(job, missing)}; run what is missing, then merge again")
        with file_lock(job.prep / "plan.lock", "", wait=True):
            check_rejected(job.prep, len(job.groups), job.files, max_reject)
            plan = load_plan(job.prep) or make_plan(job.prep, len(job.groups), job.recipe, job.files[0].path)
        jobs = shard_jobs(job, plan)
        with engine_pool(engine, workers) as run:
            if part is None:
                return finish(job, plan, jobs, write_pass(jobs, run))
            with _part_lock(job.prep, part, "share"):
                write_pass(jobs[part[0] :: part[1]], run)
        done = sum(written(shard) is not None for shard in jobs)
        say(f"share {part[0]}/{part[1]} is written ({done} of {len(jobs)} shards are); then: mbtrain-prep merge {out}")
        return None


# ---- the steps of a job -------------------------------------------------------------------------------------------


def check_recipe(modality: str, recipe: Recipe) -> None:
    """Raise ConfigError where a recipe does not fit the modality, or what it needs is not installed."""
    if recipe.split_bytes is not None and modality != "text":
        raise ConfigError(f"split_bytes: cuts a file's bytes, and this is {modality}; use splits")
    if recipe.near_dups is not None:
        if modality != "text":
            raise ConfigError(f"near_dups: finds near-duplicates of text, and this is {modality}; leave it out")
        from data_prep.near import check_installed

        check_installed()


def found_job(modality: Modality, sources: Sequence[str], out: Path, recipe: Recipe, group_bytes: int) -> Job:
    """The job of making `out` of the files that are found in `sources`; raises DataError as `find_files` does."""
    found = find_files(sources, recipe.include, recipe.exclude, out, modality)
    job = Job(out, modality.name, recipe, modality.options, found.files, group_bytes)
    passed = "".join(f", {count} passed over ({reason})" for reason, count in found.skipped.items())
    say(f"sources: {len(job.files)} files, {job.bytes / 1e6:.1f} MB{passed}")
    return job


def engine_pool(engine: str, workers: int) -> AbstractContextManager[Run]:
    """Where work is done: processes here, or a Ray cluster. Raises ConfigError if it is neither or not installed."""
    if engine not in ENGINES:
        raise ConfigError(f"--engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "local":
        return worker_pool(workers)
    from data_prep.cluster import ray_pool

    return ray_pool(workers)


def read_pass(job: Job, modality: Modality, run: Run, numbers: Sequence[int]) -> None:
    """Stage the groups of these numbers."""
    firsts = [0]
    for group in job.groups:
        firsts.append(firsts[-1] + len(group))
    limits = (job.recipe.min_bytes, job.recipe.max_bytes, job.recipe.near_dups is not None)
    jobs = [StageJob(n, firsts[n], job.groups[n], modality, *limits, job.prep) for n in numbers]
    run(stage, jobs, "read", sum(file.size for group in jobs for file in group.files))


def shard_jobs(job: Job, plan: Plan, base: Manifest | None = None) -> list[ShardJob]:
    """The new shards in their order; they follow those of `base` in each split."""
    jobs: list[ShardJob] = []
    out = job.out if base is None else job.prep / "new"
    for split, shards in plan.shards.items():
        first = len(base.splits[split].shards) if base is not None else 0
        for number, size in enumerate(shards, first):
            place = (out, job.prep, job.files_path, job.modality)
            jobs.append(ShardJob(*place, split, number, len(jobs), size))
    return jobs


def write_pass(jobs: Sequence[ShardJob], run: Run) -> list[ShardInfo]:
    """Write those shards that are not written yet; returns what all of them are, in their order."""
    for folder in {job.out / job.split for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    infos = {number: info for number, job in enumerate(jobs) if (info := written(job)) is not None}
    # the largest first: a large one that starts last would have the other workers wait for it
    left = sorted((number for number in range(len(jobs)) if number not in infos), key=lambda n: -jobs[n].bytes)
    new = run(write_shard, [jobs[number] for number in left], "write", sum(jobs[number].bytes for number in left))
    infos |= dict(zip(left, new, strict=True))
    return [infos[number] for number in range(len(jobs))]


def finish(
    job: Job, plan: Plan, jobs: Sequence[ShardJob], shards: Sequence[ShardInfo], base: Manifest | None = None
) -> Manifest:
    """Check the sums, put rejected.parquet and the manifest in their places, and remove the staged work.

    Raises:
        DataError: a source changed meanwhile, or what was found is not what was kept, left out and rejected.
    """
    splits: dict[str, SplitInfo] = {}
    for split in plan.shards:
        new = tuple(info for shard, info in zip(jobs, shards, strict=True) if shard.split == split)
        of_split = (*base.splits[split].shards, *new) if base is not None else new
        splits[split] = SplitInfo(sum(i.samples for i in of_split), sum(i.bytes for i in of_split), of_split)
        if not of_split:
            say(f"warning: the split {split!r} is empty: there are too few samples for its share")
    check_counts(str(job.out), plan.counts, sum(info.samples for info in shards))
    for file in job.files:
        check_unchanged(file)
    if base is not None:
        _move_new(job, jobs)
    rejected = write_rejected(job, base.counts["rejected"] if base is not None else 0)
    counts = {key: number + (base.counts[key] if base is not None else 0) for key, number in plan.counts.items()}
    if rejected != counts["rejected"]:
        raise DataError(f"{job.prep}: expected {counts['rejected']} rejections, got {rejected}; --overwrite it")
    these = {"files": len(job.files), "bytes": job.bytes, "digest": digest(job.files)}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        modality=job.modality,
        documents="whole" if job.recipe.split_bytes is None else "pieces",
        prep=job.prep_json,
        sources=these if base is None else {**base.sources, "appended": [*base.sources.get("appended", []), these]},
        counts=counts,
        splits=splits,
        rejected_sha256=file_sha256(job.out / REJECTED_NAME) if rejected else "",
    )
    if plan.counts["rejected"]:
        say(f"warning: {plan.counts['rejected']} rejected; what and why stands in {job.out / REJECTED_NAME}")
    if plan.counts["unused_bytes"]:
        left = f"the last {plan.counts['unused_bytes']} bytes of {job.files[0].path}"
        say(f"warning: {left} lie beyond the splits and are not used")
    write_manifest(job.out, manifest, job.prep / "tmp")
    shutil.rmtree(job.prep)
    return manifest


def _move_new(job: Job, jobs: Sequence[ShardJob]) -> None:
    for shard in jobs:
        for end in ("tar", "parquet"):
            name = f"{shard_name(shard.split, shard.number)}.{end}"
            (job.out / shard.split).mkdir(exist_ok=True)
            os.replace(shard.out / shard.split / name, job.out / shard.split / name)
    for split in {shard.split for shard in jobs}:
        sync_folder(job.out / split)


# ---- starting, going on, and finding it done ----------------------------------------------------------------------


def _start(job: Job, overwrite: bool, *, alone: bool) -> Manifest | None:
    """Make `out` ready to go on in; returns the manifest if there is nothing left to do.

    Others may start parts of the same job at the same time, unless this one is `alone`.
    """
    out, prep = job.out, job.prep
    mark = read_mark(out)
    if (out / MANIFEST_NAME).exists() and not overwrite:
        manifest = _check_finished(job)
        if alone and (mark is None or mark.get("base") is None):
            shutil.rmtree(prep, ignore_errors=True)  # killed between the last two steps
        say(f"{out} is finished already, from the same sources and parameters: nothing to do")
        return manifest
    if mark is not None and not (out / MANIFEST_NAME).exists():
        if mark == job.mark():
            if alone:
                shutil.rmtree(prep / "tmp", ignore_errors=True)
                (prep / "tmp").mkdir()
            say(f"{out}: going on; {len(job.groups) - len(job.missing())} of {len(job.groups)} groups are read")
            return None
        if not overwrite:
            raise DataError(f"{out}: holds an unfinished job with {difference(mark, job.mark())}; {_OTHER_OUT}")
    elif not overwrite and any(shard_files(out)):
        raise DataError(f"{out}: holds shards without a manifest, so they are not known to be whole; {_OTHER_OUT}")
    if overwrite:
        _clear(out)
    job.start(alone=alone)
    return None


def _check_finished(job: Job) -> Manifest:
    """The manifest of `out`, if it is what would be made now; else DataError.

    The manifest holds no times, so that it is the same on every machine; as with make, what is newer has changed.
    """
    out = job.out
    manifest = load_manifest(out)
    there = {"modality": manifest.modality, "prep": manifest.prep}
    what = difference(there, {"modality": job.modality, "prep": job.prep_json})
    if not what and (manifest.sources.get("digest") != digest(job.files) or "appended" in manifest.sources):
        what = "other sources (their names, sizes or number differ)"
    if what:
        raise DataError(f"{out}: holds a finished data set with {what}; {_OTHER_OUT}")
    made_ns = (out / MANIFEST_NAME).stat().st_mtime_ns
    if newer := next((file.path for file in job.files if file.mtime_ns > made_ns), None):
        raise DataError(f"{out}: holds a finished data set, but {newer} is newer; {_OTHER_OUT}")
    for split, info in manifest.splits.items():
        if problems := check_files(out / split, info):
            raise DataError(f"{problems[0]}; make the data set again with --overwrite")
    return manifest


def shard_files(out: Path) -> Iterator[Path]:
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
    for path in list(shard_files(out)):
        path.unlink()
        with suppress(OSError):  # not empty yet, or holds something else
            path.parent.rmdir()
    shutil.rmtree(out / PREP_NAME, ignore_errors=True)


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Errors of the file system while writing become one line; those of sources were dealt with where they arose."""
    try:
        yield
    except OSError as error:
        path = error.filename or out
        raise DataError(
            f"{path}: {error.strerror or error}; mend that, then run the same command again: it goes on where it was"
        ) from None


# ---- parts --------------------------------------------------------------------------------------------------------


def _part_path(prep: Path, part: Part) -> Path:
    return prep / "parts" / f"{part[0]}-of-{part[1]}"


def _part_lock(prep: Path, part: Part, what: str) -> AbstractContextManager[None]:
    path = prep / "parts" / f"{what}-{part[0]}-of-{part[1]}.lock"
    return file_lock(path, f"{prep.parent}: {what} {part[0]}/{part[1]} is at work already; wait for it")


def _undone(job: Job, missing: Sequence[int]) -> str:
    """`parts 2/8, 5/8 are not done (4 of 30 groups)`: by the division into parts that was used last."""
    started = [path for path in (job.prep / "parts").iterdir() if path.suffix != ".lock"]
    groups = f"{len(missing)} of {len(job.groups)} groups are not read"
    if not started:
        return groups
    parts = int(max(started, key=lambda path: os.stat(path).st_mtime_ns).name.rpartition("-")[2])
    undone = sorted({number % parts for number in missing})
    listed = ", ".join(f"{number}/{parts}" for number in undone[:10]) + (", ..." if len(undone) > 10 else "")
    return f"{'parts' if len(undone) > 1 else 'part'} {listed} not done ({groups})"


def _folder(out: Path) -> Path:
    """`out`, if it is a folder; else DataError."""
    if not out.is_dir():
        raise DataError(f"{out}: expected a folder made by mbtrain-prep, got none")
    return out
