"""The scripts in launch/ that start training: real signals, real exit statuses, and stand-ins for what is not here.

Slurm's commands and ssh are stand-ins that do what theirs do with processes, signals and exit statuses. pdsh and
DeepSpeed's launchers are real, but where a test says otherwise; and so is the training where it is about saving.

pytest tests/test_scripts.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mbtrain import job, metrics
from tests import launch, tiny
from tests.launch import ROOT

VENV = str(Path(sys.executable).parents[1])


def make(path: Path, content: str) -> Path:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)
    return path


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in launch.environment().items() if not k.startswith(("MLFLOW", "SLURM", "PET_", "MASTER"))}
    return {**kept, "VENV": VENV, "PAUSE": "0", **extra}


def start(command: list[str], folder: Path, **extra: str) -> subprocess.Popen[str]:
    """A script, begun in a folder; what it says is in folder/said."""
    with (folder / "said").open("a") as said:
        return subprocess.Popen(command, cwd=folder, env=environment(**extra), stdout=said, stderr=said, text=True)


def wait_for(happened: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert process.poll() is None, f"ended too early with {process.returncode}"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# In place of mbtrain, for what the scripts make of exit statuses: `job check` names the run; `train` does the next of
# the deeds in the file `deeds`, a line for each start, and notes with what it was started.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
args = sys.argv[1:]
if args[:2] == ["job", "check"]:
    print("run\\n{}" if "--json" in args else "run")
    sys.exit(2 if "bad.yaml" in args else 0)
rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
starts = Path(f"starts-{rank}")
starts.touch()
with starts.open("r+") as file:
    deed = Path("deeds").read_text().splitlines()[len(file.readlines())]
    file.write(json.dumps({"args": args, "environment": dict(os.environ)}) + "\\n")
for word in deed.split():
    if word == "save":
        Path(f"run/checkpoints/step_{time.time_ns():020d}").mkdir(parents=True, exist_ok=True)
    elif word == "finish":
        Path("run").mkdir(exist_ok=True)
        Path("run/status.json").write_text('{"status": "FINISHED"}')
    elif word == "wait":
        told = []
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: told.append(number))
        Path(f"waiting-{rank}").touch()
        while not told and not Path("run/stop").exists():
            time.sleep(0.02)
        Path(f"told-{rank}").write_text(" ".join(signal.Signals(number).name for number in told))
    elif word.startswith("-"):
        os.kill(os.getpid(), int(word[1:]))
    else:
        sys.stdout.flush()
        os._exit(int(word))
"""


def stand_in(folder: Path, deeds: list[str]) -> Path:
    """A folder where `python -m mbtrain` is the stand-in, with what its starts do one after the other."""
    make(folder / "mbtrain" / "__main__.py", STAND_IN)
    make(folder / "mbtrain" / "__init__.py", "")
    (folder / "deeds").write_text("\n".join([*deeds, "99"]))
    return folder


def starts(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"starts-{rank}").read_text().splitlines()]


# --- Slurm

SRUN = """#!{python}
# Runs a step: a task for each place, with the variables that Slurm gives it; hands signals on; ends with the highest
# exit status, 128 + n for signal n. --wait and --kill-on-bad-exit=0 as the script asks: nobody is killed.
import os, signal, subprocess, sys
command = sys.argv[1:]
options = []
while command[0].startswith("--"):
    options.append(command.pop(0))
assert "--kill-on-bad-exit=0" in options and "--wait=300" in options, options
nodes, tasks = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
def place(rank):
    return {{
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % tasks), "SLURM_NODEID": str(rank // tasks),
        "SLURM_NTASKS": str(nodes * tasks), "SLURM_STEP_TASKS_PER_NODE": f"{{tasks}}(x{{nodes}})",
    }}
running = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in running])
for rank in range(nodes * tasks):
    running.append(subprocess.Popen(command, env={{**os.environ, **place(rank)}}))
codes = [task.wait() for task in running]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
show) [ "$2 $3" = "hostnames node[1-2]" ] && printf '127.0.0.1\\nnode2\\n' ;;
requeue) echo "$2" >>requeued ;;
esac
"""


