"""What surrounds the loop: begin or go on with a run, report, validate, sample, save, and leave in order."""

from __future__ import annotations

import errno
import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbtrain import checkpoint, config, evaluate, hardware, metrics, plots, request, tokens, tracking, watch
from mbtrain import sample as sampling
from mbtrain.agreement import on_all_ranks, on_rank_0, watched
from mbtrain.checkpoint import Checkpoint, Progress, Stored
from mbtrain.config import Config
from mbtrain.data.mixture import Mixture, mixture
from mbtrain.data.opening import Opened, data_hash, described, open_sources
from mbtrain.engine import Engine, Ranks, from_rank_0, gathered, start, stop, total
from mbtrain.errors import CheckpointError, ConfigError, MbtrainError
from mbtrain.log import bar, duration, say, size
from mbtrain.model import build
from mbtrain.model.flops import Count, count
from mbtrain.noise_scale import in_rows
from mbtrain.redact import redact
from mbtrain.saving import Saver
from mbtrain.shards import load_manifest
from mbtrain.signals import STOPPING, handled
from mbtrain.startup import Startup
from mbtrain.units import measured_unit_bytes

MOST_VALIDATION = 0.1  # of training's time; where it takes more, that is said
STOP_FILE = "stop"  # RUN/stop, made by anybody, ends the run as SIGTERM does


@dataclass
class Clock:
    """Training time in seconds: runs from `start`, rests while something else is done."""

    began: float = 0.0

    def start(self, elapsed_s: float) -> None:
        self.began = time.perf_counter() - elapsed_s

    def read(self) -> float:
        return time.perf_counter() - self.began

    @contextmanager
    def resting(self) -> Iterator[None]:
        at = time.perf_counter()
        yield
        self.began += time.perf_counter() - at


@dataclass(frozen=True)
class Session:
    """All that a training holds. `stopping` is empty until a signal came to this rank; ranks agree on it each step."""

    settings: Config
    run: Path
    ranks: Ranks
    engine: Engine
    mixture: Mixture
    counted: Count
    val_sources: list[Opened]
    progress: Progress
    peak_flops: float | None
    stopping: list[int]
    saver: Saver
    shipper: subprocess.Popen[bytes] | None
    startup: Startup
    unwritten: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    log_wait_s: list[float] = field(default_factory=list)  # of the report before, what training waited for it
    watching: watch.Watch | None = None
    alone: bool = True


class Window:
    """Sums since the last report, and where the run stood then.

    nats are of `targets` ids that count and were predicted, `bytes` of which are real; ids are those of whole rows.
    (A model that is trained on a span of each row predicts fewer bytes than are read, which is what Progress counts.)
    """

    def __init__(self, since: Progress, held_s: float):
        self.since, self.held_s, self.nats, self.targets, self.ids, self.waited_s = since, held_s, 0.0, 0, 0, 0.0
        self.bytes = 0

    def add(self, nats: float, targets: int, bytes_: int, ids: int) -> None:
        self.nats += nats
        self.targets += targets
        self.bytes += bytes_
        self.ids += ids


@contextmanager
def opened(settings: Config, run: Path, resume: bool, alone: bool = True) -> Iterator[Session]:
    """Join the ranks, check everything, build or load; afterwards leave a status and the process group.

    alone: False for one of many runs side by side, see train.train.

    A rank that is lost, or that fails alone, ends all of them with exit status 75 and its name.
    """
    stopping: list[int] = []
    startup = Startup()
    startup.done("imports")
    ranks = start()
    startup.done("ranks_met")
    ours = False

    def last_words(verdict: str) -> None:
        text = f"{verdict}. All ranks stop; go on from the last checkpoint with --resume={run}"
        if ours and ranks.rank == (1 if verdict.startswith("rank 0 ") else 0):  # one speaks for all
            say(run, text)
            _write_status(run, "FAILED", text)
        elif verdict.startswith("rank 0 ") or ranks.rank == 0:
            sys.stderr.write(f"mbtrain: {text}\n")

    lost_after_s = settings.train.lost_after_s
    try:
        with (
            watched(ranks, lost_after_s, last_words) as watching,
            handled(lambda number: _noted(stopping, number), *STOPPING),
            ExitStack() as held,
        ):
            sources = on_all_ranks(lambda: _open_sources(settings, ranks))
            found = on_rank_0(lambda: _take_up(settings, run, resume, ranks, data_hash(sources[0]), held), ranks)
            settings = on_all_ranks(lambda: _as_taken_up(settings, run))
            ours = True
            startup.done("data")
            yield replace(_begin(settings, run, ranks, sources, found, stopping, startup, alone), watching=watching)
    except Exception as error:
        if ranks.rank == 0 and ours:
            _write_status(run, "FAILED", str(error) if isinstance(error, MbtrainError) else repr(error))
        raise
    finally:
        stop()


