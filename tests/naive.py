"""A naive MEGABYTE in float64 numpy: the test oracle, written from the paper's equations and from nothing else.

Source: Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers", arXiv 2305.07185,
figure 2 and equations 1 to 6; with two stages and ``positions=("learned", "none")`` the model below is exactly theirs.
The generalisation to S stages applies equations 4 and 5 once more for every further stage. Nothing here is fast: the
logits of byte t are computed from the bytes before t alone (``next_logits``), so that causality holds by construction.

Legend (the names in the code, and the paper's):
  x_t        byte t of the sequence; T bytes; V = ``vocab``
  s          stage, coarse to fine: 0 is the paper's global model, the last stage its local model
  P_s        ``patch_size``: bytes that make one position of stage s; P_last = 1; P_0 is the paper's P
  D_s        ``d_model``: width of stage s; D_0 is the paper's P * D_G, D_last its D_L
  d_s        D_s // P_s: width per byte; d_0 is the paper's D_G. Where P_s does not divide D_s, the features that are
             left over are zero at the input, and a parent's slices are D_{s-1} // R_s wide
  R_s        P_{s-1} / P_s: positions of stage s within one position of stage s-1 (s >= 1)
  k          position of stage 0 (a patch); r: position of stage s >= 1 within its parent position
  g_s        output of stage s's transformer (after its final norm where it has one): g_0 is g_out, g_last is l_out

Equations:
  (1) h[t]      = E_0[x_t] + Epos_0[t]                          byte_embedding; Epos_0 only where stage 0 is "learned"
  (2) in_0[0]   = pad_0;  in_0[k] = h[(k-1) P_0 : k P_0]        stage_zero_input; bytes joined end to end, width D_0
  (3) g_0       = causal transformer (in_0)                     transformer
  (4) in_s[r]   = w_s g_{s-1}[r-th of R_s slices] + (pad_s if r == 0 else E_s[bytes of position r-1 in this parent])
                                                                later_stage_input; + table_s[r] where stage s is
                                                                "learned" (the table belongs to the slot, pad included)
  (5) g_s       = causal transformer (in_s), once within every parent position; no state crosses
  (6) logits    = output_mult * E_last g_last (tied) or output_mult * U g_last

Block (pre-norm): y = y + attn(shift(norm1(y))); y = y + ffn(shift(norm2(y))); shift is the identity but under
``token_shift``. Attention: scale 1 / sqrt(d_head); rows of ``qkv`` are all of q, then k, then v, each by head;
per head QK norm, then rotary. Every matrix is stored (out, in) and is applied as ``matrix @ vector``.

Documents (``isolate_documents``; not the paper's): id 256 ends a document, the next one begins with the next patch. A
byte is predicted from its own document alone, t counted from the document's start: ``own_document``, nothing else.

The paper's extensions (section 2.3) and ablations, with what it leaves open as mbtrain chooses it:
  window       position i of stage 0 reads positions i - window + 1 to i
  cross_patch  position i of the last stage, counted in bytes of the row, also reads the cross_patch positions before
               the first of its parent, in every layer; then its rotary positions are those of the row
  conv         widths w: before Epos_0 is added, h[t] += sum over j < w of K[:, :, j] a[t - (w - 1) + j] (+ bias) for
               each w in turn, a = h at the first, relu(h) afterwards, 0 before the row; K is (d_0, d_0, w)
  without      "local": logits from norm(w_s g_{s-1}[slice]) alone; "global": no stage 0, nothing of it in (4)

Parameters (numpy float64; an absent one is None):
  params["stages"][s] = {"embed": (V, d_s), "pos": (seq_len, d_0) for s = 0, (R_s, D_s) for s >= 1, "pad": (D_s,),
                         "project": (D_s, D_{s-1} / R_s), None for s = 0, "blocks": [block, ...], "final_norm": norm,
                         "conv": [{"weight": (d_0, d_0 w), "bias": (d_0,)}, ...] for s = 0}
  block = {"norm1": norm, "qkv": (3 D, D), "qkv_bias": (3 D,), "out": (D, D), "out_bias": (D,),
           "norm2": norm, "up": (U, D), "up_bias": (U,), "down": (D, d_ff), "down_bias": (D,)}
           U = d_ff, and 2 d_ff for swiglu: the first d_ff rows are the gate
  norm = {"gain": (D,), "bias": (D,)}
  params["unembed"] = (V, D_last), None when tied
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EPS = 1e-5  # of every norm, the QK norm included
ROTARY_BASE = 10000.0
BOUNDARY = 256
NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("relu", "relu2", "gelu", "silu", "swiglu")
POSITIONS = ("learned", "rotary", "none")

Params = dict[str, Any]


@dataclass(frozen=True)
class StageSpec:
    """The shape of one stage's transformer."""

    patch_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int

    @property
    def d_byte(self) -> int:
        return self.d_model // self.patch_size

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


