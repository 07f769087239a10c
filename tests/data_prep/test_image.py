"""From items to pictures: `data_prep.image`.

pytest tests/data_prep/test_image.py
"""

from __future__ import annotations

import io
import lzma
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.image import image_modality
from data_prep.items import items
from data_prep.sources import Item, Modality, Rejection, Sample, SourceFile, Unreadable
from mbtrain.errors import ConfigError
from mbtrain.media.image import MAX_PIXELS, decode, png, square

PICTURES = np.random.default_rng(0).integers(0, 256, (5, 12, 9, 3), dtype=np.uint8)
NATIVE = image_modality(size=None)
Got = tuple[str, str | np.ndarray]


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[i : i + size] for i in range(0, len(data), size))


def decoded(modality: Modality, data: bytes, *, where: str = "", chunk: int = 1000) -> list[Got]:
    """(where, pixels) of samples and (where, reason) of rejections, in order."""
    return [outcome(part) for part in modality.decode(Item("", where, chunks(data, chunk), len(data)))]


def outcome(part: Sample | Rejection) -> Got:
    if isinstance(part, Rejection):
        assert part.bad
        assert part.reason.splitlines() == [part.reason]
        return part.where, part.reason
    assert part.shape is not None
    assert all(type(side) is int for side in part.shape)
    return part.where, np.frombuffer(b"".join(part.chunks), np.uint8).reshape(part.shape)


def same(got: list[Got], expected: list[tuple[str, np.ndarray]]) -> bool:
    return [where for where, _ in got] == [where for where, _ in expected] and all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(got, expected, strict=True)
    )


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_a_picture_is_one_sample(chunk: int) -> None:
    data = png(PICTURES[0])
    assert same(decoded(NATIVE, data, where="a/b.png", chunk=chunk), [("a/b.png", PICTURES[0])])
    small = image_modality(size=4, filter="bicubic")
    assert same(decoded(small, data, chunk=chunk), [("", decode(data, 4, filter="bicubic"))])


@pytest.mark.parametrize("data", [b"", b"\x93NUM", b"<html>", png(PICTURES[0])[:-20]])
def test_what_is_no_picture_is_named_with_its_reason(data: bytes) -> None:
    (got,) = decoded(NATIVE, data, where="row 7")
    assert got[0] == "row 7"
    assert isinstance(got[1], str)


def test_a_file_longer_than_any_picture_is_not_read_into_memory() -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 2**20
            yield b"\xff\xd8\xff" + bytes(2**20 - 3)

    (got,) = image_modality(size=None, max_pixels=1000).decode(Item("x.jpg", "", endless()))
    assert isinstance(got, Rejection)
    assert "no picture of 1000 pixels" in got.reason
    assert taken < 2**26 + 2**22


def test_what_cannot_be_read_is_told_by_the_reader() -> None:
    def broken() -> Iterator[bytes]:
        yield png(PICTURES[0])[:50]
        raise Unreadable("cannot be read: gone")

    with pytest.raises(Unreadable, match="gone"):
        list(NATIVE.decode(Item("x.png", "", broken())))


def test_through_the_reader(tmp_path: Path) -> None:
    """By content, whatever the name: a compressed array, bytes in parquet, one file of a folder."""

    def through(name: str) -> list[Got]:
        path = tmp_path / name
        file = SourceFile(str(path), "label", name, path.stat().st_size, path.stat().st_mtime_ns)
        found = items(file, NATIVE.column, NATIVE.wants, lambda size: None)
        return [outcome(part) for item in found if isinstance(item, Item) for part in NATIVE.decode(item)]

    (tmp_path / "x.npy.xz").write_bytes(lzma.compress(npy(PICTURES)))
    assert same(through("x.npy.xz"), [(f"index {i}", picture) for i, picture in enumerate(PICTURES)])
    (tmp_path / "x.jpg").write_bytes(png(PICTURES[1]))
    assert same(through("x.jpg"), [("", PICTURES[1])])
    column = pa.array([png(PICTURES[0]), npy(PICTURES[1:3])], pa.binary())
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    places = [("row 0", PICTURES[0]), ("row 1: index 0", PICTURES[1]), ("row 1: index 1", PICTURES[2])]
    assert same(through("x.parquet"), places)


# ---- arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_an_array_is_as_many_samples_as_it_has_pictures(chunk: int) -> None:
    got = decoded(NATIVE, npy(PICTURES), chunk=chunk)
    assert same(got, [(f"index {i}", picture) for i, picture in enumerate(PICTURES)])


