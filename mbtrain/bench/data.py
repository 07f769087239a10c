"""`mbtrain bench data`: data prep, loading and opening against the raw read of the same files, in the same run."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mbtrain import metrics
from mbtrain.bench import inputs, measure
from mbtrain.bench.reading import files
from mbtrain.command import flag, no_unknown, number, write
from mbtrain.errors import ConfigError, MbtrainError

Answers = Mapping[str, Sequence[Mapping[str, Any]]]

SEQ_LEN = 8192
SIDE = 64
BATCHES = (16, 64)
_MB, _GB = 1e6, 1e9
# Small shards, so that two workers do not wait for the last one of what is, after all, a short job.
_SHARD_BYTES = {"text": "64Mi", "image": "16Mi"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `short` jobs are taken from long ones, so that what a job costs at its start drops out.

    text_bytes, short_bytes     of plain files that are prepared
    pictures, short_pictures    JPEGs that are prepared. A worker takes 16 MiB of files at a time: both jobs of both
                                kinds are even numbers of such groups, nearly
    documents, short_documents  of 8 KiB and of 1 KiB on average, that are loaded
    samples, many_samples       of data sets that are opened
    batches, steps              that memory is watched for, and that are trained
    """

    text_bytes: int
    short_bytes: int
    pictures: int
    short_pictures: int
    documents: int
    short_documents: int
    samples: int
    many_samples: int
    batches: int
    steps: int


FULL = Sizes(400_000_000, 36_000_000, 2100, 700, 24_000, 60_000, 1_000_000, 10_000_000, 100_000, 20)
QUICK = Sizes(1_000_000, 100_000, 12, 4, 120, 400, 1000, 2000, 100, 3)


@dataclass(frozen=True)
class Figure:
    """A measured figure: its value in each round, and what it is to reach (`at_most`: not to exceed)."""

    name: str
    unit: str
    values: Sequence[float]
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if self.target is None:
            return None
        median = statistics.median(self.values)
        return median <= self.target if self.at_most else median >= self.target

    def as_json(self) -> dict[str, Any]:
        """Median, smallest and largest value, unit, target and whether it is met."""
        return {**measure.spread(self.values), "unit": self.unit, "target": self.target, "met": self.met}

    def line(self) -> str:
        """A line of the table."""
        middle, low, high = (f"{value:.4g}" for value in measure.spread(self.values).values())
        line = f"{self.name:<48}{middle:>8} {self.unit:<6} {f'({low} to {high})':<20}"
        if self.target is None:
            return line.rstrip()
        return f"{line} {'<=' if self.at_most else '>='} {self.target:g}: {'reached' if self.met else 'missed'}"


@dataclass(frozen=True)
class Bench:
    """What the parts share. text, images: folders of the user's, or empty."""

    folder: Path
    sizes: Sizes
    rounds: int
    text: str
    images: str
    config: str


