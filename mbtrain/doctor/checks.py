"""What is wrong, and what to do about it: pure functions of the hosts' answers and of the ranks' figures.

Answers are those of facts.py by host, in the hostfile's order; a host that gave none has {"unreachable": why} and only
`reached` speaks of it. Each function gives checks: a name, a status, what was found, and, unless all is well, a remedy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mbtrain.config import Config
from mbtrain.doctor import memory
from mbtrain.hosts import Host
from mbtrain.log import size

Answers = Mapping[str, Mapping[str, Any]]
Status = Literal["ok", "warning", "problem", "skipped"]

CLOCK_S = 1.0  # file times and logs of hosts further apart mislead; leases and certificates fail later
SLOW = 1.25  # times the median
OPEN_FILES = 1024  # 256 shards, sockets to every rank, libraries
SHM_BYTES = 1 << 30  # through which NCCL's ranks of one host talk
LOCKED_BYTES = 1 << 30  # which InfiniBand registers
_LOOPBACK = ("127.", "::1")
FULL_SHARE = 0.9  # of memory: above it fragmentation decides


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `remedy` says what to do about a warning or a problem."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def verdict(checks: Iterable[Check]) -> str:
    """`ready`, `ready, with N warnings` or `not ready: N problems`."""
    counts = {status: sum(check.status == status for check in checks) for status in ("warning", "problem")}

    def of(status: str) -> str:
        return f"{counts[status]} {status}{'' if counts[status] == 1 else 's'}"

    if counts["problem"]:
        return f"not ready: {of('problem')}"
    return f"ready, with {of('warning')}" if counts["warning"] else "ready"


def reached(answers: Answers, ssh: bool) -> list[Check]:
    """Whether every host answers, by ssh without a password."""
    lost = {host: of["unreachable"] for host, of in answers.items() if "unreachable" in of}
    name = "ssh" if ssh else "this host"
    if not lost:
        return [Check(name, "ok", f"{_names(answers)} answered")]
    host = next(iter(lost))
    status = answers[host].get("status")
    if not ssh:
        remedy = "see the line above it on stderr"
    elif status == 255:
        remedy = (
            f"`ssh -o BatchMode=yes {host} true` must work from here without a question: name and port in "
            "~/.ssh/config, the key in its authorized_keys, its host key in known_hosts"
        )
    elif status in (125, 126, 127):
        remedy = "give every host the same folder as this one, and the same Python environment at the same path"
    elif status is None:
        remedy = f"look on {host} for what hangs there: a network file system, or the driver of its GPUs"
    else:
        remedy = f"on {host}, in this folder, `python -m mbtrain.doctor.facts` must start with this very Python"
    return [Check(name, "problem", _listed({host: f"{host}: {why}" for host, why in lost.items()}.values()), remedy)]


def versions(answers: Answers) -> list[Check]:
    """Whether all hosts would train with the same code and packages."""
    here = _there(answers)
    checks = []
    for package in ("python", "torch", "deepspeed"):
        by_host = {host: of["versions"][package] for host, of in here.items()}
        checks.append(_equal(package, by_host, f"install one version everywhere, by launch/setup.sh ({package})"))
        if "not installed" in by_host.values() and checks[-1].status == "ok":
            checks[-1] = Check(package, "problem", "not installed", "install it by launch/setup.sh")
    broken = {host: of["torch"] for host, of in here.items() if of["torch"]}
    if broken:
        why = next(iter(broken.values()))
        remedy = "install it again by launch/setup.sh; for GPUs, see that the driver fits (`nvidia-smi`)"
        checks.append(Check("torch starts", "problem", f"{_names(broken)}: {why}", remedy))
    by_host = {host: f"{of['versions']['mbtrain']}, {of['commit']}" for host, of in here.items()}
    sources = {of["source"] for of in here.values()}
    if len(sources) > 1:
        by_host = {host: f"{said}, code {here[host]['source'][:8]}" for host, said in by_host.items()}
    checks.append(_equal("mbtrain", by_host, "check out one commit everywhere, without changes of its own"))
    return checks


def devices(answers: Answers, slots: Mapping[str, int]) -> list[Check]:
    """Whether every host has what its ranks compute with."""
    here = _there(answers)
    kinds = {host: _kind(of) for host, of in here.items()}
    checks = [
        _equal("devices", kinds, "ranks wait for the slowest: leave the odd hosts out of the hostfile", "warning")
    ]
    for host, of in here.items():
        gpus, ranks = len(of["gpus"]), slots.get(host, 0)
        if gpus and ranks > gpus:
            remedy = f"in the hostfile: {host} slots={gpus}"
            checks.append(Check("slots", "problem", f"{host}: {ranks} ranks for {_number(gpus, 'GPU')}", remedy))
        elif not gpus and ranks > of["cores"]:
            remedy = f"in the hostfile: {host} slots={of['cores']} or fewer"
            found = f"{host}: {ranks} ranks for {_number(of['cores'], 'core')}"
            checks.append(Check("slots", "warning", found, remedy))
    machines: dict[str, list[str]] = {}
    for host, of in here.items():
        machines.setdefault(of["machine"], []).append(host)
    for twice in machines.values():
        if len(twice) > 1:
            remedy = "name each machine once, with all its slots: its memory and cores are counted for each name"
            checks.append(Check("hosts differ", "warning", f"{', '.join(twice)} are one machine", remedy))
    return checks


def limits(answers: Answers, slots: Mapping[str, int]) -> list[Check]:
    """Open files, shared memory, locked memory, where they matter."""
    here = _there(answers)
    checks = []
    few = {host: of["open_files"] for host, of in here.items() if 0 <= of["open_files"] < OPEN_FILES}
    if few:
        found = f"{min(few.values())} open files on {_names(few)}, {OPEN_FILES} wanted"
        checks.append(Check("limits", "warning", found, "ulimit -n 65536, or nofile in /etc/security/limits.conf"))
    small = {
        host: of["shm_bytes"]
        for host, of in here.items()
        if of["gpus"] and slots.get(host, 0) > 1 and of["shm_bytes"] < SHM_BYTES
    }
    if small:
        found = f"/dev/shm has {size(min(small.values()))} on {_names(small)}, {size(SHM_BYTES)} wanted by NCCL"
        remedy = "start the container with --shm-size=8g, or mount an emptyDir of medium Memory at /dev/shm"
        checks.append(Check("limits", "warning", found, remedy))
    locked = {
        host: of["locked_bytes"]
        for host, of in here.items()
        if of["infiniband"] and 0 <= of["locked_bytes"] < LOCKED_BYTES
    }
    if locked:
        found = f"{size(min(locked.values()))} may be locked on {_names(locked)}: too little for InfiniBand"
        checks.append(Check("limits", "warning", found, "ulimit -l unlimited, or memlock in /etc/security/limits.conf"))
    if not checks and here:
        least = min(of["open_files"] if of["open_files"] >= 0 else math.inf for of in here.values())
        files = "any number of" if math.isinf(least) else f"{least:.0f}"
        shm = size(min(of["shm_bytes"] for of in here.values()))
        checks.append(Check("limits", "ok", f"{files} open files, /dev/shm {shm}"))
    return checks


def clocks(offsets: Answers) -> list[Check]:
    """Whether clocks agree with this host's to a second."""
    known = {host: of for host, of in offsets.items() if "offset_s" in of}
    if not known:
        return []
    worst = max(known, key=lambda host: abs(known[host]["offset_s"]))
    ahead, within = known[worst]["offset_s"], known[worst]["within_s"]
    found = f"{worst} is {abs(ahead):.3f} s {'ahead' if ahead > 0 else 'behind'} (to {within:.3f} s)"
    if abs(ahead) - within > CLOCK_S:
        return [
            Check("clocks", "warning", found, f"let a time server set {worst}'s clock: chronyd or systemd-timesyncd")
        ]
    return [Check("clocks", "ok", found)]


