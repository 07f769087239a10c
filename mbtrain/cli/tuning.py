"""Verbs before a run: which settings, and what will they cost? Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import sys
from pathlib import Path

from mbtrain.command import finish, flag, number, one_config, settings_of, write
from mbtrain.errors import ConfigError


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

    values = settings_of(sweep, options, also=())
    of_spec = {"seeds": seeds, "widths": widths, "which": which, "shrink": shrink, "draws": draws, "name": name}
    of_spec |= {"jobs": jobs, "threads": threads}
    spec = specs.read(config[0], {**{key: value for key, value in of_spec.items() if value}, **values})
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
    values = settings_of(transfer, overrides, also=())
    if len(what) != 2:
        raise ConfigError(f"SWEEP, CONFIG: expected a sweep's folder and an experiment, got {len(what)} of them")
    if not out:
        raise ConfigError("--out: expected a file, got nothing; give --out=FILE")

    from mbtrain.sweep.transfer import transfer as transferred

    made = transferred(what[0], what[1], out, values)
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
    values, path = settings_of(coord_check, overrides), one_config(config)
    n_steps, n_seeds = number("--steps", steps, int, 1), number("--seeds", seeds, int, 1)
    peak = number("--lr", lr, float, 1e-12) if lr else None

    from mbtrain import config as configuration
    from mbtrain import coord_check as check

    settings = configuration.load(path, values)
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
    values, path = settings_of(flops, overrides), one_config(config)

    from mbtrain import config as configuration
    from mbtrain import cost, gpus
    from mbtrain.model.flops import by_content

    share = number("--mfu", mfu, float, 1e-3)
    if share > 1:
        raise ConfigError(f"--mfu: expected at most 1, the whole peak, got {mfu}")
    names = [gpus.named("--gpu", name) for name in gpu.split(",")]
    settings = configuration.load(path, values)
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
                 --threads=N --ranks=N       also as so many ranks that share the threads             (1; 1)
      roofline   each part of the model, forward and backward, against operations and bytes over what is reached here
      quality    bits per byte after equal minutes, the peer by its own script's recipe
                 --peer-minutes=M --seeds=N   the peer for longer: do all seeds reach it in a tenth of the time?
                 --peer-config=FILE           the peer's shape and rows, also what is scored (configs/bench/small.yaml)
      generate   bytes/s of one sequence of 1,024 bytes and of a batch, interleaved, medians
                 --batch=N --prompt-bytes=N  rows of the batch (32); also the time to the first byte after such a prompt
                 --peer-bytes=N              forward passes at N lengths in place of the peer's whole minute
      deepspeed  a step under DeepSpeed ZeRO-1 against the same step in a bare torch loop
      saving     what checkpoints cost a training that goes on while they are written
      start      the help's time; from a launch to the end of the first step, and where it goes
                 --ranks=N --launcher=deepspeed,torchrun,none   how it is launched, in turn           (2; deepspeed)
      everyday   what a training waits for reports, checkpoints, validation and samples, and what share of it they are
                 --steps=N   of the training, which does each of them half-way                          (100)
      sequence   memory and time of one long row, forward and backward, on 1, 2 and 4 ranks that share it
                 --seq=BYTES --ranks=1,2,4   the row, and on how many ranks           (65536; all three)
                 --steps=N   steps that are timed, after the first, whose memory is measured         (2)
      length     a training step against the length of its row, each length in a process of its own, beside a flat
                 transformer of as many parameters; exponents of the cost, a picture
                 --lengths=8192,65536,...   bytes of the rows                             (8 kB to 1.2 MB)
                 --flat-cpu-s=S   the transformer goes as far as its step takes so many CPU seconds   (60)
                 --out=FILE   the picture                                              (length.png)
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


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
