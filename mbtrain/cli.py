"""The verbs of `mbtrain`; thin. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mbtrain.command import Program, finish, flag, no_unknown, number, write
from mbtrain.command import main as run_program
from mbtrain.errors import ConfigError


def train(*config: str, run: str = "", resume: str = "", json: str = "", **overrides: str) -> None:
    """mbtrain train CONFIG [--section.key=value ...] [--run=DIR] [--resume[=RUN]] [--json]

    Trains what the configuration says; alone, or as one of the ranks of deepspeed, torchrun or srun. It says where it
    stands on stderr, and writes RUN/metrics.jsonl, log.txt, checkpoints/, samples/ and plots/.

      --section.key=value   any setting, as in --optim.lr=3e-4 --model.stages.0.n_layers=6 --train.minutes=10
      --run=DIR             the run directory                                             (runs/<name>)
      --resume[=RUN]        go on from the newest whole checkpoint of RUN (of --run); begins anew if it has none.
                            CONFIG may be left out then: the run's own configuration is taken
      --json                last line on stdout: {"run", "step", "val/bpb", "status"}

    SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint after the step at hand, then end with exit status 143.

    Examples:
      mbtrain train configs/quickstart.yaml
      deepspeed --num_gpus=2 --module mbtrain train configs/quickstart.yaml --train.zero_stage=2
      torchrun --nproc-per-node=2 -m mbtrain -- train configs/quickstart.yaml --run=runs/second
      mbtrain train --resume=runs/quickstart --train.minutes=20
    """
    as_json = flag("--json", json)
    unknown = [key for key in overrides if "." not in key and key != "name"]
    if unknown:
        no_unknown(train, {unknown[0]: ""})
    going_on = bool(resume) and resume != "false"
    if going_on and resume != "true":
        if run and Path(run) != Path(resume):
            raise ConfigError(f"--run={run}, --resume={resume}: expected one folder; a run goes on in its own")
        run = resume
    if len(config) > 1 or (not config and not (going_on and run)):
        raise ConfigError(f"CONFIG: expected one configuration file, got {len(config)}; see configs/")

    from mbtrain import config as configuration

    path = config[0] if config else str(Path(run) / "config.yaml")
    settings = configuration.load(path, {key: str(value) for key, value in overrides.items()})
    configuration.batch_shape(settings, int(os.environ.get("WORLD_SIZE", "1")))

    from mbtrain.train import train as train_model

    result = train_model(settings, Path(run or f"runs/{settings.name}"), resume=going_on)
    if os.environ.get("RANK", "0") == "0":
        if result.bpb is not None:
            write(f"{result.run}: step {result.step}, val/bpb {result.bpb:.4f}")
        finish({"run": result.run, "step": result.step, "val/bpb": result.bpb, "status": result.status}, as_json)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: a thread of the process group that wakes while the interpreter ends would abort it (status -6).
    os._exit(143 if result.status == "KILLED" else 0)


def eval(
    *run: str,
    split: str = "val",
    mode: str = "basic",
    data: str = "",
    batch: str = "8",
    limit: str = "",
    precision: str = "as-trained",
    json: str = "",
    **unknown: str,
) -> None:
    """mbtrain eval RUN [--split=val] [--mode=basic] [--data=DIR] [--batch=8] [--limit=BYTES] [options]

    Exact bits per byte of a whole split: sum of nats over all targets / ln 2 / real bytes. RUN is a run directory or
    a checkpoint in it. Rows of seq_len bytes begin without context (mode basic). --precision=P
    is as-trained (as the training's own validation computes), fp32, bf16 or autocast.
    --json: last line on stdout: {"bpb", "nats", "bytes", "split", "step", "precision", "by_source"}; of images also
    "bits_per_dimension", which is the same number

    Examples:
      mbtrain eval runs/quickstart
      mbtrain eval runs/quickstart/checkpoints/step_0000000500 --split=test --json
    """
    no_unknown(eval, unknown)
    if mode != "basic":
        raise ConfigError(f"--mode: expected basic, got {mode!r}")
    if precision not in ("as-trained", "fp32", "bf16", "autocast"):
        raise ConfigError(f"--precision: expected as-trained, fp32, bf16 or autocast, got {precision!r}")
    as_json, rows = flag("--json", json), number("--batch", batch, int, 1)
    limit_bytes = number("--limit", limit, int, 1) if limit else None

    from mbtrain.evaluate import evaluate_run

    figures = evaluate_run(
        _one_run(run), split=split, data=data or None, batch=rows, limit_bytes=limit_bytes, precision=precision
    )
    part = f"{'first part of ' if limit else ''}{split}"
    unit = "bits per byte" + (" (= bits per dimension)" if "bits_per_dimension" in figures else "")
    write(f"{part}: {figures['bpb']:.6f} {unit} over {figures['bytes']} bytes (step {figures['step']})")
    for source, bpb in figures["by_source"].items() if len(figures["by_source"]) > 1 else ():
        write(f"  {source}: {bpb:.6f}")
    finish(figures, as_json)


def sample(
    *run: str,
    prompt: str = "",
    prompt_file: str = "",
    prompt_bytes: str = "",
    bytes: str = "",
    count: str = "1",
    source: str = "",
    shape: str = "",
    temperature: str = "0.8",
    top_k: str = "",
    top_p: str = "",
    seed: str = "0",
    out: str = "",
    raw: str = "",
    json: str = "",
    **unknown: str,
) -> None:
    """mbtrain sample RUN [--prompt=TEXT | --prompt-file=F] [--bytes=N] [--count=1] [options]

    Makes bytes as the model predicts them, from nothing or after a prompt, and writes them as what they are: a text
    (.txt, the raw bytes), a picture (.png) or a sound (.wav). On the terminal, bytes of a text that are no UTF-8 are
    shown as \\xNN. A text ends early where the model predicts the end of the document.

      --prompt-file=F    goes on with a text, a picture or a sound, read as data prep reads it
      --prompt-bytes=N   so much of it is given: bytes, or a share as in 50%
                         (all of a text, half of a picture, the first second of a sound)
      --bytes=N          most bytes made of each            (256 of text, the rest of one picture, 2 s of sound)
      --count=N          of pictures one grid, with the file's own first; of texts and sounds numbered files     (1)
      --source=NAME      as which of the run's data sources they are shown                          (the first)
      --shape=HxW        of pictures, where the run's differ      (that of the file; else the largest square of a row)
      --temperature=X    0: always the likeliest byte; 1: as the model says        (0.8)
      --top-k=N --top-p=X    keep the N likeliest; the likeliest that make up X    (all)
      --seed=N           another seed, another continuation                          (0)
      --out=FILE         where it is written                          (RUN/samples/...)
      --raw=FILE         the bytes themselves as well, row after row, in the order in which the model reads them
      --json             last line on stdout: {"path", "bytes", "bytes_per_s"}, and "paths" where there are several

    Examples:
      mbtrain sample runs/quickstart --prompt="def "
      mbtrain sample runs/quickstart --prompt-file=setup.py --bytes=1000 --temperature=1 --top-p=0.9 --out=more.py
      mbtrain sample runs/pictures --count=16 --out=grid.png
      mbtrain sample runs/pictures --prompt-file=cat.jpg --prompt-bytes=50% --count=4
      mbtrain sample runs/speech --prompt-file=hello.flac --prompt-bytes=32000 --bytes=64000
    """
    no_unknown(sample, unknown)
    if prompt and prompt_file:
        raise ConfigError("--prompt, --prompt-file: expected one of them, got both")
    as_json = flag("--json", json)
    wanted = {
        "n_bytes": number("--bytes", bytes, int, 1) if bytes else None,
        "count": number("--count", count, int, 1),
    }
    limits = {
        "temperature": number("--temperature", temperature, float, 0),
        "top_k": number("--top-k", top_k, int, 1) if top_k else None,
        "top_p": number("--top-p", top_p, float, 1e-9) if top_p else None,
        "seed": number("--seed", seed, int, 0) % 2**63,
    }

    from mbtrain import sample as sampling
    from mbtrain.request import Asked

    start = prompt.encode("utf-8", "surrogateescape")
    asked = Asked(start, prompt_file, prompt_bytes, **wanted, source=source, shape=shape)
    made = sampling.sample_run(_one_run(run), asked, sampling.Sampling(**limits), out or None, raw or None)
    for line in sampling.lines_of(made):
        write(line)
    sys.stderr.write(sampling.headline(made) + "\n")
    figures = {"path": made.paths[0], "bytes": made.n_bytes, "bytes_per_s": made.bytes_per_s}
    if len(made.paths) > 1:
        figures["paths"] = [str(path) for path in made.paths]
    finish(figures, as_json)


def summary(*run: str, prompt: str = "", json: str = "", **unknown: str) -> None:
    """mbtrain summary RUN [--prompt=TEXT] [--json]

    What came of a run: validation bits per byte beside lossless compressors on the same bytes (gzip -9 and xz -9e; of
    images PNG and WebP, of 16-bit audio FLAC), bytes per second, where the run and its MLflow store are, and a sample
    that continues the prompt.
    --json: last line on stdout: {"step", "bpb", "bytes", "gzip_bpb", "xz_bpb", "bytes_per_s", "sources"}
    """
    no_unknown(summary, unknown)
    as_json = flag("--json", json)
    path = Path(_one_run(run))

    from dataclasses import asdict

    from mbtrain.summary import lines_of, summarise

    figures = summarise(path)
    for line in lines_of(path, figures):
        write(line)
    if prompt:
        write(f"sample        {prompt!r} continued:\n")
        sample(str(path), prompt=prompt)
        write("")
    finish(asdict(figures), as_json)


def export(*run: str, out: str = "", json: str = "", **unknown: str) -> None:
    """mbtrain export RUN --out=DIR

    Writes weights.safetensors, config.yaml and SHA256SUMS, reloads them and compares the logits bit for bit. To load:

      from mbtrain import export
      model = export.load("DIR")
      logits = model(torch.tensor([list(b"any bytes")]))

    --json: last line on stdout: {"path"}
    """
    no_unknown(export, unknown)
    if not out:
        raise ConfigError("--out: expected a folder, got nothing; give --out=DIR")
    as_json = flag("--json", json)

    from mbtrain.export import export_run

    path = export_run(_one_run(run), out)
    write(f"{path}: weights.safetensors, config.yaml and SHA256SUMS, reloaded and compared")
    finish({"path": path}, as_json)


def flops(*config: str, json: str = "", **overrides: str) -> None:
    """mbtrain flops CONFIG [--section.key=value ...] [--json]

    Parameters and operations per byte by stage, by formula. One multiply-add is two operations.
    """
    as_json = flag("--json", json)
    if len(config) != 1:
        raise ConfigError(f"CONFIG: expected one configuration file, got {len(config)}; see configs/")

    from mbtrain import config as configuration
    from mbtrain.model.flops import count

    settings = configuration.load(config[0], {key: str(value) for key, value in overrides.items()})
    counted = count(settings)
    for i, (spec, stage) in enumerate(zip(settings.model.stages, counted.stages, strict=True)):
        forward = stage.matrices + stage.attention + stage.project
        write(
            f"stage {i}: every {spec.patch_size} B, {spec.n_layers} x {spec.d_model}: {stage.parameters / 1e6:.2f}M "
            f"parameters, forward {forward / 1e6:.3f} MFLOP a byte ({forward / counted.forward_per_byte:.0%})"
        )
    write(
        f"in all: {counted.parameters / 1e6:.2f}M parameters, forward {counted.forward_per_byte / 1e6:.3f}, "
        f"training {counted.training_per_byte / 1e6:.3f} MFLOP a byte"
    )
    figures = {
        "parameters": counted.parameters,
        "forward_flops_per_byte": counted.forward_per_byte,
        "training_flops_per_byte": counted.training_per_byte,
    }
    finish(figures, as_json)


def bench(*what: str, json: str = "", **options: str) -> None:
    """mbtrain bench train|quality|generate|deepspeed|data [--config=FILE] [--peer=PYTHON] [options] [--json]

    Measures against MEGABYTE-pytorch 0.3.6 in an environment of its own (launch/peer.sh makes it and prints PYTHON).

      train      training bytes/s, same shape, batch and data, interleaved, medians
      quality    bits per byte after equal minutes, the peer by its own script's recipe
      generate   bytes/s of one sequence of 1,024 bytes
      deepspeed  a step under DeepSpeed ZeRO-1 against the same step in a bare torch loop
      data       data prep, loading and opening, against Pillow, webdataset's reader and the raw read of the same files
                 --parts=text,images,loading,opening,memory,training   some of these                      (all)
                 --text=DIR --images=DIR   prepare what is there                    (texts and pictures it makes)
                 --out=DIR   where a temporary folder is made, 3 GB                         (where TMPDIR says)
                 --quick     everything once and tiny: does it run
    """
    as_json = flag("--json", json)
    from mbtrain.bench import VERBS

    if len(what) != 1 or what[0] not in VERBS:
        raise ConfigError(f"bench: expected one of {', '.join(VERBS)}, got {' '.join(what) or 'nothing'}")
    finish(VERBS[what[0]](**options), as_json)


def ui(host: str = "127.0.0.1", port: str = "5000", uri: str = "", **unknown: str) -> None:
    """mbtrain ui [--host=127.0.0.1] [--port=5000] [--uri=STORE]

    Serves MLflow's pages of the runs tracked here, on the loopback interface unless told otherwise, until Ctrl-C.
    Everyone who reaches the port can read and change the store.
    """
    no_unknown(ui, unknown)
    from mbtrain import tracking

    write(f"http://{host}:{port} (some 10 s from now; Ctrl-C ends it)")
    sys.stdout.flush()
    tracking.ui(host, number("--port", port, int, 1), uri or None)


def sync(*run: str, uri: str = "", json: str = "", **unknown: str) -> None:
    """mbtrain sync RUN [--uri=STORE] [--json]

    Sends to MLflow what it does not have of RUN yet, after an outage or a kill; nothing is sent twice.
    """
    no_unknown(sync, unknown)
    as_json = flag("--json", json)
    from mbtrain import tracking

    path = Path(_one_run(run))
    path = path.parent.parent if path.parent.name == "checkpoints" else path
    figures = tracking.sync(path, uri or None)
    write(
        f"{figures['tracking_uri']}: run {figures['run_id']}, {figures['metrics']} values and "
        f"{figures['artifacts']} files sent"
    )
    finish(figures, as_json)


def _one_run(run: Sequence[str]) -> str:
    if len(run) != 1:
        raise ConfigError(f"RUN: expected one run directory or checkpoint, got {len(run)}")
    return run[0]


_HELP = """mbtrain: train multiscale byte models on raw bytes

  mbtrain train CONFIG           train; alone or under deepspeed, torchrun, srun
  mbtrain eval RUN               exact bits per byte of a split
  mbtrain sample RUN             make text, pictures or sound, from nothing or after a prompt
  mbtrain summary RUN            its score beside compressors, speed, where things are
  mbtrain export RUN --out=DIR   safetensors and configuration, loadable in three lines
  mbtrain flops CONFIG           parameters and operations by stage
  mbtrain bench WHAT             measure against MEGABYTE-pytorch and against a bare loop
  mbtrain sync RUN               send to MLflow what it does not have yet
  mbtrain ui                     MLflow's pages of the runs tracked here

Options are --key=value. `mbtrain VERB --help` shows those of a verb, with examples. Data comes from `mbtrain-prep`.
Progress goes to stderr. Exit status: 0 done, 2 a mistake (one line says which), 143 saved and stopped by a signal.
"""

PROGRAM = Program(
    name="mbtrain",
    verbs={
        "train": train,
        "eval": eval,
        "sample": sample,
        "summary": summary,
        "export": export,
        "flops": flops,
        "bench": bench,
        "sync": sync,
        "ui": ui,
    },
    flags=("json", "resume", "quick"),
    help=_HELP,
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script. DeepSpeed's launcher puts --local_rank=N first; the rank is in the environment as well."""
    args = [arg for arg in (sys.argv[1:] if argv is None else argv) if not arg.startswith("--local_rank=")]
    if args[:1] == ["--"]:  # which keeps torchrun from taking --run for its own --run-path
        args = args[1:]
    run_program(PROGRAM, args)