def slurm_job(folder: Path, script: Path, args: list[str], restarts: int = 0, **extra: str) -> subprocess.Popen[str]:
    """The job as Slurm runs it: a copy of the script, in the folder of submission, on two nodes with a task each."""
    make(folder / "bin" / "srun", SRUN.format(python=sys.executable))
    make(folder / "bin" / "scontrol", SCONTROL)
    spooled = folder / "slurm_script"
    shutil.copy(script, spooled)
    variables = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NODELIST": "node[1-2]",
        **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        **extra,
    }
    return start(["bash", str(spooled), *args], folder, **variables)


def requeued(folder: Path) -> bool:
    """Whether the job was put back into the queue, once; forgets it."""
    note = folder / "requeued"
    there = note.exists()
    if there:
        assert note.read_text() == "12345\n"
        note.unlink()
    return there


@pytest.mark.parametrize(
    ("deed", "restarts", "code", "again"),
    [
        ("0", 0, 0, False),
        ("2", 0, 2, False),
        ("1", 0, 1, False),
        ("75", 0, 75, True),
        ("-9", 2, 137, True),
        ("75", 3, 75, False),
        ("save 75", 30, 75, True),
        ("143", 0, 143, False),  # RUN/stop, or a SIGTERM that Slurm sent: it knows whether the job comes back
    ],
)
def test_what_the_slurm_job_makes_of_exit_statuses(
    deed: str, restarts: int, code: int, again: bool, tmp_path: Path
) -> None:
    stand_in(tmp_path, [deed])
    venv = make(tmp_path / "venv" / "bin" / "mbtrain", f'#!/bin/sh\nexec {sys.executable} -m mbtrain "$@"\n').parents[1]
    ended = slurm_job(tmp_path, ROOT / "launch" / "train.slurm", ["c.yaml"], restarts, VENV=str(venv), PYTHONPATH="")
    assert (ended.wait(60), requeued(tmp_path)) == (code, again), (tmp_path / "said").read_text()
    for rank in (0, 1):
        (begun,) = starts(tmp_path, rank)
        assert begun["args"] == ["train", "--resume", "c.yaml"]
        assert begun["environment"]["MASTER_ADDR"] == "127.0.0.1"
        assert begun["environment"]["MASTER_PORT"] == "22345"
        assert begun["environment"]["SLURM_GPU_BIND"] == "none"


