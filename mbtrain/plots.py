"""Pictures of a run and of its scores, drawn by matplotlib's Agg: no display, no global state of pyplot."""

import math
import os
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from mbtrain import metrics

TRAIN_COLOR = "#4c78a8"
VAL_COLORS = ("#e45756", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")
INK = "#333333"
MUTED = "#767676"

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
MAX_POINTS = 2000  # of the raw curve: more than there are pixels
MAX_LINES = 100_000  # without validation, held at a time: a run of months has more than memory has room for
DRAWN = ("step", "time_unix_s", "progress/bytes", "progress/minutes", "train/bpb")

PAUSE_S = 600.0  # a longer gap between two lines, if out of the ordinary, is a pause between two parts of a run

Curve = tuple[list[float], list[float]]


def loss_curve(run_dir: Path | str) -> Path | None:
    """Draw RUN/plots/loss.png (1200 x 500 pixels): bits per byte against bytes seen, and against minutes.

    Training is drawn thin as it is and thick when smoothed, validation as points, one colour a source. Steps
    take the place of bytes where no line tells `progress/bytes`. Minutes are `progress/minutes`
    where lines tell them, else the time of day, without the pauses of a resumed run.
    The file appears when it is whole. Returns its path; None, and nothing is drawn, if there is no finite point yet.

    Raises DataError if metrics.jsonl is damaged.
    """
    run_dir = Path(run_dir)
    path = run_dir / "metrics.jsonl"
    records = thinned(metrics.stream(path)) if path.exists() else []
    minutes = minutes_of(records)
    in_bytes = any("progress/bytes" in record for record in records)
    amounts = bytes_seen(records) if in_bytes else [float(record["step"]) for record in records]
    train = _column(records, "train/bpb")
    vals = {key: _column(records, key) for key in _val_keys(records)}
    if not any(math.isfinite(value) for column in (train, *vals.values()) for value in column):
        return None

    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    scale, unit = _unit(amounts) if in_bytes else (1.0, "")
    _panel(left, [amount / scale for amount in amounts], train, vals)
    _panel(right, minutes, train, vals)
    left.set(
        xlabel=f"bytes seen ({unit})" if scale > 1 else "bytes seen" if in_bytes else "step", ylabel="bits per byte"
    )
    right.set(xlabel="minutes")
    left.set_title(f"against {'data' if in_bytes else 'steps'}", loc="left", color=MUTED, fontsize=10)
    right.set_title("against time, pauses left out", loc="left", color=MUTED, fontsize=10)
    limits = _y_limits(amounts, train, vals)
    if limits:
        left.set_ylim(*limits)
    right.legend(loc="upper right", frameon=False, labelcolor=INK)
    figure.suptitle(_title(run_dir.resolve().name, train, vals), x=0.01, ha="left", color=INK, fontsize=13)
    target = run_dir / "plots" / "loss.png"
    save(figure, target)
    return target


def evaluation(
    target: Path, title: str, by_position: Sequence[dict[str, Any]] | None, by_depth: Sequence[dict[str, Any]]
) -> None:
    """Draw where a score comes from (1200 x 500 pixels): bits per byte by position in the patch, and by context.

    by_position: {"position", "bytes", "bpb"}; without it the right half alone, twice as wide. by_depth: {"from", "to",
    "bytes", "bpb"}; the left half alone where all bytes are in one octave, as in sliding windows. Left out is what says
    more about a few bytes than about the place: positions with less than a tenth of another's bytes, depths with less
    than a hundredth for each number of bytes before. The file appears when it is whole.

    Raises OSError.
    """
    from matplotlib.figure import Figure

    known = _well_covered(by_depth, [row["bytes"] / (row["to"] - row["from"] + 1) for row in by_depth], 0.01)
    with_depth = len(known) > 1 or not by_position
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    panels = figure.subplots(1, bool(by_position) + with_depth, squeeze=False)[0]
    if by_position:
        there = _well_covered(by_position, [place["bytes"] for place in by_position], 0.1)
        _dots(panels[0], [place["position"] for place in there], [place["bpb"] for place in there])
        panels[0].set(xlabel="position in the patch (bytes)", ylabel="bits per byte")
        panels[0].set_title("by position in the patch", loc="left", color=MUTED, fontsize=10)
        panels[0].set_xlim(-0.5, len(by_position) - 0.5)
        panels[0].xaxis.get_major_locator().set_params(integer=True)
    if with_depth:
        _dots(panels[-1], list(range(len(known))), [row["bpb"] for row in known])
        labels = [str(row["from"]) if row["from"] == row["to"] else f"{row['from']}\n{row['to']}" for row in known]
        panels[-1].set_xticks(range(len(known)), labels)
        panels[-1].set(xlabel="bytes before it in its window, from and to", ylabel="bits per byte")
        panels[-1].set_title("by depth of context", loc="left", color=MUTED, fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13)
    save(figure, target)


def _well_covered(
    places: Sequence[dict[str, Any]], bytes_: Sequence[float], least_share: float
) -> list[dict[str, Any]]:
    least = least_share * max(bytes_, default=0)
    there = [place for place, n in zip(places, bytes_, strict=True) if n >= least and place["bpb"] is not None]
    return [place for place in there if math.isfinite(place["bpb"])]


def _dots(axes: Any, xs: Sequence[int], ys: Sequence[float]) -> None:
    axes.plot(xs, ys, color=VAL_COLORS[0], linewidth=1.4, marker="o", markersize=5 if len(xs) < 50 else 2)
    plain(axes)


def save(figure: Any, target: Path) -> None:
    """Write a figure as a PNG, which appears when it is whole. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            canvas.print_png(file)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def plain(axes: Any, label_size: float | str = "medium") -> None:
    """A light grid, no frame on the upper and right side, numbers as they are."""
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=INK, length=0, labelleft=True, labelsize=label_size)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.ticklabel_format(useOffset=False, style="plain")


def thinned(lines: Iterable[dict[str, Any]], drawn: Collection[str] = DRAWN) -> list[dict[str, Any]]:
    """What is `drawn`, and val/..., of each line; of very many every 2nd, 4th and so on, but all with validation."""
    kept: list[tuple[int, dict[str, Any]]] = []
    every = held = 1
    for number, line in enumerate(lines):
        validated = any(key.startswith("val/") for key in line)
        if validated or number % every == 0:
            values = {key: value for key, value in line.items() if key in drawn or key.startswith("val/")}
            kept.append((-1 if validated else number, values))
            held += not validated
        if held > MAX_LINES:
            every *= 2
            kept = [(at, values) for at, values in kept if at % every == 0 or at < 0]
            held = sum(at >= 0 for at, _ in kept)
    return [values for _, values in kept]


def _panel(axes: Any, xs: Sequence[float], train: Sequence[float], vals: dict[str, list[float]]) -> None:
    train_xs, train_ys = _finite(xs, train)
    few = len(train_xs) < 20
    if train_xs:
        every = max(1, len(train_xs) // MAX_POINTS)
        axes.plot(
            train_xs[::every],
            train_ys[::every],
            color=TRAIN_COLOR,
            linewidth=0.8,
            alpha=0.8 if few else 0.3,
            marker="." if few else None,
            label="train" if few else None,
        )
    if train_xs and not few:
        axes.plot(train_xs, smooth(train_ys), color=TRAIN_COLOR, linewidth=1.8, label="train, smoothed")
    for i, (key, column) in enumerate(vals.items()):
        val_xs, val_ys = _finite(xs, column)
        if val_xs:
            axes.plot(
                val_xs,
                val_ys,
                color=VAL_COLORS[i % len(VAL_COLORS)],
                linewidth=1.0,
                marker="o",
                markersize=4 if len(val_xs) < 100 else 2,
                label=_val_label(key),
            )
    plain(axes)
    axes.margins(x=0.02)
    axes.set_xlim(left=0)


def _title(name: str, train: Sequence[float], vals: dict[str, list[float]]) -> str:
    for label, column in ((("validation", vals["val/bpb"]),) if "val/bpb" in vals else ()) + (("training", train),):
        finite = [value for value in column if math.isfinite(value)]
        if finite:
            best = f", best {min(finite):.4f}" if label == "validation" and min(finite) < finite[-1] else ""
            return f"{name}: {finite[-1]:.4f} bits per byte in {label}{best}"
    return f"{name}: bits per byte"


def _val_keys(records: Sequence[dict[str, Any]]) -> list[str]:
    """`val/bpb` first, then `val/partial_bpb`, `val/last_bpb` and `val/<source>/bpb` by name."""
    keys = {key for record in records for key in record if key.startswith("val/") and key.endswith("bpb")}
    return sorted(keys, key=lambda key: (key != "val/bpb", key != "val/partial_bpb", key))


def _val_label(key: str) -> str:
    *source, name = key.removeprefix("val/").split("/")
    said = [text for part, text in (("partial", "first part"), ("last", "last weights")) if part in name.split("_")]
    return ", ".join(["validation", *source, *said])


def bytes_seen(records: Sequence[dict[str, Any]]) -> list[float]:
    """`progress/bytes` of each line; a line without it has that of its step, else that of the line before."""
    of_step = {record["step"]: float(record["progress/bytes"]) for record in records if "progress/bytes" in record}
    amounts, before = [], 0.0
    for record in records:
        before = of_step.get(record["step"], before)
        amounts.append(before)
    return amounts


def _column(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(record.get(key, math.nan)) for record in records]


def _finite(xs: Sequence[float], ys: Sequence[float]) -> Curve:
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def smooth(ys: Sequence[float], part: int = 100) -> list[float]:
    """Mean over the points around each: a quarter of the way back to the start and as far ahead, at most n/part.

    An exponential mean would lag behind the steep fall at the start, and draw the model worse than it was.
    """
    sums = [0.0, *accumulate(ys)]
    smoothed = []
    for i in range(len(ys)):
        reach = min(i // 4, max(1, len(ys) // part))
        low, high = i - reach, min(i + reach + 1, len(ys))
        smoothed.append((sums[high] - sums[low]) / (high - low))
    return smoothed


def minutes_of(records: Sequence[dict[str, Any]]) -> list[float]:
    """Minutes of training: as the lines tell, else since the first line, without the pauses between parts of a run."""
    if any("progress/minutes" in record for record in records):
        return _column(records, "progress/minutes")
    times_s = [float(record.get("time_unix_s", math.nan)) for record in records]
    gaps_s = sorted(b - a for a, b in zip(times_s, times_s[1:], strict=False) if b > a)
    usual_s = gaps_s[len(gaps_s) // 2] if gaps_s else 0.0
    longest_s = max(PAUSE_S, 20 * usual_s)
    minutes, elapsed_s, before_s = [], 0.0, math.nan
    for time_s in times_s:
        gap_s = time_s - before_s
        if 0 < gap_s <= longest_s:
            elapsed_s += gap_s
        minutes.append(elapsed_s / 60 if math.isfinite(time_s) else math.nan)
        before_s = time_s if math.isfinite(time_s) else before_s
    return minutes


def _unit(amounts: Sequence[float]) -> tuple[float, str]:
    largest = max((amount for amount in amounts if math.isfinite(amount)), default=0.0)
    return next(((scale, name) for scale, name in UNITS if largest >= 2 * scale), UNITS[-1])


def _y_limits(
    amounts: Sequence[float], train: Sequence[float], vals: dict[str, list[float]]
) -> tuple[float, float] | None:
    """Limits that show where the run is going: the fall from 8 bits in its first twentieth may leave the picture."""
    xs, ys = _finite(amounts, train)
    if len(xs) < 20:
        return None
    start = xs[0] + (xs[-1] - xs[0]) / 20
    shown = [y for x, y in zip(xs, smooth(ys), strict=True) if x >= start]
    shown += [y for column in vals.values() for x, y in zip(*_finite(amounts, column), strict=True) if x >= start]
    low, high = min([*ys, *shown]), max(shown)
    room = max(0.08 * (high - low), 0.01)
    return max(0.0, low - room), high + room
