"""torch.compile, block by block.

Not the whole model: a block is where the operations are, blocks of one stage share one graph, and what lies between
stages (lookups, chunks, the loss, DeepSpeed's hooks at parameters) stays ordinary torch. Nor with CUDA graphs of whole
regions (mode="reduce-overhead"): their outputs live in memory that the next replay overwrites, which accumulation over
micro-steps and recomputed chunks would have to be proved against, and they only spare launches, which a batch that
fills the GPU hides.
"""

from __future__ import annotations

import torch
from torch import nn

from mbtrain.config import Config
from mbtrain.model import compiled, fused
from mbtrain.model.layers import Transformer

# A long row's chunks come in two lengths, with and without gradients, in each finer stage: torch's 8 are too few.
GRAPHS = 32


def is_compiled(config: Config, device: torch.device) -> bool:
    """train.compile, or where it is null: on a GPU, of a model whose rows always have the same shapes, whole weights.

    Words that end patches, subwords and a perceiver's spans differ from batch to batch; ZeRO-3's hooks inside a block
    would cut it in pieces; without a C compiler torch's could not run.
    """
    if config.train.compile is not None:
        return config.train.compile
    fits = config.model.in_chunks and config.train.zero_stage < 3
    return device.type == "cuda" and fits and compiled.compiler() is not None


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Let torch.compile have every block; a graph for each stage and shape, made when it is first met."""
    import torch._dynamo  # seconds, for those who compile

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    fused.settle_for_compiler()
    for module in model.modules():
        if isinstance(module, Transformer):
            for block in module.blocks:
                block.compile(backend=backend, dynamic=False)
