"""`mbtrain bench length`: what one training step costs against the length of its row, beside a flat transformer's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbtrain.bench import measure
from mbtrain.command import no_unknown, number
from mbtrain.config import Config
from mbtrain.errors import ConfigError

LENGTHS = "8192,16384,32768,65536,131072,262144,524288,1228800"
FLAT_WIDTH = 256
_STEPS = 2


def length(
    *,
    config: str = "configs/bench/length.yaml",
    lengths: str = LENGTHS,
    threads: str = "1",
    flat_cpu_s: str = "60",
    data: str = "",
    out: str = "length.png",
    **unknown: str,
) -> dict[str, Any]:
    """One training step (forward, backward, update, through the engine) of one row of each of --lengths bytes.

    Each length has a process of its own: the most memory resident in it, the whole process counted, and CPU and wall
    seconds of its second step, as of its first one. Beside it a flat transformer of bytes with about as many parameters
    and everything else alike, as long as its next step is foreseen to take --flat-cpu-s at most (0: none at all).
    Lengths are cut to whole patches. By least squares over log-log each gets the exponent of CPU seconds against
    length, over all lengths and over the longer half; --out is the picture. Rows are random bytes, or --data's (made by
    mbtrain-prep; they are read in a row, as packed rows are).
    Raises ConfigError for options and configurations that do not fit, MbtrainError when a process ends early.
    """
    no_unknown(length, unknown)
    n_threads, most_s = number("--threads", threads, int, 1), number("--flat-cpu-s", flat_cpu_s, float, 0)
    asked = sorted({number("--lengths", each, int, 1) for each in lengths.split(",")})
    if len(asked) < 2:
        raise ConfigError(f"--lengths={lengths}: got one length, expected two or more: a line goes through them")
    target = Path(out)
    figures = measure.machine(n_threads) | {"config": config}
    sides: dict[str, dict[str, Any]] = {}
    for name in ("model", "flat") if most_s else ("model",):
        rows: list[dict[str, Any]] = []
        for t in asked:
            settings = _settings(config, data, t)
            settings = settings if name == "model" else flat_of(settings)
            if name == "flat" and rows and foreseen(rows, settings.data.seq_len) > most_s:
                break
            rows.append(_step_of(settings, n_threads, bool(data)))
            measure.say(f"{name} · {_line(rows[-1])}")
        sides[name] = {"parameters": _parameters(settings), "by_length": rows, **fits(rows)}
    last, flat = sides["model"]["by_length"][-1], sides.get("flat")
    beyond = None if flat is None else foreseen(flat["by_length"], last["bytes"])
    _draw(target, sides)
    beside = "" if flat is None else f"; a flat transformer's as {_power(flat)}, {beyond:,.0f} s foreseen"
    measure.say(f"CPU seconds grow as {_power(sides['model'])}, {last['cpu_s']:.1f} at {last['bytes']:,} bytes{beside}")
    keys = ("bytes", "cpu_s", "wall_s", "peak_bytes", "loss_nats")
    return figures | {
        **{key: last[key] for key in keys},
        "exponent": sides["model"]["exponent"],
        "flat_exponent": None if flat is None else flat["exponent"],
        "flat_foreseen_cpu_s": beyond,
        "plot": str(target),
        "sides": sides,
    }


def flat_of(settings: Config) -> Config:
    """A transformer of bytes of FLAT_WIDTH with about as many parameters, and everything else alike."""
    from mbtrain import config as configuration

    layers = max(1, round(_parameters(settings) / (12 * FLAT_WIDTH**2)))
    stage = {"patch_size": 1, "d_model": FLAT_WIDTH, "n_layers": layers, "n_heads": 4}
    tree = settings.model_dump(mode="json")
    tree["model"] |= {"kind": "transformer", "stages": [stage]}
    return configuration.validate(tree)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """b of y = a x ** b by least squares over logarithms; None of fewer than two points."""
    if len(xs) < 2:
        return None
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def foreseen(rows: Sequence[Mapping[str, Any]], t: int) -> float:
    """CPU seconds at t bytes: those of the longest row there is times a part that grows as length, and one as length
    squared, that go through the last two (and of one alone, as length squared)."""
    if len(rows) == 1:
        return float(rows[0]["cpu_s"]) * (t / rows[0]["bytes"]) ** 2
    points = [(float(row["bytes"]), float(row["cpu_s"])) for row in rows[-2:]]
    (x, u), (y, v) = points
    square = max(0.0, (v / y - u / x) / (y - x))
    return max(0.0, v / y - square * y) * t + square * t**2


def fits(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Exponents of CPU seconds against length: over all rows, and over the longer half of them."""
    xs, ys = [row["bytes"] for row in rows], [row["cpu_s"] for row in rows]
    half = len(rows) // 2
    return {"exponent": exponent(xs, ys), "exponent_of_longer_half": exponent(xs[half:], ys[half:])}


