"""What a host says of itself: `python -m mbtrain.doctor.facts`, asked by lines of JSON on stdin, answered on stdout.

    {"ask": "facts", ...}                the keys below, as far as the question names what they are about
    {"ask": "clock"}                     {"unix_s"}
    {"ask": "seen", "folder", "tokens"}  {"seen": [the tokens that this host reads in that folder]}

It ends with its input and takes away what it wrote, also when the asking side is gone. What is asked comes by stdin and
not in arguments: an address may hold a password, and everyone on a host sees arguments.

Answers to "facts", where `said` is always the trouble in words, or empty:
    host, machine, versions, commit, source            who; one machine has one `machine`; source: sha256 of the code
    torch, gpus, cores, memory_bytes, available_bytes  torch: why it cannot be imported; memory: of this container
    open_files, locked_bytes, shm_bytes, infiniband    limits; -1: none
    address, toward, interfaces, socket_names          own name's address; how each peer is reached; *_SOCKET_IFNAME
    port, config, run, data, mlflow                    the master port, the configuration file, the run directory's
                                                       place, the data sets, the tracking server
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, cast
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import mbtrain
from mbtrain import redact, shards
from mbtrain.errors import DataError

TOKEN = ".mbtrain-doctor-"
MLFLOW_S = 5.0
SOCKET_NAMES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def answer(question: dict[str, Any], written: list[Path]) -> dict[str, Any]:
    """The answer to one question. Files that it leaves at the run directory's place are added to `written`."""
    if question["ask"] == "clock":
        return {"unix_s": time.time()}
    if question["ask"] == "seen":
        folder, tokens = Path(question["folder"]), cast(dict[str, str], question["tokens"])
        return {"seen": [name for name, content in tokens.items() if _reads(folder / name, content)]}
    os.environ.update(question.get("environment", {}))
    sets = cast(dict[str, list[str]], question.get("data", {}))
    full = "full" if question.get("full") else "size"
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": versions,
        "devices": devices,
        "limits": limits,
        "network": lambda: network(question.get("peers", [])),
        "port": lambda: {"port": port(question.get("port"))},
        "configuration": lambda: {"config": config(question.get("config"))},
        "run directory": lambda: {"run": run_place(question.get("run"), question.get("token", ""), written)},
        "data": lambda: {"data": {path: data(path, splits, full) for path, splits in sets.items()}},
        "MLflow": lambda: {"mlflow": mlflow(question.get("mlflow"))},
    }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        sys.stderr.write(f"at: {name}\n")  # where a file system hangs, this is the last that is heard
        sys.stderr.flush()
        found |= part()
    return found


