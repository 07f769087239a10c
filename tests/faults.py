"""Faults, to be injected one by one: damaged files, a full disk, a stopped process, a server that never answers."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


def flip(file: Path, at: float = 0.5) -> None:
    """Flip one bit, where it stands: whoever has the file open sees it."""
    with file.open("r+b") as opened:
        position = int(file.stat().st_size * at)
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1]))


def cut(file: Path, at: float = 0.5) -> None:
    """Cut a file off."""
    os.truncate(file, int(file.stat().st_size * at))


def folder_instead(file: Path) -> None:
    """Put a folder in a file's place."""
    file.unlink()
    file.mkdir()


# What is done to one file of a checkpoint: which file, how, and what is to be said of it.
DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("weights-*", flip, "its content is not what was written"),
    ("moments-*", flip, "its content is not what was written"),
    ("checkpoint.json", flip, "checkpoint.json: "),
    ("weights-*", cut, "its content is not what was written"),
    ("checkpoint.json", cut, "checkpoint.json: damaged"),
    ("moments-*", lambda file: cut(file, 0), "its content is not what was written"),
    ("checkpoint.json", lambda file: cut(file, 0), "checkpoint.json: damaged"),
    ("weights-*", Path.unlink, "missing"),
    ("checkpoint.json", Path.unlink, "checkpoint.json: No such file"),
    ("moments-*", folder_instead, "missing"),
    ("checkpoint.json", folder_instead, "checkpoint.json: Is a directory"),
]


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system in memory of so many bytes. Raises OSError where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    if mount is None:
        raise OSError("no `mount` here")
    command = [mount, "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(" ".join(done.stderr.split()))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def fill(folder: Path) -> Path:
    """Fill a disk to its last byte; the file that does it. Removed, there is room again."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


@contextlib.contextmanager
def silent_server() -> Iterator[tuple[str, list[int]]]:
    """A server on loopback that accepts every connection and never says a word: (its URI, one entry a connection)."""
    held: list[socket.socket] = []
    accepted: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(listening.accept()[0])
                    accepted.append(len(held))

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", accepted
        listening.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()
