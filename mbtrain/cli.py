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

    SIGTERM, SIGUSR1, Ctrl-C and a file RUN/stop save a checkpoint after the step at hand, then end with exit status
    143. A rank that is lost ends the others with status 75 and its name: --resume goes on, on any number of ranks.

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
      --samples=N        lines marked; of actions, of each action                 (words, addition 1000; actions 100)
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


def sweep(
    *config: str,
    out: str = "",
    share: str = "",
    retry: str = "",
    report: str = "",
    json: str = "",
    seeds: str = "",
    widths: str = "",
    which: str = "",
    shrink: str = "",
    draws: str = "",
    name: str = "",
    jobs: str = "",
    threads: str = "",
    **options: str,
) -> None:
    """mbtrain sweep CONFIG [--grid.section.key=A,B ...] [--seeds=0,1] [--out=DIR] [--section.key=value ...] [options]

    Trains an experiment many times, with other values of some of its keys: side by side on the cores or GPUs that are
    there, each trial an ordinary run in SWEEP/runs/. CONFIG is an experiment, to which the axes are given here; or a
    sweep file (configs/sweeps/; mbtrain/sweep/spec.py has the format); or the folder of a sweep, to go on with it.
    All trials are checked before the first one starts.

      --grid.section.key=A,B        an axis: every combination of the axes is tried
      --widths=1,2,4 --which=W      an axis `width`: the stages so many times as wide; W: both, global, local or
                                    depth, or several of them                                                 (both)
      --shrink=8                    the experiment at 1/8 of its width, for `mbtrain transfer`
      --random.section.key=A:B:log  drawn between A and B (log: evenly in the logarithm), or one of a list A,B,C
      --draws=N                     so many draws, the same ones at each point of the grid
      --seeds=0,1                   train.seed                                                                   (0)
      --section.key=value           any setting, for all trials
      --name=NAME --out=DIR         its name, and its folder                                         (sweeps/<name>)
      --jobs=J --threads=T          trials at a time, threads of each    (one on each GPU; else one a core, 1 thread)
      --share=I/N                   the I-th of N shares of the trials, counted from 0; only needed where several
                                    runners share a folder whose file system has no locks
      --retry                       try again what failed
      --report                      trains nothing: writes SWEEP/report.md, report.json and pictures of what is there;
                                    of several LRs the best at each width, its shift, and whether it transfers
      --json                        last line on stdout: {"folder", "trials", "finished", "failed", "diverged",
                                    "running", "left", "best": {"name", "val/bpb"}}

    The same command goes on after a kill: what is finished is not trained again, what is not goes on from its last
    checkpoint. The sweep may have grown meanwhile. Several runners may work on one folder at once, on several machines
    too (launch/sweep.slurm). SIGTERM, SIGUSR1 and Ctrl-C let the trials save and end; a second one kills them. A trial
    that is killed is tried once more, one that diverges is stopped and noted. In MLflow the trials stand below one
    parent run. Samples are off unless sample.at_end is set.

    Exit status: 0 done, 1 some failed or were stopped, 2 a mistake, 143 stopped.

    Examples:
      mbtrain sweep configs/quickstart.yaml --grid.optim.lr=5e-4,1e-3,2e-3 --seeds=0,1 --train.minutes=1
      mbtrain sweep configs/quickstart.yaml --widths=1,2,4 --grid.optim.lr=1e-3,2e-3,4e-3 --name=widths
      mbtrain sweep configs/quickstart.yaml --random.optim.lr=1e-4:1e-2:log --random.optim.eps=1e-8,1e-6 --draws=20
      mbtrain sweep sweeps/widths
      mbtrain sweep sweeps/widths --report
    """
    as_json, again, only_report = flag("--json", json), flag("--retry", retry), flag("--report", report)
    if len(config) != 1:
        raise ConfigError(f"CONFIG: expected one experiment, sweep file or sweep folder, got {len(config)}")

    from mbtrain.sweep import spec as specs

    unknown = [key for key in options if "." not in key]
    if unknown:
        no_unknown(sweep, {unknown[0]: ""})
    of_spec = {"seeds": seeds, "widths": widths, "which": which, "shrink": shrink, "draws": draws, "name": name}
    of_spec |= {"jobs": jobs, "threads": threads}
    given = {key: value for key, value in of_spec.items() if value}
    spec = specs.read(config[0], {**given, **{key: str(value) for key, value in options.items()}})
    folder = Path(out or (config[0] if Path(config[0]).is_dir() else f"sweeps/{spec.name}"))
    if only_report:
        from mbtrain.sweep.report import report as draw

        drawn = draw(folder)
        for line in drawn.lines:
            write(line)
        finish(drawn.figures, as_json)
        return

    from mbtrain.sweep import run as runner

    figures = runner.sweep(spec, folder, share=specs.share(share), retry=again)
    for line in runner.in_words(figures):
        write(line)
    stopped, unfinished = figures.pop("stopped"), figures.pop("unfinished")
    finish(figures, as_json)
    if stopped or unfinished or figures["failed"]:
        sys.stdout.flush()
        sys.exit(143 if stopped else 1)


