"""Which files are read, in which order, and how documents come out of them.

pytest tests/data_prep/test_sources.py
"""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_prep.sources import Rejection, SourceFile, Unreadable, find_files, source_labels
from data_prep.text import text_modality
from mbtrain.errors import ConfigError, DataError

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def names(root: Path, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
    return [file.name for file in find_files([str(root)], include, exclude, root / "out").files]


def documents(path: Path, column: str = "text") -> list[bytes | str]:
    """Documents (bytes) and reasons (str) of a file."""
    file = SourceFile(str(path), "label", path.name, path.stat().st_size, 0)
    found: list[bytes | str] = []
    try:
        for item in text_modality(column).samples(file, lambda size: None):
            found.append(f"{item.where}: {item.reason}" if isinstance(item, Rejection) else b"".join(item.chunks))
    except Unreadable as error:
        found.append(str(error))
    return found


def test_files_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    touch(tmp_path, "b/x", "a.b", "a/z", "a/b/c", "a-b", "B", "é")
    assert names(tmp_path) == sorted(["b/x", "a.b", "a/z", "a/b/c", "a-b", "B", "é"], key=os.fsencode)


def test_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "a.py", "src/b.py", "src/deep/c.py", "src/d.txt", "tests/e.py", "src/tests/f.py")
    everything = ["a.py", "src/b.py", "src/deep/c.py", "src/tests/f.py", "tests/e.py"]
    assert names(tmp_path, ("*.py",)) == everything
    assert names(tmp_path, ("**/*.py",)) == everything
    assert names(tmp_path, ("src/*.py",)) == ["src/b.py"]
    assert names(tmp_path, ("src/**/*.py",)) == ["src/b.py", "src/deep/c.py", "src/tests/f.py"]
    assert names(tmp_path, ("*.py",), ("tests",)) == ["a.py", "src/b.py", "src/deep/c.py"]
    assert names(tmp_path, ("*.py",), ("tests/**",)) == ["a.py", "src/b.py", "src/deep/c.py", "src/tests/f.py"]
    assert names(tmp_path, ("[!a].py", "?.txt")) == [
        "src/b.py",
        "src/d.txt",
        "src/deep/c.py",
        "src/tests/f.py",
        "tests/e.py",
    ]
    with pytest.raises(DataError, match=r"no file to read \(passed over: 6 not matching"):
        names(tmp_path, ("*.rs",))
    with pytest.raises(ConfigError, match=r"expected a pattern .* got '\[z-a\]'"):
        names(tmp_path, ("[z-a]",))


def test_hidden_names_loops_and_the_output_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a/b", ".git/c", "a/.d", "out/train/train-000000.tar")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "other").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    found = find_files([str(tmp_path)], (), (), tmp_path / "out")
    assert [file.name for file in found.files] == ["a/b", "other/b"]
    assert found.skipped == {"hidden": 3, "link loops": 2, "not files": 4}


def test_a_source_that_is_missing_or_no_file_is_an_error(tmp_path: Path) -> None:
    for source in (str(tmp_path / "gone"), "/dev/null"):
        with pytest.raises(DataError, match=source):
            find_files([source], (), (), tmp_path / "out")


def test_labels_are_short_and_distinct(tmp_path: Path) -> None:
    for folder in ("a/wiki", "b/wiki", "python3.11"):
        (tmp_path / folder).mkdir(parents=True)
    sources = ["a/wiki/", "b/wiki", "python3.11", "books.jsonl.zst", "enwik8.xz", "my notes.txt", "x.tar"]
    labels = ["wiki", "wiki-2", "python3.11", "books", "enwik8", "my_notes", "x.tar"]
    assert source_labels([str(tmp_path / source) for source in sources]) == labels


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_are_unpacked(tmp_path: Path, suffix: str) -> None:
    content = os.urandom(300_000) + bytes(2_000_000)
    path = tmp_path / f"x.bin{suffix}"
    path.write_bytes(PACK[suffix](content[:999]) + PACK[suffix](content[999:]))  # two streams, as parallel packers make
    assert documents(path) == [content]


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_that_are_damaged_say_so(tmp_path: Path, suffix: str) -> None:
    packed = PACK[suffix](os.urandom(300_000))
    path = tmp_path / f"x{suffix}"
    for content in (packed[:-20], b"no such thing", packed[:5000] + b"damage" + packed[5006:]):
        path.write_bytes(content)
        (reason,) = documents(path)
        assert str(reason).startswith("cannot be read: ")


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "first"}',
        '{"text": "zwölf \\u00e9 \\ud83d\\ude00"}'.encode(),
        b"",
        b'{"text": "a\\nb\\u0000"}\r',
        b"{broken",
        b'{"other": 1}',
        b'{"text": 3}',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": ""}',
        b'{"text": "last"}',
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = documents(path)
    assert [d for d in found if isinstance(d, bytes)] == [b"first", "zwölf é 😀".encode(), b"a\nb\0", b"", b"last"]
    reasons = [d for d in found if isinstance(d, str)]
    assert [reason.partition(":")[0] for reason in reasons] == [f"line {n}" for n in (5, 6, 7, 8, 9, 10, 11)]
    words = [
        "not JSON",
        "no key 'text'",
        "expected a string, got int",
        "expected a JSON object",
        "not JSON",
        "surrogate",
    ]
    assert all(word in reason for word, reason in zip(words, reasons, strict=False))


def test_compressed_json_lines_keep_what_came_before_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.ndjson.gz"
    text = "".join(json.dumps({"text": os.urandom(50).hex()}) + "\n" for _ in range(5000))
    path.write_bytes(gzip.compress(text.encode())[:-2000])
    *found, reason = documents(path)
    assert len(found) > 4000
    assert all(isinstance(document, bytes) for document in found)
    assert isinstance(reason, str)
    assert reason.startswith(f"after line {len(found)}: cannot be read")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = ["one", None, "zwei", ""]
    expected = [b"one", "row 1: null", b"zwei", b""]
    for kind in (pa.string(), pa.large_string(), pa.binary()):
        pq.write_table(pa.table({"content": pa.array(values, kind), "id": [1, 2, 3, 4]}), tmp_path / "x.parquet")
        assert documents(tmp_path / "x.parquet", "content") == expected
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress((tmp_path / "x.parquet").read_bytes()))
    assert documents(tmp_path / "x.parquet.gz", "content") == expected
    assert documents(tmp_path / "x.parquet", "text") == [": no column 'text'; it has content, id"]
    assert documents(tmp_path / "x.parquet", "id") == [": column 'id': expected string or binary, got int64"]
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    (reason,) = documents(tmp_path / "x.parquet")
    assert "cannot be read" in str(reason)
    assert "\n" not in str(reason)