def network(answers: Answers) -> list[Check]:
    """Whether hosts find each other, and by which interface."""
    here = _there(answers)
    checks = []
    machines = {of["machine"] for of in here.values()}
    used: dict[str, set[str]] = {}
    for host, of in here.items():
        for peer, way in of["toward"].items():
            if way["said"]:
                remedy = f"give {peer} an address that {host} knows, in DNS or /etc/hosts"
                checks.append(Check("network", "problem", f"{host} does not find {peer}: {way['said']}", remedy))
                continue
            used.setdefault(host, set()).add(way["interface"] or way["local"])
            apart = peer in here and here[peer]["machine"] != of["machine"]
            if apart and way["address"].startswith(_LOOPBACK):
                found = f"{host} takes {peer} for itself ({way['address']})"
                remedy = f"take {peer} out of the line of 127.* in {host}'s /etc/hosts"
                checks.append(Check("network", "problem", found, remedy))
        for key, value in of["socket_names"].items():
            wanted = [name.lstrip("=") for name in value.lstrip("^").split(",")]
            if not value.startswith("^") and not any(i.startswith(w) for i in of["interfaces"] for w in wanted):
                found = f"{key}={value}, but {host} has {', '.join(of['interfaces'])}"
                remedy = f"list every host's interface: {key}=eth0,ens3 in .deepspeed_env"
                checks.append(Check("network", "problem", found, remedy))
        own_is_elsewhere = of["address"] and not of["address"].startswith(_LOOPBACK)
        by_name = not of["gpus"] and "GLOO_SOCKET_IFNAME" not in of["socket_names"]
        if len(machines) > 1 and by_name and not own_is_elsewhere:
            name = next(iter(used.get(host, {"eth0"})))
            found = (
                f"{host}'s own name leads to {of['address'] or 'no address'}: others would not reach its ranks there"
            )
            remedy = f"GLOO_SOCKET_IFNAME={name} in .deepspeed_env, or the right address in {host}'s /etc/hosts"
            checks.append(Check("network", "problem", found, remedy))
    names = {host: "+".join(sorted(of)) for host, of in used.items()}
    if checks or not names:
        return checks
    set_ = {key: value for of in here.values() for key, value in of["socket_names"].items()}
    said = "".join(f", {key}={value}" for key, value in set_.items())
    if len(set(names.values())) > 1 and not set_ and len(machines) > 1:
        listed = ",".join(sorted({name for of in used.values() for name in of}))
        remedy = f"if ranks do not meet: NCCL_SOCKET_IFNAME={listed} and GLOO_SOCKET_IFNAME of each in .deepspeed_env"
        return [Check("network", "warning", f"interfaces have different names: {_groups(names)}", remedy)]
    return [Check("network", "ok", f"by {_groups(names)}{said}")]


