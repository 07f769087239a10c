"""The tar headers that are written here are those of Python's tarfile.

pytest tests/data_prep/test_writer.py
"""

import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.writer import member_header


@given(st.text("0123456789abcdefp.txrgbcm", min_size=1, max_size=100), st.integers(0, 8**11 - 1))
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert member_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_what_does_not_fit_is_an_error() -> None:
    for name, size in [("x" * 101, 1), ("x", 8**11)]:
        with pytest.raises(ValueError, match="does not fit"):
            member_header(name, size)
