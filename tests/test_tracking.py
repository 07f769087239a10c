"""MLflow gets every point of a run exactly once, whoever is killed, and a step never waits for it."""

import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mbtrain import metrics, tracking
from mbtrain.errors import MbtrainError
from mbtrain.tracking import files, sending
from mbtrain.tracking import shipper as shipping

ROOT = Path(__file__).parents[1]
CONFIG = {
    "train": {"steps": 100, "resume": None},
    "optim": {"lr": 0.001, "betas": [0.9, 0.95]},
    "model": {"stages": [{"d_model": 64}, {"d_model": 32}], "tied": True},
    "name": "a" * 7000,
}
FAST = {"interval_s": 0.2, "deadline_s": 30.0}
Spawn = Callable[..., "subprocess.Popen[bytes]"]


def make_run(run: Path, steps: int = 20) -> Path:
    for folder in ("samples", "plots", "checkpoints/step_0000000010", "export"):
        (run / folder).mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (run / "environment.json").write_text(json.dumps({"tags": {"commit": "abc123", "host": "h1", "ranks": 2}}))
    (run / "log.txt").write_text("step 1\n")
    (run / "samples" / "step_0000000010.txt").write_text("a sample")
    (run / "samples" / ".half.txt.tmp").write_text("somebody is writing this")
    (run / "checkpoints" / "step_0000000010" / "weights.bin").write_text("large")
    (run / "export" / "model.safetensors").write_text("weights")
    log_steps(run, 1, steps)
    return run


def log_steps(run: Path, first: int, last: int, offset: float = 0.0) -> None:
    for step in range(first, last + 1):
        values = {"train/bpb": 8 / step + offset, "optim/lr": 1e-3, "progress/bytes": step * 4096}
        if step % 5 == 0:
            values["val/bpb"] = 8 / step + 0.5
        metrics.append(run / "metrics.jsonl", step, values)


def expected_points(run: Path) -> Counter[tuple[str, int]]:
    lines = metrics.read(run / "metrics.jsonl")
    return Counter((key, line["step"]) for line in lines for key in line if key not in ("step", "time_unix_s"))


def query(uri: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    with sqlite3.connect(f"file:{uri.removeprefix('sqlite:///')}?mode=ro", uri=True, timeout=30) as connection:
        return connection.execute(sql, values).fetchall()


def points(uri: str) -> Counter[tuple[str, int]]:
    return Counter(query(uri, "select key, step from metrics"))


def status(uri: str) -> str:
    """Of the one run; empty while the shipper has not made it yet."""
    try:
        rows = query(uri, "select status from runs")
    except sqlite3.OperationalError:
        rows = []
    return rows[0][0] if rows else ""


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where a default store would come to stand
    for key in [key for key in os.environ if key.startswith("MLFLOW_")]:
        monkeypatch.delenv(key)
    for key, value in tracking.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def spawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spawn]:
    """`start_shipper` whose processes, and those that `finish` starts, do not outlive the test."""
    started = []
    popen = tracking.trainer._spawn

    def remember(*args: Any) -> "subprocess.Popen[bytes]":
        started.append(popen(*args))
        return started[-1]

    monkeypatch.setattr(tracking.trainer, "_spawn", remember)
    yield tracking.start_shipper
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path], list[int]]:
    """Two runs that started together on a store that did not exist: (uri, runs, exit statuses).

    Its database is also the one that the other tests copy: MLflow takes seconds to make one.
    """
    root = tmp_path_factory.mktemp("fresh")
    uri = tracking.default_uri(root) if "MLFLOW_TRACKING_URI" not in os.environ else f"sqlite:///{root}/mlflow.db"
    runs = [make_run(root / name) for name in ("one", "two")]
    shippers = [tracking.start_shipper(run, uri, "together", run.name, **FAST, run_id=None) for run in runs]
    for run in runs:
        (run / "status.json").write_text('{"status": "FINISHED"}')
    return uri, runs, [shipper.wait(120) for shipper in shippers]


@pytest.fixture
def uri(fresh: tuple[str, list[Path], list[int]], tmp_path: Path) -> str:
    """A migrated store without runs."""
    database = tmp_path / "mlruns" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(fresh[0].removeprefix("sqlite:///"), database)
    with sqlite3.connect(database) as connection:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            connection.execute(f"delete from {table}")
        connection.execute("delete from experiments where name = 'together'")
    connection.close()
    return f"sqlite:///{database}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def artifacts(uri: str, run: Path) -> dict[str, str]:
    folder = Path(uri.removeprefix("sqlite:///")).parent / "artifacts" / str(tracking.run_id(run)) / "artifacts"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().decode(errors="replace")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- With a shipper in its own process ---


