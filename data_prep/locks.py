"""Locks of a data set's folder between processes and machines: one job at a time, or the parts of one job."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.pool import say
from mbtrain.errors import DataError

LOCK_NAME = ".prep.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def folder_lock(out: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a data set's folder: alone, or together with the other parts of its job. The lock ends with this process.

    Raises:
        DataError: another process holds it otherwise.
    """
    what = "another mbtrain-prep works on it"
    if not shared:
        what += ", or a part of it"
    with file_lock(out / LOCK_NAME, f"{out}: {what}; wait for it, or choose another folder", shared=shared):
        yield


@contextmanager
def file_lock(path: Path, message: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, made here and removed by the last that holds it.

    `wait` for it, or raise DataError(message) if it is held otherwise. Where the file system has no locks, a line says
    so, and it is up to the user that no two jobs meet.
    """
    descriptor = _locked(path, message, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait)
    try:
        yield
    finally:
        if shared:  # the last one out: those that hold it too make this fail
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        else:
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _locked(path: Path, message: str, kind: int, wait: bool) -> int:
    while True:
        # written to, for a network file system lends a lock against others to writers alone
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DataError(message) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            say(f"warning: {path.parent}: no locks on this file system; see that no two jobs work on this folder")
            return descriptor
        # the file may have been removed by the last one out between the opening and the lock
        with suppress(FileNotFoundError):
            mine, there = os.fstat(descriptor), path.stat()
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                return descriptor
        os.close(descriptor)
