"""Job files: checked before they are written, valid where they are read, and nothing in them is executed by accident.

pytest tests/test_job.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain import config as configuration
from mbtrain import job
from mbtrain.errors import ConfigError
from mbtrain.job import Plan, dns_label, in_words, kubernetes, planned, slurm
from tests import launch, tiny
from tests.launch import ROOT
from tests.test_cli import run

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.slurm"), ROOT / "launch" / "supervise"])


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(launch.config_file(tmp_path, tiny.tree(train={"global_batch_size": 48})))


def plan(config: str, **options: Any) -> Plan:
    return planned(config, {}, **{"nodes": 3, "ranks": 8, "gpus": 8, **options})


def manifest(made: Plan, **options: Any) -> list[dict[str, Any]]:
    """The documents of a rendered manifest."""
    given = {"image": "mbtrain:1", "volume": "mbtrain", "cpus": 8, "memory": "256Gi", **options}
    return list(yaml.safe_load_all(kubernetes(made, **given)))


def is_sound(script: Path) -> None:
    """Fails for what shellcheck or bash have to say of a script."""
    checked = subprocess.run([SHELLCHECK, script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shipped_scripts_are_sound(script: Path) -> None:
    is_sound(script)


def test_a_plan_says_what_each_rank_does(config: str, tmp_path: Path) -> None:
    made = plan(config)
    assert (made.total_ranks, made.micro_batch_size, made.accumulation, made.run) == (24, 2, 1, "runs/tiny")
    assert in_words(made) == "3 x 8 = 24 ranks: 48 rows a step, 2 on each; run runs/tiny"
    small = planned(config, {"train.micro_batch_size": "3"}, ranks=2, run="runs/b")
    assert in_words(small) == "1 x 2 = 2 ranks: 48 rows a step, 3 x 8 on each; run runs/b"
    (tmp_path / "hosts").write_text("a slots=4\nb slots=8\n")
    assert in_words(planned(config, {}, hostfile=str(tmp_path / "hosts"))).startswith("2 = 12 ranks: 48 rows")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": 5}, r"train.global_batch_size: got 48, expected a multiple of the number of ranks, 40"),
        ({"hostfile": "nowhere"}, r"--hostfile=nowhere: cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    config: str, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(config, **change)


def test_a_password_is_put_into_no_file_and_no_command(config: str) -> None:
    """In options; the configuration itself refuses one in log.mlflow_uri."""
    with pytest.raises(ConfigError, match=r"--data.path: has a password in it") as refused:
        planned(config, {"data.path": "https://me:hunter2@files.example/shards"})
    assert "hunter2" not in str(refused.value)


def test_the_slurm_file_asks_for_what_was_planned(config: str, tmp_path: Path) -> None:
    text = slurm(plan(config, run="runs/mine"), cpus=6, time="2-12:00:00", grace_s=300)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert asked == {
        "job-name": "tiny",
        "nodes": "3",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "6",
        "time": "2-12:00:00",
        "output": "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": "B:USR1@300",
    }
    assert text.count(f'set -- {config} --run=runs/mine "$@"\n') == 1
    # Below its settings the file is the one shipped, but for the line of arguments.
    shipped = (ROOT / "launch" / "train.slurm").read_text().splitlines()
    assert len(set(text.splitlines()) - set(shipped)) == 6
    assert "--gpus-per-node" not in slurm(plan(config, gpus=0), cpus=1, time="90")
    (tmp_path / "made.slurm").write_text(text)
    is_sound(tmp_path / "made.slurm")
    for time in ("soon", "1:00:00\n#SBATCH --wrap=x", "$(x)"):
        with pytest.raises(ConfigError, match="--time: expected"):
            slurm(plan(config), cpus=1, time=time)


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=20))
def test_a_shell_gives_back_what_the_slurm_file_was_given(tmp_path_factory: pytest.TempPathFactory, said: str) -> None:
    tree = tiny.tree(sample={"prompt": said})
    folder = tmp_path_factory.mktemp("quoting")
    path = str(launch.config_file(folder, tree))
    made = planned(path, {"sample.prompt": f"'{said}"} if said != "null" else {}, run=f"runs/{said} x")
    line = next(
        line for line in re.split(r"\n(?=set -- )", slurm(made, cpus=1, time="1")) if line.startswith("set -- ")
    )
    line = line[: line.index('"$@"\n') + 5]
    done = subprocess.run(["bash", "-c", line + "printf '%s\\0' \"$@\""], capture_output=True, check=True)
    words = done.stdout.decode().split("\0")[:-1]
    assert words == [path, f"--run=runs/{said} x", *(f"--{key}={value}" for key, value in made.overrides.items())]


# What of kubeflow.org/v1 PyTorchJob, core/v1 PodTemplateSpec and ConfigMap the files use, with their types. The whole
# schema of the training operator 1.7, 1.8 and 1.9 was laid over the same files by hand when they were written.
LABEL = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
INTEGER = re.compile(r"[1-9][0-9]*")
ENV = {"name": re.compile(r"[A-Z_]+"), "value": str}
POD = {
    "automountServiceAccountToken": False,
    "enableServiceLinks": False,
    "terminationGracePeriodSeconds": int,
    "securityContext": {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "fsGroup": 1000,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    },
    "containers": [
        {
            "name": "pytorch",  # by this name the operator finds the container whose exit status counts
            "image": str,
            "command": [str],
            "args": [re.compile(r"[^$]*")],  # $(X) would be replaced by the kubelet
            "workingDir": str,
            "env": [ENV],
            "envFrom": [{"secretRef": {"name": str, "optional": True}}],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "resources": {
                "requests": {"cpu": INTEGER, "memory": str},
                "limits": {"memory": str, "nvidia.com/gpu": INTEGER},
            },
            "volumeMounts": [{"name": str, "mountPath": re.compile("/.*"), "readOnly": bool}],
        }
    ],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str},
            "configMap": {"name": LABEL},
            "emptyDir": {"medium": "Memory", "sizeLimit": str},
        }
    ],
}
REPLICA = {"replicas": int, "restartPolicy": "ExitCode", "template": {"spec": POD}}
PYTORCHJOB = {
    "apiVersion": "kubeflow.org/v1",
    "kind": "PyTorchJob",
    "metadata": {"name": LABEL},
    "spec": {
        "nprocPerNode": INTEGER,
        "runPolicy": {"cleanPodPolicy": "Running"},
        "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA},
    },
}
CONFIG_MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": LABEL}, "data": {"config.yaml": str}}
OPTIONAL = {"readOnly", "persistentVolumeClaim", "configMap", "emptyDir", "nvidia.com/gpu", "Worker"}


def misfits(value: Any, shape: Any, where: str = "") -> list[str]:
    """Where a document is not of a shape: dictionaries have just these keys, lists items of one shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{where}: no mapping"]
        found = [f"{where}.{key}: unknown" for key in value.keys() - shape.keys()]
        found += [f"{where}.{key}: missing" for key in shape.keys() - value.keys() - OPTIONAL]
        return found + [
            m for key in value.keys() & shape.keys() for m in misfits(value[key], shape[key], f"{where}.{key}")
        ]
    if isinstance(shape, list):
        items = enumerate(value) if isinstance(value, list) else ()
        bad = [m for i, item in items for m in misfits(item, shape[0], f"{where}.{i}")]
        return bad if isinstance(value, list) and value else [f"{where}: no list"]
    if isinstance(shape, re.Pattern):
        return [] if isinstance(value, str) and shape.fullmatch(value) else [f"{where}: {value!r}"]
    if isinstance(shape, type):
        return [] if type(value) is shape else [f"{where}: {value!r} is no {shape.__name__}"]
    return [] if value == shape and type(value) is type(shape) else [f"{where}: {value!r}, not {shape!r}"]


