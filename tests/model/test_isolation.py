"""Documents kept apart in packed rows: each has the logits that it has alone, in training and in cached generation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mbtrain import config
from mbtrain.errors import ConfigError
from mbtrain.model import build
from mbtrain.model.decode import Decoder
from mbtrain.model.layers import attend, same_document
from mbtrain.model.loss import nats
from mbtrain.model.megabyte import Megabyte
from mbtrain.sample import Sampling, generate
from mbtrain.vocab import BOUNDARY
from tests import naive, tiny
from tests.model.test_megabyte import naive_twin, randomised

LENGTHS = [
    5,
    0,
    13,
    8,
    1,
]  # bytes of documents; with boundary and filling 56 ids at P = 8, and one ends a patch at P = 1


def isolated(stages: int, preset: str = "modern", *, isolate: bool = True, seq_len: int = 96, **model: Any) -> Megabyte:
    base = tiny.tree(stages)["model"]
    made = {**base, "preset": preset, "isolate_documents": isolate, **model}
    return randomised(tiny.make(stages, preset, seq_len, model=made))


def packed(lengths: list[int], patch: int) -> tuple[Tensor, list[slice]]:
    """A row (1, t) of random documents as the loader lays them out, and where each one lies, its boundary included."""
    ids: list[int] = []
    places = []
    for length in lengths:
        places.append(slice(len(ids), len(ids) + length + 1))
        ids += [*torch.randint(0, 256, (length,)).tolist(), BOUNDARY]
        ids += [0] * (-len(ids) % patch)
    return torch.tensor([ids]), places


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("positions", ["learned", "rotary", "none"])
@pytest.mark.parametrize("token_shift", [False, True])
def test_a_document_has_the_logits_that_it_has_alone(stages: int, positions: str, token_shift: bool) -> None:
    model = isolated(stages, positions=positions, block={"token_shift": token_shift})
    ids, places = packed(LENGTHS, model.patch_size)
    together = model(ids)
    for place in places:
        torch.testing.assert_close(together[:, place], model(ids[:, place]), atol=1e-9, rtol=0)
    off = isolated(stages, isolate=False, positions=positions, block={"token_shift": token_shift})
    assert (off(ids)[:, places[2]] - off(ids[:, places[2]])).abs().max() > 1e-3, "it takes the option"


@settings(max_examples=40, deadline=None)
@given(
    stages=st.sampled_from([1, 2, 3]),
    positions=st.sampled_from(["learned", "rotary", "none"]),
    token_shift=st.booleans(),
    boundaries=st.sets(st.integers(0, 39), max_size=8),
    t=st.integers(1, 40),
)
def test_boundaries_anywhere_equal_the_naive_reading(
    stages: int, positions: str, token_shift: bool, boundaries: set[int], t: int
) -> None:
    model = isolated(stages, positions=positions, block={"token_shift": token_shift})
    ids = torch.randint(0, 256, (1, 40))
    ids[0, list(boundaries)] = BOUNDARY
    ids = ids[:, :t]
    spec, params = naive_twin(model)
    expected = naive.logits(ids[0].tolist(), params, spec)
    np.testing.assert_allclose(model(ids)[0].detach().numpy(), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_a_row_without_boundaries_is_bit_for_bit_as_ever(stages: int, preset: str) -> None:
    ids = torch.randint(0, 256, (2, 90))
    ids[:, -1] = BOUNDARY  # one that ends the row ends nothing that is looked at
    found = []
    for isolate in (False, True):
        model = isolated(stages, preset, isolate=isolate)
        logits = model(ids)
        nats(logits, ids).mean().backward()
        found.append([logits, *(param.grad for param in model.parameters())])
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        # The same sums in another order: a table's gradient is gathered, not sliced.
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_no_byte_reaches_another_document(stages: int, preset: str) -> None:
    model = isolated(stages, preset, block={"token_shift": True})
    ids, places = packed(LENGTHS, model.patch_size)
    before = model(ids)
    for place in places:
        for t in range(place.start, place.stop - 1):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % 256
            moved = (model(changed) != before).any(dim=-1)[0].nonzero().flatten()
            end = place.stop + -place.stop % model.patch_size
            assert moved.min() == t + 1, "the next byte of the same document sees it"
            assert moved.max() < end, f"byte {t} of the document before {end} moved logits of a later one"


def test_no_gradient_reaches_another_document() -> None:
    model = isolated(2, "paper")
    ids, places = packed([6, 9], model.patch_size)
    first, second = places
    ids[0, first.start : first.stop - 1] = 7
    ids[0, second.start : second.stop - 1] = 9
    nats(model(ids), ids)[:, second].mean().backward()
    for stage in model.stages:
        assert stage.embed.grad[9].abs().max() > 0
    assert model.stages[0].embed.grad[7].abs().max() == 0
    assert model.stages[0].embed.grad[BOUNDARY].abs().max() == 0
    used = model.stages[0].positions.grad.abs().amax(dim=1) > 0
    assert used[:8].all(), "the second document's positions count from its start"
    assert not used[8:].any()


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("preset", ["paper", "modern"])
@pytest.mark.parametrize("pieces", [[1] * 47, [0, 20] + [1] * 27, [13, 5, 16, 1, 1, 11]])
def test_cached_decoding_equals_the_full_forward(stages: int, preset: str, pieces: list[int]) -> None:
    model = isolated(stages, preset, seq_len=48, block={"token_shift": True})
    ids = torch.randint(0, 256, (3, 48))
    ids[0, [4, 9, 31]] = ids[1, [15, 16, 40]] = BOUNDARY  # and none in row 2
    full = model(ids)
    decoder = Decoder(model, batch=3)
    n = 0
    for piece in pieces:
        logits = decoder.feed(ids[:, n : n + piece])
        n += piece
        torch.testing.assert_close(logits, full[:, n], atol=1e-9, rtol=0)


@pytest.mark.parametrize("prompt", [b"", b"a", b"prompt"])
def test_generation_begins_a_document_with_nothing_before_it(prompt: bytes) -> None:
    model = isolated(2, seq_len=32)
    how = Sampling(temperature=0)
    written = list(prompt)
    for _ in range(16):
        chosen = int(model(torch.tensor([[*written, 0]]))[0, -1].argmax())
        if chosen == BOUNDARY:
            break
        written.append(chosen)
    assert generate(model, [prompt, b"another prompt"], 16, how)[0] == bytes(written[len(prompt) :])
    assert generate(model, [prompt], 16, how)[0] == bytes(written[len(prompt) :])


def test_the_kernel_for_long_rows_takes_the_mask() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 600, 8, dtype=torch.float64)
    starts = torch.rand(2, 600) < 0.02
    starts[:, 0] = True
    mask = same_document(starts, 600)
    assert mask.sum() < 0.2 * 2 * 600 * 600
    expected = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v
    torch.testing.assert_close(attend(q, k, v, 0.0, mask), expected, atol=1e-12, rtol=0)
    last = attend(q[:, :, -5:], k, v, 0.0, same_document(starts, 5))
    torch.testing.assert_close(last, expected[:, :, -5:], atol=1e-12, rtol=0)


def test_checkpointed_and_compiled_blocks_take_the_mask() -> None:
    ids = torch.randint(0, 257, (2, 32))
    ids[:, 7] = BOUNDARY
    found = []
    for way in ("plain", "checkpointed", "compiled"):
        model = isolated(2, block={"token_shift": True}).train()
        for stage in model.stages:
            stage.transformer.checkpointing = way == "checkpointed"
            for block in stage.transformer.blocks if way == "compiled" else ():
                block.compile(backend="aot_eager", fullgraph=True)
        nats(model(ids), ids).mean().backward()
        found.append([param.grad for param in model.parameters()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)


def test_it_needs_boundaries() -> None:
    model = {**tiny.tree()["model"], "isolate_documents": True}
    assert build(tiny.make(model=model)).config.isolate_documents
    with pytest.raises(ConfigError, match=r"^model\.isolate_documents: got True, expected .* data\.boundary is false"):
        config.validate(tiny.tree(model=model, data={"boundary": False}))
