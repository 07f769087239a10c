"""Parameters and floating-point operations by formula, per stage. A test holds them against torch's own counters.

One multiply-add is two operations. Only matrix products count (as in torch's FlopCounterMode and in the literature):
norms, activations and softmax do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from mbtrain.config import Config


@dataclass(frozen=True)
class StageCount:
    """One stage: parameters, and forward operations per byte of a row by part."""

    parameters: int
    matrices: float
    attention: float
    project: float


@dataclass(frozen=True)
class Count:
    """The whole model. Forward operations are per byte; training costs three times as much."""

    stages: tuple[StageCount, ...]
    readout_parameters: int
    readout: float

    @property
    def parameters(self) -> int:
        return sum(stage.parameters for stage in self.stages) + self.readout_parameters

    @property
    def forward_per_byte(self) -> float:
        return sum(s.matrices + s.attention + s.project for s in self.stages) + self.readout

    @property
    def training_per_byte(self) -> float:
        return 3 * self.forward_per_byte


def count(config: Config, *, causal: bool = True) -> Count:
    """Count by formula (paper, section 3.1, exact in place of its approximations).

    causal: attention counts only the pairs that are allowed, the useful work; False counts all pairs, which is what
    unmasked products execute and torch's counter sees. With isolate_documents fewer pairs are allowed, how many
    depends on the data: the same number then is an upper bound.
    """
    model, seq_len, vocab = config.model, config.data.seq_len, config.vocab_size
    block = model.block
    stages = []
    for i, stage in enumerate(model.stages):
        d, f, p, layers = stage.d_model, stage.ff_width, stage.patch_size, stage.n_layers
        up = 2 * f if block.activation == "swiglu" else f
        coarser = None if i == 0 else model.stages[i - 1]
        length = seq_len // p if coarser is None else coarser.patch_size // p
        matrices_per_layer = 4 * d * d + d * up + f * d
        biases = (3 * d + d + up + d) if block.bias else 0
        norm = d * (int(block.norm_gain) + int(block.bias and block.norm == "layernorm"))
        embedding = vocab * (d // p) + d  # byte table and pad
        positions = 0
        if (model.positions if coarser is None else model.local_positions) == "learned":
            positions = seq_len * (d // p) if coarser is None else length * d
        project = 0 if coarser is None else d * (coarser.d_model // length)
        parameters = layers * (matrices_per_layer + biases + 2 * norm) + embedding + positions + project
        parameters += norm if model.final_norm else 0
        looked_at = (length + 1) / 2 if causal else length
        stages.append(
            StageCount(
                parameters=parameters,
                matrices=2 * layers * matrices_per_layer / p,
                attention=4 * layers * looked_at * d / p,
                project=2 * project / p,
            )
        )
    width = model.stages[-1].d_model
    return Count(tuple(stages), 0 if model.tied else vocab * width, 2 * width * vocab)
