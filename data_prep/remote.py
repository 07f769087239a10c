"""Source files on the network, by fsspec: listed, opened, and read again from where the network failed.

    s3://  gs://  gcs://  abfs://  hf://  memory://     a file, or a folder with all that is in it
    https://  http://                                   a file

No other protocol is followed, and none inside another (`a::b`): some of fsspec's run commands or read what is local.
Keys and accounts are where each service's own tools look for them; the library knows none.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from data_prep.wording import reason_of
from mbtrain.errors import DataError
from mbtrain.redact import without_password

# Protocols that are followed, and what is to be installed for each.
PROTOCOLS = {
    "s3": "mbtrain[s3]",
    "gs": "mbtrain[gcs]",
    "gcs": "mbtrain[gcs]",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
    "https": "aiohttp",
    "http": "aiohttp",
    "memory": "fsspec",
}
_WEB = ("https", "http")
_BLOCK_BYTES = 8 * 1024**2
_WAITS_S = (0.5, 2.0, 8.0)

# What the file systems call a content's mark, and its time.
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "checksum", "blob_id", "sha", "generation")
_TIMES = ("LastModified", "mtime", "updated", "last_modified", "Last-Modified", "created")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the network. `name` is its path from the folder that was listed; size is 0 if nobody knows it.

    `version` is what tells one content from another, as KEY=VALUE: a checksum, else the time of the last change; or ''.
    """

    url: str
    name: str
    size: int
    mtime_ns: int
    version: str


def is_remote(source: str) -> bool:
    """Whether a source is a URL, rather than a path; `file://` counts as a path (see `local_path`)."""
    return "://" in source and not source.startswith("file://") and not os.path.lexists(source)


def local_path(source: str) -> str:
    """The path of `file:///a/b`; every other source as it is."""
    return source.removeprefix("file://")


def find_remote(url: str) -> tuple[bool, list[RemoteFile]]:
    """Whether a URL is of a folder, and the files there, in no particular order: a file alone, or all in the folder.

    Raises:
        DataError: the protocol is not one that is followed, its package is missing, there is nothing, or the network
            failed.
    """
    system, root = _file_system(url)

    def find() -> tuple[bool, dict[str, dict[str, Any]]]:
        info = system.info(root)
        if info["type"] != "directory":
            return False, {root: info}
        return True, system.find(root, detail=True)

    is_folder, found = _insist(url, find)
    if not is_folder:
        return False, [_remote_file(url, _without_query(url).rstrip("/").rpartition("/")[2], found[root])]
    above = root.rstrip("/") + "/"
    files = []
    for path, info in found.items():
        if info["type"] != "file" or path.endswith("/"):  # object stores have empty objects that stand for folders
            continue
        if not path.startswith(above):
            raise DataError(f"{shown(url)}: its listing has {path!r}, which is not in it; name its files one by one")
        name = path[len(above) :]
        files.append(_remote_file(f"{url.rstrip('/')}/{name}", name, info))
    return True, files


def stat_remote(url: str) -> RemoteFile:
    """A single file as it is now; DataError if it is gone or the network failed."""
    system, root = _file_system(url)
    system.invalidate_cache()
    return _remote_file(url, "", _insist(url, lambda: system.info(root)))


def open_remote(url: str, size: int, count: Callable[[int], None]) -> io.RawIOBase:
    """A remote file's bytes; `size` is 0 if unknown, and `count` is told of what is read.

    A network that fails is tried again, from the byte where it failed.

    Raises:
        DataError: (by reading too) the network failed again and again, or the file is gone.
    """
    return _RemoteReader(url, size, count)


def shown(url: str) -> str:
    """A URL less its query, which may hold a signature that gives access, and less a password."""
    return _without_query(without_password(url))


