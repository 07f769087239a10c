"""`mbtrain bench quality`: bits per byte after so much time on equal threads, each side by its own recipe.

    mbtrain bench quality --config=configs/bench/quality.yaml --minutes=0.33333 --peer-minutes=3.3333 --clock=cpu

asks whether ours reaches in a tenth of the time what the peer reaches.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mbtrain.bench import measure
from mbtrain.command import no_unknown, number
from mbtrain.config import Config
from mbtrain.errors import ConfigError

# More than any side trains on in an hour here; a stream that ends begins again.
_MOST_TRAIN_BYTES = 128_000_000

_TENTH = 0.101  # minutes are typed with a few digits


def quality(
    *,
    config: str = "configs/bench/small.yaml",
    peer_config: str = "configs/bench/small.yaml",
    peer: str = "",
    minutes: str = "2",
    peer_minutes: str = "",
    seeds: str = "1",
    threads: str = "1",
    clock: str = "wall",
    windows: str = "96",
    data: str = "",
    **unknown: str,
) -> dict[str, Any]:
    """Validation bits per byte after minutes of training, one side after the other on the same cores.

    Ours trains by its configuration under the engine, its schedule fitted to its minutes; the peer, in the shape and
    on the rows of `peer_config`, by lucidrains' train.py (fp32, Adam 2e-4 constant, 4 batches accumulated by summing,
    clipping at 0.5) for `peer_minutes`, by default as long. Both read the same training split, shuffled by the same
    seed, in rows of their own length, and are scored in fp32 on the same windows: the first of the validation split,
    each of peer_config's seq_len bytes, without context, every byte counted (the peer's own loss would leave out
    byte 0).
    clock: wall, or cpu, seconds of the process's CPU time, for machines that others use as well.
    reached_in_a_tenth: whether our worst seed is no worse than the peer's best; None where ours had more than a tenth
    of the peer's minutes, or there is no peer.
    Raises ConfigError for options and configurations that do not fit.
    """
    no_unknown(quality, unknown)
    if clock not in ("wall", "cpu"):
        raise ConfigError(f"--clock: expected wall or cpu, got {clock!r}")
    seconds = {"engine": 60 * number("--minutes", minutes, float, 0)}
    seconds["peer"] = 60 * number("--peer-minutes", peer_minutes or minutes, float, 0)
    n_seeds, n_threads = number("--seeds", seeds, int, 1), number("--threads", threads, int, 1)
    n_windows = number("--windows", windows, int, 1)
    python = measure.find_peer(peer)
    results: dict[str, list[dict[str, Any]]] = {"engine": [], "peer": []}
    figures = measure.machine(n_threads)
    for seed in range(n_seeds):
        sides = {
            "engine": measure.settings_of(
                config, data, train__seed=str(seed), train__minutes=str(max(seconds["engine"], 1) / 60)
            ),
            "peer": measure.settings_of(peer_config, data, train__seed=str(seed)),
        }
        length = sides["peer"].data.seq_len
        _must_fit(sides["engine"], length)
        measure.peer_shape(sides["peer"])
        for side, settings in sides.items():
            if side == "peer" and python is None:
                continue
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                measure.write_rows(settings, folder, _MOST_TRAIN_BYTES, n_windows * length)
                scored = (folder / "val.bytes").stat().st_size // length
                if scored == 0:
                    raise ConfigError(
                        f"--data={data}: the validation split holds less than one window of {length} bytes"
                    )
                with _started(side, settings, python, folder, n_threads) as ask:
                    trained = ask("train", seconds=seconds[side], by=clock)
                    score = ask("score", path=str(folder / "val.bytes"), windows=scored, seq_len=length)
            bpb = score["nats"] / math.log(2) / score["bytes"]
            result = {key: trained[key] for key in ("steps", "bytes", "wall_s", "cpu_s")}
            results[side].append({"seed": seed, "bpb": bpb, "val_bytes": score["bytes"], **result})
            measure.say(f"seed {seed} · {side}: {bpb:.4f} bits per byte after {trained['steps']} steps")
    own = _spread(results["engine"])
    theirs = _spread(results["peer"]) if python else None
    speeds = {
        side: measure.spread([r["bytes"] / r["wall_s"] for r in of])["median"] if of else None
        for side, of in results.items()
    }
    own_speed, peer_speed = speeds["engine"], speeds["peer"]
    return figures | {
        "config": config,
        "peer_config": peer_config,
        "minutes": seconds["engine"] / 60,
        "peer_minutes": seconds["peer"] / 60,
        "clock": clock,
        "val_bytes": results["engine"][0]["val_bytes"],
        "bpb": own["median"],
        "bpb_by_seed": own,
        "peer_bpb": theirs["median"] if theirs else None,
        "peer_bpb_by_seed": theirs,
        "gain_bpb": theirs["median"] - own["median"] if theirs else None,
        "reached_in_a_tenth": reached_in_a_tenth(own, theirs, seconds["engine"] / seconds["peer"]),
        "bytes_per_s": own_speed,
        "peer_bytes_per_s": peer_speed,
        "ratio": own_speed / peer_speed if own_speed and peer_speed else None,
        "by_seed": results,
    }


def reached_in_a_tenth(own: dict[str, float], theirs: dict[str, float] | None, share: float) -> bool | None:
    """Whether every seed of ours is as good as any of the peer's; None with more than a tenth of the time, or no peer.

    own, theirs  {"min", "max", ...}, bits per byte over seeds
    share        our time over the peer's
    """
    if theirs is None or share > _TENTH:
        return None
    return own["max"] <= theirs["min"]


def _spread(results: list[dict[str, Any]]) -> dict[str, float]:
    """{"mean", "median", "min", "max"} of the bits per byte over seeds."""
    scores = [result["bpb"] for result in results]
    return {"mean": statistics.fmean(scores), **measure.spread(scores)}


def _must_fit(settings: Config, length: int) -> None:
    """Raise ConfigError where our model could not be scored on windows of so many bytes of the peer's vocabulary."""
    if settings.data.boundary:
        raise ConfigError("data.boundary: got true, expected false: the peer knows bytes only")
    if settings.model.positions == "learned" and settings.data.seq_len < length:
        raise ConfigError(
            f"data.seq_len: got {settings.data.seq_len}, expected the {length} bytes of the peer's windows or more, or "
            "another model.positions than learned"
        )


def _started(
    side: str, settings: Config, python: Path | None, folder: Path, threads: int
) -> AbstractContextManager[measure.Ask]:
    """A side's worker on the rows in the folder."""
    if side == "engine" or python is None:
        return measure.own_worker(settings, "engine", folder, threads)
    return measure.peer_process(python, settings, folder, threads)
