"""Verbs of a run: make it, judge it, use it. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mbtrain.command import finish, flag, no_unknown, number, one_config, settings_of, write
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

    SIGTERM, SIGUSR1, Ctrl-C and a file RUN/stop save a checkpoint after the step at hand, then end with exit status
    143. A rank that is lost ends the others with status 75 and its name: --resume goes on, on any number of ranks.

    Examples:
      mbtrain train configs/quickstart.yaml
      deepspeed --num_gpus=2 --module mbtrain train configs/quickstart.yaml --train.zero_stage=2
      torchrun --nproc-per-node=2 -m mbtrain -- train configs/quickstart.yaml --run=runs/second
      mbtrain train --resume=runs/quickstart --train.minutes=20
    """
    as_json = flag("--json", json)
    values = settings_of(train, overrides)
    going_on = bool(resume) and resume != "false"
    if going_on and resume != "true":
        if run and Path(run) != Path(resume):
            raise ConfigError(f"--run={run}, --resume={resume}: expected one folder; a run goes on in its own")
        run = resume
    path = one_config(config, str(Path(run) / "config.yaml") if going_on and run else None)

    from mbtrain import config as configuration

    settings = configuration.load(path, values)
    configuration.batch_shape(settings, int(os.environ.get("WORLD_SIZE", "1")))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost rank is forty lines of addresses

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
    weights: str = "averaged",
    json: str = "",
    **unknown: str,
) -> None:
    """mbtrain eval RUN [--mode=basic|sliding|strided|both] [--split=val] [--data=DIR] [--limit=BYTES] [options]

    Exact bits per byte of a whole split: sum of nats over all targets / ln 2 / real bytes, each byte predicted from
    bytes before it alone, and how far off it may be (95 % interval, by bootstrap over documents). RUN is a run
    directory or a checkpoint in it. Alone, or as a rank of deepspeed, torchrun or srun: the same number.

      --mode=basic      windows of seq_len bytes, one after the other, which begin without context       (cost 1)
      --mode=sliding    windows overlap by half, and count where they have half a window before them            (2)
      --mode=strided    two passes half a patch apart; each byte counts where it is in a patch's first half     (2)
      --mode=both       both of these                                                                           (4)
      --split=NAME      as the data was prepared                                                             (val)
      --data=DIR        another data set than the run's, of the same modality
      --batch=N         windows at a time: memory and speed, no number                                         (8)
      --limit=BYTES     only the first rows that hold so many
      --precision=P     as-trained (as the training's own validation computes), fp32, bf16 or autocast
      --weights=W       averaged or last, where the run averages its weights (optim.ema, schedule_free)  (averaged)
      --json            last line on stdout: {"bpb", "bpb_low", "bpb_high", "nats", "bytes", "split", "mode", "step",
                        "precision", "weights", "by_source", "by_source_interval", "documents", "words",
                        "word_perplexity", "by_position", "by_depth", "plot"}; of images "bits_per_dimension", which is
                        bpb

    It writes RUN/plots/eval_SPLIT_MODE.png, where the bits come from: by position in the patch and by depth of context;
    and for `mbtrain compare` RUN/eval_SPLIT_MODE.json, of a whole split of the run's own data.

    Examples:
      mbtrain eval runs/quickstart
      mbtrain eval runs/quickstart --split=test --mode=both
      mbtrain eval runs/quickstart/checkpoints/step_0000000500 --limit=1000000 --json
      deepspeed --num_gpus=2 --module mbtrain eval runs/quickstart --split=test
    """
    no_unknown(eval, unknown)
    if mode not in ("basic", "sliding", "strided", "both"):
        raise ConfigError(f"--mode: expected basic, sliding, strided or both, got {mode!r}")
    if precision not in ("as-trained", "fp32", "bf16", "autocast"):
        raise ConfigError(f"--precision: expected as-trained, fp32, bf16 or autocast, got {precision!r}")
    as_json, rows, last = flag("--json", json), number("--batch", batch, int, 1), _last(weights)
    limit_bytes = number("--limit", limit, int, 1) if limit else None
    path = _one_run(run)

    from mbtrain.evaluation import evaluate_run, lines_of

    figures = evaluate_run(
        path,
        split=split,
        mode=mode,
        data=data or None,
        batch=rows,
        limit_bytes=limit_bytes,
        precision=precision,
        last=last,
    )
    if os.environ.get("RANK", "0") == "0":
        for line in lines_of(figures, partly=limit_bytes is not None):
            write(line)
        finish(figures, as_json)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # as after a training: a thread of the process group that wakes now would abort it


