"""The modality of text: a document's own bytes, never decoded or changed.

    x.jsonl  x.ndjson   each line a JSON object; its string under `column`, as UTF-8, is one document
    x.parquet           each row's string or binary under `column` is one document
    anything else       the file is one document, byte for byte

each also behind .gz, .bz2, .xz or .zst.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from functools import partial

from data_prep.sources import (
    COMPRESSIONS,
    Count,
    Modality,
    Rejection,
    Sample,
    SourceFile,
    Unreadable,
    open_source,
    read_chunks,
)

_BATCH_ROWS = 1024


def text_modality(column: str) -> Modality:
    """Text; `column` names the documents' field in records."""
    return Modality("text", partial(_samples, column))


def _samples(column: str, file: SourceFile, count: Count) -> Iterator[Sample | Rejection]:
    stem, suffix = os.path.splitext(file.path.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(column, file, count)
    if suffix == ".parquet":
        return _parquet(column, file, count)
    return iter([Sample(read_chunks(file, count))])


def _json_lines(column: str, file: SourceFile, count: Count) -> Iterator[Sample | Rejection]:
    number = 0
    try:
        with open_source(file, count) as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.isspace():
                    continue
                document = _json_document(column, line)
                where = f"line {number}"
                yield Rejection(where, document) if isinstance(document, str) else Sample(iter((document,)), where)
    except Unreadable as error:
        raise Unreadable(f"after line {number}: {error}") from None


def _json_document(column: str, line: bytes) -> bytes | str:
    """The document in a JSON line, or (as a str) why there is none."""
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(value, dict):
        return f"expected a JSON object, got {type(value).__name__}"
    if column not in value:
        return f"no key {column!r}"
    text = value[column]
    if not isinstance(text, str):
        return f"key {column!r}: expected a string, got {type(text).__name__}"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return f"key {column!r}: half of a surrogate pair, which is no character"


def _parquet(column: str, file: SourceFile, count: Count) -> Iterator[Sample | Rejection]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    with open_source(file, count) as stream:
        try:
            # parquet is read from its end, so a compressed one is unpacked in memory
            table = pq.ParquetFile(stream if file.path.lower().endswith(".parquet") else io.BytesIO(stream.read()))
            schema = table.schema_arrow
            if column not in schema.names:
                yield Rejection("", f"no column {column!r}; it has {', '.join(schema.names)}")
                return
            kind = schema.field(column).type
            if kind not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
                yield Rejection("", f"column {column!r}: expected string or binary, got {kind}")
                return
            for batch in table.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
                # as binary: a string's bytes are its UTF-8, and need not be decoded
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    where = f"row {row}"
                    yield Rejection(where, "null") if value is None else Sample(iter((value,)), where)
                    row += 1
        except pa.ArrowException as error:
            raise Unreadable(f"from row {row} on: cannot be read: {' '.join(str(error).split())}") from None
