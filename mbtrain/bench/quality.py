"""`mbtrain bench quality`: bits per byte after equal time on equal threads, each side by its own recipe."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from mbtrain.bench import measure
from mbtrain.command import no_unknown, number
from mbtrain.errors import ConfigError

# More than any side trains on in an hour here; a stream that ends begins again.
_MOST_TRAIN_BYTES = 128_000_000


def quality(
    *,
    config: str = "configs/bench/small.yaml",
    peer: str = "",
    minutes: str = "2",
    seeds: str = "1",
    threads: str = "1",
    clock: str = "wall",
    windows: str = "96",
    data: str = "",
    **unknown: str,
) -> dict[str, Any]:
    """Validation bits per byte after equal minutes of training, one side after the other on the same cores.

    Ours trains by the configuration under the engine, its schedule fitted to these minutes; the peer by lucidrains'
    train.py (fp32, Adam 2e-4 constant, 4 batches accumulated by summing, clipping at 0.5). Both read the same training
    bytes in the same order and are scored in fp32 on the same first windows of the validation split, each window of
    seq_len bytes without context, every byte counted (the peer's own loss would leave out byte 0).
    clock: wall, or cpu, seconds of the process's CPU time, for machines that others use as well.
    Raises ConfigError for options and configurations that do not fit.
    """
    no_unknown(quality, unknown)
    if clock not in ("wall", "cpu"):
        raise ConfigError(f"--clock: expected wall or cpu, got {clock!r}")
    seconds = 60 * number("--minutes", minutes, float, 0)
    n_seeds, n_threads = number("--seeds", seeds, int, 1), number("--threads", threads, int, 1)
    n_windows = number("--windows", windows, int, 1)
    python = measure.find_peer(peer)
    results: dict[str, list[dict[str, Any]]] = {"engine": [], "peer": []}
    figures = measure.machine(n_threads)
    for seed in range(n_seeds):
        settings = measure.settings_of(config, data, train__seed=str(seed), train__minutes=str(max(seconds, 1) / 60))
        if python:
            measure.peer_shape(settings)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            val_bytes = n_windows * settings.data.seq_len
            measure.write_rows(settings, folder, _MOST_TRAIN_BYTES, val_bytes)
            scored = (folder / "val.bytes").stat().st_size // settings.data.seq_len
            for side in ("engine", "peer"):
                if side == "peer" and python is None:
                    continue
                started = (
                    measure.own_worker(settings, "engine", folder, n_threads)
                    if side == "engine" or python is None
                    else measure.peer_process(python, settings, folder, n_threads)
                )
                with started as ask:
                    trained = ask("train", seconds=seconds, by=clock)
                    score = ask("score", path=str(folder / "val.bytes"), windows=scored)
                bpb = score["nats"] / math.log(2) / score["bytes"]
                result = {key: trained[key] for key in ("steps", "bytes", "wall_s", "cpu_s")}
                results[side].append({"seed": seed, "bpb": bpb, **result})
                measure.say(f"seed {seed} · {side}: {bpb:.4f} bits per byte after {trained['steps']} steps")
    own = measure.spread([r["bpb"] for r in results["engine"]])
    theirs = measure.spread([r["bpb"] for r in results["peer"]]) if python else None
    speeds = {
        side: measure.spread([r["bytes"] / r["wall_s"] for r in of])["median"] if of else None
        for side, of in results.items()
    }
    own_speed, peer_speed = speeds["engine"], speeds["peer"]
    return figures | {
        "config": config,
        "minutes": seconds / 60,
        "clock": clock,
        "val_bytes": n_windows * settings.data.seq_len,
        "bpb": own["median"],
        "peer_bpb": theirs["median"] if theirs else None,
        "gain_bpb": theirs["median"] - own["median"] if theirs else None,
        "bytes_per_s": own_speed,
        "peer_bytes_per_s": peer_speed,
        "ratio": own_speed / peer_speed if own_speed and peer_speed else None,
        "by_seed": results,
    }