def data(
    *,
    parts: str = "",
    rounds: str = "5",
    text: str = "",
    images: str = "",
    config: str = "configs/quickstart.yaml",
    out: str = "",
    quick: str = "",
    **unknown: str,
) -> dict[str, Any]:
    """Every figure of data at its target: medians over interleaved rounds, one thread a measured process.

    prep       speed of a whole `mbtrain-prep` job, by the clock, less that of a short one; `start` is what that takes
               off. Two workers against one: whole jobs, their starts included. Pillow alone decodes in a loop
    loading    packed rows of 8192 bytes by the mixture, page cache warm, by CPU time; webdataset's own reader and the
               raw read (1 MiB blocks) get the same shards. What a call costs is felt in small batches: both are shown
    opening    a data set of a million samples in a fresh process, and the batch in the middle of its first epoch;
               of ten million as well
    memory     what the loader's process has resident after 10 % of the batches, and how much more at their end
    training   the share of a step that waits for data, in `mbtrain train` with the shape of --config

    --parts=LIST      some of the above: text,images,loading,opening,memory,training                      (all)
    --text=DIR --images=DIR    prepare what is there, rather than made-up text and pictures
    --out=DIR         the folder in which temporary ones are made                      (where TMPDIR says)
    --quick           everything once and tiny: whether it runs, no measurement
    Raises ConfigError for options that do not fit, MbtrainError where a measured process fails.
    """
    no_unknown(data, unknown)
    tiny = flag("--quick", quick)
    wanted = parts.split(",") if parts else list(PARTS)
    if strange := [part for part in wanted if part not in PARTS]:
        raise ConfigError(f"--parts: expected some of {','.join(PARTS)}, got {strange[0]!r}")
    for option, given in (("--text", text), ("--images", images), ("--out", out)):
        if given and not Path(given).exists():
            raise ConfigError(f"{option}={given}: no such folder")
    n_rounds = 1 if tiny else number("--rounds", rounds, int, 1)
    result = measure.machine(1)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="mbtrain-bench-", dir=out or None) as name:
        for part in wanted:
            folder = Path(name) / part
            folder.mkdir()
            bench = Bench(folder, QUICK if tiny else FULL, n_rounds, text, images, config)
            found = PARTS[part](bench)
            shutil.rmtree(folder)
            figures += found
            for figure in found:
                write(figure.line())
            sys.stdout.flush()  # what is measured stands there, whatever becomes of the next part
    return result | {
        "rounds": n_rounds,
        "load_after": os.getloadavg()[0],
        "figures": {figure.name: figure.as_json() for figure in figures},
        "missed": [figure.name for figure in figures if figure.met is False],
    }


# ---- data prep ----------------------------------------------------------------------------------------------------


def prep_text(bench: Bench) -> list[Figure]:
    """Speed of preparing plain files of text."""
    sizes = bench.sizes
    source = bench.text or str(inputs.texts(bench.folder / "long", sizes.text_bytes))
    short = str(inputs.texts(bench.folder / "short", sizes.short_bytes, seed=1))
    with reader() as ask:
        alone = {name: partial(ask, name, root=source) for name in ("read", "sha256")}
        alone["copy"] = partial(ask, "copy", root=source, to=str(bench.folder / "copy"))
        answers = measure.interleave({**alone, **_jobs(bench, "text", short, source, ())}, bench.rounds)
    n_bytes, short_bytes = _bytes_of(source), _bytes_of(short)
    figures = _prep_figures("text", answers, (n_bytes / _MB, short_bytes / _MB), "MB/s", 150)
    by_cpu = _beyond(answers["job 1"], answers["short 1"], "cpu_s")
    figures.append(Figure("text, prep, by CPU time", "MB/s", [(n_bytes - short_bytes) / s / _MB for s in by_cpu]))
    what = {"read": "raw read", "sha256": "read and hashed", "copy": "read, written and synced"}
    for name, label in what.items():
        figures.append(Figure(f"text, {label}", "MB/s", [n_bytes / a["wall_s"] / _MB for a in answers[name]]))
    return figures


def prep_images(bench: Bench) -> list[Figure]:
    """Speed of preparing JPEGs, against Pillow alone on the same ones."""
    sizes = bench.sizes
    source = bench.images or str(inputs.pictures(bench.folder / "long", sizes.pictures))
    short = str(inputs.pictures(bench.folder / "short", sizes.short_pictures, seed=1))
    with reader() as ask:
        alone = {"read": partial(ask, "read", root=source), "pillow": partial(ask, "pillow", root=source, size=SIDE)}
        answers = measure.interleave(
            {**alone, **_jobs(bench, "image", short, source, (f"--size={SIDE}",))}, bench.rounds
        )
    counted = answers["pillow"][0]["pictures"]
    if not counted:
        raise ConfigError(f"--images={source}: holds no picture that Pillow can read")
    figures = _prep_figures("images", answers, (counted, sizes.short_pictures), "/s", None)
    for clock, target in (("wall_s", 0.9), ("cpu_s", None)):
        took = _beyond(answers["job 1"], answers["short 1"], clock)
        each = [a[clock] / counted * (counted - sizes.short_pictures) for a in answers["pillow"]]
        shares = [loop / job for loop, job in zip(each, took, strict=True)]
        by = "" if target else ", by CPU time"
        figures.append(Figure(f"images, share of Pillow's own speed{by}", "", shares, target))
    pillow = [counted / a["wall_s"] for a in answers["pillow"]]
    raw = [_bytes_of(source) / a["wall_s"] / _MB for a in answers["read"]]
    return figures + [
        Figure("images, Pillow alone in a loop", "/s", pillow),
        Figure("images, raw read", "MB/s", raw),
    ]