def last_step(settings: Config, mixed: Mixture, progress: Progress, training_flops: float) -> int | None:
    """The step that ends the run; None: only minutes do. Data that ends is a limit too, but never a silent one.

    training_flops: of a byte of a row.

    Raises:
        ConfigError: train.steps, bytes or flops ask for more than data.sources hold by their epochs.
    """
    asked = config.step_limit(settings, training_flops)
    if mixed.end is None:
        return asked
    left = mixed.end - progress.position // settings.data.seq_len
    last = progress.step + left // settings.train.global_batch_size
    if last < max(asked or 1, 1):
        raise ConfigError(
            f"data.sources: their epochs and weights end after {mixed.end} rows of {settings.data.seq_len} bytes, at "
            f"step {last} of {settings.train.global_batch_size} rows, expected {asked or 1} steps or more; train less, "
            "raise epochs, or leave it out of one source"
        )
    return last if asked is None else asked


def begun(now: Session) -> None:
    """After each step; of the first one it is said how long after its begin the process has made it."""
    if "step" not in now.startup.parts:
        now.startup.done("step")
        if now.ranks.rank == 0:
            say(now.run, f"first step {now.startup}")


def report(
    now: Session, window: Window, progress: Progress, *, lr_factor: float, grad_norm: float, done: float, flops: float
) -> None:
    """Write the window's metrics to metrics.jsonl and a line to the log. Collective: memory is the ranks' largest.

    train/loss_nats and train/bpb are exact over what was predicted; progress/bytes and perf/bytes_per_s count what was
    read, which is more where a model is trained on a span of each row; progress/flops and perf/mfu are what both cost.
    """
    began = time.perf_counter()
    _report(now, window, progress, lr_factor=lr_factor, grad_norm=grad_norm, done=done, flops=flops)
    now.log_wait_s[:] = [time.perf_counter() - began]


