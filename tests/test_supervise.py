"""The supervisor: what it starts again and what not, what it ends first, and that a disturbed run is the undisturbed.

pytest tests/test_supervise.py
pytest tests/test_supervise.py -m slow              a stop that is asked for; torchrun's own elastic agent

Most of these replace DeepSpeed's launcher by a line of shell. Hosts: tests/test_two_hosts.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbtrain import config, supervise
from mbtrain.errors import CheckpointError, ConfigError
from mbtrain.hosts import Host
from mbtrain.supervise import Task
from tests import launch, tiny

FINISH = """echo '{"status": "FINISHED"}' > "$1/status.json";"""


def save(step: int) -> str:
    folder = f'"$1/checkpoints/step_{step:010d}"'
    return f"mkdir -p {folder}; touch {folder}/checkpoint.json;"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Supervise launches that are lines of shell ($1 is the run); all of them must have been started at the end."""

    def run(
        *lines: str, restarts: int = 3, hostfile: str | None = None, started: list[list[Host]] | None = None
    ) -> int:
        left = list(lines)

        def command(task: Task, hosts: Sequence[Host], folder: Path) -> list[str]:
            if started is not None:
                started.append(list(hosts))
            return ["sh", "-c", left.pop(0), "sh", str(task.run), " -m mbtrain train "]

        monkeypatch.setattr(supervise, "launcher_command", command)
        task = Task("config.yaml", (), tiny.make(), tmp_path / "run", hostfile, 2, restarts)
        code = supervise.supervise(task, pause_s=0)
        assert not left, "not started"
        return code

    return run


@pytest.mark.parametrize(
    ("code", "status", "wanted"),
    [
        (0, "FINISHED", supervise.FINISHED),
        (255, "FINISHED", supervise.FINISHED),
        (0, None, supervise.CRASHED),
        (0, "FAILED", supervise.CRASHED),
        (143, "KILLED", supervise.STOPPED),
        (143, None, supervise.STOPPED),
        (0, "KILLED", supervise.STOPPED),
        (2, "FAILED", supervise.MISTAKE),
        (2, None, supervise.MISTAKE),
        (75, "FAILED", supervise.CRASHED),
        (247, None, supervise.CRASHED),
        (1, None, supervise.CRASHED),
    ],
)
def test_what_came_of_a_launch(code: int, status: str | None, wanted: str) -> None:
    assert supervise.verdict(code, status) == wanted


def test_a_crash_is_started_again_and_progress_renews_the_restarts(kept: Callable[..., int], tmp_path: Path) -> None:
    lines = ["exit 75", f"{save(5)} exit 247", "kill -9 $$", f"{save(10)} exit 1", "exit 0", FINISH]
    assert kept(*lines, restarts=2) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert len(re.findall("supervise: start: 2 ranks on localhost", log)) == len(lines)
    assert "ended with 247; restart from step 5, 1 of at most 2 without progress" in log
    assert "ended with 137; restart from step 5, 2 of at most 2 without progress" in log


def test_without_progress_it_stops(kept: Callable[..., int], tmp_path: Path) -> None:
    failed = """echo '{"status": "FAILED", "message": "rank 1 on b is gone"}' > "$1/status.json"; exit 75"""
    assert kept(f"{save(5)} exit 75", "exit 75", "exit 75", failed, restarts=3) == 1
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "ended with 75 (rank 1 on b is gone); no progress in 3 restarts: stop" in log


@pytest.mark.parametrize(("line", "code"), [("exit 2", 2), ("exit 143", 143), (FINISH, 0), (f"{FINISH} exit 1", 0)])
def test_what_ended_for_good_is_not_started_again(kept: Callable[..., int], line: str, code: int) -> None:
    assert kept(line) == code


def test_the_status_of_an_earlier_start_is_not_believed(kept: Callable[..., int]) -> None:
    assert kept(FINISH) == 0
    assert kept("exit 75", "exit 75", restarts=1) == 1


