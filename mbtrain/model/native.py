"""The compiled form of Decoder's step of one byte: native.c, built by the machine's own C compiler where there is one.

It is the same arithmetic on the same caches, on a CPU and in fp32, for what most models are made of; `covers` says
which. Where there is no library (compiled.py), everything goes through torch.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_float, c_int64, c_void_p
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mbtrain.model import compiled
from mbtrain.model.layers import Block, LayerCache
from mbtrain.model.steps import Steps, is_plain

if TYPE_CHECKING:
    from mbtrain.model.megabyte import Megabyte, Stage

PANEL = 64
ROWS_A_THREAD = 6  # at least: below that, reading the weights is what takes the time
ACTIVATIONS = ("relu", "relu2", "gelu", "silu", "swiglu")


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


class _Layer(ctypes.Structure):
    _fields_ = _fields(
        (c_void_p, "attn_gain attn_bias ffn_gain ffn_bias qkv qkv_bias out out_bias up up_bias down down_bias"),
        (c_void_p, "keys values attn_last ffn_last"),
    )


class _Stage(ctypes.Structure):
    _fields_ = _fields(
        (c_int64, "coarsest patch_size slots layers d d_byte heads f room window slice"),
        (c_void_p, "embed pad positions project cos sin final_gain final_bias output"),
        (POINTER(_Layer), "layer"),
        (c_float, "query_multiplier branch_multiplier"),
    )


class _Model(ctypes.Structure):
    _fields_ = _fields(
        (c_int64, "rows stages seq_len vocab rms qk_norm token_shift activation final_norm"),
        (c_void_p, "unembedding ids scratch"),
        (POINTER(_Stage), "stage"),
        (c_float, "logit_multiplier"),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """native.c, built and loaded; None where that cannot be, or is not wanted."""
    loaded = compiled.library("native", "-fopenmp-simd")
    if loaded is None:
        return None
    loaded.next_byte.argtypes = [POINTER(_Model), c_int64, c_void_p]
    loaded.run.argtypes = [
        *(POINTER(_Model), c_int64, c_int64, c_int64, c_float),
        *(c_void_p, c_void_p, c_void_p),
    ]
    loaded.next_byte.restype = loaded.run.restype = None
    return loaded


def covers(model: Megabyte) -> bool:
    """Whether native.c computes this model: not the paper's extensions, kept apart documents, or other precisions."""
    return is_plain(model) and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())


