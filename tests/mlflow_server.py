"""A tracking server that fails as it is told to: the part of MLflow's REST interface that the shipper uses, in memory.

    with Server() as server:        # http://127.0.0.1:PORT
        server.behave("hangs")      # or refuses, "503", "garbage", "drips", "slow"; "well" again
        server.state = State()      # another database at the same address

It keeps metrics as MLflow does: points in the order of their arrival, one that is equal in everything dropped.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class State:
    """What a database holds."""

    experiments: dict[str, str] = field(default_factory=dict)  # name -> id
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    artifact_root: str = "mlflow-artifacts:"

    def points(self) -> Counter[tuple[str, int]]:
        """How often each (key, step) is there, over all active runs."""
        active = [run for run in self.runs.values() if run["stage"] == "active"]
        return Counter((point["key"], point["step"]) for run in active for point in run["metrics"])


class Server:
    """Listens on a loopback port; `state` and behaviour may be changed at any time."""

    def __init__(self, state: State | None = None) -> None:
        self.state = state or State()
        self.mode, self.slow_s = "well", 0.0
        self.slow_paths: tuple[str, ...] = ("",)
        self.requests: list[tuple[float, str]] = []  # (when, path)
        self.headers: list[dict[str, str]] = []
        self.repeats = False  # in an error's answer: what the client said of itself
        self.connections: list[socket.socket] = []
        self.released = threading.Event()
        self.lock = threading.Lock()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.http: ThreadingHTTPServer | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        server = self

        class Handler(_Handler):
            of = server

        ThreadingHTTPServer.allow_reuse_address = True
        ThreadingHTTPServer.daemon_threads = True
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.released.set()
        if self.http:
            self.http.shutdown()
            self.http.server_close()
            self.http = None
        for connection in self.connections:  # as the kernel does for a process that died
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def replace(self, state: State) -> None:
        """Put another database under the server; returns when a client has asked it something."""
        with self.lock:
            self.state = state
            before = len(self.requests)
        while len(self.requests) < before + 2:
            time.sleep(0.01)

    def behave(self, mode: str, slow_s: float = 0.0, slow_paths: tuple[str, ...] = ("",)) -> None:
        """well, slow (after `slow_s`), hangs, refuses, garbage, drips, deaf (acts, but never answers), or a status."""
        if mode == "refuses":
            self.stop()
        elif self.http is None:
            self.start()
        if mode in ("hangs", "deaf"):
            self.released.clear()
        else:
            self.released.set()  # those that hang end
        self.mode, self.slow_s, self.slow_paths = mode, slow_s, slow_paths


class _Handler(BaseHTTPRequestHandler):
    of: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.of.connections.append(self.connection)

    def do_GET(self) -> None:
        self._take()

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def log_message(self, *args: object) -> None:
        pass

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        self.of.requests.append((time.monotonic(), address.path))
        self.of.headers.append(dict(self.headers))
        mode = self.of.mode
        if mode == "slow" and any(part in self.path for part in self.of.slow_paths):
            time.sleep(self.of.slow_s)
        if mode == "hangs":
            self.of.released.wait(60)
            self.close_connection = True
            return
        if mode.isdecimal():
            told = json.dumps([dict(self.headers), dict(os.environ)]) if self.of.repeats else ""
            self._answer(int(mode), f"<html>the proxy is sorry {told}</html>".encode(), "text/html")
            return
        if mode == "garbage":
            self._answer(200, b"<html>log in first</html>", "text/html")
            return
        if mode == "drips":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            while not self.of.released.wait(0.05) or self.of.mode == "drips":
                try:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                except OSError:
                    break
                time.sleep(0.05)
            self.close_connection = True
            return
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        with self.of.lock:
            status, answer = self._act(address.path, query, body)
        if mode == "deaf":
            self.of.released.wait(60)
            self.close_connection = True
            return
        self._answer(status, json.dumps(answer).encode())

    def _answer(self, status: int, content: bytes, kind: str = "application/json") -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client has gone
            self.close_connection = True

    def _act(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, Any]]:
        state = self.of.state
        if "/mlflow-artifacts/artifacts/" in path:
            state.files[path.partition("/mlflow-artifacts/artifacts/")[2]] = body
            return 200, {}
        said = query | (json.loads(body) if body else {})
        what = path.partition("/mlflow/")[2]
        unknown = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"no such thing: {said}"}
        if what == "experiments/get-by-name":
            name = said["experiment_name"]
            if name not in state.experiments:
                return unknown
            one = {"experiment_id": state.experiments[name], "name": name, "lifecycle_stage": "active"}
            return 200, {"experiment": one}
        if what == "experiments/create":
            state.experiments[said["name"]] = str(len(state.experiments) + 1)
            return 200, {"experiment_id": state.experiments[said["name"]]}
        if what == "runs/create":
            run = {
                "id": uuid.uuid4().hex,
                "experiment": said["experiment_id"],
                "status": "RUNNING",
                "stage": "active",
                "start": said["start_time"],
                "tags": {tag["key"]: tag["value"] for tag in said.get("tags", [])},
                "params": {},
                "metrics": [],
            }
            state.runs[run["id"]] = run
            return 200, {"run": self._shown(run)}
        if what == "runs/search":
            uid = said["filter"].partition("'")[2].rstrip("'")
            runs = [run for run in state.runs.values() if run["experiment"] in said["experiment_ids"]]
            found = [run for run in runs if run["stage"] == "active" and run["tags"].get("mbtrain.run_uid") == uid]
            return 200, {"runs": [self._shown(run) for run in found]}
        run = state.runs.get(said.get("run_id") or said.get("run_uuid", ""))
        if run is None:
            return unknown
        if what == "runs/log-batch":
            if run["stage"] != "active":
                return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "the run is deleted"}
            seen = run.setdefault("seen", set())
            for point in said.get("metrics", []):
                if (whole := tuple(sorted(map(str, point.items())))) not in seen:
                    seen.add(whole)
                    run["metrics"].append(point)
            run["params"] |= {param["key"]: param["value"] for param in said.get("params", [])}
            run["tags"] |= {tag["key"]: tag["value"] for tag in said.get("tags", [])}
        elif what == "runs/set-tag":
            run["tags"][said["key"]] = said["value"]
        elif what == "runs/update":
            run["status"] = said.get("status", run["status"])
        elif what == "runs/delete":
            run["stage"] = "deleted"
        elif what != "runs/get":
            return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path}
        return 200, {"run": self._shown(run), "run_info": self._shown(run)["info"]}

    def _shown(self, run: dict[str, Any]) -> dict[str, Any]:
        latest: dict[str, dict[str, Any]] = {}
        for point in run["metrics"]:
            if point["key"] not in latest or point["step"] >= latest[point["key"]]["step"]:
                latest[point["key"]] = point
        info = {
            "run_id": run["id"],
            "run_uuid": run["id"],
            "experiment_id": run["experiment"],
            "status": run["status"],
            "start_time": run["start"],
            "lifecycle_stage": run["stage"],
            "artifact_uri": f"{self.of.state.artifact_root}/{run['id']}/artifacts",
        }
        pairs = {kind: [{"key": k, "value": v} for k, v in run[kind].items()] for kind in ("params", "tags")}
        return {"info": info, "data": {"metrics": list(latest.values()), **pairs}}
