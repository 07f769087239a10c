"""RUN/metrics.jsonl: what is read is what was written, whatever moment the writer was killed at."""

import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain import metrics
from mbtrain.errors import DataError

keys = st.text(min_size=1, max_size=20).filter(lambda key: key not in ("step", "time_unix_s"))
numbers = st.floats() | st.integers(min_value=-(10**30), max_value=10**30)
values = st.dictionaries(keys, numbers, max_size=4)
runs = st.lists(values, min_size=1, max_size=6)


def write(path: Path, run: list[dict[str, float]]) -> list[dict[str, float]]:
    path.unlink(missing_ok=True)
    for step, line in enumerate(run, start=1):
        metrics.append(path, step, line)
    return [{"step": step, **line} for step, line in enumerate(run, start=1)]


def same(got: list[dict[str, float]], expected: list[dict[str, float]]) -> bool:
    """Equal, with nan equal to nan; the time of writing does not count."""
    return [{k: repr(v) for k, v in line.items() if k != "time_unix_s"} for line in got] == [
        {k: repr(v) for k, v in line.items()} for line in expected
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics") / "metrics.jsonl"


@given(run=runs)
@settings(deadline=None, max_examples=60)
def test_what_was_appended_is_read(path: Path, run: list[dict[str, float]]) -> None:
    expected = write(path, run)
    assert same(metrics.read(path), expected)
    assert same([metrics.last(path) or {}], expected[-1:])
    with metrics.Tail(path) as tail:
        assert same(tail.read(), expected)
        assert tail.read() == []


@given(run=runs)
@settings(deadline=None, max_examples=60)
def test_any_json_reader_can_read_it(path: Path, run: list[dict[str, float]]) -> None:
    write(path, run)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@given(run=runs, data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_last_line_cut_anywhere_never_happened(path: Path, run: list[dict[str, float]], data: st.DataObject) -> None:
    expected = write(path, run)
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    # Drawn without looking at the file: times are as long as the clock makes them.
    path.write_bytes(whole[: start + data.draw(st.integers(-200, 200)) % (len(whole) - start)])
    assert same(metrics.read(path), expected[:-1])
    assert same([metrics.last(path) or {}], expected[:-1][-1:] or [{}])
    with metrics.Tail(path) as tail:
        assert same(tail.read(), expected[:-1])
        metrics.append(path, 99, {"a": 1.0})
        assert same(tail.read(), [{"step": 99, "a": 1.0}])
    assert same(metrics.read(path), [*expected[:-1], {"step": 99, "a": 1.0}])


@given(run=runs, step=st.integers(0, 7), cut=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_truncate_keeps_exactly_the_steps_up_to_it(
    path: Path, run: list[dict[str, float]], step: int, cut: int
) -> None:
    expected = write(path, run)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
        expected.pop()
    kept = [line for line in expected if line["step"] <= step]
    assert metrics.truncate_after(path, step) == len(expected) - len(kept)
    assert same(metrics.read(path), kept)
    assert path.read_bytes()[-1:] in (b"", b"\n")
    assert os.listdir(path.parent) == [path.name]


def test_append_says_when(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, 1, {"a": 1.0})
    metrics.append(path, 2, {"a": 1.0, "time_unix_s": 12.5})
    first, second = metrics.read(path)
    assert first["time_unix_s"] > 1.7e9
    assert second["time_unix_s"] == 12.5


def test_integers_stay_exact(tmp_path: Path) -> None:
    metrics.append(tmp_path / "m", 1, {"progress/flops": 10**24 + 1})
    assert metrics.read(tmp_path / "m")[0]["progress/flops"] == 10**24 + 1


@pytest.mark.parametrize("bad", [{"step": 1.0}, {"a": "text"}])
def test_append_refuses_what_is_no_metric(tmp_path: Path, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"step|float"):
        metrics.append(tmp_path / "m", 1, bad)
    assert not (tmp_path / "m").exists()


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, 1, {"a": 1.0})
    before = path.read_bytes()
    write_all = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write_all(fd, data[:7]))
    with pytest.raises(OSError, match="disk full"):
        metrics.append(path, 2, {"a": 1.0})
    assert path.read_bytes() == before


@pytest.mark.parametrize("bad", [b"{", b"[1]", b'{"a": 1}', b'{"step": 1.5}', b"\x00\x00", b"\xff"])
@pytest.mark.parametrize("function", [metrics.read, metrics.last, lambda path: metrics.truncate_after(path, 1)])
def test_only_the_last_line_may_be_broken(tmp_path: Path, bad: bytes, function) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "a": 2}\n'
    path.write_bytes(good + bad + b"\n")  # a whole line, but damaged: a machine that lost its power
    function(path)
    assert metrics.read(path) == [{"step": 1, "a": 2}]
    path.write_bytes(good + bad + b"\n" + good)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        function(path)
    path.write_bytes(good + bad + b"\n" + good[:5])
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        function(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        metrics.read(tmp_path / "m")
    assert metrics.last(tmp_path / "m") is None
    assert metrics.truncate_after(tmp_path / "m", 3) == 0
    assert metrics.Tail(tmp_path / "m").read() == []
    (tmp_path / "m").touch()
    assert metrics.read(tmp_path / "m") == []
    assert metrics.last(tmp_path / "m") is None


def test_last_of_a_long_file_reads_its_end_only(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with open(path, "w") as file:
        file.write("not looked at\n")
        file.writelines(json.dumps({"step": i, "text": "x" * 900}) + "\n" for i in range(1000))
    assert (metrics.last(path) or {})["step"] == 999
    metrics.append(path, 1000, {"x" * 300_000: 1.0})  # longer than the first window
    assert (metrics.last(path) or {})["step"] == 1000


def test_truncate_with_nothing_to_drop_leaves_the_file_alone(tmp_path: Path) -> None:
    write(tmp_path / "m", [{"a": 1.0}] * 3)
    before = os.stat(tmp_path / "m").st_ino
    assert metrics.truncate_after(tmp_path / "m", 3) == 0
    assert os.stat(tmp_path / "m").st_ino == before


def test_tail_starts_over_when_the_file_was_replaced_or_cut(tmp_path: Path) -> None:
    path = tmp_path / "m"
    tail = metrics.Tail(path)
    write(path, [{"a": 1.0}] * 4)
    assert [line["step"] for line in tail.read()] == [1, 2, 3, 4]
    for _ in range(3):  # each time a new inode, though the file is as long as before
        metrics.truncate_after(path, 3)
        metrics.append(path, 4, {"a": 1.0})
        assert [line["step"] for line in tail.read()] == [1, 2, 3, 4]
    with open(path, "r+b") as file:
        file.truncate(len(file.readline()))
    assert [line["step"] for line in tail.read()] == [1]
    path.unlink()
    assert tail.read() == []


def test_tail_reads_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, [{"a": 1.0}] * 20)
    with metrics.Tail(path) as tail:
        pieces = iter(lambda: tail.read(limit_bytes=200), [])
        assert [line["step"] for piece in pieces for line in piece] == list(range(1, 21))
    with metrics.Tail(path) as tail, pytest.raises(DataError, match=r"m:1: a line of more than 20 bytes"):
        tail.read(limit_bytes=20)
    path.write_bytes(path.read_bytes() + b"{}\n")
    with metrics.Tail(path) as tail, pytest.raises(DataError, match=r"m:21: "):
        tail.read()


def test_many_lines_from_one_writer_are_all_whole_for_a_reader_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "m"
    code = f"from mbtrain import metrics\nfor i in range(2000): metrics.append({str(path)!r}, i, {{'a': i / 7}})"
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    seen = []
    with metrics.Tail(path) as tail:
        while writer.poll() is None or len(seen) < 2000:
            seen += tail.read()
            assert writer.returncode in (None, 0)
    assert [line["step"] for line in seen] == list(range(2000))
    assert all(math.isclose(line["a"], line["step"] / 7) for line in seen)


def test_truncate_keeps_lines_on_both_sides_and_costs_no_memory(tmp_path: Path) -> None:
    """Lines are copied as they are; a file is never held whole."""
    path = tmp_path / "m"
    lines = [json.dumps({"step": step, "a": "x" * 1000}).encode() + b"\n" for step in [1, 9, 2, 8, 3, 7] * 10_000]
    path.write_bytes(b"".join(lines) + b'{"step": 1')
    tracemalloc.start()
    assert metrics.truncate_after(path, 3) == 30_000
    assert sum(1 for line in metrics.stream(path) if line["step"] <= 3) == 30_000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 12_000_000
    assert path.read_bytes() == b"".join(lines[::2])
