"""Parameters, operations and kept values by formula: against torch's counters, the built models, and naive counts.

pytest tests/model/test_flops.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.vocabulary import vocabulary
from mbtrain import config
from mbtrain.config import Config
from mbtrain.data.mixture import mixture
from mbtrain.data.opening import open_sources
from mbtrain.model import build, flops, layers, space
from mbtrain.model.flops import best_patch, count, kept_values, pairs
from mbtrain.model.layers import LayerCache
from mbtrain.model.loss import nats
from mbtrain.units import measured_unit_bytes, unit_bytes_at_hand
from tests import tiny
from tests.launch import ROOT

PRESETS = ("paper", "modern")
ODD = [
    {"patch_size": 5, "d_model": 32, "n_layers": 2, "n_heads": 2},
    {"patch_size": 1, "d_model": 16, "n_layers": 2, "n_heads": 2},
]
TEXT = b"ab def ghij klmno, pqrstu; vw a bcd efghi jkl mno pqrst uv w xyz (ab c) de fgh "


def windowed(stages: int, window: int) -> list[dict[str, int]]:
    first, *finer = tiny.STAGES[stages]
    return [{**first, "window": window}, *finer]


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one stage": (1, 40, {}),
    "three stages": (3, 40, {}),
    "window": (2, 40, {"stages": windowed(2, 3)}),
    "window of three stages": (3, 48, {"stages": windowed(3, 4), "cross_patch": 1}),
    "transformer": (1, 40, {"kind": "transformer"}),
    "transformer with a window": (1, 40, {"kind": "transformer", "stages": windowed(1, 7)}),
    "a window of long chunks": (1, 400, {"kind": "transformer", "stages": windowed(1, 150)}),
    "a window wider than the row": (1, 40, {"kind": "transformer", "stages": windowed(1, 64)}),
    "widths that the patch does not divide": (2, 40, {"stages": ODD}),
    "convolutions": (2, 40, {"conv_encoder": [3, 5, 7]}),
    "cross-patch": (2, 40, {"cross_patch": 3}),
    "all of them": (2, 40, {"stages": [{**ODD[0], "window": 2}, ODD[1]], "cross_patch": 5, "conv_encoder": [3]}),
    "without local": (2, 40, {"without": "local"}),
    "without local, with convolutions, untied": (2, 40, {"without": "local", "conv_encoder": [3], "tied": False}),
    "without global": (2, 40, {"without": "global"}),
    "without global, cross-patch": (2, 40, {"without": "global", "cross_patch": 2}),
    "swiglu": (2, 40, {"block": {"activation": "swiglu"}}),
    "perceiver": (1, 40, {"kind": "perceiver_ar", "latents": 16}),
    "perceiver of one pass": (1, 40, {"kind": "perceiver_ar", "latents": 40}),
    "space": (2, 72, {"patching": "space"}),
    "space, cross-patch": (2, 72, {"patching": "space", "cross_patch": 2}),
    "space, odd widths": (2, 70, {"patching": "space", "stages": ODD}),
}


def settings_of(case: str, preset: str = "modern", **model: Any) -> Config:
    stages, seq_len, changes = CASES[case]
    return tiny.make(
        stages, preset, seq_len, model={**tiny.tree(stages)["model"], "preset": preset, **changes, **model}
    )


def ids_of(settings: Config) -> torch.Tensor:
    """Two rows, of words where these decide the patches."""
    if settings.model.patching == "space":
        return torch.tensor([list(TEXT[: settings.data.seq_len])] * 2)
    return torch.zeros((2, settings.data.seq_len), dtype=torch.long)


def operations(model: nn.Module, ids: torch.Tensor, *, backward: bool = False) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(backward):
        made = model(ids)
        if backward:
            nats(made, ids[:, -made.shape[1] :]).mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", CASES)
def test_parameters_and_operations_are_those_of_the_built_model(case: str, preset: str) -> None:
    """Exactly, for every kind and option: all pairs that the products compute, forward, and backward twice as many."""
    settings = settings_of(case, preset)
    model, ids = build(settings).eval(), ids_of(settings)
    counted = count(settings, causal=False, unit_bytes=model.unit_bytes(ids))
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert operations(model, ids) / ids.numel() == pytest.approx(counted.forward_per_byte, rel=1e-12)
    allowed = count(settings, unit_bytes=model.unit_bytes(ids))
    assert allowed.forward_per_byte < counted.forward_per_byte
    assert allowed.parameters == counted.parameters
    if settings.model.latents is None:
        assert counted.training_per_byte == 3 * counted.forward_per_byte
        assert operations(model, ids, backward=True) == pytest.approx(
            counted.training_per_byte * ids.numel(), rel=1e-12
        )


@pytest.mark.parametrize("case", ["perceiver", "perceiver of one pass"])
def test_a_perceivers_training_is_the_mean_of_its_passes(case: str) -> None:
    settings = settings_of(case)
    model, (t, n) = build(settings).train(), (settings.data.seq_len, settings.model.latents or 0)
    passes = (t - n) // (n // 2) + 1
    total = 0
    for number in range(passes):
        span = model.training_span(t, number)
        assert span is not None
        total += operations(model, torch.zeros((1, span.stop), dtype=torch.long), backward=True)
    by_formula = count(settings, causal=False).training_per_byte
    assert total / passes / t == pytest.approx(by_formula, rel=1e-12)


def test_a_subword_model(vocabulary_file: Path, shards: Path) -> None:
    """Operations of its tokens, per byte of the row; parameters with a table of tokens."""
    model_section = {"kind": "subword", "vocabulary": str(vocabulary_file), "vocabulary_size": 280}
    for preset in PRESETS:
        settings = tiny.make(1, seq_len=64, model={"preset": preset, **model_section})
        model, ids = build(settings).eval(), torch.tensor([list(TEXT[:64])])
        unit = model.unit_bytes(ids)
        assert unit is not None
        assert unit > 1
        counted = count(settings, causal=False, unit_bytes=unit)
        assert not counted.assumed
        assert counted.parameters == sum(p.numel() for p in model.parameters())
        assert operations(model, ids) / 64 == pytest.approx(counted.forward_per_byte, rel=1e-6)  # unit is a float32
        assert count(settings).assumed
        assert count(settings).unit_bytes == flops.ASSUMED_UNIT_BYTES["subword"]


@pytest.fixture(scope="module")
def vocabulary_file(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vocabulary") / "words.json"
    vocabulary(shards, out, 280)
    return out


def looked_at(settings: Config, stage: int) -> Iterator[int]:
    """How many positions each position of a stage looks at, one row through, from the definitions."""
    stages, t = settings.model.stages, settings.data.seq_len
    spec = stages[stage]
    slots = t if stage == 0 else stages[stage - 1].patch_size
    before = settings.model.cross_patch if stage and stage + 1 == len(stages) else 0
    for byte in range(0, t, spec.patch_size):
        own = byte % slots // spec.patch_size + 1
        yield min(own, spec.window or own) + (before if byte >= slots else 0)


@pytest.mark.parametrize("case", [name for name in CASES if "perceiver" not in name and "space" not in name])
def test_allowed_pairs_are_those_of_a_naive_count(case: str) -> None:
    settings = settings_of(case)
    without = settings.model.without
    for i, (spec, stage) in enumerate(zip(settings.model.stages, count(settings).stages, strict=True)):
        if (without, i) in (("global", 0), ("local", 1)):
            assert stage.attention == stage.matrices == 0
            continue
        naive = 4 * spec.n_layers * spec.d_model * sum(looked_at(settings, i)) / settings.data.seq_len
        assert stage.attention == pytest.approx(naive, rel=1e-12)


def test_pairs_of_a_perceiver() -> None:
    """One pass of a row is a transformer's work; and of more passes layer 1 is done once for each position."""
    one, plain = settings_of("perceiver of one pass"), settings_of("one stage")
    assert count(one).forward_per_byte == pytest.approx(count(plain).forward_per_byte)
    assert count(one).training_per_byte == pytest.approx(count(plain).training_per_byte)
    settings = settings_of("perceiver")
    t, n, spec = 40, 16, settings.model.stages[0]
    passes = [list(range(start, start + n)) for start in range(0, t - n + 1, n // 2)]
    first, rest = sum(i + 1 for i in range(t)), len(passes) * n * (n + 1) / 2 * (spec.n_layers - 1)
    assert count(settings).stages[0].attention == pytest.approx(4 * spec.d_model * (first + rest) / t)
    seen = sum(i + 1 for columns in passes for i in columns) / len(passes)
    own = n * (n + 1) / 2 * (spec.n_layers - 1)
    all_pairs = count(settings, causal=False)
    more = 4 * spec.d_model * (n * (t + n) / 2 + n * n * (spec.n_layers - 1) - seen - own) / t
    assert (all_pairs.training_per_byte - count(settings).training_per_byte) / 3 == pytest.approx(more)


def test_pairs_within_a_window() -> None:
    for length, window in ((1, None), (7, None), (7, 1), (7, 3), (7, 7), (7, 9)):
        naive = [min(i + 1, window or i + 1) for i in range(length)]
        assert pairs(length, window) == pytest.approx(sum(naive) / length)
        assert pairs(length, window, causal=False) == length


def test_what_is_not_imported_is_as_it_is_there() -> None:
    """Constants of rooms above: how long the chunks are in which they attend."""
    assert layers._WINDOW_CHUNK == flops.WINDOW_CHUNK
    assert space._CHUNK == flops.SPACE_CHUNK


def test_the_papers_shapes_cost_what_the_paper_matched() -> None:
    """Forward operations a byte, all pairs: 646M of the Transformer of its text runs, 645M of MEGABYTE."""
    folder = ROOT / "configs/paper/text"
    transformer = count(config.load(folder / "pg19_transformer.yaml"), causal=False)
    megabyte = count(config.load(folder / "pg19_megabyte.yaml", {"model.cross_patch": "0"}), causal=False)
    assert transformer.forward_per_byte / 1e6 == pytest.approx(646, rel=2e-3)
    assert megabyte.forward_per_byte / 1e6 == pytest.approx(645, rel=2e-3)


KEPT = [
    "window of three stages",
    "cross-patch",
    "without local",
    "without global, cross-patch",
    "perceiver",
    "widths that the patch does not divide",
]


@pytest.mark.parametrize("case", KEPT)
def test_kept_values_are_those_of_the_caches(case: str) -> None:
    """All room that generation sets aside, but for the position after the row's end."""
    settings = settings_of(case)
    decoder = build(settings).decoder(1)
    found: list[LayerCache] = []

    def search(held: object) -> None:
        if isinstance(held, LayerCache):
            found.append(held)
        elif isinstance(held, list):
            for item in held:
                search(item)

    for held in vars(decoder).values():
        search(held)
    kept = sum(cache.keys.numel() + cache.values.numel() for cache in found)
    first = settings.model.stages[0]
    spare = settings.model.latents is None and settings.model.without != "global"
    after = 2 * first.n_layers * first.d_model if spare else 0
    assert kept - after == kept_values(settings)


def test_the_best_patch_is_the_cheapest_of_all() -> None:
    settings = settings_of("cross-patch", stages=[{**tiny.STAGES[2][0], "d_model": 64}, tiny.STAGES[2][1]])
    best = best_patch(settings)
    assert best is not None
    costs = {}
    for size in [p for p in range(3, 41) if 40 % p == 0]:
        tree = settings.model_dump(mode="json")
        tree["model"]["stages"][0]["patch_size"] = size
        costs[size] = count(config.validate(tree)).forward_per_byte
    assert best.dividing == min(costs, key=costs.__getitem__)
    assert best.dividing_forward_per_byte == pytest.approx(costs[best.dividing])
    assert best.forward_per_byte <= best.dividing_forward_per_byte
    assert best.cube_root == pytest.approx(80 ** (1 / 3))
    for case in ("one stage", "space", "without local", "without global", "perceiver"):
        assert best_patch(settings_of(case)) is None


def test_units_are_measured_on_the_first_rows(shards: Path, vocabulary_file: Path) -> None:
    """By words and by tokens, of a model without weights as of one with them; nothing to measure elsewhere."""
    data = {"path": str(shards)}
    words = tiny.make(2, seq_len=64, data=data, model={"stages": tiny.STAGES[2], "patching": "space"})
    named = {"kind": "subword", "vocabulary": str(vocabulary_file), "vocabulary_size": 280}
    tokens = tiny.make(1, seq_len=64, data=data, model=named)
    for settings in (words, tokens):
        opened = open_sources(settings, "train", seed=settings.train.seed)
        mixed = mixture(settings.data, [(source.name, source.stream) for source in opened])
        unit = measured_unit_bytes(build(settings), mixed)
        assert unit is not None
        assert 1 < unit < 6
        assert unit == unit_bytes_at_hand(settings)
    assert unit_bytes_at_hand(tiny.make(2, data=data)) is None
    gone = {"path": str(shards / "gone")}
    assert unit_bytes_at_hand(tiny.make(2, data=gone, model={"stages": tiny.STAGES[2], "patching": "space"})) is None


def test_assumed_words_are_no_longer_than_a_patch() -> None:
    settings = settings_of("space")
    assert count(settings).unit_bytes == settings.model.stages[0].patch_size
    wide = settings_of("space", stages=[{**tiny.STAGES[2][0], "patch_size": 12}, tiny.STAGES[2][1]])
    assert count(wide).unit_bytes == flops.ASSUMED_UNIT_BYTES["space"]