def versions() -> dict[str, Any]:
    """Who this is, and with which code and packages it would train."""
    root = Path(mbtrain.__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    found = {"python": platform.python_version(), "mbtrain": mbtrain.__version__}
    for package in ("torch", "deepspeed"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {"host": socket.gethostname(), "machine": _machine(), "versions": found, "source": digest.hexdigest()}


def devices() -> dict[str, Any]:
    """What computes here: GPUs with their memory, cores, memory in bytes."""
    gpus: list[dict[str, Any]] = []
    said, commit = "", "unknown"
    try:
        import torch

        from mbtrain import hardware

        commit = hardware.commit()
        for i in range(torch.cuda.device_count()):
            free, whole = torch.cuda.mem_get_info(i)
            gpus.append({"name": torch.cuda.get_device_name(i), "bytes": whole, "free_bytes": free})
    except (ImportError, OSError, RuntimeError) as error:
        said = _one_line(error)
    memory = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+)", _text("/proc/meminfo"), re.M))
    whole, available = (int(memory.get(key, 0)) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    if limit.isdecimal() and int(limit) < whole:
        used = _text("/sys/fs/cgroup/memory.current").strip()
        whole, available = int(limit), min(available, int(limit) - int(used or 0))
    return {
        "torch": said,
        "commit": commit,
        "gpus": gpus,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": whole,
        "available_bytes": available,
    }


def limits() -> dict[str, Any]:
    """Limits of this process, and the size of the memory that processes share."""
    try:
        shm = shutil.disk_usage("/dev/shm").total
    except OSError:
        shm = 0
    return {
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shm_bytes": shm,
        "infiniband": Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()),
    }


def network(peers: list[str]) -> dict[str, Any]:
    """The address of this host's own name, and by which address and interface each peer is reached."""
    import psutil

    interfaces = {
        name: [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
    }
    own = _address(socket.gethostname())
    return {
        "address": own[0] if isinstance(own, tuple) else "",
        "toward": {peer: _toward(peer, interfaces) for peer in peers},
        "interfaces": sorted(name for name, addresses in interfaces.items() if addresses),
        "socket_names": {key: os.environ[key] for key in SOCKET_NAMES if os.environ.get(key)},
    }


def port(number: int | None) -> dict[str, Any] | None:
    """Whether a server may listen on this port, as rank 0 will."""
    if number is None:
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", number))
    except (OSError, OverflowError) as error:
        return {"number": number, "said": getattr(error, "strerror", None) or str(error)}
    return {"number": number, "said": ""}


def config(path: str | None) -> dict[str, Any] | None:
    """The hash of the configuration file, as it is read here."""
    if path is None:
        return None
    try:
        return {"hash": shards.file_sha256(Path(path)), "said": ""}
    except OSError as error:
        return {"hash": "", "said": error.strerror or str(error)}


def run_place(run: str | None, token: str, written: list[Path]) -> dict[str, Any] | None:
    """Where the run directory is or will be: its nearest folder that exists, whether a file can be written there.

    The file is called after `token`, holds it, and stays until this process ends.
    """
    if run is None:
        return None
    folder = Path(run).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    path, said, free = folder / f"{TOKEN}{token}", "", 0
    try:
        free = shutil.disk_usage(folder).free
        with path.open("x", encoding="ascii") as file:
            written.append(path)
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        said = error.strerror or str(error)
    return {"folder": str(folder), "token": path.name, "free_bytes": free, "said": said}


def data(path: str, splits: list[str], check: Any) -> dict[str, Any]:
    """A data set: its manifest's hash, and what is wrong with the files of these splits."""
    try:
        manifest = shards.load_manifest(path)
        problems = [f"{path}: no split {name!r}" for name in splits if name not in manifest.splits]
        for name in splits:
            if name in manifest.splits:
                problems += shards.check_files(Path(path) / name, manifest.splits[name], check)
    except (DataError, OSError) as error:
        return {"hash": "", "bytes": 0, "problems": [_one_line(error, name=False)]}
    size = sum(manifest.splits[name].bytes for name in splits if name in manifest.splits)
    return {"hash": shards.dataset_hash(manifest), "bytes": size, "problems": problems[:20]}


def mlflow(uri: str | None, limit_s: float = MLFLOW_S) -> dict[str, Any] | None:
    """Whether the tracking store answers, within limit_s. `where` is its address without user and password."""
    if uri is None:
        return None
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        where = redact.without_password(uri)
        said: list[str] = []
        # In a thread: a server may also send a byte now and then for ever, which no timeout of a socket ends.
        thread = threading.Thread(target=lambda: said.append(_ask_server(uri, limit_s)), daemon=True)
        began = time.perf_counter()
        thread.start()
        thread.join(limit_s + 1)
        took = time.perf_counter() - began
        return {"where": where, "said": said[0] if said else f"no answer in {limit_s:g} s", "took_s": took}
    if parts.scheme not in ("sqlite", "file", ""):
        return {"where": parts.scheme, "said": "", "took_s": 0.0}
    path = Path(uri.partition(":///")[2] if parts.scheme == "sqlite" else unquote(parts.path)).absolute()
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    writable = folder.is_dir() and all(os.access(there, os.W_OK) for there in (folder, path) if there.exists())
    return {"where": str(path), "said": "" if writable else f"{folder} cannot be written", "took_s": 0.0}


class _NoRedirect(HTTPRedirectHandler):
    """Another server is not to get the password."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _ask_server(uri: str, limit_s: float) -> str:
    parts = urlsplit(uri)
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    request = Request(f"{address}/api/2.0/mlflow/experiments/search?max_results=1")
    known = _mlflow_credentials()
    user = unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME", "") or known[0]
    password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD", "") or known[1]
    if os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {os.environ['MLFLOW_TRACKING_TOKEN']}")
    elif user:
        request.add_header("Authorization", "Basic " + b64encode(f"{user}:{password}".encode()).decode())
    try:
        with build_opener(_NoRedirect).open(request, timeout=limit_s) as reply:
            content = reply.read(1 << 20)
        json.loads(content)
    except HTTPError as error:
        return f"answers {error.code} {error.reason}"
    except TimeoutError:
        return f"no answer in {limit_s:g} s"
    except OSError as error:
        reason = getattr(error, "reason", error)
        return f"no answer in {limit_s:g} s" if isinstance(reason, TimeoutError) else _one_line(reason, name=False)
    except ValueError:
        return "answers, but not as MLflow does"
    return ""


def _mlflow_credentials() -> tuple[str, str]:
    """User and password of ~/.mlflow/credentials, as MLflow itself reads them; empty where there is none."""
    parser = ConfigParser(interpolation=None)
    try:
        parser.read(Path.home() / ".mlflow" / "credentials", encoding="utf-8")
        section = parser["mlflow"]
        return section["mlflow_tracking_username"], section["mlflow_tracking_password"]
    except (ConfigParserError, KeyError, OSError, UnicodeDecodeError):
        return "", ""


def _machine() -> str:
    """One machine has one boot and, container or not, one view of the network."""
    try:
        return _text("/proc/sys/kernel/random/boot_id").strip() + " " + os.readlink("/proc/self/ns/net")
    except OSError:
        return socket.gethostname()


def _address(name: str) -> tuple[str, socket.AddressFamily] | str:
    try:
        ways = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
    except OSError as error:
        return error.strerror or str(error)
    found = min(ways, key=lambda way: way[0] != socket.AF_INET)
    return str(found[4][0]), found[0]


def _toward(peer: str, interfaces: dict[str, list[str]]) -> dict[str, str]:
    found = _address(peer)
    if isinstance(found, str):
        return {"address": "", "interface": "", "local": "", "said": found}
    address, family = found
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing; only asks for the route
            probe.connect((address, 9))
            local = str(probe.getsockname()[0])
    except OSError as error:
        return {"address": address, "interface": "", "local": "", "said": error.strerror or str(error)}
    names = [name for name, addresses in interfaces.items() if local in addresses]
    return {"address": address, "interface": names[0] if names else "", "local": local, "said": ""}


def _reads(path: Path, content: str) -> bool:
    try:
        return path.read_text(encoding="ascii") == content
    except (OSError, UnicodeDecodeError):
        return False


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _one_line(error: object, *, name: bool = True) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return (f"{type(error).__name__}: {text}" if name else text)[:300]


def main() -> None:
    """Answer until the input ends, then take away what was written."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else writes to stdout (a library, on import) must not stand among the answers
    written: list[Path] = []

    def leave(number: int = 0, frame: FrameType | None = None) -> None:
        for path in written:
            with suppress(OSError):
                path.unlink()
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            said: dict[str, Any] = {"answer": answer(question, written)}
        except Exception as error:  # of any kind: the other side is to hear it
            said = {"failed": _one_line(error)}
        replies.write(json.dumps(said) + "\n")
        replies.flush()
    leave()


if __name__ == "__main__":
    main()
