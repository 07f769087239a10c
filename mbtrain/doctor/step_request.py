"""How the ranks of `step` are told what to do, and how what they say is known; without torch, for the asking side."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any

MARK = "mbtrain-doctor "  # begins each line that is meant for the asking side


def encoded(request: dict[str, Any]) -> str:
    """The request as one word that needs no quoting in any shell or launcher, and is no option."""
    return urlsafe_b64encode(json.dumps(request).encode()).decode().rstrip("=")


def decoded(text: str) -> dict[str, Any]:
    """What `encoded` was given."""
    return dict(json.loads(urlsafe_b64decode(text + "=" * (-len(text) % 4))))
