"""Parameters, floating-point operations and keys and values kept, by formula. Tests hold them against torch's counters.

One multiply-add is two operations. Only matrix products count (as in torch's FlopCounterMode and in the literature):
norms, activations and softmax do not, and no embedding, which is looked up. Everything is per byte of a row; the
paper's section 3.1 approximates what is exact here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mbtrain.config import Config, ModelConfig, StageConfig

# Mean bytes of a position of the coarsest stage where the text decides it and was not measured: English and code.
ASSUMED_UNIT_BYTES = {"subword": 3.5, "space": 5.5}
WINDOW_CHUNK, SPACE_CHUNK = 128, 32  # of layers.py and space.py, rooms above this one


@dataclass(frozen=True)
class StageCount:
    """One stage: parameters (hidden: those in the matrices of its blocks), and forward operations per byte by part."""

    parameters: int
    hidden: int
    matrices: float
    attention: float
    project: float = 0.0
    conv: float = 0.0

    @property
    def forward(self) -> float:
        """Forward operations per byte, all parts."""
        return self.matrices + self.attention + self.project + self.conv


@dataclass(frozen=True)
class Count:
    """The whole model. Operations are per byte of a row.

    trained      forward operations per byte of a row in training, where they are others than in evaluation: a
                 perceiver's step predicts a span of the row, its evaluation passes over it again and again
    unit_bytes   mean bytes of a position of the coarsest stage where the text decides it; assumed: not measured
    """

    stages: tuple[StageCount, ...]
    readout_parameters: int
    readout: float
    trained: float | None = None
    unit_bytes: float | None = None
    assumed: bool = False

    @property
    def parameters(self) -> int:
        return sum(stage.parameters for stage in self.stages) + self.readout_parameters

    @property
    def hidden(self) -> int:
        """Parameters in the matrices of the blocks: 12 L D^2 for each stage of the paper's."""
        return sum(stage.hidden for stage in self.stages)

    @property
    def forward_per_byte(self) -> float:
        return sum(stage.forward for stage in self.stages) + self.readout

    @property
    def training_per_byte(self) -> float:
        """Three times the forward pass: the backward pass has two products for each of its products."""
        return 3 * (self.forward_per_byte if self.trained is None else self.trained)


def count(config: Config, *, causal: bool = True, unit_bytes: float | None = None) -> Count:
    """Count by formula (paper, section 3.1, exact in place of its approximations).

    causal: attention counts only the pairs that are allowed, the useful work; False counts all pairs, which is what
    unmasked products execute and torch's counter sees. With isolate_documents fewer pairs are allowed, how many
    depends on the data: the same number then is an upper bound.
    unit_bytes: mean bytes of a position of the coarsest stage for patching=space and kind=subword (units.py measures
    them); None: as ASSUMED_UNIT_BYTES has it.
    """
    model, vocab = config.model, _predicted(config)
    unit, assumed = _unit_bytes(config, unit_bytes)
    stages = tuple(_stage(config, i, causal=causal, unit=unit) for i in range(len(model.stages)))
    width = model.stages[-1].d_model
    readout, trained = 2.0 * width * vocab, None
    if model.kind == "subword":
        assert unit is not None
        readout /= unit
    if model.latents is not None:
        stages, trained = _perceiver(config, stages[0], readout, causal=causal)
    return Count(
        stages,
        readout_parameters=0 if model.tied else vocab * width,
        readout=readout,
        trained=trained,
        unit_bytes=unit,
        assumed=assumed,
    )


def by_content(model: ModelConfig) -> bool:
    """Whether the text decides how many bytes a position of the coarsest stage holds."""
    return model.kind == "subword" or model.patching == "space"


def pairs(length: float, window: int | None = None, *, causal: bool = True) -> float:
    """Positions that each of so many looks at, on average; its own and those before it, at most `window` of them."""
    if not causal:
        return length
    near = length if window is None else min(window, length)
    return float((near * (near + 1) / 2 + (length - near) * near) / length)


