"""The tracking server is slow, gone, hung, or back with another state: MLflow gets each point once, in order.

The shipper runs in this process, with pauses a hundred times shorter than its own.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from mbtrain import metrics, tracking
from mbtrain.errors import MbtrainError
from mbtrain.tracking import sending
from mbtrain.tracking import shipper as shipping
from tests.launch import ROOT, free_port
from tests.mlflow_server import Server, State
from tests.test_tracking import expected_points, log_steps, make_run, points, query, wait_until


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for key in [key for key in os.environ if key.startswith("MLFLOW_")]:
        monkeypatch.delenv(key)
    for key, value in tracking.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(shipping, "BACK_OFF_S", 0.6)
    monkeypatch.setattr(shipping, "LOOK_PAUSE_S", 0.02)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", steps=3)


def request_of(server: Server, deadline_s: float = 20.0) -> dict[str, object]:
    return {
        "tracking_uri": server.uri,
        "experiment": "exp",
        "run_name": "run",
        "interval_s": 0.1,
        "deadline_s": deadline_s,
    }


def ship_while(run: Path, server: Server, trial: Callable[[], None], deadline_s: float = 20.0) -> int | None:
    """The shipper's exit status; `trial` runs beside it, as the trainer, which then has finished."""
    problems: list[BaseException] = []

    def play() -> None:
        try:
            trial()
        except BaseException as error:
            problems.append(error)
        (run / "status.json").write_text('{"status": "FINISHED"}')

    beside = threading.Thread(target=play)
    beside.start()
    status = shipping.ship(run, request_of(server, deadline_s), psutil.Process())
    beside.join()
    if problems:
        raise problems[0]
    return status


def has_all(run: Path, server: Server) -> bool:
    return server.state.points() == expected_points(run)


def in_order(server: Server) -> None:
    """Of every key, steps came upwards."""
    for one in server.state.runs.values():
        last: dict[str, int] = {}
        for point in one["metrics"]:
            assert last.get(point["key"], -1) < point["step"]
            last[point["key"]] = point["step"]


