"""RUN/metrics.jsonl: the truth about a run, one JSON object a line.

    {"step": 40, "time_unix_s": 1760000000.125, "train/bpb": 1.93, "progress/bytes": 2621440, "val/bpb": "nan"}

A line counts once its newline is there; what a killed process left after the last newline never happened, and every
function here treats it so. JSON knows no non-finite numbers, therefore they stand as the strings "nan", "inf" and
"-inf", so that any JSON reader can read the file, and `read` gives them back as floats. Integers stay exact.
"""

import errno
import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mbtrain.errors import DataError

LINE_BYTES = 4 << 20  # at most, of a line

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def append(path: Path | str, step: int, values: Mapping[str, float]) -> None:
    """Add one line: `step`, `time_unix_s` (now, unless `values` has it) and the values, by a single write.

    An unfinished last line of a killed process is cut off first. No fsync: a line survives the death of the process,
    not that of the machine, and a step never waits for a disk.

    Raises ValueError if `values` has a key `step` or a value that is no number, OSError if the line could not be
    written whole (then nothing of it is left in the file).
    """
    if "step" in values:
        raise ValueError("metrics: 'step' is the line's own key, pass it as an argument")
    record: dict[str, float | str] = {"step": int(step), "time_unix_s": round(time.time(), 3)}
    record |= {key: _to_json(value) for key, value in values.items()}
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        end = _end_of_last_line(fd)
        os.ftruncate(fd, end)
        if os.write(fd, line) != len(line):
            os.ftruncate(fd, end)
            raise OSError(errno.ENOSPC, "the line did not fit; is the disk full?", str(path))
    finally:
        os.close(fd)


def read(path: Path | str) -> list[dict[str, Any]]:
    """All lines, in the order of the file; of a long run some kilobytes each, so see `stream`.

    The last line may be broken, because its writer or the machine died, and is then left out.

    Raises DataError if the file is missing, or if any other line is no JSON object with an integer `step`.
    """
    return list(stream(path))


def stream(path: Path | str) -> Iterator[dict[str, Any]]:
    """What `read` gives, one line at a time. Raises as it does."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected the metrics of a run") from None
    with file:
        for _, record in _lines(path, file):
            yield record


def salvage(path: Path | str) -> Iterator[dict[str, Any] | None]:
    """What `stream` gives, and None for each line that is damaged, where `stream` raises: for showing, not resuming.

    Raises DataError if the file is missing.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected the metrics of a run") from None
    with file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), start=1):
            if not line.endswith(b"\n") and len(line) < LINE_BYTES:
                return  # the end, which its writer did not finish
            try:
                yield _parse(path, number, line[:-1])
            except DataError:
                yield None


def last(path: Path | str) -> dict[str, Any] | None:
    """The last whole line, or None if there is none. Reads the end of the file only.

    Raises DataError as `read` does, for the lines it looks at.
    """
    try:
        with open(path, "rb") as file:
            size, window = file.seek(0, os.SEEK_END), 1 << 16
            while True:
                start = max(0, size - window)
                file.seek(start)
                data = file.read(size - start)
                if start:  # the first piece is the end of some line
                    data = data[data.find(b"\n") + 1 :]
                try:
                    lines = list(_lines(path, io.BytesIO(data)))
                except DataError:
                    return read(path)[-1]  # raises too, with the right line number
                if lines or start == 0:
                    return lines[-1][1] if lines else None
                window *= 4
    except FileNotFoundError:
        return None


def truncate_after(path: Path | str, step: int) -> int:
    """Drop all lines with a step above `step`, and a broken last line; return how many whole lines were dropped.

    For resuming: the steps after the checkpoint will be made, and written, again. Atomic: a new file takes the place of
    the old one (so a reader sees a new inode and starts over, see `Tail`), and is on the disk when this returns.
    Nothing is written where nothing is to drop. A missing file is an empty one.

    Raises DataError as `read` does.
    """
    path = Path(path)
    kept: list[list[int]] = []  # stretches of the file, start and end
    dropped = offset = 0
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return 0
    with file:
        for line, record in _lines(path, file):
            start, offset = offset, offset + len(line)
            if record["step"] > step:
                dropped += 1
            elif kept and kept[-1][1] == start:
                kept[-1][1] = offset
            else:
                kept.append([start, offset])
        if sum(end - start for start, end in kept) == os.fstat(file.fileno()).st_size:
            return 0
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as out:
            for start, end in kept:
                file.seek(start)
                while start < end:
                    start += out.write(file.read(min(end - start, LINE_BYTES)))
            out.flush()
            os.fsync(out.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return dropped


class Tail:
    """Follows a metrics file that another process appends to.

    `read` gives the whole lines that came since the last call. If the file was replaced or became shorter (a resume
    dropped lines), it starts over from the first line: the caller decides which steps it has seen. The file is held
    open, because an inode number may be used again only after the last one to hold it has closed it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._fd = -1
        self._offset = 0
        self._line = 0

    def read(self, limit_bytes: int = LINE_BYTES) -> list[dict[str, Any]]:
        """The next whole lines, at most `limit_bytes` of them; [] if there are none now (or no file yet).

        Raises DataError if a line is no JSON object with an integer `step`, or is longer than the limit.
        """
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            self.close()
            return []
        if self._fd >= 0:
            held = os.fstat(self._fd)
            if (held.st_dev, held.st_ino) != (now.st_dev, now.st_ino) or held.st_size < self._offset:
                self.close()
        if self._fd < 0:
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return []
        data = os.pread(self._fd, limit_bytes, self._offset)
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) == limit_bytes:
            raise DataError(f"{self.path}:{self._line + 1}: a line of more than {limit_bytes} bytes")
        lines = data[:end].split(b"\n")[:-1]
        records = [_parse(self.path, self._line + i, line) for i, line in enumerate(lines, start=1)]
        self._offset += end
        self._line += len(lines)
        return records

    def close(self) -> None:
        """Close the file; the next `read` opens it again and starts from the first line."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._offset, self._line = -1, 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _to_json(value: float) -> float | int | str:
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    if math.isfinite(number):
        return number
    return "nan" if math.isnan(number) else "inf" if number > 0 else "-inf"


def _end_of_last_line(fd: int) -> int:
    """Offset just behind the last newline; 0 if there is none."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - 4096)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _lines(path: Path | str, file: BinaryIO) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line with its newline, record) of each whole line; a broken line is forgiven only at the very end."""
    problem: DataError | None = None
    for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), start=1):
        if problem:
            raise problem
        if not line.endswith(b"\n"):
            if len(line) == LINE_BYTES:
                raise DataError(f"{path}:{number}: a line of more than {LINE_BYTES} bytes")
            return
        try:
            record = _parse(path, number, line[:-1])
        except DataError as error:
            problem = error
        else:
            yield line, record


def _parse(path: Path | str, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        shown = line[:60].decode(errors="replace")
        raise DataError(
            f"{path}:{number}: expected a JSON object with an integer 'step', got {shown!r}; "
            "the file was changed or damaged: mend or remove this line"
        )
    return {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}
