"""The whole of `mbtrain doctor`: on this machine, and on hosts of a hostfile with a program in ssh's place.

pytest tests/doctor/test_doctor.py
"""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mbtrain.doctor import examine, launch, memory, table
from mbtrain.doctor.checks import Check
from mbtrain.doctor.step_request import decoded, encoded
from mbtrain.hosts import Host
from tests import handmade, tiny, two_hosts
from tests import launch as launches

# Runs here what is meant for another host; as ssh does, with the options of ours and of pdsh's. `gone` is not there.
SSH = """#!/bin/sh
while :; do
    case $1 in
    --) shift; break ;;
    -o | -l | -p) shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
host=$1
shift
echo "$host" >>"$SSH_LOG"
if [ "$host" = gone ]; then
    echo "ssh: connect to host gone port 22: No route to host" >&2
    exit 255
fi
exec /bin/sh -c "$*"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rng = random.Random(0)
    made = [handmade.Made(rng.randbytes(300)) for _ in range(9)]
    data = handmade.dataset(tmp_path / "data", "text", {"train": [made[:6]], "val": [made[6:]]})
    train = {"zero_stage": 2, "precision": "bf16"}
    return launches.config_file(tmp_path, tiny.tree(data={"path": str(data)}, train=train))


@pytest.fixture
def ssh(tmp_path: Path) -> dict[str, str]:
    """The environment in which ssh is a program that runs everything here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "SSH_LOG": str(tmp_path / "ssh.log")}


def doctor(cwd: Path, *args: str, **environment: str) -> tuple[int, str, dict[str, Any]]:
    port = [] if any("--master-port" in arg for arg in args) else [f"--master-port={launches.free_port()}"]
    command = [sys.executable, "-m", "mbtrain", "doctor", *args, "--json", *port]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=launches.environment(COLUMNS="80", **environment),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.stdout, done.stderr
    shown, _, last = done.stdout.strip().rpartition("\n")
    return done.returncode, shown, launches.last_json(last)


def statuses(figures: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in figures["checks"]}


def test_this_machine_is_ready(tmp_path: Path, config: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, shown, figures = doctor(tmp_path, str(config))
    assert code == 0, shown
    assert figures["ready"]
    found = statuses(figures)
    assert not {"problem", "skipped"} & set(found.values())
    wanted = {
        "python",
        "torch",
        "mbtrain",
        "port",
        "config",
        "run directory",
        "disk",
        "data",
        "memory",
        "all-reduce",
        "step",
    }
    assert wanted <= set(found)
    ranks = figures["ranks"]
    assert [rank["rank"] for rank in ranks] == list(range(len(ranks)))
    for rank in ranks:
        assert rank["whole_s"] >= max(rank["forward_s"], rank["backward_s"], rank["update_s"]) > 0
        assert 4 < rank["loss"] < 8
        assert 0 < rank["peak_bytes"] <= 1.01 * rank["resident_bytes"] + 1e8
    assert figures["sums"]["latency_s"] > 0
    assert set(figures["memory"]) == {"0", "1", "2", "3"}
    assert shown.splitlines()[-1] == figures["verdict"]
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_a_cut_shard_and_a_taken_port_make_it_not_ready(tmp_path: Path, config: Path) -> None:
    shard = tmp_path / "data" / "val" / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        code, shown, figures = doctor(tmp_path, str(config), f"--master-port={port}")
    assert code == 2
    found = statuses(figures)
    assert (found["data"], found["port"], found["ranks"]) == ("problem", "problem", "skipped")
    text = " ".join(shown.split())
    assert "val-000000.tar: cut off" in text
    assert "-> copy it again from where it is whole" in text
    assert f"port {port}: Address already in use" in text
    assert "not started: first mend port" in text
    assert figures["verdict"] == shown.splitlines()[-1] == "not ready: 2 problems"


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not there, by which deepspeed starts ranks on hosts")
def test_hosts_over_ssh(tmp_path: Path, config: Path, ssh: dict[str, str]) -> None:
    """Two names of this machine: a rank of each is started by deepspeed, over pdsh and the program in ssh's place."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    code, shown, figures = doctor(tmp_path, str(config), f"--hostfile={hostfile}", **ssh)
    assert code == 0, shown
    found = statuses(figures)
    assert found["hosts differ"] == "warning"
    assert all(found[name] == "ok" for name in ("ssh", "clocks", "network", "run directory", "data", "step")), shown
    assert figures["hosts"] == {"localhost": 1, "127.0.0.1": 1}
    assert [rank["rank"] for rank in figures["ranks"]] == [0, 1]
    asked = Path(ssh["SSH_LOG"]).read_text().split()
    assert {"localhost", "127.0.0.1"} <= set(asked)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".mbtrain")]


@pytest.mark.slow
@pytest.mark.skipif(bool(two_hosts.why_not()), reason=str(two_hosts.why_not()))
def test_two_hosts_with_sshd_and_a_network_between_them(tmp_path: Path, config: Path) -> None:
    (tmp_path / "hosts").mkdir()
    with two_hosts.two_hosts(tmp_path / "hosts") as both:
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{host.name} slots=1\n" for host in both))
        command = [sys.executable, "-m", "mbtrain", "doctor", str(config), f"--hostfile={hostfile}", "--json"]
        command += [f"--run={tmp_path / 'run'}", f"--master-port={launches.free_port()}"]
        done = subprocess.run(both[0].command(command), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = launches.last_json(done.stdout)
    assert {name for name, status in statuses(figures).items() if status not in ("ok", "warning")} == set()
    assert "hosts differ" not in statuses(figures)
    assert statuses(figures)["network"] == "ok"
    assert [rank["host"] for rank in figures["ranks"]] == [host.name for host in both]


def test_a_host_that_is_gone_is_named_and_no_rank_is_started(tmp_path: Path, config: Path, ssh: dict[str, str]) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=1\ngone slots=1\n")
    code, shown, figures = doctor(tmp_path, str(config), f"--hostfile={hostfile}", **ssh)
    assert code == 2
    said = next(check for check in figures["checks"] if check["name"] == "ssh")
    assert said["status"] == "problem"
    assert "gone: ssh: connect to host gone port 22: No route to host" in said["found"]
    assert "BatchMode" in said["remedy"]
    assert statuses(figures)["ranks"] == "skipped"
    assert figures["ranks"] == []
    assert "first mend ssh" in " ".join(shown.split())


def test_a_host_with_a_folder_of_its_own_in_place_of_the_shared_one(tmp_path: Path, ssh: dict[str, str]) -> None:
    """The second host has another folder at the same path: a mount of its own, as it would be on another machine."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounts of its own are not allowed here")
    (tmp_path / "runs").mkdir()
    program = Path(ssh["PATH"].split(":")[0]) / "ssh"
    own = f'[ "$host" = localhost ] || exec unshare --mount /bin/sh -c "mount -t tmpfs none {tmp_path}/runs && $*"\n'
    program.write_text(SSH.replace("exec /bin/sh", own + "exec /bin/sh"))
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    with socket.create_server(("", 0)) as taken:  # so that nothing more is tried: that port is not free
        port = taken.getsockname()[1]
        code, _, figures = doctor(tmp_path, f"--hostfile={hostfile}", "--run=runs/x", f"--master-port={port}", **ssh)
    assert code == 2
    said = next(check for check in figures["checks"] if check["name"] == "run directory")
    assert said["status"] == "problem"
    assert said["found"] == f"localhost does not see what 127.0.0.1 writes in {tmp_path}/runs"
    assert "a file system that all hosts share" in said["remedy"]


