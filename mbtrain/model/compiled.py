"""C beside Python: sources of this folder, built by the machine's own compiler where there is one, and loaded.

Each is built once a machine (one to three seconds), to a name that follows from sources, compiler and processor, and
moved there when it is whole. Without compiler, or with MBTRAIN_NATIVE=0, there is none, and everything is torch's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# Sums are reordered where the source says so, and nowhere else.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def compiler() -> str | None:
    """The machine's C compiler: CC, or cc."""
    return shutil.which(os.environ.get("CC", "cc"))


@functools.cache
def library(name: str, *flags: str) -> ctypes.CDLL | None:
    """NAME.c of this folder, built with these flags more, and loaded; None where that cannot be, or is not wanted."""
    found = compiler()
    if found is None or os.environ.get("MBTRAIN_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(built(found, name, *flags)))
    except (OSError, subprocess.SubprocessError):
        return None


def built(compiler: str, name: str, *flags: str) -> Path:
    """The library's path; what lies there is whole and nobody else's, or is made anew. Raises OSError, SubprocessError.

    A library that is cut off would kill the process that loads it, so it ends with its own hash.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    sources = b"".join(path.read_bytes() for path in (HERE / f"{name}.c", *sorted(HERE.glob("*.h"))))
    flags = (*FLAGS, *flags)
    key = hashlib.sha256(sources + repr(flags).encode() + version + _processor().encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbtrain"
    path = folder / f"{name}-{key[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if path.exists() and path.stat().st_uid != os.geteuid():
        raise PermissionError(f"{path}: another user's; code of his is not run")
    if not _is_whole(path):
        with tempfile.TemporaryDirectory(dir=folder) as room:
            made = Path(room) / path.name
            command = [compiler, *flags, str(HERE / f"{name}.c"), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())
            made.replace(path)
    return path


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _processor() -> str:
    """What the instructions that -march=native may use depend on: a home directory is often several machines'."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model", "flags", "Features", "CPU "))}))