def port(answers: Answers) -> list[Check]:
    """Whether rank 0 may listen on the master port, on the first host."""
    for host, of in _there(answers).items():
        if of.get("port"):
            number, why = of["port"]["number"], of["port"]["said"]
            if why:
                remedy = (
                    f"end what listens there (`ss -ltnp` on {host}; often a training left behind), or --master-port=N"
                )
                return [Check("port", "problem", f"{host}: port {number}: {why}", remedy)]
            return [Check("port", "ok", f"{number} is free on {host}")]
    return []


def configuration(answers: Answers, path: str) -> list[Check]:
    """Whether every host reads the same configuration file."""
    here = {host: of["config"] for host, of in _there(answers).items() if of.get("config")}
    missing = {host: of["said"] for host, of in here.items() if of["said"]}
    if missing:
        found = f"{path}: {next(iter(missing.values()))} on {_names(missing)}"
        return [Check("config", "problem", found, "put it where all hosts read it, under the same path")]
    check = _equal("config", {host: of["hash"][:8] for host, of in here.items()}, f"copy {path} to all hosts again")
    return [replace(check, found=path)] if check.status == "ok" else [check] if here else []


def run_directory(answers: Answers, seen: Answers, needed_bytes: int | None) -> list[Check]:
    """Whether all hosts write the run directory, whether it is one and the same, and whether checkpoints fit.

    seen: of each host, the names of the others' files that it reads there.
    """
    here = {host: of["run"] for host, of in _there(answers).items() if of.get("run")}
    closed = {host: of for host, of in here.items() if of["said"]}
    if closed:
        host, of = next(iter(closed.items()))
        remedy = f"make {of['folder']} a folder that this user may write on {host}, or give another --run"
        return [Check("run directory", "problem", f"{of['folder']} on {_names(closed)}: {of['said']}", remedy)]
    if not here:
        return []
    blind = {
        host: [other for other, theirs in here.items() if theirs["token"] not in seen.get(host, {}).get("seen", [])]
        for host in here
    }
    alone = {host: others for host, others in blind.items() if others}
    folders = _groups({host: of["folder"] for host, of in here.items()})
    checks = []
    if alone:
        host, others = next(iter(alone.items()))
        found = f"{host} does not see what {_names(others)} writes in {here[host]['folder']}"
        remedy = "put the run on a file system that all hosts share: --run=/shared/...; checkpoints are written by all"
        checks.append(Check("run directory", "problem", found, remedy))
    else:
        same = "written" if len(here) == 1 else "written by all hosts, and the same"
        checks.append(Check("run directory", "ok", f"{folders}: {same}"))
    free = min(of["free_bytes"] for of in here.values())
    if needed_bytes is not None and free < needed_bytes:
        found = f"{size(free)} free, {size(needed_bytes)} wanted for checkpoints"
        remedy = "free some, smaller checkpoint.keep_last or rarer checkpoint.keep_every_steps, or another --run"
        checks.append(Check("disk", "problem", found, remedy))
    else:
        wanted = "" if needed_bytes is None else f", {size(needed_bytes)} wanted for checkpoints"
        checks.append(Check("disk", "ok", f"{size(free)} free{wanted}"))
    return checks


