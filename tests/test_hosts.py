"""Hostfiles and ssh command lines: what is read, what is refused, and that arguments arrive as they were given.

pytest tests/test_hosts.py
"""

from __future__ import annotations

import shlex
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbtrain import hosts
from mbtrain.errors import ConfigError
from mbtrain.hosts import Host


def read(folder: Path, text: str) -> list[Host]:
    path = folder / "hostfile"
    path.write_text(text)
    return hosts.read_hostfile(path)


def test_a_hostfile_is_read_in_its_order(tmp_path: Path) -> None:
    text = "# two of them\n\nnode-b slots=8\n  node_a.cluster\tslots=4   # the old one\n10.0.0.3 slots=1\n"
    wanted = [Host("node-b", 8), Host("node_a.cluster", 4), Host("10.0.0.3", 1)]
    assert read(tmp_path, text) == wanted
    assert read(tmp_path, hosts.hostfile_text(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a line NAME slots=N for each host, got none"),
        ("# a slots=1\n", "got none"),
        ("a slots=1\nb\n", "line 2: expected NAME slots=N"),
        ("a slots=0\n", "line 1: expected NAME slots=N"),
        ("a slots=-1\n", "line 1: expected NAME slots=N"),
        ("a slots=many\n", "line 1: expected NAME slots=N"),
        ("a slots = 2\n", "line 1: expected NAME slots=N"),
        ("a b slots=2\n", "line 1: expected NAME slots=N"),
        ("a slots=2\nb slots=2\na slots=2\n", "line 3: a is there already"),
        ("root@a slots=1\n", "line 1: host name 'root@a': expected letters"),
        ("-oProxyCommand=reboot slots=1\n", "line 1: host name '-oProxyCommand=reboot'"),
        ("a;reboot slots=1\n", "line 1: host name 'a;reboot'"),
        ("$(reboot) slots=1\n", "line 1: host name '$(reboot)'"),
        ("a,b slots=1\n", "line 1: host name 'a,b'"),
        ("../a slots=1\n", "line 1: host name '../a'"),
        ("nöde slots=1\n", "line 1: host name 'nöde'"),
    ],
)
def test_another_line_is_refused_with_its_number(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert said in str(error.value)
    assert str(tmp_path / "hostfile") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hostfile_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        hosts.read_hostfile(tmp_path / "nowhere")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe slots=1")
    with pytest.raises(ConfigError, match="not UTF-8"):
        hosts.read_hostfile(tmp_path / "bytes")


@given(st.text(max_size=20))
def test_a_name_that_passes_is_one_word_everywhere(name: str) -> None:
    try:
        hosts.checked_name(name)
    except ConfigError:
        return
    assert set(name) <= set(string.ascii_letters + string.digits + "._-")
    assert name[0] not in "-._"
    assert shlex.quote(name) == name


def test_a_name_of_a_line_and_a_newline_is_refused() -> None:
    """`$` of a pattern would let one newline pass at the end."""
    for name in ("a\n", "a\nb", "", "a-", ".", "a" * 254):
        with pytest.raises(ConfigError):
            hosts.checked_name(name)
    assert hosts.checked_name("a" * 253)


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_arguments_arrive_as_they_were_given(words: list[str]) -> None:
    """What ssh would hand to the shell of the other side, handed to one here."""
    command = hosts.ssh_command("node-a", ["printf", "%s\\0", *words], port=2222, connect_timeout_s=3)
    *options, dashes, host, line = command
    assert (options[0], dashes, host) == ("ssh", "--", "node-a")
    assert "BatchMode=yes" in options
    assert "ConnectTimeout=3" in options
    assert options[-2:] == ["-p", "2222"]
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words


@pytest.mark.parametrize("host", ["-oProxyCommand=id", "user@a", "a b", "a;b", ""])
def test_no_other_name_reaches_ssh(host: str) -> None:
    with pytest.raises(ConfigError, match="host name"):
        hosts.ssh_command(host, ["true"])