def _report(
    now: Session, window: Window, progress: Progress, *, lr_factor: float, grad_norm: float, done: float, flops: float
) -> None:
    memory = max(gathered(hardware.peak_memory_bytes(now.ranks.device)))
    if now.ranks.rank != 0:
        return
    settings, since = now.settings, window.since
    seconds = max(progress.elapsed_s - since.elapsed_s, 1e-9)
    steps = progress.step - since.step
    real_bytes = progress.bytes - since.bytes
    row_ids = settings.train.global_batch_size * settings.data.seq_len
    values = {
        "train/loss_nats": window.nats / window.targets if window.targets else float("nan"),
        "train/bpb": bits_per_byte(window.nats, window.bytes),
        "optim/lr": settings.optim.lr * lr_factor,
        "optim/grad_norm": grad_norm,
        "optim/loss_scale": now.engine.loss_scale(),
        "perf/bytes_per_s": real_bytes / seconds,
        "perf/step_s": seconds / steps,
        "perf/data_wait_frac": window.waited_s / seconds,
        "mem/peak_bytes": memory,
        "progress/bytes": progress.bytes,
        "progress/flops": progress.step * row_ids * flops,
        "progress/epoch": progress.position / sum(source.stream.ids_per_epoch for source in now.mixture.sources),
        "progress/minutes": progress.elapsed_s / 60,
        **({"perf/log_wait_s": now.log_wait_s[0]} if now.log_wait_s else {}),
        **({"perf/save_wait_s": now.saver.held_s - window.held_s} if now.saver.held_s > window.held_s else {}),
        **_realised_mix(now, progress),
        **(now.startup.metrics() if since.step == now.progress.step else {}),  # the first report of this process
    }
    if settings.log.noise_scale and (noise := in_rows(progress.noise)) is not None:
        values["optim/noise_scale"] = noise
    mfu = None if now.peak_flops is None else window.ids * flops / seconds / (now.peak_flops * now.ranks.ranks)
    if mfu is not None:
        values["perf/mfu"] = mfu
    record(now, progress.step, values)
    left = progress.elapsed_s * (1 - done) / done if done > 0 else None
    say(
        now.run,
        f"step {progress.step} · {size(progress.bytes)} · loss {values['train/loss_nats']:.4f} nats · "
        f"{values['train/bpb']:.4f} bits/byte · lr {values['optim/lr']:.2e} · norm {grad_norm:.2f} · "
        f"{size(values['perf/bytes_per_s'])}/s · MFU {'unknown' if mfu is None else f'{mfu:.0%}'} · "
        f"data wait {values['perf/data_wait_frac']:.0%} · {'' if left is None else duration(left) + ' left'}",
    )


def validate(now: Session, progress: Progress, *, limit_bytes: int | None) -> float:
    """Bits per byte of the validation split (or of its first bytes, under another key), logged. Collective.

    Of the weights that are evaluated. With optim.ema those are averages, and the last weights are scored beside them.
    """
    with now.clock.resting():
        began = time.perf_counter()
        scored = _score(now, limit_bytes)
        last = _score(now, limit_bytes, last=True) if now.settings.optim.ema is not None else None
        if now.ranks.rank == 0:
            key = "val/bpb" if limit_bytes is None else "val/partial_bpb"
            where = {"progress/bytes": progress.bytes, "progress/minutes": progress.elapsed_s / 60}
            where["perf/eval_s"] = time.perf_counter() - began
            beside = {} if last is None else last.metrics(key.replace("/", "/last_"))
            record(now, progress.step, {**scored.metrics(key), **beside, **where})
            part = "whole split" if limit_bytes is None else "first part"
            took = duration(time.perf_counter() - began)
            images = all(source.split.modality == "image" for source in now.val_sources)
            bpb = f"{scored.bpb:.4f}{' (= bits per dimension)' if images else ''}"
            bpb += "" if last is None else f" (of the averaged weights; the last ones: {last.bpb:.4f})"
            say(now.run, f"step {progress.step} · {key} {bpb} · {part}, {size(scored.bytes)} · took {took}")
        return scored.bpb


def _score(now: Session, limit_bytes: int | None, last: bool = False) -> evaluate.Score:
    """The validation split's score by the weights that are evaluated, or by the last ones. Collective."""
    with now.engine.evaluating(last):
        score: evaluate.Score = on_all_ranks(
            lambda: evaluate.score(
                now.engine,
                now.val_sources,
                seq_len=now.settings.data.seq_len,
                batch=now.settings.eval.batch_size or now.engine.micro,
                device=now.ranks.device,
                rank=now.engine.reader,
                ranks=now.engine.readers,
                columns=now.engine.columns,
                reduce=lambda sums: total(sums, now.ranks),
                limit_bytes=limit_bytes,
            )
        )
    return score


def final_score(now: Session, progress: Progress) -> float:
    """The whole validation split's bits per byte and a sample; a finished run that is taken up again keeps its own."""
    path = now.run / "metrics.jsonl"
    known: float | None = None
    if now.ranks.rank == 0 and progress == now.progress and path.exists():
        scored = [m["val/bpb"] for m in metrics.stream(path) if "val/bpb" in m and m["step"] == progress.step]
        known = scored[-1] if scored else None
    known = from_rank_0(known)
    if known is not None:
        return known
    if now.settings.sample.at_end:
        sample(now, progress)
    return validate(now, progress, limit_bytes=None)  # last: where it stands, nothing is missing