def test_two_runs_start_together_on_a_store_that_does_not_exist(fresh: tuple[str, list[Path], list[int]]) -> None:
    uri, runs, exits = fresh
    assert exits == [0, 0], [(run / "mlflow.log").read_text() for run in runs]
    assert query(uri, "select name, status from runs order by name") == [("one", "FINISHED"), ("two", "FINISHED")]
    assert query(uri, "select count(*) from experiments where name = 'together'") == [(1,)]
    for run in runs:
        found = query(uri, "select key, step from metrics where run_uuid = ?", tracking.run_id(run))
        assert Counter(found) == expected_points(run)


def test_a_run_from_start_to_end(uri: str, run: Path, spawn: Spawn) -> None:
    """Params, tags, artifacts and points arrive while it runs; steps that are made again arrive once."""
    called = time.monotonic()
    shipper = spawn(run, uri, "exp", "my run", **FAST)
    assert time.monotonic() - called < 0.5
    wait_until(lambda: points(uri) == expected_points(run))
    assert status(uri) == "RUNNING"

    # Resumed in place from step 10: the steps after it are made again, with other values.
    first_values = dict(query(uri, "select step, value from metrics where key = 'train/bpb'"))
    assert metrics.truncate_after(run / "metrics.jsonl", 10) == 10
    log_steps(run, 11, 30, offset=0.25)
    (run / "samples" / "step_0000000030.txt").write_text("a better sample")
    assert tracking.finish(shipper, run, "FINISHED", timeout_s=60)

    assert shipper.returncode == 0
    assert points(uri) == expected_points(run)
    values = dict(query(uri, "select step, value from metrics where key = 'train/bpb'"))
    assert {step: values[step] for step in first_values} == first_values
    assert values[30] == 8 / 30 + 0.25
    at = dict(query(uri, "select step, timestamp from metrics where key = 'train/bpb'"))
    assert at[1] == round(1000 * metrics.read(run / "metrics.jsonl")[0]["time_unix_s"])
    assert status(uri) == "FINISHED"
    assert dict(query(uri, "select key, value from params")) == {
        "train.steps": "100",
        "train.resume": "null",
        "optim.lr": "0.001",
        "optim.betas": "[0.9, 0.95]",
        "model.stages.0.d_model": "64",
        "model.stages.1.d_model": "32",
        "model.tied": "true",
        "name": "a" * 6000,
    }
    tags = dict(query(uri, "select key, value from tags"))
    assert (
        tags.items()
        >= {
            "mlflow.runName": "my run",
            "mlflow.source.name": "mbtrain",
            "mbtrain.run_dir": str(run),
            "mbtrain.run_uid": (run / "run_uid").read_text().strip(),
            "commit": "abc123",
            "mlflow.source.git.commit": "abc123",
            "ranks": "2",
        }.items()
    )
    sent = artifacts(uri, run)
    assert sorted(sent) == [
        "config.yaml",
        "environment.json",
        "export/model.safetensors",
        "log.txt",
        "plots/loss.png",
        "samples/step_0000000010.txt",
        "samples/step_0000000030.txt",
    ]
    assert sent["samples/step_0000000030.txt"] == "a better sample"
    assert (run / "plots" / "loss.png").stat().st_size > 10_000


def test_kill_9_of_the_shipper(uri: str, run: Path, spawn: Spawn) -> None:
    """Whatever it had sent, the next one goes on from there; `finish` starts one if there is none."""
    log_steps(run, 21, 1500)
    shipper = spawn(run, uri, "exp", "run", **FAST)
    wait_until(lambda: points(uri))
    shipper.kill()
    shipper.wait()
    log_steps(run, 1501, 1600)
    assert tracking.finish(shipper, run, "FAILED", timeout_s=60, message="loss was nan")
    assert points(uri) == expected_points(run)
    assert query(uri, "select status from runs") == [("FAILED",)]
    assert query(uri, "select value from tags where key = 'mbtrain.status_message'") == [("loss was nan",)]


