"""The pieces that source files are taken apart into: archives, records and compressions, whole and damaged.

pytest tests/data_prep/test_items.py
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep import archives
from data_prep.archives import Member, read_tar, read_zip
from data_prep.items import Item, PassedOver, items
from data_prep.sources import READ_BYTES, Rejection, SourceFile, Unreadable

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
Members = list[tuple[str, bytes]]

names = st.text(st.sampled_from("abéü漢._- "), min_size=1, max_size=130).filter(lambda name: name[0] not in ". ")
members_strategy = st.lists(st.tuples(names, st.binary(max_size=700)), max_size=6)


def taken(path: Path, column: str = "text", wanted: Callable[[str], bool] = lambda name: True) -> list[Any]:
    """What a file is taken apart into: (name, where, content), or (where, reason) of what is rejected.

    It is used as `data_prep.stage` does: an item whose content cannot be read is rejected, and the next one asked for.
    """
    file = SourceFile(str(path), "label", path.name, path.stat().st_size, 0)
    found: list[Any] = []
    try:
        for item in items(file, column, wanted, lambda size: None):
            if isinstance(item, Item):
                try:
                    content = b"".join(item.chunks)
                except Unreadable as error:
                    found.append((item.where, str(error)))
                    continue
                assert item.size in (None, len(content))
                found.append((item.name, item.where, content))
            else:
                assert isinstance(item, Rejection | PassedOver)
                found.append((item.where, item.reason))
    except Unreadable as error:
        found.append(("", str(error)))
    for *_, where, last in found:
        assert where.isprintable()
        assert isinstance(last, bytes) or last.isprintable()
    return found


def tar_of(members: Members, format: int = tarfile.PAX_FORMAT, **attributes: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(members: Members, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def jsonl_of(values: list[bytes]) -> bytes:
    return b"".join(json.dumps({"text": value.decode("latin-1")}).encode() + b"\n" for value in values)


def parquet_of(values: list[bytes]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.table({"text": pa.array(values, pa.binary())})
    pq.write_table(table, buffer, row_group_size=3, write_page_checksum=True)
    return buffer.getvalue()


def from_bytes(content: bytes, name: str, **options: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return taken(path, **options)


# ---- round trips --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(members_strategy, st.sampled_from(list(PACK)), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_members_of_any_names_come_out_of_tars(members: Members, suffix: str, format: int) -> None:
    found = from_bytes(PACK[suffix](tar_of(members, format)), f"x.tar{suffix}")
    assert [(where, content) for _, where, content in found] == [
        (name.strip("/"), content) for name, content in members
    ]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(max_examples=40, deadline=None)
@given(members_strategy, st.sampled_from(list(PACK)), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_members_of_any_names_come_out_of_zips(members: Members, suffix: str, method: int) -> None:
    found = from_bytes(PACK[suffix](zip_of(members, method)), f"x.zip{suffix}")
    assert [(where, content) for _, where, content in found] == members


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8), st.sampled_from(list(PACK)))
def test_records_are_the_same_in_every_container(values: list[bytes], suffix: str) -> None:
    """As a file, and as a member of an archive."""
    lines, table = jsonl_of(values), parquet_of(values)
    found = from_bytes(PACK[suffix](lines), f"x.jsonl{suffix}")
    assert found == [("", f"line {n}", value.decode("latin-1").encode()) for n, value in enumerate(values, 1)]
    found = from_bytes(PACK[suffix](table), f"x.parquet{suffix}")
    assert found == [("", f"row {n}", value) for n, value in enumerate(values)]
    both = [(f"a/x.jsonl{suffix}", PACK[suffix](lines)), (f"b.parquet{suffix}", PACK[suffix](table))]
    inside = [("", f"a/x.jsonl{suffix}: line {n}", v.decode("latin-1").encode()) for n, v in enumerate(values, 1)]
    inside += [("", f"b.parquet{suffix}: row {n}", value) for n, value in enumerate(values)]
    assert from_bytes(tar_of(both), "x.tar", wanted=lambda name: False) == inside
    assert from_bytes(zip_of(both), "x.zip", wanted=lambda name: False) == inside


def test_one_compression_more_or_less_changes_the_name_alone() -> None:
    content = os.urandom(1000)
    for suffix, pack in PACK.items():
        assert from_bytes(pack(content), f"x.png{suffix}") == [("x.png", "", content)]
        assert from_bytes(tar_of([(f"a/x.png{suffix}", pack(content))]), "x.tgz.tar") == [
            ("x.png", f"a/x.png{suffix}", content)
        ]
    assert from_bytes(gzip.compress(tar_of([("a", content)])), "x.TGZ") == [("a", "a", content)]


@pytest.mark.parametrize("size", [READ_BYTES - 1, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES + 77])
def test_long_members_are_streamed_and_may_be_left_half_read(tmp_path: Path, size: int) -> None:
    members = [("long", os.urandom(size)), ("short", b"x")]
    for name, content in {
        "x.tar": tar_of(members),
        "x.tar.zst": PACK[".zst"](tar_of(members)),
        "x.zip": zip_of(members),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert [thing[1:] for thing in taken(path)] == members
        file = SourceFile(str(path), "", name, len(content), 0)
        places = []
        for item in items(file, "text", lambda name: True, lambda size: None):
            assert isinstance(item, Item)
            places.append(item.where)
            if name == "x.zip" or size > READ_BYTES:
                next(item.chunks)
        assert places == ["long", "short"]


def test_plain_files_are_marked_and_everything_else_is_not(tmp_path: Path) -> None:
    for name, content, plain in [("a", b"xyz", True), ("a.gz", gzip.compress(b"xyz"), False)]:
        (tmp_path / name).write_bytes(content)
        (item,) = items(SourceFile(str(tmp_path / name), "", name, len(content), 0), "", bool, lambda size: None)
        assert isinstance(item, Item)
        assert (item.name, item.where, item.plain, item.size) == ("a", "", plain, 3 if plain else None)
        assert b"".join(item.chunks) == b"xyz"


# ---- what is in archives besides files that are asked for ----------------------------------------------------------


def test_what_is_no_file_or_not_asked_for_is_told_and_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "a.png").write_bytes(b"one")
    (root / "folder" / "b.txt").write_bytes(b"two")
    (root / "folder" / ".c.png").write_bytes(b"three")
    os.link(root / "folder" / "a.png", root / "hard.png")
    (root / "soft.png").symlink_to("/etc/passwd")
    os.mkfifo(root / "pipe.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("folder", "hard.png", "soft.png", "pipe.png"):
            tar.add(root / name, f"./{name}")
    found = taken(tmp_path / "x.tar", wanted=lambda name: name.endswith(".png"))
    assert sorted(found, key=lambda thing: thing[0]) == sorted(
        [
            ("./folder/", "a folder"),
            ("a.png", "./folder/a.png", b"one"),
            ("./folder/b.txt", "not asked for"),
            ("./folder/.c.png", "hidden"),
            ("./hard.png", "a link"),
            ("./soft.png", "a link"),
            ("./pipe.png", "not a file"),
        ],
        key=lambda thing: thing[0],
    )
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.mkdir("folder")
        archive.writestr(link, "/etc/passwd")
    assert taken(tmp_path / "x.zip") == [("folder/", "a folder"), ("link", "a link")]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a/..", "..", "..\\x", "\\x", "a\0/../x", "a\0b"])
def test_names_that_lead_out_are_rejected_by_name(name: str) -> None:
    reason = "its name leads out of the archive; pack it again under a relative name"
    packed = {"x.tar": tar_of([("name", b"x")], pax_headers={"path": name}) + tar_of([("good", b"y")])}
    if "\0" not in name:  # Python's zipfile writes no such name; see the next test
        packed["x.zip"] = zip_of([(name, b"x"), ("good", b"y")])
    for file, content in packed.items():
        assert from_bytes(content, file) == [(name.replace("\0", "\\x00"), reason), ("good", "good", b"y")]


def test_a_zip_name_with_a_nul_is_rejected() -> None:
    content = zip_of([("a_b", b"x")]).replace(b"a_b", b"a\0b")
    ((where, reason),) = from_bytes(content, "x.zip")
    assert where == "a\\x00b"
    assert "leads out" in reason


def test_names_of_bytes_and_of_terminal_codes_are_shown_safely() -> None:
    for name in ("\udcff\udc80.txt", "\x1b[31mred", "a\nb", "x" * 900):
        (thing,) = from_bytes(tar_of([(name, b"x")]), "x.tar")
        assert thing[2] == b"x"
        assert thing[1].isprintable()
        assert len(thing[1]) <= 400


def test_an_archive_in_an_archive_is_rejected() -> None:
    inner = tar_of([("x", b"1")])
    found = from_bytes(zip_of([("in.tar", inner), ("in.tgz", gzip.compress(inner)), ("y", b"2")]), "x.zip")
    reason = "an archive in an archive; unpack the outer one first"
    assert found == [("in.tar", reason), ("in.tgz", reason), ("y", "y", b"2")]


def test_tars_one_after_the_other_are_one_and_what_else_follows_is_told() -> None:
    one, two = tar_of([("a", b"1")]), tar_of([("b", b"2")])
    assert from_bytes(one + two, "x.tar") == [("a", "a", b"1"), ("b", "b", b"2")]
    (_, (where, reason)) = from_bytes(one + b"surprise", "x.tar")
    assert (where, reason) == ("", "after a: cannot be read: something other than a tar follows its end mark")
    (_, (_, reason)) = from_bytes(one + b"surprise" * 100, "x.tar")
    assert reason == "after a: cannot be read: damaged, or not a tar"


# ---- sparse files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", ["--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"]
)
def test_sparse_files_of_gnu_tar(tmp_path: Path, options: str) -> None:
    if b"GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True, check=False).stdout:
        pytest.skip("needs GNU tar")
    contents = {}
    for name, places in {
        "few": [0, 300_000],
        "many": [n * 50_000 + 8192 for n in range(60)],
        "end": [],
        "after": [0],
    }.items():
        with open(tmp_path / name, "wb") as out:
            for place in places:
                out.seek(place)
                out.write(os.urandom(4096))
            out.truncate(4_000_000 if name != "after" else 4096)
        contents[name] = (tmp_path / name).read_bytes()
    command = ["tar", "-cSf", "x.tar", "--hole-detection=raw", options, *contents]
    if "version" in options:
        command.insert(1, "--format=pax")
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "x.tar").stat().st_size < 1_000_000
    assert {where: content for _, where, content in taken(tmp_path / "x.tar")} == contents


def pax_sparse(size: int, pairs: list[tuple[int, int]], stored: bytes) -> bytes:
    flat = ",".join(str(number) for pair in pairs for number in pair)
    headers = {"GNU.sparse.map": flat, "GNU.sparse.size": str(size), "GNU.sparse.name": "hole"}
    return tar_of([("GNUSparseFile.0/hole", stored), ("after", b"y")], pax_headers=headers)


def test_sparse_maps_that_lie_are_rejected_and_the_archive_goes_on() -> None:
    good = from_bytes(pax_sparse(9, [(1, 2), (5, 1)], b"abc"), "x.tar")[0]
    assert good == ("hole", "hole", b"\0ab\0\0c\0\0\0")
    wrong = [(9, [(5, 1), (1, 2)]), (9, [(1, 2), (5, 2)]), (4, [(1, 2), (5, 1)]), (9, [(1, 2)])]
    for size, pairs in wrong:
        bad, _ = from_bytes(pax_sparse(size, pairs, b"abc"), "x.tar")
        assert bad == ("hole", "a sparse file whose map is damaged")
    bad, _ = from_bytes(pax_sparse(2**50, [(1, 2), (5, 1)], b"abc"), "x.tar")
    assert bad == ("hole", f"a bomb: {2**50} bytes in 3; leave it out")


# ---- damage -------------------------------------------------------------------------------------------------------

SMALL = [
    ("a.txt", b"first " * 40),
    ("b" * 120, os.urandom(600)),
    ("c.jsonl", jsonl_of([b"one", b"two"])),
    ("d", b"last"),
]


@pytest.mark.parametrize("suffix", PACK)
def test_a_tar_that_is_cut_off_anywhere_keeps_what_came_before(suffix: str) -> None:
    packed = PACK[suffix](tar_of(SMALL))
    whole = from_bytes(packed, f"x.tar{suffix}")
    assert len(whole) == 5
    marked = tar_of(SMALL).rindex(b"last") + 1024  # the end mark's first block is whole
    for cut in range(0, len(packed), 1 if suffix else 7):
        found = from_bytes(packed[:cut], f"x.tar{suffix}")
        if not suffix and cut >= marked:
            assert found == whole
            continue
        *before, (where, reason) = found
        assert before == whole[: len(before)]
        place, colon, _ = reason.rpartition("cannot be read: ")
        assert (where, colon) == ("", "cannot be read: ")
        places = [thing[1].partition(": line")[0] for thing in whole]
        after = f"after {places[len(before) - 1]}: " if before else ""
        assert place in [after, *(f"in {name}: " for name in places[len(before) : len(before) + 1])]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_that_is_cut_off_anywhere_is_rejected_whole(method: int) -> None:
    """Even one that ends with a whole zip, which it holds."""
    packed = zip_of([*SMALL, ("inner.zip", zip_of(SMALL)), ("empty.zip", zip_of([]))], method)
    for cut in range(len(packed)):
        ((where, reason),) = from_bytes(packed[:cut], "x.zip")
        assert where == ""
        assert reason.startswith("cannot be read: not a whole zip"), cut


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_byte_in_a_zip_never_changes_content(data: st.DataObject) -> None:
    packed = bytearray(zip_of(SMALL))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    contents = {content for _, content in SMALL} | {b"one", b"two"}
    assert {thing[2] for thing in from_bytes(bytes(packed), "x.zip") if len(thing) == 3} <= contents


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_byte_in_a_tar_header_is_noticed(data: st.DataObject) -> None:
    packed = bytearray(tar_of(SMALL, tarfile.GNU_FORMAT))
    whole = from_bytes(bytes(packed), "x.tar")
    place = packed.rindex(b"last") - 512
    position = place + data.draw(st.integers(0, 511))
    packed[position] ^= 1 << data.draw(st.integers(0, 7))
    found = from_bytes(bytes(packed), "x.tar")
    # blanks and NULs around the checksum are all that is not summed
    assert found == whole or found == [*whole[:-1], ("", "after c.jsonl: cannot be read: damaged, or not a tar")]
    assert found != whole or 148 <= position - place < 156


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["x.tar", "x.zip", "x.parquet", "x.jsonl", "x.ndjson"]),
    st.sampled_from(list(PACK)),
    st.binary(max_size=2000),
    st.booleans(),
)
@example("x.tar", "", bytes(512), False)
@example("x.zip", "", b"PK\5\6" + bytes(18), False)
@example("x.parquet", "", b"PAR1PAR1", False)
def test_random_bytes_are_never_more_than_unreadable(name: str, suffix: str, content: bytes, packed: bool) -> None:
    found = from_bytes(PACK[suffix](content) if packed else content, name + suffix)
    assert all(len(thing) == 2 for thing in found)


def test_sizes_that_lie_never_loop() -> None:
    """In a tar's header, its pax records and the headers of headers: huge, negative and no number."""
    start = tar_of([("a", b"x")])[:1024]

    def header(**fields: tuple[int, bytes]) -> bytes:
        block = bytearray(tarfile.TarInfo("b").tobuf(tarfile.GNU_FORMAT))
        for place, field in fields.values():
            block[place : place + len(field)] = field
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    lies = [
        header(size=(124, b"77777777777\0")),
        header(size=(124, b"\x80" + b"\xff" * 11)),
        header(size=(124, b"\xff" * 12)),
        header(size=(124, b"-1         \0")),
        header(size=(124, b"1_000      \0")),
        header(size=(124, b"99999999999\0")),
        header(size=(124, b"77777777777\0"), kind=(156, b"x")),
        header(size=(124, b"77777777777\0"), kind=(156, b"L")),
        tar_of([("b", b"")], pax_headers={"size": "-512"})[:-9000],
        tar_of([("b", b"")], pax_headers={"size": "9" * 30})[:-9000],
    ]
    for lie in lies:
        first, (where, reason) = from_bytes(start + lie + bytes(1024), "x.tar")
        assert first == ("a", "a", b"x")
        assert where in ("", "b")
        assert "cannot be read" in reason
    for record in (
        b"999999999 path=x\n",
        b"0 path=x\n",
        b"-3 path=x\n",
        b"11 pathxxx\n",
        b"x path=x\n",
        b"12 path=x\n\n",
    ):
        content = start + header(size=(124, b"%011o\0" % len(record)), kind=(156, b"x")) + record.ljust(512, b"\0")
        _, (_, reason) = from_bytes(content + tar_of([("b", b"y")]), "x.tar")
        assert reason == "after a: cannot be read: a damaged header", record


