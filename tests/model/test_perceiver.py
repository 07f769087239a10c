"""PerceiverAR: its definition byte by byte, causality, the span of training, cached generation, and training as it is.

pytest tests/model/test_perceiver.py
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mbtrain import checkpoint, config, evaluation, metrics, vocab
from mbtrain.config import Config
from mbtrain.data.order import mix_numbers
from mbtrain.data.rows import Stream
from mbtrain.engine import parameter_groups
from mbtrain.errors import ConfigError
from mbtrain.model import build
from mbtrain.model.flops import count
from mbtrain.model.loss import nats
from mbtrain.model.perceiver import PerceiverAR
from mbtrain.model.sequence import Part
from mbtrain.schedule import lr_factor
from mbtrain.shards import open_split
from tests import launch, naive, tiny
from tests.test_train import progress_of, same_end, tree

PRESETS = ("paper", "modern")
LATENTS, SEQ_LEN = 8, 32
STAGE = {"patch_size": 1, "d_model": 16, "n_layers": 3, "n_heads": 2}


def rival(**changes: Any) -> dict[str, Any]:
    """The model section of a tiny perceiver."""
    return {"kind": "perceiver_ar", "latents": LATENTS, "stages": [STAGE], **changes}


def made(preset: str = "modern", seq_len: int = SEQ_LEN, layers: int = 3, **changes: Any) -> Config:
    model = rival(stages=[{**STAGE, "n_layers": layers}], **changes)
    return tiny.make(1, preset, seq_len, model=model)


def randomised(settings: Config, seed: int = 0) -> PerceiverAR:
    """A float64 model in eval mode whose every parameter is away from its initial value."""
    torch.manual_seed(seed)
    model = build(settings).double()
    assert isinstance(model, PerceiverAR)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return model.eval()


def training(model: PerceiverAR) -> PerceiverAR:
    """In training mode, without dropout's noise."""
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    return model.train()


def definition(model: PerceiverAR, prefix: list[int], start: int) -> np.ndarray:
    """The logits of byte len(prefix) in the pass whose first latent is at `start`: a loop in float64."""
    c = model.config
    stage, block = c.stages[0], c.block
    spec = naive.Spec(
        (naive.StageSpec(1, stage.d_model, stage.n_layers, stage.n_heads, stage.ff_width),),
        model.vocab_size,
        block.norm,
        block.norm_gain,
        block.activation,
        block.bias,
        block.qk_norm,
        (c.positions,),
        c.tied,
        final_norm=c.final_norm,
    )

    def array(x: Tensor | None) -> Any:
        return None if x is None else x.detach().numpy()

    def norm(n: Any) -> Any:
        return None if n is None else {"gain": array(n.gain), "bias": array(n.bias)}

    def block_params(b: Any, qkv: Any, qkv_bias: Any) -> dict[str, Any]:
        linear = {"out": b.attn.out, "up": b.ffn.up, "down": b.ffn.down}
        weights = {key: array(m.weight) for key, m in linear.items()} | {
            f"{key}_bias": array(m.bias) for key, m in linear.items()
        }
        return {"norm1": norm(b.attn_norm), "norm2": norm(b.ffn_norm), "qkv": qkv, "qkv_bias": qkv_bias, **weights}

    first: Any = model.transformer.blocks[0]
    one = block_params(
        first,
        np.concatenate([array(first.attn.q.weight), array(first.attn.kv.weight)]),
        np.concatenate([array(first.attn.q.bias), array(first.attn.kv.bias)]) if block.bias else None,
    )
    others: Any = list(model.transformer.blocks)[1:]
    p = {
        "embed": array(model.embed),
        "pos": array(model.positions),
        "pad": array(model.pad),
        "final_norm": norm(model.transformer.final_norm),
        "blocks": [block_params(b, array(b.attn.qkv.weight), array(b.attn.qkv.bias)) for b in others],
    }
    inputs = [naive.stage_zero_input(k, prefix, p, spec) for k in range(len(prefix) + 1)]
    looked = naive.attention([naive.norm(x, one["norm1"], spec.norm) for x in inputs], one, spec, 0)
    latents = []
    for x, mixed in list(zip(inputs, looked, strict=True))[start:]:
        y = x + mixed
        latents.append(y + naive.ffn(naive.norm(y, one["norm2"], spec.norm), one, spec.stages[0], spec.activation))
    out = naive.transformer(latents, p, spec, 0)[-1]
    unembed = p["embed"] if c.tied else array(model.readout)
    return np.asarray(unembed @ out)