def sample(now: Session, progress: Progress) -> None:
    """Write samples/step_<step>.txt, .png or .wav from whole fp32 weights, on rank 0. Collective: weights are gathered.

    A prompt file that is gone meanwhile or a full disk is said, and the run goes on.
    """
    with now.clock.resting():
        began = time.perf_counter()
        weights = dict(now.engine.weights())
        if now.ranks.rank == 0:
            try:
                _write_samples(now, weights, progress.step)
            except (OSError, ConfigError) as error:
                say(now.run, f"step {progress.step} · NOT sampled: {error}")
            record(now, progress.step, {"perf/sample_s": time.perf_counter() - began})
        from_rank_0(None)  # the others wait


def _write_samples(now: Session, weights: dict[str, Tensor], step: int) -> None:
    settings, how = now.settings, now.settings.sample
    model = build(settings)
    model.load_state_dict(weights)
    model = model.to(now.ranks.device)
    choice = sampling.Sampling(how.temperature, top_p=how.top_p, seed=settings.train.seed)
    for plan in request.plans(now.run, settings, request.asked_in(how)):
        target = now.run / "samples" / f"{checkpoint.name_of(step)}{plan.form.suffix}"
        sampling.write(plan, sampling.make(model, plan, choice), target)


def save(now: Session, progress: Progress) -> bool:
    """Begin to write a checkpoint; False when that could not even begin. Collective."""
    with now.clock.resting():
        return now.saver.begin(progress)


def skip(now: Session, progress: Progress, trouble: str, loss: float) -> Progress:
    """Meet a bad step by the guard's policy; returns the progress, its optimizer steps those of the weights.

    To be called between two steps, on all ranks alike. Raises DivergedError where the run is to stop.
    """
    guard = now.settings.guard
    values = {"guard/bad_loss_nats": loss, "guard/bad_steps": len(progress.bad_steps)}
    did = "no update, and its batch is stepped over"
    if guard.policy == "rewind":
        found = _rewind(now)
        values["guard/rewound_to"] = found.progress.step
        did = f"the weights of step {found.progress.step} are put back, and the data since then is stepped over"
        progress = replace(progress, optimizer_steps=found.progress.optimizer_steps)
    if now.ranks.rank == 0:
        record(now, progress.step, values)
        say(now.run, f"step {progress.step} · {trouble} · {did}")
    return progress


def _rewind(now: Session) -> Checkpoint:
    """Weights, moments and loss scale of the newest good checkpoint, in place."""
    with now.clock.resting():
        now.saver.finish()
        _, found = on_rank_0(lambda: checkpoint.find(now.run), now.ranks)
        _load(now.engine, found)
        return found


def _load(engine: Engine, found: Checkpoint) -> None:
    def load() -> None:
        checkpoint.must_fit(found, engine.shapes())
        engine.load_state(Stored(found), found.progress)
        engine.load_loss_scaler_state(found.progress.loss_scaler)

    on_all_ranks(load)


def end(now: Session, progress: Progress, status: str) -> None:
    """Write the status, and give the MLflow shipper a bounded time for the rest. Rank 0 acts. Collective."""
    gathered(None)
    if now.watching:  # all ranks have done their part: the others leave while rank 0 waits, and are not lost
        now.watching.stop()
    if now.ranks.rank != 0:
        return
    if status == "KILLED":
        (now.run / STOP_FILE).unlink(missing_ok=True)
        say(now.run, f"stopped as told after step {progress.step}, saved; go on with --resume={now.run}")
    _write_status(now.run, status, "")
    if now.shipper is not None:
        tracking.finish(now.shipper, now.run, status, timeout_s=30.0)
    elif now.alone:
        plots.loss_curve(now.run)


