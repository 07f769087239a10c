"""What a rank needs to train, in bytes, by formula: weights, gradients, optimizer states, exchange, activations.

The copies are those that DeepSpeed 0.19.8 makes of mbtrain.engine's configuration, seen as the growth of resident
memory over precisions, stages, 1, 2 and 4 ranks and accumulation; the table and figures are in docs/doctor.md. fp16 is
read off the source and not measured. Activations are what each operation of mbtrain.model keeps for the backward pass;
a test holds them against torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbtrain.config import Config, batch_shape, chunk_bytes
from mbtrain.errors import ConfigError
from mbtrain.log import size
from mbtrain.model.flops import SPACE_CHUNK, WINDOW_CHUNK, by_content, count

Device = Literal["cpu", "cuda"]

BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
FETCHED = 1_000_000_000  # its stage3_max_live_parameters
PLAIN_ATTENTION_MAX_T, PLAIN_WINDOW_MAX_T = 512, 2048  # of layers.py, which is not imported here: it brings torch
# A process without a model: on CPU 0.27 GB with torch and DeepSpeed, and 0.13 GB that ZeRO's start adds, as measured;
# beside a GPU its driver's and NCCL's part as well, which is a guess.
PROCESS_BYTES = {"cpu": 400_000_000, "cuda": 3_000_000_000}
# glibc is told to keep freed memory (engine.keep_memory): what stays resident was 1.0 to 2.1 times what tensors need.
KEPT = 1.6


@dataclass(frozen=True)
class Need:
    """Bytes on one rank. `total` is their peak: exchange comes when activations are gone."""

    weights: float
    gradients: float
    optimizer: float
    exchange: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + max(self.exchange, self.activations)


@dataclass(frozen=True)
class OnHost:
    """Bytes of host memory for one rank: the process itself, training, and a checkpoint's copy of what it owns."""

    process: float
    training: float
    snapshot: float


def predict(settings: Config, ranks: int, device: Device, stage: int | None = None) -> Need:
    """What one of so many ranks needs; at another ZeRO stage than the configuration's where one is given.

    Raises ConfigError where so many ranks cannot share the batch.
    """
    stage = settings.train.zero_stage if stage is None else stage
    precision = settings.train.precision
    if precision == "bf16" and stage == 0:
        precision = "autocast"
    micro, accumulation = batch_shape(settings, ranks)
    p = float(count(settings).parameters)
    bucket = float(BUCKET) if device == "cuda" else min(p, BUCKET)
    fetched = min(p, FETCHED)
    e = 2 if precision in ("bf16", "fp16") else 4
    ema = 4 * p if settings.optim.ema is not None else 0.0
    optimizer = (12 * p + ema) / ranks
    if stage == 0:
        weights, gradients, exchange = e * p, e * p, 4 * min(p, BUCKET)
        optimizer = (12 * p if e == 2 else 8 * p) + ema
    elif stage == 1 and precision == "bf16":
        weights, gradients, exchange = 2 * p, 4 * p, 2 * p
    elif stage == 1:
        weights, gradients, exchange = e * p, e * p, e * bucket
    elif stage == 2:
        kept = 4 * p / ranks if e == 2 or accumulation > 1 or p > BUCKET else 0.0
        weights, gradients, exchange = e * p, e * bucket + kept, e * min(p, BUCKET)
    else:
        weights = e * p / ranks + e * fetched
        gradients, exchange = e * bucket + 4 * p / ranks, e * min(p, BUCKET)
    held = sum(activations(settings, micro, device, precision)) + (2 * p if precision == "autocast" else 0)
    return Need(weights, gradients, optimizer, exchange, held)


def on_host(settings: Config, ranks: int, *, cuda: bool) -> OnHost:
    """Host memory that one rank takes. Beside a GPU, training's is the fp32 model that each rank builds first."""
    p = float(count(settings).parameters)
    training = 4 * p if cuda else KEPT * predict(settings, ranks, "cpu").total
    return OnHost(PROCESS_BYTES["cuda" if cuda else "cpu"], training, _state_bytes(settings) / ranks)


def checkpoint_bytes(settings: Config, last_step: int | None) -> int:
    """What checkpoints take on the disk at most: keep_last and one being written, and those that stay for good."""
    keep = settings.checkpoint
    for_good = (last_step or 0) // keep.keep_every_steps if keep.keep_every_steps else 0
    return _state_bytes(settings) * (keep.keep_last + 1 + for_good)


