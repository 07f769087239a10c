"""Cached generation equals the full forward pass at every step, for prompts of any length."""

from __future__ import annotations

import pytest
import torch

from mbtrain.model import build
from mbtrain.model.decode import Decoder
from tests import tiny
from tests.model.test_megabyte import randomised


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("preset", ["paper", "modern"])
@pytest.mark.parametrize("prompt", [0, 1, 3, 8, 13])
def test_logits_equal_the_full_forward_at_every_step(stages: int, preset: str, prompt: int) -> None:
    model = randomised(tiny.make(stages, preset))
    ids = torch.randint(0, 257, (3, 31))
    full = model(torch.cat((ids, ids[:, :1]), dim=1))
    decoder = Decoder(model, batch=3)
    got = [decoder.feed(ids[:, :prompt])] + [decoder.feed(ids[:, t : t + 1]) for t in range(prompt, 31)]
    torch.testing.assert_close(torch.stack(got, dim=1), full[:, prompt:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("pieces", [[5, 11, 2], [1, 1, 15], [16, 3], [0, 7, 0, 9]])
def test_bytes_may_come_in_pieces_of_any_size(pieces: list[int]) -> None:
    model = randomised(tiny.make(3))
    ids = torch.randint(0, 257, (2, sum(pieces) + 1))
    decoder = Decoder(model, batch=2)
    n = 0
    for piece in pieces:
        logits = decoder.feed(ids[:, n : n + piece])
        n += piece
        torch.testing.assert_close(logits, model(ids[:, : n + 1])[:, n], atol=1e-9, rtol=0)


def test_float32_logits_agree_to_1e_4() -> None:
    torch.manual_seed(0)
    model = build(tiny.make(3, seq_len=64)).eval()
    ids = torch.randint(0, 257, (2, 63))
    full = model(torch.cat((ids, ids[:, :1]), dim=1))
    decoder = Decoder(model, batch=2)
    for t in range(63):
        torch.testing.assert_close(decoder.feed(ids[:, t : t + 1]), full[:, t + 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_full_row_goes_on_from_its_second_half(stages: int) -> None:
    model = randomised(tiny.make(stages))
    ids = torch.randint(0, 257, (1, 70))
    decoder = Decoder(model, batch=1)
    for t in range(70):
        logits = decoder.feed(ids[:, t : t + 1])
        if t == 31:
            expected = model(torch.cat((ids[:, 16:32], ids[:, :1]), dim=1))[:, 16]
            torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    assert Decoder(model, batch=1).feed(ids).shape == (1, 257), "a prompt longer than a row"
