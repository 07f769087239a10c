"""Nothing that comes from a checkpoint, shard, configuration or server is executed; no secret is said; nobody listens.

First laws, read off the source; then attacks, planted where a user's files would be. An attack that runs leaves a file.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mbtrain import checkpoint, config, log, metrics, redact, tracking
from mbtrain.checkpoint import Progress, Stored
from mbtrain.errors import CheckpointError, ConfigError, DataError, MbtrainError
from mbtrain.tracking import files, sending
from tests import launch, tiny
from tests.launch import ROOT
from tests.mlflow_server import Server
from tests.test_tracking import expected_points, make_run, wait_until

SOURCES = sorted(path for package in ("mbtrain", "data_prep") for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted(path for path in (ROOT / "launch").rglob("*") if path.is_file())
SECRET = "hunter2-and-more"


class Bomb:
    """What unpickles as a call."""

    def __init__(self, planted: Path) -> None:
        self.planted = planted

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.planted),)


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Path]:
    """What an attack that runs makes; it must not be there in the end."""
    path = tmp_path / "planted"
    yield path
    assert not path.exists()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for key in [key for key in os.environ if key.startswith("MLFLOW_")]:
        monkeypatch.delenv(key)
    for key, value in tracking.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)


# --- Laws ---

# The module, or a call by its full name; what stands there executes what it reads, or hands it to a shell.
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "jsonpickle",
    "commands",
}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "np.load",
    "numpy.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
    "shutil.unpack_archive",
    "tempfile.mktemp",
    "runpy.run_path",
}
FORBIDDEN_METHODS = {"extractall", "extract", "load_checkpoint", "save_checkpoint", "render_template_string"}
# Imports by a name that is not written there: each is given names of this program's own.
IMPORTS_BY_NAME = {"mbtrain/engine.py", "data_prep/modalities.py"}


def broken_laws(text: str, where: str = "") -> list[str]:
    """Lines of a Python source that break a law, with what breaks it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node, name) for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in FORBIDDEN_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS):
            found.append((node, name))
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in (("shell", True), ("allow_pickle", True), ("verify", False)):
                found.append((node, f"{keyword.arg}={value}"))
            if keyword.arg == "shell" and not isinstance(keyword.value, ast.Constant):
                found.append((node, "shell="))
        if name.startswith("subprocess.") and node.args and isinstance(node.args[0], ast.Constant | ast.JoinedStr):
            found.append((node, "a command in one text"))
        if name.endswith("import_module") and where not in IMPORTS_BY_NAME:
            found += [(node, name)] * (not node.args or not isinstance(node.args[0], ast.Constant))
        if name.endswith((".bind", "create_server", "HTTPServer")) and "0.0.0.0" in ast.unparse(node):
            found.append((node, "listens on all interfaces"))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.List | ast.Tuple):  # ["sh", "-c", SCRIPT, argument ...]: the script a constant
            for flag, script in zip(node.elts, node.elts[1:], strict=False):
                named = isinstance(script, ast.Constant) or ast.unparse(script).lstrip("_").isupper()
                if isinstance(flag, ast.Constant) and flag.value == "-c" and not named:
                    found.append((node, "-c with a text that is put together"))
    return [f"{where}:{node.lineno} {what}" for node, what in found]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(x)",
        "torch.load(p)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t, Loader=yaml.Loader)",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "subprocess.run(f'ls {x}')",
        "subprocess.run(['sh', '-c', f'ls {x}'])",
        "importlib.import_module(name)",
        "tar.extractall(p)",
        "HTTPServer(('0.0.0.0', 1), H)",
        "requests.get(u, verify=False)",
    ],
)
def test_the_law_sees(line: str) -> None:
    assert broken_laws(line)


def test_nothing_in_the_sources_executes_what_it_reads() -> None:
    found = [line for path in SOURCES for line in broken_laws(path.read_text(), path.relative_to(ROOT).as_posix())]
    assert not found


def test_nothing_in_the_scripts_does_either() -> None:
    """No eval in the shell, and the Python between the lines under the same laws."""
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        assert not re.search(r"(^|[;&|]\s*|\$\()\s*(eval|source /dev|\. /dev)\b", code, re.MULTILINE), path
        assert not re.search(r"curl[^\n]*\|\s*(ba)?sh|StrictHostKeyChecking[= ]no|--privileged|0\.0\.0\.0", code), path
        for program in re.findall(r"<<'PYTHON'\n(.*?)\nPYTHON\n", text, re.DOTALL):
            assert not broken_laws(program, path.name)


