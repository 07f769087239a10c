"""What a host says of itself, with one thing wrong at a time.

pytest tests/doctor/test_facts.py
"""

from __future__ import annotations

import base64
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mbtrain.doctor import asking, facts
from tests import handmade, launch


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = random.Random(0)
    made = [handmade.Made(rng.randbytes(300)) for _ in range(6)]
    return handmade.dataset(tmp_path / "data", "text", {"train": [made[:3], made[3:5]], "val": [made[5:]]})


@contextmanager
def listening() -> Iterator[int]:
    """A port where somebody listens and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@contextmanager
def serving(status: int, content: bytes = b"{}", **headers: str) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """A web server that always answers the same: its port, and the headers of every request so far."""
    heard: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(dict(self.headers))
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, heard
        server.shutdown()


def test_a_port_where_somebody_listens_is_not_free() -> None:
    with listening() as taken:
        said = facts.port(taken)
        assert said is not None
        assert said["said"] == "Address already in use"
    free = facts.port(launch.free_port())
    assert free is not None
    assert free["said"] == ""
    assert facts.port(70000)["said"]  # type: ignore[index]


def test_a_cut_shard_and_a_changed_one(data: Path) -> None:
    assert facts.data(str(data), ["train", "val"], "full")["problems"] == []
    whole = data / "train" / "train-000001.tar"
    content = bytearray(whole.read_bytes())
    content[600] ^= 1
    whole.write_bytes(content)
    assert facts.data(str(data), ["train", "val"], "size")["problems"] == []
    assert "train-000001.tar: changed" in facts.data(str(data), ["train", "val"], "full")["problems"][0]
    whole.write_bytes(content[:1000])
    found = facts.data(str(data), ["train", "val"], "size")
    assert "train-000001.tar: cut off" in found["problems"][0]
    assert facts.data(str(data), ["val"], "size")["problems"] == []
    assert "no split 'test'" in facts.data(str(data), ["test"], "size")["problems"][0]
    assert "no manifest" in facts.data(str(data / "train"), ["train"], "size")["problems"][0]


def test_the_run_directorys_place_is_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    written: list[Path] = []
    found = facts.run_place(str(tmp_path / "runs" / "first"), "abc", written)
    assert found is not None
    assert (found["folder"], found["said"], found["free_bytes"] > 0) == (str(tmp_path), "", True)
    assert written == [tmp_path / ".mbtrain-doctor-abc"]
    question = {"ask": "seen", "folder": str(tmp_path), "tokens": {written[0].name: "abc", ".mbtrain-doctor-x": "x"}}
    assert facts.answer(question, []) == {"seen": [written[0].name]}


def test_a_place_that_cannot_be_written_is_said() -> None:
    written: list[Path] = []
    found = facts.run_place("/proc/mbtrain/run", "abc", written)
    assert found is not None
    assert found["said"]
    assert written == []


def test_a_tracking_server_that_hangs_is_given_up_in_time() -> None:
    with listening() as port:
        began = time.perf_counter()
        found = facts.mlflow(f"http://127.0.0.1:{port}", limit_s=0.5)
        assert time.perf_counter() - began < 5
    assert found is not None
    assert found["said"] == "no answer in 0.5 s"


def test_a_tracking_server_that_sends_a_byte_now_and_then_is_given_up_too() -> None:
    def drip(server: socket.socket) -> None:
        client, _ = server.accept()
        with client:
            client.recv(4096)
            for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 100:
                time.sleep(0.1)
                try:
                    client.send(bytes([byte]))
                except OSError:
                    return

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        threading.Thread(target=drip, args=(server,), daemon=True).start()
        began = time.perf_counter()
        found = facts.mlflow(f"http://127.0.0.1:{server.getsockname()[1]}", limit_s=0.5)
        assert time.perf_counter() - began < 5
    assert found is not None
    assert found["said"] == "no answer in 0.5 s"


def test_a_password_reaches_the_server_and_nobody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving(200, b'{"experiments": []}') as (port, heard):
        found = facts.mlflow(f"http://me:pass%21word@127.0.0.1:{port}")
    assert found is not None
    assert found["said"] == ""
    assert "word" not in json.dumps(found)
    assert heard[0]["Authorization"] == "Basic " + base64.b64encode(b"me:pass!word").decode()
    with serving(200) as (port, heard), serving(302, Location=f"http://127.0.0.1:{port}/") as (first, _):
        found = facts.mlflow(f"http://me:password@127.0.0.1:{first}")
        assert found is not None
        assert found["said"].startswith("answers 302")
        assert heard == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (lambda tmp: f"sqlite:///{tmp}/mlruns/mlflow.db", ""),
        (lambda tmp: f"sqlite:///{tmp}/file/mlflow.db", "/file cannot be written"),
        (lambda tmp: f"{tmp}/mlruns", ""),
        (lambda tmp: f"http://127.0.0.1:{launch.free_port()}", "[Errno 111] Connection refused"),
        (lambda tmp: "databricks://profile", ""),
    ],
)
def test_other_stores(tmp_path: Path, uri: Callable[[Path], str], said: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    found = facts.mlflow(uri(tmp_path))
    assert found is not None
    assert found["said"].endswith(said)
    assert bool(found["said"]) == bool(said)


def test_servers_that_refuse_or_are_no_mlflow() -> None:
    with serving(401) as (port, _):
        assert facts.mlflow(f"http://127.0.0.1:{port}")["said"].startswith("answers 401")  # type: ignore[index]
    with serving(200, b"<html>") as (port, _):
        assert facts.mlflow(f"http://127.0.0.1:{port}")["said"] == "answers, but not as MLflow does"  # type: ignore[index]


def test_what_it_wrote_goes_with_it(tmp_path: Path) -> None:
    """Also when the asking side is gone; and what a library says on stdout is not taken for an answer."""
    program = "import sys, runpy; print('banner'); runpy.run_module('mbtrain.doctor.facts', run_name='__main__')"
    with asking.lines({"here": [sys.executable, "-u", "-c", program]}) as opened:
        question = {
            "ask": "facts",
            "run": str(tmp_path / "run"),
            "token": "abc",
            "peers": ["localhost", "no.such.host.invalid"],
        }
        answers = asking.ask(opened, {"here": question}, 60)["here"]
        assert answers["run"]["said"] == ""
        assert [path.name for path in tmp_path.iterdir()] == [".mbtrain-doctor-abc"]
        assert answers["toward"]["localhost"]["interface"] == "lo"
        assert answers["toward"]["no.such.host.invalid"]["said"]
        offset = asking.clock_offsets(opened)["here"]
        assert abs(offset["offset_s"]) <= offset["within_s"] + 0.05
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_says_nothing_or_ends_is_told_apart() -> None:
    commands = {
        "hangs": [
            sys.executable,
            "-c",
            "import sys, time; sys.stderr.write('at: data\\n'); sys.stderr.flush(); time.sleep(60)",
        ],
        "ends": [sys.executable, "-c", "import sys; sys.stderr.write('No route to host\\n'); sys.exit(255)"],
    }
    began = time.perf_counter()
    with asking.lines(commands) as opened:
        answers = asking.ask(opened, {host: {"ask": "clock"} for host in commands}, 2)
    assert answers["hangs"] == {"unreachable": "no answer in 2 s (at: data)"}
    assert answers["ends"] == {"unreachable": "No route to host (exit status 255)", "status": 255}
    assert time.perf_counter() - began < 30


def test_it_needs_no_torch_to_say_that_there_is_none() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import json; from mbtrain.doctor import facts; print(json.dumps(facts.devices()))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=launch.environment(), capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert "torch" in said["torch"]
    assert said["gpus"] == []
    assert said["cores"] >= 1
