"""The compiled step of a byte gives the full forward pass's logits, and what it does not cover goes through torch.

pytest tests/model/test_native.py
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mbtrain import compress
from mbtrain.model import Model, build, native
from mbtrain.model.decode import Decoder
from mbtrain.sample import Sampling, generate
from tests import launch, tiny
from tests.model.test_megabyte import randomised

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

MUP = {"parametrization": "mup", "stages": [{**stage, "base_d_model": 8} for stage in tiny.STAGES[2]]}
ODD = [{**tiny.STAGES[2][0], "d_model": 44, "n_heads": 2}, {**tiny.STAGES[2][1], "d_model": 66, "n_heads": 2, "d_ff": 100}]
VARIANTS: dict[str, dict[str, Any]] = {
    "one stage": {"stages": tiny.STAGES[1]},
    "three stages": {"stages": tiny.STAGES[3]},
    "paper": {"preset": "paper"},
    "paper, three stages": {"preset": "paper", "stages": tiny.STAGES[3]},
    "token shift": {"block": {"token_shift": True}},
    "bias, without qk_norm": {"block": {"bias": True, "qk_norm": False}},
    "rmsnorm without gain": {"block": {"norm": "rmsnorm", "norm_gain": False}},
    **{kind: {"block": {"activation": kind}} for kind in native.ACTIVATIONS},
    "positions learned": {"positions": "learned", "local_positions": "rotary"},
    "positions none": {"positions": "none", "local_positions": "none"},
    "tied, no final norm": {"tied": True, "final_norm": False},
    "window": {"stages": [{**tiny.STAGES[2][0], "window": 3}, tiny.STAGES[2][1]]},
    "without global": {"without": "global"},
    "features left over": {"stages": ODD},
    "muP": MUP,
}


def model_of(seq_len: int = 32, **model: Any) -> Any:
    """A model in fp32 with large random weights."""
    return randomised(tiny.make(seq_len=seq_len, model={**tiny.tree()["model"], **model})).float()


def fed(decoder: Decoder, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Logits after each of these pieces of ids, (b, pieces, v)."""
    ends = torch.tensor(pieces).cumsum(0).tolist()
    return torch.stack([decoder.feed(ids[:, end - m : end]) for m, end in zip(pieces, ends, strict=True)], dim=1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("pieces", [[0] + [1] * 31, [7, 1, 1, 1, 4, 1, 1, 1, 0, 1, 8, 1, 1, 1, 1, 1]])
def test_logits_equal_the_full_forward(name: str, pieces: list[int]) -> None:
    """In bytes and in pieces among them, against float64."""
    model = model_of(**VARIANTS[name])
    ids = torch.randint(0, 257, (7, 32))
    with torch.no_grad():
        full = copy.deepcopy(model).double()(ids)
    decoder = Decoder(model, 7)
    assert decoder.native is not None
    got = fed(decoder, ids, pieces)
    expected = full[:, torch.tensor(pieces).cumsum(0)]
    torch.testing.assert_close(got.double(), expected, atol=2e-4 * float(expected.abs().max()), rtol=0)
