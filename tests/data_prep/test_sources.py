"""Which files are read, in which order, from the disk and from the network, and how they are opened.

pytest tests/data_prep/test_sources.py
"""

import bz2
import gzip
import hashlib
import http.server
import json
import lzma
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from data_prep import remote
from data_prep.items import Item, items
from data_prep.sources import (
    Modality,
    SourceFile,
    Unreadable,
    check_unchanged,
    container,
    digest,
    find_files,
    source_labels,
    uncompressed,
)
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


def documents(path: Path | SourceFile, column: str = "text") -> list[bytes | str]:
    """Documents (bytes) and reasons (str) of a file."""
    file = path
    if isinstance(file, Path):
        file = SourceFile(str(file), "label", file.name, file.stat().st_size, 0)
    found: list[bytes | str] = []
    try:
        for item in items(file, column, bool, lambda size: None):
            found.append(b"".join(item.chunks) if isinstance(item, Item) else f"{item.where}: {item.reason}")
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
    sources = ["a/wiki/", "b/wiki", "python3.11", "books.jsonl.zst", "enwik8.xz", "my notes.txt", "x.tar", "y.tgz"]
    labels = ["wiki", "wiki-2", "python3.11", "books", "enwik8", "my_notes", "x", "y"]
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


# ---- by modality --------------------------------------------------------------------------------------------------

PICTURES = Modality("image", lambda item: iter(()), "image", (".png", ".jpg"))


def test_files_of_another_modality_are_passed_over_unless_they_are_asked_for(tmp_path: Path) -> None:
    containers = ["r.jsonl", "r.ndjson.xz", "s.parquet", "t.tar", "t.tar.zst", "t.tgz", "u.zip.gz"]
    touch(tmp_path, "a.PNG", "b/c.jpg.gz", "readme.md", "x.wav", "png", *containers)
    found = find_files([str(tmp_path)], (), (), tmp_path / "out", PICTURES)
    assert [file.name for file in found.files] == ["a.PNG", "b/c.jpg.gz", *containers]
    assert found.skipped == {"not image files": 3}
    found = find_files([str(tmp_path)], ("*.md", "x.*"), (), tmp_path / "out", PICTURES)
    assert [file.name for file in found.files] == ["readme.md", "x.wav"]
    found = find_files([str(tmp_path / "readme.md")], (), (), tmp_path / "out", PICTURES)
    assert [file.name for file in found.files] == ["readme.md"]


def test_what_a_name_says() -> None:
    assert [uncompressed(name) for name in ("a.png.GZ", "a.png", "x.tgz", ".gz", "a/b.zst")] == [
        "a.png",
        "a.png",
        "x.tar",
        ".gz",
        "a/b",
    ]
    kinds = {"x.tgz": ".tar", "x.NDJSON.xz": ".jsonl", "x.zip": ".zip", "x.parquet.zst": ".parquet", "x.txt.gz": ""}
    assert {name: container(name) for name in kinds} == kinds