def test_the_request_passes_through_any_command_line() -> None:
    request = {"config": "a 'b' \"c\" $d %e\n.yaml", "overrides": {"name": "é"}, "limit_s": 1.5}
    word = encoded(request)
    assert set(word) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
    assert not word.startswith("-")
    assert decoded(word) == request


def test_what_travels_to_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No secret, and nothing that their shells would act on."""
    file = tmp_path / "env"
    file.write_text("# a comment\nNCCL_DEBUG=INFO\nMY_TOKEN=hidden\nBAD=$(reboot)\nQUIET=a%sb\n")
    monkeypatch.setenv("DS_ENV_FILE", str(file))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("NCCL_NOTE", "`reboot`")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert launch.travelling() == {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0"}


def test_ranks_that_fail_say_why_and_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launch, "_AFTER_A_FAILURE_S", 1.0)
    request = {"config": str(tmp_path / "gone.yaml"), "overrides": {}, "limit_s": 60}
    found = launch.run(request, 2, hostfile=None, master="", port=launches.free_port())
    assert "ended with exit status 2" in found["said"]
    assert "gone.yaml: cannot read the config" in found["said"]


REPORT = examine.Report(
    checks=[
        Check("ssh", "ok", "node-a, node-b and 6 more answered"),
        Check("run directory", "problem", "node-b does not see what node-a writes in /home/me/runs", "put it " * 20),
        Check("MLflow", "warning", "http://tracking:5000 from node-a: no answer in 5 s", "start it"),
        Check("ranks", "skipped", "not started: first mend " + "x" * 200),
    ],
    hosts=[Host("node-a", 8)],
    answers={},
    predicted={stage: memory.Need(1e9, 2e9, 3e9, 4e9, 5e9) for stage in range(4)},
    stage=1,
    step={"ranks": [{"peak_bytes": 1.2e10, "resident_bytes": 2e10, "device": "cpu"}]},
)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_keeps_to_the_width_and_is_plain(width: int) -> None:
    lines = list(table.lines(REPORT, width=width, color=False))
    assert max(map(len, lines)) <= width
    assert lines[-1] == "not ready: 1 problem"
    assert all(line.isascii() and line.isprintable() for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "problem run directory node-b does not see" in text
    assert "-> put it put it" in text
    assert "ZeRO-1, as configured 1.00 2.00 3.00 4.00 5.00 11.00" in text
    assert "measured, libraries of some 130 MB included 12.00" in text


def test_color_is_for_terminals() -> None:
    assert any("\x1b[31mproblem\x1b[0m" in line for line in table.lines(REPORT, width=80, color=True))
    assert not any("\x1b" in line for line in table.lines(REPORT, width=80))