def data(answers: Answers, full: bool) -> list[Check]:
    """Whether every host has the same shards, whole."""
    here = {host: of["data"] for host, of in _there(answers).items() if of.get("data")}
    checks = []
    for path in dict.fromkeys(path for of in here.values() for path in of):
        of_path = {host: of[path] for host, of in here.items()}
        broken = {host: of["problems"] for host, of in of_path.items() if of["problems"]}
        if broken:
            problems = next(iter(broken.values()))
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            remedy = "copy it again from where it is whole, or prepare it again; `mbtrain-prep verify` reads all of it"
            checks.append(Check("data", "problem", f"{_names(broken)}: {problems[0]}{more}", remedy))
            continue
        check = _equal(
            "data", {host: of["hash"][:12] for host, of in of_path.items()}, f"copy {path} to all hosts again"
        )
        how = "every file's hash as written" if full else "files as long as written"
        whole = f"{path}: {size(next(iter(of_path.values()))['bytes'])}, {how}"
        checks.append(
            replace(check, found=whole) if check.status == "ok" else replace(check, found=f"{path}: {check.found}")
        )
    return checks


def mlflow(answers: Answers) -> list[Check]:
    """Whether the tracking store answers where rank 0 will be. Training never waits for it: at most a warning."""
    for host, of in _there(answers).items():
        if of.get("mlflow"):
            where, why = of["mlflow"]["where"], of["mlflow"]["said"]
            if why:
                remedy = "start it, or correct log.mlflow_uri or MLFLOW_TRACKING_URI; training never waits for it, and "
                remedy += "`mbtrain sync RUN` sends later what is missing there"
                if why.startswith(("answers 401", "answers 403")):
                    remedy = f"put mlflow_tracking_username and _password into ~/.mlflow/credentials of {host}"
                return [Check("MLflow", "warning", f"{where} from {host}: {why}", remedy)]
            return [Check("MLflow", "ok", f"{where} answers in {of['mlflow']['took_s']:.1f} s")]
    return []