def eval_task(
    *run: str, task: str = "", samples: str = "", seed: str = "0", temperature: str = "", json: str = "", **unknown: str
) -> None:
    """mbtrain eval-task RUN [--task=words|addition|actions|code] [--samples=N] [--json]

    Marks what a run has learnt of a small task (`mbtrain-prep task`) by the task's exact rules, and prints all that one
    wants to know of the experiment. Prompts are lines of the validation split.

      words       the share of words made that keep all rules
      addition    the share of lines made that are of the form, and that are also right; pairs that were not trained on
                  are counted apart
      actions     for each action: ten lines and a line through its digit; right if it goes on with result, `;`, newline
      code        any text: loss and a sample, no score

      --task=NAME        what is asked for                                       (what the data set was made for)
      --samples=N        lines marked; of actions, of each action                 (words, addition 5000; actions 100)
      --temperature=X    words and addition are drawn as the model says (1), of actions the likeliest is taken (0)
      --seed=N           other prompts, other samples                                                          (0)
      --json             last line on stdout: {"task", "score", "scores", "counts", "samples", "learnt", "bpb",
                         "val_nats_per_byte", "floor_nats_per_byte", "minutes", "parameters", ...}

    Example:
      mbtrain-prep task actions --out=shards/actions
      mbtrain train configs/tasks/actions.yaml
      mbtrain eval-task runs/actions
    """
    no_unknown(eval_task, unknown)
    as_json = flag("--json", json)
    heat = float(number("--temperature", temperature, float, 0)) if temperature else None
    number_of = number("--samples", samples, int, 1) if samples else None

    from mbtrain.tasks import report

    at = number("--seed", seed, int, 0) % 2**63
    figures = report.evaluate_task(_one_run(run), task=task or None, samples=number_of, seed=at, temperature=heat)
    for line in report.lines_of(figures):
        write(line)
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
    weights: str = "averaged",
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
      --weights=W        averaged or last, where the run averages its weights                 (averaged)
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
    how, last = sampling.Sampling(**limits), _last(weights)
    made = sampling.sample_run(_one_run(run), asked, how, out or None, raw or None, last)
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


def compare(
    *run: str, out: str = "compare", experiment: str = "", uri: str = "", json: str = "", **unknown: str
) -> None:
    """mbtrain compare RUN RUN ... [--out=DIR] [--experiment=NAME] [--uri=STORE] [--json]

    One page that needs no network, OUT/compare.html, and pictures of its curves, OUT/curves*.png: bits per byte against
    bytes, FLOPs and minutes; final scores with intervals (of `mbtrain eval`, where it was run), parameters, FLOPs per
    byte, bytes/s, MFU, memory; scores at equal cost; settings that differ; samples side by side. Runs of one data set
    stand together. Runs whose names end in _s0, _s1 and so on are seeds: their mean is shown, with the lowest and the
    highest. Runs that are not finished, of other kinds or of older versions are shown with what they have.

      --out=DIR           where the page and the pictures are written                              (compare)
      --experiment=NAME   also the runs of this MLflow experiment, fetched from its store
      --uri=STORE         the store                             (MLFLOW_TRACKING_URI, else sqlite in mlruns/)
      --json              last line on stdout: {"path", "pictures", "runs": [{"run", "name", "bpb", ...}, ...]}

    Examples:
      mbtrain compare runs/first runs/second
      mbtrain compare runs/* --out=report
      mbtrain compare --experiment=mbtrain --out=report
    """
    no_unknown(compare, unknown)
    as_json = flag("--json", json)
    if uri and not experiment:
        raise ConfigError(f"--uri={uri}: expected --experiment=NAME beside it; run directories need no store")

    from dataclasses import asdict

    from mbtrain.compare import compare as compare_runs

    made = compare_runs(run, Path(out), experiment=experiment, uri=uri)
    write(f"{made.path}: {len(made.runs)} runs; open it in a browser")
    for path in made.pictures:
        write(str(path))
    finish(asdict(made), as_json)


def export(*run: str, out: str = "", weights: str = "averaged", json: str = "", **unknown: str) -> None:
    """mbtrain export RUN --out=DIR [--weights=averaged|last]

    Writes weights.safetensors, config.yaml and SHA256SUMS, reloads them and compares the logits bit for bit. To load:

      from mbtrain import export
      model = export.load("DIR")
      logits = model(torch.tensor([list(b"any bytes")]))

    --weights: of a run that averages its weights (optim.ema, schedule_free), these or the last ones (averaged).
    --json: last line on stdout: {"path"}
    """
    no_unknown(export, unknown)
    if not out:
        raise ConfigError("--out: expected a folder, got nothing; give --out=DIR")
    as_json, last = flag("--json", json), _last(weights)

    from mbtrain.export import export_run

    path = export_run(_one_run(run), out, last)
    write(f"{path}: weights.safetensors, config.yaml and SHA256SUMS, reloaded and compared")
    finish({"path": path}, as_json)


