"""What the machine is, and the most that its arithmetic unit does: measured on CPU, tabled for GPUs, else unknown."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mbtrain import gpus


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that one process could reach; None where that is unknown (never guessed).

    CPU: the best of a few matrix products of this precision, with this process's threads, run now (about 0.3 s).
    """
    if device.type == "cpu":
        return measured_peak(torch.float32 if precision == "fp32" else torch.bfloat16)
    return gpus.peak(torch.cuda.get_device_name(device), precision)


def measured_peak(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """The fastest of repeated products of two square matrices, in operations per second."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        t = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - t)
    return 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on the GPU, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment(device: torch.device, ranks: int) -> dict[str, Any]:
    """What a reader needs to judge a run: versions, device, host, commit."""
    packages = ("torch", "deepspeed", "numpy", "mlflow", "mbtrain")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "host": socket.gethostname(),
        "device": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": torch.get_num_threads(),
        "ranks": ranks,
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's name as Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str:
    """The commit of the code, with -dirty where it was changed; unknown outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