def scoring_pass(column: int, n: int) -> int:
    """Where the pass begins in which a column is scored: 0 for the first n, then so that it is among the last n / 2."""
    start = 0
    while column >= start + n:
        start += n // 2
    return start


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("t", "latents", "layers"), [(1, 8, 2), (7, 8, 2), (8, 8, 3), (9, 8, 2), (19, 4, 2), (14, 6, 1)]
)
def test_equals_the_definition_byte_by_byte(preset: str, t: int, latents: int, layers: int) -> None:
    seq_len = 36  # a multiple of latents / 2
    model = randomised(made(preset, seq_len, layers, latents=latents))
    ids = torch.randint(0, 257, (1, t))
    byte = ids[0].tolist()
    expected = [definition(model, byte[:i], scoring_pass(i, latents)) for i in range(t)]
    np.testing.assert_allclose(model(ids)[0].detach().numpy(), np.stack(expected), atol=1e-9, rtol=0)


@profile(max_examples=15, deadline=None)
@given(
    block=st.fixed_dictionaries(
        {
            "norm": st.sampled_from(["layernorm", "rmsnorm"]),
            "norm_gain": st.booleans(),
            "activation": st.sampled_from(["relu", "relu2", "gelu", "silu", "swiglu"]),
            "bias": st.booleans(),
            "qk_norm": st.booleans(),
        }
    ),
    positions=st.sampled_from(["learned", "rotary", "none"]),
    tied=st.booleans(),
    final_norm=st.booleans(),
    number=st.integers(0, 2**64 - 1),
)
def test_every_choice_equals_the_definition_in_scoring_and_in_training(
    block: dict[str, Any], positions: str, tied: bool, final_norm: bool, number: int
) -> None:
    """At the last byte of a row, which is scored in its last pass, and at the first and last of the span of a draw."""
    chosen = {"block": block, "positions": positions, "tied": tied, "final_norm": final_norm}
    model = randomised(made(seq_len=20, layers=2, **chosen))
    ids = torch.randint(0, 257, (1, 20))
    byte = ids[0].tolist()
    np.testing.assert_allclose(model(ids)[0, -1].detach().numpy(), definition(model, byte[:-1], 12), atol=1e-9, rtol=0)
    span = model.training_span(20, number)
    logits = training(model)(ids[:, : span.stop])[0].detach().numpy()
    assert len(logits) == LATENTS
    for i in (0, LATENTS - 1):
        expected = definition(model, byte[: span.start + i], span.start)
        np.testing.assert_allclose(logits[i], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("t", [8, 11, SEQ_LEN])
def test_no_byte_sees_itself_or_one_after_it(preset: str, t: int) -> None:
    """Every byte in turn is changed: the logits up to its own stay, bit for bit; those right after it do not."""
    model = randomised(made(preset))
    ids = torch.randint(0, 256, (1, t))
    before = model(ids)
    for i in range(t):
        changed = ids.clone()
        changed[0, i] ^= 1
        after = model(changed)
        torch.testing.assert_close(after[:, : i + 1], before[:, : i + 1], atol=1e-12, rtol=0)
        # It reaches every later byte, however far: layer 1 looks at the whole row.
        assert ((after - before)[0, i + 1 :].abs().amax(dim=-1) > 1e-9).all()
    for number in range(3):
        span = model.training_span(t, number)
        taught = training(model)(ids[:, : span.stop])
        for i in range(span.stop):
            changed = ids.clone()
            changed[0, i] ^= 1
            after = model(changed[:, : span.stop])
            known = max(i + 1 - span.start, 0)
            torch.testing.assert_close(after[:, :known], taught[:, :known], atol=1e-12, rtol=0)
        model.eval()


def test_training_and_scoring_agree_where_their_passes_do() -> None:
    """On all columns of pass 0 and the last half of every later one."""
    model = randomised(made("paper"))
    ids = torch.randint(0, 257, (3, SEQ_LEN))
    scored = model(ids)
    training(model)
    for number in range(7):
        span = model.training_span(SEQ_LEN, number)
        same = slice(span.start + (LATENTS // 2 if span.start else 0), span.stop)
        taught = model(ids[:, : span.stop])[:, same.start - span.start :]
        torch.testing.assert_close(taught, scored[:, same], atol=1e-9, rtol=0)


def test_the_spans_are_the_passes_and_equally_likely() -> None:
    model = randomised(made())
    passes = [slice(start, start + 8) for start in range(0, 25, 4)]
    assert [model.training_span(32, number) for number in range(7)] == passes
    drawn = Counter(model.training_span(32, mix_numbers(0, step, 0)).start for step in range(7000))
    assert set(drawn) == {span.start for span in passes}
    assert all(abs(times - 1000) < 6 * math.sqrt(1000) for times in drawn.values())
    assert {model.training_span(6, number) == slice(0, 6) for number in (0, 5, 2**64 - 1)} == {True}
    assert [model.training_span(10, number) for number in (0, 1)] == [slice(0, 8), slice(4, 10)]


def test_a_long_context_goes_the_other_way_through_attention() -> None:
    """Above 512 positions torch's own kernel attends; a row of many passes equals its own prefixes."""
    model = randomised(made(seq_len=640, layers=2, latents=64))
    ids = torch.randint(0, 257, (1, 640))
    full = model(ids)
    torch.testing.assert_close(model(ids[:, :545]), full[:, :545], atol=1e-9, rtol=0)
    training(model)
    span = slice(576, 640)
    torch.testing.assert_close(model(ids)[:, 32:], full[:, span][:, 32:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("prompt", [0, 1, 7, 8, 13, 30])
def test_cached_logits_equal_the_full_forward_at_every_step(preset: str, layers: int, prompt: int) -> None:
    model = randomised(made(preset, layers=layers))
    ids = torch.randint(0, 257, (3, 31))
    full = model(torch.cat((ids, ids[:, :1]), dim=1))
    decoder = model.decoder(3)
    got = [decoder.feed(ids[:, :prompt])] + [decoder.feed(ids[:, t : t + 1]) for t in range(prompt, 31)]
    torch.testing.assert_close(torch.stack(got, dim=1), full[:, prompt:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("pieces", [[5, 11, 2], [1, 1, 15], [16, 3], [0, 7, 0, 9], [3, 20, 1, 5]])
def test_bytes_may_come_in_pieces_of_any_size(pieces: list[int]) -> None:
    model = randomised(made())
    ids = torch.randint(0, 257, (2, sum(pieces) + 1))
    decoder = model.decoder(2)
    n = 0
    for piece in pieces:
        logits = decoder.feed(ids[:, n : n + piece])
        n += piece
        torch.testing.assert_close(logits, model(ids[:, : n + 1])[:, n], atol=1e-9, rtol=0)


def test_a_full_row_goes_on_from_its_second_half() -> None:
    model = randomised(made("paper"))
    ids = torch.randint(0, 257, (1, 70))
    decoder = model.decoder(1)
    for t in range(70):
        logits = decoder.feed(ids[:, t : t + 1])
        row = 0 if t < 31 else (t - 31) // 16 * 16 + 16  # rows of the decoder begin at 0, 16, 32 ...
        expected = model(torch.cat((ids[:, row : t + 1], ids[:, :1]), dim=1))[:, -1]
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    long = model(torch.cat((ids[:, 54:], ids[:, :1]), dim=1))[:, -1]
    torch.testing.assert_close(model.decoder(1).feed(ids), long, atol=1e-9, rtol=0)


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = training(randomised(made()))
        model.transformer.checkpointing = checkpointing
        ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))
        nats(model(ids), ids[:, 12:]).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None
        assert again is not None
        assert plain.abs().sum() > 0, "every parameter takes part"
        torch.testing.assert_close(again, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("seq_len", "latents", "layers", "activation"), [(64, 16, 3, "relu2"), (40, 40, 2, "swiglu")])
def test_operations_are_those_that_torch_counts(seq_len: int, latents: int, layers: int, activation: str) -> None:
    settings = made("modern", seq_len, layers, latents=latents, block={"activation": activation})
    model = randomised(settings)
    counted = count(settings, causal=False)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, 257, (1, seq_len))
    with FlopCounterMode(display=False) as all_passes:
        model(ids)
    assert all_passes.get_total_flops() == counted.forward_per_byte * seq_len
    training(model)
    passes = 2 * seq_len // latents - 1
    spans = 0
    for number in range(passes):
        with FlopCounterMode(display=False) as of_span:
            model(ids[:, : model.training_span(seq_len, number).stop])
        spans += of_span.get_total_flops()
    assert 3 * spans / passes == pytest.approx(counted.training_per_byte * seq_len, rel=1e-12)


def test_what_it_is_not() -> None:
    model = randomised(made())
    assert model.unit_bytes(torch.zeros((1, 4), dtype=torch.int64)) is None
    with pytest.raises(ValueError, match="sequence parallelism"):
        model.share(Part(0, 2), lambda *_: torch.zeros(()))
    refused = {
        "data.seq_len: got 30, expected a multiple of model.latents / 2": made_tree(seq_len=30),
        "data.seq_len: got 4": made_tree(seq_len=4),
        "model.latents: got None": made_tree(latents=None),
        "model.latents: got 7": made_tree(latents=7),
        "model.stages.0.window: got 4": made_tree(stages=[{**STAGE, "window": 4}]),
    }
    for said, settings in refused.items():
        with pytest.raises(ConfigError) as error:
            config.validate(settings)
        assert said in str(error.value)


def made_tree(seq_len: int = SEQ_LEN, **changes: Any) -> dict[str, Any]:
    return tiny.tree(1, "modern", seq_len, model=rival(**changes))


# ------------------------------------------------------------------------------------------------- as it is trained

STEPS = 6


def run_tree(shards: Path, **sections: Any) -> dict[str, Any]:
    """Training of a tiny perceiver, each step in micro-steps of 4 rows (of 2 ranks: two)."""
    return tree(shards, model={"preset": "modern", **rival()}, train={"micro_batch_size": 2}, **sections)


def bare_loop(settings: dict[str, Any], shards: Path, ranks: int) -> list[tuple[float, float]]:
    """The same training by torch alone; of every step the nats a target and the bits a byte that were predicted."""
    c = config.validate(settings)
    torch.manual_seed(c.train.seed)
    model = build(c).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, c), betas=c.optim.betas, eps=c.optim.eps)
    rows, t = c.train.global_batch_size, c.data.seq_len
    align = t if c.data.rows == "sample" else 1
    stream = Stream(open_split(shards, "train"), boundary=True, seed=c.train.seed, align=align)
    micro = (c.train.micro_batch_size or rows) * ranks
    out = []
    for step in range(c.train.steps or 0):
        lost, targets, real = 0.0, 0, 0
        of_step = stream.rows(np.arange(step * rows, (step + 1) * rows), t)[1]
        expected = (rows * t if of_step is None else int(of_step.sum())) * LATENTS / t
        for micro_step in range(rows // micro):
            first = step * rows + micro_step * micro
            ids, mask, *_ = stream.rows(np.arange(first, first + micro), t)
            span = model.training_span(t, mix_numbers(c.train.seed, step, micro_step))
            assert span is not None
            tensor = torch.from_numpy(ids).long()
            counts = np.ones(ids.shape, bool)[:, span] if mask is None else mask[:, span]
            each = nats(model(tensor[:, : span.stop]), tensor[:, span])[torch.from_numpy(counts)]
            (each.sum() / expected).backward()
            lost += float(each.detach().double().sum())
            targets += int(counts.sum())
            real += int((ids[:, span] != vocab.BOUNDARY)[counts].sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.train.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = c.optim.lr * group["lr_scale"] * lr_factor(c.optim, step, step / (c.train.steps or 1))
        optimizer.step()
        optimizer.zero_grad()
        out.append((lost / targets, lost / math.log(2) / real))
    return out


@pytest.mark.parametrize(("ranks", "stage", "rows"), [(1, 0, "sample"), (2, 3, "packed")])
def test_a_training_is_the_bare_loop_and_its_loss_is_of_what_was_predicted(
    shards: Path, tmp_path: Path, ranks: int, stage: int, rows: str
) -> None:
    settings = run_tree(shards, data={"rows": rows})
    run = tmp_path / "run"
    path = launch.config_file(tmp_path, settings)
    launch.mbtrain(["train", str(path), f"--run={run}", f"--train.zero_stage={stage}"], ranks=ranks)
    lines = [line for line in metrics.read(run / "metrics.jsonl") if "train/bpb" in line]
    expected = bare_loop(settings, shards, ranks)
    got = [(line["train/loss_nats"], line["train/bpb"]) for line in lines]
    assert np.array(got) == pytest.approx(np.array(expected), abs=1e-5)
    # What was read, and what it cost, is counted in whole rows.
    ids = STEPS * 8 * SEQ_LEN
    assert 0.4 * ids < lines[-1]["progress/bytes"] <= ids, "a quarter of the columns is predicted"
    assert lines[-1]["progress/flops"] == pytest.approx(ids * count(config.validate(settings)).training_per_byte)
    assert evaluation.evaluate_run(run, batch=3)["bpb"] == pytest.approx(
        metrics.read(run / "metrics.jsonl")[-1]["val/bpb"], abs=1e-6
    )
    assert list((run / "samples").iterdir())


def test_resumed_from_halfway_ends_bitwise_the_same(shards: Path, tmp_path: Path) -> None:
    """With dropout, activations recomputed, and rows of one sample each, of whose filling nothing counts."""
    settings = run_tree(shards, data={"rows": "sample"})
    settings["model"]["block"] = {"dropout": 0.1}
    settings["train"] = {**settings["train"], "activation_checkpointing": True}
    path = launch.config_file(tmp_path, settings)
    run, broken = tmp_path / "whole", tmp_path / "broken"
    launch.mbtrain(["train", str(path), f"--run={run}"], ranks=2)
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / checkpoint.name_of(STEPS))
    launch.mbtrain(["train", str(path), f"--run={broken}", "--resume"], ranks=2)
    same_end(run, broken, STEPS)
    assert progress_of(run).bytes < STEPS * 8 * SEQ_LEN