def _jobs(
    bench: Bench, verb: str, short: str, source: str, options: Sequence[str]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """A short and a long job of `mbtrain-prep VERB` by one worker, and the long one by two."""
    options = [f"--shard-bytes={_SHARD_BYTES[verb]}", *options]
    return {
        f"{name} {workers}": partial(prepare, [verb, place, f"--workers={workers}", *options], bench.folder / "out")
        for name, place, workers in (("short", short, 1), ("job", source, 1), ("job", source, 2))
    }


def prepare(arguments: Sequence[str], out: Path) -> dict[str, Any]:
    """A run of `mbtrain-prep` in a fresh process: its seconds, by the clock and of CPU time with all its workers'."""
    shutil.rmtree(out, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    run([sys.executable, "-m", "data_prep", *arguments, f"--out={out}"])
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall_s": wall_s, "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def run(command: Sequence[str]) -> None:
    """Run a program with one thread to its end. Raises MbtrainError with the last line that it wrote if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        raise MbtrainError(f"bench: {' '.join(command[1:5])}: status {ended.returncode}: {said[-1] if said else ''}")


def _prep_figures(
    kind: str, answers: Answers, amounts: tuple[float, float], unit: str, target: float | None
) -> list[Figure]:
    """amounts: of the long and of the short job, in units."""
    amount, short = amounts
    speeds = [(amount - short) / seconds for seconds in _beyond(answers["job 1"], answers["short 1"], "wall_s")]
    starts = [a["wall_s"] - short / statistics.median(speeds) for a in answers["short 1"]]
    # Whole jobs: less a short one, which gives two workers too few pieces, the ratio came out above 2.
    ratios = [one["wall_s"] / two["wall_s"] for one, two in zip(answers["job 1"], answers["job 2"], strict=True)]
    return [
        Figure(f"{kind}, prep, one worker", unit, speeds, target),
        Figure(f"{kind}, two workers against one", "x", ratios, 1.7),
        Figure(f"{kind}, prep, with its start", unit, [amount / a["wall_s"] for a in answers["job 1"]]),
        Figure(f"{kind}, start of one worker's job", "s", starts),
    ]


def _beyond(jobs: Sequence[Mapping[str, Any]], short: Sequence[Mapping[str, Any]], clock: str) -> list[float]:
    """Seconds of each job less those of a short one (median); at least a tenth of it, where they hardly differ."""
    less = statistics.median(job[clock] for job in short)
    return [max(job[clock] - less, job[clock] / 10) for job in jobs]


# ---- loading ------------------------------------------------------------------------------------------------------


def loading(bench: Bench) -> list[Figure]:
    """Speed of packed rows by index, against webdataset's reader and the raw read of the same shards."""
    figures: list[Figure] = []
    for kib, documents, aim in ((8, bench.sizes.documents, True), (1, bench.sizes.short_documents, False)):
        root = str(inputs.data_set(bench.folder / f"{kib}k", {"train": documents}, kib * 1024))
        with reader() as ask:
            parts: dict[str, Callable[[], dict[str, Any]]] = {
                "read": partial(ask, "read", root=f"{root}/train", pattern="*.tar"),
                "webdataset": partial(ask, "webdataset", root=root),
            }
            for batch in BATCHES:
                parts[f"rows {batch}"] = partial(ask, "rows", root=root, seq_len=SEQ_LEN, batch=batch)
            answers = measure.interleave(parts, bench.rounds)
        speeds = {name: [a["bytes"] / a["cpu_s"] / _GB for a in of] for name, of in answers.items()}
        theirs, what = statistics.median(speeds["webdataset"]), f"loading {kib} KiB documents"
        for batch in BATCHES:
            ours, aimed = speeds[f"rows {batch}"], aim and batch == max(BATCHES)
            ratios = [speed / theirs for speed in ours]
            figures.append(Figure(f"{what}, {batch} rows at a time", "GB/s", ours, 1 if aimed else None))
            figures.append(Figure(f"{what}, {batch} rows to webdataset", "x", ratios, 5 if aimed else None))
        figures.append(Figure(f"{what}, webdataset", "GB/s", speeds["webdataset"]))
        figures.append(Figure(f"{what}, raw read", "GB/s", speeds["read"]))
    return figures


def opening(bench: Bench) -> list[Figure]:
    """Seconds and memory of opening large data sets and resuming in their middle."""
    figures: list[Figure] = []
    for samples, rounds, aim in (
        (bench.sizes.samples, bench.rounds, True),
        (bench.sizes.many_samples, min(bench.rounds, 2), False),
    ):
        root = str(inputs.data_set(bench.folder / str(samples), {"train": samples}, 8192, sparse=True))

        def once(root: str = root) -> dict[str, Any]:
            with reader() as ask:
                return ask("opening", root=root, seq_len=SEQ_LEN, batch=BATCHES[0])

        answers = measure.interleave({"opening": once}, rounds)["opening"]
        shutil.rmtree(root)
        what = f"opening {samples:,} samples"
        taken = [a["open_s"] + a["resume_s"] for a in answers]
        peaks = [a["peak_bytes"] / _MB for a in answers]
        figures += [
            Figure(f"{what} and resuming", "s", taken, 1 if aim else None, at_most=True),
            Figure(f"{what}, peak memory", "MB", peaks, 300 if aim else None, at_most=True),
            Figure(f"{what}, without resuming", "s", [a["open_s"] for a in answers]),
            Figure(f"{what}, import of pyarrow", "s", [a["import_s"] for a in answers]),
        ]
    return figures


def memory(bench: Bench) -> list[Figure]:
    """How much the loader's process grows. The data set is so small that even a tenth of the batches is two epochs."""
    root = str(inputs.data_set(bench.folder / "8k", {"train": bench.sizes.documents // 10}, 8192))
    with reader() as ask:
        resident = ask("growth", root=root, seq_len=512, batch=8, n_batches=bench.sizes.batches)["resident_bytes"]
    what = f"memory over {bench.sizes.batches:,} batches"
    return [
        Figure(f"{what}, more at the end", "MB", [(resident["100"] - resident["10"]) / _MB], 1, at_most=True),
        Figure(f"{what}, more at the half", "MB", [(resident["50"] - resident["10"]) / _MB]),
        Figure(f"{what}, after a tenth", "MB", [resident["10"] / _MB]),
    ]


def training(bench: Bench) -> list[Figure]:
    """The share of training steps that waits for data, by a run's own metrics."""
    documents = {"train": max(bench.sizes.documents // 10, 20), "val": 10}
    root = inputs.data_set(bench.folder / "8k", documents, 8192)
    command = [sys.executable, "-m", "mbtrain", "train", bench.config, f"--run={bench.folder / 'run'}"]
    limits = {"data.path": root, "train.steps": bench.sizes.steps, "log.every_steps": 1, "log.mlflow": "false"}
    run([*command, *(f"--{key}={value}" for key, value in limits.items())])
    lines = [line for line in metrics.read(bench.folder / "run" / "metrics.jsonl") if "perf/data_wait_frac" in line]
    waited = [line["perf/data_wait_frac"] for line in lines[1:] or lines]  # the first step waits for the first batch
    return [
        Figure("training, share of a step spent waiting", "", waited, 0.01, at_most=True),
        Figure("training, a step", "s", [line["perf/step_s"] for line in lines[1:] or lines]),
    ]


def reader() -> Any:
    """A process of reading.py with one thread, as a context; it gives the function that asks it."""
    return measure.worker([sys.executable, "-m", "mbtrain.bench.reading"], "reading", threads=1)


def _bytes_of(root: str) -> int:
    return sum(path.stat().st_size for path in files(root))


PARTS: dict[str, Callable[[Bench], list[Figure]]] = {
    "text": prep_text,
    "images": prep_images,
    "loading": loading,
    "opening": opening,
    "memory": memory,
    "training": training,
}
