"""Fixtures that tests share, and the environment that keeps tests alone on a machine."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.pop("MLFLOW_TRACKING_URI", None)
# A shell starts its background jobs deaf to Ctrl-C, and so would be all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set of two sources: word-like text, and bytes of every value."""
    from data_prep.cli import main

    root = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for source in ("words", "noise"):
        (root / source).mkdir()
    words = ["byte", "patch", "stage", "model", "row"]
    for i in range(60):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(5, 120)))
        (root / "words" / f"{i:03d}.txt").write_text(text)
        (root / "noise" / f"{i:03d}.bin").write_bytes(rng.randbytes(rng.randint(1, 100)) + b"\0" * 20)
    sources = [str(root / "words"), str(root / "noise")]
    with pytest.raises(SystemExit) as end:
        main(["text", *sources, f"--out={root / 'shards'}", "--splits=train=0.7,val=0.3", "--workers=1"])
    assert end.value.code == 0
    return root / "shards"
