"""Memory by formula against what torch keeps and what real steps take.

pytest tests/doctor/test_memory.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mbtrain.config import Config, load
from mbtrain.doctor import memory
from mbtrain.model import build, cpu_kernels, layers
from mbtrain.model.flops import count
from mbtrain.model.loss import nats
from mbtrain.model.sparing import spare
from tests import launch, tiny

STAGES = [
    {"patch_size": 4, "d_model": 64, "n_layers": 3, "n_heads": 4},
    {"patch_size": 1, "d_model": 32, "n_layers": 2, "n_heads": 2},
]


LOCAL = tiny.STAGES[2][1]


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula is of plain torch, as on a GPU."""
    monkeypatch.setattr(cpu_kernels, "rounds", lambda x: False)


@pytest.mark.parametrize("seq_len", [64, 2048])
def test_the_kernels_of_a_cpu_keep_less(seq_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny.make(2, "modern", seq_len, model={"stages": STAGES}, train={"precision": "bf16", "zero_stage": 1})
    plain = kept_by_torch(settings, rows=2)
    monkeypatch.undo()
    assert kept_by_torch(settings, rows=2) <= plain


def kept_by_torch(settings: Config, rows: int) -> int:
    """Bytes of the storages that a forward pass leaves for the backward pass, parameters left out."""
    model = build(settings)
    if settings.train.precision == "bf16":
        model.bfloat16()
    model.train()
    spare(model, settings)
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 256, (rows, settings.data.seq_len))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.train.precision == "autocast"):
            logits = model(ids)
        nats(logits, ids[:, -logits.shape[1] :]).mean()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize(
    ("preset", "seq_len", "model"),
    [
        ("modern", 64, {}),
        ("modern", 512, {"isolate_documents": True}),
        ("modern", 4096, {}),  # beyond 512 positions torch's own kernel attends
        ("modern", 4096, {"isolate_documents": True}),
        ("modern", 256, {"positions": "none", "block": {"qk_norm": False, "activation": "swiglu"}}),
        ("modern", 256, {"block": {"token_shift": True, "norm": "layernorm", "activation": "gelu"}}),
        ("paper", 256, {}),
        ("paper", 4096, {}),  # dropout, which that kernel does not know
    ],
)
def test_activations_are_what_torch_keeps(precision: str, preset: str, seq_len: int, model: dict[str, Any]) -> None:
    """To 12 %, for every kind of attention, activation and precision."""
    settings = tiny.make(
        2, preset, seq_len, model={"stages": STAGES, **model}, train={"precision": precision, "zero_stage": 1}
    )
    kept = kept_by_torch(settings, rows=2)
    formula, _ = memory.activations(settings, 2, "cpu")
    formula += 2 * count(settings).parameters if precision == "autocast" else 0
    assert formula == pytest.approx(kept, rel=0.12)


WINDOW = [{"patch_size": 1, "d_model": 64, "n_layers": 3, "n_heads": 4, "window": 32}]
LONG_WINDOW = [{**WINDOW[0], "window": 512}]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["modern", "paper"])
@pytest.mark.parametrize(
    ("seq_len", "model"),
    [
        (256, {"stages": WINDOW, "kind": "transformer"}),
        (2048, {"stages": LONG_WINDOW, "kind": "transformer"}),
        (256, {"conv_encoder": [3, 5, 7], "cross_patch": 2}),
        (256, {"without": "local"}),
        (256, {"without": "global", "cross_patch": 2}),
        (256, {"stages": [{**WINDOW[0], "window": None}], "kind": "perceiver_ar", "latents": 64}),
        (1024, {"patching": "space", "cross_patch": 2}),
    ],
)
def test_activations_of_other_kinds_are_what_torch_keeps(
    seq_len: int, model: dict[str, Any], preset: str, precision: str
) -> None:
    """To 12 %, as for plain MEGABYTE; of a perceiver at the end of a row, where it keeps the most."""
    settings = tiny.make(
        2, preset, seq_len, model={"stages": STAGES, **model}, train={"precision": precision, "zero_stage": 1}
    )
    torch.manual_seed(0)
    kept = kept_by_torch(settings, rows=2)
    unit = build(settings).unit_bytes(torch.randint(0, 256, (8, seq_len)))
    formula, _ = memory.activations(settings, 2, "cpu", unit_bytes=unit)
    assert formula == pytest.approx(kept, rel=0.12)


def test_activation_checkpointing_keeps_a_blocks_input_alone() -> None:
    settings = tiny.make(2, "modern", 512, model={"stages": STAGES}, train={"activation_checkpointing": True})
    whole = tiny.make(2, "modern", 512, model={"stages": STAGES})
    kept = kept_by_torch(settings, rows=2)
    assert kept < 0.5 * kept_by_torch(whole, rows=2)
    assert memory.activations(settings, 2, "cpu")[0] == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize("stages", [STAGES, LONG_WINDOW])