def compress(
    *file: str,
    run: str = "",
    out: str = "",
    batch: str = "32",
    shape: str = "",
    overwrite: str = "",
    json: str = "",
    **unknown: str,
) -> None:
    """mbtrain compress FILE --run=RUN [--out=FILE.mbz] [--batch=32] [options]

    Codes a file, any file, by what the model predicts of it: `mbtrain decompress` gives the very same bytes back, with
    the same run on the same kind of machine. The size proves the run's bits per byte: each row of seq_len bytes begins
    without context, as `mbtrain eval` scores. Beside it stands what gzip -9, xz -9e and zstd -19 make of the file; PNG
    of raw pictures, FLAC of 16-bit sound.

      --run=RUN          a run directory, or a checkpoint in it
      --out=FILE         where it is written                                                       (FILE.mbz)
      --batch=N          most rows that advance together: faster, and more memory, at most 1024           (32)
      --shape=HxW        the file is pictures of this size, RGB, one after the other: they are coded in the order in
                         which the model reads. Of a .rgb file of an image run       (what the run's pictures have)
      --overwrite        replace the output if it is there
      --json             last line on stdout: {"path", "bytes", "compressed_bytes", "bpb", "model_bpb", "gzip_bpb",
                         "xz_bpb", "zstd_bpb", "step", "bytes_per_s"}, and "png_bpb", "flac_bpb" where they apply.
                         bpb: of the whole output; model_bpb: what the model's probabilities add up to

    Examples:
      mbtrain compress novel.txt --run=runs/novels
      mbtrain compress cat.rgb --run=runs/pictures --shape=64x64 --out=cat.mbz --json
    """
    no_unknown(compress, unknown)
    from mbtrain.mbz import MAX_BATCH

    as_json, replace, rows = flag("--json", json), flag("--overwrite", overwrite), number("--batch", batch, int, 1)
    if rows > MAX_BATCH:
        raise ConfigError(f"--batch: expected at most {MAX_BATCH}, got {rows}")
    path = _file_and_run(file, run)

    from mbtrain.compress import compress_file, lines_of

    figures = compress_file(path, run, out=out or None, batch=rows, shape=shape, overwrite=replace)
    for line in lines_of(figures):
        write(line)
    finish(figures, as_json)


def decompress(*file: str, run: str = "", out: str = "", overwrite: str = "", json: str = "", **unknown: str) -> None:
    """mbtrain decompress FILE.mbz --run=RUN [--out=FILE] [--overwrite] [--json]

    Restores what `mbtrain compress` was given, byte for byte, or writes nothing and says why: another model, a damaged
    file, or a machine whose floats round otherwise (another processor or version of torch).

      --run=RUN          the run that compressed it; its checkpoint of that step is taken, if it is still kept
      --out=FILE         where it is written                                                       (FILE without .mbz)
      --overwrite        replace the output if it is there
      --json             last line on stdout: {"path", "bytes", "compressed_bytes", "bytes_per_s"}

    Examples:
      mbtrain decompress novel.txt.mbz --run=runs/novels --out=again.txt
    """
    no_unknown(decompress, unknown)
    as_json, replace = flag("--json", json), flag("--overwrite", overwrite)
    path = _file_and_run(file, run)

    from mbtrain.compress import decompress_file

    figures = decompress_file(path, run, out=out or None, overwrite=replace)
    write(f"{figures['path']}: {figures['bytes']} bytes, the original's ({figures['bytes_per_s']:.0f} bytes/s)")
    finish(figures, as_json)


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


def _file_and_run(file: Sequence[str], run: str) -> str:
    if len(file) != 1:
        raise ConfigError(f"FILE: expected one file, got {len(file)}")
    if not run:
        raise ConfigError("--run: expected a run directory or checkpoint, got nothing; give --run=RUN")
    return file[0]


def _last(weights: str) -> bool:
    """Whether --weights asks for those that were trained, where a run keeps averages of them too."""
    if weights not in ("averaged", "last"):
        raise ConfigError(f"--weights: expected averaged or last, got {weights!r}")
    return weights == "last"


def _one_run(run: Sequence[str]) -> str:
    if len(run) != 1:
        raise ConfigError(f"RUN: expected one run directory or checkpoint, got {len(run)}")
    return run[0]