def _state_bytes(settings: Config) -> int:
    """Of a checkpoint: weights and two moments in fp32, and the weights that were trained beside their averages."""
    return (16 if settings.optim.averages else 12) * count(settings).parameters


def activations(
    settings: Config, micro: int, device: Device, precision: str | None = None, *, unit_bytes: float | None = None
) -> tuple[float, float]:
    """(what the forward pass of `micro` rows leaves for the backward pass on one rank, the largest tensors beside it).

    As plain torch does it; the kernels of model/cpu_kernels.py (bf16 on a CPU) keep less.
    The copies of the weights that autocast makes are not counted here. unit_bytes: as in flops.count. Of a row in
    chunks (train.chunk_bytes) what follows the coarsest stage keeps nothing, and all that it makes for one chunk stands
    beside what is kept.
    """
    precision = precision or settings.train.precision
    model, rows, parts = settings.model, settings.data.seq_len * micro, settings.train.sequence_parallel
    e, wide = 4 if precision == "fp32" else 2, 2 if precision in ("bf16", "fp16") else 4  # products, residual stream
    unit = count(settings, unit_bytes=unit_bytes).unit_bytes or 1.0
    chunk = chunk_bytes(settings)
    held, beside, positions = [0.0, 0.0], [0.0, 0.0], 0.0  # outside of chunks; in them, of whole rows
    for i, stage in enumerate(model.stages):
        if model.without == "global" and i == 0:
            continue
        inside = int(chunk is not None and (i > 0 or model.without == "global"))
        again = settings.train.activation_checkpointing and not inside
        look = _looking(settings, i, micro, unit)
        positions, d = look.positions, stage.d_model
        held[inside] += positions * d * wide * (2 if model.final_norm else 1)
        if model.without == "local" and i:  # no blocks
            continue
        block = positions * _block(settings, i, look, device, precision)
        held[inside] += stage.n_layers * (positions * d * wide if again else block)
        if model.latents is not None:  # layer 1 reads the row up to the end of its span: inputs, keys and values
            whole = _Look(positions, settings.data.seq_len)
            more = (2 if model.block.qk_norm else 1) * wide + 3 * e
            first = positions * _block(settings, i, whole, device, precision) + (rows - positions) * d * more
            held[0] += (rows - positions) * d * wide if again else first - block
        made = stage.n_layers if look.each_layer else 1
        held[inside] += made * look.masks * positions * look.keys * parts  # ranks that share a row all have it whole
        if i == 0 and model.conv_encoder:
            held[0] += rows * stage.d_byte * wide * 2 * len(model.conv_encoder)
        wider = max(
            2 * stage.n_heads * look.keys * wide if _plain(device, look, precision) else 0, stage.ff_width * wide
        )
        beside[inside] = max(beside[inside], positions * wider + (block if again else 0))
    predicted = positions * (model.vocabulary_size or settings.vocab_size)
    # Log-probabilities in fp32 are kept; as the backward pass begins, their gradient in fp32, and cast, stands beside.
    last = int(chunk is not None)
    held[last] += 4 * predicted
    beside[last] = max(beside[last], predicted * (4 if precision == "fp32" else 8))
    if chunk is None:
        return held[0] / parts, beside[0] / parts
    one = (held[1] + beside[1]) * min(1.0, chunk * parts / rows)
    return (held[0] + 4 * rows) / parts, max(beside[0], one) / parts


@dataclass(frozen=True)
class _Look:
    """How the attention of a stage works in a micro-batch.

    positions   of the stage, in all rows;  keys: how many each of them is multiplied with
    copies      how often keys and values are kept: chunks that look at what is before them have them twice
    masks       bytes of the mask for each pair of position and key: 0 where plain causality is known without one
    each_layer  makes the mask anew
    """

    positions: float
    keys: float
    copies: float = 1.0
    masks: float = 0.0
    each_layer: bool = False


