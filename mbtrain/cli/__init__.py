"""The command line of `mbtrain`: its verbs, their help, and where a call goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from mbtrain.cli.machines import doctor, job, supervise, ui
from mbtrain.cli.runs import (
    compare,
    compress,
    decompress,
    eval,
    eval_task,
    export,
    sample,
    summary,
    sync,
    train,
)
from mbtrain.cli.tuning import bench, coord_check, flops, sweep, transfer
from mbtrain.command import Program
from mbtrain.command import main as run_program

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