def test_a_row_in_chunks_keeps_the_coarsest_stage_alone(stages: list[dict[str, int]]) -> None:
    """To 12 %; what a chunk makes stands beside it, and is as large as the chunk."""
    kind = "megabyte" if len(stages) == 2 else "transformer"

    def of(chunk_bytes: int | None) -> Config:
        model = {"stages": stages, "kind": kind}
        return tiny.make(2, "modern", 4096, model=model, train={"chunk_bytes": chunk_bytes})

    held, beside = memory.activations(of(1024), 1, "cpu")
    assert held == pytest.approx(kept_by_torch(of(1024), rows=1), rel=0.12)
    whole, largest = memory.activations(of(None), 1, "cpu")
    assert held < whole
    if kind == "megabyte":
        assert held + beside < 0.7 * (whole + largest)
        assert beside == pytest.approx(2 * memory.activations(of(512), 1, "cpu")[1])


def test_ranks_that_share_rows_share_activations() -> None:
    def held(ranks: int) -> float:
        model = {"stages": STAGES}
        return sum(memory.activations(tiny.make(2, model=model, train={"sequence_parallel": ranks}), 2, "cpu"))

    assert held(4) == pytest.approx(held(1) / 4)


def test_the_border_between_attentions_is_that_of_the_layers() -> None:
    assert memory.PLAIN_ATTENTION_MAX_T == layers._PLAIN_ATTENTION_MAX_T
    assert memory.PLAIN_WINDOW_MAX_T == layers._PLAIN_WINDOW_MAX_T


def measured(
    folder: Path, precisions: list[str], d_model: int, ranks: int = 2, accumulation: int = 1
) -> dict[tuple[str, int], tuple[float, float]]:
    """(formula, measured) bytes of a rank by precision and stage 0 to 3, for a model whose states dominate."""
    paths = {}
    for precision in precisions:
        for stage in range(4):
            train = {"zero_stage": stage, "precision": precision, "micro_batch_size": 1}
            tree = tiny.tree(
                2,
                seq_len=16,
                model={"stages": [{"patch_size": 4, "d_model": d_model, "n_layers": 4, "n_heads": 4}, LOCAL]},
                train=train | {"global_batch_size": ranks * accumulation},
            )
            paths[precision, stage] = folder / f"{precision}{stage}.yaml"
            paths[precision, stage].write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "tests.doctor.ranks", *map(str, paths.values())]
    port = str(launch.free_port())
    processes = [
        subprocess.Popen(
            command,
            env=launch.environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        ended = launch.end(processes, timeout_s=400)
    finally:
        for process in processes:
            process.kill()
    assert ended.codes == [0] * ranks, ended.stderr
    peaks = [float(line) for line in ended.stdout.splitlines()]
    found = zip(paths.items(), peaks, strict=True)
    return {key: (memory.predict(load(path), ranks, "cpu").total, peak) for (key, path), peak in found}


def test_the_formula_of_weights_gradients_and_optimizer_is_what_steps_take(tmp_path: Path) -> None:
    """At stages 0 to 3 on two ranks, to 12 %."""
    for key, (formula, peak) in measured(tmp_path, ["bf16"], d_model=512).items():
        assert formula == pytest.approx(peak, rel=0.12), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precisions", "ranks", "accumulation"),
    [(["fp32", "autocast"], 2, 1), (["fp32", "bf16"], 4, 2), (["fp32", "bf16"], 1, 1)],
)
def test_the_formula_holds_on_other_ranks_and_with_accumulation(
    tmp_path: Path, precisions: list[str], ranks: int, accumulation: int
) -> None:
    for key, (formula, peak) in measured(tmp_path, precisions, 512, ranks, accumulation).items():
        assert formula == pytest.approx(peak, rel=0.15), key


def test_what_would_fit_is_said() -> None:
    model = {"stages": [{"patch_size": 4, "d_model": 512, "n_layers": 4, "n_heads": 4}, LOCAL]}
    settings = tiny.make(2, model=model, train={"zero_stage": 1, "precision": "bf16", "global_batch_size": 64})
    now = memory.predict(settings, 16, "cpu").total
    stage_2 = memory.predict(settings, 16, "cpu", 2).total
    assert stage_2 < now
    assert memory.remedy(settings, 16, "cpu", stage_2).startswith("--train.zero_stage=2 needs")
    assert memory.remedy(settings, 16, "cpu", 1000.0).startswith("more ranks or hosts")
    checkpointing = {"zero_stage": 3, "global_batch_size": 64, "activation_checkpointing": True}
    wide = tiny.make(2, seq_len=4096, train=checkpointing)
    half = wide.model_copy(update={"train": wide.train.model_copy(update={"micro_batch_size": 16})})
    assert "--train.micro_batch_size=16" in memory.remedy(wide, 2, "cuda", memory.predict(half, 2, "cuda").total)


def test_checkpoints_on_the_disk() -> None:
    settings = tiny.make(2, checkpoint={"keep_last": 2, "keep_every_steps": 100})
    once = 12 * count(settings).parameters
    assert memory.checkpoint_bytes(settings, None) == 3 * once
    assert memory.checkpoint_bytes(settings, 1050) == 13 * once
