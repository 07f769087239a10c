"""`mbtrain eval-task`: what a run has learnt of its task, as figures and as an entry of a log of experiments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mbtrain import checkpoint, config, metrics
from mbtrain.config import Config
from mbtrain.data.opening import Opened, open_sources
from mbtrain.errors import ConfigError, DataError
from mbtrain.evaluate import loaded, score
from mbtrain.model import Model
from mbtrain.model.sparing import spare
from mbtrain.sample import Sampling, as_text, generate
from mbtrain.tasks.marking import Marks, mark
from mbtrain.tasks.rules import TASKS, addends, data_of, floor_nats_per_byte, result, word_fits

SAMPLES = {"words": 5000, "addition": 5000, "actions": 100}  # 20 in a row go on from one prompt, mistakes too
LOSS_AIM = 1.30  # of actions, nats per byte
AIMS = {"words": 0.99, "form": 0.99, "addition": 0.90, "actions": 0.95}
SAMPLE_BYTES = 160
SCORED_AT_A_TIME = 16


def evaluate_task(
    path: str | Path,
    *,
    task: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    temperature: float | None = None,
) -> dict[str, Any]:
    """Mark what a run makes of its task, and score its validation split.

    Args:
        path: a run directory or a checkpoint in it.
        task: of `rules.TASKS`, or code: any text, which is scored and sampled and not marked. None: what
            `mbtrain-prep task` noted in the data set, else code.
        samples: lines that are marked (of actions: for each action); None: as in SAMPLES.
        seed: of prompts and samples.
        temperature: see `marking.mark`.

    Returns the figures of the entry: task, score and scores (None for code), counts, samples, wrong, learnt (None for
    code), val_nats_per_byte, bpb, floor_nats_per_byte (None for code), and what the run is: step, parameters, ...

    Raises ConfigError for an unknown task, DataError for data of another task, CheckpointError for a run that is not
    whole.
    """
    if task is not None and task not in (*TASKS, "code"):
        raise ConfigError(f"--task: got {task!r}, expected one of {', '.join(TASKS)}, code")
    run, found = checkpoint.find(path)
    settings = config.load(run / "config.yaml")
    sources = open_sources(settings, settings.data.val_split, seed=None)
    prep = sources[0].split.manifest.prep
    asked = task or str(prep.get("task", "code"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = loaded(run, settings, found, device)

    def go_on(prompts: Sequence[bytes], n_bytes: int, heat: float) -> list[bytes]:
        return generate(model, prompts, n_bytes, Sampling(temperature=heat, seed=seed), documents=False, ends=False)

    marks: Marks | None = None
    text = _text(sources[0])
    if asked in TASKS:
        lines = text.split("\n")[:-1]
        _must_be_of(asked, lines, sources[0].name)
        trained = _text(open_sources(settings, settings.data.train_split, seed=None)[0]) if asked == "addition" else ""
        marks = mark(asked, go_on, lines, samples or SAMPLES[asked], seed, trained, temperature)
    spare(model, settings)
    scored = score(model, sources, seq_len=settings.data.seq_len, batch=SCORED_AT_A_TIME, device=device)
    prompt = "" if asked not in TASKS else text[: text.index("\n") + 1]
    figures = {
        "task": asked,
        "score": None if marks is None else marks.score,
        "scores": None if marks is None else marks.scores,
        "counts": None if marks is None else marks.counts,
        "samples": None if marks is None else marks.samples,
        "wrong": None if marks is None else list(marks.wrong),
        "val_nats_per_byte": scored.nats / scored.bytes,
        "bpb": scored.bpb,
        "floor_nats_per_byte": None if marks is None else floor_nats_per_byte(asked),
        "sample": as_text(prompt.encode() + go_on([prompt.encode()], SAMPLE_BYTES, 1.0)[0]),
        **described(run, settings, model, found.progress.step),
        "data": _command(asked, prep, settings),
    }
    return {**figures, "learnt": None if marks is None else not missed(figures)}


def missed(figures: Mapping[str, Any]) -> list[str]:
    """What a run falls short of, in words; nothing, where it has learnt its task."""
    task, scores = figures["task"], figures["scores"]
    short = []
    if task == "actions":
        low = [f"{action} ({share:.1%})" for action, share in scores.items() if share <= AIMS["actions"]]
        short += [f"actions not above {AIMS['actions']:.0%}: {', '.join(low)}"] if low else []
        if figures["val_nats_per_byte"] >= LOSS_AIM:
            short.append(f"loss {figures['val_nats_per_byte']:.4f}, not below {LOSS_AIM:.2f} nats per byte")
        return short
    if task == "addition" and scores["form"] < AIMS["form"]:
        short.append(f"{scores['form']:.1%} of the form, fewer than {AIMS['form']:.0%}")
    if figures["score"] < AIMS[task]:
        short.append(f"{figures['score']:.1%} right, fewer than {AIMS[task]:.0%}")
    return short


def described(run: Path, settings: Config, model: Model, step: int) -> dict[str, Any]:
    """What the run is: its model, its training, its machine; what is not known is None."""
    kind, stages = settings.model.kind, settings.model.stages
    try:
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    last = metrics.last(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else None
    return {
        "run": str(run),
        "model": kind,
        "tokenizer": f"BPE, {settings.model.vocabulary_size} tokens" if kind == "subword" else "bytes",
        "patch_size": [stage.patch_size for stage in stages],
        "width": [stage.d_model for stage in stages],
        "layers": [stage.n_layers for stage in stages],
        "heads": [stage.n_heads for stage in stages],
        "context": settings.data.seq_len,
        "parameters": sum(param.numel() for param in model.parameters()),
        "dropout": settings.model.block.dropout,
        "lr": settings.optim.lr,
        "batch": settings.train.global_batch_size,
        "step": step,
        "minutes": (last or {}).get("progress/minutes"),
        "machine": environment.get("device"),
        "threads": (environment.get("threads_per_rank") or 0) * (environment.get("ranks") or 1) or None,
    }


def lines_of(figures: Mapping[str, Any]) -> Iterator[str]:
    """The entry as a person reads it: what was trained and how, what came out, and a sample."""

    def joined(key: str) -> str:
        return " + ".join(map(str, figures[key]))

    minutes = "unknown" if figures["minutes"] is None else f"{figures['minutes']:.1f} minutes"
    floor = figures["floor_nats_per_byte"]
    rows = {
        "task": figures["task"],
        "run": figures["run"],
        "data": figures["data"],
        "tokenizer": figures["tokenizer"],
        "model": f"{figures['model']}, patches of {joined('patch_size')}, context {figures['context']} bytes",
        "width": f"{joined('width')}   layers {joined('layers')}   heads {joined('heads')}",
        "parameters": f"{figures['parameters']:,}   dropout {figures['dropout']:g}",
        "training": f"{figures['step']} steps of {figures['batch']} rows, LR {figures['lr']:g}",
        "elapsed": f"{minutes} on {figures['machine'] or 'an unknown machine'}, {figures['threads'] or '?'} threads",
        "loss": f"{figures['val_nats_per_byte']:.4f} nats per byte of validation, {figures['bpb']:.4f} bits"
        + ("" if floor is None else f"; the least is {floor:.4f}"),
    }
    yield from (f"{name:<12}{value}" for name, value in rows.items())
    if figures["score"] is not None:
        yield from _scores(figures)
        for line in figures["wrong"]:
            yield f"{'wrong':<12}{line}"
    for number, line in enumerate(figures["sample"].splitlines()):
        yield f"{'sample' if not number else '':<12}{line}"
    if figures["learnt"] is not None:
        short = missed(figures)
        yield f"{'verdict':<12}{'not learnt: ' + '; '.join(short) if short else 'learnt'}"


def _scores(figures: Mapping[str, Any]) -> Iterator[str]:
    task, scores, counts = figures["task"], figures["scores"], figures["counts"]
    if task == "words":
        yield f"{'score':<12}{figures['score']:.2%} of {figures['samples']} words keep all rules"
        return
    meanings = {
        "form": "lines of the form A + B = C;",
        "right": "lines of the form that are also right",
        "right_seen": "lines of pairs that were trained on: right",
        "right_unseen": "lines of pairs that were not: right",
        "asked_unseen": "unseen pairs asked for, likeliest answer: right",
    }
    yield f"{'score':<12}{figures['score']:.2%} right"
    for name, share in scores.items():
        shown = "   none" if share is None else f"{share:7.2%}"
        label = f"action {name}" if task == "actions" else name
        yield f"  {label:<14}{shown} of {counts[name]:<6}{meanings.get(name, '')}".rstrip()


def _text(source: Opened) -> str:
    """A split's samples, one after the other."""
    return b"".join(source.split.read(i) for i in range(len(source.split))).decode("latin-1")


def _must_be_of(task: str, lines: Sequence[str], name: str) -> None:
    """Raise DataError where the lines are no lines of the task; the first ones tell."""
    for i, line in enumerate(lines[:20]):
        if task == "words":
            fits = word_fits(line, lines[:i])
        elif task == "addition":
            fits = (parts := addends(line)) is not None and parts[0] + parts[1] == parts[2]
        else:
            data = data_of(line)
            before = data_of(lines[i - 1]) if i else ""
            fits = bool(data) and data != line and line[len(data) + 1 :] == f"{result(line[len(data)], data, before)};"
        if not fits:
            raise DataError(f"{name}: line {i + 1}, {line[:40]!r}, is none of {task}; give the task that it is of")


def _command(task: str, prep: Mapping[str, Any], settings: Config) -> str:
    path = settings.data.mixture[0].path
    if "task" in prep:
        return f"mbtrain-prep task {prep['task']} --out={path} --seed={prep['seed']} --lines={prep['lines']}"
    return str(path)
