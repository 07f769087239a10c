"""Keep a training going: launch it, and after a crash launch it again from its newest whole checkpoint.

    finished           exit 0
    a mistake          exit 2: another start would end the same way
    asked to stop      exit 143, with a checkpoint of the step at hand
    anything else      a rank or host was lost, killed or crashed: what is left of the launch is ended, every host is
                       asked whether it is there, and the run goes on with the hosts that answer

Every process of a launch carries the run's mark MBTRAIN_LAUNCH=<hash of RUN's path> in its environment, on all hosts,
and nothing else is ever signalled. So a supervisor that is started after another was killed ends what that one left.
The launcher's exit status alone is not believed: DeepSpeed's runner returns 0 when its own child is killed by a signal,
so only RUN/status.json says that a run has finished. RUN must be the same folder on all hosts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mbtrain import config as configuration
from mbtrain.config import Config
from mbtrain.errors import CheckpointError, ConfigError
from mbtrain.hosts import Host, hostfile_text, read_hostfile, ssh_command
from mbtrain.log import say
from mbtrain.redact import without_password
from mbtrain.signals import STOPPING, handled

MARK = "MBTRAIN_LAUNCH"
FINISHED, STOPPED, MISTAKE, CRASHED = "finished", "stopped", "mistake", "crashed"
HOST_TIMEOUT_S = 45.0
STOP_TIMEOUT_S = 600.0
# From RUN/status.json to the launcher's end: MLflow gets 30 s for the rest, DeepSpeed's launcher waits as long for a
# rank that does not end, and for ever for one that is stopped (SIGSTOP) on another host.
ENDING_TIMEOUT_S = 60.0
LONGEST_PAUSE_S = 60.0
# What DeepSpeed takes along to other hosts by itself, and what ranks there need besides; it goes on command lines.
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
TRAVELS = ("GLOO_", "OMP_", "DS_ACCELERATOR", "MBTRAIN_")
_SECRET = re.compile(r"(PASSWORD|PASSWD|TOKEN|SECRET|KEY|CREDENTIALS?)$")
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./ ~-]*")

# $1 mark, $2 signal, $3 pattern of command lines (empty: all). Signals the processes that carry the mark and prints the
# id of each; with KILL, until none is left. In sh, so that a host needs no working Python to be cleared.
_SIGNAL_MARKED = """
tries=0
while :; do
  found=
  for file in $(grep -lszxF -- "$1" /proc/[0-9]*/environ); do
    place=${file%/environ}
    [ -z "$3" ] || tr '\\000' ' ' < "$place/cmdline" | grep -qe "$3" || continue
    kill -s "$2" "${place#/proc/}" 2>/dev/null && found=1 && echo "${place#/proc/}"
  done
  [ "$2" = KILL ] && [ -n "$found" ] || exit 0
  tries=$((tries + 1))
  [ "$tries" -lt 100 ] || exit 1
  sleep 0.1