def record(now: Session, step: int, values: dict[str, float]) -> None:
    """Add a line to metrics.jsonl. While the disk takes none, lines wait in memory and are written, in order, later."""
    now.unwritten.append((step, {"time_unix_s": round(time.time(), 3), **values}))
    while now.unwritten:
        try:
            metrics.append(now.run / "metrics.jsonl", *now.unwritten[0])
        except OSError as error:
            say(now.run, f"metrics.jsonl takes nothing ({error.strerror}); {len(now.unwritten)} lines wait in memory")
            return
        del now.unwritten[0]


def live(now: Session, progress: Progress, done: float) -> None:
    """On a terminal, a line that says where the run is and is written over by the next."""
    if now.ranks.rank == 0 and sys.stderr.isatty():
        rate = (progress.bytes - now.progress.bytes) / max(progress.elapsed_s - now.progress.elapsed_s, 1e-9)
        left = duration(progress.elapsed_s * (1 - done) / done) if done > 0 else "?"
        bar(done, f"step {progress.step} · {size(progress.bytes)} · {size(rate)}/s · {left} left")


def told_to_stop(now: Session) -> bool:
    """Whether a signal came to this rank, or, seen by rank 0, somebody made RUN/stop."""
    if now.ranks.rank == 0 and not now.stopping and (now.run / STOP_FILE).exists():
        now.stopping.append(signal.SIGTERM)
    return bool(now.stopping)


def bits_per_byte(nats: float, real_bytes: int) -> float:
    """Nats over all targets -> bits per real byte; nan where a batch held boundaries alone."""
    return nats / 0.6931471805599453 / real_bytes if real_bytes else float("nan")


def _open_sources(settings: Config, ranks: Ranks) -> tuple[list[Opened], list[Opened]]:
    """Training and validation sources. Every host reads the shards in full once; its other ranks look at sizes."""
    data = settings.data
    for _, path in config.source_paths(settings):
        known = load_manifest(path).splits
        for key, name in (("data.train_split", data.train_split), ("data.val_split", data.val_split)):
            if name not in known:
                raise ConfigError(f"{key}: got {name!r}, expected one of {', '.join(known)} in {path}")
    check = data.check if ranks.local_rank == 0 else "size"
    train = open_sources(settings, data.train_split, seed=settings.train.seed, check=check)
    again = "size" if data.val_split == data.train_split else check
    return train, open_sources(settings, data.val_split, seed=None, check=again)


