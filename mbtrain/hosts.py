"""The hosts of a run: read from a DeepSpeed hostfile, their names checked before they reach ssh, and asked over ssh.

    # a line a host, and how many ranks it may run
    node-a slots=8
    node-b slots=8

A name becomes an argument of ssh, pdsh and the like. So it may hold letters, digits, dots, hyphens and underscores and
nothing else, and begins with a letter or a digit: it can be no option, no user, no path and no part of a shell's line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbtrain.errors import ConfigError

# re.ASCII is implied by the explicit ranges; 253 characters are the longest name that DNS knows.
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_SLOTS = re.compile(r"slots=([0-9]{1,4})")


@dataclass(frozen=True)
class Host:
    """A host and the most ranks that it runs."""

    name: str
    slots: int


def checked_name(name: str) -> str:
    """The name itself, when it can only be a host's name. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"host name {name!r}: expected letters, digits, dots, hyphens and underscores, a letter or digit first and "
            "last; a user or port belongs into ~/.ssh/config"
        )
    return name


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a file of lines `NAME slots=N`, in its order; # begins a comment.

    Raises:
        ConfigError: the file cannot be read or names no host; a line is another, or names a host again.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"--hostfile={path}: cannot be read ({said}); a line is NAME slots=N") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        slots = _SLOTS.fullmatch(words[-1]) if len(words) == 2 else None
        if slots is None or int(slots[1]) < 1:
            raise ConfigError(f"{where}: expected NAME slots=N with N of at least 1, got {line.strip()!r}")
        try:
            name = checked_name(words[0])
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        if name in hosts:
            raise ConfigError(f"{where}: {name} is there already; give its slots in one line")
        hosts[name] = Host(name, int(slots[1]))
    if not hosts:
        raise ConfigError(f"{path}: expected a line NAME slots=N for each host, got none")
    return list(hosts.values())


def hostfile_text(hosts: Iterable[Host]) -> str:
    """What `read_hostfile` reads back."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def ssh_command(host: str, argv: Sequence[str], *, port: int | None = None, connect_timeout_s: float = 10) -> list[str]:
    """The command that runs argv on a host over ssh, each argument arriving there as it is given here.

    It asks for no password and waits connect_timeout_s at most for the connection; what runs there is not limited, and
    a connection that says nothing for three times five seconds is given up. Raises ConfigError for a name that is none.
    """
    settings = {
        "BatchMode": "yes",
        "ConnectTimeout": str(max(1, round(connect_timeout_s))),
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    if port is not None:
        options += ["-p", str(int(port))]
    # ssh joins what follows the host with spaces and gives it to a shell there: one word, quoted for that shell.
    return ["ssh", "-T", *options, "--", checked_name(host), shlex.join(argv)]