def test_the_shipped_and_the_rendered_manifest_are_what_the_operator_reads(config: str) -> None:
    shipped = list(yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "pytorchjob.yaml").read_text()))
    for config_map, made in (shipped, manifest(plan(config)), manifest(plan(config, nodes=1, gpus=0))):
        assert misfits(made, PYTORCHJOB) == []
        assert misfits(config_map, CONFIG_MAP) == []
        replicas = made["spec"]["pytorchReplicaSpecs"]
        assert replicas["Master"]["replicas"] == 1
        for replica in replicas.values():
            pod = replica["template"]["spec"]
            container = pod["containers"][0]
            assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
            assert all(len(volume) == 2 for volume in pod["volumes"])
            variables = {variable["name"]: variable["value"] for variable in container["env"]}
            assert variables["RANKS"] == made["spec"]["nprocPerNode"]
            assert [v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v] == [
                config_map["metadata"]["name"]
            ]
        assert made["metadata"]["name"] == config_map["metadata"]["name"]
        configuration.validate(yaml.safe_load(config_map["data"]["config.yaml"]))
    broken = manifest(plan(config))[1]
    broken["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["hostNetwork"] = True
    assert misfits(broken, PYTORCHJOB) == [".spec.pytorchReplicaSpecs.Master.template.spec.hostNetwork: unknown"]


def test_the_manifest_asks_for_what_was_planned(config: str) -> None:
    made = planned(
        config, {"optim.lr": "0.5", "sample.prompt": "yes: {a}\n'$(x)'"}, nodes=3, ranks=8, gpus=8, run="r/x"
    )
    config_map, document = manifest(made, volume="shared", cpus=6, secret="s", grace_s=90)
    assert configuration.validate(yaml.safe_load(config_map["data"]["config.yaml"])) == made.config
    spec = document["spec"]["pytorchReplicaSpecs"]
    assert {role: replica["replicas"] for role, replica in spec.items()} == {"Master": 1, "Worker": 2}
    pod = spec["Worker"]["template"]["spec"]
    container = pod["containers"][0]
    assert (container["image"], container["args"]) == ("mbtrain:1", [job.IN_IMAGE, "--run=r/x"])
    assert container["resources"]["requests"] == {"cpu": "48", "memory": "256Gi"}
    assert container["resources"]["limits"] == {"memory": "256Gi", "nvidia.com/gpu": "8"}
    assert {e["name"]: e["value"] for e in container["env"]} == {"RANKS": "8", "RETRIES": "5", "OMP_NUM_THREADS": "6"}
    assert container["envFrom"][0]["secretRef"]["name"] == "s"
    assert pod["terminationGracePeriodSeconds"] == 90
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "shared"
    alone = manifest(planned(config, {}, ranks=2))[1]["spec"]["pytorchReplicaSpecs"]
    assert list(alone) == ["Master"]
    assert "nvidia.com/gpu" not in alone["Master"]["template"]["spec"]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize(
    "bad",
    [{"image": ""}, {"image": "a b"}, {"volume": "A"}, {"volume": ""}, {"secret": "x\ny"}, {"memory": "lots"}],
    ids=str,
)
def test_a_name_that_kubernetes_would_refuse_is_refused_here(config: str, bad: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(bad))}: expected"):
        manifest(plan(config), **bad)
    with pytest.raises(ConfigError, match="--run: expected a folder"):
        manifest(plan(config, run="runs/$(HOSTNAME)"))


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True))
def test_names_become_labels(name: str) -> None:
    label = dns_label(name)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", label)
    assert len(label) + len("-worker-1234") <= 63
    assert dns_label(label) == label
    assert (label == name) == (re.fullmatch(LABEL, name) is not None)


