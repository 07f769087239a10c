"""Each fault, planted alone into answers where all is well: found, named, and with its remedy.

pytest tests/doctor/test_checks.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mbtrain.doctor import checks, memory
from mbtrain.doctor.checks import Check
from mbtrain.hosts import Host
from tests import tiny

HOSTS = [Host("a", 2), Host("b", 2)]
SLOTS = {host.name: host.slots for host in HOSTS}
GB = 1_000_000_000


def way(address: str) -> dict[str, str]:
    return {"address": address, "interface": "eth0", "local": "192.0.2.9", "said": ""}


def answer(host: str) -> dict[str, Any]:
    """What a host says that has nothing wrong."""
    first = host == "a"
    return {
        "host": host,
        "machine": f"boot of {host}",
        "versions": {"python": "3.12.3", "torch": "2.13.0", "deepspeed": "0.19.8", "mbtrain": "0.1.0"},
        "commit": "0123456789ab",
        "source": "f" * 64,
        "torch": "",
        "gpus": [],
        "cores": 8,
        "memory_bytes": 64 * GB,
        "available_bytes": 60 * GB,
        "open_files": 65536,
        "locked_bytes": -1,
        "shm_bytes": 32 * GB,
        "infiniband": False,
        "address": f"192.0.2.{1 if first else 2}",
        "toward": {"b": way("192.0.2.2")} if first else {"a": way("192.0.2.1")},
        "interfaces": ["eth0", "lo"],
        "socket_names": {},
        "port": {"number": 29500, "said": ""} if first else None,
        "config": {"hash": "c" * 64, "said": ""},
        "run": {"folder": "/shared/runs", "token": f"token-{host}", "free_bytes": 100 * GB, "said": ""},
        "data": {"shards": {"hash": "d" * 64, "bytes": GB, "problems": []}},
        "mlflow": {"where": "http://tracking:5000", "said": "", "took_s": 0.1} if first else None,
    }


def gpus(*names: str, free: float = 70 * GB) -> list[dict[str, Any]]:
    return [{"name": name, "bytes": 80 * GB, "free_bytes": free} for name in names]


SEEN = {host: {"seen": ["token-a", "token-b"]} for host in "ab"}
OFFSETS = {"a": {"offset_s": 0.0, "within_s": 0.0}, "b": {"offset_s": -0.2, "within_s": 0.01}}
SETTINGS = tiny.make(train={"global_batch_size": 8, "zero_stage": 1, "precision": "bf16"})


def rank(number: int, host: str, **changed: float) -> dict[str, Any]:
    times = {"forward_s": 0.3, "backward_s": 0.6, "update_s": 0.1, "whole_s": 1.0}
    sizes = {"base_bytes": 3e8, "peak_bytes": 2e8, "resident_bytes": 3e8, "flops": 1e11, "loss": 5.5}
    return {"rank": number, "host": host, "device": "cpu", **times, **sizes, **changed}


STEP = {
    "sums": {"latency_s": 1e-4, "bandwidth": 1e9, "large_bytes": 1 << 24, "backend": "gloo"},
    "ranks": [rank(0, "a"), rank(1, "a"), rank(2, "b"), rank(3, "b")],
}


def all_checks(
    answers: dict[str, Any] | None = None,
    seen: Any = SEEN,
    offsets: Any = OFFSETS,
    step: Any = STEP,
    settings: Any = SETTINGS,
) -> list[Check]:
    answers = answers or {host: answer(host) for host in "ab"}
    return [
        *checks.reached(answers, ssh=True),
        *checks.versions(answers),
        *checks.devices(answers, SLOTS),
        *checks.limits(answers, SLOTS),
        *checks.clocks(offsets),
        *checks.network(answers),
        *checks.port(answers),
        *checks.configuration(answers, "config.yaml"),
        *checks.run_directory(answers, seen, memory.checkpoint_bytes(settings, None)),
        *checks.data(answers, full=False),
        *checks.mlflow(answers),
        *checks.fits(settings, answers, HOSTS, step),
        *checks.ranks_work(step, 4),
    ]


def test_where_all_is_well_nothing_is_wrong() -> None:
    found = all_checks()
    assert [check for check in found if check.status != "ok"] == []
    assert checks.verdict(found) == "ready"
    names = [check.name for check in found]
    assert len(set(names)) == len(names)
    assert {"ssh", "torch", "clocks", "network", "port", "run directory", "disk", "data", "memory", "step"} <= set(
        names
    )


# (host, keys on the way, value, name, status, words of what is found, words of the remedy)
PLANTED: list[tuple[str, str, Any, str, str, str, str]] = [
    ("b", "versions.torch", "2.12.0", "torch", "problem", "2.13.0 on a; 2.12.0 on b", "install one version everywhere"),
    ("b", "versions.python", "3.11.9", "python", "problem", "3.11.9 on b", "everywhere"),
    ("b", "versions.deepspeed", "not installed", "deepspeed", "problem", "not installed on b", "launch/setup.sh"),
    ("b", "commit", "ffffffffffff", "mbtrain", "problem", "ffffffffffff on b", "check out one commit"),
    ("b", "source", "e" * 64, "mbtrain", "problem", "code eeeeeeee on b", "check out one commit"),
    ("b", "torch", "ImportError: libcudart", "torch starts", "problem", "b: ImportError: libcudart", "nvidia-smi"),
    ("b", "machine", "boot of a", "hosts differ", "warning", "a, b are one machine", "name each machine once"),
    ("b", "open_files", 256, "limits", "warning", "256 open files on b", "ulimit -n"),
    ("b", "toward.a.said", "Name or service not known", "network", "problem", "b does not find a", "/etc/hosts"),
    ("b", "toward.a.address", "127.0.1.1", "network", "problem", "b takes a for itself", "b's /etc/hosts"),
    ("b", "address", "127.0.1.1", "network", "problem", "b's own name leads to 127.0.1.1", "GLOO_SOCKET_IFNAME=eth0"),
    ("b", "address", "", "network", "problem", "leads to no address", "GLOO_SOCKET_IFNAME=eth0"),
    ("b", "socket_names", {"GLOO_SOCKET_IFNAME": "ib0"}, "network", "problem", "but b has eth0, lo", ".deepspeed_env"),
    ("b", "toward.a.interface", "ens3", "network", "warning", "eth0 on a; ens3 on b", "NCCL_SOCKET_IFNAME=ens3,eth0"),
    (
        "a",
        "port.said",
        "Address already in use",
        "port",
        "problem",
        "a: port 29500: Address already",
        "--master-port=N",
    ),
    (
        "b",
        "config.said",
        "No such file or directory",
        "config",
        "problem",
        "No such file or directory on b",
        "same path",
    ),
    ("b", "config.hash", "e" * 64, "config", "problem", "eeeeeeee on b", "copy config.yaml to all hosts"),
    ("b", "run.said", "Permission denied", "run directory", "problem", "on b: Permission denied", "may write on b"),
    ("b", "run.free_bytes", 1000, "disk", "problem", "1.00 kB free", "checkpoint.keep_last"),
    (
        "b",
        "data.shards.problems",
        ["x.tar: cut off", "y"],
        "data",
        "problem",
        "b: x.tar: cut off (and 1 more)",
        "again",
    ),
    ("b", "data.shards.hash", "e" * 64, "data", "problem", "eeeeeeeeeeee on b", "copy shards to all hosts again"),
    (
        "a",
        "mlflow.said",
        "no answer in 5 s",
        "MLflow",
        "warning",
        "http://tracking:5000 from a: no answer",
        "mbtrain sync",
    ),
    ("a", "mlflow.said", "answers 401 Unauthorized", "MLflow", "warning", "answers 401", "~/.mlflow/credentials"),
    ("b", "available_bytes", GB // 2, "memory", "problem", "500.00 MB available on b", "--train.zero_stage"),
    ("b", "memory_bytes", 32 * GB, "devices", "warning", "8 cores, 32 GB on b", "slowest"),
]


@pytest.mark.parametrize(("host", "path", "value", "name", "status", "found", "remedy"), PLANTED)
def test_a_planted_fault_is_found_alone_and_has_its_remedy(
    host: str, path: str, value: Any, name: str, status: str, found: str, remedy: str
) -> None:
    answers = {host: answer(host) for host in "ab"}
    node: Any = answers[host]
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    node[last] = value
    wrong = [check for check in all_checks(answers) if check.status != "ok"]
    assert [(check.name, check.status) for check in wrong] == [(name, status)]
    assert found in wrong[0].found
    if path != "available_bytes":
        assert remedy in wrong[0].remedy
    assert wrong[0].remedy
    ready = checks.verdict(wrong)
    assert ready == ("not ready: 1 problem" if status == "problem" else "ready, with 1 warning")


@pytest.mark.parametrize(
    ("why", "status", "remedy"),
    [
        ("Permission denied (publickey).", 255, "`ssh -o BatchMode=yes b true` must work"),
        ("env: cannot change directory to '/x'", 125, "the same folder as this one"),
        ("No module named mbtrain", 1, "`python -m mbtrain.doctor.facts` must start"),
        ("no answer in 90 s (at: data)", None, "a network file system"),
    ],
)
def test_a_host_that_does_not_answer(why: str, status: int | None, remedy: str) -> None:
    """It alone is said; nothing else is concluded from its silence."""
    answers = {"a": answer("a"), "b": {"unreachable": why} | ({} if status is None else {"status": status})}
    found = all_checks(answers, seen={"a": {"seen": ["token-a"]}}, offsets={"a": OFFSETS["a"]})
    wrong = [check for check in found if check.status != "ok"]
    assert [(check.name, check.status) for check in wrong] == [("ssh", "problem")]
    assert why in wrong[0].found
    assert remedy in wrong[0].remedy


def test_folders_of_one_name_that_are_not_one() -> None:
    wrong = checks.run_directory(
        {host: answer(host) for host in "ab"},
        {"a": {"seen": ["token-a"]}, "b": {"seen": ["token-b"]}},
        None,
    )[0]
    assert (wrong.name, wrong.status) == ("run directory", "problem")
    assert "a does not see what b writes in /shared/runs" in wrong.found
    assert "a file system that all hosts share" in wrong.remedy


@pytest.mark.parametrize(("offset", "status"), [(3.2, "warning"), (-3.2, "warning"), (0.9, "ok"), (1.005, "ok")])
def test_clocks(offset: float, status: str) -> None:
    """As far as the way there and back lets it be known."""
    found = checks.clocks(OFFSETS | {"b": {"offset_s": offset, "within_s": 0.01}})
    assert [check.status for check in found] == [status]
    assert f"b is {abs(offset):.3f} s {'ahead' if offset > 0 else 'behind'}" in found[0].found
    assert "chronyd" in found[0].remedy or status == "ok"


def test_gpus_that_are_too_few_too_full_or_other_than_the_rest() -> None:
    answers = {host: answer(host) | {"gpus": gpus("H100", "H100")} for host in "ab"}
    assert all(check.status == "ok" for check in all_checks(answers))
    fewer = copy.deepcopy(answers)
    fewer["b"]["gpus"] = gpus("H100")
    wrong = {check.name: check for check in all_checks(fewer) if check.status != "ok"}
    assert wrong["slots"].status == "problem"
    assert "b: 2 ranks for 1 GPU" in wrong["slots"].found
    assert "1 x H100" in wrong["devices"].found
    full = copy.deepcopy(answers)
    full["b"]["gpus"] = gpus("H100", "H100", free=1000)
    wrong = {check.name: check for check in all_checks(full) if check.status != "ok"}
    assert [(check.name, check.status) for check in wrong.values()] == [("GPU memory", "problem")]
    assert "1.00 kB free on b" in wrong["GPU memory"].found


def test_more_ranks_than_cores() -> None:
    (found,) = (c for c in checks.devices({h: answer(h) for h in "ab"}, {"a": 2, "b": 9}) if c.status != "ok")
    assert (found.status, found.found) == ("warning", "b: 9 ranks for 8 cores")
    assert "b slots=8" in found.remedy


def test_shared_and_locked_memory_matter_where_gpus_and_infiniband_are() -> None:
    tight: dict[str, Any] = {"shm_bytes": 64 << 20, "locked_bytes": 1 << 16}
    answers = {"a": answer("a") | tight, "b": answer("b") | tight}
    assert all(check.status == "ok" for check in checks.limits(answers, SLOTS))
    for of in answers.values():
        of |= {"gpus": gpus("H100", "H100"), "infiniband": True}
    shm, locked = checks.limits(answers, SLOTS)
    assert "/dev/shm has 67.11 MB on a, b" in shm.found
    assert "--shm-size" in shm.remedy
    assert "65.54 kB may be locked" in locked.found
    assert "ulimit -l" in locked.remedy


def test_memory_that_was_measured_counts_where_it_is_more() -> None:
    """20 GB resident on each of two ranks do not fit into 30, whatever the formula says."""
    answers = {host: answer(host) | {"available_bytes": 30 * GB} for host in "ab"}
    assert checks.fits(SETTINGS, answers, HOSTS, None)[0].status == "ok"
    heavy = {**STEP, "ranks": [rank(i, "ab"[i // 2], resident_bytes=20e9) for i in range(4)]}
    assert checks.fits(SETTINGS, answers, HOSTS, heavy)[0].status == "problem"


def test_ranks_that_are_slow_or_wrong_stand_out() -> None:
    def wrong(*changed: dict[str, Any]) -> dict[str, Check]:
        step = {**STEP, "ranks": [*changed, *STEP["ranks"][len(changed) :]]}  # type: ignore[misc]
        return {check.name: check for check in checks.ranks_work(step, 4) if check.status != "ok"}

    slow = wrong(rank(0, "a", forward_s=0.6))["step spread"]
    assert "rank 0 on a, 2.00 times the median" in slow.found
    assert "look on a" in slow.remedy
    assert "rank 0 on a" in wrong(rank(0, "a", flops=5e10))["rank speed"].found
    assert wrong(rank(0, "a", forward_s=0.31)) == {}
    short = [rank(i, "a", forward_s=0.001 * (i + 1)) for i in range(4)]  # nothing that a step of 1 s notices
    assert wrong(*short) == {}
    assert wrong(rank(0, "a", loss=float("nan")))["step"].status == "problem"
    assert checks.ranks_work(STEP, 8)[0].status == "problem"
    failed = checks.ranks_work({"said": "rank 1 ended with signal 9", "command": "x"}, 4)
    assert [(check.status, check.found) for check in failed] == [("problem", "rank 1 ended with signal 9")]
    assert failed[0].remedy


def test_the_verdict() -> None:
    ok, warning, problem = (Check("x", status, "") for status in ("ok", "warning", "problem"))  # type: ignore[arg-type]
    assert checks.verdict([ok]) == "ready"
    assert checks.verdict([ok, warning]) == "ready, with 1 warning"
    assert checks.verdict([warning, warning]) == "ready, with 2 warnings"
    assert checks.verdict([warning, problem, problem]) == "not ready: 2 problems"
