"""Measurements: verbs of `mbtrain bench`, never timed tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VERBS: dict[str, Callable[..., dict[str, Any]]] = {}