def test_kill_9_of_the_trainer(uri: str, run: Path) -> None:
    code = f"import time; from mbtrain import tracking as t; t.start_shipper({str(run)!r}, {uri!r}, 'exp', 'run')"
    trainer = subprocess.Popen([sys.executable, "-c", code + "; time.sleep(99)"], cwd=ROOT)
    wait_until(lambda: (run / "run_uid").exists())
    trainer.send_signal(signal.SIGKILL)  # and not waited for: it stays a zombie, as under a launcher
    wait_until(lambda: status(uri) == "KILLED")
    trainer.wait()
    assert points(uri) == expected_points(run)
    with open(run / ".mlflow.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the shipper has ended


@pytest.mark.parametrize("server", ["refuses", "never answers"])
def test_a_server_that_is_gone(
    server: str,
    uri: str,
    run: Path,
    spawn: Spawn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing waits for it, the shipper gives up in time, the picture is drawn, and `sync` delivers all later."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if server == "never answers":
            listener.listen()
        called = time.monotonic()
        shipper = spawn(run, address, "exp", "run", interval_s=0.2, deadline_s=0.5)
        assert time.monotonic() - called < 0.5
        assert tracking.finish(shipper, run, "FINISHED", timeout_s=0.5) is False
        assert time.monotonic() - called < 3
        assert f"mbtrain sync {run}" in caplog.text
        assert shipper.wait(60) == 1
        with pytest.raises(MbtrainError, match="could not send to MLflow at http") as error:
            tracking.sync(run)
        assert "\n" not in str(error.value)
    assert "gave up" in (run / "mlflow.log").read_text()
    assert (run / "plots" / "loss.png").exists()
    assert tracking.run_id(run) is None

    result = tracking.sync(run, uri=uri)
    assert result["metrics"] == expected_points(run).total()
    assert result["status"] == status(uri) == "FINISHED"
    assert points(uri) == expected_points(run)
    assert len(artifacts(uri, run)) == 6


def test_only_one_shipper_a_run(uri: str, run: Path, spawn: Spawn) -> None:
    with open(run / ".mlflow.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MbtrainError, match="right now"):
            tracking.sync(run, uri=uri)
        shipper = spawn(run, uri, "exp", "run", **FAST)
        json.dump(json.loads((run / "tracking.json").read_text())["trainer"], lock)
        lock.flush()
        assert shipper.wait(30) == 1
    assert "another shipper is at work" in (run / "mlflow.log").read_text()


# --- The same, in this process ---


def test_sync_sends_only_what_is_new(uri: str, run: Path) -> None:
    first = tracking.sync(run, uri=uri, experiment="exp")
    assert first["metrics"] == expected_points(run).total()
    assert first["artifacts"] == len(artifacts(uri, run)) == 6
    assert first["status"] == "RUNNING"  # nobody said that it ended, and it had no shipper
    again = tracking.sync(run, uri=uri, experiment="exp")
    assert again == first | {"metrics": 0, "artifacts": 0}
    metrics.append(run / "metrics.jsonl", 20, {"progress/bytes": 1.0, "val/late": 2.0})  # a second line of a step
    assert tracking.sync(run, uri=uri)["metrics"] == 1
    metrics.truncate_after(run / "metrics.jsonl", 19)
    log_steps(run, 20, 20)
    assert tracking.sync(run, uri=uri)["metrics"] == 0
    log_steps(run, 21, 22)
    (run / "samples" / "step_0000000010.txt").write_text("b sample")  # of the same size
    assert tracking.sync(run, uri=uri, experiment="exp") == first | {
        "metrics": 6,
        "artifacts": 2,
    }  # the sample, the picture
    assert artifacts(uri, run)["samples/step_0000000010.txt"] == "b sample"
    assert points(uri) == expected_points(run) + Counter({("val/late", 20): 1})


def test_a_crash_before_the_run_id_was_written_makes_no_second_run(uri: str, run: Path) -> None:
    first = tracking.sync(run, uri=uri)
    (run / "mlflow.json").unlink()
    assert tracking.sync(run, uri=uri)["run_id"] == first["run_id"] == tracking.run_id(run)
    assert len(query(uri, "select * from runs")) == 1
    assert points(uri) == expected_points(run)


def test_a_store_that_lost_the_run_gets_it_again(uri: str, run: Path) -> None:
    first = tracking.sync(run, uri=uri)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            connection.execute(f"delete from {table}")
    connection.close()
    second = tracking.sync(run, uri=uri)
    assert second["run_id"] != first["run_id"]
    assert (second["metrics"], second["artifacts"]) == (first["metrics"], first["artifacts"])


def test_a_deleted_run_is_not_made_again_behind_the_users_back(uri: str, run: Path) -> None:
    from mlflow import MlflowClient

    MlflowClient(uri).delete_run(tracking.sync(run, uri=uri)["run_id"])
    with pytest.raises(MbtrainError, match="was deleted, so nothing is sent; restore it"):
        tracking.sync(run, uri=uri)


def test_a_resumed_run_with_another_config(uri: str, run: Path) -> None:
    """Params cannot be changed in MLflow: what differs becomes a tag, what is new becomes a param."""
    tracking.sync(run, uri=uri)
    changed = CONFIG | {"train": {"steps": 200, "resume": None}, "seed": 3}
    (run / "config.yaml").write_text(yaml.safe_dump(changed))
    (run / "environment.json").write_text(json.dumps({"tags": {"host": "h2"}}))
    tracking.sync(run, uri=uri)
    params = dict(query(uri, "select key, value from params"))
    tags = dict(query(uri, "select key, value from tags"))
    assert (params["train.steps"], params["seed"], tags["resumed.train.steps"]) == ("100", "3", "200")
    assert [key for key in tags if key.startswith("resumed.")] == ["resumed.train.steps"]
    assert tags["host"] == "h2"
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))  # and back
    tracking.sync(run, uri=uri)
    assert dict(query(uri, "select key, value from tags"))["resumed.train.steps"] == "100"


def test_a_name_for_every_key_and_no_infinity(uri: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"a": float("nan"), "b": float("inf"), "val/c++/bpb": 1.0, "val/../bpb": 2.0, "x" * 300: 3.0}
    metrics.append(run / "metrics.jsonl", 21, values)
    metrics.append(run / "metrics.jsonl", 22, {"b": 1.0})
    (run / "config.yaml").write_text('{"data": {"häuser:1": 1, "": 2}}')
    tracking.sync(run, uri=uri)
    rows = query(uri, "select key, value, is_nan, step from metrics where step > 20 order by key")
    assert rows == [
        ("a", 0.0, 1, 21),
        ("b", 1.0, 0, 22),
        ("val/_/bpb", 2.0, 0, 21),
        ("val/c__/bpb", 1.0, 0, 21),
        ("x" * 250, 3.0, 0, 21),
    ]
    assert "b is inf" in caplog.text
    assert dict(query(uri, "select key, value from params")) == {"data.h_user_1": "1", "data.": "2"}


def test_a_log_batch_that_fails_half_way_is_sent_again_without_a_double(
    uri: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost answer: MLflow has the batch, and we do not know it."""
    from mlflow import MlflowClient

    log_steps(run, 21, 600)
    log_batch = MlflowClient.log_batch

    def lose_the_answer(self: Any, run_id: str, **values: Any) -> None:
        log_batch(self, run_id, **values)
        if values.get("metrics"):
            raise ConnectionError("the answer was lost\nsomewhere")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_batch", lose_the_answer)
        with pytest.raises(MbtrainError, match=r"the answer was lost$"):
            tracking.sync(run, uri=uri)
    assert points(uri).total() == sending.MAX_METRICS
    tracking.sync(run, uri=uri)
    assert points(uri) == expected_points(run)


def test_artifacts_that_cannot_be_stored_stop_no_metrics(
    uri: str, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    (run / "status.json").write_text('{"status": "FINISHED"}')
    request = {"tracking_uri": uri, "experiment": "exp", "run_name": "run", "interval_s": 0.1, "deadline_s": 0.5}
    with monkeypatch.context() as broken:
        broken.setattr(LocalArtifactRepository, "log_artifact", fail)
        assert shipping.ship(run, request, process=None) == 1
    assert points(uri) == expected_points(run)
    assert status(uri) == "FINISHED"
    assert "artifacts: OSError: no space left" in caplog.text
    assert tracking.sync(run)["artifacts"] == 6


def test_a_run_id_from_a_checkpoint(uri: str, tmp_path: Path) -> None:
    """A run directory without its MLflow files goes on in the run that its checkpoint names."""
    first = make_run(tmp_path / "first")
    identity = tracking.sync(first, uri=uri)["run_id"]
    second = make_run(tmp_path / "second", steps=25)
    (second / "tracking.json").write_text(json.dumps({"tracking_uri": uri, "run_id": identity}))
    result = tracking.sync(second)
    assert (result["run_id"], result["metrics"]) == (identity, 16)
    assert points(uri) == expected_points(second)


def test_sync_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(MbtrainError, match="expected a run directory"):
        tracking.sync(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- Without MLflow ---


def test_default_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.default_uri() == tracking.default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert list(tmp_path.iterdir()) == []
    assert files.absolute("sqlite:///a/b.db?x=1") == f"sqlite:///{tmp_path}/a/b.db?x=1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking.default_uri() == "http://server:5000"


def test_a_password_is_in_no_file(run: Path, monkeypatch: pytest.MonkeyPatch, spawn: Spawn) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    spawn(run, "http://me:secret@127.0.0.1:9/x", "exp", "run")
    assert json.loads((run / "tracking.json").read_text())["tracking_uri"] == "http://127.0.0.1:9/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9/x")
    assert files.with_password("http://127.0.0.1:9/x") == "http://me:secret@127.0.0.1:9/x"
    assert files.with_password("http://elsewhere/x") == "http://elsewhere/x"


def test_start_forgets_the_end_of_the_part_before(run: Path, monkeypatch: pytest.MonkeyPatch, spawn: Spawn) -> None:
    (run / "status.json").write_text('{"status": "FAILED"}')
    monkeypatch.setattr(sys, "executable", "/bin/true")
    spawn(run, "http://127.0.0.1:9", "exp", "run")
    assert not (run / "status.json").exists()


def test_finish_knows_mlflows_words_only(run: Path, spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    shipper = spawn(run, "http://127.0.0.1:9", "exp", "run")
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        tracking.finish(shipper, run, "done", timeout_s=1)


def test_compare_url(tmp_path: Path) -> None:
    for name, experiment in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        known = {"run_id": f"id{name}", "experiment_id": experiment, "tracking_uri": "sqlite:////x/mlflow.db"}
        (tmp_path / name / "mlflow.json").write_text(json.dumps(known))
    a, b, c = (tmp_path / name for name in "abc")
    assert tracking.compare_url([a]) == "http://127.0.0.1:5000/#/experiments/1/runs/ida"
    assert (
        tracking.compare_url([a, b, c], "http://h:1/")
        == 'http://h:1/#/compare-runs?runs=["ida","idb","idc"]&experiments=["1","2"]'
    )
    (c / "mlflow.json").write_text(json.dumps({"run_id": "c", "experiment_id": "0", "tracking_uri": "http://server"}))
    assert tracking.compare_url([c]) == "http://server/#/experiments/0/runs/c"
    with pytest.raises(MbtrainError, match="one MLflow store, got 2"):
        tracking.compare_url([a, c])
    with pytest.raises(MbtrainError, match="mbtrain sync"):
        tracking.compare_url([a, tmp_path])
    with pytest.raises(MbtrainError, match="no run"):
        tracking.compare_url([])


def test_ui_is_local_and_serves_the_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    tracking.ui()
    program, command, environment = calls[0]
    assert (program, command[1:4]) == (sys.executable, ["-m", "mlflow", "server"])
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert environment["MLFLOW_ARTIFACTS_DESTINATION"] == (tmp_path / "mlruns" / "artifacts").as_uri()
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "5000")
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    with pytest.raises(MbtrainError, match="a server of its own"):
        tracking.ui(uri="http://server:5000")


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, mbtrain.tracking; sys.exit(bool({'mlflow', 'torch', 'matplotlib', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_shipper_leaves_a_core_to_the_trainer_although_its_session_is_its_own() -> None:
    """Under autogroups two sessions share a core evenly, whatever the niceness of the processes in them."""
    try:
        if Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() != "1":
            pytest.skip("no autogroups here: niceness counts by itself")
    except FileNotFoundError:
        pytest.skip("no autogroups in this kernel")
    core = min(os.sched_getaffinity(0))
    burn = (
        f"import os, time; os.sched_setaffinity(0, {{{core}}})\n"
        f"while time.monotonic() < {time.monotonic() + 0.5}: time.sleep(0.01)\n"
        "began = time.process_time()\n"
        f"while time.monotonic() < {time.monotonic() + 1.5}: pass\n"
        "print(time.process_time() - began)"
    )
    behind = f"from mbtrain.tracking import stand_back; stand_back()\n{burn}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        for program in (burn, behind)
    ]
    trainer_s, shipper_s = (float(process.communicate()[0]) for process in processes)
    assert trainer_s > 3 * shipper_s  # 10 times, by the kernel's table