def _settings(path: str, data: str, t: int) -> Config:
    """The configuration with one row of t bytes, or as many of them as are whole patches."""
    patch = measure.settings_of(path, data).model.stages[0].patch_size
    if t < patch:
        raise ConfigError(f"--lengths: got {t}, expected {patch} or more, a whole patch of {path}")
    changes = {"data__seq_len": str(t // patch * patch), "train__global_batch_size": "1"}
    return measure.settings_of(path, data, data__boundary="false", **changes)


def _parameters(settings: Config) -> int:
    from mbtrain.model.flops import count

    return count(settings).parameters


def _step_of(settings: Config, threads: int, real: bool) -> dict[str, Any]:
    """Steps in a process of their own."""
    t = settings.data.seq_len
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if real:
            measure.write_rows(settings, folder, _STEPS * t)
        else:
            np.random.default_rng(0).integers(0, 256, _STEPS * t, np.uint8).tofile(folder / "train.bytes")
        with measure.own_worker(settings, "engine", folder, threads) as ask:
            base = ask("memory")["peak_bytes"]
            first, *_, last = [ask("steps", n=1) for _ in range(_STEPS)]
            peak = ask("memory")["peak_bytes"]
    seconds = {key: last[key] for key in ("cpu_s", "wall_s")} | {
        f"first_{key}": first[key] for key in ("cpu_s", "wall_s")
    }
    return {"bytes": t, **seconds, "peak_bytes": peak, "base_bytes": base, "loss_nats": first["loss_nats"]}


def _power(side: Mapping[str, Any]) -> str:
    return "length ** ?" if side["exponent"] is None else f"length ** {side['exponent']:.2f}"


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['bytes']:>9,} bytes · {row['cpu_s']:8.2f} CPU s (first step {row['first_cpu_s']:.2f}), "
        f"{row['wall_s']:.2f} s · {row['peak_bytes'] / 1e6:,.0f} MB at most, {row['base_bytes'] / 1e6:,.0f} before · "
        f"loss {row['loss_nats']:.4f}"
    )


def _draw(target: Path, sides: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.figure import Figure

    from mbtrain.plots import INK, MUTED, TRAIN_COLOR, VAL_COLORS, plain, save

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    end = sides["model"]["by_length"][-1]["bytes"]
    names = {"model": "MEGABYTE", "flat": "flat transformer"}
    for (side, of), color in zip(sides.items(), (TRAIN_COLOR, VAL_COLORS[0]), strict=False):
        rows = of["by_length"]
        xs = [row["bytes"] for row in rows]
        label = f"{names[side]}, {of['parameters'] / 1e6:.1f}M parameters"
        for axes, key, scale in zip(panels, ("cpu_s", "peak_bytes"), (1.0, 1e6), strict=True):
            ys = [row[key] / scale for row in rows]
            power = f": {_power(of)}" if key == "cpu_s" else ""
            axes.plot(xs, ys, color=color, linewidth=1.6, marker="o", markersize=5, label=label + power)
            axes.annotate(f" {ys[-1]:,.4g}", (xs[-1], ys[-1]), color=color, fontsize=9, va="bottom", ha="right")
        if xs[-1] < end:
            beyond = np.geomspace(xs[-1], end, 20)
            foretold = [foreseen(rows, t) for t in beyond]
            panels[0].plot(
                beyond, foretold, color=color, linewidth=1.1, linestyle="--", label="foreseen from its last two"
            )
            panels[0].annotate(f"{foretold[-1]:,.0f} ", (end, foretold[-1]), color=color, fontsize=9, ha="right")
    shown = [row["bytes"] for row in sides["model"]["by_length"]]
    for axes, what in zip(panels, ("CPU seconds of one step", "most memory, MB, whole process"), strict=True):
        plain(axes)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="bytes of the row", ylabel=what)
        axes.set_xticks(shown, [f"{t / 1000:,.0f}k" for t in shown])
        axes.minorticks_off()
    panels[0].set_yscale("log")
    panels[0].legend(frameon=False, labelcolor=INK, fontsize=9)
    base = sides["model"]["by_length"][0]["base_bytes"] / 1e6
    panels[1].axhline(base, color=MUTED, linewidth=1.0, linestyle=":")
    panels[1].annotate("libraries and model", (shown[-1], base), color=MUTED, fontsize=9, va="bottom", ha="right")
    panels[1].set_ylim(bottom=0)
    figure.suptitle("One training step against the length of its row", x=0.01, ha="left", color=INK, fontsize=13)
    save(figure, target)