def transfer(*what: str, out: str = "", json: str = "", **overrides: str) -> None:
    """mbtrain transfer SWEEP CONFIG --out=FILE [--section.key=value ...] [--json]

    Writes CONFIG with what a sweep of a smaller model found: the LR by the parabola through the best one tried and its
    neighbours, of all other keys swept the best point; and model.parametrization=mup with the small model's widths as
    the base, so that those values hold at CONFIG's widths. FILE begins with where they come from and how sure they are.

      --out=FILE             where it is written
      --section.key=value    any setting of CONFIG, but not of what the sweep tried
      --json                 last line on stdout: {"path", "lr", "log2_lr", "standard_error", "edge", "seeds", "bpb",
                             "values", "base", "warnings"}

    Examples:
      mbtrain sweep configs/quickstart.yaml --shrink=8 --grid.optim.lr=2e-3,4e-3,8e-3,16e-3,32e-3 --train.minutes=1
      mbtrain transfer sweeps/quickstart configs/quickstart.yaml --out=quickstart_mup.yaml
      mbtrain train quickstart_mup.yaml
    """
    as_json = flag("--json", json)
    unknown = [key for key in overrides if "." not in key]
    if unknown:
        no_unknown(transfer, {unknown[0]: ""})
    if len(what) != 2:
        raise ConfigError(f"SWEEP, CONFIG: expected a sweep's folder and an experiment, got {len(what)} of them")
    if not out:
        raise ConfigError("--out: expected a file, got nothing; give --out=FILE")

    from mbtrain.sweep.transfer import transfer as transferred

    made = transferred(what[0], what[1], out, {key: str(value) for key, value in overrides.items()})
    for line in made.lines:
        write(line)
    finish(made.figures, as_json)


def coord_check(
    *config: str,
    widths: str = "1,2,4,8",
    which: str = "both",
    steps: str = "10",
    seeds: str = "2",
    lr: str = "",
    out: str = "",
    json: str = "",
    **overrides: str,
) -> None:
    """mbtrain coord-check CONFIG [--widths=1,2,4,8] [--which=both|global|local|all|depth] [--section.key=value ...]

    Does the LR of a small model hold for a large one? Models of these widths train for some steps on one small batch;
    the slopes of all tensors' sizes and changes, and of what each weight's update does, against the width say so, and
    name the weight that is at fault. Every slope of a muP model (model.parametrization=mup) is in its band; sp fails.
    It writes OUT/<family>.png and OUT/report.md, and the table to stderr. Rows are the configuration's data, cut to
    some 64 bytes; without data, sources of Python's standard library.

      --widths=A,B,...   factors on d_model, d_ff and n_heads of CONFIG (of n_layers, for depth), as 2, 0.5 or 1/8
      --which=FAMILY     both: all stages together; global: all but the last; local: the last; all: these three, since a
                         rule that takes the width of another stage shows only where one grows alone; depth     (both)
      --steps=N          measured before training, after steps 1 and 3, and after the last                      (10)
      --seeds=N          means over so many are fitted; bands are for two or more and four widths                (2)
      --lr=X             constant LR, where the base is                                                   (optim.lr)
      --out=DIR          where pictures and the report are written                      (coord_check/<name of CONFIG>)
      --json             last line on stdout: {"passed", "parametrization", "report", "families"}

    Exit status: 0 all slopes are in their bands, 1 some are not, 2 a mistake.

    Examples:
      mbtrain coord-check configs/quickstart.yaml --model.parametrization=mup --widths=1/2,1,2 --which=all
      mbtrain coord-check configs/quickstart.yaml --model.parametrization=mup --which=depth --widths=1,2,4
    """
    as_json = flag("--json", json)
    unknown = [key for key in overrides if "." not in key and key != "name"]
    if unknown:
        no_unknown(coord_check, {unknown[0]: ""})
    if len(config) != 1:
        raise ConfigError(f"CONFIG: expected one configuration file, got {len(config)}; see configs/")
    n_steps, n_seeds = number("--steps", steps, int, 1), number("--seeds", seeds, int, 1)
    peak = number("--lr", lr, float, 1e-12) if lr else None

    from mbtrain import config as configuration
    from mbtrain import coord_check as check

    settings = configuration.load(config[0], {key: str(value) for key, value in overrides.items()})
    report = check.coord_check(
        settings,
        Path(out or f"coord_check/{settings.name}"),
        which=check.families(which, settings),
        factors=check.factors(widths),
        steps=n_steps,
        seeds=n_seeds,
        lr=peak,
        say=_say,
    )
    for line in check.lines_of(report):
        _say(line)
    for one in report.checked:
        write(f"{one.picture}: {check.verdict(one.slopes)}")
    finish(check.figures(report), as_json)
    if not report.passed:
        sys.stdout.flush()
        sys.exit(1)


