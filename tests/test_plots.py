"""The loss curve is drawn from whatever a run has written so far, and never half."""

import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from mbtrain import metrics, plots


def write(run: Path, lines: list[dict[str, float]]) -> None:
    for step, line in enumerate(lines, start=1):
        metrics.append(run / "metrics.jsonl", step, {"time_unix_s": 1e9 + step, **line})


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_a_whole_run(tmp_path: Path) -> None:
    lines = [{"train/bpb": 8 / step, "progress/bytes": 4096 * step} for step in range(1, 101)]
    for line in lines[9::10]:
        line |= {"val/bpb": line["train/bpb"] + 0.1, "val/code/bpb": 1.0, "val/partial_bpb": 2.0}
    write(tmp_path, lines)
    assert plots.loss_curve(tmp_path) == tmp_path / "plots" / "loss.png"
    assert size(tmp_path / "plots" / "loss.png") == (1200, 500)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]


@pytest.mark.parametrize("lines", [[], [{}], [{"train/bpb": math.nan}], [{"optim/lr": 1.0}, {"val/bpb": math.inf}]])
def test_nothing_to_draw(tmp_path: Path, lines: list[dict[str, float]]) -> None:
    write(tmp_path, lines)
    assert plots.loss_curve(tmp_path) is None
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    "lines",
    [
        [{"train/bpb": 8.0}],
        [{"val/bpb": 8.0, "progress/bytes": 0}],
        [{"train/bpb": 0.0, "progress/bytes": 1}],
        [{"train/bpb": 8.0, "progress/bytes": 10}, {"val/bpb": 7.0}],
        [{"train/bpb": 8.0}, {"train/bpb": math.nan}, {"train/bpb": math.inf}, {"train/bpb": 7.0}],
        [{"train/bpb": 1.0, "progress/bytes": 5}] * 50,
        [{"train/bpb": 1.0, "time_unix_s": math.nan}, {"train/bpb": 1.0}],
    ],
)
@pytest.mark.filterwarnings("error")
def test_few_or_odd_points(tmp_path: Path, lines: list[dict[str, float]]) -> None:
    write(tmp_path, lines)
    assert size(plots.loss_curve(tmp_path) or tmp_path) == (1200, 500)


def test_a_line_without_bytes_stands_where_its_step_stands() -> None:
    records = [{"step": 0}, {"step": 1, "progress/bytes": 10}, {"step": 1}, {"step": 2, "progress/bytes": 20}]
    assert plots.bytes_seen(records) == [0, 10, 10, 20]


def test_labels() -> None:
    records = [{"val/b/bpb": 1.0, "val/a/partial_bpb": 1.0, "val/partial_bpb": 1.0, "val/bpb": 1.0, "val/nats": 1.0}]
    assert [plots._val_label(key) for key in plots._val_keys(records)] == [
        "validation",
        "validation, first part",
        "validation, a, first part",
        "validation, b",
    ]


def test_minutes_leave_out_pauses() -> None:
    records = [{"time_unix_s": float(time_s)} for time_s in (0, 60, 120, 90_000, 90_060)]
    assert plots.minutes_of(records) == [0, 1, 2, 2, 3]
    assert plots.minutes_of([]) == []
    assert plots.minutes_of([{"time_unix_s": 5.0, "progress/minutes": 7}]) == [7]


def test_smoothing_follows_a_line_and_does_not_lag_behind_a_fall() -> None:
    assert plots.smooth([]) == []
    assert plots.smooth([3.0]) == [3.0]
    assert plots.smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    fall = [math.exp(-i / 100) for i in range(2000)]
    assert plots.smooth(fall)[:1900] == pytest.approx(fall[:1900], rel=0.02)


def test_the_same_run_gives_the_same_picture(tmp_path: Path) -> None:
    write(tmp_path, [{"train/bpb": 1.0 + 1 / step} for step in range(1, 30)])
    first = zlib.crc32((plots.loss_curve(tmp_path) or tmp_path).read_bytes())
    assert zlib.crc32((plots.loss_curve(tmp_path) or tmp_path).read_bytes()) == first


def test_importing_it_imports_no_matplotlib() -> None:
    code = "import sys, mbtrain.plots; sys.exit(bool({'matplotlib', 'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_of_a_long_run_every_so_many_lines_and_all_validations_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MAX_LINES", 100)
    lines = [
        {"step": i, "train/bpb": 1.0, "perf/mfu": 0.5} | ({"val/bpb": 2.0} if i % 97 == 0 else {}) for i in range(5000)
    ]
    held = plots.thinned(iter(lines))
    assert [line["step"] for line in held if "val/bpb" in line] == list(range(0, 5000, 97))
    rest = [line["step"] for line in held if "val/bpb" not in line]
    assert 50 <= len(rest) <= 101
    assert max(b - a for a, b in zip(rest, rest[1:], strict=False)) <= 130
    assert all("perf/mfu" not in line for line in held)
    assert plots.thinned(iter(lines[:50])) == [
        {k: v for k, v in line.items() if k != "perf/mfu"} for line in lines[:50]
    ]


def test_where_a_score_comes_from(tmp_path: Path) -> None:
    """With patches and without; few bytes, no bytes and no finite bits draw no point, and nothing else is left over."""
    positions = [{"position": i, "bytes": 100, "bpb": 3.0 - i / 10} for i in range(4)]
    depths = [{"from": 0, "to": 0, "bytes": 9, "bpb": 5.0}, {"from": 1, "to": 1, "bytes": 9, "bpb": math.inf}]
    target = tmp_path / "plots" / "eval_val_basic.png"
    for by_position in (positions, None, [{"position": 0, "bytes": 0, "bpb": None}]):
        for by_depth in (depths, [], [{"from": 0, "to": 0, "bytes": 0, "bpb": None}]):
            plots.evaluation(target, "run: 2.0 bits per byte", by_position, by_depth)
            assert size(target) == (1200, 500)
    assert [path.name for path in target.parent.iterdir()] == ["eval_val_basic.png"]


def test_points_of_few_bytes_are_left_out() -> None:
    """In mode both only the very first window has anything in the second half of its patches."""
    places = [{"position": i, "bytes": n, "bpb": 2.0} for i, n in enumerate([1000, 990, 3, 3])]
    kept = plots._well_covered(places, [place["bytes"] for place in places], 0.1)
    assert [place["position"] for place in kept] == [0, 1]
