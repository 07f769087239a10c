"""Two hosts on one machine: namespaces with a cable between them and an sshd each, for launches over a real hostfile.

    with two_hosts(folder) as (a, b):
        a.run(["ssh", b.name, "hostname"])

A host has its own network, processes, host name, /dev/shm and /run; files are those of this machine, at the same paths,
as if shared. The cable is made between the two namespaces, so nothing that is sent leaves them, and nothing outside is
changed: keys and passwd are files in `folder`, bound over the system's in the hosts' own mount namespaces. A host ends
with its first process, and both end with the test's process, however that ends.

It needs Linux, root, and: apt-get install iproute2 util-linux openssh-client openssh-server pdsh
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.launch import ROOT

# Of TEST-NET-2, which no network uses.
ADDRESSES = {"host-a": "198.51.100.1", "host-b": "198.51.100.2"}
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount", "sshd", "ssh", "ssh-keygen", "pdsh")
NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")
LINK = "eth0"
PATH = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"])

SSHD = """
ListenAddress {address}
HostKey {folder}/{name}.key
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 64
PrintMotd no
"""

# The line on stdin comes when the cable is there.
FIRST_PROCESS = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
for file in passwd shadow hosts nsswitch.conf; do mount --bind "$1/etc/$file" "/etc/$file"; done
hostname "$2"
read -r ready
exec "$3" -D -e -f "$1/$2.sshd"
"""


@dataclass(frozen=True)
class NetHost:
    """A host: the process that holds its namespaces, and the id of its first process as seen from outside."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    first: int

    def command(self, argv: Sequence[str], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> list[str]:
        """The command that runs argv on this host, in a fresh environment."""
        environment = {"HOME": f"{self.folder}/home", "PATH": PATH, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        values = [f"{key}={value}" for key, value in {**environment, **(env or {})}.items()]
        inside = ["nsenter", f"--target={self.first}", *NAMESPACES, f"--wd={cwd}"]
        return [*inside, "env", "-i", *values, *argv]

    def run(self, argv: Sequence[str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run argv on this host to its end."""
        return subprocess.run(self.command(argv), capture_output=True, text=True, timeout=timeout_s, check=False)

    def processes(self, pattern: str) -> list[psutil.Process]:
        """The processes of this host in whose command line a regular expression is found."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = os.stat(f"/proc/{process.pid}/ns/pid").st_ino == os.stat(f"/proc/{self.first}/ns/pid").st_ino
                if mine and re.search(pattern, " ".join(process.cmdline())):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """The training processes here, launchers left out."""
        return self.processes(r"-m mbtrain (--local_rank=\d+ )?train")

    def link(self, state: str) -> None:
        """Take this host's end of the cable up or down."""
        subprocess.run(_in_network(self, "link", "set", LINK, state), check=True)

    def die(self) -> None:
        """End the host at once, with all that runs on it."""
        psutil.Process(self.first).kill()


def why_not() -> str | None:
    """Why two hosts cannot be made here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2 util-linux openssh-client openssh-server pdsh)"
    cable = f"ip link add {LINK} type veth peer name peer && mount -t tmpfs tmpfs /run"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "sh", "-c", cable], capture_output=True, check=False)
    return f"no namespaces here: {tried.stderr.decode().strip()}" if tried.returncode else None


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[NetHost, NetHost]]:
    """Boot both hosts, and end them with all that runs there. `folder` takes keys, logs and their home."""
    _write_files(folder)
    with ExitStack() as held:
        a, b = (_boot(name, folder, held) for name in ADDRESSES)
        ends = ["link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", str(b.process.pid)]
        subprocess.run(_in_network(a, *ends), check=True)
        for host in (a, b):
            subprocess.run(_in_network(host, "addr", "add", f"{ADDRESSES[host.name]}/24", "dev", LINK), check=True)
            for link in ("lo", LINK):
                subprocess.run(_in_network(host, "link", "set", link, "up"), check=True)
            assert host.process.stdin is not None
            host.process.stdin.write(b"\n")
            host.process.stdin.flush()
        for host in (a, b):
            for name in ADDRESSES:
                _wait(lambda host=host, name=name: host.run(["ssh", "-oBatchMode=yes", name, "true"]).returncode == 0)  # type: ignore[misc]
        yield a, b


def _write_files(folder: Path) -> None:
    """What the hosts see in /etc, and root's home there, with keys that fit both."""
    home, etc = folder / "home", folder / "etc"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    etc.mkdir()
    (home / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")  # what ranks get besides; two threads sum otherwise
    users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
    users = [[*user[:5], str(home), *user[6:]] if user[0] == "root" else user for user in users]
    (etc / "passwd").write_text("".join(":".join(user) + "\n" for user in users))
    (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")  # no password, yet not locked, as `!` would be
    (etc / "hosts").write_text(
        "".join(f"{at} {name}\n" for name, at in {"localhost": "127.0.0.1", **ADDRESSES}.items())
    )
    (etc / "nsswitch.conf").write_text("passwd: files\nshadow: files\ngroup: files\nhosts: files\n")
    keys = {"user": home / ".ssh" / "id_ed25519", **{name: folder / f"{name}.key" for name in ADDRESSES}}
    for path in keys.values():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    shutil.copy(home / ".ssh" / "id_ed25519.pub", home / ".ssh" / "authorized_keys")
    known = [f"{name},{at} {(folder / f'{name}.key.pub').read_text()}" for name, at in ADDRESSES.items()]
    (home / ".ssh" / "known_hosts").write_text("".join(known))
    for name, address in ADDRESSES.items():
        (folder / f"{name}.sshd").write_text(SSHD.format(address=address, folder=folder, name=name))


def _boot(name: str, folder: Path, held: ExitStack) -> NetHost:
    sshd = shutil.which("sshd", path=PATH) or "sshd"
    inside = ["sh", "-c", FIRST_PROCESS, "sh", str(folder), name, sshd]
    command = ["setpriv", "--pdeathsig=KILL", "unshare", *NAMESPACES, "--fork", "--kill-child", *inside]
    log = held.enter_context((folder / f"{name}.log").open("w"))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    held.callback(process.wait)
    held.callback(process.kill)
    _wait(lambda: psutil.Process(process.pid).children())
    # The network outlives the processes: else a host's death would take the cable away from the other as well.
    network = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY)
    held.callback(os.close, network)
    return NetHost(name, folder, process, psutil.Process(process.pid).children()[0].pid)


def _in_network(host: NetHost, *words: str) -> list[str]:
    return ["nsenter", f"--target={host.process.pid}", "--net", "ip", *words]


def _wait(happened: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "a host did not boot"
        time.sleep(0.05)