def flops(*config: str, gpu: str = "A100,H100", mfu: str = "0.4", json: str = "", **overrides: str) -> None:
    """mbtrain flops CONFIG [--gpu=A100,H100] [--mfu=0.4] [--section.key=value ...] [--json]

    What a configuration costs, by formula: parameters and operations per byte by stage and part, keys and values kept
    in generation, activations of a micro-batch, the patch size with the fewest operations, and the GPU hours of its
    budget. One multiply-add is two operations. Where the text decides how many bytes a position holds (subword,
    patching=space) that is measured on the first 64 training rows, and assumed where the data set is not at hand.

      --gpu=NAME[,NAME]   whose peak hours are reckoned with                                        (A100,H100)
      --mfu=X             the share of that peak which training reaches                             (0.4)
      --json              last line on stdout: {"parameters", "forward_flops_per_byte", "training_flops_per_byte",
                          "stages", "readout", "kv_cache_bytes", "activation_bytes", "patch_size", "budget", ...}

    Examples:
      mbtrain flops configs/quickstart.yaml
      mbtrain flops configs/quickstart.yaml --model.stages.0.n_layers=12 --train.bytes=80000000000 --gpu=H200 --mfu=0.3
    """
    as_json = flag("--json", json)
    unknown = [key for key in overrides if "." not in key and key != "name"]
    if unknown:
        no_unknown(flops, {unknown[0]: ""})
    if len(config) != 1:
        raise ConfigError(f"CONFIG: expected one configuration file, got {len(config)}; see configs/")

    from mbtrain import config as configuration
    from mbtrain import cost, gpus
    from mbtrain.model.flops import by_content

    share = number("--mfu", mfu, float, 1e-3)
    if share > 1:
        raise ConfigError(f"--mfu: expected at most 1, the whole peak, got {mfu}")
    names = [gpus.named("--gpu", name) for name in gpu.split(",")]
    settings = configuration.load(config[0], {key: str(value) for key, value in overrides.items()})
    unit_bytes = None
    if by_content(settings.model):
        from mbtrain.units import unit_bytes_at_hand

        unit_bytes = unit_bytes_at_hand(settings)
    figures = cost.figures(settings, gpu_names=names, mfu=share, unit_bytes=unit_bytes)
    for line in cost.lines(figures):
        write(line)
    finish(figures, as_json)