@dataclass(frozen=True)
class Spec:
    """The whole model; the defaults are the paper's. `token_shift` and `final_norm` take one bool or one per stage."""

    stages: tuple[StageSpec, ...]
    vocab: int = 256
    norm: str = "layernorm"
    norm_gain: bool = True
    activation: str = "relu"
    bias: bool = True
    qk_norm: bool = False
    positions: tuple[str, ...] | None = None  # one per stage; None: learned in stage 0, none in the others
    tied: bool = True
    token_shift: bool | tuple[bool, ...] = False
    final_norm: bool | tuple[bool, ...] = True
    output_mult: float = 1.0
    isolate_documents: bool = False
    window: int | None = None
    cross_patch: int = 0
    conv: tuple[int, ...] = ()
    without: str = "none"

    def __post_init__(self) -> None:
        n = len(self.stages)

        def per_stage(value: bool | Sequence[bool]) -> tuple[bool, ...]:
            return (value,) * n if isinstance(value, bool) else tuple(value)

        put = object.__setattr__  # the dataclass is frozen
        put(self, "stages", tuple(self.stages))
        put(self, "positions", ("learned",) + ("none",) * (n - 1) if self.positions is None else tuple(self.positions))
        put(self, "token_shift", per_stage(self.token_shift))
        put(self, "final_norm", per_stage(self.final_norm))
        assert n >= 1, "at least one stage"
        assert self.stages[-1].patch_size == 1, "the last stage's position is one byte"
        assert len(self.positions) == len(self.token_shift) == len(self.final_norm) == n, "one entry per stage"
        assert self.norm in NORMS
        assert self.activation in ACTIVATIONS
        assert set(self.positions) <= set(POSITIONS)
        for s, stage in enumerate(self.stages):
            assert stage.d_model % stage.n_heads == 0, f"stage {s}: D_s must be a multiple of n_heads"
            assert self.positions[s] != "rotary" or stage.d_head % 2 == 0, f"stage {s}: rotary needs an even d_head"
            assert not self.token_shift[s] or stage.d_model % 2 == 0, f"stage {s}: token shift needs an even D_s"
            if s > 0:
                assert self.stages[s - 1].patch_size % stage.patch_size == 0, f"stage {s}: P_(s-1) / P_s not whole"

    def ratio(self, s: int) -> int:
        """R_s: positions of stage s within one position of stage s-1."""
        return self.stages[s - 1].patch_size // self.stages[s].patch_size

    def crosses(self, s: int) -> bool:
        """Whether stage s reads positions of the parent before."""
        return self.cross_patch > 0 and s == len(self.stages) - 1

    def rotary(self, s: int) -> bool:
        return self.positions[s] == "rotary" or self.crosses(s)


# ---------------------------------------------------------------------------------------------- one vector at a time


def affine(matrix: np.ndarray, bias: np.ndarray | None, vector: np.ndarray) -> np.ndarray:
    result = matrix @ vector
    return result if bias is None else result + bias


def norm(vector: np.ndarray, p: Params, kind: str) -> np.ndarray:
    if kind == "layernorm":
        mean = sum(vector) / len(vector)
        centred = vector - mean
        result = centred / math.sqrt(sum(centred * centred) / len(vector) + EPS)
    else:
        result = rms_normalise(vector)
    if p["gain"] is not None:
        result = result * p["gain"]
    if p["bias"] is not None:
        result = result + p["bias"]
    return result


