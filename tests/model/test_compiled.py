"""C is built once a machine, whole, and nobody else's is run.

pytest tests/model/test_compiled.py
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mbtrain.model import compiled

COMPILER = shutil.which("cc") or ""
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler")


def test_the_library_is_built_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = compiled.built(COMPILER, "native", "-fopenmp-simd")
    assert [path.name for path in (tmp_path / "mbtrain").iterdir()] == [built.name]
    made = built.stat().st_mtime_ns
    assert compiled.built(COMPILER, "native", "-fopenmp-simd") == built
    assert built.stat().st_mtime_ns == made
    assert built.parent.stat().st_mode & 0o077 == 0, "nobody else puts a library there"


def test_a_library_that_is_cut_off_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = compiled.built(COMPILER, "native", "-fopenmp-simd")
    path.write_bytes(path.read_bytes()[:1000])
    assert compiled.library.__wrapped__("native", "-fopenmp-simd") is not None
    assert path.stat().st_size > 1000


def test_another_users_library_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.built(COMPILER, "native", "-fopenmp-simd")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert compiled.library.__wrapped__("native", "-fopenmp-simd") is None


def test_another_header_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = compiled.built(COMPILER, "native", "-fopenmp-simd")
    shutil.copytree(compiled.HERE, tmp_path / "model")
    monkeypatch.setattr(compiled, "HERE", tmp_path / "model")
    assert compiled.built(COMPILER, "native", "-fopenmp-simd") == built
    header = tmp_path / "model" / "vectors.h"
    header.write_text(header.read_text() + "/* . */\n")
    assert compiled.built(COMPILER, "native", "-fopenmp-simd") != built
