"""The measured process of `mbtrain bench data`: reads, alone or as the loader does; answers by the protocol of peer.py.

    python -m mbtrain.bench.reading

A request that opens something keeps it open for the next one, except `opening`, which a process answers but once.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mbtrain.bench.peer import serve
from mbtrain.data.loader import Shape, batches, micro_batch
from mbtrain.data.mixture import Mixture, Source
from mbtrain.data.rows import Stream
from mbtrain.shards import open_split

_READ_BYTES = 1024**2


def files(root: str, pattern: str = "*") -> list[Path]:
    """The files below a folder in the order of their names, or the one file."""
    path = Path(root)
    return [path] if path.is_file() else sorted(found for found in path.rglob(pattern) if found.is_file())


def blocks(paths: list[Path]) -> Iterator[bytes]:
    """The raw read: files one after the other, a MiB at a time."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while block := os.read(descriptor, _READ_BYTES):
                yield block
        finally:
            os.close(descriptor)


def mixture_of(root: str, seq_len: int) -> Mixture:
    """The training rows of a data set, in shuffled order with boundaries, as a run would open them."""
    stream = Stream(open_split(root, "train"), boundary=True, seed=0)
    return Mixture([Source("made", stream, ((0, 1.0),), None)], seq_len)


def picture(path: Path, size: int) -> bytes:
    """Pillow alone: decode, cut out the centre square, resize it; its RGB bytes."""
    from PIL import Image

    with Image.open(path) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).convert("RGB")
        return square.resize((size, size), Image.Resampling.LANCZOS).tobytes()


def read(root: str, pattern: str = "*") -> dict[str, Any]:
    """Read every file below a folder."""
    return {"bytes": sum(map(len, blocks(_files(root, pattern))))}


def sha256(root: str) -> dict[str, Any]:
    """Read and hash every file below a folder."""
    digest, n_bytes = hashlib.sha256(), 0
    for block in blocks(_files(root, "*")):
        digest.update(block)
        n_bytes += len(block)
    return {"bytes": n_bytes}


def copy(root: str, to: str) -> dict[str, Any]:
    """Read every file below a folder into one new file, and sync it: what the disk itself allows."""
    n_bytes = 0
    with open(to, "wb") as out:
        for block in blocks(_files(root, "*")):
            n_bytes += out.write(block)
        out.flush()
        os.fsync(out.fileno())
    os.unlink(to)
    return {"bytes": n_bytes}


def pillow(root: str, size: int) -> dict[str, Any]:
    """Every picture below a folder through `picture`; what Pillow cannot read is passed over."""
    from PIL import Image

    done = 0
    for path in _files(root, "*"):
        try:
            picture(path, size)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        done += 1
    return {"pictures": done}


def webdataset(root: str) -> dict[str, Any]:
    """Every sample of a data set's training split by webdataset's own reader, undecoded."""
    import webdataset as wds

    urls = [str(path) for path in _files(f"{root}/train", "*.tar")]
    return {"bytes": sum(len(sample["text"]) for sample in wds.WebDataset(urls, shardshuffle=False))}


def rows(root: str, seq_len: int, batch: int) -> dict[str, Any]:
    """About as many packed rows as a data set has, in batches; each call goes on where the last one ended."""
    mixture = _mixture(root, seq_len)
    n_batches = max(1, mixture.sources[0].stream.bytes_per_epoch // (seq_len * batch))
    first = _next_row.get((root, batch), 0)
    for number in range(n_batches):
        mixture.rows(first + number * batch, batch)
    _next_row[root, batch] = first + n_batches * batch
    return {"bytes": n_batches * batch * seq_len}


def opening(root: str, seq_len: int, batch: int) -> dict[str, Any]:
    """Open a data set and read the batch in the middle of its first epoch, as a run that goes on there."""
    began, had_read = time.perf_counter(), _bytes_read()
    import pyarrow.parquet  # noqa: F401

    imported = time.perf_counter()
    mixture = mixture_of(root, seq_len)
    opened = time.perf_counter()
    shape = Shape(seq_len, batch, accumulation=1, rank=0, ranks=1)
    middle = mixture.sources[0].stream.ids_per_epoch // 2 // shape.step_ids * shape.step_ids
    micro_batch(mixture, shape, middle, 0, shape.step_ids)
    return {
        "import_s": imported - began,
        "open_s": opened - imported,
        "resume_s": time.perf_counter() - opened,
        "peak_bytes": memory("VmHWM"),
        "read_bytes": _bytes_read() - had_read,
    }


def growth(root: str, seq_len: int, batch: int, n_batches: int) -> dict[str, Any]:
    """Take so many batches from the loader; this process's memory after 10, 50 and 100 % of them."""
    shape = Shape(seq_len, batch, accumulation=1, rank=0, ranks=1)
    marks = {max(n_batches * percent // 100, 1): percent for percent in (10, 50, 100)}
    resident: dict[str, int] = {}
    with batches(mixture_of(root, seq_len), shape, 0) as ready:
        for number in range(1, n_batches + 1):
            next(ready)
            if number in marks:
                resident[str(marks[number])] = memory("VmRSS")
    return {"resident_bytes": resident}


def memory(line: str) -> int:
    """Bytes of this process's memory by the kernel: VmRSS, resident now; VmHWM, the most so far.

    Not by getrusage: the child of a large process inherits that one's peak.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kib = next(text.split()[1] for text in status.splitlines() if text.startswith(f"{line}:"))
    return int(kib) * 1024


def _bytes_read() -> int:
    """Bytes that this process has read so far, from wherever."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


_files = cache(files)
_mixture = cache(mixture_of)
_next_row: dict[tuple[str, int], int] = {}


if __name__ == "__main__":
    serve(
        lambda: {
            "read": read,
            "sha256": sha256,
            "copy": copy,
            "pillow": pillow,
            "webdataset": webdataset,
            "rows": rows,
            "opening": opening,
            "growth": growth,
        }
    )
