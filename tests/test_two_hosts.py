"""Launches over a real hostfile, with pdsh and ssh, between two hosts made of namespaces; and what they survive.

pytest tests/test_two_hosts.py                      two hosts train what one host trains
pytest tests/test_two_hosts.py -m slow              a worker killed, a host dead, a link down; alone and supervised

Needs root and pdsh, see tests/two_hosts.py; skipped with the reason elsewhere.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import launch
from tests.tiny import tree
from tests.two_hosts import NetHost, two_hosts, why_not

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=str(reason))

# Long enough to be hit, saved often enough to be gone on with.
LONG = {"steps": 100_000, "zero_stage": 2, "lost_after_s": 10}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[NetHost, NetHost]]:
    (tmp_path / "hosts").mkdir()
    with two_hosts(tmp_path / "hosts") as both:
        (tmp_path / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in both))
        yield both


def begin(host: NetHost, argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as out:
        # Without signs of life from ssh, pdsh waits for ever for a host whose link is gone.
        keepalive = {"PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=3 -oServerAliveCountMax=3"}
        command = host.command([sys.executable, "-u", *argv], env=keepalive)
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def deepspeed(host: NetHost, folder: Path, *args: str) -> subprocess.Popen[bytes]:
    """`deepspeed --hostfile=... --module mbtrain train ARGS`, begun on a host; its output is folder/launch.txt."""
    runner = ["-m", "deepspeed.launcher.runner", f"--hostfile={folder / 'hostfile'}", "--launcher=pdsh", "--module"]
    return begin(host, [*runner, "mbtrain", "train", *args], folder / "launch.txt")


def supervise(host: NetHost, folder: Path, *args: str) -> subprocess.Popen[bytes]:
    """`mbtrain supervise --hostfile=... ARGS`, begun on a host; its output is folder/launch.txt."""
    return begin(
        host, ["-m", "mbtrain", "supervise", f"--hostfile={folder / 'hostfile'}", *args], folder / "launch.txt"
    )


def wait_for(happened: Callable[[], object], launched: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 180
    while not happened():
        said = f"{launched.poll()}\n{(folder / 'launch.txt').read_text()[-5000:]}"
        assert launched.poll() is None, f"ended with {said}"
        assert time.monotonic() < deadline, f"it did not happen: {said}"
        time.sleep(0.1)


def newest(run: Path) -> int:
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step_*/checkpoint.json")), default=0)


def left(*hosts: NetHost) -> list[str]:
    """Launchers and ranks that still run."""
    found = [p for host in hosts for p in (*host.ranks(), *host.processes(r"deepspeed\.launcher"))]
    return [" ".join(process.cmdline()) for process in found]


def test_two_hosts_train_what_one_host_trains(hosts: tuple[NetHost, NetHost], shards: Path, tmp_path: Path) -> None:
    path = launch.config_file(tmp_path, tree(data={"path": str(shards)}, train={"steps": 6, "zero_stage": 2}))
    launched = deepspeed(hosts[0], tmp_path, str(path), f"--run={tmp_path / 'two'}")
    for host in hosts:
        wait_for(host.ranks, launched, tmp_path)
    assert launched.wait(timeout=120) == 0, (tmp_path / "launch.txt").read_text()[-5000:]
    launch.mbtrain(["train", str(path), f"--run={tmp_path / 'one'}"], ranks=2)
    assert launch.losses(tmp_path / "two") == launch.losses(tmp_path / "one")
    assert len(launch.losses(tmp_path / "two")) == 6
    assert not left(*hosts)


def kill_rank(host: NetHost) -> None:
    (rank,) = host.ranks()
    rank.kill()


# What happens to host b, and how soon after it all others must be gone: lost_after_s, the verdict, and the launchers.
FAULTS: dict[str, tuple[Callable[[NetHost], object], float]] = {
    "rank killed": (kill_rank, 25),
    "host dead": (NetHost.die, 25),
    "link down": (lambda host: host.link("down"), 35),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_rank_ends_the_launch_on_both_hosts_with_its_name(
    hosts: tuple[NetHost, NetHost], shards: Path, tmp_path: Path, fault: str
) -> None:
    a, b = hosts
    path = launch.config_file(tmp_path, tree(data={"path": str(shards)}, train=LONG, checkpoint={"every_steps": 5}))
    launched = deepspeed(a, tmp_path, str(path), f"--run={tmp_path / 'run'}")
    wait_for(lambda: newest(tmp_path / "run") >= 10, launched, tmp_path)
    (rank_0,) = a.ranks()
    strike, within_s = FAULTS[fault]
    strike(b)
    began = time.monotonic()
    rank_0.wait(timeout=within_s)
    rank_0_after_s = time.monotonic() - began
    code = launched.wait(timeout=within_s)
    took_s = time.monotonic() - began
    said = (tmp_path / "launch.txt").read_text()
    sys.stderr.write(
        f"{fault}: rank 0 ended after {rank_0_after_s:.1f} s, the launcher with {code} after {took_s:.1f} s\n"
    )
    assert code != 0
    assert re.search(r"rank 1 on host-b \(pid \d+\)", said), said[-5000:]
    # Behind the cut link, nobody waits for the other side.
    while left(*hosts) and time.monotonic() < began + within_s:
        time.sleep(0.1)
    assert not left(*hosts)


@pytest.mark.slow
def test_supervised_a_dead_host_costs_its_ranks_but_not_the_run(
    hosts: tuple[NetHost, NetHost], shards: Path, tmp_path: Path
) -> None:
    """Same loss as undisturbed, within the noise of another order of summation on one rank than on two."""
    a, b = hosts
    train = {"steps": 300, "zero_stage": 2, "lost_after_s": 10}
    path = launch.config_file(tmp_path, tree(data={"path": str(shards)}, train=train, checkpoint={"every_steps": 10}))
    supervised = supervise(a, tmp_path, str(path), f"--run={tmp_path / 'run'}")
    wait_for(lambda: newest(tmp_path / "run") >= 20, supervised, tmp_path)
    b.die()
    assert supervised.wait(timeout=180) == 0, (tmp_path / "launch.txt").read_text()[-5000:]
    said = (tmp_path / "launch.txt").read_text()
    assert "start: 2 ranks on host-a (1), host-b (1)" in said
    assert "start: 1 ranks on host-a (1); without host-b" in said
    launch.mbtrain(["train", str(path), f"--run={tmp_path / 'undisturbed'}"], ranks=2)
    disturbed, undisturbed = (launch.losses(tmp_path / name) for name in ("run", "undisturbed"))
    assert len(disturbed) == 300
    assert disturbed == pytest.approx(undisturbed, rel=1e-3)
    assert not left(a)


@pytest.mark.slow
def test_supervised_a_host_is_left_out_while_its_link_is_down_and_used_again(
    hosts: tuple[NetHost, NetHost], shards: Path, tmp_path: Path
) -> None:
    """And SIGTERM to the supervisor lets the ranks of both hosts save and end."""
    a, b = hosts
    path = launch.config_file(tmp_path, tree(data={"path": str(shards)}, train=LONG, checkpoint={"every_steps": 10}))
    run = tmp_path / "run"
    supervised = supervise(a, tmp_path, str(path), f"--run={run}")

    def goes_on() -> None:
        at = newest(run)
        wait_for(lambda: newest(run) > at, supervised, tmp_path)

    def started() -> list[str]:
        return re.findall(r"supervise: start: (.*)", (tmp_path / "launch.txt").read_text())

    wait_for(lambda: newest(run) > 0, supervised, tmp_path)
    b.link("down")
    wait_for(lambda: len(started()) == 2, supervised, tmp_path)
    goes_on()
    assert not b.ranks(), "what was cut off has ended by itself"
    b.link("up")
    kill_rank(a)
    wait_for(lambda: len(started()) == 3, supervised, tmp_path)
    goes_on()
    assert len(b.ranks()) == 1
    (supervisor,) = a.processes("-m mbtrain supervise")
    supervisor.terminate()
    assert supervised.wait(timeout=60) == 143
    both, alone = "2 ranks on host-a (1), host-b (1)", "1 ranks on host-a (1); without host-b"
    assert started() == [both, alone, both]
    steps = len(launch.losses(run))
    assert newest(run) == steps, "saved where it was stopped"
    assert not left(*hosts)


@pytest.mark.slow
def test_supervised_a_stopped_rank_on_another_host_is_ended_and_the_run_goes_on(
    hosts: tuple[NetHost, NetHost], shards: Path, tmp_path: Path
) -> None:
    """DeepSpeed's launcher alone waits for ever for a process that is stopped."""
    a, b = hosts
    train = {**LONG, "steps": 200}
    path = launch.config_file(tmp_path, tree(data={"path": str(shards)}, train=train, checkpoint={"every_steps": 10}))
    supervised = supervise(a, tmp_path, str(path), f"--run={tmp_path / 'run'}")
    wait_for(lambda: newest(tmp_path / "run") >= 10, supervised, tmp_path)
    (rank,) = b.ranks()
    rank.suspend()
    assert supervised.wait(timeout=240) == 0, (tmp_path / "launch.txt").read_text()[-5000:]
    launch.mbtrain(["train", str(path), f"--run={tmp_path / 'undisturbed'}"], ranks=2)
    assert launch.losses(tmp_path / "run") == launch.losses(tmp_path / "undisturbed")
    assert not left(*hosts)
