"""What a run can be asked by `mbtrain eval`: modes that its model has, on data like its own. One line where not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mbtrain.config import Config
from mbtrain.data.opening import Opened
from mbtrain.data.windows import MODES, stride_of
from mbtrain.errors import ConfigError, DataError
from mbtrain.shards import load_manifest


def must_allow(settings: Config, mode: str) -> None:
    """Raise ConfigError for a mode that this run's model has not."""
    model, patch_size = settings.model, settings.model.stages[0].patch_size
    if mode not in MODES:
        raise ConfigError(f"--mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "basic":
        return
    if model.kind == "subword":
        raise ConfigError(f"--mode={mode}: expected basic for model.kind=subword: windows may begin inside a token")
    if mode == "sliding":
        return
    better = "expected basic or sliding"
    if patch_size % 2:
        what = "has no patches" if patch_size == 1 else f"has patches of {patch_size} bytes, which have no halves"
        raise ConfigError(f"--mode={mode}: {better}: the run's model {what}")
    if model.patching != "fixed":
        raise ConfigError(f"--mode={mode}: {better}: with model.patching={model.patching} patches lie where words end")
    if model.isolate_documents:
        raise ConfigError(f"--mode={mode}: {better}: with model.isolate_documents every document begins at a patch")


def must_keep_frames(settings: Config, sources: Sequence[Opened], mode: str) -> None:
    """Raise ConfigError where windows would begin inside a pixel or a sound's frame, and rows of training never do."""
    row, patch_size = settings.data.seq_len, settings.model.stages[0].patch_size
    for source in sources:
        split = source.split
        if split.modality == "text":
            continue
        sound = split.modality == "audio"
        frame = 3 if not sound else 2 if split.manifest.prep.get("encoding") == "pcm16" else 1
        steps = []
        if mode in ("sliding", "both") and int(split.lengths.max()) > row:
            steps.append(stride_of(row, patch_size))
        if mode in ("strided", "both"):
            steps.append(patch_size // 2)
        if row % frame == 0 and (off := [step for step in steps if step % frame]):
            what = "frame of 16-bit sound" if sound else "pixel"
            raise ConfigError(
                f"--mode={mode}: expected basic: windows would begin {off[0]} bytes later, inside a {what} ({frame} "
                f"bytes), with data.seq_len={row} and patches of {patch_size} bytes"
            )


def must_resemble(run: Path, settings: Config, data: str) -> None:
    """Raise ConfigError where --data holds another modality than the run was trained on, as far as that is known."""
    known: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = {str(of["modality"]) for of in json.loads((run / "environment.json").read_text("utf-8"))["data"]}
    if not known:
        with suppress(DataError):
            known = {load_manifest(source.path).modality for source in settings.data.mixture}
    got = load_manifest(data).modality
    if known and got not in known:
        raise ConfigError(
            f"--data={data}: holds {got}, expected {' or '.join(sorted(known))}, which {run} was trained on"
        )