def _without_query(url: str) -> str:
    return url.partition("?")[0].partition("#")[0] if url.split("://")[0].lower() in _WEB else url


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path there."""
    protocol = url.partition("://")[0].lower()
    if "::" in url:
        raise DataError(f"{shown(url)}: expected a plain URL, got one inside another (::); name the file itself")
    if protocol not in PROTOCOLS:
        expected = ", ".join(f"{known}://" for known in PROTOCOLS)
        raise DataError(f"{shown(url)}: expected a path or one of {expected}; copy the files to one of these first")
    options: dict[str, Any] = {}
    try:
        import fsspec

        if protocol in _WEB:
            import aiohttp

            # what is compressed is to come as it is; a long file may take long, but not a single read
            options["headers"] = {"Accept-Encoding": "identity"}
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=30, sock_read=60)}
        system, root = fsspec.url_to_fs(protocol + url[len(protocol) :], **options)
    except ImportError as error:
        raise DataError(
            f"{shown(url)}: a package is missing ({reason_of(error)}); pip install '{PROTOCOLS[protocol]}'"
        ) from None
    except Exception as error:  # every service has errors of its own, for a missing account and more
        raise DataError(f"{shown(url)}: cannot be opened: {reason_of(error)}; check the address and account") from None
    return system, str(root)


def _remote_file(url: str, name: str, info: dict[str, Any]) -> RemoteFile:
    mtime_ns = _nanoseconds(next((info[key] for key in _TIMES if info.get(key)), None))
    by_time = f"time={mtime_ns}" if mtime_ns else ""
    version = next((f"{key}={info[key]}" for key in _MARKS if info.get(key)), by_time)
    return RemoteFile(url, name, info.get("size") or 0, mtime_ns, version)


def _nanoseconds(moment: object) -> int:
    """Since 1970, of a datetime, a text in one of the two common forms, or seconds; 0 if it is none of them."""
    if isinstance(moment, str):
        for read in (datetime.fromisoformat, parsedate_to_datetime):
            with suppress(ValueError):
                return _nanoseconds(read(moment))
    if isinstance(moment, datetime):
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return int(moment * 1e9) if isinstance(moment, int | float) else 0


def _insist(url: str, action: Callable[[], _T], place: str = "") -> _T:
    """Do something on the network, again after a while where it fails.

    Raises:
        DataError: it failed to the last, or there is no such file, or no right to it.
    """
    for wait_s in (*_WAITS_S, None):
        try:
            return action()
        except Exception as error:  # every service has errors of its own
            # of http, fsspec says of every failure that there is no such file; its cause knows better
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            status = getattr(cause, "status", 0)
            if isinstance(cause, FileNotFoundError) or status in (404, 410):
                raise DataError(f"{shown(url)}: no such file or folder; check the address") from None
            if isinstance(cause, PermissionError) or status in (401, 403):
                raise DataError(f"{shown(url)}: no right to read it; check the address and account") from None
            if wait_s is None:
                where = f"{shown(url)}: cannot be read{place} ({reason_of(cause)})"
                raise DataError(
                    f"{where}; when the network is back, run the same command again: it goes on where it was"
                ) from None
            time.sleep(wait_s)
    raise AssertionError("unreachable")


class _RemoteReader(io.RawIOBase):
    """A remote file that is opened again, where it was, when the network fails.

    From the web it is read in one request as long as it is read from its start on, as not every server has ranges.
    """

    def __init__(self, url: str, size: int, count: Callable[[int], None]) -> None:
        self._url, self._size, self._count = url, size, count
        self._system, self._root = _file_system(url)
        self._is_web = url.lower().startswith(_WEB)
        self._file: Any = None
        self._seekable: bool | None = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        if self._seekable is None:
            self._seekable = self._size > 0 and self._attempt(self._find_seekable)
        return self._seekable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if not self.seekable() or position < 0:
            raise OSError(f"cannot seek to {position}")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._attempt(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        self._count(len(data))
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._forget()
        super().close()

    def _attempt(self, action: Callable[[], _T]) -> _T:
        def attempt() -> _T:
            try:
                return action()
            except Exception:
                self._forget()
                raise

        return _insist(self._url, attempt, f" at byte {self._position}")

    def _forget(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):  # it has failed already, or is done with
                file.close()

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._open()
        if self._seekable:
            self._file.seek(self._position)
        data: bytes = self._file.read(size)
        if not data and size and self._position < self._size:
            raise EOFError(f"it ended before its {self._size} bytes were read")
        return data

    def _open(self) -> None:
        """Open the file, to be read from the position on."""
        if not self._is_web or (self._position and self.seekable()):
            self._file = self._file or self._system.open(self._root, "rb", block_size=_BLOCK_BYTES)
            self._file.seek(self._position)
            return
        self._forget()
        self._file = self._system.open(self._root, "rb", block_size=0)
        left = self._position
        while left:
            got = len(self._file.read(min(left, _BLOCK_BYTES)))
            if not got:
                raise EOFError("it is shorter than it was")
            left -= got

    def _find_seekable(self) -> bool:
        """Whether the file can be read at any place; if so, open it that way."""
        self._forget()
        file = self._system.open(self._root, "rb", block_size=_BLOCK_BYTES)
        try:
            file.seek(self._size - 1)
            if self._is_web:  # only trying tells
                file.read(1)
        except (ValueError, NotImplementedError):
            file.close()
            return False
        self._file = file
        return True
