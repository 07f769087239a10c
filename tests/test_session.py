"""What surrounds the loop: lines of metrics wait for a disk that is full, and none is lost."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mbtrain import metrics, session
from mbtrain.session import Session


def test_metrics_wait_in_memory_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = cast(Session, SimpleNamespace(run=tmp_path, unwritten=[]))
    write, full = metrics.append, [False]

    def append(path: Path, step: int, values: dict[str, Any]) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, step, values)

    monkeypatch.setattr(metrics, "append", append)
    for step in range(1, 6):
        full[0] = step in (2, 3, 4)
        session.record(now, step, {"train/bpb": 1.0 * step})
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["train/bpb"]) for line in lines] == [(s, 1.0 * s) for s in range(1, 6)]
    assert sorted(line["time_unix_s"] for line in lines) == [line["time_unix_s"] for line in lines]
    assert not now.unwritten
    assert "3 lines wait in memory" in (tmp_path / "log.txt").read_text()


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").mkdir()  # no file can be opened under this name
    session.say(tmp_path, "still here")
    assert "still here" in capsys.readouterr().err


def test_bits_per_byte_of_boundaries_alone_is_not_a_number() -> None:
    assert session.bits_per_byte(1.0, 0) != session.bits_per_byte(1.0, 0)