def test_what_is_left_of_a_launch_is_ended_first_and_nothing_else(kept: Callable[..., int], tmp_path: Path) -> None:
    """The process that is left has its own session and another parent, as ranks of a killed launcher have."""
    other = subprocess.Popen(["sleep", "1000"], env={**os.environ, supervise.MARK: "0123456789abcdef"})
    try:
        leave = 'setsid sleep 1000 & echo $! > "$1/left"; exit 75'
        # (Its entry may stay, where nobody waits for orphans; its command line does not.)
        check = f'grep -q sleep "/proc/$(cat "$1/left")/cmdline" && exit 2; {FINISH}'
        assert kept(leave, check) == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_supervisor_ends_what_a_killed_one_left(kept: Callable[..., int], tmp_path: Path) -> None:
    name, _, value = supervise.mark_of(tmp_path / "run").partition("=")
    left = subprocess.Popen(["sleep", "1000"], env={**os.environ, name: value})
    assert kept(FINISH) == 0
    assert left.wait(timeout=5) == -signal.SIGKILL


def test_a_launcher_that_does_not_end_after_the_run_is_ended(
    kept: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSpeed's does not while a rank on another host is stopped."""
    monkeypatch.setattr(supervise, "ENDING_TIMEOUT_S", 0.3)
    hang = """echo '{"status": "FAILED"}' > "$1/status.json"; sleep 1000"""
    assert kept(hang, f"{FINISH} sleep 1000") == 0


def signals(*after_s: float) -> None:
    for seconds in after_s:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()


def test_a_stop_is_passed_on_and_the_ranks_may_save(kept: Callable[..., int], tmp_path: Path) -> None:
    signals(0.5)
    assert kept('trap "sleep 0.5; touch $1/saved; exit 143" TERM; while :; do sleep 0.1; done') == 143
    assert (tmp_path / "run" / "saved").exists()


def test_a_second_signal_ends_ranks_that_do_not_stop(kept: Callable[..., int]) -> None:
    signals(0.5, 1.0)
    began = time.monotonic()
    assert kept("trap '' TERM; while :; do sleep 0.1; done") == 143
    assert time.monotonic() - began < 10


def test_a_stop_between_two_launches(kept: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LONGEST_PAUSE_S", 1000)
    signals(1.0)
    task_pause = supervise._sleep_until
    monkeypatch.setattr(supervise, "_sleep_until", lambda at_s, asked: task_pause(at_s + 1000, asked))
    assert kept("exit 75") == 143


def test_one_supervisor_a_run(kept: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with supervise._only_supervisor(tmp_path / "run"), pytest.raises(CheckpointError, match="another supervisor"):
        kept()


def test_hosts_that_do_not_answer_are_left_out_until_they_do(
    kept: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks on a host that went away are given lost_after_s to end by themselves before the others start again."""
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\nc slots=2\n")
    (tmp_path / "run").mkdir()

    def ssh(host: str, argv: Sequence[str]) -> list[str]:
        return ["false"] if (tmp_path / f"{host}.gone").exists() else list(argv)

    waits: list[float] = []
    monkeypatch.setattr(supervise, "ssh_command", ssh)
    monkeypatch.setattr(supervise, "_sleep_until", lambda at_s, asked: waits.append(at_s - time.monotonic()))
    started: list[list[Host]] = []
    lines = ['touch "$1/../b.gone"; exit 255', 'rm "$1/../b.gone"; exit 75', f'touch "$1/../c.gone"; {FINISH}']
    assert kept(*lines, hostfile=str(tmp_path / "hostfile"), started=started) == 0
    assert started == [[Host("a", 1), Host("b", 1)], [Host("a", 1), Host("c", 1)], [Host("a", 1), Host("b", 1)]]
    lost_after_s = tiny.make().train.lost_after_s
    assert [round(wait) for wait in waits if wait > 1] == [lost_after_s]
    assert "2 ranks on a (1), c (1); without b" in (tmp_path / "run" / "log.txt").read_text()


def test_no_host_answers_is_a_crash_like_others(
    kept: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostfile").write_text("a slots=1\n")
    monkeypatch.setattr(supervise, "ssh_command", lambda host, argv: ["false"])
    assert kept(hostfile=str(tmp_path / "hostfile"), restarts=2) == 1
    assert "none of a answers over ssh" in (tmp_path / "run" / "log.txt").read_text()


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 64),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_ranks_are_the_most_that_cut_the_global_batch(slots: list[int], batch: int, most: int | None) -> None:
    settings = tiny.make(train={"global_batch_size": batch})
    hosts = [Host(f"host{i}", n) for i, n in enumerate(slots)]
    placed = supervise.placed(settings, hosts, most)
    ranks = sum(host.slots for host in placed)
    fitting = [n for n in range(1, min(sum(slots), most or sum(slots)) + 1) if batch % n == 0]
    assert ranks == max(fitting)
    by_name = {host.name: host.slots for host in hosts}
    assert [host.name for host in placed] == [host.name for host in hosts][: len(placed)]
    assert all(0 < host.slots <= by_name[host.name] for host in placed)


def test_ranks_that_share_rows_need_enough_hosts() -> None:
    settings = tiny.make(train={"sequence_parallel": 2})
    assert supervise.placed(settings, [Host("a", 3)]) == [Host("a", 2)]
    with pytest.raises(ConfigError, match=r"train\.sequence_parallel"):
        supervise.placed(settings, [Host("a", 1)])


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_arguments_pass_deepspeed_pdsh_and_a_shell(argument: str) -> None:
    """DeepSpeed quotes what holds a space, pdsh puts host and number in for %h, %n (and % for %%)."""
    sent = supervise._through_shells(argument)
    sent = '"{}"'.format(sent.replace('"', '\\"')) if " " in sent else sent
    sent = re.sub("%(.)", lambda found: {"%": "%"}.get(found[1], "WRONG"), sent)
    done = subprocess.run(["/bin/sh", "-c", f"printf %s {sent}"], capture_output=True, check=True)
    assert done.stdout.decode() == argument


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working directory."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_environment_that_travels(home: Path) -> None:
    (home / ".deepspeed_env").write_text("A=1\nGLOO_SOCKET_IFNAME=eth1\n\n# a remark=no\n")
    Path(".deepspeed_env").write_text("A=2=3\n")
    here = {"GLOO_SOCKET_IFNAME": "eth0", supervise.MARK: "x", "PATH": "/a:/b$(c):/d", "OTHER_TOKEN": "here alone"}
    here |= {"MLFLOW_TRACKING_PASSWORD": "secret", "MLFLOW_TRACKING_URI": "http://host:5000"}
    kept, lines = supervise.for_other_hosts(here)
    path = f"PATH={Path(sys.executable).parent}:/a:/d"
    assert sorted(lines.splitlines()) == ["A=2=3", "GLOO_SOCKET_IFNAME=eth0", f"{supervise.MARK}=x", path]
    assert kept == {key: value for key, value in here.items() if key != "MLFLOW_TRACKING_PASSWORD"}


@pytest.mark.parametrize(
    ("here", "line", "said"),
    [
        ({}, "AWS_SECRET_KEY=a", "AWS_SECRET_KEY: holds a secret"),
        ({"MLFLOW_TRACKING_URI": "http://me:secret@host"}, "", "MLFLOW_TRACKING_URI: holds a secret"),
        ({"GLOO_SOCKET_IFNAME": "$(reboot)"}, "", "GLOO_SOCKET_IFNAME: has characters"),
        ({"PYTHONPATH": "a;reboot"}, "", "PYTHONPATH: has characters"),
        ({}, "a;reboot;=1", "a;reboot;: has characters"),
    ],
)
def test_no_secret_and_no_command_travels(home: Path, here: dict[str, str], line: str, said: str) -> None:
    (home / ".deepspeed_env").write_text(line)
    with pytest.raises(ConfigError) as error:
        supervise.for_other_hosts(here)
    assert said in str(error.value)
    assert "secret@" not in str(error.value)


def test_a_mistake_is_said_before_anything_starts(tmp_path: Path) -> None:
    path = launch.config_file(tmp_path, tiny.tree())
    for args, said in (
        (["--train.stepss=1"], "train.stepss: unknown key"),
        ([f"--hostfile={tmp_path / 'none'}"], "cannot be read (No such file"),
        (["--ranks=0"], "--ranks: expected a whole number of at least 1"),
        (["--restart=2"], "did you mean restarts"),
    ):
        ended = launch.mbtrain(["supervise", str(path), f"--run={tmp_path / 'run'}", *args], expect=2)
        assert said in ended.stderr
        assert "Traceback" not in ended.stderr


def test_the_wrapper_finds_the_interpreter() -> None:
    command = ["bash", str(launch.ROOT / "launch" / "supervise"), "--help"]
    done = subprocess.run(command, env=launch.environment(VENV=sys.prefix), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mbtrain supervise CONFIG")


def ranks_of(supervisor: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a supervisor, by rank."""
    found = {}
    for process in psutil.Process(supervisor.pid).children(recursive=True):
        try:
            if "-m mbtrain train" in " ".join(process.cmdline()):
                found[int(process.environ()["RANK"])] = process
        except (psutil.Error, KeyError):
            continue
    return [found[rank] for rank in sorted(found)]


def newest(run: Path) -> int:
    return supervise.newest_step(run)


def settings_of(folder: Path, shards: Path, steps: int) -> Path:
    train = {"steps": steps, "zero_stage": 2, "lost_after_s": 10}
    tree = tiny.tree(data={"path": str(shards)}, train=train, checkpoint={"every_steps": 5, "every_minutes": None})
    return launch.config_file(folder, tree)


def same_as_undisturbed(path: Path, run: Path, folder: Path) -> bool:
    """Whether weights, moments and losses are those of a run in one piece, bit for bit."""
    undisturbed = folder / "undisturbed"
    launch.mbtrain(["train", str(path), f"--run={undisturbed}"], ranks=2)
    last = f"checkpoints/step_{config.load(path).train.steps:010d}"
    names = sorted(p.name for p in (undisturbed / last).glob("*.safetensors"))
    assert names
    same = all((run / last / name).read_bytes() == (undisturbed / last / name).read_bytes() for name in names)
    return same and launch.losses(run) == launch.losses(undisturbed)


def test_a_killed_rank_costs_the_steps_since_the_checkpoint_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    path, run = settings_of(tmp_path, shards, steps=60), tmp_path / "run"
    (supervisor,) = processes = launch.begin(["supervise", str(path), f"--run={run}", "--ranks=2", "--json"])
    launch.wait_for(lambda: newest(run) >= 5, processes)
    ranks_of(supervisor)[1].kill()
    ended = launch.end(processes)
    assert ended.codes == [0], ended.stderr
    assert len(re.findall(r"supervise: start: 2 ranks on localhost \(2\)", ended.stderr)) == 2
    assert launch.last_json(ended.stdout) == {"run": str(run), "step": 60, "exit_status": 0}
    assert same_as_undisturbed(path, run, tmp_path)


@pytest.mark.slow
def test_a_stop_saves_and_the_same_command_goes_on(shards: Path, tmp_path: Path) -> None:
    path, run = settings_of(tmp_path, shards, steps=200), tmp_path / "run"
    command = ["supervise", str(path), f"--run={run}", "--ranks=2"]
    (supervisor,) = processes = launch.begin(command)
    launch.wait_for(lambda: newest(run) >= 5, processes)
    left = ranks_of(supervisor)
    supervisor.send_signal(signal.SIGTERM)
    ended = launch.end(processes)
    assert ended.codes == [143], ended.stderr
    assert newest(run) == len(launch.losses(run)), "saved where it was stopped"
    assert not any(rank.is_running() for rank in left)
    launch.mbtrain(command)
    assert same_as_undisturbed(path, run, tmp_path)


@pytest.mark.slow
def test_torchrun_restarts_by_itself_too(shards: Path, tmp_path: Path) -> None:
    """Its elastic agent ends the other ranks and starts all anew, as often as --max-restarts says, progress or not.

    It hands the new ranks the store of the old ones, whose addresses are still in there (torch 2.13).
    """
    path, run = settings_of(tmp_path, shards, steps=60), tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    train = ["-m", "mbtrain", "--", "train", str(path), f"--run={run}", "--resume"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agent: subprocess.Popen[str] = subprocess.Popen([*torchrun, *train], env=launch.environment(), **pipes)  # type: ignore[call-overload]
    launch.wait_for(lambda: newest(run) >= 5, [agent])
    ranks = [p for p in psutil.Process(agent.pid).children() if "train" in p.cmdline()]
    max(ranks, key=lambda process: int(process.environ()["RANK"])).kill()
    ended = launch.end([agent])
    assert ended.codes == [0], ended.stderr
    assert "going on from" in ended.stderr
    assert same_as_undisturbed(path, run, tmp_path)
