"""What the measurements share: worker processes, interleaved rounds, medians, and the peer's shape and arithmetic."""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mbtrain import config
from mbtrain.bench import peer as peer_worker
from mbtrain.config import Config
from mbtrain.errors import ConfigError, MbtrainError

PEER_PYTHON = Path(".cache/peer/bin/python")
PEER_D_HEAD = 64  # its defaults
PEER_MOST_HEADS = 8
PEER_VOCAB = 256
_ROWS_AT_A_TIME = 1024


class Ask(Protocol):
    """A running worker: ask(NAME, key=value, ...) -> its answer; it idles in between."""

    def __call__(self, do: str, **request: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PeerCount:
    """The peer by formula: parameters, and training operations per byte, useful and really executed.

    useful: n positions a patch and the causal half of attention. executed: it runs n + 1 positions a patch.
    """

    parameters: int
    training_per_byte: float
    executed_per_byte: float


@contextmanager
def worker(command: Sequence[str], name: str, threads: int, **variables: str) -> Iterator[Ask]:
    """Start a worker of the protocol in peer.py with so many threads and wait until it is ready.

    variables are added to its environment.
    Raises MbtrainError with the last line that the worker wrote when it ends early.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **variables}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env, text=True, bufsize=1
        )
        assert process.stdin is not None
        assert process.stdout is not None
        given, answers = process.stdin, process.stdout

        def answer() -> dict[str, Any]:
            line = answers.readline()
            if not line:
                process.wait()
                errors.seek(0)
                said = errors.read().decode("utf-8", "replace").strip().splitlines()
                last = said[-1] if said else "nothing on stderr"
                raise MbtrainError(f"bench: the worker {name} ended with status {process.returncode}: {last}")
            got: dict[str, Any] = json.loads(line)
            return got

        def ask(do: str, **request: Any) -> dict[str, Any]:
            try:
                given.write(json.dumps({"do": do, **request}) + "\n")
            except BrokenPipeError:
                return answer()
            return answer()

        try:
            answer()
            yield ask
        except BaseException:
            process.kill()
            raise
        finally:
            with suppress(BrokenPipeError):
                given.close()
            process.wait()
            answers.close()


@contextmanager
def own_worker(settings: Config, mode: str, folder: Path, threads: int, **variables: str) -> Iterator[Ask]:
    """mbtrain's worker (own.py) on this configuration; rows are those that `write_rows` put into the folder."""
    path = folder / f"{mode}-{settings.train.precision}-{settings.train.seed}.yaml"
    path.write_text(config.to_yaml(settings), encoding="utf-8")
    command = [sys.executable, "-m", "mbtrain.bench.own", str(path), mode, str(folder / "train.bytes")]
    with worker(command, f"{mode} ({settings.train.precision})", threads, **variables) as ask:
        yield ask


@contextmanager
def own_ranks(settings: Config, count: int, folder: Path, threads: int) -> Iterator[Ask]:
    """So many of mbtrain's workers as ranks of one training; of their answers the longest wall_s, and cpu_s summed."""
    with ExitStack() as stack:
        asks = [stack.enter_context(own_worker(settings, "rank", folder, threads, **place)) for place in places(count)]
        pool = stack.enter_context(ThreadPoolExecutor(count))

        def ask(do: str, **request: Any) -> dict[str, Any]:
            answers = list(pool.map(lambda each: each(do, **request), asks))
            took = {"wall_s": max(a["wall_s"] for a in answers), "cpu_s": sum(a["cpu_s"] for a in answers)}
            return {**answers[0], **took}

        ask("join")
        yield ask


@contextmanager
def peer_process(python: Path, settings: Config, folder: Path, threads: int) -> Iterator[Ask]:
    """The peer's worker (peer.py) in its own environment, in the same shape and on the same rows."""
    shape = {
        **peer_shape(settings),
        "rows": settings.train.global_batch_size,
        "seed": settings.train.seed,
        "threads": threads,
        "train": str(folder / "train.bytes"),
    }
    path = folder / f"peer-{settings.train.seed}.json"
    path.write_text(json.dumps(shape), encoding="utf-8")
    # -I keeps the modules beside peer.py, and this environment's, out of the peer's process.
    with worker([str(python), "-I", peer_worker.__file__, str(path)], "peer", threads) as ask:
        yield ask


def find_peer(python: str) -> Path | None:
    """The peer's interpreter: the one given, else what launch/peer.sh made here, else None. Raises ConfigError."""
    if not python:
        found = PEER_PYTHON.absolute()
        if not found.exists():
            say("no peer: give --peer=PYTHON, as `bash launch/peer.sh` prints it")
            return None
        return found
    path = Path(python).absolute()  # not resolved: the link is what makes it that environment's
    if not path.is_file():
        raise ConfigError(
            f"--peer={python}: expected the path of a python; `bash launch/peer.sh` makes one and prints it"
        )
    return path


def peer_shape(settings: Config) -> dict[str, Any]:
    """The peer's dim, depth, max_seq_len and heads that correspond to a configuration.

    Its attention has one width in all stages, heads * 64: that of our coarsest stage, at most its default of 512.
    Raises ConfigError where nothing corresponds.
    """
    stages = settings.model.stages
    if settings.data.boundary:
        raise ConfigError("data.boundary: got true, expected false: the peer knows bytes only")
    for i, stage in enumerate(stages):
        if stage.ff_width != 4 * stage.d_model:
            raise ConfigError(f"model.stages.{i}.d_ff: got {stage.ff_width}, expected 4 * d_model, as the peer has it")
    finer = [stage.patch_size for stage in stages]
    lengths = [settings.data.seq_len // finer[0], *(a // b for a, b in itertools.pairwise(finer))]
    return {
        "dim": [s.d_model for s in stages],
        "depth": [s.n_layers for s in stages],
        "max_seq_len": lengths,
        "heads": max(1, min(PEER_MOST_HEADS, stages[0].d_model // PEER_D_HEAD)),
    }


def peer_count(settings: Config) -> PeerCount:
    """Count the peer as flops.count counts ours: products only, one multiply-add is two operations."""
    shape = peer_shape(settings)
    inner = shape["heads"] * PEER_D_HEAD
    fine = shape["dim"][-1]
    parameters = fine * PEER_VOCAB + PEER_VOCAB  # readout
    useful = executed = float(fine * PEER_VOCAB)
    for i, (stage, d, layers, length) in enumerate(
        zip(settings.model.stages, shape["dim"], shape["depth"], shape["max_seq_len"], strict=True)
    ):
        p, last = stage.patch_size, i + 1 == len(shape["dim"])
        matrices = 4 * d * inner + 8 * d * d
        parameters += layers * (matrices + 4 * d + d + 2 * d) + d + d + PEER_VOCAB * fine  # norms, biases, start, bytes
        useful += layers * (matrices + (length + 1) * inner) / p
        executed += layers * (matrices + (length + 2) * inner) / p * (length + 1) / length
        if not last:
            wide, next_wide = p * fine, shape["dim"][i + 1] * shape["max_seq_len"][i + 1]
            parameters += wide * d + d + 2 * wide + 2 * d + d * next_wide + next_wide  # patch embedder, projection
            useful += (wide * d + d * next_wide) / p
            executed += (wide * d + d * next_wide) / p
    executed += fine * PEER_VOCAB / shape["max_seq_len"][-1]
    return PeerCount(parameters, 6 * useful, 6 * executed)


def write_rows(settings: Config, folder: Path, limit_bytes: int, val_bytes: int = 0) -> None:
    """Put the first training rows, and the first bytes of the validation split, into folder/{train,val}.bytes."""
    from mbtrain.data.rows import Stream
    from mbtrain.shards import load_manifest, open_split

    data = settings.data
    [(_, path)] = config.source_paths(settings)
    load_manifest(path)
    stream = Stream(open_split(path, data.train_split, "size"), boundary=False, seed=settings.train.seed)
    # In the order of training, shuffled: the peer's own script draws random windows, neighbours would be unfair to it.
    rows = max(settings.train.global_batch_size, min(limit_bytes, stream.ids_per_epoch) // data.seq_len)
    with (folder / "train.bytes").open("wb") as file:
        for first in range(0, rows, _ROWS_AT_A_TIME):
            numbers = np.arange(first, min(first + _ROWS_AT_A_TIME, rows))
            stream.rows(numbers, data.seq_len)[0].astype(np.uint8).tofile(file)
    if val_bytes:
        val = Stream(open_split(path, data.val_split, "size"), boundary=False, seed=None)
        count = min(val_bytes, val.ids_per_epoch)
        val.read(0, count).astype(np.uint8).tofile(folder / "val.bytes")


def interleave(parts: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Call every part once a round, in turn (A B A B ...), after one call each that is not counted."""
    out: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, call in parts.items():
            answer = call()
            if number:
                out[name].append(answer)
                say(f"round {number}/{rounds} · {name}: {answer['wall_s']:.2f} s, {answer['cpu_s']:.2f} CPU seconds")
    return out


def spread(values: Sequence[float]) -> dict[str, float]:
    """{"median", "min", "max"}."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rates(answers: Sequence[Mapping[str, Any]], n_bytes: int) -> dict[str, dict[str, float]]:
    """Bytes per second of the clock and of CPU time over the rounds, each of n_bytes."""
    return {
        "bytes_per_s": spread([n_bytes / a["wall_s"] for a in answers]),
        "bytes_per_cpu_s": spread([n_bytes / a["cpu_s"] for a in answers]),
    }


def settings_of(path: str, data: str, **changes: str) -> Config:
    """The configuration of a measurement, with --data and dotted changes laid over it."""
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return config.load(path, {**({"data.path": data} if data else {}), **given})


def machine(threads: int) -> dict[str, Any]:
    """What a reader needs to judge a figure: processor, cores, threads, load before the measurement, commit."""
    from mbtrain import hardware

    return {
        "device": hardware.cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "commit": hardware.commit(),
    }


def places(count: int) -> list[dict[str, str]]:
    """The environment of each of so many ranks that meet on this machine."""
    meeting = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    meeting["MASTER_PORT"] = free_port()
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting} for rank in range(count)]


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def say(line: str) -> None:
    """A line of progress on stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