def test_shapes_of_arrays() -> None:
    grey = PICTURES[..., 0]
    threefold = np.repeat(grey[..., None], 3, axis=-1)
    many = [(f"index {i}", picture) for i, picture in enumerate(threefold)]
    assert same(decoded(NATIVE, npy(grey)), many)
    assert same(decoded(NATIVE, npy(grey[..., None])), many)
    assert same(decoded(NATIVE, npy(PICTURES[3]), where="m.npy"), [("m.npy", PICTURES[3])])
    assert same(decoded(NATIVE, npy(grey[3])), [("", threefold[3])])
    assert same(decoded(NATIVE, npy(PICTURES[:1]), where="m.npy"), [("m.npy: index 0", PICTURES[0])])


def test_pictures_of_arrays_are_cropped_and_resized_as_files_are() -> None:
    small = image_modality(size=4)
    expected = [(f"index {i}", decode(png(picture), 4)) for i, picture in enumerate(PICTURES)]
    assert same(decoded(small, npy(PICTURES)), expected)
    squares = PICTURES[:, :4, :4]
    assert same(decoded(small, npy(squares)), [(f"index {i}", picture) for i, picture in enumerate(squares)])
    grey = PICTURES[..., 1]
    (_, got), *_ = decoded(small, npy(grey))
    assert np.array_equal(got, square(np.repeat(grey[0, :, :, None], 3, axis=-1), 4))


def test_an_array_cut_off_gives_its_whole_pictures_and_says_how_many_are_missing() -> None:
    data = npy(PICTURES)
    start, each = len(data) - PICTURES.size, PICTURES[0].size
    for end in range(0, len(data), 13):
        *good, (where, reason) = decoded(NATIVE, data[:end])
        whole = max(0, end - start) // each
        assert same(good, [(f"index {i}", PICTURES[i]) for i in range(whole)])
        if end >= start:
            assert where == f"index {whole}"
            assert reason == f"NumPy array: cut off; {5 - whole} of 5 pictures are missing"
    *good, (where, reason) = decoded(NATIVE, data + b"x")
    assert len(good) == 5
    assert "more bytes follow" in reason


def header(text: str, version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (npy(PICTURES.astype(np.float32)), "expected uint8, got float32"),
        (npy(PICTURES > 3), "expected uint8, got bool"),
        (npy(np.array([{"a": 1}, None], object), allow_pickle=True), "expected uint8, got object"),
        (npy(np.asfortranarray(PICTURES)), "Fortran order"),
        (npy(PICTURES.transpose(0, 3, 1, 2).copy()), r"expected shape \[n, h, w, 3\].*\[5, 3, 12, 9\]"),
        (npy(PICTURES[None]), "expected shape"),
        (npy(PICTURES[0, 0, 0]), "expected shape"),
        (npy(np.uint8(3)), "expected shape"),
        (npy(PICTURES[:, :0]), "no pixel"),
        (npy(PICTURES[:0]), "no pixel"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (5, -2, -2, 3), }\n"), "no pixel"),
        (header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**12}, 9000, 9000, 3), }}\n"), "max_pixels"),
        (header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**30}, 9, 9, 3), }}\n"), "cut off"),
        (header("__import__('os').system('false')\n"), "broken header"),
        (header("(" * 9000 + ")" * 9000 + "\n"), "broken header"),
        (header("{'descr': '|u1'}", b"\2\0"), "version 1.0"),
        (b"\x93NUMPY\1", "version 1.0"),
    ],
)
def test_other_arrays_are_refused_with_the_reason(data: bytes, why: str) -> None:
    (got,) = decoded(NATIVE, data)
    assert isinstance(got[1], str)
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(got[1])


@given(st.binary(max_size=80))
def test_any_header(data: bytes) -> None:
    assert all(isinstance(what, str) for _, what in decoded(NATIVE, b"\x93NUMPY" + data))


# ---- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"size": 0}, "--size"),
        ({"size": True}, "--size"),
        ({"size": "none"}, "--size"),
        ({"size": 64.0}, "--size"),
        ({"size": 64, "filter": "area"}, "--filter"),
        ({"size": 64, "filter": ["box"]}, "--filter"),
        ({"size": 64, "draft": 1}, "--draft"),
        ({"size": None, "max_pixels": 0}, "--max-pixels"),
        ({"size": None, "max_pixels": 10**9}, "--max-pixels"),
    ],
)
def test_options_are_checked(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: expected .*, got "):
        image_modality(**options)


def test_the_modality() -> None:
    modality = image_modality(size=64, column="a.b")
    assert modality.options == {
        "size": 64,
        "filter": "lanczos",
        "draft": False,
        "max_pixels": MAX_PIXELS,
        "background": "white",
        "column": "a.b",
    }
    assert (modality.name, modality.column) == ("image", "a.b")
    assert [name for name in ("A.JPG", "b.webp", "c.npy.xz", "d.txt", "e.svg") if modality.wants(name)] == [
        "A.JPG",
        "b.webp",
        "c.npy.xz",
    ]
    again = pickle.loads(pickle.dumps(modality))  # noqa: S301 - made here, as a worker gets it
    assert same(decoded(again, png(PICTURES[0])), [("", decode(png(PICTURES[0]), 64))])
