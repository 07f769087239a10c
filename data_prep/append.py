"""New sources for a finished data set: what is in it stays where it is, byte for byte.

The new samples' shards follow the old ones in each split. They are written in DIR/.prep/new and moved at the end, just
before the new manifest takes the old one's place; no file that the old one knows is touched. So the old data set is
whole at every instant, and the same command goes on where it was killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.build import (
    check_recipe,
    engine_pool,
    finish,
    found_job,
    output_errors,
    read_pass,
    shard_files,
    shard_jobs,
    write_pass,
)
from data_prep.job import PREP_NAME, Job, difference, read_mark
from data_prep.locks import folder_lock
from data_prep.modalities import modality_of
from data_prep.plan import Old, make_plan
from data_prep.pool import Progress, Run, say
from data_prep.recipe import Recipe
from data_prep.rejected import check_rejected
from data_prep.sources import digest
from data_prep.stage import GROUP_BYTES
from mbtrain.errors import ConfigError, DataError
from mbtrain.shards import (
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    check_files,
    file_sha256,
    load_manifest,
    read_index,
)


def append(
    out: Path,
    sources: Sequence[str],
    *,
    workers: int,
    engine: str = "local",
    max_reject: float = 1.0,
    overwrite: bool = False,
    group_bytes: int = GROUP_BYTES,
) -> Manifest:
    """Add the samples of new sources to the data set `out`, by its own recipe, or go on with that.

    What stands in it already is left out as a duplicate. The splits are decided by content, so no sample moves.

    Args:
        out: the data set's folder.
        sources, workers, engine, max_reject, group_bytes: as in `build.build`.
        overwrite: give up an unfinished append of other sources.

    Raises:
        DataError: `out` is no finished data set of this version, or holds an unfinished append of other sources; or as
            in `build`.
    """
    out = out.absolute()
    with output_errors(out):
        manifest = load_manifest(out)
        with folder_lock(out):
            manifest = load_manifest(out)
            if manifest.documents != "whole":
                raise DataError(f"{out}: is one file in pieces, by position; nothing can be appended, make another")
            try:
                recipe = Recipe.from_json(manifest.prep)
            except (KeyError, TypeError, ValueError, ConfigError) as error:
                raise DataError(f"{out}: its manifest holds no recipe of this version ({error!r})") from None
            options = {key: value for key, value in manifest.prep.items() if key not in recipe.as_json()}
            modality = modality_of(manifest.modality, options, str(out))
            check_recipe(modality.name, recipe)
            job = replace(found_job(modality, sources, out, recipe, group_bytes), base=file_sha256(out / MANIFEST_NAME))
            if _start(job, manifest, overwrite):
                return manifest
            with engine_pool(engine, workers) as run:
                read_pass(job, modality, run, job.missing())
                check_rejected(job.prep, len(job.groups), job.files, max_reject)
                old = _old(job, manifest, run)
                plan = make_plan(job.prep, len(job.groups), recipe, job.files[0].path, old)
                jobs = shard_jobs(job, plan, manifest)
                shards = write_pass(jobs, run)
            return finish(job, plan, jobs, shards, manifest)


def _start(job: Job, manifest: Manifest, overwrite: bool) -> bool:
    """Make `out` ready to go on in; returns whether there is nothing left to do."""
    out = job.out
    if any(entry["digest"] == digest(job.files) for entry in manifest.sources.get("appended", [])):
        made_ns = (out / MANIFEST_NAME).stat().st_mtime_ns
        if newer := next((file.path for file in job.files if file.mtime_ns > made_ns), None):
            raise DataError(f"{out}: sources of these names and sizes were appended, but {newer} is newer; rename it")
        shutil.rmtree(job.prep, ignore_errors=True)  # killed between the last two steps
        say(f"{out}: these sources are appended already: nothing to do")
        return True
    for split, info in manifest.splits.items():
        if problems := check_files(out / split, info):
            raise DataError(f"{problems[0]}; copy it again, or make the data set again")
    mark = read_mark(out)
    if mark == job.mark():
        shutil.rmtree(job.prep / "tmp", ignore_errors=True)
        (job.prep / "tmp").mkdir()
        say(f"{out}: going on; {len(job.groups) - len(job.missing())} of {len(job.groups)} groups are read")
        return False
    if mark is not None and mark.get("base") == job.base and not overwrite:
        what = difference(mark, job.mark())
        raise DataError(f"{out}: holds an unfinished append of {what}; go on with that, or give it up by --overwrite")
    _remove_unknown(out, manifest)
    job.start(alone=True)
    return False


def _remove_unknown(out: Path, manifest: Manifest) -> None:
    """Remove what another append left: its staged work, and shards that the manifest does not know."""
    known = {shard.name for info in manifest.splits.values() for shard in info.shards}
    for path in list(shard_files(out)):
        if path.stem not in known:
            path.unlink()
    shutil.rmtree(out / PREP_NAME, ignore_errors=True)


# ---- what is in the data set already ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OldShard:
    """A shard of the data set, of which the samples' signatures are asked for, or not."""

    folder: Path
    shard: ShardInfo
    signed: bool


def _old(job: Job, manifest: Manifest, run: Run) -> Old:
    """Hashes, and signatures if there are any, of the samples in the data set."""
    signed = job.recipe.near_dups is not None
    shards = [
        _OldShard(job.out / split, shard, signed) for split, info in manifest.splits.items() for shard in info.shards
    ]
    label = "sign what is there" if signed else "look at what is there"
    parts = run(_look, shards, label, sum(shard.shard.bytes for shard in shards) if signed else 0)
    hashes = [np.zeros((0, 32), np.uint8), *(hashes for hashes, _ in parts)]
    signatures = [np.zeros((0, 128), np.uint32), *(signatures for _, signatures in parts)]
    return Old(np.concatenate(hashes), np.concatenate(signatures) if signed else None)


def _look(old: _OldShard, count: Progress) -> tuple[np.ndarray, np.ndarray]:
    """A shard's hashes, uint8 [n, 32], and signatures, uint32 [n, 128] (zeros: none)."""
    path = old.folder / f"{old.shard.name}.parquet"
    index = read_index(path, ["hash", "offset", "bytes"])
    text = "".join(index["hash"].to_pylist())
    if len(index) != old.shard.samples or len(text) != 64 * len(index):
        raise DataError(f"{path}: expected {old.shard.samples} hashes; copy it again, or make the data set again")
    hashes = np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 32)
    signatures = np.zeros((len(index) if old.signed else 0, 128), np.uint32)
    if old.signed:
        from data_prep.near import signature

        with open(old.folder / f"{old.shard.name}.tar", "rb") as tar:
            for row, (offset, size) in enumerate(
                zip(index["offset"].to_pylist(), index["bytes"].to_pylist(), strict=True)
            ):
                tar.seek(offset)
                if made := signature(tar.read(size)):
                    signatures[row] = np.frombuffer(made, "<u4")
                count(size)
    return hashes, signatures
