"""The compiled form of Decoder's step of one byte: native.c, built by the machine's own C compiler where there is one.

It is the same arithmetic on the same caches, on a CPU and in fp32, for what most models are made of; `covers` says
which. The library is built once a machine (about a second), to a name that follows from source, compiler and
processor, and moved there when it is whole; without compiler, or with MBTRAIN_NATIVE=0, everything goes through torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mbtrain.model.layers import Block, LayerCache

if TYPE_CHECKING:
    from mbtrain.model.megabyte import Megabyte, Stage

SOURCE = Path(__file__).with_suffix(".c")
# Sums are reordered where the source says so, and nowhere else.
FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
PANEL = 64
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
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("MBTRAIN_NATIVE") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    loaded.next_byte.argtypes = [POINTER(_Model), c_int64, c_void_p]
    loaded.run.argtypes = [
        *(POINTER(_Model), c_int64, c_int64, c_int64, c_float),
        *(c_void_p, c_int64, c_void_p, c_void_p),
    ]
    loaded.next_byte.restype = loaded.run.restype = None
    return loaded


def _built(compiler: str) -> Path:
    """The library's path, which is whole once it exists. Raises OSError, SubprocessError."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + repr(FLAGS).encode() + version + _processor().encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbtrain"
    path = folder / f"native-{key[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as room:
            made = Path(room) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            made.replace(path)
    return path


def _processor() -> str:
    """What the instructions that -march=native may use depend on: a home directory is often several machines'."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model", "flags", "Features", "CPU "))}))


def covers(model: Megabyte) -> bool:
    """Whether native.c computes this model: not the paper's extensions, kept apart documents, or other precisions."""
    config = model.config
    plain = config.without != "local" and not (config.cross_patch or config.conv_encoder or config.isolate_documents)
    # What somebody laid over `logits` must be asked.
    own = "logits" not in vars(model)
    return plain and own and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())


def packed(weight: Tensor) -> Tensor:
    """A matrix (out, k) in panels of 64 outputs, (out / 64, k, 64), filled up with zeros."""
    filled = F.pad(weight.detach(), (0, 0, 0, -weight.shape[0] % PANEL))
    return rearrange(filled, "(n w) k -> n k w", w=PANEL).contiguous()


class Native:
    """A decoder's model, caches and row of bytes as native.c takes them; it holds what it points to."""

    def __init__(
        self,
        library: ctypes.CDLL,
        model: Megabyte,
        ids: Tensor,
        stages: list[Stage],
        caches: list[list[LayerCache]],
        angles: list[tuple[Tensor, Tensor] | None],
    ):
        self.kept: list[Any] = [ids]
        self.lasts = [(cache, cache.attn_last, cache.ffn_last) for layers in caches for cache in layers]
        self.library, self.rows = library, ids.shape[0]
        self.vocab_size = model.vocab_size
        block, first = model.config.block, cast("Any", stages[0].transformer.blocks[0])
        self.outputs = [ids.new_zeros((self.rows, s.transformer.stage.d_model), dtype=torch.float32) for s in stages]
        made = [self._stage(stage, caches[i], angles[i], self.outputs[i]) for i, stage in enumerate(stages)]
        widest = max(s.transformer.stage.d_model + max(3 * s.transformer.stage.d_model, self._up(s)) for s in stages)
        room = max(model.vocab_size, *(s.room for s in made))
        self.model = _Model(
            rows=self.rows,
            stages=len(stages),
            seq_len=model.seq_len,
            vocab=model.vocab_size,
            rms=block.norm == "rmsnorm",
            qk_norm=block.qk_norm,
            token_shift=block.token_shift,
            activation=ACTIVATIONS.index(first.ffn.activation),
            final_norm=model.config.final_norm,
            unembedding=self._at(packed(model.unembedding)),
            ids=self._at(ids),
            scratch=self._at(torch.zeros(self.rows * widest + room)),
            stage=(_Stage * len(made))(*made),
            logit_multiplier=model.logit_multiplier,
        )

    def step(self, n: int) -> Tensor:
        """Bring all stages from byte n - 1 to byte n, whose logits (b, v) come back."""
        logits = torch.empty((self.rows, self.vocab_size))
        self.library.next_byte(self.model, n, logits.data_ptr())
        return logits

    def run(self, n: int, logits: Tensor, points: Tensor, possible: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Choose the bytes from n on at points, float64 (b, m), the first by logits (b, v), and bring all stages there.

        Returns the bytes (b, m) and the logits of the byte after them. Only the first `possible` bytes come.
        """
        logits = logits.contiguous().clone()
        made = torch.empty(points.shape, dtype=torch.int64)
        assert points.stride(1) == 1
        self.library.run(
            *(self.model, n, points.shape[1], possible, temperature),
            *(points.data_ptr(), points.stride(0), logits.data_ptr(), made.data_ptr()),
        )
        return made, logits

    def take(self, outputs: list[Tensor | None]) -> None:
        """Go on from where torch has brought the stages: their outputs, and what caches keep for token shift."""
        for own, output in zip(self.outputs, outputs, strict=True):
            if output is not None:
                own.copy_(output)
        for cache, attn_last, ffn_last in self.lasts:
            cache.attn_last = attn_last.copy_(cache.attn_last)
            cache.ffn_last = ffn_last.copy_(cache.ffn_last)

    def _stage(
        self, stage: Stage, caches: list[LayerCache], angles: tuple[Tensor, Tensor] | None, output: Tensor
    ) -> _Stage:
        own = stage.transformer.stage
        blocks = [cast(Block, block) for block in stage.transformer.blocks]
        project, norm = stage.project, stage.transformer.final_norm
        layers = [self._layer(block, cache) for block, cache in zip(blocks, caches, strict=True)]
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
            slice=0 if project is None else project.shape[1],
            embed=self._at(stage.embed),
            pad=self._at(stage.pad),
            positions=self._at(stage.positions),
            project=self._at(None if project is None else packed(project)),
            cos=self._at(None if angles is None else angles[0]),
            sin=self._at(None if angles is None else angles[1]),
            final_gain=self._at(None if norm is None else norm.gain),
            final_bias=self._at(None if norm is None else norm.bias),
            output=self._at(output),
            layer=(_Layer * len(layers))(*layers),
            query_multiplier=blocks[0].attn.query_multiplier,
            branch_multiplier=blocks[0].branch_multiplier,
        )

    def _layer(self, block: Block, cache: LayerCache) -> _Layer:
        matrices = {"qkv": block.attn.qkv, "out": block.attn.out, "up": block.ffn.up, "down": block.ffn.down}
        norms = {"attn": block.attn_norm, "ffn": block.ffn_norm}
        parts: dict[str, Tensor | None] = {name: packed(each.weight) for name, each in matrices.items()}
        parts |= {f"{name}_bias": each.bias for name, each in matrices.items()}
        parts |= {f"{name}_gain": each.gain for name, each in norms.items()}
        parts |= {f"{name}_bias": each.bias for name, each in norms.items()}
        parts |= {name: getattr(cache, name) for name in ("keys", "values", "attn_last", "ffn_last")}
        return _Layer(**{name: self._at(each) for name, each in parts.items()})

    def _at(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    @staticmethod
    def _up(stage: Stage) -> int:
        return cast(Block, stage.transformer.blocks[0]).ffn.up.weight.shape[0]