done
"""
_RANKS_ALONE = " -m mbtrain train "
# So that pdsh does not wait for ever for a host whose link is gone, nor for somebody to type a password.
_PDSH_SSH = "-oBatchMode=yes -oConnectTimeout=10 -oServerAliveInterval=5 -oServerAliveCountMax=3"
_FREE_PORT = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"


@dataclass(frozen=True)
class Task:
    """What is kept going: `mbtrain train CONFIG --run=RUN --resume OVERRIDES`.

    hostfile    the hosts that it may run on; None: this machine alone
    most_ranks  never more ranks than these; None: a rank per slot, without hostfile a rank per GPU or one
    restarts    so many restarts in a row may bring no newer checkpoint
    """

    config: str
    overrides: tuple[str, ...]
    settings: Config
    run: Path
    hostfile: str | None
    most_ranks: int | None
    restarts: int


def supervise(task: Task, pause_s: float = 2.0) -> int:
    """Run the task until it has finished, was stopped or cannot go on; returns the exit status: 0, 1, 2 or 143.

    pause_s is the pause before the first restart without progress; it doubles with each, up to a minute.

    Raises:
        ConfigError: the hostfile is no hostfile, or no number of ranks fits the global batch.
        CheckpointError: another supervisor keeps this run.
    """
    wanted = read_hostfile(task.hostfile) if task.hostfile else [Host("localhost", task.most_ranks or _local_slots())]
    placed(task.settings, wanted, task.most_ranks)
    with ExitStack() as held:
        held.enter_context(_only_supervisor(task.run))
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="mbtrain-")))
        asked: list[int] = []  # the signals that ask to stop; a second one asks to stop at once
        held.enter_context(handled(asked.append, *STOPPING, signal.SIGHUP))
        return _keep_going(task, wanted, folder, asked, pause_s)


def placed(settings: Config, hosts: Sequence[Host], most_ranks: int | None = None) -> list[Host]:
    """The largest number of ranks that cuts the global batch evenly, laid on the hosts in their order.

    Raises ConfigError when there is none.
    """
    slots = sum(host.slots for host in hosts)
    most = slots if most_ranks is None else min(slots, most_ranks)
    for ranks in range(most, 0, -1):
        with suppress(ConfigError):
            configuration.batch_shape(settings, ranks)
            break
    else:
        configuration.batch_shape(settings, most)  # which says what does not fit
    out, left = [], ranks
    for host in hosts:
        if left > 0:
            out.append(Host(host.name, min(host.slots, left)))
            left -= host.slots
    return out


def verdict(code: int, status: str | None) -> str:
    """What came of a launch, by its exit status and RUN/status.json: finished, stopped, mistake or crashed."""
    if status == "FINISHED":
        return FINISHED
    if status == "KILLED" or code == 143:
        return STOPPED
    if code == 2:
        return MISTAKE
    return CRASHED


def launcher_command(task: Task, hosts: Sequence[Host], folder: Path) -> list[str]:
    """DeepSpeed's runner for one launch; `folder` holds its hostfile. Asks rank 0's host for a free port.

    Raises ConfigError where DeepSpeed would write the working directory into a shell's line and it does not fit there.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=error", "--no_local_rank", "--module"]
    train = ["mbtrain", "train", task.config, f"--run={task.run}", "--resume", *task.overrides]
    if task.hostfile is not None:
        for path in (str(Path.cwd()), sys.executable):
            if shlex.quote(path) != path:
                raise ConfigError(f"{path}: expected a path without spaces and the like, to be entered on other hosts")
        # force_multi: a single host that is left may be another one than this.
        command += ["--force_multi", f"--hostfile={folder / 'hostfile'}", f"--master_addr={hosts[0].name}"]
        return [*command, f"--master_port={_free_port(hosts[0].name)}", *map(_through_shells, train)]
    # The runner's default hostfile is a fixed path; whatever lies there is not meant.
    command += [f"--hostfile={folder / 'none'}", f"--master_port={_free_port(None)}"]
    chosen = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.isdigit()]
    if len(chosen) >= hosts[0].slots:
        return [*command, f"--include=localhost:{','.join(chosen[: hosts[0].slots])}", *train]
    return [*command, f"--num_gpus={hosts[0].slots}", *train]


def for_other_hosts(environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """(the launcher's environment, DeepSpeed's environment file): what the ranks get, and no secret in either.

    The file holds the user's own lines (.deepspeed_env at home, then here), PATH, and what TRAVELS.
    Raises ConfigError for a value that is secret, or that a shell on the hosts would act on.
    """
    kept = {key: value for key, value in environment.items() if not (key.startswith(EXPORTED) and _SECRET.search(key))}
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    entries = [entry for entry in environment.get("PATH", "").split(os.pathsep) if _PLAIN.fullmatch(entry)]
    values = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), *entries])}
    for path in dict.fromkeys([Path.home() / name, Path.cwd() / name]):
        with suppress(OSError):
            for line in path.read_text(encoding="utf-8").splitlines():
                key, equals, value = line.strip().partition("=")
                if equals and not key.startswith("#"):
                    values[key] = value
    values |= {key: value for key, value in kept.items() if key.startswith(TRAVELS)}
    for key, value in {**{k: v for k, v in kept.items() if k.startswith(EXPORTED)}, **values}.items():
        if _SECRET.search(key) or without_password(value) != value:
            raise ConfigError(
                f"{key}: holds a secret, which every user of the hosts could see in their lists of processes; leave it "
                "out here (for MLflow, ~/.mlflow/credentials of the first host)"
            )
        if not _PLAIN.fullmatch(value) or not key.isidentifier():
            raise ConfigError(f"{key}: has characters that a shell on the hosts would act on; leave it out here")
    return kept, "".join(f"{key}={value}\n" for key, value in values.items())


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint by name, -1 without one. Whether it verifies is for the resume to find out."""
    names = (path.parent.name for path in run.glob("checkpoints/step_*/checkpoint.json"))
    return max((int(name[5:]) for name in names if re.fullmatch(r"step_\d{10}", name)), default=-1)


def mark_of(run: Path) -> str:
    """The environment variable that every process of a run's launches carries, as NAME=value."""
    return f"{MARK}={hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]}"


