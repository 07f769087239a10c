"""Bytes of a modality -> what a person looks at or listens to; a file of theirs -> the bytes that a row begins with.

A form says what the rows of a source are: text, an image's pixels in the order in which the model reads them (scan), or
audio in an encoding. Files for people are .txt (the bytes themselves), .png and .wav.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mbtrain.config import Config
from mbtrain.data import scan
from mbtrain.errors import ConfigError

GREY = 128  # a byte of a picture that nobody knows

_SUFFIXES = {"text": ".txt", "image": ".png", "audio": ".wav"}


@dataclass(frozen=True)
class Form:
    """What the rows of a source are.

    shape        of an image: height and width in pixels; None: unlike one another, or not known
    size         of an image: what data prep made of it, pixels a side; None: it was left as it was
    filter       of an image: by which it was resized
    draft        of an image: whether the JPEG decoder did a part of that
    sample_rate  of audio, in Hz
    encoding     of audio: pcm16 (two bytes a frame) or mulaw8
    patch_sizes  of an image: bytes in a patch of each stage, where pixels stand in patch scan; (): in raster order
    """

    source: str = "text"
    modality: str = "text"
    shape: tuple[int, int] | None = None
    size: int | None = None
    filter: str = "lanczos"
    draft: bool = False
    sample_rate: int = 16_000
    encoding: str = "pcm16"
    patch_sizes: tuple[int, ...] = ()

    @property
    def suffix(self) -> str:
        """Of the file for people: .txt, .png or .wav."""
        return _SUFFIXES[self.modality]

    @property
    def unit(self) -> int:
        """Bytes in a frame of audio; else 1."""
        return 2 if self.modality == "audio" and self.encoding == "pcm16" else 1

    @property
    def second_bytes(self) -> int:
        """Bytes in a second of audio."""
        return self.sample_rate * self.unit

    @property
    def picture_bytes(self) -> int:
        """Bytes in an image whose shape is known."""
        assert self.shape is not None
        return 3 * math.prod(self.shape)


def forms(run: Path, settings: Config) -> list[Form]:
    """One form for each source of a run, in its order. A run that was made before there were others is text.

    Raises ConfigError for an environment.json that cannot be read.
    """
    path = run / "environment.json"
    try:
        sources: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("data") or []
    except FileNotFoundError:
        sources = []
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); `mbtrain train --resume={run}` writes it anew") from error
    patches = tuple(stage.patch_size for stage in settings.model.stages) if settings.data.scan == "patch" else ()
    return [_form(source, patches, path) for source in sources] or [Form()]


def _form(source: dict[str, Any], patches: tuple[int, ...], path: Path) -> Form:
    modality = source["modality"]
    if modality not in _SUFFIXES:
        raise ConfigError(f"{path}: source {source['name']!r}: expected text, image or audio, got {modality!r}")
    form = Form(source["name"], modality)
    if modality == "image":
        shape, prep = source.get("shape"), source.get("prep") or {}
        made = {key: prep[key] for key in ("size", "filter", "draft") if key in prep}
        return replace(form, **made, shape=(shape[0], shape[1]) if shape else None, patch_sizes=patches)
    if modality == "audio":
        rate, encoding = source.get("sample_rate"), source.get("encoding")
        return replace(form, sample_rate=rate or form.sample_rate, encoding=encoding or form.encoding)
    return form


def square(form: Form, seq_len: int) -> Form:
    """The form of an image of unknown shape with the largest square that a row of seq_len bytes holds."""
    side = math.isqrt(seq_len // 3)
    block = next(iter(scan.block_sides(form.patch_sizes)), 1)
    side = max(side - side % block, block)
    return replace(form, shape=(side, side))


def canonical(form: Form, content: bytes) -> tuple[Form, bytes]:
    """A file's content -> its bytes as data prep and the reader made those of the run, and the form with their shape.

    Raises ConfigError where it cannot be decoded or is an image of another shape than the run's.
    """
    if form.modality == "text":
        return form, content
    from mbtrain.media import Undecodable

    try:
        if form.modality == "audio":
            from mbtrain.media import audio

            return form, audio.encode(audio.decode(content, form.sample_rate), form.encoding)
        from mbtrain.media import image

        pixels = image.decode(content, form.size, filter=form.filter, draft=form.draft)
    except Undecodable as error:
        raise ConfigError(f"cannot be decoded as {form.modality} ({error})") from error
    height, width = pixels.shape[:2]
    if form.shape not in (None, (height, width)):
        raise ConfigError(f"expected an image of {hxw(form)} pixels as {form.source} has, got {height}x{width}")
    form = replace(form, shape=(height, width))
    return form, pixels.reshape(-1)[row_order(form)].tobytes()


def picture(form: Form, row: bytes) -> np.ndarray:
    """The bytes of an image in the model's order -> pixels [h, w, 3] uint8; bytes that are missing are grey."""
    assert form.shape is not None
    if len(row) > form.picture_bytes:
        raise ConfigError(f"expected at most the {form.picture_bytes} bytes of a picture, got {len(row)}")
    raster = np.full(form.picture_bytes, GREY, np.uint8)
    raster[row_order(form)[: len(row)]] = np.frombuffer(row, np.uint8)
    return raster.reshape(*form.shape, 3)


def files(form: Form, prompt: bytes, continuations: Sequence[bytes], original: bytes | None = None) -> list[bytes]:
    """The contents of the files that show the continuations of a prompt.

    Text and audio have a file each. Images have one PNG: the picture itself, or a grid of several; where the prompt was
    cut from an original, the grid begins with that and with what was given of it.
    """
    rows = [prompt + continuation for continuation in continuations]
    if form.modality == "text":
        return rows
    if form.modality == "audio":
        from mbtrain.media import audio

        return [audio.wav(row, form.sample_rate, form.encoding) for row in rows]
    from mbtrain.media import image

    if len(rows) == 1:
        return [image.png(picture(form, rows[0]))]
    before = [] if original is None else [original, prompt]
    return [image.png(image.grid([picture(form, row) for row in before + rows]))]


def hxw(form: Form) -> str:
    """An image's shape as options and messages write it: 48x64 is 48 high."""
    return "x".join(map(str, form.shape or ()))


def row_order(form: Form) -> np.ndarray:
    """Row position -> byte of the raster."""
    assert form.shape is not None
    try:
        return scan.order(*form.shape, form.patch_sizes)  # without patches it is the raster's own
    except ValueError as error:
        raise ConfigError(f"{error}, in which the model reads; give another shape") from error
