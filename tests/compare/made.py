"""Run directories as trainings leave them, with curves that are known."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import yaml

from mbtrain import config
from tests import tiny

STEP_BYTES = 1000
FLOPS_PER_BYTE = 6e6
STEP_MINUTES = 0.01


def bpb_at(step: int, floor: float) -> float:
    """The curve that made runs follow."""
    return floor + 6 * math.exp(-step / 20)


def run(
    folder: Path, *, floor: float = 2.0, steps: int = 100, data: str = "books", modality: str = "text", **sections: Any
) -> Path:
    """A finished run of `steps` lines, validated in part at half time and in whole at its end."""
    folder.mkdir(parents=True)
    tree = tiny.tree(**sections)
    (folder / "config.yaml").write_text(config.to_yaml(config.validate({**tree, "name": "tiny"})))
    environment = {
        "device": "a core",
        "tags": {"dataset_hash": f"hash of {data}"},
        "model": {"parameters": 12345},
        "data": [{"name": data, "modality": modality}],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    lines: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        values = {
            "train/bpb": bpb_at(step, floor),
            "perf/bytes_per_s": 5000 + step,
            "perf/mfu": 0.5,
            "mem/peak_bytes": 1_000_000 + step,
            "progress/bytes": step * STEP_BYTES,
            "progress/flops": step * STEP_BYTES * FLOPS_PER_BYTE,
            "progress/minutes": step * STEP_MINUTES,
        }
        time_s = 1e9 + 60 * STEP_MINUTES * step
        lines.append({"step": step, "time_unix_s": time_s, **values})
        if step in (steps // 2, steps):
            key = "val/bpb" if step == steps else "val/partial_bpb"
            where = {"progress/bytes": step * STEP_BYTES, "progress/minutes": step * STEP_MINUTES}
            lines.append({"step": step, "time_unix_s": time_s, key: bpb_at(step, floor) + 0.1, **where})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples").mkdir()
    (folder / "samples" / f"step_{steps:010d}.txt").write_bytes(b"a sample\n")
    (folder / "status.json").write_text('{"status": "FINISHED"}')
    return folder


def png(value: int = 128) -> bytes:
    """A picture of one grey pixel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes([0, value]))) + chunk(b"IEND", b"")


def wav() -> bytes:
    """A hundredth of a second of silence."""
    content = bytes(320)
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 356, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", 320
    )
    return head + content


def damaged(folder: Path, **values: Any) -> Path:
    """A run directory with other contents: of a file by its name with __ for the dot; None removes it."""
    for name, content in values.items():
        path = folder / name.replace("__", ".")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    return folder
