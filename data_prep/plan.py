"""Between the passes: which samples are kept, and the split and shard of each. A pure function of the staged indices.

.prep/plan.arrow   one record batch per new shard, one row per sample: the group and row of its staged index
.prep/plan.json    the bytes of each shard, and the counts; written last: where it stands, the other does
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.recipe import Recipe
from data_prep.split import cut_pieces, cut_shards, first_occurrences, split_by_hash, tar_bytes
from data_prep.stage import StageCounts, read_counts, stage_path
from mbtrain.errors import DataError
from mbtrain.shards import whole_file

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Plan:
    """The bytes of each new shard by split, and the new samples' `mbtrain.shards.COUNTS`."""

    shards: dict[str, list[int]]
    counts: dict[str, int]


@dataclass(frozen=True)
class Old:
    """What is in the data set already: uint8 [n, 32] hashes, and uint32 [n, 128] signatures or None."""

    hashes: np.ndarray
    signatures: np.ndarray | None = None


def plan_path(prep: Path) -> Path:
    """The plan's rows."""
    return prep / "plan.arrow"


def plan_schema(pieces: bool) -> pa.Schema:
    """Columns of the plan: `group` and `row` of a staged sample; for a piece of it also its place and number."""
    import pyarrow as pa

    fields = [("group", pa.int32()), ("row", pa.int64())]
    more = [("start", pa.int64()), ("bytes", pa.int64()), ("piece", pa.int64())]
    return pa.schema(fields + more if pieces else fields)


def load_plan(prep: Path) -> Plan | None:
    """The plan, if it was made."""
    try:
        return Plan(**json.loads((prep / "plan.json").read_bytes()))
    except FileNotFoundError:
        return None


def make_plan(prep: Path, groups: int, recipe: Recipe, source: str, old: Old | None = None) -> Plan:
    """Decide split and shard of every staged sample, and write the plan.

    Args:
        prep: the folder of the staged work.
        groups: number of groups; all are staged.
        recipe: of the data set.
        source: path of the first source file, for messages.
        old: samples that new ones may not repeat.

    Raises:
        DataError: there is no sample, or not one long document where split_bytes cuts one.
    """
    staged = [read_counts(prep, group) for group in range(groups)]
    total = StageCounts(*(sum(column) for column in zip(*(asdict(c).values() for c in staged), strict=True)))
    if total.rows == 0:
        reason = _first_reason(prep, groups) or "no record in the sources"
        raise DataError(f"{source}: no sample in all source files: {reason}; check SRC and the options")
    counts = {"found": total.found, "duplicates": 0, "near_duplicates": 0, "rejected": total.rejected}
    counts |= {"passed_over": total.passed_over, "unused_bytes": 0}
    starts = np.concatenate([[0], np.cumsum([c.rows for c in staged], dtype=np.int64)])

    if recipe.split_bytes is None:
        kept, lengths, numbers = _whole(prep, starts, recipe, old, counts)
        group = (np.searchsorted(starts, kept, side="right") - 1).astype(np.int32)
        columns: list[np.ndarray] = [group, kept - starts[group]]
    else:
        columns, lengths, numbers = _pieces(prep, starts, recipe, source, counts)
    shards = _write(prep, recipe, columns, lengths, numbers)
    plan = Plan(shards, counts)
    with whole_file(prep / "plan.json", prep / "tmp") as out:
        out.write(json.dumps(asdict(plan)).encode())
    return plan