def fits(settings: Config, answers: Answers, hosts: Sequence[Host], step: Mapping[str, Any] | None) -> list[Check]:
    """Whether weights, gradients, optimizer and activations fit into each host's memory, by formula and as measured."""
    ranks = sum(host.slots for host in hosts)
    device = device_of(answers)
    cuda = device == "cuda"
    need = memory.predict(settings, ranks, device)
    of_ranks = list((step or {}).get("ranks", []))
    measured = max((of.get("peak_bytes", 0) for of in of_ranks), default=0)
    resident = max((of.get("base_bytes", 0) + of.get("resident_bytes", 0) for of in of_ranks), default=0)
    if not _there(answers):
        return []
    checks = []
    said = f"{size(need.total)} a rank by formula" + (f", {size(measured)} measured" if measured else "")
    if cuda:
        free = {h: min((g["free_bytes"] for g in of["gpus"]), default=0) for h, of in _there(answers).items()}
        tightest = min(free, key=lambda host: free[host])
        room = free[tightest]
        advice = memory.remedy(settings, ranks, device, room)
        found = f"{said}; {size(room)} free on {tightest}"
        checks.append(_room("GPU memory", found, max(need.total, measured), room, advice))
    a_rank = memory.on_host(settings, ranks, cuda=cuda)
    once = a_rank.process + a_rank.training
    if not cuda and resident:
        once = resident  # in which freed memory that the C library keeps is counted as it is
    once += a_rank.snapshot
    rows = [
        (answers[host.name]["available_bytes"] - once * host.slots, host)
        for host in hosts
        if "unreachable" not in answers[host.name]
    ]
    _, tight = min(rows, key=lambda row: row[0])
    available = answers[tight.name]["available_bytes"]
    words = f"{size(once * tight.slots)} for {_number(tight.slots, 'rank')}, checkpoints' copies included"
    found = f"{words if cuda else f'{said}; {words}'}; {size(available)} available on {tight.name}"
    if cuda:
        advice = f"fewer slots on {tight.name}, or more hosts: each rank first builds the model there"
    else:
        beside = a_rank.process + a_rank.snapshot
        advice = memory.remedy(settings, ranks, device, (available / tight.slots - beside) / memory.KEPT)
    checks.append(_room("memory", found, once * tight.slots, available, advice))
    return checks


def device_of(answers: Answers) -> memory.Device:
    """Where training will be: on GPUs if there are any."""
    return "cuda" if any(of["gpus"] for of in _there(answers).values()) else "cpu"


def _room(name: str, found: str, wanted: float, free: float, advice: str) -> Check:
    if wanted <= FULL_SHARE * free:
        return Check(name, "ok", found)
    return Check(name, "problem" if wanted > free else "warning", found, advice)