def _keep_going(task: Task, wanted: Sequence[Host], folder: Path, asked: list[int], pause_s: float) -> int:
    fruitless, best = 0, newest_step(task.run)
    used: list[Host] = []
    ended_s = time.monotonic()
    while True:
        answered = _answering(task, wanted)
        if {host.name for host in used} - {host.name for host in answered}:
            # What still runs on a host that cannot be reached ends by itself when it misses the others for so long.
            _sleep_until(ended_s + task.settings.train.lost_after_s, asked)
        if asked:
            say(task.run, f"supervise: stopped; the same command goes on from step {max(newest_step(task.run), 0)}")
            return 143
        code, used = _launch(task, wanted, answered, folder, asked)
        ended_s = time.monotonic()
        status = _status(task.run)
        how = verdict(code, status.get("status"))
        if asked and how != FINISHED:
            continue
        if how != CRASHED:
            say(task.run, f"supervise: {how}" + (", not started again" if how == MISTAKE else ""))
            return {FINISHED: 0, STOPPED: 143, MISTAKE: 2}[how]

        reached = newest_step(task.run)
        if reached > best:
            fruitless, best = 0, reached
        said = f" ({status['message']})" if status.get("message") else ""
        if fruitless >= task.restarts:
            _answering(task, wanted)
            say(task.run, f"supervise: it ended with {code}{said}; no progress in {fruitless} restarts: stop")
            return 1
        fruitless += 1
        count = f"{fruitless} of at most {task.restarts} without progress"
        say(task.run, f"supervise: it ended with {code}{said}; restart from step {max(reached, 0)}, {count}")
        _sleep_until(ended_s + min(pause_s * 2 ** (fruitless - 1), LONGEST_PAUSE_S), asked)


def _sleep_until(at_s: float, asked: list[int]) -> None:
    while not asked and time.monotonic() < at_s:
        time.sleep(0.1)


def _launch(
    task: Task, wanted: Sequence[Host], answered: Sequence[Host], folder: Path, asked: list[int]
) -> tuple[int, list[Host]]:
    """Start the launcher on the hosts that answer and wait for its end: exit status (255: nothing to start), hosts.

    A stop that is asked for meanwhile is passed on to the ranks, which save and end.
    """
    if not answered:
        say(task.run, f"supervise: none of {', '.join(host.name for host in wanted)} answers over ssh")
        return 255, []
    try:
        hosts = placed(task.settings, answered, task.most_ranks)
    except ConfigError as error:
        say(task.run, f"supervise: only {', '.join(host.name for host in answered)} answers over ssh: {error}")
        return 255, []
    absent = sorted({host.name for host in wanted} - {host.name for host in answered})
    ranks, where = sum(host.slots for host in hosts), ", ".join(f"{host.name} ({host.slots})" for host in hosts)
    idle = sum(host.slots for host in answered) - ranks
    notes = [f"without {', '.join(absent)}"] * bool(absent)
    notes += [f"{idle} slots idle, since train.global_batch_size or --ranks leaves none for them"] * bool(idle)
    say(task.run, "; ".join([f"supervise: start: {ranks} ranks on {where}", *notes]))
    name, _, value = mark_of(task.run).partition("=")
    environment = {**os.environ, name: value}
    if task.hostfile is not None:
        (folder / "hostfile").write_text(hostfile_text(hosts))
        environment, lines = for_other_hosts(environment)
        (folder / "environment").write_text(lines)
        environment["DS_ENV_FILE"] = str(folder / "environment")
        environment["PDSH_SSH_ARGS_APPEND"] = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {_PDSH_SSH}".strip()
    command = launcher_command(task, hosts, folder)
    (task.run / "status.json").unlink(missing_ok=True)
    # A session of its own: Ctrl-C in a terminal reaches the supervisor alone, which passes it on once.
    launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    return _wait_for(launcher, task, hosts, asked), hosts


