"""Verbs of hosts and of what runs on them. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import sys
from pathlib import Path

from mbtrain.command import finish, flag, no_unknown, number, one_config, settings_of, write, writing
from mbtrain.errors import ConfigError


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
    values = settings_of(doctor, overrides)
    path = one_config(config, None if overrides else "")
    port = number("--master-port", master_port, int, 1)
    at_ssh = number("--ssh-port", ssh_port, int, 1) if ssh_port else None
    n_ranks = number("--ranks", ranks, int, 1) if ranks else None
    if ranks and hostfile:
        raise ConfigError(
            f"--ranks={ranks}, --hostfile={hostfile}: expected one of them; the hostfile's slots are ranks"
        )

    from mbtrain.doctor import table
    from mbtrain.doctor.examine import Wanted, examine

    wanted = Wanted(
        path or None,
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


def supervise(
    *config: str,
    run: str = "",
    hostfile: str = "",
    ranks: str = "",
    restarts: str = "3",
    json: str = "",
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
      --json            last line on stdout: {"run", "step", "exit_status"}; step: of the newest checkpoint, or -1

    SIGTERM and Ctrl-C let the ranks save and end, a second one ends them at once. Exit status: 0 finished, 1 no
    progress, 2 a mistake that another start would not mend, 143 stopped.

    Examples:
      mbtrain supervise configs/quickstart.yaml --ranks=2
      bash launch/supervise --hostfile=hosts configs/quickstart.yaml --run=/shared/runs/first
    """
    as_json = flag("--json", json)
    values, path = settings_of(supervise, overrides), one_config(config)
    most = number("--ranks", ranks, int, 1) if ranks else None
    without_progress = number("--restarts", restarts, int, 0)

    from mbtrain import config as configuration
    from mbtrain.supervise import Task, newest_step
    from mbtrain.supervise import supervise as keep_going

    settings = configuration.load(path, values)
    folder = Path(run or f"runs/{settings.name}").resolve()
    given = tuple(f"--{key}={value}" for key, value in values.items())
    code = keep_going(Task(path, given, settings, folder, hostfile or None, most, without_progress))
    finish({"run": str(folder), "step": newest_step(folder), "exit_status": code}, as_json)
    sys.exit(code)


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
    values = settings_of(job, overrides)
    kinds = ("check", "slurm", "kubernetes")
    if not what or what[0] not in kinds:
        raise ConfigError(f"job: expected one of {', '.join(kinds)}, got {what[0] if what else 'nothing'}")
    kind, path = what[0], one_config(what[1:])
    if hostfile and kind != "check":
        raise ConfigError("--hostfile: only `mbtrain job check` and launch/multinode.sh take it; give --nodes, --gpus")
    n_gpus = number("--gpus", gpus or "8", int, 0) if gpus or not ranks else 0
    n_ranks = number("--ranks", ranks, int, 1) if ranks else max(1, n_gpus)
    if gpus and n_gpus and n_ranks != n_gpus:
        raise ConfigError(f"--ranks={ranks}, --gpus={gpus}: expected as many ranks as GPUs, or --gpus=0")
    n_cpus, n_nodes = number("--cpus", cpus, int, 1), number("--nodes", nodes, int, 1)

    from mbtrain import job as jobs
    from mbtrain.shards import whole_file

    plan = jobs.planned(
        path,
        values,
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
        with writing(f"--out={out}"), whole_file(Path(out)) as file:
            file.write(text.encode())
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


def ui(host: str = "127.0.0.1", port: str = "5000", uri: str = "", json: str = "", **unknown: str) -> None:
    """mbtrain ui [--host=127.0.0.1] [--port=5000] [--uri=STORE]

    Serves MLflow's pages of the runs tracked here, on the loopback interface unless told otherwise, until Ctrl-C.
    Everyone who reaches the port can read and change the store. --json: {"url"} on stdout in place of words.
    """
    no_unknown(ui, unknown)
    as_json = flag("--json", json)
    at = number("--port", port, int, 1)

    from mbtrain import tracking

    url = f"http://{host}:{at}"
    if as_json:
        finish({"url": url}, as_json)
    else:
        write(f"{url} (some 10 s from now; Ctrl-C ends it)")
    sys.stdout.flush()
    tracking.ui(host, at, uri or None)
