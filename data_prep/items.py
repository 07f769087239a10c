"""From a source file to its items: the pieces whose content is to be decoded, in the file's order.

    x.tar  x.zip             each file in it is an item, or holds records, as below; folders and links are passed over
    x.jsonl  x.ndjson        each line is a JSON object; its string under `column` is an item
    x.parquet                each row's string or binary under `column` is an item
    anything else            the file is one item

each also behind .gz, .bz2, .xz or .zst (.tgz is .tar.gz), in an archive too. An archive in an archive is rejected.

`column` names a field: `text`, or of an object in an object (a struct in parquet) `meta.text`; a name that itself has
the dot is taken first. A struct that has `bytes`, as image columns often are, stands for these.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from data_prep.archives import Member, read_tar, read_zip
from data_prep.reading import chunks, decompressed, open_source, read_chunks, seekable
from data_prep.sources import (
    ARCHIVES,
    JSON_LINES,
    Count,
    Item,
    PassedOver,
    Rejection,
    SourceFile,
    Unreadable,
    container,
    uncompressed,
)
from data_prep.wording import printable, reason_of

__all__ = ["Item", "PassedOver", "items"]

_LINE_BYTES = 256 * 1024**2
_BATCH_ROWS, _BATCH_BYTES = 1024, 8 * 1024**2
_NAMES_SHOWN = 20


def items(
    file: SourceFile, column: str, wanted: Callable[[str], bool], count: Count
) -> Iterator[Item | Rejection | PassedOver]:
    """The items of a source file, in its order.

    Where an item's chunks raise Unreadable, that item is lost; go on and ask for the next one. Where this iterator
    itself raises Unreadable, the rest of the file is lost. What is lost is told once.

    Args:
        file: the file.
        column: the field of the content in records.
        wanted: whether a member of an archive is asked for, by its path in the archive; records are always.
        count: is told of the bytes read from the disk or the network.

    Raises:
        Unreadable: from the iterator: the rest of the file cannot be read; the message says from where on, and why.
        DataError: the network failed.
    """
    kind = container(file.name)
    if not kind:
        name = os.path.basename(uncompressed(file.name))
        plain = uncompressed(file.name) == file.name
        size = file.size if plain and file.size else None
        yield Item(name, "", read_chunks(file, count), size, plain and not file.is_remote)
        return
    with open_source(file, count) as stream:
        if kind in ARCHIVES:
            for member in (read_tar if kind == ".tar" else read_zip)(stream):
                if isinstance(member, Member):
                    yield from _of_member(member, column, wanted)
                else:
                    yield member
        else:
            yield from _records(kind, stream, column, "")


def _of_member(member: Member, column: str, wanted: Callable[[str], bool]) -> Iterator[Item | Rejection | PassedOver]:
    """The items of an archive's member."""
    kind = container(member.path)
    if any(part.startswith(".") and part != "." for part in member.path.split("/")):
        yield PassedOver(member.where, "hidden")
    elif kind in ARCHIVES:
        yield Rejection(member.where, "an archive in an archive; unpack the outer one first")
    elif kind:
        try:
            with decompressed(_stream(member), member.path) as stream:
                yield from _records(kind, stream, column, f"{member.where}: ")
        except Unreadable as error:
            yield Rejection(member.where, str(error))
    elif not wanted(member.path):
        yield PassedOver(member.where, "not asked for")
    else:
        name = uncompressed(member.path)
        if name != member.path:
            yield Item(os.path.basename(name), member.where, chunks(decompressed(_stream(member), member.path)))
        else:
            content = member.content
            parts = iter((content,)) if isinstance(content, bytes) else chunks(content)
            yield Item(os.path.basename(name), member.where, parts, member.size)


def _stream(member: Member) -> IO[bytes]:
    return io.BytesIO(member.content) if isinstance(member.content, bytes) else member.content


def _records(kind: str, stream: IO[bytes], column: str, prefix: str) -> Iterator[Item | Rejection]:
    return _json_lines(stream, column, prefix) if kind in JSON_LINES else _parquet(stream, column, prefix)


def _names(names: Sequence[str]) -> str:
    """Names of fields, for a message: the first of them."""
    shown = [printable(name) for name in names[:_NAMES_SHOWN]]
    return ", ".join([*shown, "..."] if len(names) > _NAMES_SHOWN else shown) or "none"


# ---- JSON lines ---------------------------------------------------------------------------------------------------