def _whole(
    prep: Path, starts: np.ndarray, recipe: Recipe, old: Old | None, counts: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row (over all groups), length and split number of each document that is kept, split by split."""
    before = 0 if old is None else len(old.hashes)
    rows = int(starts[-1])
    hashes = np.empty((before + rows, 32), np.uint8)
    lengths = np.empty(rows, np.int64)
    signatures = signed = None
    if recipe.near_dups is not None:
        signatures, signed = np.zeros((before + rows, 128), np.uint32), np.zeros(before + rows, bool)
    if old is not None:
        hashes[:before] = old.hashes
        if signatures is not None and signed is not None and old.signatures is not None:
            signatures[:before], signed[:before] = old.signatures, old.signatures.any(axis=1)
    for start, batch in _batches(prep, starts):
        here = slice(start, start + len(batch))
        there = slice(before + start, before + start + len(batch))
        hashes[there] = np.frombuffer(batch["hash"].buffers()[1], np.uint8)[: 32 * len(batch)].reshape(-1, 32)
        lengths[here] = batch["bytes"].to_numpy()
        if signatures is not None and signed is not None:
            for row, value in enumerate(batch["signature"].to_pylist(), before + start):
                if value:
                    signatures[row], signed[row] = np.frombuffer(value, "<u4"), True
    first = first_occurrences(hashes)
    kept = np.flatnonzero(first[before:])
    counts["duplicates"] = rows - len(kept)
    if signatures is not None and signed is not None:
        from data_prep.near import first_of_their_kind

        assert recipe.near_dups is not None
        candidates = np.concatenate([np.arange(before), before + kept])
        alone = first_of_their_kind(signatures[candidates], signed[candidates], recipe.near_dups, before)[before:]
        counts["near_duplicates"] = int(len(kept) - alone.sum())
        kept = kept[alone]
    numbers = split_by_hash(hashes[before + kept, :8], [share for _, share in recipe.splits or ()]).astype(np.uint16)
    order = np.argsort(numbers, kind="stable")
    kept = kept[order]
    return kept, lengths[kept], numbers[order]


def _pieces(
    prep: Path, starts: np.ndarray, recipe: Recipe, source: str, counts: dict[str, int]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The plan's columns for the pieces of the one document, their lengths and split numbers."""
    split_bytes = recipe.split_bytes or ()
    if counts["found"] != 1:
        raise DataError(
            f"{source}: split_bytes: expected one long file, got files with {counts['found']} documents; "
            "give one file, or use --splits"
        )
    length = int(next(batch for _, batch in _batches(prep, starts))["bytes"][0].as_py())
    wanted = sum(size for _, size in split_bytes)
    if length < wanted:
        raise DataError(f"{source}: split_bytes: expected {wanted} bytes or more, got {length}; take less")
    offsets, lengths, numbers = cut_pieces([size for _, size in split_bytes], recipe.sample_bytes)
    counts |= {"found": len(offsets), "unused_bytes": length - wanted}
    group = int(np.searchsorted(starts, 0, side="right")) - 1
    groups, rows = np.full(len(offsets), group, np.int32), np.zeros(len(offsets), np.int64)
    return [groups, rows, offsets, lengths, np.arange(len(offsets))], lengths, numbers


def _batches(prep: Path, starts: np.ndarray) -> Iterator[tuple[int, Any]]:
    """The staged indices' batches with the number of their first row; each is let go with the next.

    So a job of very many groups holds few maps at a time, of which the system has a limit.
    """
    import pyarrow as pa

    for group, start in enumerate(starts[:-1].tolist()):
        with pa.memory_map(str(stage_path(prep, group, "index"))) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                if not len(batch := reader.get_batch(number)):
                    continue
                yield start, batch
                start += len(batch)


def _write(
    prep: Path, recipe: Recipe, columns: list[np.ndarray], lengths: np.ndarray, numbers: np.ndarray
) -> dict[str, list[int]]:
    """Cut each split into shards and write the plan's rows; returns the shards' bytes by split."""
    import pyarrow as pa

    schema = plan_schema(recipe.split_bytes is not None)
    shards: dict[str, list[int]] = {}
    with whole_file(plan_path(prep), prep / "tmp") as out, pa.ipc.new_file(out, schema) as writer:
        for number, name in enumerate(recipe.split_names):
            first, last = np.searchsorted(numbers, [number, number + 1]).tolist()
            shards[name] = []
            for start, stop in cut_shards(tar_bytes(lengths[first:last]), recipe.shard_bytes):
                rows = slice(first + start, first + stop)
                writer.write_batch(pa.record_batch([pa.array(column[rows]) for column in columns], schema=schema))
                shards[name].append(int(lengths[rows].sum()))
    return shards


# ---- rejections ---------------------------------------------------------------------------------------------------


def read_rejected(prep: Path, groups: Sequence[int]) -> Iterator[pa.Table]:
    """The staged rejections of each group that has some, in source order."""
    import pyarrow as pa

    for group in groups:
        if read_counts(prep, group).rejected:
            with pa.memory_map(str(stage_path(prep, group, "rejected"))) as file:
                yield pa.ipc.open_file(file).read_all()


def _first_reason(prep: Path, groups: int) -> str | None:
    for table in read_rejected(prep, range(groups)):
        return str(table["reason"][0].as_py())
    return None