class Native(Steps):
    """A decoder's model, caches and row of bytes as native.c takes them; it holds what it points to.

    Large batches are shared by torch's number of threads. A row's bits do not depend on the rows beside it.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        model: Megabyte,
        ids: Tensor,
        stages: list[Stage],
        caches: list[list[LayerCache]],
        angles: list[tuple[Tensor, Tensor] | None],
    ):
        widths = [stage.transformer.stage.d_model for stage in stages]
        super().__init__([torch.zeros((len(ids), width), dtype=torch.float32) for width in widths], caches)
        self.library, self.vocab_size = library, model.vocab_size
        self.kept: list[Tensor] = []
        self.packs: dict[int, Tensor] = {}
        count = max(1, min(torch.get_num_threads(), len(ids) // ROWS_A_THREAD))
        bounds = [len(ids) * i // count for i in range(count + 1)]
        self.parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        widest = max(_widest(stage) for stage in stages)
        self.models = []
        for part in self.parts:
            own = [self._stage(stage, part, caches[i], angles[i], self.outputs[i]) for i, stage in enumerate(stages)]
            self.models.append(self._model(model, ids[part], own, widest))
        self.pool = ThreadPoolExecutor(count) if count > 1 else None

    def step(self, n: int) -> Tensor:
        """Bring all stages from byte n - 1 to byte n, whose logits (b, v) come back."""
        logits = torch.empty((len(self.outputs[0]), self.vocab_size))
        self._each(lambda model, part: self.library.next_byte(model, n, logits[part].data_ptr()))
        return logits

    def run(self, n: int, logits: Tensor, points: Tensor, possible: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Choose the bytes from n on at points, float64 (b, m), the first by logits (b, v), and bring all stages there.

        Returns the bytes (b, m) and the logits of the byte after them. Only the first `possible` bytes come.
        """
        logits, points, m = logits.contiguous().clone(), points.contiguous(), points.shape[1]
        made = torch.empty((len(points), m), dtype=torch.int64)

        def run(model: _Model, part: slice) -> None:
            places = (each[part].data_ptr() for each in (points, logits, made))
            self.library.run(model, n, m, possible, temperature, *places)

        self._each(run)
        return made, logits

    def _each(self, call: Callable[[_Model, slice], None]) -> None:
        if self.pool is None:
            call(self.models[0], self.parts[0])
        else:
            list(self.pool.map(call, self.models, self.parts))

    def _model(self, model: Megabyte, ids: Tensor, stages: list[_Stage], widest: int) -> _Model:
        block = model.config.block
        room = max(model.vocab_size, *(stage.room for stage in stages))
        return _Model(
            rows=len(ids),
            stages=len(stages),
            seq_len=model.seq_len,
            vocab=model.vocab_size,
            rms=block.norm == "rmsnorm",
            qk_norm=block.qk_norm,
            token_shift=block.token_shift,
            activation=ACTIVATIONS.index(block.activation),
            final_norm=model.config.final_norm,
            unembedding=self._packed(model.unembedding),
            ids=self._at(ids),
            scratch=self._at(torch.zeros(len(ids) * widest + room)),
            stage=(_Stage * len(stages))(*stages),
            logit_multiplier=model.logit_multiplier,
        )

    def _stage(
        self,
        stage: Stage,
        part: slice,
        caches: list[LayerCache],
        angles: tuple[Tensor, Tensor] | None,
        output: Tensor,
    ) -> _Stage:
        own, blocks = stage.transformer.stage, [cast(Block, block) for block in stage.transformer.blocks]
        cos, sin = angles or (None, None)
        norm = stage.transformer.final_norm
        layers = [self._layer(block, part, cache) for block, cache in zip(blocks, caches, strict=True)]
        return _Stage(
            coarsest=stage.coarsest,
            patch_size=stage.patch_size,
            slots=stage.slots,
            layers=len(blocks),
            d=own.d_model,
            d_byte=stage.d_byte,
            heads=own.n_heads,
            f=own.ff_width,
            room=caches[0].keys.shape[2],
            window=own.window or 0,
            slice=0 if stage.project is None else stage.project.shape[1],
            embed=self._at(stage.embed),
            pad=self._at(stage.pad),
            positions=self._at(stage.positions),
            project=self._packed(stage.project),
            cos=self._at(cos),
            sin=self._at(sin),
            final_gain=self._at(None if norm is None else norm.gain),
            final_bias=self._at(None if norm is None else norm.bias),
            output=self._at(output[part]),
            layer=(_Layer * len(layers))(*layers),
            query_multiplier=blocks[0].attn.query_multiplier,
            branch_multiplier=blocks[0].branch_multiplier,
        )

    def _layer(self, block: Block, part: slice, cache: LayerCache) -> _Layer:
        matrices = {"qkv": block.attn.qkv, "out": block.attn.out, "up": block.ffn.up, "down": block.ffn.down}
        vectors = {f"{name}_bias": each.bias for name, each in matrices.items()}
        for name, norm in (("attn", block.attn_norm), ("ffn", block.ffn_norm)):
            vectors |= {f"{name}_gain": norm.gain, f"{name}_bias": norm.bias}
        return _Layer(
            **{name: self._packed(each.weight) for name, each in matrices.items()},
            **{name: self._at(each) for name, each in vectors.items()},
            **{name: self._at(getattr(cache, name)[part]) for name in ("keys", "values", "attn_last", "ffn_last")},
        )

    def _packed(self, weight: Tensor | None) -> int | None:
        """Where a matrix (out, k) lies in panels of 64 outputs, (out / 64, k, 64), filled up with zeros."""
        if weight is None:
            return None
        if id(weight) not in self.packs:
            filled = F.pad(weight.detach(), (0, 0, 0, -weight.shape[0] % PANEL))
            self.packs[id(weight)] = rearrange(filled, "(n w) k -> n k w", w=PANEL).contiguous()
        return self.packs[id(weight)].data_ptr()

    def _at(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()


def _widest(stage: Stage) -> int:
    """Features of one row that a block of this stage needs for a moment."""
    block = cast(Block, stage.transformer.blocks[0])
    return stage.transformer.stage.d_model + max(len(block.attn.qkv.weight), len(block.ffn.up.weight))