def _json_lines(stream: IO[bytes], column: str, prefix: str) -> Iterator[Item | Rejection]:
    number = 0
    try:
        while line := stream.readline(_LINE_BYTES):
            number += 1
            where = f"{prefix}line {number}"
            if len(line) == _LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_LINE_BYTES)
                yield Rejection(where, f"longer than {_LINE_BYTES} bytes")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line or line.isspace():
                continue
            document = _json_document(line, column)
            if isinstance(document, str):
                yield Rejection(where, document)
            else:
                yield Item("", where, iter((document,)), len(document))
    except Unreadable as error:
        raise Unreadable(f"after line {number}: {error}") from None


def _json_document(line: bytes, column: str) -> bytes | str:
    """The document in a JSON line, or (as a str) why there is none."""
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(value, dict):
        return f"expected a JSON object, got {type(value).__name__}"
    found, text = (True, value[column]) if column in value else _look_up(value, column)
    if not found:
        return f"no key {column!r}; it has {_names(list(value))}"
    if not isinstance(text, str):
        return f"key {column!r}: expected a string, got {'null' if text is None else type(text).__name__}"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return f"key {column!r}: half of a surrogate pair, which is no character"


def _look_up(value: dict[str, Any], column: str) -> tuple[bool, Any]:
    """Whether an object has `a.b.c`, and its value: under that name, or `c` of `a.b`, or `b.c` of `a`."""
    if column in value:
        return True, value[column]
    cut = column.rfind(".")
    while cut >= 0:
        inner = value.get(column[:cut])
        if isinstance(inner, dict):
            found, leaf = _look_up(inner, column[cut + 1 :])
            if found:
                return True, leaf
        cut = column.rfind(".", 0, cut)
    return False, None


# ---- parquet ------------------------------------------------------------------------------------------------------


def _parquet(stream: IO[bytes], column: str, prefix: str) -> Iterator[Item | Rejection]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    source = seekable(stream)  # parquet is read from its end
    try:
        table = pq.ParquetFile(source, page_checksum_verification=True)
        schema = table.schema_arrow
        path = _find_field(list(schema), column)
        if path is None:
            yield Rejection(prefix.removesuffix(": "), f"no column {column!r}; it has {_names(_leaves(list(schema)))}")
            return
        *_, field = path
        if not _holds_bytes(field.type):
            kind = " ".join(str(field.type).split())
            yield Rejection(
                prefix.removesuffix(": "), f"column {column!r}: expected string or binary, got {printable(kind)}"
            )
            return
        names = [field.name for field in path]
        for batch in table.iter_batches(_batch_rows(table, names), columns=[".".join(names)], use_threads=False):
            for value in _values(batch, names):
                where = f"{prefix}row {row}"
                yield Rejection(where, "null") if value is None else Item("", where, iter((value,)), len(value))
                row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"from row {row} on: cannot be read: {reason_of(error)}") from None


def _find_field(fields: Sequence[Any], column: str) -> list[Any] | None:
    """The fields from the schema down to a column, as `_look_up` finds them; then down to `bytes` in a struct."""
    import pyarrow as pa

    by_name = {field.name: field for field in reversed(fields)}

    def children(field: Any) -> list[Any]:
        return [field.type.field(i) for i in range(field.type.num_fields)] if pa.types.is_struct(field.type) else []

    if column in by_name:
        field = by_name[column]
        return [field, *(child for child in children(field) if child.name == "bytes")][:2]
    cut = column.rfind(".")
    while cut >= 0:
        if column[:cut] in by_name:
            field = by_name[column[:cut]]
            below = _find_field(children(field), column[cut + 1 :])
            if below is not None:
                return [field, *below]
        cut = column.rfind(".", 0, cut)
    return None


def _leaves(fields: Sequence[Any], prefix: str = "") -> list[str]:
    """Names of columns, with those in structs as one would ask for them."""
    import pyarrow as pa

    names = []
    for field in fields:
        name = prefix + field.name
        if pa.types.is_struct(field.type):
            names += _leaves([field.type.field(i) for i in range(field.type.num_fields)], f"{name}.")
        else:
            names.append(name)
    return names


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _batch_rows(table: Any, names: Sequence[str]) -> int:
    """Rows to read at a time, so that large values do not fill the memory: about 8 MiB by what the file says."""
    metadata = table.metadata
    size = rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows += group.num_rows
        for i in range(group.num_columns):
            chunk = group.column(i)
            if chunk.path_in_schema == ".".join(names):
                size += chunk.total_uncompressed_size
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * max(rows, 1) // max(size, 1)))


def _values(batch: Any, names: Sequence[str]) -> list[bytes | None]:
    """A batch's values; as binary: a string's bytes are its UTF-8, and need not be decoded."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = batch.column(batch.schema.names.index(names[0]))
    for name in names[1:]:
        array = pc.struct_field(array, [array.type.get_field_index(name)])
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    return array.cast(pa.large_binary()).to_pylist()
