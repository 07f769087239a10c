"""What may not stand in a log or a file: secrets, and characters that a terminal would obey.

Whatever others wrote - a server's answer, an error of a library, a name - passes here before it is said.
"""

from __future__ import annotations

import os
import re

# scheme://user:password@host, to the last @. What follows the colon is a port where digits stand before a slash.
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<user>[^\s/:@?#]*)(?::(?!\d+(?:[/?#\s]|$))[^\s'\"]*)?@")
# ?password=, ?X-Amz-Signature= and the like
_PARAMETER = re.compile(
    r"(?P<name>[?&;][\w.-]*(?:passw|pwd|token|secret|key|signature|sig|credential)[\w.-]*=)[^&;#\s'\"]+", re.IGNORECASE
)
_VARIABLE = re.compile(r"(?:^|_)(?:PASSWORD|PASSWD|PASS|TOKEN|SECRET|KEY|CREDENTIALS?)$")
_SHORTEST = 6  # characters: a shorter value of such a variable stands in too many texts by chance


def without_password(text: str) -> str:
    """Addresses in `text` without `user:password@` (of a database the user stays), and no secret parameter after `?`.

    What `http://user:password@host` was is `http://host`: the form in which addresses are written to files.
    """
    return _PARAMETER.sub(r"\g<name>***", _USER.sub(_user_alone, text))


def redact(text: str) -> str:
    """`without_password`, and no value of an environment variable that is named as a secret (*_PASSWORD, *_TOKEN)."""
    text = without_password(text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _VARIABLE.search(name.upper()):
            text = text.replace(value, "***")
    return text


def one_line(text: str, most_characters: int = 2000) -> str:
    """`redact`, on one line, where a control character is written as \\x1b: nothing that a terminal obeys."""
    text = " ".join(redact(text[: 2 * most_characters]).split())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return text if len(text) <= most_characters else text[: most_characters - 3] + "..."


def _user_alone(found: re.Match[str]) -> str:
    scheme, user = found["scheme"], found["user"]
    # Before a host that speaks http, a name alone may be a token.
    return f"{scheme}://" if scheme.lower() in ("http", "https") or not user else f"{scheme}://{user}@"