def bench(*what: str, json: str = "", **options: str) -> None:
    """mbtrain bench WHAT [--config=FILE] [--peer=PYTHON] [options] [--json]

    Measures against MEGABYTE-pytorch 0.3.6 in an environment of its own (launch/peer.sh makes it and prints PYTHON).

      train      training bytes/s, same shape, batch and data, interleaved, medians
      quality    bits per byte after equal minutes, the peer by its own script's recipe
      generate   bytes/s of one sequence of 1,024 bytes
      deepspeed  a step under DeepSpeed ZeRO-1 against the same step in a bare torch loop
      saving     what checkpoints cost a training that goes on while they are written
      sequence   memory and time of one long row, forward and backward, on 1, 2 and 4 ranks that share it
                 --seq=BYTES --ranks=1,2,4   the row, and on how many ranks           (65536; all three)
                 --steps=N   steps that are timed, after the first, whose memory is measured         (2)
      data       data prep, loading and opening, against Pillow, webdataset's reader and the raw read of the same files
                 --parts=text,images,loading,opening,memory,training   some of these                      (all)
                 --text=DIR --images=DIR   prepare what is there                    (texts and pictures it makes)
                 --out=DIR   where a temporary folder is made, 3 GB                         (where TMPDIR says)
                 --quick     everything once and tiny: does it run
      claims     the paper's claims at small scale: MEGABYTE, its rivals and ablations at equal training FLOPs; a table
                 --plan=FILE --only=REGEX --seeds=1,2   which rows and seeds      (configs/claims/plan.yaml; all)
                 --runs=DIR --jobs=N         where the runs are; what is finished there is not made again
                                             (runs/claims; two at a time, one thread each)
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


def supervise(
    *config: str,
    run: str = "",
    hostfile: str = "",
    ranks: str = "",
    restarts: str = "3",
    **overrides: str,
) -> None:
    """mbtrain supervise CONFIG [--run=DIR] [--hostfile=FILE] [--ranks=N] [--restarts=3] [--section.key=value ...]

    Keeps `mbtrain train` going: launches it by deepspeed, and after a crash ends what is left of it on every host and
    launches it again from the newest whole checkpoint. With a hostfile every host is asked over ssh before each start;
    the run goes on with those that answer, on as many ranks as cut the global batch evenly, and uses a lost host again
    at the next restart after it is back. RUN must be the same folder on all hosts.

      --run=DIR         the run directory; begun, or gone on with                            (runs/<name>)
      --hostfile=FILE   lines NAME slots=N                                                   (this machine alone)
      --ranks=N         at most so many ranks in all          (one a slot; without hostfile one a GPU, or one)
      --restarts=N      end with exit status 1 when so many restarts in a row brought no newer checkpoint      (3)

    SIGTERM and Ctrl-C let the ranks save and end, a second one ends them at once. Exit status: 0 finished, 1 no
    progress, 2 a mistake that another start would not mend, 143 stopped.

    Examples:
      mbtrain supervise configs/quickstart.yaml --ranks=2
      bash launch/supervise --hostfile=hosts configs/quickstart.yaml --run=/shared/runs/first
    """
    unknown = [key for key in overrides if "." not in key and key != "name"]
    if unknown:
        no_unknown(supervise, {unknown[0]: ""})
    if len(config) != 1:
        raise ConfigError(f"CONFIG: expected one configuration file, got {len(config)}; see configs/")
    most = number("--ranks", ranks, int, 1) if ranks else None
    without_progress = number("--restarts", restarts, int, 0)

    from mbtrain import config as configuration
    from mbtrain.supervise import Task
    from mbtrain.supervise import supervise as keep_going

    values = {key: str(value) for key, value in overrides.items()}
    settings = configuration.load(config[0], values)
    folder = Path(run or f"runs/{settings.name}").resolve()
    given = tuple(f"--{key}={value}" for key, value in values.items())
    sys.exit(keep_going(Task(config[0], given, settings, folder, hostfile or None, most, without_progress)))


def job(
    *what: str,
    nodes: str = "1",
    gpus: str = "",
    ranks: str = "",
    hostfile: str = "",
    run: str = "",
    out: str = "",
    cpus: str = "8",
    time: str = "24:00:00",
    image: str = "",
    volume: str = "mbtrain",
    memory: str = "",
    secret: str = "mbtrain-mlflow",
    grace: str = "",
    resume: str = "",
    json: str = "",
    **overrides: str,
) -> None:
    """mbtrain job check|slurm|kubernetes CONFIG [--nodes=1] [--gpus=8] [--out=FILE] [--section.key=value ...]

    What a cluster is given: launch/train.slurm or launch/kubernetes/pytorchjob.yaml, filled in for CONFIG on
    nodes x gpus ranks, after a check that the batch can be cut for them. Nothing is submitted.

      check             only the check: says on stderr what each rank does, on stdout the run directory
      --nodes=N --gpus=M    machines, and GPUs on each                                                    (1, 8)
      --ranks=R         ranks on each machine, where it is not one a GPU; with --gpus=0 they are on CPU
      --hostfile=F      check: the ranks are the slots of these hosts
      --run=DIR         the run directory                                                          (runs/<name>)
      --out=FILE        where it is written                                                             (stdout)
      --cpus=C          processor cores for each rank                                                        (8)
      --grace=S         seconds between the notice and the kill, to save in         (Slurm 120, Kubernetes 300)
      --time=T          Slurm: limit of one stretch; the job puts itself back into the queue          (24:00:00)
      --image=I         Kubernetes: the image made by launch/Containerfile
      --volume=PVC      Kubernetes: the shared claim; relative paths of CONFIG begin in it             (mbtrain)
      --memory=Q        Kubernetes: memory of each pod                                          (32Gi for each rank)
      --secret=NAME     Kubernetes: entries become environment, for MLflow's password           (mbtrain-mlflow)
      --resume          taken and not looked at: every job goes on where its run was
      --json            last line on stdout: {"run", "nodes", "ranks", "micro_batch_size", "accumulation"}

    Examples:
      mbtrain job slurm configs/mine.yaml --nodes=4 --gpus=8 --out=mine.slurm && sbatch mine.slurm
      mbtrain job kubernetes configs/mine.yaml --nodes=4 --gpus=8 --image=registry/mbtrain:1 | kubectl apply -f -
      mbtrain job check configs/mine.yaml --hostfile=hosts
    """
    as_json = flag("--json", json)
    unknown = [key for key in overrides if "." not in key and key != "name"]
    if unknown:
        no_unknown(job, {unknown[0]: ""})
    kinds = ("check", "slurm", "kubernetes")
    if not what or what[0] not in kinds:
        raise ConfigError(f"job: expected one of {', '.join(kinds)}, got {what[0] if what else 'nothing'}")
    kind, config = what[0], what[1:]
    if len(config) != 1:
        raise ConfigError(f"CONFIG: expected one configuration file, got {len(config)}; see configs/")
    if hostfile and kind != "check":
        raise ConfigError("--hostfile: only `mbtrain job check` and launch/multinode.sh take it; give --nodes, --gpus")
    n_gpus = number("--gpus", gpus or "8", int, 0) if gpus or not ranks else 0
    n_ranks = number("--ranks", ranks, int, 1) if ranks else max(1, n_gpus)
    if gpus and n_gpus and n_ranks != n_gpus:
        raise ConfigError(f"--ranks={ranks}, --gpus={gpus}: expected as many ranks as GPUs, or --gpus=0")
    n_cpus, n_nodes = number("--cpus", cpus, int, 1), number("--nodes", nodes, int, 1)

    from mbtrain import job as jobs

    plan = jobs.planned(
        config[0],
        {key: str(value) for key, value in overrides.items()},
        nodes=n_nodes,
        ranks=n_ranks,
        gpus=n_gpus,
        hostfile=hostfile or None,
        run=run or (resume if resume not in ("true", "false") else "") or None,
    )
    sys.stderr.write(f"{jobs.in_words(plan)}\n")
    grace_s = number("--grace", grace or ("120" if kind == "slurm" else "300"), int, 1)
    if kind == "check":
        text = f"{plan.run}\n"
    elif kind == "slurm":
        text = jobs.slurm(plan, cpus=n_cpus, time=time, grace_s=grace_s)
    else:
        text = jobs.kubernetes(
            plan,
            image=image,
            volume=volume,
            cpus=n_cpus,
            memory=memory or f"{32 * n_ranks}Gi",
            grace_s=grace_s,
            secret=secret,
        )
    if out:
        Path(out).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    figures = {
        "run": plan.run,
        "nodes": plan.nodes,
        "ranks": plan.total_ranks,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation": plan.accumulation,
    }
    finish(figures, as_json)


def doctor(
    *config: str,
    hostfile: str = "",
    run: str = "",
    ranks: str = "",
    full: str = "",
    master_port: str = "29500",
    ssh_port: str = "",
    json: str = "",
    **overrides: str,
) -> None:
    """mbtrain doctor [CONFIG] [--hostfile=F] [--run=DIR] [--section.key=value ...] [--ranks=N] [--full] [--json]

    What a long run would stumble over, found before it, on every host: versions, devices, limits, ssh, clocks, network,
    the master port; with CONFIG also memory by formula for each ZeRO stage, the run directory (written by all, and the
    same for all), disk, shards, MLflow. Then the ranks are started as a training's are: sums over all of them, real
    steps on random bytes, their times rank by rank, and the memory that they took. Nothing is left behind.

      --hostfile=F       the hosts, lines NAME slots=N, asked over ssh                    (this machine alone)
      --run=DIR          where the run directory will be                                       (runs/<name>)
      --ranks=N          so many here, without a hostfile       (one on each GPU, else two that share the cores)
      --full             reads every shard and compares its hash                             (sizes alone)
      --master-port=N    where rank 0 will listen, on the first host                                 (29500)
      --ssh-port=N       where the hosts' sshd listens                              (as ~/.ssh/config has it)
      --json             last line on stdout: {"verdict", "ready", "checks", "hosts", "memory", "sums", "ranks"}

    Exit status: 0 ready, with warnings too; 2 not ready, or a mistake.

    Examples:
      mbtrain doctor
      mbtrain doctor configs/quickstart.yaml --train.zero_stage=2
      mbtrain doctor configs/quickstart.yaml --hostfile=hosts --run=/shared/runs/first --full
    """
    as_json, everything = flag("--json", json), flag("--full", full)
    unknown = [key for key in overrides if "." not in key and key != "name"]
    if unknown:
        no_unknown(doctor, {unknown[0]: ""})
    if len(config) > 1 or (overrides and not config):
        raise ConfigError(f"CONFIG: expected one configuration file, got {len(config)}; see configs/")
    port = number("--master-port", master_port, int, 1)
    at_ssh = number("--ssh-port", ssh_port, int, 1) if ssh_port else None
    n_ranks = number("--ranks", ranks, int, 1) if ranks else None
    if ranks and hostfile:
        raise ConfigError(
            f"--ranks={ranks}, --hostfile={hostfile}: expected one of them; the hostfile's slots are ranks"
        )

    from mbtrain.doctor import table
    from mbtrain.doctor.examine import Wanted, examine

    values = {key: str(value) for key, value in overrides.items()}
    wanted = Wanted(
        config[0] if config else None,
        values,
        hostfile or None,
        run or None,
        ranks=n_ranks,
        full=everything,
        master_port=port,
        ssh_port=at_ssh,
    )
    report = examine(wanted)
    for line in table.lines(report):
        write(line)
    finish(table.figures(report), as_json)
    if not report.ready:
        sys.exit(2)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


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


_HELP = """mbtrain: train multiscale byte models on raw bytes

  mbtrain train CONFIG           train; alone or under deepspeed, torchrun, srun
  mbtrain eval RUN               exact bits per byte of a split, with intervals, in four modes
  mbtrain eval-task RUN          what it has learnt of a small task with exact rules, marked
  mbtrain sample RUN             make text, pictures or sound, from nothing or after a prompt
  mbtrain compare RUN RUN ...    one page: curves, scores, costs, settings and samples of several runs
  mbtrain summary RUN            its score beside compressors, speed, where things are
  mbtrain export RUN --out=DIR   safetensors and configuration, loadable in three lines
  mbtrain compress FILE          lossless, by what a run's model predicts; its size proves the score
  mbtrain decompress FILE.mbz    the very same bytes back
  mbtrain sweep CONFIG           many runs side by side, over values and seeds; killed, it goes on
  mbtrain transfer SWEEP CONFIG  what a sweep of a small model found, as the configuration of a large one
  mbtrain coord-check CONFIG     is its LR that of wider models too? every tensor's slope against the width
  mbtrain flops CONFIG           parameters, operations, memory and GPU hours by formula
  mbtrain bench WHAT             measure against MEGABYTE-pytorch and against a bare loop
  mbtrain doctor [CONFIG]        is every host ready for a long run? what is wrong, and what to do
  mbtrain supervise CONFIG       train, and go on after a crash, on the hosts that are left
  mbtrain job KIND CONFIG        a job file for Slurm or Kubernetes, checked and filled in
  mbtrain sync RUN               send to MLflow what it does not have yet
  mbtrain ui                     MLflow's pages of the runs tracked here

Options are --key=value. `mbtrain VERB --help` shows those of a verb, with examples. Data comes from `mbtrain-prep`.
Progress goes to stderr. Exit status: 0 done, 2 a mistake (one line says which), 75 a rank was lost, 143 saved
and stopped as told.
"""

PROGRAM = Program(
    name="mbtrain",
    verbs={
        "train": train,
        "eval": eval,
        "eval-task": eval_task,
        "sample": sample,
        "compare": compare,
        "summary": summary,
        "export": export,
        "compress": compress,
        "decompress": decompress,
        "sweep": sweep,
        "transfer": transfer,
        "coord-check": coord_check,
        "flops": flops,
        "bench": bench,
        "doctor": doctor,
        "supervise": supervise,
        "job": job,
        "sync": sync,
        "ui": ui,
    },
    flags=("json", "resume", "quick", "full", "overwrite", "retry", "report"),
    help=_HELP,
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script. DeepSpeed's launcher puts --local_rank=N first; the rank is in the environment as well."""
    args = [arg for arg in (sys.argv[1:] if argv is None else argv) if not arg.startswith("--local_rank=")]
    if args[:1] == ["--"]:  # which keeps torchrun from taking --run for its own --run-path
        args = args[1:]
    run_program(PROGRAM, args)
