"""What a configuration costs, by formula: `mbtrain flops`. Parameters, operations, memory, patch size, GPU hours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mbtrain import gpus
from mbtrain.config import Config, batch_shape, step_limit
from mbtrain.doctor import memory
from mbtrain.log import size
from mbtrain.model.flops import best_patch, count, kept_values

BF16_BYTES = 2
PARTS = ("matrices", "attention", "project", "conv")


def figures(
    settings: Config, *, gpu_names: Sequence[str] = ("A100", "H100"), mfu: float = 0.4, unit_bytes: float | None = None
) -> dict[str, Any]:
    """All figures of a configuration, for --json and for `lines`.

    gpu_names: of gpus.PEAKS. mfu: the share of their peak that training reaches. unit_bytes: as in flops.count.
    Operations are forward and per byte of a row unless named otherwise; memory is in bytes.
    """
    counted = count(settings, unit_bytes=unit_bytes)
    forward = counted.forward_per_byte
    micro, _ = batch_shape(settings, 1)
    stages = [
        {
            "patch_size": spec.patch_size,
            "n_layers": spec.n_layers,
            "d_model": spec.d_model,
            "parameters": stage.parameters,
            "hidden_parameters": stage.hidden,
            **{part: getattr(stage, part) for part in PARTS},
            "forward": stage.forward,
            "share": stage.forward / forward,
        }
        for spec, stage in zip(settings.model.stages, counted.stages, strict=True)
    ]
    readout = {
        "parameters": counted.readout_parameters,
        "forward": counted.readout,
        "share": counted.readout / forward,
    }
    return {
        "parameters": counted.parameters,
        "hidden_parameters": counted.hidden,
        "forward_flops_per_byte": forward,
        "training_flops_per_byte": counted.training_per_byte,
        "stages": stages,
        "readout": readout,
        "unit_bytes": counted.unit_bytes,
        "unit_bytes_assumed": counted.assumed,
        "kv_cache_bytes": BF16_BYTES * kept_values(settings, unit_bytes=unit_bytes),
        "micro_batch_size": micro,
        "activation_bytes": {device: sum(memory.activations(settings, micro, device)) for device in ("cuda", "cpu")},
        "patch_size": _patch_size(settings, forward),
        "budget": _budget(settings, counted.training_per_byte, gpu_names, mfu),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The figures as a table that a person reads; operations in millions, MFLOP."""
    used = [part for part in PARTS if any(stage[part] for stage in found["stages"])]
    head = "forward, MFLOP a byte"
    yield f"{head:31}{'parameters':>11}" + "".join(f"{part:>11}" for part in (*used, "all", "share"))
    for i, stage in enumerate(found["stages"]):
        what = f"stage {i}: every {stage['patch_size']} B, {stage['n_layers']} x {stage['d_model']}"
        yield _row(what, stage["parameters"], [stage[part] for part in used], stage["forward"], stage["share"])
    readout = found["readout"]
    empty = [0.0] * len(used)
    yield _row("readout", readout["parameters"], empty, readout["forward"], readout["share"])
    sums = [sum(stage[part] for stage in found["stages"]) for part in used]
    yield _row("in all", found["parameters"], sums, found["forward_flops_per_byte"], 1.0)
    yield ""
    hidden = f"{found['hidden_parameters'] / 1e6:.2f}M of the parameters are matrices of blocks"
    yield f"training      {found['training_flops_per_byte'] / 1e6:.3f} MFLOP a byte of a row; {hidden}"
    if found["training_flops_per_byte"] != 3 * found["forward_flops_per_byte"]:
        yield "              (one span of each row; the table is of scoring, by all passes)"
    if found["unit_bytes"] is not None:
        how = "assumed: the data set is not at hand" if found["unit_bytes_assumed"] else "measured on the training rows"
        yield f"positions     of {found['unit_bytes']:.3f} bytes on average in the coarsest stage, {how}"
    yield f"keys, values  {size(found['kv_cache_bytes'])} at the end of a row, batch 1, bf16"
    on_gpu, on_cpu = (size(found["activation_bytes"][device]) for device in ("cuda", "cpu"))
    rows = "row" if found["micro_batch_size"] == 1 else "rows"
    yield f"activations   {on_gpu} on a GPU, {on_cpu} on a CPU, for a micro-batch of {found['micro_batch_size']} {rows}"
    yield from _patch_lines(found["patch_size"])
    yield from _budget_lines(found["budget"])


def _row(what: str, parameters: int, parts: Sequence[float], whole: float, share: float) -> str:
    numbers = "".join(f"{part / 1e6:11.3f}" if part else f"{'-':>11}" for part in (*parts, whole))
    return f"{what:31}{parameters / 1e6:10.2f}M{numbers}{share:11.1%}"


def _patch_size(settings: Config, forward: float) -> dict[str, Any] | None:
    best = best_patch(settings)
    if best is None:
        return None
    return {
        "configured": settings.model.stages[0].patch_size,
        "best": best.size,
        "best_forward_share": best.forward_per_byte / forward,
        "best_dividing_row": best.dividing,
        "best_dividing_row_forward_share": best.dividing_forward_per_byte / forward,
        "cube_root": best.cube_root,
    }


def _patch_lines(patch: dict[str, Any] | None) -> Iterator[str]:
    if patch is None:
        return
    yield (
        f"patch size    {patch['configured']}; the fewest operations: {patch['best']} "
        f"({patch['best_forward_share']:.0%} of these), of those that divide the row: {patch['best_dividing_row']} "
        f"({patch['best_dividing_row_forward_share']:.0%})"
    )
    yield "              with the row, all widths and layers held; bits per byte are not in it"
    yield f"              (2T)^(1/3), of attention alone with equal constants: {patch['cube_root']:.0f}"


def _budget(settings: Config, training_per_byte: float, gpu_names: Sequence[str], mfu: float) -> dict[str, Any] | None:
    steps = step_limit(settings, training_per_byte)
    if steps is None:
        return None
    row_bytes = steps * settings.train.global_batch_size * settings.data.seq_len
    flops = row_bytes * training_per_byte
    hours = {}
    for name in gpu_names:
        peak = gpus.peak(name, settings.train.precision)
        assert peak is not None
        hours[name] = flops / (peak * mfu) / 3600
    return {"steps": steps, "bytes": row_bytes, "flops": flops, "mfu": mfu, "gpu_hours": hours}


def _budget_lines(budget: dict[str, Any] | None) -> Iterator[str]:
    if budget is None:
        yield "budget        train.minutes alone limits it: operations depend on the machine"
        return
    yield f"budget        {budget['steps']} steps, {size(budget['bytes'])} of rows, {budget['flops']:.3g} FLOPs"
    each = ", ".join(f"{_hours(hours)} of {name}" for name, hours in budget["gpu_hours"].items())
    yield f"cost          {each}, at {budget['mfu']:.0%} of peak; recomputed activations and evaluation not counted"


def _hours(hours: float) -> str:
    return f"{hours:,.0f} hours" if hours >= 10 else f"{hours:.2g} hours"
