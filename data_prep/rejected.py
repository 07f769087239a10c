"""rejected.parquet: everything in the sources that became no sample, where it is, and why.

source   the SRC that it came from          where   its place in the file; empty for the whole file
file     its path within that SRC           reason  why
bad      it cannot be read or decoded; false for what is sound but not wanted: empty, too short, filtered
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.job import Job
from data_prep.plan import read_rejected
from data_prep.sources import SourceFile
from data_prep.stage import read_counts
from mbtrain.errors import DataError
from mbtrain.shards import REJECTED_NAME, whole_file

if TYPE_CHECKING:
    import pyarrow as pa

_ROW_GROUP_ROWS = 65536
_NAMED = 3


def rejected_schema() -> pa.Schema:
    """The columns."""
    import pyarrow as pa

    text = [(name, pa.string()) for name in ("source", "file", "where", "reason")]
    return pa.schema([*text, ("bad", pa.bool_())])


def check_rejected(prep: Path, groups: int, files: Sequence[SourceFile], max_reject: float) -> None:
    """Raise DataError, with the first of them, if more than the share `max_reject` of what was found is bad."""
    counts = [read_counts(prep, group) for group in range(groups)]
    bad, found = sum(count.bad for count in counts), sum(count.found for count in counts)
    if bad <= max_reject * found:
        return
    named: list[str] = []
    for table in read_rejected(prep, [group for group, count in enumerate(counts) if count.bad]):
        for row in table.filter(table["bad"]).slice(0, _NAMED).to_pylist():
            file = files[row["file"]]
            named.append(f"{' '.join(filter(None, (file.label, file.name, row['where'])))}: {row['reason']}")
        if len(named) >= _NAMED:
            break
    more = f" (and {bad - _NAMED} more)" if bad > _NAMED else ""
    raise DataError(
        f"{'; '.join(named[:_NAMED])}{more}: {bad} of {found} cannot be read or decoded, and "
        f"--max-reject={max_reject:g} (0 with --strict) allows less; mend or remove them, or allow more: "
        "what was read so far is kept"
    )


def write_rejected(job: Job, old_rows: int) -> int:
    """Write DIR/rejected.parquet, if there is anything to write; returns its number of rows.

    The first `old_rows` rows of the one that is there stay: those that are known to the manifest that is there. Row
    groups are cut by number alone, so that the bytes do not depend on how the sources were grouped.

    Raises:
        DataError: the old one has fewer rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, schema = job.out / REJECTED_NAME, rejected_schema()

    def tables() -> Iterator[pa.Table]:
        if old_rows:
            try:
                old = pq.read_table(path, schema=schema).slice(0, old_rows)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}; copy it again") from None
            if len(old) < old_rows:
                raise DataError(f"{path}: expected {old_rows} rows or more, got {len(old)}; copy it again")
            yield old
        for table in read_rejected(job.prep, range(len(job.groups))):
            files = [job.files[number] for number in table["file"].to_pylist()]
            columns = {
                "source": [file.label for file in files],
                "file": [os.fsencode(file.name).decode("utf-8", "backslashreplace") for file in files],
            }
            rest = {name: table[name] for name in ("where", "reason", "bad")}
            yield pa.table({**columns, **rest}, schema=schema)

    rows, waiting = 0, schema.empty_table()
    chunks = tables()
    if (first := next(chunks, None)) is None:
        path.unlink(missing_ok=True)  # of a data set that this one replaces
        return 0
    with whole_file(path, job.prep / "tmp") as out, pq.ParquetWriter(out, schema, compression="zstd") as writer:
        waiting = first
        while True:
            while len(waiting) >= _ROW_GROUP_ROWS:
                writer.write_table(waiting.slice(0, _ROW_GROUP_ROWS).combine_chunks())
                rows, waiting = rows + _ROW_GROUP_ROWS, waiting.slice(_ROW_GROUP_ROWS)
            if (table := next(chunks, None)) is None:
                break
            waiting = pa.concat_tables([waiting, table])
        if len(waiting):
            writer.write_table(waiting.combine_chunks())
    return rows + len(waiting)
