"""What surrounds the loop: lines of metrics wait for a disk that is full, and none is lost."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mbtrain import metrics, session
from mbtrain.checkpoint import Progress
from mbtrain.config import Config
from mbtrain.data.mixture import Mixture
from mbtrain.errors import ConfigError
from mbtrain.model.flops import count
from mbtrain.session import Session
from tests import tiny


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


def test_data_that_ends_is_the_last_step_or_an_error() -> None:
    """The place in the data counts, so that a run that was resumed with another batch ends where its data ends."""
    asks = tiny.make(2, train={"steps": 10, "global_batch_size": 4})
    unlimited = tiny.make(2, train={"steps": None, "minutes": 1, "global_batch_size": 4})

    def last(settings: Config, end: int | None, step: int = 0, rows: int = 0) -> int | None:
        mixed = cast(Mixture, SimpleNamespace(end=end))
        where = Progress(step=step, position=rows * settings.data.seq_len)
        return session.last_step(settings, mixed, where, count(settings).training_per_byte)

    assert last(asks, None) == last(asks, 40) == 10
    assert last(unlimited, None) is None
    assert last(unlimited, 43) == 10
    assert last(unlimited, 43, step=5, rows=10) == 5 + 33 // 4
    assert last(unlimited, 43, step=10, rows=40) == 10
    for settings, end in ((asks, 39), (unlimited, 3)):
        with pytest.raises(ConfigError, match=rf"data\.sources: .* after {end} rows of 32 bytes, at step {end // 4} "):
            last(settings, end)


def test_bits_per_byte_of_boundaries_alone_is_not_a_number() -> None:
    assert session.bits_per_byte(1.0, 0) != session.bits_per_byte(1.0, 0)