def test_names_that_differ_become_labels_that_differ() -> None:
    names = ["big.run", "big-run", "Big-run", "big_run", "1", "run-1", "x" * 41, "x" * 42, "--"]
    assert len({dns_label(name) for name in names}) == len(names)
    assert dns_label("big-run") == "big-run"


def test_without_the_templates_it_says_so(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "LAUNCH", tmp_path)
    with pytest.raises(ConfigError, match=r"train.slurm: cannot be read .*files of a checkout"):
        slurm(plan(config), cpus=1, time="1")
    (tmp_path / "train.slurm").write_text("#SBATCH --nodes=1\n")
    with pytest.raises(ConfigError, match="has no line for job-name, "):
        slurm(plan(config), cpus=1, time="1")


def test_the_verb(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("job", "check", config, "--nodes=2", "--gpus=4", "--run=runs/x", "--resume", "--json") == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "runs/x"
    expected = {"run": "runs/x", "nodes": 2, "ranks": 8, "micro_batch_size": 6, "accumulation": 1}
    assert json.loads(said.out.splitlines()[1]) == expected
    assert said.err == "2 x 4 = 8 ranks: 48 rows a step, 6 on each; run runs/x\n"

    out = tmp_path / "made"
    assert run("job", "slurm", config, "--nodes=2", "--gpus=4", f"--out={out}", "--optim.lr=0.5") == 0
    assert f'set -- {config} --run=runs/tiny --optim.lr=0.5 "$@"' in out.read_text()
    capsys.readouterr()
    assert run("job", "slurm", config, f"--out={out}/no") == 2
    assert f"mbtrain: --out={out}/no: cannot be written (Not a directory)" in capsys.readouterr().err
    assert run("job", "kubernetes", config, "--gpus=0", "--ranks=2", "--image=mbtrain:1") == 0
    assert len(list(yaml.safe_load_all(capsys.readouterr().out))) == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "job: expected one of check, slurm, kubernetes, got nothing"),
        (["pbs", "{config}"], "job: expected one of check, slurm, kubernetes, got pbs"),
        (["slurm"], "CONFIG: expected one configuration file, got 0"),
        (["slurm", "{config}", "--nodes=0"], "--nodes: expected a whole number of at least 1, got '0'"),
        (["slurm", "{config}", "--node=2"], "--node: no such option (did you mean nodes?)"),
        (["slurm", "{config}", "--gpus=2", "--ranks=3"], "--ranks=3, --gpus=2: expected as many ranks as GPUs"),
        (["slurm", "{config}", "--hostfile=h"], "--hostfile: only `mbtrain job check`"),
        (["kubernetes", "{config}"], "--image: expected an image's name"),
        (["check", "{config}", "--gpus=7"], "train.global_batch_size: got 48, expected a multiple of"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(
    args: list[str], words: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("job", *(arg.format(config=config) for arg in args)) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
