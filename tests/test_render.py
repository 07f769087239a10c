"""Bytes to pictures and back: nothing is lost, everything stands where it belongs, what is missing is grey.

pytest tests/test_render.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mbtrain import render
from mbtrain.errors import ConfigError
from mbtrain.render import Form
from tests import tiny


@st.composite
def forms(draw: st.DrawFn) -> Form:
    """Images of whole blocks, with one or two stages of blocks or none."""
    patches = draw(st.sampled_from([(), (1,), (12, 1), (12, 3, 1), (48, 12, 1), (7, 1)]))
    side = {12: 2, 48: 4}.get(patches[0], 1) if patches else 1
    shape = (side * draw(st.integers(1, 4)), side * draw(st.integers(1, 4)))
    return Form("pictures", "image", shape, patch_sizes=patches)


def as_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def as_pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as picture:
        return np.array(picture)


@settings(max_examples=60, deadline=None)
@given(form=forms(), seed=st.integers(0, 2**32 - 1))
def test_a_picture_file_becomes_a_row_and_the_row_the_same_picture(form: Form, seed: int) -> None:
    assert form.shape is not None
    pixels = np.random.default_rng(seed).integers(0, 256, (*form.shape, 3), np.uint8)
    same, row = render.canonical(form, as_png(pixels))
    assert same == form
    assert len(row) == form.picture_bytes == pixels.size
    assert sorted(row) == sorted(pixels.tobytes())
    assert (render.picture(form, row) == pixels).all()
    assert (as_pixels(render.files(form, row[:5], [row[5:]])[0]) == pixels).all()


@settings(max_examples=60, deadline=None)
@given(form=forms(), data=st.data())
def test_the_first_n_bytes_stand_where_the_whole_row_has_them(form: Form, data: st.DataObject) -> None:
    """And all other bytes are grey."""
    n = data.draw(st.integers(0, form.picture_bytes))
    row = bytes(data.draw(st.integers(0, 255)) for _ in range(n))
    shown = render.picture(form, row)
    order = render.row_order(form)
    assert shown.reshape(-1)[order].tobytes() == row + bytes([render.GREY]) * (form.picture_bytes - n)


def test_more_bytes_than_a_picture_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected at most the 12 bytes of a picture, got 13"):
        render.picture(Form(modality="image", shape=(2, 2)), bytes(13))


@settings(max_examples=60, deadline=None)
@given(seq_len=st.integers(12, 5000), patches=st.sampled_from([(), (12, 1), (7, 1)]))
def test_the_square_is_the_largest_that_a_row_holds(seq_len: int, patches: tuple[int, ...]) -> None:
    form = render.square(Form(modality="image", patch_sizes=patches), seq_len)
    assert form.shape is not None
    step = 2 if patches == (12, 1) else 1
    assert form.picture_bytes <= seq_len < 3 * (form.shape[0] + step) ** 2
    assert len(render.row_order(form)) == form.picture_bytes


def environment(folder: Path, text: str) -> Path:
    (folder / "environment.json").write_text(text)
    return folder


@pytest.mark.parametrize("text", [None, "{}", '{"data": []}', '{"data": null}'])
def test_a_run_that_does_not_say_what_its_rows_are_is_text(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        environment(tmp_path, text)
    assert render.forms(tmp_path, tiny.make(2)) == [Form()]


def test_forms_are_what_the_environment_and_the_configuration_say(tmp_path: Path) -> None:
    prep = {"size": 64, "filter": "box", "draft": True, "column": "image"}
    data: list[dict[str, Any]] = [
        {"name": "a", "modality": "image", "shape": [64, 64, 3], "sample_rate": None, "encoding": None, "prep": prep},
        {"name": "b", "modality": "audio", "shape": None, "sample_rate": 8000, "encoding": "mulaw8", "prep": {}},
        {"name": "c", "modality": "text", "shape": None, "sample_rate": None, "encoding": None, "prep": {}},
        {
            "name": "d",
            "modality": "image",
            "shape": None,
            "sample_rate": None,
            "encoding": None,
            "prep": {"size": None},
        },
        {"name": "e", "modality": "audio", "shape": None, "sample_rate": 16000, "encoding": "pcm16", "prep": {}},
    ]
    run = environment(tmp_path, json.dumps({"data": data}))
    found = render.forms(run, tiny.make(3))
    assert found == [
        Form("a", "image", (64, 64), 64, "box", True, patch_sizes=(8, 2, 1)),
        Form("b", "audio", sample_rate=8000, encoding="mulaw8"),
        Form("c"),
        Form("d", "image", patch_sizes=(8, 2, 1)),
        Form("e", "audio"),
    ]
    assert [form.suffix for form in found] == [".png", ".wav", ".txt", ".png", ".wav"]
    assert [form.unit for form in found] == [1, 1, 1, 1, 2]
    assert found[1].second_bytes == 8000
    assert found[4].second_bytes == 32000
    assert render.forms(run, tiny.make(3, data={"scan": "raster"}))[0].patch_sizes == ()


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_an_environment_that_is_no_json_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"environment\.json: cannot be read .* writes it anew") as error:
        render.forms(environment(tmp_path, text), tiny.make(2))
    assert len(str(error.value).splitlines()) == 1


def test_a_text_is_its_own_bytes() -> None:
    content = b"\xff\0\r\n\xc3"
    assert render.canonical(Form(), content) == (Form(), content)
    assert render.files(Form(), b"\xff", [b"\0", b""]) == [b"\xff\0", b"\xff"]