def rms_normalise(vector: np.ndarray) -> np.ndarray:
    return vector / math.sqrt(sum(vector * vector) / len(vector) + EPS)


def rotate(vector: np.ndarray, position: int) -> np.ndarray:
    """Rotary position of one head's q or k: dimension i is paired with i + d_head / 2."""
    d_head = len(vector)
    half = d_head // 2
    result = np.empty(d_head)
    for i in range(half):
        angle = position * ROTARY_BASE ** (-2.0 * i / d_head)
        a, b = vector[i], vector[i + half]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return result


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    exps = [math.exp(score - top) for score in scores]
    total = sum(exps)
    return [e / total for e in exps]


def silu(z: float) -> float:
    return z / (1.0 + math.exp(-z)) if z >= 0 else z * math.exp(z) / (1.0 + math.exp(z))


def activate(z: float, kind: str) -> float:
    if kind == "relu":
        return max(z, 0.0)
    if kind == "relu2":
        return max(z, 0.0) ** 2
    if kind == "gelu":
        return z * 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))
    if kind == "silu":
        return silu(z)
    raise ValueError(kind)


def ffn(vector: np.ndarray, block: Params, stage: StageSpec, kind: str) -> np.ndarray:
    up = affine(block["up"], block["up_bias"], vector)
    if kind == "swiglu":
        hidden = [silu(up[j]) * up[stage.d_ff + j] for j in range(stage.d_ff)]
    else:
        hidden = [activate(up[j], kind) for j in range(stage.d_ff)]
    return affine(block["down"], block["down_bias"], np.array(hidden))


# ------------------------------------------------------------------------ the sequence of one instance of one stage


def shift_half(ys: list[np.ndarray], slots: int) -> list[np.ndarray]:
    """Token shift: the second half of the features of position i is that of i-1, zeros at the first of `slots`."""
    result = []
    for i in range(len(ys)):
        half = len(ys[i]) // 2
        earlier = ys[i - 1][half:] if i % slots > 0 else np.zeros(len(ys[i]) - half)
        result.append(np.concatenate([ys[i][:half], earlier]))
    return result