# ---- remote -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket() -> Iterator[str]:
    """An empty folder of fsspec's file system in memory."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.makedirs("/bucket/data", exist_ok=True)
    yield "memory://bucket/data"
    system.rm("/bucket", recursive=True)


def put(url: str, content: bytes) -> None:
    import fsspec

    with fsspec.open(url, "wb") as file:
        file.write(content)


def find(*sources: str, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[SourceFile]:
    return find_files(sources, include, exclude, Path("no such folder")).files


def test_a_remote_folder_is_as_one_on_disk(bucket: str, tmp_path: Path) -> None:
    tree = ["b/x", "a.b", "a/z", "a/b/c", "a-b", ".hidden/x", "a/.d", "tests/e", "é", "with space#?%20"]
    for name in tree:
        put(f"{bucket}/{name}", name.encode() * 3)
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(name.encode() * 3)
    for patterns in ({}, {"include": ("a*",)}, {"exclude": ("tests", "a/b/**")}, {"include": ("a/**",)}):
        there, here = find(bucket, **patterns), find(str(tmp_path / "data"), **patterns)
        assert [(f.label, f.name, f.size) for f in there] == [(f.label, f.name, f.size) for f in here]
        assert digest(there) == digest(here)
        assert [documents(file) for file in there] == [documents(file) for file in here]
    assert find(f"file://{tmp_path}/data") == find(str(tmp_path / "data"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet", "x.tar.zst", "x.zip", "x.bin"])
def test_remote_files_of_every_kind(bucket: str, tmp_path: Path, name: str) -> None:
    write_sample(tmp_path / name)
    put(f"{bucket}/{name}", (tmp_path / name).read_bytes())
    (file,) = find(f"{bucket}/{name}")
    assert (file.label, file.name, file.size) == (
        "x" if name != "x.bin" else "x.bin",
        name,
        (tmp_path / name).stat().st_size,
    )
    assert documents(file) == documents(tmp_path / name) != []
    (item, *_) = items(file, "text", bool, lambda size: None)
    assert isinstance(item, Item)
    assert not item.plain


def write_sample(path: Path) -> None:
    """A file with two documents, of the kind that its name says."""
    import tarfile
    import zipfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = b'{"text": "one"}\n{"text": "two"}\n'
    if path.name == "x.parquet":
        pq.write_table(pa.table({"text": ["one", "two"]}), path)
    elif path.name == "x.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "one")
            archive.writestr("b", "two")
    elif path.name == "x.tar.zst":
        (path.parent / "a").write_bytes(b"one")
        with tarfile.open(path.parent / "x.tar", "w") as tar:
            tar.add(path.parent / "a", "a")
            tar.add(path.parent / "a", "b")
        path.write_bytes(PACK[".zst"]((path.parent / "x.tar").read_bytes()))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def test_a_remote_file_that_changes_is_noticed(bucket: str) -> None:
    put(f"{bucket}/x", b"one")
    (file,) = find(bucket)
    check_unchanged(file)
    put(f"{bucket}/x", b"two")
    with pytest.raises(DataError, match="x: changed since the start"):
        check_unchanged(file)
    put(f"{bucket}/y", b"")
    os_removed(f"{bucket}/x")
    with pytest.raises(DataError, match="x: no such file or folder"):
        check_unchanged(file)


def os_removed(url: str) -> None:
    import fsspec

    fsspec.filesystem("memory").rm(url)


def test_only_known_protocols_are_followed_and_none_inside_another(tmp_path: Path) -> None:
    for source, word in [
        ("ssh://host/x", "expected a path or one of s3://"),
        ("pipe://cat x", "expected a path or one of"),
        ("zip://a::memory://b.zip", "one inside another"),
        ("simplecache::https://host/x", "one inside another"),
        ("github://a:b@c/d", "expected a path or one of"),
        ("memory://nothing/there", "no such file or folder"),
        ("pipe:touch x", "cannot be read: No such file or directory"),
        ("|touch x", "cannot be read"),
    ]:
        with pytest.raises(DataError, match=word) as caught:
            find(source)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("protocol", "extra"), [("s3", r"mbtrain\[s3\]"), ("gs", r"mbtrain\[gcs\]"), ("abfs", "adlfs")]
)
def test_a_missing_package_is_named(protocol: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{protocol}://b/x: a package is missing .*pip install '{extra}'"):
        find(f"{protocol}://b/x")


class Server:
    """A web server on this machine that serves `files`, as `how` says; `requests` is what it was asked.

    how: ranges | whole (no ranges) | unsized (no ranges, no length) | cutting (ranges; every third answer breaks off)
    """

    def __init__(self, how: str) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.status = 0
        self.how = how
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1" if how != "unsized" else "HTTP/1.0"

            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, with_body: bool) -> None:
                asked = self.headers.get("Range", "")
                server.requests.append((self.command, self.path, asked))
                body = server.files.get(self.path.partition("?")[0])
                status = server.status or (200 if body is not None else 404)
                if body is None or server.status:
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                tag, total = hashlib.sha256(body).hexdigest(), len(body)
                if asked and how in ("ranges", "cutting"):
                    start, end = (int(text) for text in asked.removeprefix("bytes=").split("-"))
                    body, status = body[start : end + 1], 206
                self.send_response(status)
                self.send_header("ETag", tag)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
                if how != "unsized":
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body and how == "cutting" and len(server.requests) % 3 and len(body) > 1000:
                    self.wfile.write(body[: len(body) // 3])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                elif with_body:
                    self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, address: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "_WAITS_S", (0.0,) * 6)
    opened = Server(request.param)
    yield opened
    opened.close()


@pytest.mark.parametrize("server", ["ranges", "whole", "unsized", "cutting"], indirect=True)
@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.parquet", "x.tar.zst", "x.zip", "x.bin"])
def test_files_of_the_web_are_read_as_those_on_disk(server: Server, tmp_path: Path, name: str) -> None:
    write_sample(tmp_path / name)
    server.files[f"/a/{name}"] = (tmp_path / name).read_bytes()
    (file,) = find(f"{server.url}/a/{name}?token=secret")
    assert (file.label, file.name) == (source_labels([str(tmp_path / name)])[0], name)
    assert file.size == (0 if server.how == "unsized" else len(server.files[f"/a/{name}"]))
    assert documents(file) == documents(tmp_path / name) != []
    check_unchanged(file)
    server.files[f"/a/{name}"] += b"x"
    with pytest.raises(DataError, match="changed since the start") as caught:
        check_unchanged(file)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("server", ["ranges", "whole", "unsized", "cutting"], indirect=True)
def test_a_long_file_of_the_web_comes_whole_though_the_network_fails(server: Server) -> None:
    content = os.urandom(3_000_000)
    server.files["/x"] = content
    (file,) = find(f"{server.url}/x")
    counted: list[int] = []
    (item,) = items(file, "text", bool, counted.append)
    assert isinstance(item, Item)
    assert b"".join(item.chunks) == content
    assert sum(counted) == len(content)


@pytest.mark.parametrize("server", ["ranges"], indirect=True)
def test_a_network_that_stays_away_stops_the_job_and_rejects_nothing(server: Server) -> None:
    server.files["/x.jsonl"] = b'{"text": "one"}\n' * 10
    (file,) = find(f"{server.url}/x.jsonl")
    server.status = 503
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read at byte 0 .*run the same command again"):
        documents(file)
    server.status = 403
    with pytest.raises(DataError, match="no right to read it"):
        documents(file)
    server.status = 0
    assert documents(file) == [b"one"] * 10
    del server.files["/x.jsonl"]
    with pytest.raises(DataError, match="no such file"):
        documents(file)
    with pytest.raises(DataError, match="run the same command again"):
        find("http://127.0.0.1:1/x")