def _take_up(
    settings: Config, run: Path, resume: bool, ranks: Ranks, manifest_hash: str, held: ExitStack
) -> Checkpoint | None:
    """Make the run directory or take it up, alone; returns the checkpoint to go on from. Acts on rank 0."""
    if settings.train.precision == "fp16" and ranks.device.type == "cpu":
        raise ConfigError("train.precision: got fp16, expected fp32, bf16 or autocast on CPU (fp16 needs a GPU)")
    exists = (run / "metrics.jsonl").exists() or (run / "checkpoints").exists()
    if exists and not resume:
        raise ConfigError(f"--run={run}: holds a run already; go on with --resume={run} or choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context((run / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
            raise CheckpointError(
                f"{run}: another training is at work in it; stop that one or choose another --run"
            ) from error
    settings, own_files = tokens.copied(settings, run)
    found, problems = checkpoint.newest(run) if exists else (None, [])
    if problems and found is None:
        raise CheckpointError(
            f"{run}: none of its {len(problems)} checkpoints is whole ({'; '.join(problems[:2])}); put one back, or "
            f"remove {run}/checkpoints to begin anew"
        )
    if found is not None:
        _must_fit(config.load(run / "config.yaml"), settings, run)
        if found.progress.dataset_hash != manifest_hash:
            paths = ", ".join(path for _, path in config.source_paths(settings))
            raise CheckpointError(f"{run}: was trained on other data than {paths} holds (manifest differs)")
    for text in problems:
        say(run, f"not used: {text}")
    if (run / "metrics.jsonl").exists():
        metrics.truncate_after(run / "metrics.jsonl", found.progress.step if found else 0)
    if found is not None:  # as its own end would have, had it not been cut off
        checkpoint.retire_older(found.path, settings.checkpoint.keep_last, settings.checkpoint.keep_every_steps)
    checkpoint.clear(run)
    for name in ("status.json", STOP_FILE):
        (run / name).unlink(missing_ok=True)
    for name, content in {**own_files, "config.yaml": config.to_yaml(tokens.written(settings)).encode()}.items():
        checkpoint.write_atomically(run / name, content)
    return found


def _as_taken_up(settings: Config, run: Path) -> Config:
    """The settings with the run's own vocabulary, on every rank: the run needs nothing but its data from then on."""
    if settings.model.vocabulary is None:
        return settings
    return settings.model_copy(update={"model": config.load(run / "config.yaml").model})


def _must_fit(old: Config, new: Config, run: Path) -> None:
    """What a resumed run may not change, since its weights or its place in the data would mean something else."""
    if old.model != new.model:
        raise CheckpointError(f"{run}: its model differs from this configuration's; see {run}/config.yaml")
    for section, key in (
        ("data", "seq_len"),
        ("data", "boundary"),
        ("data", "rows"),
        ("data", "scan"),
        ("data", "temperature"),
        ("data", "train_split"),
        ("data", "val_split"),
        ("train", "seed"),
        ("optim", "name"),
    ):
        was, now = getattr(getattr(old, section), key), getattr(getattr(new, section), key)
        if was != now:
            raise CheckpointError(f"{section}.{key}: got {now}, expected {was}, with which {run} was trained so far")
    # Folders may have moved; what decides the order may not.
    was, now = ([source.model_dump(exclude={"path", "name"}) for source in c.data.mixture] for c in (old, new))
    if was != now:
        raise CheckpointError(f"data.sources: got {now}, expected {was}, with which {run} was trained so far")


def _begin(
    settings: Config,
    run: Path,
    ranks: Ranks,
    sources: tuple[list[Opened], list[Opened]],
    found: Checkpoint | None,
    stopping: list[int],
    startup: Startup,
    alone: bool,
) -> Session:
    train_sources, val_sources = sources
    manifest_hash = data_hash(train_sources)
    mixed = mixture(settings.data, [(source.name, source.stream) for source in train_sources])
    progress = found.progress if found else Progress(dataset_hash=manifest_hash)
    if not progress.source_bytes:
        progress = replace(progress, source_bytes=[progress.bytes, *[0] * (len(train_sources) - 1)])
    torch.manual_seed(settings.train.seed)
    model = build(settings)
    # What a byte costs is the data's own where words or tokens are the positions; the same on all ranks and ever after.
    counted = count(settings, unit_bytes=on_all_ranks(lambda: measured_unit_bytes(model, mixed)))
    steps = last_step(settings, mixed, progress, counted.training_per_byte)
    engine = Engine(settings, model, ranks)
    if found:
        _load(engine, found)
    saver = Saver(run, settings, engine)
    startup.done("engine")
    # Beside others, what this process could reach cannot be measured; a GPU is its own.
    measurable = alone or ranks.device.type == "cuda"
    peak = hardware.peak_flops(ranks.device, settings.train.precision) if measurable else None
    startup.done("peak")
    shipper = None
    if ranks.rank == 0:
        environment = hardware.environment(ranks.device, ranks.ranks)
        tags = {"commit": environment["commit"], "host": environment["host"], "dataset_hash": manifest_hash}
        costs = {
            "parameters": counted.parameters,
            "forward_flops_per_byte": counted.forward_per_byte,
            "training_flops_per_byte": counted.training_per_byte,
            "unit_bytes": counted.unit_bytes,
        }
        kinds = [(source.name, source.split.modality) for source in train_sources]
        tags |= tracking.labels(settings, kinds, counted.parameters)
        described_ = {**environment, "tags": tags, "model": costs, "data": described(train_sources)}
        content = json.dumps(described_, indent=1)
        checkpoint.write_atomically(run / "environment.json", content.encode())
    # A prompt that does not fit the data is said now, not at the first sample.
    on_rank_0(lambda: request.plans(run, settings, request.asked_in(settings.sample)), ranks)
    if ranks.rank == 0:
        if settings.log.mlflow:
            uri = settings.log.mlflow_uri or tracking.default_uri(Path.cwd())
            known = progress.mlflow_run_id
            log = settings.log
            send = tracking.start_shipper if alone else tracking.leave_to_sync
            shipper = send(run, uri, log.experiment, settings.name, run_id=known, parent=log.parent)
        if found:
            say(run, f"going on from {found.path} at step {progress.step}")
        say(run, _headline(settings, counted, ranks, environment, peak))
        for line in _source_lines(mixed):
            say(run, line)
        if (share := evaluate.share_of_validation(settings, val_sources)) > MOST_VALIDATION:
            say(
                run,
                f"eval: validation every {settings.eval.every_steps} steps takes some {share:.0%} of training's time; "
                "a larger eval.every_steps or a smaller eval.limit_bytes takes less",
            )
        if mixed.end is not None and config.step_limit(settings, counted.training_per_byte) is None:
            say(run, f"data: the sources have been read as often as they may be after step {steps}: the run ends there")
    startup.done("tracking")
    return Session(
        settings,
        run,
        ranks,
        engine,
        mixed,
        counted,
        val_sources,
        progress,
        peak,
        stopping,
        saver,
        shipper,
        startup,
        alone=alone,
    )


def _headline(settings: Config, counted: Count, ranks: Ranks, environment: dict[str, Any], peak: float | None) -> str:
    stages = " + ".join(f"{s.n_layers}x{s.d_model} every {s.patch_size} B" for s in settings.model.stages)
    return (
        f"{settings.name}: {counted.parameters / 1e6:.2f}M parameters ({stages}), "
        f"{counted.training_per_byte / 1e6:.1f} MFLOP a byte · {ranks.ranks} x {environment['device']} · "
        f"{settings.train.precision}, ZeRO-{settings.train.zero_stage} · batch {settings.train.global_batch_size} x "
        f"{settings.data.seq_len} B · peak {'unknown' if peak is None else f'{peak / 1e9:.0f} GFLOP/s a rank'}"
    )


def _source_lines(mixed: Mixture) -> Iterator[str]:
    """What is trained on, and each source's part of the first rows."""
    shares = mixed.phases[0].quotas / mixed.phases[0].quotas.sum()
    for source, share in zip(mixed.sources, shares.tolist(), strict=True):
        split = source.stream.split
        end = "" if source.largest_rows is None else f", at most {source.largest_rows} of them"
        yield (
            f"data: {source.name}: {split.modality}, {len(split)} samples, "
            f"{size(source.stream.bytes_per_epoch)} an epoch, {share:.1%} of the rows{end}"
        )


def _realised_mix(now: Session, progress: Progress) -> dict[str, float]:
    """data/<source>/share of the bytes trained on, and data/<source>/epoch; nothing for a single source."""
    sources = now.mixture.sources
    if len(sources) == 1:
        return {}
    epochs = now.mixture.epochs(progress.position // now.settings.data.seq_len)
    out: dict[str, float] = {}
    for source, bytes_, epoch in zip(sources, progress.source_bytes, epochs.tolist(), strict=True):
        out[f"data/{source.name}/share"] = bytes_ / max(progress.bytes, 1)
        out[f"data/{source.name}/epoch"] = epoch
    return out


def _write_status(run: Path, status: str, message: str) -> None:
    content = json.dumps({"status": status, "message": redact(message)})
    checkpoint.write_atomically(run / "status.json", content.encode())


def _noted(stopping: list[int], number: int) -> None:
    """Note a signal: the loop saves and ends. A second SIGINT interrupts."""
    if number == signal.SIGINT and stopping:
        raise KeyboardInterrupt
    stopping.append(number)