def attention(
    ys: list[np.ndarray], block: Params, spec: Spec, s: int, first: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Causal multi-head attention: position i reads positions first[i] (0 if not given) to i of its own sequence."""
    stage = spec.stages[s]
    d, d_head = stage.d_model, stage.d_head
    qkv = [affine(block["qkv"], block["qkv_bias"], y) for y in ys]

    def head_part(i: int, which: int, head: int) -> np.ndarray:  # which: 0 is q, 1 is k, 2 is v
        start = which * d + head * d_head
        part = qkv[i][start : start + d_head]
        if which < 2 and spec.qk_norm:
            part = rms_normalise(part - part.mean())  # LayerNorm without gain
        if which < 2 and spec.rotary(s):
            part = rotate(part, i)
        return part

    joined = [np.zeros(d) for _ in ys]
    for head in range(stage.n_heads):
        q = [head_part(i, 0, head) for i in range(len(ys))]
        k = [head_part(i, 1, head) for i in range(len(ys))]
        v = [head_part(i, 2, head) for i in range(len(ys))]
        for i in range(len(ys)):
            read = range(0 if first is None else first[i], i + 1)
            weights = softmax([float(q[i] @ k[j]) / math.sqrt(d_head) for j in read])
            for weight, j in zip(weights, read, strict=True):
                joined[i][head * d_head : (head + 1) * d_head] += weight * v[j]
    return [affine(block["out"], block["out_bias"], z) for z in joined]


def transformer(
    inputs: list[np.ndarray], p: Params, spec: Spec, s: int, first: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Equations 3 and 5: stage s's causal transformer over one sequence of its inputs; `first` as in attention."""
    ys = list(inputs)
    slots = spec.ratio(s) if s > 0 else len(ys)
    for block in p["blocks"]:
        normed = [norm(y, block["norm1"], spec.norm) for y in ys]
        if spec.token_shift[s]:
            normed = shift_half(normed, slots)
        ys = [y + a for y, a in zip(ys, attention(normed, block, spec, s, first), strict=True)]
        normed = [norm(y, block["norm2"], spec.norm) for y in ys]
        if spec.token_shift[s]:
            normed = shift_half(normed, slots)
        ys = [y + ffn(n, block, spec.stages[s], spec.activation) for y, n in zip(ys, normed, strict=True)]
    if spec.final_norm[s]:
        ys = [norm(y, p["final_norm"], spec.norm) for y in ys]
    return ys


# ------------------------------------------------------------------------------------------------ inputs of the stages


def byte_embedding(t: int, prefix: Sequence[int], p: Params, spec: Spec) -> np.ndarray:
    """Equation 1."""
    h = convolved(t, prefix, p, spec, len(spec.conv))
    return h + p["pos"][t] if spec.positions[0] == "learned" else h


def convolved(t: int, prefix: Sequence[int], p: Params, spec: Spec, layers: int) -> np.ndarray:
    """Byte t's embedding after so many convolutions."""
    if layers == 0:
        return p["embed"][int(prefix[t])]
    width, layer = spec.conv[layers - 1], p["conv"][layers - 1]
    h = convolved(t, prefix, p, spec, layers - 1)
    kernel = layer["weight"].reshape(len(h), len(h), width)
    total = h if layer["bias"] is None else h + layer["bias"]
    for j in range(width):
        at = t - (width - 1) + j
        if at >= 0:
            a = convolved(at, prefix, p, spec, layers - 1)
            total = total + kernel[:, :, j] @ (a if layers == 1 else np.maximum(a, 0.0))
    return total


def concatenated(parts: list[np.ndarray], width: int) -> np.ndarray:
    """Bytes end to end, zeros for what is left over of the width."""
    joined = np.concatenate(parts)
    return np.concatenate([joined, np.zeros(width - len(joined))])


def stage_zero_input(k: int, prefix: Sequence[int], p: Params, spec: Spec) -> np.ndarray:
    """Equation 2: slot k carries patch k-1; slot 0 carries the pad, which has no position."""
    if k == 0:
        return p["pad"]
    size = spec.stages[0].patch_size
    parts = [byte_embedding(t, prefix, p, spec) for t in range((k - 1) * size, k * size)]
    return concatenated(parts, spec.stages[0].d_model)


def later_stage_input(
    r: int, start: int, parent: np.ndarray | None, prefix: Sequence[int], p: Params, spec: Spec, s: int
) -> np.ndarray:
    """Equation 4: slot r of stage s within the parent position that begins at byte `start` and has output `parent`."""
    if r == 0:
        own = p["pad"]
    else:
        size = spec.stages[s].patch_size
        parts = [p["embed"][int(prefix[t])] for t in range(start + (r - 1) * size, start + r * size)]
        own = concatenated(parts, spec.stages[s].d_model)
    result = own if parent is None else own + handed_on(r, parent, p, spec, s)
    return result + p["pos"][r] if spec.positions[s] == "learned" else result


def handed_on(r: int, parent: np.ndarray, p: Params, spec: Spec, s: int) -> np.ndarray:
    """Slot r's slice of its parent's output, through w_s."""
    width = len(parent) // spec.ratio(s)
    return p["project"] @ parent[r * width : (r + 1) * width]


# ----------------------------------------------------------------------------------------------------------- the model


def own_document(prefix: Sequence[int], spec: Spec) -> Sequence[int]:
    """What of prefix belongs to byte len(prefix)'s document: all after the last whole patch that holds a boundary."""
    size = spec.stages[0].patch_size
    start = 0
    for end in range(size, len(prefix) + 1, size):
        if BOUNDARY in prefix[end - size : end]:
            start = end
    return prefix[start:]


def next_logits(prefix: Sequence[int], params: Params, spec: Spec) -> np.ndarray:
    """The logits (V,) of byte t = len(prefix), from the bytes before it."""
    if spec.isolate_documents:
        prefix = own_document(prefix, spec)
    g = output(prefix, params, spec, len(spec.stages) - 1)
    table = params["stages"][-1]["embed"] if spec.tied else params["unembed"]
    return spec.output_mult * np.array([table[v] @ g for v in range(spec.vocab)])  # equation 6


def output(prefix: Sequence[int], params: Params, spec: Spec, s: int) -> np.ndarray | None:
    """g_s at the position that holds byte t = len(prefix), from the bytes before it; None where there is no stage s."""
    t, stage, p = len(prefix), spec.stages[s], params["stages"][s]
    if s == 0 and spec.without == "global":
        return None
    if s == 0:
        k = t // stage.patch_size
        first = None if spec.window is None else [max(0, i + 1 - spec.window) for i in range(k + 1)]
        return transformer([stage_zero_input(i, prefix, p, spec) for i in range(k + 1)], p, spec, s, first)[-1]
    size = spec.stages[s - 1].patch_size  # of the parent
    here = t // size
    if spec.without == "local":
        parent = output(prefix[: here * size], params, spec, s - 1)
        result = handed_on((t - here * size) // stage.patch_size, parent, p, spec, s)
        return norm(result, p["final_norm"], spec.norm) if spec.final_norm[s] else result
    inputs: list[np.ndarray] = []
    first = []
    for q in range(0 if spec.crosses(s) else here, here + 1):  # what the present parent reads of earlier ones: all
        start = q * size
        parent = output(prefix[:start], params, spec, s - 1)
        first_slot = len(inputs)
        for r in range(min(spec.ratio(s), (t - start) // stage.patch_size + 1)):
            inputs.append(later_stage_input(r, start, parent, prefix, p, spec, s))
            first.append(max(0, first_slot - spec.cross_patch) if spec.crosses(s) else 0)
    return transformer(inputs, p, spec, s, first)[-1]


def logits(x: Sequence[int], params: Params, spec: Spec) -> np.ndarray:
    """The logits (T, V) of every byte of x, row t from x[:t]."""
    return np.stack([next_logits(x[:t], params, spec) for t in range(len(x))])


# -------------------------------------------------------------------------------------------------- random parameters


def random_params(spec: Spec, seq_len: int, seed: int) -> Params:
    """Parameters with no special values (no zero bias, no unit gain), so that every one of them matters."""
    rng = np.random.default_rng(seed)

    def vector(n: int, wanted: bool = True) -> np.ndarray | None:
        return 0.5 * rng.standard_normal(n) if wanted else None

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)) / math.sqrt(columns)

    def norm_params(n: int) -> Params:
        gain = 1.0 + 0.3 * rng.standard_normal(n) if spec.norm_gain else None
        return {"gain": gain, "bias": vector(n, spec.bias and spec.norm == "layernorm")}

    def block_params(stage: StageSpec) -> Params:
        d, f = stage.d_model, stage.d_ff
        up = 2 * f if spec.activation == "swiglu" else f
        return {
            "norm1": norm_params(d),
            "qkv": matrix(3 * d, d),
            "qkv_bias": vector(3 * d, spec.bias),
            "out": matrix(d, d),
            "out_bias": vector(d, spec.bias),
            "norm2": norm_params(d),
            "up": matrix(up, d),
            "up_bias": vector(up, spec.bias),
            "down": matrix(d, f),
            "down_bias": vector(d, spec.bias),
        }

    stages = []
    for s, stage in enumerate(spec.stages):
        pos = project = None
        if spec.positions[s] == "learned":
            shape = (seq_len, stage.d_byte) if s == 0 else (spec.ratio(s), stage.d_model)
            pos = 0.5 * rng.standard_normal(shape)
        if s > 0:
            project = matrix(stage.d_model, spec.stages[s - 1].d_model // spec.ratio(s))
        stages.append(
            {
                "embed": 0.5 * rng.standard_normal((spec.vocab, stage.d_byte)),
                "pos": pos,
                "pad": vector(stage.d_model),
                "project": project,
                "blocks": [block_params(stage) for _ in range(stage.n_layers)],
                "final_norm": norm_params(stage.d_model) if spec.final_norm[s] else None,
                "conv": [],
            }
        )
    return {"stages": stages, "unembed": None if spec.tied else 0.5 * matrix(spec.vocab, spec.stages[-1].d_model)}