def ranks_work(step: Mapping[str, Any], expected: int) -> list[Check]:
    """Whether all ranks met and made steps, how long sums and steps take, and whether one is slower than the rest."""
    if step.get("said"):
        remedy = step.get("remedy") or "run the command that is said above by hand; NCCL_DEBUG=INFO tells more"
        return [Check("ranks", "problem", step["said"], remedy)]
    sums, of_ranks = step["sums"], list(step["ranks"])
    checks = []
    if len(of_ranks) != expected:
        found = f"{len(of_ranks)} ranks, expected {expected}"
        return [Check("ranks", "problem", found, "see that the hostfile is the one that the launcher reads")]
    bandwidth = "" if sums["bandwidth"] is None else f", {size(sums['bandwidth'])}/s with {size(sums['large_bytes'])}"
    found = f"{_number(expected, 'rank')} over {sums['backend']}: {sums['latency_s'] * 1e3:.2f} ms{bandwidth}"
    checks.append(Check("all-reduce", "ok", found))
    if "loss" in of_ranks[0]:
        odd = [of for of in of_ranks if not math.isfinite(of["loss"])]
        if odd:
            remedy = "try train.precision=fp32: if it is finite there, a smaller model.init or another precision helps"
            checks.append(Check("step", "problem", f"rank {odd[0]['rank']}: the loss is {odd[0]['loss']}", remedy))
        else:
            slowest = max(of_ranks, key=lambda of: of["forward_s"] + of["backward_s"])
            whole = statistics.median(of["whole_s"] for of in of_ranks)
            parts = ", ".join(f"{key} {slowest[f'{key}_s']:.3f}" for key in ("forward", "backward", "update"))
            found = f"{whole:.3f} s; the slowest, rank {slowest['rank']} on {slowest['host']}: {parts} s"
            checks.append(Check("step", "ok", found))
    checks += _slow("rank speed", of_ranks, {of["rank"]: 1 / of["flops"] for of in of_ranks}, "a matrix product", 0.0)
    if "loss" in of_ranks[0]:
        matters = 0.05 * statistics.median(of["whole_s"] for of in of_ranks)
        times = {of["rank"]: of["forward_s"] for of in of_ranks}
        checks += _slow("step spread", of_ranks, times, "the forward pass", matters)
    return checks


def _slow(
    name: str, of_ranks: Sequence[Mapping[str, Any]], times: Mapping[int, float], what: str, matters: float
) -> list[Check]:
    """Whether some rank's own work is slower than the others', by more than `matters` besides."""
    if len(times) < 2:
        return []
    rank = max(times, key=lambda r: times[r])
    middle = statistics.median_low(times.values())
    host = next(of["host"] for of in of_ranks if of["rank"] == rank)
    found = f"the slowest in {what} is rank {rank} on {host}, {times[rank] / middle:.2f} times the median"
    if times[rank] > SLOW * middle and times[rank] - middle > matters:
        remedy = f"look on {host} for other work, heat or a lower clock, or leave it out: every step waits for it"
        return [Check(name, "warning", found, remedy)]
    return [Check(name, "ok", found)]


def _there(answers: Answers) -> dict[str, Mapping[str, Any]]:
    return {host: of for host, of in answers.items() if "unreachable" not in of}


def _equal(name: str, by_host: Mapping[str, str], remedy: str, otherwise: Status = "problem") -> Check:
    if len(set(by_host.values())) <= 1:
        return Check(name, "ok", next(iter(by_host.values()), "nothing"))
    return Check(name, otherwise, _groups(by_host), remedy)


def _groups(by_host: Mapping[str, str]) -> str:
    """`x on a, b; y on c`, or `x` where all have x."""
    hosts: dict[str, list[str]] = {}
    for host, value in by_host.items():
        hosts.setdefault(value, []).append(host)
    if len(hosts) == 1:
        return next(iter(hosts))
    return "; ".join(f"{value} on {_names(of)}" for value, of in hosts.items())


def _names(hosts: Iterable[str]) -> str:
    names = list(hosts)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _listed(texts: Iterable[str]) -> str:
    texts = list(texts)
    return "; ".join(texts[:2]) + (f"; and {len(texts) - 2} more" if len(texts) > 2 else "")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _kind(of: Mapping[str, Any]) -> str:
    gpus = [gpu["name"] for gpu in of["gpus"]]
    kinds = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    cores = f"{_number(of['cores'], 'core')}, {of['memory_bytes'] / 1e9:.0f} GB"  # equal machines differ by some MB
    return f"{kinds}, {cores}" if kinds else cores