def test_a_zip_bomb_is_rejected_before_it_is_unpacked() -> None:
    packed = zip_of([("zeros", bytes(123456)), ("good", b"x")])
    size = (123456).to_bytes(4, "little")
    assert packed.count(size) == 2  # in the member's header and in the directory
    lying = packed.replace(size, (2**32 - 2).to_bytes(4, "little"))
    bad, good = from_bytes(lying, "x.zip")
    assert bad[0] == "zeros"
    assert bad[1].startswith(f"a bomb: {2**32 - 2} bytes in ")
    assert good == ("good", "good", b"x")


def test_many_members_that_make_a_bomb_together_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each unpacks to 1000 times its size, less one, from bytes that they share."""
    monkeypatch.setattr(archives, "_BOMB_BYTES", 10_000)
    monkeypatch.setattr(archives, "_BOMB_RATIO", 20)
    packed = zip_of([(f"{n}", bytes(1000)) for n in range(300)])
    assert len(packed) * 20 > 300_000 > 10_000
    assert len(from_bytes(packed, "x.zip")) == 300
    monkeypatch.setattr(archives, "_BOMB_RATIO", 2)
    found = from_bytes(zip_of([(f"{n}", os.urandom(1000)) for n in range(300)]), "x.zip")
    assert len(found) == 300
    found = from_bytes(packed, "x.zip")
    assert 0 < len(found) < 300


def test_damaged_encrypted_and_unknown_members_of_a_zip_are_rejected_and_the_rest_is_read() -> None:
    members = [("one", b"1" * 50), ("two", b"2" * 50), ("three", b"3" * 50)]
    packed = zip_of(members, zipfile.ZIP_STORED)
    (where, reason), *rest = from_bytes(packed.replace(b"11111", b"11112"), "x.zip")
    assert where == "one"
    assert "CRC" in reason
    assert [thing[2] for thing in rest] == [b"2" * 50, b"3" * 50]
    for place, value, word in [(8, 1, "encrypted"), (10, 99, "compression")]:  # in the directory's entry
        changed = bytearray(packed)
        changed[packed.index(b"PK\1\2") + place] = value
        (where, reason), *rest = from_bytes(bytes(changed), "x.zip")
        assert where == "one"
        assert word in reason
        assert len(rest) == 2
    assert zlib.crc32(b"1") != 0


def test_a_damaged_member_of_a_tar_does_not_end_the_archive() -> None:
    broken = gzip.compress(jsonl_of([b"one", b"two"]))[:-3]
    found = from_bytes(
        tar_of([("x.jsonl.gz", broken), ("y.gz", b"no gzip"), ("z.parquet", b"no"), ("w", b"good")]), "x.tar"
    )
    assert [thing[0] for thing in found if len(thing) == 2] == ["x.jsonl.gz", "y.gz", "z.parquet"]
    assert found[-1] == ("w", "w", b"good")


# ---- columns ------------------------------------------------------------------------------------------------------


def json_column(record: object, column: str) -> Any:
    (thing,) = from_bytes(json.dumps(record).encode(), "x.jsonl", column=column)
    return thing[-1]


def test_nested_names_in_json_lines() -> None:
    record = {"a": {"b": {"c": "deep"}, "b.c": "literal"}, "x.y": {"z": "half"}, "n": None, "l": [{"b": "no"}]}
    assert json_column(record, "a.b.c") == b"literal"
    assert json_column(record, "x.y.z") == b"half"
    assert json_column({**record, "a.b.c": "top"}, "a.b.c") == b"top"
    assert json_column({"a": {"b": {"c": "deep"}}}, "a.b.c") == b"deep"
    assert json_column({"a": 3, "a.b": {"c": "x"}}, "a.b.c") == b"x"
    assert json_column(record, "a.b.d") == "no key 'a.b.d'; it has a, x.y, n, l"
    assert json_column(record, "n") == "key 'n': expected a string, got null"
    assert json_column(record, "a.b") == "key 'a.b': expected a string, got dict"
    assert json_column(record, "l.b").startswith("no key")
    assert json_column({}, ".").startswith("no key '.'; it has none")


def parquet_columns(data: dict[str, Any], column: str) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(data), buffer)
    return [thing[-1] for thing in from_bytes(buffer.getvalue(), "x.parquet", column=column)]


def test_nested_names_and_kinds_in_parquet() -> None:
    import pyarrow as pa

    rows = [{"b": {"c": "deep"}, "n": 1}, {"b": None, "n": 2}, None]
    data = {
        "a": rows,
        "a.b": [{"c": "half"}] * 3,
        "image": [{"bytes": b"\xff", "path": "p"}, None, {"bytes": None, "path": ""}],
    }
    assert parquet_columns(data, "a.b.c") == [b"half"] * 3
    assert parquet_columns({"a": rows, "z": ["x"] * 3}, "a.b.c") == [b"deep", "null", "null"]
    assert parquet_columns(data, "image") == parquet_columns(data, "image.bytes") == [b"\xff", "null", "null"]
    assert parquet_columns(data, "image.path") == [b"p", "null", b""]
    assert parquet_columns(data, "gone") == ["no column 'gone'; it has a.b.c, a.n, a.b.c, image.bytes, image.path"]
    (reason,) = parquet_columns(data, "a")
    assert reason.startswith("column 'a': expected string or binary, got struct<b: struct<c: string>, n: int64>")
    for array in (
        pa.array(["x", "y"]).dictionary_encode(),
        pa.array([b"x", b"y"], pa.binary(1)),
        pa.array(["x", "y"], pa.large_string()),
    ):
        assert parquet_columns({"text": array}, "text") == [b"x", b"y"]
    assert parquet_columns({"text": [["x"]]}, "text")[0].startswith(
        "column 'text': expected string or binary, got list<"
    )


def test_a_line_that_is_too_long_is_rejected_and_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.items._LINE_BYTES", 30)
    lines = [b'{"text": "1"}', b'{"text": "' + b"x" * 100 + b'"}', b'{"text": "3"}', b'{"text": "' + b"y" * 18 + b'"}']
    found = from_bytes(b"\n".join(lines), "x.jsonl")
    assert found == [
        ("", "line 1", b"1"),
        ("line 2", "longer than 30 bytes"),
        ("", "line 3", b"3"),
        ("line 4", "longer than 30 bytes"),
    ]


def test_readers_of_archives_yield_members_alone_for_sound_archives() -> None:
    assert [m.path for m in read_tar(io.BytesIO(tar_of(SMALL))) if isinstance(m, Member)] == [n for n, _ in SMALL]
    assert [m.path for m in read_zip(io.BytesIO(zip_of(SMALL))) if isinstance(m, Member)] == [n for n, _ in SMALL]