def _stage(config: Config, index: int, *, causal: bool, unit: float | None) -> StageCount:
    model, stage, seq_len = config.model, config.model.stages[index], config.data.seq_len
    coarser = model.stages[index - 1] if index else None
    d, vocab = stage.d_model, _predicted(config)
    if model.without == "global" and coarser is None:
        return StageCount(parameters=0, hidden=0, matrices=0.0, attention=0.0)
    project = 0
    if coarser is not None and model.without != "global":
        project = d * (coarser.d_model // (coarser.patch_size // stage.patch_size))
    if model.without == "local" and coarser is not None:  # no blocks: slices of the global output go to the readout
        parameters = project + (vocab * d if model.tied else 0) + (_norm(config, d) if model.final_norm else 0)
        return StageCount(parameters, hidden=0, matrices=0.0, attention=0.0, project=2 * project / stage.patch_size)
    hidden, others = _block(config, stage)
    parameters = stage.n_layers * (hidden + others) + vocab * stage.d_byte + d  # byte table and pad
    parameters += _norm(config, d) if model.final_norm else 0
    bytes_each: float = stage.patch_size if unit is None or coarser else unit
    conv = 0
    if coarser is None:
        looked_at = _looked_at_by_coarsest(stage, seq_len / bytes_each, causal=causal)
        conv = sum(model.conv_encoder) * stage.d_byte**2
        parameters += conv + (len(model.conv_encoder) * stage.d_byte if model.block.bias else 0)
        parameters += seq_len * stage.d_byte if model.positions == "learned" else 0
        parameters += stage.d_byte if model.patching == "space" else 0  # stands in empty slots
    else:
        slots = coarser.patch_size // stage.patch_size
        looked_at = _looked_at_in_patch(config, index, slots, causal=causal, unit=unit)
        parameters += project + (slots * d if model.local_positions == "learned" else 0)
    return StageCount(
        parameters=parameters,
        hidden=stage.n_layers * hidden,
        matrices=2 * stage.n_layers * hidden / bytes_each,
        attention=4 * stage.n_layers * looked_at * d / bytes_each,
        project=2 * project / stage.patch_size,
        conv=2.0 * conv,
    )


def _looked_at_by_coarsest(stage: StageConfig, length: float, *, causal: bool) -> float:
    """Positions that one of a row's looks at on average; not causal: that layers.attend_window computes."""
    if causal or stage.window is None or length <= stage.window:
        return pairs(length, stage.window, causal=causal)
    chunk = min(stage.window, WINDOW_CHUNK)
    return math.ceil(length / chunk) * chunk * (stage.window + chunk) / length


def _looked_at_in_patch(config: Config, index: int, slots: int, *, causal: bool, unit: float | None) -> float:
    """Positions that one of a finer stage looks at on average: those of its patch, and of the last stage some before.

    Where words end patches, those of patches of the mean length: of patches that differ it is more, how much depends on
    the text. Not causal: what space.windowed computes, chunk by chunk.
    """
    model, seq_len = config.model, config.data.seq_len
    before = model.cross_patch if index + 1 == len(model.stages) else 0
    patch_bytes = model.stages[index - 1].patch_size
    if unit is None:
        # The first patch of a row has none before it.
        return pairs(slots, causal=causal) + before * (1 - patch_bytes / seq_len if causal else 1)
    if causal:
        return (unit + 1) / 2 + before * (1 - unit / seq_len)
    back = slots - 1 + before
    chunk = max(SPACE_CHUNK, back)
    return math.ceil(seq_len / chunk) * chunk * (back + chunk) / seq_len


def _perceiver(config: Config, plain: StageCount, readout: float, *, causal: bool) -> tuple[tuple[StageCount], float]:
    """perceiver.py's formulas: its stage in scoring, all passes, and what training computes of the forward pass.

    plain: the transformer of the same width and layers, whose parameters it has. Training draws one pass of a row; that
    is the mean over all of them.
    """
    stage, t, n = config.model.stages[0], config.data.seq_len, config.model.latents
    assert n is not None
    d, others = stage.d_model, stage.n_layers - 1
    block, _ = _block(config, stage)
    own = pairs(n, causal=causal)
    passed = 2 * t - n  # latents of all passes: n at first, then n for each n / 2 bytes
    scoring = replace(
        plain,
        matrices=2 * (t + others * passed) * block / t,
        attention=4 * d * (t * pairs(t, causal=causal) + others * passed * own) / t,
    )
    seen = (t + n) / 2  # positions up to the end of a pass
    looked_at = (t + 1) / 2 if causal else seen
    matrices = 2 * (n * (block - 2 * d * d) + seen * 2 * d * d + others * n * block)
    attention = 4 * d * (n * looked_at + others * n * own)
    return (scoring,), (matrices + attention + n * readout) / t


def _predicted(config: Config) -> int:
    """How many ids the model embeds and predicts."""
    return config.model.vocabulary_size or config.vocab_size


def _block(config: Config, stage: StageConfig) -> tuple[int, int]:
    """Parameters of a block: of its matrices, and of its biases and norms."""
    block, d, f = config.model.block, stage.d_model, stage.ff_width
    up = 2 * f if block.activation == "swiglu" else f
    biases = (3 * d + d + up + d) if block.bias else 0
    return 4 * d * d + d * up + f * d, biases + 2 * _norm(config, d)


def _norm(config: Config, width: int) -> int:
    block = config.model.block
    return width * (int(block.norm_gain) + int(block.bias and block.norm == "layernorm"))


def _unit_bytes(config: Config, measured: float | None) -> tuple[float | None, bool]:
    """Mean bytes of a position of the coarsest stage, where the text decides it; and whether they are assumed."""
    if not by_content(config.model):
        return None, False
    kind = "subword" if config.model.kind == "subword" else "space"
    assumed = ASSUMED_UNIT_BYTES[kind]
    if kind == "space":
        assumed = min(assumed, config.model.stages[0].patch_size)  # the longest patch
    return (assumed, True) if measured is None else (measured, False)


def kept_values(config: Config, *, unit_bytes: float | None = None) -> float:
    """Keys and values that generation keeps for one row, at its end: 2 L D for each position that is looked at.

    A finer stage begins anew in each position of the coarser one (paper, section 2.1), so it keeps those of one. Those
    that a window has passed are kept, too: decode.py looks past them.
    """
    model, seq_len = config.model, config.data.seq_len
    unit, _ = _unit_bytes(config, unit_bytes)
    if model.latents is not None:  # layer 1 keeps the whole row, the others the latents of a pass
        return 2.0 * model.stages[0].d_model * (seq_len + (model.stages[0].n_layers - 1) * model.latents)
    total = 0.0
    for i, stage in enumerate(model.stages):
        if model.without == ("local" if i else "global"):
            continue
        length: float = seq_len / stage.patch_size if unit is None or i else seq_len / unit
        if i:
            length = model.stages[i - 1].patch_size // stage.patch_size
            length += model.cross_patch if i + 1 == len(model.stages) else 0
        total += 2 * stage.n_layers * length * stage.d_model
    return total


@dataclass(frozen=True)
class BestPatch:
    """The coarsest patch size with the fewest operations per byte, all widths, layers and the row kept as they are.

    size, forward        of all that fit into the width; a row that it does not divide is filled up
    dividing, its        of those that divide the row and are multiples of the next stage's
    cube_root            (2 T)^(1/3): attention alone, all constants equal (paper, section 3.1)
    """

    size: int
    forward_per_byte: float
    dividing: int
    dividing_forward_per_byte: float
    cube_root: float


def best_patch(config: Config, *, causal: bool = True) -> BestPatch | None:
    """Try every patch size of the coarsest stage; None for a model of one stage, or whose patches are not fixed."""
    model, seq_len = config.model, config.data.seq_len
    if len(model.stages) < 2 or model.patching != "fixed" or model.without != "none":
        return None
    first, finer = model.stages[0], model.stages[1].patch_size
    forward: dict[int, float] = {}
    least = max(2 * finer, model.cross_patch if len(model.stages) == 2 else 0)
    for size in range(least + -least % finer, min(first.d_model, seq_len) + 1, finer):
        row = -(-seq_len // size) * size
        stages = (first.model_copy(update={"patch_size": size}), *model.stages[1:])
        tried = config.model_copy(
            update={
                "model": model.model_copy(update={"stages": stages}),
                "data": config.data.model_copy(update={"seq_len": row}),
            }
        )
        forward[size] = count(tried, causal=causal).forward_per_byte * row / seq_len
    whole = {size: each for size, each in forward.items() if seq_len % size == 0}
    best, dividing = min(forward, key=forward.__getitem__), min(whole, key=whole.__getitem__)
    return BestPatch(best, forward[best], dividing, whole[dividing], (2 * seq_len) ** (1 / 3))