def _looking(settings: Config, index: int, micro: int, unit: float) -> _Look:
    model, stage, seq_len = settings.model, settings.model.stages[index], settings.data.seq_len
    if model.latents is not None:
        return _Look(micro * model.latents, model.latents)
    if index == 0:
        length = seq_len / (unit if by_content(model) else stage.patch_size)
        if stage.window is None or length <= stage.window:
            return _Look(micro * length, length, masks=float(model.isolate_documents))
        # The rows of a micro-batch share the mask.
        chunk = min(stage.window, WINDOW_CHUNK)
        keys = stage.window + chunk
        return _Look(micro * length, keys, copies=keys / chunk, masks=1 / micro, each_layer=True)
    slots = model.stages[index - 1].patch_size // stage.patch_size
    before = model.cross_patch if index + 1 == len(model.stages) else 0
    if model.patching == "space":
        back = slots - 1 + before
        chunk = max(SPACE_CHUNK, back)
        return _Look(micro * seq_len, back + chunk, copies=(back + chunk) / chunk, masks=1.0)
    masks = float(before > 0)
    return _Look(micro * seq_len / stage.patch_size, slots + before, copies=(slots + before) / slots, masks=masks)


def remedy(settings: Config, ranks: int, device: Device, free: float) -> str:
    """The first change of the configuration that fits into `free` bytes a rank by formula, in words."""
    tried: list[tuple[str, Config, int]] = []
    for stage in range(settings.train.zero_stage, 4):
        tried.append((f"--train.zero_stage={stage}", settings, stage))
    spared = _with(settings, activation_checkpointing=True)
    last = 3 if ranks > 1 else settings.train.zero_stage
    tried += [("--train.activation_checkpointing=true", spared, settings.train.zero_stage)]
    tried += [(f"--train.zero_stage={last} --train.activation_checkpointing=true", spared, last)]
    micro = batch_shape(settings, ranks)[0]
    while micro > 1:
        micro //= 2
        smaller = _with(settings, micro_batch_size=micro)
        tried += [(f"--train.micro_batch_size={micro}", smaller, settings.train.zero_stage)]
        both = _with(settings, micro_batch_size=micro, activation_checkpointing=True)
        flags = f"--train.micro_batch_size={micro} --train.activation_checkpointing=true --train.zero_stage={last}"
        tried += [(flags, both, last)]
    for flags, changed, stage in tried[1:]:
        try:
            need = predict(changed, ranks, device, stage).total
        except ConfigError:
            continue
        if need <= free:
            return f"{flags} needs {size(need)} a rank by formula"
    return "more ranks or hosts, a smaller model or shorter rows: no stage, checkpointing or micro-batch is enough"


def _with(settings: Config, **train: object) -> Config:
    return settings.model_copy(update={"train": settings.train.model_copy(update=train)})


def _plain(device: Device, look: _Look, precision: str) -> bool:
    """Whether attention is plain products, which keep all weights."""
    window = look.each_layer and precision in ("bf16", "autocast")
    return device == "cpu" and look.keys <= (PLAIN_WINDOW_MAX_T if window else PLAIN_ATTENTION_MAX_T)


def _block(settings: Config, index: int, look: _Look, device: Device, precision: str) -> float:
    """Bytes that a block of a stage keeps for each position, as layers.py computes it."""
    model, stage = settings.model, settings.model.stages[index]
    block, d, h, f = model.block, stage.d_model, stage.n_heads, stage.ff_width
    e = 4 if precision == "fp32" else 2  # of what goes into matrix products
    r = 2 if precision in ("bf16", "fp16") else 4  # of the residual stream and of norms
    kept: float = 2 * d * (r + e) + 2 * 8  # inputs of both norms, what they give to products; means and deviations
    kept += {"relu": f, "relu2": 2 * f, "gelu": 2 * f, "silu": 2 * f, "swiglu": 4 * f}[block.activation] * e
    copies = look.copies if _plain(device, look, precision) else 1  # torch's kernels keep views
    kept += (2 + 2 * copies) * d * e  # queries and what attention gives, keys and values
    if block.qk_norm:
        kept += 2 * d * r + 2 * h * 8
    if block.dropout:
        kept += 2 * d * (1 if device == "cuda" else r)
    if _plain(device, look, precision):
        kept += h * look.keys * (3 * e if block.dropout else e)  # weights; which were dropped; those left
    elif block.dropout and device == "cpu":
        kept += h * look.keys * 12  # torch's kernel for CPUs knows no dropout: plain products in fp32
    else:
        moved = block.qk_norm or (model.positions if index == 0 else model.local_positions) == "rotary"
        kept += 2 * d * e if moved else 0  # values are a view, which keeps queries and keys as they were, too
        kept += look.keys * e * look.masks  # the mask as numbers
    return kept