def _wait_for(launcher: subprocess.Popen[bytes], task: Task, hosts: Sequence[Host], asked: list[int]) -> int:
    """Wait for the launcher's end and return its exit status; pass a stop on; end what does not end in time."""
    announced, told, over, give_up_s = False, False, False, float("inf")
    while (code := launcher.poll()) is None:
        if asked and not announced:
            say(task.run, "supervise: asked to stop: the ranks save and end")
            announced, give_up_s = True, min(give_up_s, time.monotonic() + STOP_TIMEOUT_S)
        if asked and not told:
            # One rank is enough: they agree at every step. But none may be there yet.
            told = any(_signal_marked(task, hosts, "TERM", _RANKS_ALONE))
        if not over and (task.run / "status.json").exists():
            over, give_up_s = True, min(give_up_s, time.monotonic() + ENDING_TIMEOUT_S)
        if len(asked) > 1 or time.monotonic() > give_up_s:
            _signal_marked(task, hosts, "KILL")
        time.sleep(0.05)
    return code if code >= 0 else 128 - code


def _answering(task: Task, hosts: Sequence[Host]) -> list[Host]:
    """The hosts that answer, in their order; what earlier launches left there is ended, or they do not count."""
    cleared = _signal_marked(task, hosts, "KILL")
    return [host for host, pids in zip(hosts, cleared, strict=True) if pids is not None]


def _signal_marked(task: Task, hosts: Sequence[Host], name: str, pattern: str = "") -> list[list[int] | None]:
    """Signal the processes with the run's mark, here (the launcher, pdsh, ssh) and on the hosts.

    By host, the ids of those that were signalled; None where it does not answer or some cannot be killed.
    """
    script = ["sh", "-c", _SIGNAL_MARKED, "mbtrain", mark_of(task.run), name, pattern]
    here = _pids(script)
    if task.hostfile is None:
        return [here for _ in hosts]
    if not hosts:
        return []
    with ThreadPoolExecutor(max_workers=min(len(hosts), 64)) as pool:
        return list(pool.map(_pids, [ssh_command(host.name, script) for host in hosts]))


def _pids(command: Sequence[str]) -> list[int] | None:
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(
            command, timeout=HOST_TIMEOUT_S, check=True, capture_output=True, stdin=subprocess.DEVNULL
        )
        return [int(line) for line in done.stdout.split()]
    return None


def _through_shells(argument: str) -> str:
    """An argument written so that it arrives on other hosts as it is: past DeepSpeed, pdsh and the shell there."""
    argument = argument.replace("%", "%%")  # pdsh puts host and number in for %h and %n
    if " " not in argument:
        return shlex.quote(argument)
    # DeepSpeed puts what holds a space in double quotes, and escapes only those.
    return re.sub(r"([\\$`])", r"\\\1", argument)


def _free_port(host: str | None) -> int:
    """A port that was free a moment ago where rank 0 will run; a start that finds it taken is a crash like others."""
    if host is None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])
    command = ssh_command(host, [sys.executable, "-c", _FREE_PORT])
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        return int(subprocess.run(command, timeout=HOST_TIMEOUT_S, capture_output=True, check=True).stdout)
    return 29500


def _local_slots() -> int:
    """GPUs of this machine, or one rank. Asked in another process: this one shall stay small for weeks."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return max(1, int(done.stdout)) if done.stdout.strip().isdigit() else 1


def _status(run: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        found = json.loads((run / "status.json").read_bytes())
        if isinstance(found, dict):
            return {str(key): str(value) for key, value in found.items()}
    return {}


@contextmanager
def _only_supervisor(run: Path) -> Iterator[None]:
    """Hold RUN/.supervisor alone, across hosts that share the folder."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".supervisor").open("w")
    except OSError as error:
        raise CheckpointError(f"--run={run}: {error.strerror}; expected a folder that can be written") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{run}: another supervisor keeps it; stop that one first") from error
        yield
