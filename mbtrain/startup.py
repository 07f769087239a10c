"""What a start takes: seconds from the begin of this process to the end of its first step, part by part."""

from __future__ import annotations

import os
import time
from pathlib import Path

_LOADED_S = time.monotonic()


def age_s() -> float:
    """Seconds since this process began, imports included, to 0.01 s; where no kernel says it, since this was loaded."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _LOADED_S


class Startup:
    """The parts of a start, in order, each with its seconds; what is before the first one belongs to it."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.until_s = 0.0
        self.cpu_s = 0.0

    def done(self, part: str) -> None:
        """This part ends here; only the first time counts."""
        if part not in self.parts:
            now_s = age_s()
            self.parts[part] = now_s - self.until_s
            self.until_s, self.cpu_s = now_s, time.process_time()

    def metrics(self) -> dict[str, float]:
        """start/<part>_s of each part, start/in_all_s, and start/cpu_s: this process's, all its threads, until then."""
        parts = {f"start/{part}_s": round(seconds, 3) for part, seconds in self.parts.items()}
        return {**parts, "start/in_all_s": round(self.until_s, 3), "start/cpu_s": round(self.cpu_s, 3)}

    def __str__(self) -> str:
        parts = ", ".join(f"{part.replace('_', ' ')} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"{self.until_s:.1f} s after the process began ({parts})"