@pytest.mark.parametrize("failure", ["refuses", "hangs", "deaf", "503", "404", "garbage", "drips"])
def test_an_outage(
    failure: str, run: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on trying with a bounded pause, says so once, and afterwards sends in order what came meanwhile."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(sending, "HANG_S", -1.0)  # so 2 s for a whole call
    caplog.set_level("INFO", "mbtrain.tracking")
    pauses_s: list[float] = []
    wait = shipping._wait
    monkeypatch.setattr(
        shipping, "_wait", lambda pause_s, *rest, **how: (pauses_s.append(pause_s), wait(pause_s, *rest, **how))
    )

    def trial() -> None:
        wait_until(lambda: has_all(run, server))
        server.behave(failure)
        tries = len(pauses_s)
        for step in range(4, 40):
            log_steps(run, step, step)
            time.sleep(0.01)
        wait_until(lambda: len(pauses_s) > tries + 2)
        assert max(pauses_s) == shipping.BACK_OFF_S
        server.behave("well")
        wait_until(lambda: has_all(run, server))
        log_steps(run, 40, 41)

    assert ship_while(run, server, trial) == 0
    assert has_all(run, server)
    in_order(server)
    assert [one["status"] for one in server.state.runs.values()] == ["FINISHED"]
    assert 1 <= sum("trying again" in line for line in caplog.messages) <= 4
    assert "MLflow is there again, and has all up to now" in caplog.messages
    assert len(server.state.files) == 6


def test_gone_from_the_beginning_to_long_after_the_start(run: Path, server: Server) -> None:
    server.behave("refuses")

    def trial() -> None:
        log_steps(run, 4, 300)
        time.sleep(2.0)  # more than three times the longest pause between two tries
        assert tracking.run_id(run) is None
        server.behave("well")
        wait_until(lambda: has_all(run, server))

    assert ship_while(run, server, trial) == 0
    in_order(server)


def test_a_server_slower_than_the_timeout(run: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for an answer grows; what was done without an answer in time is not done twice: no run, no point."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(shipping, "BACK_OFF_S", 4.0)
    server.behave("slow", 1.3, ("runs/create", "log-batch"))
    assert ship_while(run, server, lambda: wait_until(lambda: has_all(run, server))) == 0
    assert has_all(run, server)
    in_order(server)
    assert sum(one["stage"] == "active" for one in server.state.runs.values()) == 1


def test_an_empty_database_at_the_same_address(run: Path, server: Server) -> None:
    """Between two rounds, so that no request fails because of it: a new run there, with everything."""

    def trial() -> None:
        wait_until(lambda: has_all(run, server) and server.state.files)
        first = tracking.run_id(run)
        server.replace(State())
        log_steps(run, 4, 5)
        wait_until(lambda: has_all(run, server))
        assert tracking.run_id(run) not in (None, first)

    assert ship_while(run, server, trial) == 0
    assert has_all(run, server)
    in_order(server)
    (one,) = server.state.runs.values()
    assert one["params"]["train.steps"] == "100"
    assert sum(name.startswith(one["id"]) for name in server.state.files) == 6


def test_a_restored_older_backup(run: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Our run is there and holds fewer steps, and nothing failed meanwhile: the rest is sent, nothing twice."""
    backup: list[State] = []

    def trial() -> None:
        wait_until(lambda: has_all(run, server))
        with server.lock:
            backup.append(copy.deepcopy(server.state))
        log_steps(run, 4, 50)
        wait_until(lambda: has_all(run, server))
        server.replace(backup[0])
        log_steps(run, 51, 52)
        wait_until(lambda: has_all(run, server))

    assert ship_while(run, server, trial) == 0
    assert server.state is backup[0]
    assert len(server.state.runs) == 1
    in_order(server)
    assert "holds less than it did" in caplog.text


def test_another_server_with_other_ids_at_the_same_address(run: Path, server: Server) -> None:
    other = State(experiments={"theirs": "1", "and theirs": "2", "exp": "3"})
    other.runs["f" * 32] = {
        "id": "f" * 32,
        "experiment": "3",
        "status": "FINISHED",
        "stage": "active",
        "start": 1,
        "tags": {"mbtrain.run_uid": "0" * 32},
        "params": {},
        "metrics": [],
    }

    def trial() -> None:
        wait_until(lambda: has_all(run, server))
        server.replace(other)
        wait_until(lambda: has_all(run, server))

    assert ship_while(run, server, trial) == 0
    ours = json.loads((run / "mlflow.json").read_text())
    assert (ours["experiment_id"], other.runs[ours["run_id"]]["status"]) == ("3", "FINISHED")
    assert len(other.runs) == 2
    assert other.runs["f" * 32]["metrics"] == []


def test_a_run_that_was_deleted_in_the_pages(run: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is sent, and it is said once what to do; restored, the run goes on."""

    def trial() -> None:
        wait_until(lambda: has_all(run, server))
        one = server.state.runs[str(tracking.run_id(run))]
        one["stage"] = "deleted"
        log_steps(run, 4, 6)
        wait_until(lambda: "was deleted" in caplog.text)
        time.sleep(2.0)
        assert len(server.state.runs) == 1
        one["stage"] = "active"

    assert ship_while(run, server, trial) == 0
    assert has_all(run, server)
    assert sum("was deleted, so nothing is sent; restore it" in line for line in caplog.messages) == 1


def test_a_deleted_run_whose_mlflow_json_was_removed_is_made_anew(run: Path, server: Server) -> None:
    first = tracking.sync(run, uri=server.uri, experiment="exp")["run_id"]
    server.state.runs[first]["stage"] = "deleted"
    (run / "mlflow.json").unlink()
    (run / "tracking.json").write_text(json.dumps({"tracking_uri": server.uri, "experiment": "exp", "run_id": first}))
    second = tracking.sync(run)["run_id"]
    assert second != first
    assert has_all(run, server)


def test_events_of_the_guard_and_a_rewind(run: Path, server: Server) -> None:
    """Steps go on upwards after a rewind, so each event and each step is there once."""
    log_steps(run, 4, 6)
    metrics.append(run / "metrics.jsonl", 7, {"guard/bad_loss_nats": float("nan"), "guard/skipped": 1})
    metrics.append(run / "metrics.jsonl", 8, {"guard/bad_loss_nats": float("inf"), "guard/rewound_to": 5})
    log_steps(run, 9, 12)
    metrics.append(run / "metrics.jsonl", 12, {"guard/bad_loss_nats": 31.5, "guard/skipped": 2})
    tracking.sync(run, uri=server.uri)
    (one,) = server.state.runs.values()
    told = [(point["key"], point["step"], point["value"]) for point in one["metrics"] if "guard" in point["key"]]
    assert [(key, step) for key, step, _ in told] == [
        ("guard/bad_loss_nats", 7),
        ("guard/skipped", 7),
        ("guard/rewound_to", 8),
        ("guard/bad_loss_nats", 12),
        ("guard/skipped", 12),
    ]
    assert server.state.points() + Counter({("guard/bad_loss_nats", 8): 1}) == expected_points(run)
    assert tracking.sync(run)["metrics"] == 0


def test_a_round_reads_only_what_is_new(run: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error, which takes back nothing that MLflow has."""
    log_steps(run, 4, 3000)
    size = (run / "metrics.jsonl").stat().st_size
    read_bytes = [0]
    pread = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        data = pread(fd, length, offset)
        read_bytes[0] += len(data)
        return data

    def trial() -> None:
        wait_until(lambda: has_all(run, server))
        time.sleep(0.3)
        monkeypatch.setattr(os, "pread", counted)
        for behaviour in ("well", "503", "well"):
            server.behave(behaviour)
            time.sleep(0.5)
        log_steps(run, 3001, 3001)
        wait_until(lambda: has_all(run, server))
        assert 0 < read_bytes[0] < size / 10

    assert ship_while(run, server, trial) == 0
    assert size > 300_000


def test_a_twin_of_the_run_is_deleted(run: Path, server: Server) -> None:
    """Made by a request whose answer, and whose effect, came late."""
    identity = tracking.sync(run, uri=server.uri, experiment="exp")["run_id"]
    twin = copy.deepcopy(server.state.runs[identity]) | {"id": "e" * 32, "params": {}, "metrics": []}
    server.state.runs["e" * 32] = twin
    tracking.sync(run)
    assert (server.state.runs[identity]["stage"], twin["stage"]) == ("active", "deleted")


# --- Other hosts on a shared folder ---


def test_a_shipper_that_was_followed_sends_nothing_more(run: Path, server: Server) -> None:
    """tracking.json names the trainer whose shipper sends; the one before ends, and does not say how the run ended."""
    names = {"host": "here", "pid": os.getpid(), "started": psutil.Process().create_time(), "token": "one"}
    request = request_of(server) | {"trainer": names}
    (run / "tracking.json").write_text(json.dumps(request))

    def follow() -> None:
        wait_until(lambda: has_all(run, server))
        (run / "tracking.json").write_text(json.dumps(request | {"trainer": names | {"host": "there", "token": "two"}}))
        log_steps(run, 4, 9)

    beside = threading.Thread(target=follow)
    beside.start()
    assert shipping.ship(run, request, psutil.Process()) == 1
    beside.join()
    (one,) = server.state.runs.values()
    assert max(point["step"] for point in one["metrics"]) == 3
    assert one["status"] == "RUNNING"


def test_a_shipper_waits_where_another_host_may_still_send(
    run: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock itself may not be seen between hosts."""
    monkeypatch.setattr(shipping, "GRACE_S", 0.5)
    ours = {"host": "here", "pid": os.getpid(), "started": 1.0, "token": "two"}
    (run / "tracking.json").write_text(json.dumps({"trainer": ours}))
    lock = run / ".mlflow.lock"
    lock.write_text(json.dumps({"host": "there", "pid": 1, "started": 1.0, "token": "one"}))
    began_s = time.monotonic()
    file = shipping._lock(run, ours, psutil.Process())
    assert file is not None
    assert time.monotonic() - began_s > 0.5
    assert json.loads(lock.read_text()) == ours
    file.close()
    lock.write_text("")  # as one leaves it that has ended
    began_s = time.monotonic()
    file = shipping._lock(run, ours, psutil.Process())
    assert file is not None
    assert time.monotonic() - began_s < 0.3
    file.close()


def test_sync_looks_whether_another_host_sends(run: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "GRACE_S", 0.5)
    lock = run / ".mlflow.lock"
    lock.write_text(json.dumps({"host": "there", "pid": 1, "started": 1.0, "token": "one"}))
    assert tracking.sync(run, uri=server.uri)["metrics"] > 0  # that host is dead
    beating = threading.Timer(0.2, lambda: os.utime(lock))
    beating.start()
    with pytest.raises(MbtrainError, match="there is"):
        tracking.sync(run)
    beating.join()


def test_a_file_system_without_locks(run: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert tracking.sync(run, uri=server.uri)["metrics"] == expected_points(run).total()


# --- With a shipper in its own process, on MLflow's own stores ---


TRAINER = """
import sys, time
from pathlib import Path
from mbtrain import metrics, tracking
run, uri, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
path = run / "metrics.jsonl"
known = metrics.last(path) if path.exists() else None
first = max(0, (known["step"] if known else 0) - 7)  # the last checkpoint is some steps ago
metrics.truncate_after(path, first)
shipper = tracking.start_shipper(run, uri, "exp", "run", interval_s=0.1, deadline_s=60)
for step in range(first + 1, last + 1):
    metrics.append(path, step, {"train/bpb": 8 / step, "progress/bytes": step})
    time.sleep(0.01)
assert tracking.finish(shipper, run, "FINISHED", timeout_s=120)
"""


def shippers_of(run: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[1:] == ["-m", "mbtrain.tracking", str(run)]:
                found.append(process)
    return found


@pytest.mark.slow
def test_kills_of_trainer_and_shipper_at_random_instants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, with steps made again after each; mlflow.json lost at times. One run; every point once, in order."""
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    run, uri, rng = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db", random.Random(0)
    run.mkdir()
    (run / "config.yaml").write_text("a: 1\n")
    command = [sys.executable, "-c", TRAINER, str(run), uri]
    most = 0
    for kill in range(12):
        trainer = subprocess.Popen([*command, "1000000"], cwd=ROOT)
        until_s = time.monotonic() + rng.uniform(0.5, 12.0)
        while time.monotonic() < until_s:
            time.sleep(0.05)
            most = max(most, sum(shipper.nice() == 10 for shipper in shippers_of(run)))
        victims = [trainer.pid, *(shipper.pid for shipper in shippers_of(run))]
        for pid in [victims, victims[1:], victims[:1]][kill % 3]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        trainer.kill()
        trainer.wait()
        if kill % 4 == 3:
            (run / "mlflow.json").unlink(missing_ok=True)
    last = metrics.last(run / "metrics.jsonl")
    assert last is not None
    subprocess.run([*command, str(last["step"] + 50)], cwd=ROOT, check=True, timeout=300)
    assert query(uri, "select status, lifecycle_stage from runs") == [("FINISHED", "active")]
    assert points(uri) == expected_points(run)
    assert sorted(query(uri, "select step from latest_metrics")) == [(last["step"] + 50,)] * 2
    wait_until(lambda: not shippers_of(run))


@pytest.mark.slow
def test_a_real_server_is_killed_and_comes_back_with_an_older_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    run, database, port = make_run(tmp_path / "run", steps=5), tmp_path / "mlflow.db", free_port()
    store, url = f"sqlite:///{database}", f"http://127.0.0.1:{port}"
    code = f"from mbtrain import tracking; tracking.ui(port={port}, uri={store!r})"

    def serve() -> subprocess.Popen[bytes]:
        server = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
        wait_until(lambda: answers(url), 120)
        return server

    def answers(url: str) -> bool:
        with suppress(OSError):
            return bool(urllib.request.urlopen(f"{url}/health", timeout=2).status == 200)
        return False

    def has(uri: str) -> bool:
        with suppress(sqlite3.OperationalError):
            return points(uri) == expected_points(run)
        return False

    server = serve()
    shipper = None
    try:
        shipper = tracking.start_shipper(run, url, "exp", "run", interval_s=0.5, deadline_s=120)
        assert shipper is not None
        wait_until(lambda: has(store))
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for left in tmp_path.glob("mlflow.db*"):
            shutil.copy(left, tmp_path / f"backup-{left.name}")
        log_steps(run, 6, 40)
        server = serve()
        wait_until(lambda: has(store), 180)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for left in tmp_path.glob("mlflow.db*"):
            left.unlink()
        for left in tmp_path.glob("backup-*"):
            shutil.copy(left, tmp_path / left.name.removeprefix("backup-"))
        log_steps(run, 41, 42)
        server = serve()
        assert tracking.finish(shipper, run, "FINISHED", timeout_s=180)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        if shipper:
            shipper.kill()
            shipper.wait()
    assert has(store)
    assert query(store, "select status, lifecycle_stage from runs") == [("FINISHED", "active")]
    assert (run / "mlflow.log").read_text().count("\n") < 60


@pytest.mark.slow
def test_a_database_file_that_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow would go on writing to the file that is no more: the shipper begins anew."""
    run, database = make_run(tmp_path / "run", steps=3), tmp_path / "mlflow.db"
    uri = f"sqlite:///{database}"
    shipper = tracking.start_shipper(run, uri, "exp", "run", interval_s=0.1, deadline_s=60)
    assert shipper is not None
    try:
        wait_until(lambda: tracking.run_id(run) and points(uri) == expected_points(run))
        process = psutil.Process(shipper.pid)
        assert process.nice() == 10
        assert Path(f"/proc/{shipper.pid}/oom_score_adj").read_text() == "1000\n"
        database.rename(tmp_path / "old.db")
        log_steps(run, 4, 6)
        assert tracking.finish(shipper, run, "FINISHED", timeout_s=120)
    finally:
        shipper.kill()
        shipper.wait()
    assert points(uri) == expected_points(run)
    assert "beginning anew" in (run / "mlflow.log").read_text()


def test_a_system_that_starts_no_process(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on."""

    def fail(*args: object, **how: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fail)
    assert tracking.start_shipper(run, "http://127.0.0.1:9", "exp", "run") is None
    assert f"mbtrain sync {run}" in caplog.text
