"""All of it, in order: ask every host, compare, and only where nothing forbids it start the ranks for real steps."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mbtrain import config, redact, tracking
from mbtrain.config import Config
from mbtrain.doctor import asking, checks, launch, memory
from mbtrain.doctor.asking import Answers
from mbtrain.doctor.checks import Check
from mbtrain.errors import ConfigError
from mbtrain.hosts import Host, read_hostfile
from mbtrain.model.flops import count

ANSWER_S = 90.0  # torch is imported on each host; and a network file system may be slow
FULL_ANSWER_S = 24 * 3600.0
STEP_S = 600.0


@dataclass(frozen=True)
class Wanted:
    """What is to be examined; as the options of `mbtrain doctor`."""

    config: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    hostfile: str | None = None
    run: str | None = None
    ranks: int | None = None
    full: bool = False
    master_port: int = 29500
    ssh_port: int | None = None


@dataclass(frozen=True)
class Report:
    """What was found.

    predicted   of each ZeRO stage what a rank needs; empty without a configuration
    stage       the configuration's
    step        the ranks' figures, see step.py; empty when they were not started
    """

    checks: list[Check]
    hosts: list[Host]
    answers: Answers
    predicted: dict[int, memory.Need]
    stage: int | None
    step: dict[str, Any]

    @property
    def verdict(self) -> str:
        return checks.verdict(self.checks)

    @property
    def ready(self) -> bool:
        return not any(check.status == "problem" for check in self.checks)


def examine(wanted: Wanted) -> Report:
    """Look at everything. Raises ConfigError for a configuration or hostfile that cannot be read."""
    settings = config.load(wanted.config, wanted.overrides) if wanted.config else None
    hosts = read_hostfile(wanted.hostfile) if wanted.hostfile else [Host(socket.gethostname(), 0)]
    ssh = wanted.hostfile is not None
    run = _run_of(wanted, settings)
    commands = {h.name: asking.command_on(h.name if ssh else None, ssh_port=wanted.ssh_port) for h in hosts}
    _progress(f"asking {len(hosts)} host{'s' if len(hosts) > 1 else ''}")
    with asking.lines(commands) as opened:
        questions = {host.name: _question(wanted, settings, hosts, host, run) for host in hosts}
        answers = asking.ask(opened, questions, FULL_ANSWER_S if wanted.full else ANSWER_S)
        there = {name: opened[name] for name, of in answers.items() if "unreachable" not in of}
        offsets = asking.clock_offsets(there)
        tokens = {n: answers[n]["run"]["token"] for n in there if answers[n]["run"] and not answers[n]["run"]["said"]}
        looks = {
            name: {
                "ask": "seen",
                "folder": answers[name]["run"]["folder"],
                "tokens": {token: token.removeprefix(".mbtrain-doctor-") for token in tokens.values()},
            }
            for name in tokens
        }
        seen = asking.ask({name: there[name] for name in looks}, looks, ANSWER_S)
    if not ssh:
        hosts = [Host(host.name, wanted.ranks or _ranks_here(answers[host.name])) for host in hosts]
    slots = {host.name: host.slots for host in hosts}
    found = checks.reached(answers, ssh) + checks.versions(answers) + checks.devices(answers, slots)
    found += checks.limits(answers, slots)
    if ssh:
        found += checks.clocks(offsets) + checks.network(answers)
        if reason := launch.missing_launcher():
            found.append(Check("launcher", "problem", reason, "install it here: apt-get install pdsh"))
    found += checks.port(answers)
    fitting = settings
    predicted: dict[int, memory.Need] = {}
    if settings is not None:
        found += checks.configuration(answers, str(wanted.config))
    needed = None if settings is None else memory.checkpoint_bytes(settings, _last_step(settings))
    found += checks.run_directory(answers, seen, needed)
    if settings is not None:
        found += checks.data(answers, wanted.full) + checks.mlflow(answers)
        device = checks.device_of(answers)
        try:
            predicted = {stage: memory.predict(settings, _total(hosts), device, stage) for stage in range(4)}
            found += checks.fits(settings, answers, hosts, None)
        except ConfigError as error:
            fitting = None
            remedy = "another number of slots in the hostfile (of --ranks here), or another batch"
            found.append(Check("batch", "problem", str(error), remedy))
    step: dict[str, Any] = {}
    if reason := _why_not(found, settings, fitting):
        found.append(Check("ranks", "skipped", f"not started: {reason}"))
    else:
        step = _step(wanted, hosts, answers, fitting)
        found += checks.ranks_work(step, _total(hosts))
        if fitting is not None and not step.get("said"):  # now with what was measured
            measured = {check.name: check for check in checks.fits(fitting, answers, hosts, step)}
            found = [measured.get(check.name, check) for check in found]
    plain = [replace(c, found=redact.one_line(c.found), remedy=redact.one_line(c.remedy)) for c in found]
    return Report(plain, hosts, answers, predicted, settings.train.zero_stage if settings else None, step)


def _run_of(wanted: Wanted, settings: Config | None) -> str | None:
    named = f"runs/{settings.name}" if settings else None
    run = wanted.run or named
    return None if run is None else str(Path(run).absolute())


def _question(
    wanted: Wanted, settings: Config | None, hosts: list[Host], host: Host, run: str | None
) -> dict[str, Any]:
    first = host is hosts[0]
    others = [other.name for other in hosts if other is not host]
    question: dict[str, Any] = {
        "ask": "facts",
        # All talk with the first, where rank 0 is; which talk with each other besides depends on the algorithm.
        "peers": others if first else [hosts[0].name],
        "port": wanted.master_port if first else None,
        "run": run,
        "token": secrets.token_hex(8),
        "full": wanted.full,
        "environment": launch.travelling() if wanted.hostfile else {},
    }
    if settings is not None:
        splits = list(dict.fromkeys([settings.data.train_split, settings.data.val_split]))
        question["config"] = wanted.config
        question["data"] = {path: splits for _, path in config.source_paths(settings)}
        if settings.log.mlflow and first:
            question["mlflow"] = settings.log.mlflow_uri or tracking.default_uri(Path.cwd())
    return question


def _ranks_here(of: Mapping[str, Any]) -> int:
    """On one machine alone: a rank a GPU, or two that share the cores, as the quickstart has it."""
    if "unreachable" in of:
        return 1
    return len(of["gpus"]) or min(2, of["cores"])


def _total(hosts: list[Host]) -> int:
    return sum(host.slots for host in hosts)


def _last_step(settings: Config) -> int | None:
    return config.step_limit(settings, count(settings).training_per_byte)


def _why_not(found: list[Check], settings: Config | None, fitting: Config | None) -> str:
    """Why no rank is to be started, or nothing."""
    if settings is not None and fitting is None:
        return "the batch cannot be cut for so many ranks"
    hinders = ("ssh", "this host", "torch", "deepspeed", "torch starts", "launcher", "port", "config", "slots")
    hindering = [check.name for check in found if check.status == "problem" and check.name in hinders]
    if hindering:
        return f"first mend {', '.join(dict.fromkeys(hindering))}"
    if any(check.status == "problem" and check.name in ("memory", "GPU memory") for check in found):
        return "by formula the memory is not enough, and a host that runs out of it may take other work with it"
    return ""


def _step(wanted: Wanted, hosts: list[Host], answers: Answers, settings: Config | None) -> dict[str, Any]:
    ranks = _total(hosts)
    _progress(f"{'steps' if settings else 'sums'} on {ranks} rank{'s' if ranks > 1 else ''}")
    request = {"config": wanted.config, "overrides": dict(wanted.overrides), "limit_s": STEP_S}
    master = "127.0.0.1"
    if len(hosts) > 1:  # the address by which the second host knows the first
        master = answers[hosts[1].name]["toward"][hosts[0].name]["address"]
    return launch.run(
        request,
        ranks,
        hostfile=None if wanted.hostfile is None else os.path.abspath(wanted.hostfile),
        master=master,
        port=wanted.master_port,
        ssh_port=wanted.ssh_port,
    )


def _progress(text: str) -> None:
    sys.stderr.write(f"{text} ...\n")
    sys.stderr.flush()