# --- Configurations ---


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir ['{planted}']",
        "name: !!python/object/apply:os.mkdir ['{planted}']",
        "name: !!python/object/new:os.mkdir ['{planted}']\nmodel: {{}}",
        "? !!python/object/apply:subprocess.check_output [['mkdir', '{planted}']]\n: 1",
    ],
)
def test_a_configuration_is_data(text: str, tmp_path: Path, planted: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text.format(planted=planted))
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(path)
    assert sending._config_params(path) == {}


def test_an_override_is_data(tmp_path: Path, planted: Path) -> None:
    path = launch.config_file(tmp_path, tiny.tree())
    for value in (
        f"[!!python/object/apply:os.mkdir ['{planted}']]",
        f"{{a: !!python/object/apply:os.mkdir [{planted}]}}",
    ):
        with pytest.raises(ConfigError):
            config.load(path, {"train.steps": value})
    with pytest.raises(ConfigError):
        config.load(path, {"name": "../../outside"})
    with pytest.raises(ConfigError):
        config.load(path, {"name": "a\n"})


# --- Checkpoints ---


def checkpoint_of(folder: Path, contents: dict[str, bytes], **changed: Any) -> Path:
    """A checkpoint whose record fits its files, as only its author could make it."""
    from hashlib import sha256

    folder.mkdir(parents=True)
    for name, content in contents.items():
        if "/" not in name and name not in ("", ".", ".."):
            (folder / name).write_bytes(content)
    hashes = {name: sha256(content).hexdigest() for name, content in contents.items()}
    record = {
        "format": checkpoint.FORMAT,
        "progress": Progress(step=1).__dict__,
        "shapes": {"w": [2]},
        "sha256": hashes,
    }
    record |= changed
    record["self"] = checkpoint._record_hash(record)
    (folder / "checkpoint.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("name", ["../outside", "../../../outside", "{tmp}/outside", "..", ".", "", "a/../../outside"])
def test_a_checkpoint_names_files_of_its_own_only(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    (tmp_path / "run" / "outside").parent.mkdir()
    (tmp_path / "run" / "outside").write_bytes(b"x")
    folder = checkpoint_of(tmp_path / "run" / "step_0000000001", {name.format(tmp=tmp_path): b"x"})
    with pytest.raises(CheckpointError):
        checkpoint.verify(folder)


def header(tensors: dict[str, Any], data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def f32(start: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


LIES = {
    "a header of 2**63 bytes": header({"w@0": f32(0, 8, [2])}, length=2**63),
    "a header of 90 MB": header({"w@0": f32(0, 8, [2])}, length=90_000_000),
    "offsets beyond the end": header({"w@0": f32(0, 2**40, [2**38])}),
    "offsets backwards": header({"w@0": f32(8, 0, [2])}),
    "overlapping": header({"w@0": f32(0, 8, [2]), "v@0": f32(4, 8, [1])}),
    "a shape that overflows": header({"w@0": f32(0, 8, [2**63, 2**63])}),
    "a start beyond all": header({f"w@{2**70}": f32(0, 8, [2])}),
    "a start that is none": header({"w@-5": f32(0, 8, [2])}),
    "no name": header({"": f32(0, 8, [2])}),
    "another type": header({"w@0": {"dtype": "__import__('os')", "shape": [2], "data_offsets": [0, 8]}}),
    "a matrix": header({"w@0": f32(0, 8, [1, 2])}),
    "nothing": b"",
    "deep": b"\xff\xff\0\0\0\0\0\0" + b"[" * 65535,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies(lie: str, tmp_path: Path) -> None:
    content = LIES[lie]
    folder = checkpoint_of(tmp_path / "step_0000000001", {"weights-00000-of-00001.safetensors": content})
    found = checkpoint.verify(folder)
    before = psutil.Process().memory_info().rss
    with pytest.raises(CheckpointError):
        Stored(found)
    assert psutil.Process().memory_info().rss - before < 100e6


def test_a_pickle_is_no_checkpoint(tmp_path: Path, planted: Path) -> None:
    import torch

    torch.save({"w": Bomb(planted)}, tmp_path / "zip")
    for i, content in enumerate((pickle.dumps(Bomb(planted)), (tmp_path / "zip").read_bytes())):
        names = ("weights-00000-of-00001.safetensors", "moments-00000-of-00001.safetensors", "mp_rank_00_states.pt")
        folder = checkpoint_of(tmp_path / str(i) / "step_0000000001", dict.fromkeys(names, content))
        with pytest.raises(CheckpointError):
            Stored(checkpoint.verify(folder))


@pytest.mark.parametrize(
    "changed",
    [
        {"progress": {"step": "../../x"}},
        {"progress": {"unknown": 1}},
        {"progress": 5},
        {"shapes": {"w": ["x"]}},
        {"shapes": [1]},
        {"sha256": 7},
        {"format": {}},
    ],
)
def test_a_record_of_other_kinds(changed: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "step_0000000001", {}, **changed)
    with pytest.raises(CheckpointError):
        checkpoint.verify(folder)


def test_a_record_without_end(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_0000000001"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError):
        checkpoint.verify(folder)
    found, problems = checkpoint.newest(tmp_path)
    assert (found, len(problems)) == (None, 1)


def test_removing_follows_no_link(tmp_path: Path) -> None:
    """Retention, leftovers, and what stands in their folders."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "precious").write_text("x")
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("step_0000000001", ".step_0000000002.tmp", ".step_0000000003.old"):
        (folder / name).symlink_to(outside, target_is_directory=True)
    old = folder / "step_0000000004"
    old.mkdir()
    (old / "link").symlink_to(outside, target_is_directory=True)
    new = checkpoint.begin(run, 9)
    checkpoint.finish(new, Progress(step=9), {}, {}, keep_last=1)
    checkpoint.sweep(run)
    checkpoint.clear(run)
    assert [path.name for path in folder.iterdir()] == ["step_0000000009"]
    assert (outside / "deep" / "precious").read_text() == "x"


# --- Shards ---


@pytest.mark.parametrize("bad", ["../../outside", "/etc/passwd", "train-000001", "train-000000/../x", ""])
def test_a_manifest_names_shards_of_its_own_only(bad: str, shards: Path, tmp_path: Path) -> None:
    from mbtrain import shards as format_

    value = json.loads((shards / "manifest.json").read_bytes())
    value["splits"]["train"]["shards"][0]["name"] = bad
    (tmp_path / "manifest.json").write_bytes(format_._manifest_bytes(value))
    with pytest.raises(DataError, match="expected shard train-000000"):
        format_.open_split(tmp_path, "train")


def test_a_manifest_names_splits_only(shards: Path, tmp_path: Path) -> None:
    from mbtrain import shards as format_

    for name in ("../train", "/etc", "a/b", ".."):
        value = json.loads((shards / "manifest.json").read_bytes())
        value["splits"][name] = value["splits"]["train"]
        (tmp_path / "manifest.json").write_bytes(format_._manifest_bytes(value))
        with pytest.raises(DataError, match="not a split's name"):
            format_.load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError):
        format_.load_manifest(tmp_path)


# --- Run directories, and what a tracking server answers ---


def test_a_run_directory_of_others_sends_nothing_but_its_own(tmp_path: Path) -> None:
    """Links in it name files of the user who syncs it."""
    run = make_run(tmp_path / "run", steps=2)
    private = tmp_path / "private"
    private.mkdir()
    (private / "id_rsa").write_text(SECRET)
    (run / "samples" / "link.txt").symlink_to(private / "id_rsa")
    (run / "samples" / "folder").symlink_to(private, target_is_directory=True)
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to(private / "id_rsa")
    (run / "plots").rmdir()
    (run / "export" / "model.safetensors").unlink()
    (run / "export").rmdir()
    (run / "export").symlink_to(private, target_is_directory=True)
    with Server() as server:
        tracking.sync(run, uri=server.uri)
        assert not any(SECRET in content.decode(errors="replace") for content in server.state.files.values())
        assert len(server.state.files) == 4  # config, environment, a sample, the picture


@pytest.mark.parametrize("root", ["file://{tmp}/target", "{tmp}/target", "runs:/a/b", "models:/a/1"])
def test_a_server_writes_no_file_here(root: str, tmp_path: Path, planted: Path) -> None:
    """Where a run's files go is the server's answer; a path would be one of this machine."""
    run = make_run(tmp_path / "run", steps=2)
    with Server() as server:
        server.state.artifact_root = root.format(tmp=tmp_path)
        with pytest.raises(MbtrainError, match="a path on this machine"):
            tracking.sync(run, uri=server.uri)
        assert server.state.points() == expected_points(run)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mlflow.json", {"run_id": "../../x", "experiment_id": "1", "tracking_uri": "http://127.0.0.1:9"}),
        ("mlflow.json", {"run_id": 5, "experiment_id": [], "tracking_uri": {}}),
        ("mlflow.json", {"run_id": "a" * 32}),
        ("tracking.json", {"run_id": "x' or 1=1 --", "experiment": 7, "run_name": [], "trainer": {"pid": "no"}}),
        (
            "tracking.json",
            {"run_id": {}, "trainer": {"host": socket.gethostname(), "pid": -5, "started": 1, "token": ""}},
        ),
        ("status.json", {"status": "FINISHED; rm", "message": 5}),
        ("status.json", {"status": "FAILED", "message": {"a": [1]}}),
        (".mlflow_sent.json", {"files": [1], "run_id": 3}),
        (".mlflow.lock", {"host": 5, "pid": "x"}),
        ("environment.json", {"tags": ["x"]}),
        ("environment.json", {"tags": {"a\nb\x1b": {"c": 1}}}),
        ("run_uid", "x' or tags.`a` = 'b"),
    ],
)
def test_a_run_directory_that_says_odd_things(name: str, content: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    (run / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with Server() as server:
        assert tracking.sync(run, uri=server.uri)["metrics"] == expected_points(run).total()
    assert files.is_run_id(tracking.run_id(run))


def test_a_line_without_end_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open(path, "wb") as file:
        file.truncate(4 << 30)
    before = psutil.Process().memory_info().rss
    with metrics.Tail(path) as tail, pytest.raises(DataError, match="a line of more than"):
        tail.read()
    assert psutil.Process().memory_info().rss - before < 100e6
    path.write_text("[" * 100_000 + "\n")
    with metrics.Tail(path) as tail, pytest.raises(DataError):
        tail.read()


# --- Words that a terminal would obey ---


def test_a_log_line_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.say(tmp_path, "run \x1b]0;title\x07\x1b[2Jname\n12:00:00  step 9 · loss 0\r\x9b31m")
    written = (tmp_path / "log.txt").read_text()
    assert written.count("\n") == 1
    assert "\x1b" not in written + capsys.readouterr().err
    assert "\\x1b[2Jname 12:00:00" in written


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from mbtrain.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["train", "no\x1b[2J\nsuch.yaml"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "\x1b" not in said
    assert said.count("\n") == 1


# --- Secrets ---


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host:5000/x", "http://host:5000/x"),
        ("https://token@host/x", "https://host/x"),
        ("get http://me:p@ss:w/rd@host/x failed", "get http://host/x failed"),
        ("postgresql+psycopg2://me:p%40w@host/db", "postgresql+psycopg2://me@host/db"),
        ("mysql://me:12345@host/db", "mysql://me@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
        ("http://a/b http://u:p@c", "http://a/b http://c"),
        (
            "https://b.s3/x?X-Amz-Signature=abc&a=1&X-Amz-Credential=k",
            "https://b.s3/x?X-Amz-Signature=***&a=1&X-Amz-Credential=***",
        ),
        ("postgresql://h/d?password=pw", "postgresql://h/d?password=***"),
        ("mail me@host.org about a: b@c", "mail me@host.org about a: b@c"),
    ],
)
def test_without_password(text: str, shown: str) -> None:
    assert redact.without_password(text) == shown
    assert redact.without_password(shown) == shown


def test_redact_knows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-or-true")
    monkeypatch.setenv("A_PASSWORD", "short")
    assert redact.redact(f"Bearer {SECRET}, false-or-true, short") == "Bearer ***, false-or-true, short"


def test_a_password_has_no_place_in_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be copied to the run directory and to MLflow; so it is refused, and not repeated."""
    from mbtrain.cli import main

    for uri in (f"http://me:{SECRET}@host:5000", f"postgresql://me:{SECRET}@host/db", f"https://{SECRET}@host"):
        with pytest.raises(ConfigError, match=r"log\.mlflow_uri: .* MLFLOW_TRACKING_URI") as refused:
            tiny.make(log={"mlflow_uri": uri})
        assert SECRET not in str(refused.value)
        path = launch.config_file(tmp_path, tiny.tree())
        for key in ("log.mlflow_uri", "log.mlflow_url", "train.steps"):
            with pytest.raises(SystemExit):
                main(["train", str(path), f"--{key}={uri}"])
    assert SECRET not in capsys.readouterr().err
    assert tiny.make(log={"mlflow_uri": "postgresql://me@host/db"}).log.mlflow_uri == "postgresql://me@host/db"


def test_a_password_is_nowhere_but_in_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the run directory, not in MLflow, not in the processes' arguments; with a server that repeats it."""
    run = make_run(tmp_path / "run", steps=5)
    monkeypatch.setenv("A_TOKEN", SECRET)
    with Server() as server:
        server.repeats = True
        with_password = f"http://me:{SECRET}@127.0.0.1:{server.port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password)
        server.behave("500")
        shipper = tracking.start_shipper(run, tracking.default_uri(), "exp", "run", interval_s=0.1)
        assert shipper is not None
        wait_until(lambda: "trying again" in (run / "mlflow.log").read_text(), 120)
        # A process that has ended and was not waited for has none.
        arguments = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        server.behave("well")
        assert tracking.finish(shipper, run, "FAILED", timeout_s=120, message=f"lost {with_password}")
        assert server.state.points() == expected_points(run)
        expected = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
        assert all(sent.get("Authorization") == expected for sent in server.headers)
        told = str(server.state)
    assert SECRET not in told
    assert not any(SECRET in line for line in arguments)
    for path in run.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    assert "500" in (run / "mlflow.log").read_text()


def test_the_pages_get_their_store_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are seen by every user of the machine. And the pages are for this machine alone."""
    calls: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    tracking.ui(uri=f"postgresql://me:{SECRET}@host/db")
    _, command, environment = calls[0]
    assert SECRET not in " ".join(command)
    assert SECRET in environment["MLFLOW_BACKEND_STORE_URI"]
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_data_prep_shows_no_password(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from data_prep.cli import main
    from data_prep.remote import shown

    assert shown(f"https://me:{SECRET}@host/a.tar?sig={SECRET}") == "https://host/a.tar"
    with pytest.raises(SystemExit) as ended:
        main(["text", f"ftp://me:{SECRET}@host/a.tar?token={SECRET}", f"--out={tmp_path / 'out'}"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "ftp://" in said.err
    assert SECRET not in said.err + said.out


# --- Paths that a shell would act on, and who listens ---


def test_a_path_is_never_read_by_a_shell(shards: Path, tmp_path: Path, planted: Path) -> None:
    """Data prep and training in folders whose names are commands, with spaces, quotes and a leading dash."""
    from data_prep.cli import main

    names = [
        "$(mkdir planted)",
        "; mkdir planted #",
        "`mkdir planted`",
        "a 'b' \"c\"",
        "-rf",
        "--out=x",
        "\n mkdir planted",
    ]
    for i, name in enumerate(names):
        source = tmp_path / f"sources{i}" / name
        source.mkdir(parents=True)
        (source / name).write_bytes(b"a document")
        with pytest.raises(SystemExit) as ended:
            main(["text", str(source), f"--out={tmp_path / 'out' / name}", "--splits=train=1", "--workers=1"])
        assert ended.value.code == 0
    run = "; mkdir planted; $(mkdir planted) 'q' -x"
    path = launch.config_file(tmp_path, tiny.tree(data={"path": str(shards)}, train={"steps": 1}))
    launch.mbtrain(["train", str(path), f"--run={run}"], cwd=tmp_path)
    assert (tmp_path / run / "metrics.jsonl").exists()


def test_a_training_of_one_host_listens_on_loopback_alone() -> None:
    """What ranks tell each other is pickled: whoever reaches their sockets commands them."""
    program = (
        "import json, psutil, sys; from mbtrain.engine import start, stop; start();"
        "open_ = psutil.Process().net_connections('inet');"
        "sys.stdout.write(json.dumps([c.laddr.ip for c in open_ if c.status == 'LISTEN'])); sys.stdout.flush(); stop()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=launch.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    listening = json.loads(done.stdout.strip().splitlines()[-1])
    assert listening, done.stderr
    assert set(listening) <= {"127.0.0.1", "::1"}
