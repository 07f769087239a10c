"""What a job is, on disk: so that a process that was killed goes on, and other machines take their parts.

DIR/.prep/job.json            what is made, and of what
DIR/.prep/files-<id>.arrow    the source files, one row each
DIR/.prep/parts/              which parts were started, and their locks
DIR/.prep/stage, shards, tmp  staged groups (see `stage`), records of finished shards, files that are being written
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.recipe import Recipe
from data_prep.sources import SourceFile, digest
from data_prep.stage import group_files, stage_path
from mbtrain.errors import DataError
from mbtrain.shards import whole_file

PREP_NAME = ".prep"
_FOLDERS = ("tmp", "stage", "shards", "parts")


@dataclass(frozen=True)
class Job:
    """A data set to be made, or one to append to.

    options       the modality's
    group_bytes   source bytes that are staged together
    base          sha256 (hex) of the manifest of the data set that is appended to; None where one is made
    """

    out: Path
    modality: str
    recipe: Recipe
    options: dict[str, Any]
    files: list[SourceFile]
    group_bytes: int
    base: str | None = None

    @property
    def prep(self) -> Path:
        """The folder of staged work."""
        return self.out / PREP_NAME

    @property
    def prep_json(self) -> dict[str, Any]:
        """What stands in the manifest's `prep`."""
        return {**self.recipe.as_json(), **self.options}

    @property
    def bytes(self) -> int:
        """Bytes of all source files."""
        return sum(file.size for file in self.files)

    @cached_property
    def groups(self) -> list[tuple[SourceFile, ...]]:
        """The source files in groups, which are staged one by one."""
        return group_files(self.files, self.group_bytes)

    @cached_property
    def identity(self) -> str:
        """Sha256 (hex) over everything that is known of the source files, their times and places too."""
        total = hashlib.sha256()
        for file in self.files:
            total.update(os.fsencode(repr(file)) + b"\n")
        return total.hexdigest()

    @property
    def files_path(self) -> Path:
        """The Arrow file of the source files."""
        return self.prep / f"files-{self.identity[:16]}.arrow"

    def mark(self) -> dict[str, Any]:
        """What job.json holds: equal for equal jobs."""
        return {
            "modality": self.modality,
            "prep": self.prep_json,
            "sources": digest(self.files),
            "files": self.identity,
            "group_bytes": self.group_bytes,
            "base": self.base,
        }

    def missing(self) -> list[int]:
        """Numbers of the groups that are not staged."""
        return [number for number in range(len(self.groups)) if not stage_path(self.prep, number, "index").exists()]

    def start(self, *, alone: bool) -> None:
        """Make the folder of staged work and the mark; where others may do the same at once, the first one's stays.

        Raises:
            DataError: the other one's mark is of another job.
        """
        if alone:
            shutil.rmtree(self.prep, ignore_errors=True)
        for folder in _FOLDERS:
            (self.prep / folder).mkdir(parents=True, exist_ok=True)
        _write_files(self.files_path, self.files, self.prep / "tmp")
        path = self.prep / "job.json"
        mine = path.with_name(f"job-{os.urandom(6).hex()}.json")
        with whole_file(mine, self.prep / "tmp") as out:
            out.write(json.dumps(self.mark()).encode())
        try:
            with suppress(FileExistsError):
                os.link(mine, path)
        except OSError:  # a file system without hard links
            os.replace(mine, path)
        with suppress(FileNotFoundError):
            mine.unlink()
        if (other := read_mark(self.out)) != self.mark():
            raise DataError(
                f"{self.out}: another part was started with {difference(other or {}, self.mark())}; "
                "give all parts the same sources and options"
            )


def read_mark(out: Path) -> dict[str, Any] | None:
    """The mark of the unfinished job in `out`, if there is one."""
    try:
        return dict(json.loads((out / PREP_NAME / "job.json").read_bytes()))
    except FileNotFoundError:
        return None


def load_job(out: Path) -> Job:
    """The unfinished job in `out`.

    Raises:
        DataError: it is damaged, or of another version.
    """
    mark = read_mark(out) or {}
    try:
        files = _read_files(out / PREP_NAME / f"files-{mark['files'][:16]}.arrow")
        recipe = Recipe.from_json(mark["prep"])
        options = {key: value for key, value in mark["prep"].items() if key not in recipe.as_json()}
        job = Job(out, mark["modality"], recipe, options, files, mark["group_bytes"], mark["base"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(
            f"{out}: the unfinished job there cannot be read ({error!r}); start again with --overwrite"
        ) from None
    if job.mark() != mark:
        raise DataError(f"{out}: the unfinished job there is of another version; start again with --overwrite")
    return job


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """`other shard_bytes (64 there, 128 now)`: in what two marks differ; empty if in nothing."""
    if old.get("modality") != new["modality"]:
        return "another modality"
    there, now = old.get("prep", {}), new["prep"]
    for key in sorted(there.keys() | now.keys()):
        if there.get(key) != now.get(key):
            return f"other {key} ({json.dumps(there.get(key))} there, {json.dumps(now.get(key))} now)"
    return "other sources" if old != new else ""


def _write_files(path: Path, files: list[SourceFile], tmp: Path) -> None:
    import pyarrow as pa

    def column(name: str) -> pa.Array:
        values = [getattr(file, name) for file in files]
        # as bytes: names of files need not be Unicode
        return pa.array([os.fsencode(v) for v in values] if isinstance(values[0], str) else values)

    table = pa.table({field.name: column(field.name) for field in fields(SourceFile)})
    with whole_file(path, tmp) as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)


def _read_files(path: Path) -> list[SourceFile]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    decoded: list[dict[str, Any]] = [
        {key: os.fsdecode(value) if isinstance(value, bytes) else value for key, value in row.items()} for row in rows
    ]
    return [SourceFile(**row) for row in decoded]
