"""What a cluster is given: a checked configuration as a job file for Slurm or Kubernetes.

    plan = planned("configs/mine.yaml", {}, nodes=4, ranks=8)      raises when the batch cannot be cut for 32 ranks
    text = slurm(plan, cpus=8, time="24:00:00")

The templates are the files in launch/ themselves, each runnable as it stands. Filling them in changes values in a
parsed document, or whole lines whose values are checked and quoted: nothing of a configuration is executed.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mbtrain import config as configuration
from mbtrain import hosts
from mbtrain.config import Config
from mbtrain.errors import ConfigError
from mbtrain.redact import without_password

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
ARGUMENTS = "[ $# -gt 0 ] || set -- #"  # begins the line of train.slurm that stands for CONFIG and its options
IN_IMAGE = "/etc/mbtrain/config.yaml"

_PATH = re.compile(r"[A-Za-z0-9_./-]+")
_TIME = re.compile(r"(?:[0-9]+-)?[0-9]+(?::[0-9]{1,2}){0,2}")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
_QUANTITY = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:[KMGTP]i?|k)?")
_OBJECT = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")  # an RFC 1123 subdomain, as Kubernetes names objects


@dataclass(frozen=True)
class Plan:
    """A configuration that fits `nodes` machines; ranks and gpus (0: on CPU) are those of each machine.

    A hostfile's machines may differ: then ranks is 0 and total_ranks alone counts. micro_batch_size and accumulation
    are what each rank does in a step.
    """

    config: Config
    path: str
    overrides: dict[str, str]
    run: str
    nodes: int
    ranks: int
    gpus: int
    total_ranks: int
    micro_batch_size: int
    accumulation: int


def planned(
    path: str,
    overrides: Mapping[str, str],
    *,
    nodes: int = 1,
    ranks: int = 1,
    gpus: int = 0,
    hostfile: str | None = None,
    run: str | None = None,
) -> Plan:
    """Load a configuration and cut its batch for all ranks: nodes x ranks, or the slots of a hostfile.

    Raises:
        ConfigError: the configuration or the hostfile is wrong, the global batch cannot be cut evenly, or an override
            holds a password.
    """
    for key, value in overrides.items():
        if without_password(value) != value:
            raise ConfigError(
                f"--{key}: has a password in it, and options stand in files and process lists; give the address in "
                "MLFLOW_TRACKING_URI, or user and password in ~/.mlflow/credentials"
            )
    config = configuration.load(path, overrides)
    total = nodes * ranks
    if hostfile is not None:
        slots = [host.slots for host in hosts.read_hostfile(hostfile)]
        nodes, total = len(slots), sum(slots)
        ranks = slots[0] if len(set(slots)) == 1 else 0
    micro, accumulation = configuration.batch_shape(config, total)
    if run is None:
        run = f"runs/{config.name}"
    return Plan(config, path, dict(overrides), run, nodes, ranks, gpus, total, micro, accumulation)


def in_words(plan: Plan) -> str:
    """The plan on one line."""
    each = f" x {plan.ranks}" if plan.ranks else ""
    accumulated = f" x {plan.accumulation}" if plan.accumulation > 1 else ""
    batch = f"{plan.config.train.global_batch_size} rows a step, {plan.micro_batch_size}{accumulated} on each"
    return f"{plan.nodes}{each} = {plan.total_ranks} rank{'s' if plan.total_ranks > 1 else ''}: {batch}; run {plan.run}"


def slurm(plan: Plan, *, cpus: int, time: str, grace_s: int = 120) -> str:
    """launch/train.slurm for this plan: cpus for each rank, the time limit, and seconds to save before it is up.

    Raises ConfigError for a time that Slurm would not read.
    """
    if not _TIME.fullmatch(time):
        raise ConfigError(f"--time: expected minutes, HH:MM:SS or DAYS-HH:MM:SS, got {time!r}")
    settings: dict[str, str | None] = {
        "job-name": plan.config.name,
        "nodes": str(plan.nodes),
        "ntasks-per-node": str(plan.ranks),
        "gpus-per-node": str(plan.gpus) if plan.gpus else None,
        "cpus-per-task": str(cpus),
        "time": time,
        "signal": f"B:USR1@{grace_s}",
    }
    options = [f"--run={plan.run}", *(f"--{key}={value}" for key, value in plan.overrides.items())]
    lines = []
    for line in _template("train.slurm").splitlines():
        setting = re.match(r"#SBATCH --([a-z-]+)=", line)
        if setting and setting[1] in settings:
            value = settings.pop(setting[1])
            if value is not None:
                lines.append(f"#SBATCH --{setting[1]}={value}")
        elif line.startswith(ARGUMENTS):
            # An option given to sbatch behind the file comes last, and counts.
            lines.append(f'set -- {shlex.join([plan.path, *options])} "$@"')
            settings["arguments"] = None
        else:
            lines.append(line)
    if settings != {"arguments": None}:
        raise ConfigError(f"{LAUNCH / 'train.slurm'}: has no line for {', '.join(settings)}; take the one shipped")
    return "\n".join(lines) + "\n"


def kubernetes(
    plan: Plan,
    *,
    image: str,
    volume: str,
    cpus: int,
    memory: str,
    grace_s: int = 300,
    secret: str = "mbtrain-mlflow",
) -> str:
    """launch/kubernetes/pytorchjob.yaml for this plan: a ConfigMap with the resolved configuration, and a PyTorchJob.

    image and volume: the container's image and the PersistentVolumeClaim that all pods share, mounted where relative
    paths of the configuration begin. cpus: for each rank; memory: of each pod, as 256Gi. grace_s: seconds to save in.
    secret: the Secret whose entries become environment variables (MLFLOW_TRACKING_PASSWORD); it may be missing.

    Raises ConfigError for a value that is no name of its kind.
    """
    for option, value, pattern, what in (
        ("--image", image, _IMAGE, "an image's name, as registry/mbtrain:1"),
        ("--volume", volume, _OBJECT, "the name of a PersistentVolumeClaim: lower-case letters, digits, hyphens"),
        ("--secret", secret, _OBJECT, "the name of a Secret: lower-case letters, digits, hyphens"),
        ("--memory", memory, _QUANTITY, "a quantity, as 256Gi"),
        ("--run", plan.run, _PATH, "a folder of letters, digits and ._-/ on the volume"),
    ):
        if not pattern.fullmatch(value):
            raise ConfigError(f"{option}: expected {what}, got {value!r}")

    config_map, job = yaml.safe_load_all(_template("kubernetes/pytorchjob.yaml"))
    name = dns_label(plan.config.name)
    config_map["metadata"]["name"] = job["metadata"]["name"] = name
    config_map["data"] = {"config.yaml": configuration.to_yaml(plan.config)}
    job["spec"]["nprocPerNode"] = str(plan.ranks)
    replica = job["spec"]["pytorchReplicaSpecs"].pop("Master")
    _fill_pod(
        replica["template"]["spec"],
        image=image,
        args=[IN_IMAGE, f"--run={plan.run}"],
        environment={"RANKS": plan.ranks, "RETRIES": None, "OMP_NUM_THREADS": cpus},
        secret=secret,
        resources={"cpu": str(cpus * plan.ranks), "memory": memory},
        gpus=plan.gpus,
        grace_s=grace_s,
        sources={"data": {"claimName": volume}, "config": {"name": name}},
    )
    roles = {"Master": 1, "Worker": plan.nodes - 1}
    job["spec"]["pytorchReplicaSpecs"] = {
        role: {**deepcopy(replica), "replicas": count} for role, count in roles.items() if count
    }
    header = (
        f"# Made by `mbtrain job kubernetes`: {in_words(plan)}\n# Why it is so: launch/kubernetes/pytorchjob.yaml\n"
    )
    return header + yaml.dump_all([config_map, job], Dumper=_Readable, sort_keys=False, width=120)


def dns_label(name: str) -> str:
    """A name of lower-case letters, digits and hyphens, a letter first, of 40 characters at most.

    Kubernetes wants it so, with room for `-worker-1234` behind. Where it cannot be the name itself, a digest of the
    name is its end, so that two runs never share one.
    """
    if re.fullmatch(r"[a-z](?:[a-z0-9-]{0,38}[a-z0-9])?", name):
        return name
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    words = words if words[:1].isalpha() else f"run-{words}"
    return f"{words[:31].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _fill_pod(
    pod: dict[str, Any],
    *,
    image: str,
    args: list[str],
    environment: Mapping[str, object],
    secret: str,
    resources: dict[str, str],
    gpus: int,
    grace_s: int,
    sources: Mapping[str, dict[str, str]],
) -> None:
    """Set these values in a pod's specification, where the template has others."""
    pod["terminationGracePeriodSeconds"] = grace_s
    container = pod["containers"][0]
    container |= {"image": image, "args": args}
    for variable in container["env"]:
        value = environment[variable["name"]]
        variable["value"] = variable["value"] if value is None else str(value)
    container["envFrom"][0]["secretRef"]["name"] = secret
    limits = {"memory": resources["memory"], **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    container["resources"] = {"requests": resources, "limits": limits}
    for entry in pod["volumes"]:
        for key in entry.keys() & {"persistentVolumeClaim", "configMap"}:
            entry[key] = sources[entry["name"]]


class _Readable(yaml.SafeDumper):
    """YAML without anchors, and texts of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Readable.add_representer(str, _text)


def _template(name: str) -> str:
    try:
        return (LAUNCH / name).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{LAUNCH / name}: cannot be read ({error.strerror}); `mbtrain job` fills in the files of a checkout"
        ) from error