def test_the_slurm_job_hands_notices_on_and_comes_back_only_when_told_to_make_room(tmp_path: Path) -> None:
    venv = make(tmp_path / "venv" / "bin" / "mbtrain", f'#!/bin/sh\nexec {sys.executable} -m mbtrain "$@"\n').parents[1]
    for number, again in ((signal.SIGUSR1, True), (signal.SIGTERM, False)):
        folder = tmp_path / number.name
        stand_in(folder, ["wait save 143"])
        running = slurm_job(folder, ROOT / "launch" / "train.slurm", ["c"], 9, VENV=str(venv), PYTHONPATH="")
        wait_for(lambda: all((folder / f"waiting-{rank}").exists() for rank in (0, 1)), running)  # noqa: B023
        running.send_signal(number)
        assert (running.wait(60), requeued(folder)) == (143, again), (folder / "said").read_text()
        assert [(folder / f"told-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2


def test_a_slurm_job_whose_configuration_does_not_fit_starts_nothing(tmp_path: Path) -> None:
    stand_in(tmp_path, [])
    venv = make(tmp_path / "venv" / "bin" / "mbtrain", f'#!/bin/sh\nexec {sys.executable} -m mbtrain "$@"\n').parents[1]
    ended = slurm_job(tmp_path, ROOT / "launch" / "train.slurm", ["bad.yaml"], VENV=str(venv), PYTHONPATH="")
    assert (ended.wait(60), requeued(tmp_path)) == (2, False)
    assert not (tmp_path / "starts-0").exists()


def tiny_run(folder: Path, shards: Path, steps: int) -> str:
    tree = tiny.tree(data={"path": str(shards)}, train={"steps": steps}, checkpoint={"every_minutes": None})
    return str(launch.config_file(folder, tree))


def test_a_preempted_slurm_job_saves_is_put_back_and_finishes(shards: Path, tmp_path: Path) -> None:
    """The rendered file, and real ranks that find their places by Slurm's variables."""
    made = job.planned(tiny_run(tmp_path, shards, 10**6), {}, nodes=2, ranks=1, run="run")
    (tmp_path / "made.slurm").write_text(job.slurm(made, cpus=1, time="1:00:00"))
    run = tmp_path / "run"
    port = str(launch.free_port())
    running = slurm_job(tmp_path, tmp_path / "made.slurm", [], MASTER_PORT=port)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(launch.losses(run)) > 3, running)
    running.send_signal(signal.SIGUSR1)
    assert (running.wait(120), requeued(tmp_path)) == (143, True), (tmp_path / "said").read_text()
    done = len(launch.losses(run))
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name == f"step_{done:010d}"

    # Comes back, with an option given to sbatch behind the file.
    end = [f"--train.steps={done + 3}"]
    ended = slurm_job(tmp_path, tmp_path / "made.slurm", end, restarts=1, MASTER_PORT=port)
    assert (ended.wait(120), requeued(tmp_path)) == (0, False), (tmp_path / "said").read_text()
    assert [line["step"] for line in metrics.read(run / "metrics.jsonl") if "train/loss_nats" in line] == list(
        range(1, done + 4)
    )


# --- one machine, pods

LAUNCHER = """
import json, os, subprocess, sys
at = sys.argv.index("mbtrain")
ended = subprocess.run([sys.executable, "-m", *sys.argv[at:]], env={**os.environ, "RANK": "0"}, check=False)
sys.exit(ended.returncode)
"""


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A folder where torch and DeepSpeed's launcher are stand-ins too, as they take seconds to start."""
    make(tmp_path / "deepspeed" / "launcher" / "launch.py", LAUNCHER)
    make(tmp_path / "torch" / "__init__.py", "class cuda:\n    device_count = lambda: 0\n")
    for name in ("deepspeed", "deepspeed/launcher"):
        make(tmp_path / name / "__init__.py", "")
    return tmp_path


def node(folder: Path, *args: str, **extra: str) -> subprocess.Popen[str]:
    return start(["bash", str(ROOT / "launch" / "node.sh"), *args], folder, **extra)


@pytest.mark.parametrize(
    ("deeds", "retries", "code"),
    [
        (["0"], 9, 0),
        (["2"], 9, 2),
        (["1"], 9, 1),
        (["143"], 9, 143),
        (["75"], 0, 75),
        (["-9", "75", "0"], 2, 0),
        (["75", "75", "75"], 2, 75),
        (["75", "save 75", "-11", "0"], 2, 0),
        (["save 75", "save 75", "save 2"], 1, 2),
    ],
    ids=str,
)
def test_what_node_makes_of_exit_statuses(deeds: list[str], retries: int, code: int, alone: Path) -> None:
    stand_in(alone, deeds)
    ended = node(alone, "c.yaml", "--a.b=c d", "--json", RETRIES=str(retries), PYTHONPATH=str(alone))
    assert ended.wait(60) == code, (alone / "said").read_text()
    begun = starts(alone)
    assert len(begun) == len(deeds)
    assert all(each["args"] == ["train", "--resume", "c.yaml", "--a.b=c d", "--json"] for each in begun)


def test_node_hands_every_kind_of_stop_to_its_ranks_as_one_that_saves(alone: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        folder = alone / number.name
        stand_in(folder, ["wait 143"])
        running = node(folder, "c.yaml", RETRIES="9", PYTHONPATH=f"{folder}:{alone}")
        wait_for((folder / "waiting-0").exists, running)
        running.send_signal(number)
        assert running.wait(60) == 143
        assert (folder / "told-0").read_text() == "SIGTERM"


def test_node_refuses_before_it_starts(alone: Path) -> None:
    stand_in(alone, [])
    assert node(alone, "bad.yaml", PYTHONPATH=str(alone)).wait(60) == 2
    assert node(alone, "c.yaml", VENV=str(alone / "none")).wait(60) == 2
    assert "bin/python is not there; run bash launch/setup.sh, or set VENV" in (alone / "said").read_text()
    assert not (alone / "starts-0").exists()


def test_a_drained_pod_saves_and_stops_all_pods_so_that_the_operator_makes_them_again(
    shards: Path, tmp_path: Path
) -> None:
    """Two pods as the operator makes them of the manifest, on this machine: real launchers, real ranks."""
    made = job.planned(tiny_run(tmp_path, shards, 10**6), {}, nodes=2, ranks=1, run="run")
    config_map, manifest = yaml.safe_load_all(
        job.kubernetes(made, image="mbtrain:1", volume="mbtrain", cpus=1, memory="1Gi")
    )
    (tmp_path / "config.yaml").write_text(config_map["data"]["config.yaml"])
    pods = manifest["spec"]["pytorchReplicaSpecs"]
    run = tmp_path / "run"
    port = str(launch.free_port())

    def pod(role: str) -> subprocess.Popen[str]:
        container = pods[role]["template"]["spec"]["containers"][0]
        interpreter, script = container["command"]
        args = [arg.replace(job.IN_IMAGE, str(tmp_path / "config.yaml")) for arg in container["args"]]
        given = {variable["name"]: variable["value"] for variable in container["env"]}
        rank = {"Master": "0", "Worker": "1"}[role]
        ours = {"PET_NNODES": "2", "PET_NODE_RANK": rank, "RANK": rank, "WORLD_SIZE": "2"}
        place = {**ours, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        script = script.replace("/opt/mbtrain", str(ROOT))
        return start([interpreter, script, *args], tmp_path, **given, **place)

    running = [pod(role) for role in pods]
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(launch.losses(run)) > 3, running[0])
    running[1].terminate()
    assert [each.wait(120) for each in running] == [143, 143], (tmp_path / "said").read_text()
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name == f"step_{len(launch.losses(run)):010d}"


@pytest.mark.slow
def test_node_starts_again_after_a_rank_was_killed(shards: Path, tmp_path: Path) -> None:
    """By DeepSpeed's own launcher: it ends with another status for a killed rank than a shell does."""
    config = tiny_run(tmp_path, shards, 300)
    run = tmp_path / "run"
    options = ["--run=run", "--checkpoint.every_steps=5"]
    running = node(tmp_path, config, *options, RANKS="2", RETRIES="1")
    wait_for(lambda: (run / "checkpoints" / "step_0000000005").exists(), running)
    (launcher,) = psutil.Process(running.pid).children()
    launcher.children()[1].kill()
    assert running.wait(300) == 0, (tmp_path / "said").read_text()
    assert "exit status 75; starting again in 0 s (1 of 1)" in (tmp_path / "said").read_text()
    steps = [line["step"] for line in metrics.read(run / "metrics.jsonl") if "train/loss_nats" in line]
    assert steps[-1] == 300


# --- hosts of a hostfile

SSH = """#!/bin/sh
# Runs the line as a host's shell would, with none of this environment; notes it.
printf '%s\\n' "$*" >>"$NOTES"
while :; do
    case $1 in -l | -p | -o) shift 2 ;; -*) shift ;; *) break ;; esac
done
host=$1
shift
exec env -i HOME="$HOME" NOTES="$NOTES" PATH=/usr/bin:/bin HOST="$host" sh -c "$*"
"""
NASTY = [
    "--a.b=two words",
    "--a.b=$(touch hacked) `touch hacked` \\ \"x\" 'y'",
    "--a.b=$(touch${IFS}hacked);'\"\\x",
    "--a.b=%h%n%%",
    "--a.b=50%u *",
    "--a.b=",
    "--a.b=a\tb",
    "~",
    "--a.b=é{1,2}!#",
]


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Two `hosts` a stand-in for ssh away, in a folder where mbtrain is a stand-in."""
    if shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    make(tmp_path / "bin" / "ssh", SSH)
    (tmp_path / "hosts").write_text("host-a slots=1\nhost-b slots=1\n")
    return tmp_path


def multinode(folder: Path, *args: str, **extra: str) -> subprocess.Popen[str]:
    given = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "NOTES": str(folder / "notes"),
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": str(folder),
        "HOME": str(folder),
        **extra,
    }
    return start(["bash", str(ROOT / "launch" / "multinode.sh"), *args], folder, **given)


def test_multinode_brings_arguments_and_environment_to_all_hosts_and_no_secret(cluster: Path) -> None:
    stand_in(cluster, ["finish 0"])
    (cluster / ".deepspeed_env").write_text("# a comment\n\nFI_PROVIDER=efa\n")
    given = {
        "OMP_NUM_THREADS": "3",
        "NCCL_SOCKET_IFNAME": "eth1",
        "GLOO_SOCKET_IFNAME": "eth1",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "MLFLOW_TRACKING_PASSWORD": "hunter2",
        "MLFLOW_TRACKING_TOKEN": "hunter3",
        "MINE": "a b",
        "OTHER": "x",
        "TRAVEL": "MINE",
    }
    ended = multinode(cluster, "hosts", "c.yaml", *NASTY, **given)
    said = cluster / "said"
    assert ended.wait(120) == 0, said.read_text()
    assert not (cluster / "hacked").exists()
    for rank in (0, 1):
        (begun,) = starts(cluster, rank)
        assert begun["args"] == ["train", "--resume", "c.yaml", *NASTY]
        there = begun["environment"]
        assert there["HOST"] == ("host-a", "host-b")[rank]
        assert there["WORLD_SIZE"] == "2"
        for name in ("OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "MLFLOW_TRACKING_URI", "MINE"):
            assert there[name] == given[name]
        assert there["FI_PROVIDER"] == "efa"
        assert there["PATH"].startswith(f"{VENV}/bin:")
        assert str(cluster) in there["PYTHONPATH"].split(":")
        assert "OTHER" not in there
        assert not [name for name in there if name.endswith(("PASSWORD", "TOKEN"))]
    assert "hunter" not in (cluster / "notes").read_text() + said.read_text()
    assert "MLFLOW_TRACKING_PASSWORD stays here" in said.read_text()
    assert "ServerAliveInterval=5" in (cluster / "notes").read_text()


@pytest.mark.slow
def test_multinode_stops_all_hosts_by_a_file_that_it_takes_away_again(cluster: Path) -> None:
    stand_in(cluster, ["wait 143"])
    running = multinode(cluster, "hosts", "c.yaml")
    wait_for(lambda: all((cluster / f"waiting-{rank}").exists() for rank in (0, 1)), running)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143, (cluster / "said").read_text()
    # By the file alone. (Once a rank has ended, DeepSpeed's launcher on that host tells the others by signal.)
    assert [(cluster / f"told-{rank}").read_text() for rank in (0, 1)] == ["", ""]
    assert not (cluster / "run" / "stop").exists()


@pytest.mark.parametrize(
    ("args", "given", "words"),
    [
        (["hosts"], {}, "expected HOSTFILE CONFIG [options]"),
        (["hosts", "c.yaml"], {"VENV": "/nowhere"}, "is not there; run bash launch/setup.sh, or set VENV"),
        (["hosts", "c.yaml"], {"MLFLOW_TRACKING_URI": "http://me:hunter2@x"}, "MLFLOW_TRACKING_URI: has a password"),
        (["hosts", "c.yaml"], {"MLFLOW_RUN_NAME": "$(x)"}, "MLFLOW_RUN_NAME: has characters that the hosts' shells"),
        (["hosts", "c.yaml"], {"A": "`x`", "TRAVEL": "A"}, "A: cannot travel to the hosts"),
        (["hosts", "c.yaml"], {"A_KEY": "x", "TRAVEL": "A_KEY"}, "A_KEY: looks like a secret"),
    ],
)
def test_multinode_refuses_what_it_cannot_bring_to_the_hosts(
    args: list[str], given: dict[str, str], words: str, cluster: Path
) -> None:
    stand_in(cluster, [])
    assert multinode(cluster, *args, **given).wait(60) == 2
    said = (cluster / "said").read_text()
    assert words in said
    assert "hunter2" not in said
    assert not (cluster / "notes").exists(), "nothing was started"


def test_multinode_refuses_a_folder_that_a_hosts_shell_would_read_otherwise(cluster: Path) -> None:
    folder = cluster / "a;b"
    stand_in(folder, [])
    assert multinode(folder, "../hosts", "c.yaml").wait(60) == 2
    assert "deepspeed cannot take a folder of that name" in (folder / "said").read_text()


@pytest.mark.parametrize(("deed", "code"), [("75", 75), ("-9", 75), ("2", 2), ("0", 75)])
@pytest.mark.slow
def test_what_multinode_makes_of_exit_statuses(deed: str, code: int, cluster: Path) -> None:
    """0 without a run that says it has finished is no end: DeepSpeed returns it when pdsh is killed."""
    stand_in(cluster, [deed])
    assert multinode(cluster, "hosts", "c.yaml").wait(120) == code, (cluster / "said").read_text()
