"""Typed, frozen, validated configuration. Values come from defaults < preset < YAML file < --dotted.overrides.

    config = load("configs/quickstart.yaml", {"optim.lr": "3e-4", "model.stages.0.d_model": "512"})

Overrides arrive as raw strings and are coerced by the type of their field, so `--name=007` stays "007". Every error
is one ConfigError line: dotted path, value, and what is allowed. Nothing is mutated after validation; what follows
from other values (vocabulary, accumulation steps) is a function here, not a field.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from mbtrain import vocab
from mbtrain.errors import ConfigError
from mbtrain.redact import without_password

# Rows of so many bytes are computed in chunks of so many, where train.chunk_bytes does not say otherwise.
LONG_ROW_BYTES = 2**18
CHUNK_BYTES = 2**15

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read true as the number 1.
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("a value that is neither true nor false")
        return value


class StageConfig(_Section):
    """One transformer of the hierarchy. Widths are in features, patch_size in bytes.

    patch_size  bytes that make one position of this stage: 8 for the paper's global model with P = 8; 1 for the last
    d_model     width; a stage's bytes are embedded d_model // patch_size wide and concatenated (paper, eq. 2). What
                the division leaves over stays empty at the input and is not handed to the finer stage
    d_ff        width of the feed-forward layer; None means 4 * d_model
    window      of the coarsest stage: a position looks at so many positions, its own included; None: at all before it
    base_*      model.parametrization=mup: the stage in which lr, init and the like were tuned, whose width, depth and
                width per head this one's are measured by (model/mup.py); None: as here. sp: not looked at
    """

    patch_size: Positive
    d_model: Positive
    n_layers: Positive
    n_heads: Positive
    d_ff: Positive | None = None
    window: Positive | None = None
    base_d_model: Positive | None = None
    base_n_layers: Positive | None = None
    base_d_head: Positive | None = None

    @property
    def d_byte(self) -> int:
        """Features of one byte of a position."""
        return self.d_model // self.patch_size

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def ff_width(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff


class BlockConfig(_Section):
    """What a transformer block is made of; the same in all stages.

    norm_gain    whether norms have a trainable gain (and, with `bias`, LayerNorm a trainable shift)
    qk_norm      LayerNorm without gain on queries and keys per head, before rotary (RMSNorm is 8 times slower on CPU)
    token_shift  before each branch the second half of the features is that of the position before (in one patch)
    dropout      on attention weights and on both branches; never on embeddings (paper, appendix A.2)
    """

    norm: Literal["layernorm", "rmsnorm"]
    norm_gain: bool
    activation: Literal["relu", "relu2", "gelu", "silu", "swiglu"]
    bias: bool
    qk_norm: bool
    token_shift: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]


class BaseStage(NamedTuple):
    """The shapes of a stage at its base: what muP measures a stage by."""

    d_model: int
    d_byte: int
    ff_width: int
    d_head: int
    n_layers: int


class MupConfig(_Section):
    """Switches of model.parametrization=mup (model/mup.py has the rules). All factors are 1 at base.

    embedding_lr_power  e: LRs of tables and pads fall as width ** -e; 0 is muP, 1/2 what u-muP does
    readout             (a, b, c): logits are multiplied by width ** -a, the readout's init falls as ** -b, its LR as
                        ** -c. a + b = a + c = 1 is muP; (1/2, 0, 1/2) has logits as large at the start as at base
    attention_power     q k is divided by width per head ** this: 1 is muP, 1/2 the usual
    depth_power         alpha: branches are multiplied by depth ** -alpha, LRs in blocks by depth ** (alpha - 1)
                        (CompleteP, arXiv 2505.01618: 1)
    decay               rescaled: LR times weight decay is as at base; coupled: weight decay is as at base, and a
                        smaller LR decays less
    eps                 Adam's eps falls with the gradients
    """

    embedding_lr_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    readout: tuple[float, float, float] = (1.0, 0.0, 0.0)
    attention_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    depth_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    decay: Literal["rescaled", "coupled"] = "rescaled"
    eps: bool = True


class InitConfig(_Section):
    """How weights begin.

    scheme     truncated: every matrix and table ~ N(0, std), cut at two std (paper, A.2);
               fan_in: matrices ~ N(0, 1/fan_in), tables ~ N(0, embed_std), readout scaled so that logits begin small
    residual   scaled: the output matrices of both branches are divided by sqrt(2 n_layers); plain: they are not
    """

    scheme: Literal["truncated", "fan_in"]
    std: Annotated[float, Field(gt=0)]
    embed_std: Annotated[float, Field(gt=0)]
    residual: Literal["plain", "scaled"]


# What the paper states (sections 2.1 and A.2), and for what it leaves open:
#   biases: metaseq's default, on.  positions: learned, per byte before the patches are made (eq. 1).
#   local positions: learned, one per slot; the authors said on OpenReview that they are used.
#   residual init: the paper does not say; metaseq divides by sqrt(2 n_layers), but the text says one std for all.
_PAPER: dict[str, Any] = {
    "positions": "learned",
    "local_positions": "learned",
    "tied": True,
    "final_norm": True,
    "block": {
        "norm": "layernorm",
        "norm_gain": True,
        "activation": "relu",
        "bias": True,
        "qk_norm": False,
        "token_shift": False,
        "dropout": 0.1,
    },
    "init": {"scheme": "truncated", "std": 0.006, "embed_std": 0.006, "residual": "plain"},
}

# The best small recipe found by bits per byte at equal time; every row of the search is in docs/recipe.md.
_MODERN: dict[str, Any] = {
    "positions": "rotary",
    "local_positions": "learned",
    "tied": False,
    "final_norm": True,
    "block": {
        "norm": "layernorm",
        "norm_gain": True,
        "activation": "relu2",
        "bias": False,
        "qk_norm": True,
        "token_shift": False,
        "dropout": 0.0,
    },
    "init": {"scheme": "fan_in", "std": 0.02, "embed_std": 0.3, "residual": "scaled"},
}

PRESETS = {"paper": _PAPER, "modern": _MODERN}


class ModelConfig(_Section):
    """The model: stages from coarse to fine, and what the paper leaves open as named choices.

    kind               megabyte; or a rival of it, with one stage of patch_size 1: transformer (bytes, with or without
                       stages.0.window), perceiver_ar (the last `latents` positions look at the whole row), subword (a
                       transformer of tokens, whose rows are the same bytes)
    latents            perceiver_ar: positions that are computed and predicted at a time
    vocabulary         subword: the file that `mbtrain-prep vocabulary` wrote; vocabulary_size: its number of tokens;
                       vocabulary_sha256: of that file, which a run notes when it copies it
    patching           fixed; or space: patches end after words (SpaceByte's rule), stages.0.patch_size is the longest
    without            none; or the paper's ablations: local (each byte of a patch from the global model alone), global
                       (the local model alone, in patches of stages.0.patch_size)
    conv_encoder       widths of causal convolutions over the coarsest stage's bytes before its patches are made; the
                       paper's: [3, 5, 7]
    cross_patch        the last stage's positions also look at so many positions of the patch before, in every layer
    parametrization    sp: init, LR and so on are what they say, at any width; mup: what they say at the stages' base_*,
                       and elsewhere follow from it so that the best values stay the best; mup: its switches
    preset             paper | modern: fills every key below that is not given
    positions          of the coarsest stage: learned (a table of seq_len rows, per byte: eq. 1), rotary, none
    local_positions    of the finer stages: learned (one row per slot in the patch), rotary, none
    tied               logits by the last stage's byte embedding (eq. 6), or by a matrix of their own
    final_norm         a norm after the last block of each stage, as pre-norm models have
    isolate_documents  packed documents do not see each other: the coarsest stage attends within one document, whose
                       first patch follows the pad, and learned positions count from its start. Documents then begin
                       at patches: after a boundary the patch is filled up, unscored. Fits both presets; needs
                       data.boundary. false: a document sees those before it in its row
    """

    kind: Literal["megabyte", "transformer", "perceiver_ar", "subword"] = "megabyte"
    latents: Positive | None = None
    vocabulary: str | None = None
    vocabulary_size: Positive | None = None
    vocabulary_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    patching: Literal["fixed", "space"] = "fixed"
    without: Literal["none", "local", "global"] = "none"
    conv_encoder: tuple[Positive, ...] = ()
    cross_patch: Annotated[int, Field(ge=0)] = 0
    parametrization: Literal["sp", "mup"] = "sp"
    mup: MupConfig = MupConfig()
    preset: Literal["paper", "modern"] = "modern"
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    positions: Literal["learned", "rotary", "none"]
    local_positions: Literal["learned", "rotary", "none"]
    tied: bool
    final_norm: bool
    isolate_documents: bool = False
    block: BlockConfig
    init: InitConfig

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = PRESETS.get(str(given.get("preset", "modern")))
        return given if preset is None else _merged(preset, given)

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        for i, stage in enumerate(self.stages):
            where = f"model.stages.{i}"
            if stage.d_model % stage.n_heads:
                _fail(f"{where}.n_heads", stage.n_heads, f"a divisor of d_model = {stage.d_model}")
            rotary = self._positions_of(i) == "rotary" or (self.cross_patch > 0 and i + 1 == len(self.stages))
            if rotary and stage.d_head % 2:
                _fail(f"{where}.n_heads", stage.n_heads, f"an even width per head for rotary, not {stage.d_head}")
            if stage.d_model < stage.patch_size:
                allowed = f"at least patch_size = {stage.patch_size} (bytes are embedded d_model // patch_size wide)"
                _fail(f"{where}.d_model", stage.d_model, allowed)
            if stage.base_d_model is not None:
                _base_fits(stage, where)
            if stage.window is not None and i:
                _fail(f"{where}.window", stage.window, "None: finer stages look no further than their patch")
            if i + 1 < len(self.stages):
                finer = self.stages[i + 1].patch_size
                if stage.patch_size <= finer or stage.patch_size % finer:
                    allowed = f"a larger multiple of the next stage's {finer} (stages go from coarse to fine)"
                    _fail(f"{where}.patch_size", stage.patch_size, allowed)
                ratio = stage.patch_size // finer
                if stage.d_model < ratio:
                    allowed = f"at least {ratio}, the positions of stage {i + 1} in one of stage {i}"
                    _fail(f"{where}.d_model", stage.d_model, allowed)
        if self.stages[-1].patch_size != 1:
            _fail(f"model.stages.{len(self.stages) - 1}.patch_size", self.stages[-1].patch_size, "1: it predicts bytes")
        if self.parametrization == "mup" and self.tied and self.mup.embedding_lr_power:
            allowed = "0 with model.tied: the table also gives the logits, whose LR is constant"
            _fail("model.mup.embedding_lr_power", self.mup.embedding_lr_power, allowed)
        self._kind_fits()
        return self

    def base(self, stage: int) -> BaseStage:
        """What a stage is measured by: its base under mup, itself under sp, so that all ratios are 1."""
        own = self.stages[stage]
        if self.parametrization == "sp":
            return BaseStage(own.d_model, own.d_byte, own.ff_width, own.d_head, own.n_layers)
        d = own.base_d_model or own.d_model
        ff_width = own.ff_width * d // own.d_model
        layers = own.base_n_layers or own.n_layers
        return BaseStage(d, d // own.patch_size, ff_width, own.base_d_head or own.d_head, layers)

    def _kind_fits(self) -> None:
        """What belongs to one kind of model stands in no other."""
        if self.kind != "megabyte" and len(self.stages) > 1:
            _fail("model.stages", f"{len(self.stages)} of them", f"one, of patch_size 1, for model.kind={self.kind}")
        if (self.kind == "perceiver_ar") != (self.latents is not None):
            _fail("model.latents", self.latents, "a number for model.kind=perceiver_ar, and None for all others")
        if self.kind == "perceiver_ar" and self.stages[0].window is not None:
            _fail("model.stages.0.window", self.stages[0].window, "None: perceiver_ar has latents for it")
        if self.latents is not None and self.latents % 2:
            _fail("model.latents", self.latents, "an even number: the row is scored in strides of half of it")
        subword = self.kind == "subword"
        if subword != (self.vocabulary is not None) or subword != (self.vocabulary_size is not None):
            got = f"{self.vocabulary}, {self.vocabulary_size}"
            _fail("model.vocabulary, model.vocabulary_size", got, "both for model.kind=subword, neither for all others")
        if not subword and self.vocabulary_sha256 is not None:
            _fail("model.vocabulary_sha256", self.vocabulary_sha256, "None where there is no model.vocabulary")
        plain = {"patching": "fixed", "without": "none", "conv_encoder": (), "cross_patch": 0}
        special = [name for name, usual in plain.items() if getattr(self, name) != usual]
        if special and (self.kind != "megabyte" or len(self.stages) < 2):
            value = getattr(self, special[0])
            _fail(f"model.{special[0]}", value, "it only with model.kind=megabyte, of two stages or more")
        if self.without != "none" and len(self.stages) != 2:
            _fail("model.without", self.without, "none, or two stages: a global model and a local one")
        if self.without == "local" and self.cross_patch:
            _fail("model.cross_patch", self.cross_patch, "0 with model.without=local: there is no local model")
        if self.without == "global" and self.conv_encoder:
            _fail("model.conv_encoder", list(self.conv_encoder), "none with model.without=global: it is a part of it")
        if self.patching == "space" and (len(self.stages) != 2 or self.without != "none" or self.conv_encoder):
            _fail("model.patching", "space", "fixed, or two stages without conv_encoder and without=none")
        if len(self.stages) > 1 and self.cross_patch > self.stages[-2].patch_size:
            _fail("model.cross_patch", self.cross_patch, f"at most {self.stages[-2].patch_size}, the patch's positions")
        if self.isolate_documents and not self.is_plain:
            what = special[0] if special else "stages.0.window" if self.stages[0].window else f"kind={self.kind}"
            _fail("model.isolate_documents", True, f"false with model.{what}, which does not keep documents apart")
        if self.block.token_shift and (set(special) - {"cross_patch"} or self.kind == "perceiver_ar"):
            _fail("model.block.token_shift", True, "false for this model.kind and these options")

    @property
    def is_plain(self) -> bool:
        """Whether ranks can share the rows of this model (train.sequence_parallel), and documents be kept apart."""
        plain = self.patching == "fixed" and self.without == "none" and not self.conv_encoder and not self.cross_patch
        return self.kind in ("megabyte", "transformer") and plain and self.stages[0].window is None

    @property
    def in_chunks(self) -> bool:
        """Whether what follows the coarsest stage can be computed for some patches at a time (train.chunk_bytes)."""
        return self.kind in ("megabyte", "transformer") and self.patching == "fixed"

    def _positions_of(self, stage: int) -> str:
        return self.positions if stage == 0 else self.local_positions


class SourceConfig(_Section):
    """One data set of a mixture.

    path      a directory made by mbtrain-prep
    name      in metrics and messages; None: the directory's name
    weight    its share of the bytes that are trained on, relative to the other sources' weights; None: by its size,
              see data.temperature
    epochs    it is read at most so often, then the others share its part; None: without end
    schedule  [[bytes, weight], ...] instead of weight: the weight that holds from so many bytes of rows on
    """

    path: str
    name: SourceName | None = None
    weight: Annotated[float, Field(ge=0)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    schedule: tuple[tuple[Annotated[int, Field(ge=0, le=2**53)], Annotated[float, Field(ge=0)]], ...] = ()

    @model_validator(mode="after")
    def _one_way_to_weigh(self) -> SourceConfig:
        starts = [start for start, _ in self.schedule]
        if self.schedule and (self.weight is not None or starts[0] != 0 or starts != sorted(set(starts))):
            _fail(
                f"data.sources, {self.path}: schedule",
                list(self.schedule),
                "[[0, weight], [bytes, weight], ...] with rising bytes, and no weight beside it",
            )
        return self

    @property
    def label(self) -> str:
        return self.name or re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(self.path).resolve().name).strip("._-") or "data"


class DataConfig(_Section):
    """Where bytes come from and how rows are cut.

    path         a directory made by mbtrain-prep; or, for a mixture of several:
    sources      a list of {path, weight, ...}, see SourceConfig
    temperature  of sources without a weight: they weigh bytes ** (1 / temperature). 1: as large as they are; higher:
                 small ones more
    seq_len      T, bytes (and boundaries) in a row; a multiple of the coarsest patch_size
    rows         packed: samples one after the other, cut every T; aligned: the same, each sample beginning at a patch
                 (as model.isolate_documents needs); sample: one sample a row, a longer one in several rows, what is
                 left of a row masked; auto: sample for images and audio, for text packed (aligned where needed)
    scan         order of an image's pixels in a row: patch (p x p x 3 blocks, p = sqrt(P / 3), stage in stage), raster
    boundary     put id 256 after every document of text; false for pieces of one long file, for images and for audio
    check        what is compared with the manifest before training: size, full: every file's hash too, or auto: full
                 up to 16 GiB a split
    """

    path: str | None = None
    sources: tuple[SourceConfig, ...] = ()
    temperature: Annotated[float, Field(ge=0.1)] = 1.0
    seq_len: Positive = 1024
    rows: Literal["auto", "packed", "aligned", "sample"] = "auto"
    scan: Literal["patch", "raster"] = "patch"
    boundary: bool = True
    train_split: str = "train"
    val_split: str = "val"
    check: Literal["auto", "size", "full"] = "auto"

    @model_validator(mode="after")
    def _some_data(self) -> DataConfig:
        if (self.path is None) == (not self.sources):
            got = "both" if self.sources else "neither"
            _fail("data.path, data.sources", got, "one of them: a directory made by mbtrain-prep, or a list of sources")
        labels = [source.label for source in self.mixture]
        if twice := [label for label in labels if labels.count(label) > 1]:
            _fail("data.sources", f"two named {twice[0]!r}", "names that differ; give each a name")
        return self

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources; a single path is a mixture of one."""
        return self.sources or (SourceConfig(path=self.path or ""),)


class TrainConfig(_Section):
    """How much to train on and how. The first limit that is reached ends the run; at least one is needed.

    steps, bytes, flops, minutes  limits, over the whole run, resumed parts included; minutes are of training time
    global_batch_size             rows in an optimizer step, over all ranks
    micro_batch_size              most rows on one rank at a time; None: global_batch_size / ranks
    gradient_clipping             largest global norm; 0 turns clipping off
    zero_stage                    DeepSpeed's ZeRO: 0 nothing, 1 optimizer, 2 gradients, 3 weights are partitioned
    precision                     fp32; bf16: DeepSpeed's bf16 weights with fp32 masters and fp32 accumulation (at
                                  stage 0: fp32 weights under autocast); autocast: fp32 weights, bf16 products; fp16
    activation_checkpointing      recompute each block in the backward pass: less memory, a third more work
    chunk_bytes                   finer stages, logits and loss of so many bytes of a micro-batch at a time, recomputed
                                  in the backward pass: a row's logits are never there at once. None: rows (or a rank's
                                  part of them) of 256 KiB or more in chunks of 32 KiB, shorter ones whole. As many as
                                  a row has: whole
    compile                       torch.compile the blocks. None: on a GPU, where rows always have the same shapes and
                                  ZeRO leaves weights whole; not on CPU, where it gained 5 % for a minute and a half
    sequence_parallel             ranks that share each row, every one with its own patches: activations a rank fall in
                                  proportion. The coarsest stage exchanges heads for positions (Ulysses)
    lost_after_s                  a rank that has given no sign of life for so long is lost, and all others stop
    """

    steps: Positive | None = None
    bytes: Positive | None = None
    flops: Annotated[float, Field(gt=0)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    global_batch_size: Positive = 16
    micro_batch_size: Positive | None = None
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    precision: Literal["fp32", "bf16", "autocast", "fp16"] = "bf16"
    activation_checkpointing: bool = False
    chunk_bytes: Positive | None = None
    compile: bool | None = None
    sequence_parallel: Positive = 1
    lost_after_s: Annotated[float, Field(ge=5)] = 60.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _some_limit(self) -> TrainConfig:
        if self.steps is None and self.bytes is None and self.flops is None and self.minutes is None:
            _fail("train.steps", None, "a limit: one of train.steps, train.bytes, train.flops, train.minutes")
        if self.precision == "fp16" and self.zero_stage == 0:
            # DeepSpeed has another optimizer there, whose losses differ from those of the other stages.
            _fail("train.zero_stage", 0, "1, 2 or 3 with train.precision=fp16")
        return self


class OptimConfig(_Section):
    """The optimizer and its schedule. Defaults are the paper's (section 2.1).

    name             adamw; muon: orthogonal updates of the matrices in blocks and between stages, AdamW for the rest;
                     normuon: the same with even rows; schedule_free: AdamW that averages in place of a falling
                     schedule, with schedule=constant. docs/optimizers.md has what they gave
    muon_lr          muon, normuon: LR of those matrices as a factor on lr; an update's spectral norm is muon_lr * lr *
                     sqrt(rows / columns), at every width
    muon_momentum    muon, normuon: of those matrices, Nesterov's
    schedule         polynomial (power 1: linear), cosine, or wsd: warm-up, stable, then decay over the last part
    warmup_steps     steps of linear warm-up from 0
    final_lr_ratio   the last LR as a share of lr
    decay_share      wsd: the last share of the run in which the LR falls linearly
    embedding_lr     factor on lr for byte embeddings, positions and pads
    decay_all        weight decay also on gains, biases, embeddings, positions and pads
    ema              average the weights over updates, and evaluate, sample and export the average: half of it lies on
                     so large a last part of the updates so far, as 0.1. val/last_bpb is of the last weights
    batch_rule       how lr follows train.global_batch_size: none; sqrt or linear: lr holds at batch_base rows, and is
                     multiplied by the square root of global_batch_size / batch_base, or by that ratio (optim/lr shows
                     the product)
    """

    lr: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    schedule: Literal["polynomial", "cosine", "wsd", "constant"] = "polynomial"
    power: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    final_lr_ratio: Fraction = 0.0
    decay_share: Fraction = 0.2
    embedding_lr: Annotated[float, Field(gt=0)] = 1.0
    decay_all: bool = False
    name: Literal["adamw", "muon", "normuon", "schedule_free"] = "adamw"
    muon_lr: Annotated[float, Field(gt=0)] = 4.0
    muon_momentum: Beta = 0.95
    ema: Annotated[float, Field(gt=0, le=0.5)] | None = None
    batch_rule: Literal["none", "sqrt", "linear"] = "none"
    batch_base: Positive | None = None

    @model_validator(mode="after")
    def _averages_once(self) -> OptimConfig:
        if self.ema is not None and self.name == "schedule_free":
            _fail("optim.ema", self.ema, "None with optim.name=schedule_free, which averages by itself")
        if self.name == "schedule_free" and self.schedule != "constant":
            _fail("optim.schedule", self.schedule, "constant with optim.name=schedule_free: it averages in its place")
        return self

    @property
    def averages(self) -> bool:
        """Whether other weights are evaluated than those that are trained."""
        return self.ema is not None or self.name == "schedule_free"

    @model_validator(mode="after")
    def _rule_has_its_base(self) -> OptimConfig:
        if self.batch_rule != "none" and self.batch_base is None:
            _fail("optim.batch_base", None, f"the rows at which optim.lr holds, for optim.batch_rule={self.batch_rule}")
        return self


class EvalConfig(_Section):
    """Validation while training. The whole split is always scored at the end.

    every_steps   None: only at the end
    limit_bytes   score only the first bytes of the split in between, logged as val/partial_bpb; None: all, val/bpb
    batch_size    rows on one rank at a time; None: the training micro-batch
    """

    every_steps: Positive | None = None
    limit_bytes: Positive | None = None
    batch_size: Positive | None = None


class CheckpointConfig(_Section):
    """When to save. A checkpoint is also written at the end and at SIGTERM.

    keep_last          so many newest checkpoints stay; older ones are removed after a newer one is whole
    keep_every_steps   those of every so many steps stay for good
    """

    every_steps: Positive | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 15.0
    keep_last: Positive = 2
    keep_every_steps: Positive | None = None


class GuardConfig(_Section):
    """What happens at a bad step: a loss or gradient that is not finite, or a loss that spikes.

    policy   stop: all ranks end before the update; skip: no update, the batch is stepped over; rewind: weights and
             moments of the last good checkpoint are put back and the data since then is stepped over
    spike    a loss further above the mean of the last `window` losses than so many of their standard deviations is
             bad; None: only one that is not finite
    window   losses that the mean and deviation are of; before half of them are there, no loss counts as a spike
    limit    after so many bad steps within the last `window` steps the run stops, whatever the policy
    """

    policy: Literal["stop", "skip", "rewind"] = "stop"
    spike: Annotated[float, Field(gt=0)] | None = None
    window: Annotated[int, Field(ge=4)] = 64
    limit: Positive = 5


class SampleConfig(_Section):
    """Samples written (and sent to MLflow) while training and at the end: .txt, .png and .wav.

    at_end        write them at the end; in a sweep false unless it is given
    source        as which of the data sources; None: the first one of each modality
    prompt        a text that is continued
    prompt_file   a file that is continued: a text, a picture or a sound
    prompt_bytes  so much of it is given: a number of its canonical bytes or a share, as in 50%; None: all of a text,
                  half of an image, the first second of audio
    bytes         most bytes of each; None: 256 of text, the rest of one image, 2 seconds of audio
    count         None: 1 of text, 4 of images (one grid), 1 of audio
    """

    every_steps: Positive | None = None
    at_end: bool = True
    source: str | None = None
    prompt: str = ""
    prompt_file: str | None = None
    prompt_bytes: Annotated[str, Field(pattern=r"^\d+(\.\d+)?%?$", coerce_numbers_to_str=True)] | None = None
    bytes: Positive | None = None
    count: Positive | None = None
    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95

    @model_validator(mode="after")
    def _one_prompt(self) -> SampleConfig:
        if self.prompt and self.prompt_file:
            _fail("sample.prompt_file", self.prompt_file, "nothing beside sample.prompt")
        return self


class LogConfig(_Section):
    """Logging. mlflow_uri: None means MLFLOW_TRACKING_URI, else sqlite under mlruns/ of the working directory.

    parent       the run of the experiment below which MLflow shows this one, as one of a sweep; made if it is not there
    noise_scale  log optim/noise_scale, the gradient noise scale in rows (of data.seq_len bytes; noise_scale.py): the
                 batch size at which a larger one stops to pay. From the gradients of a step's micro-batches, so a step
                 needs two or more, on one rank or over ranks
    """

    every_steps: Positive = 10
    mlflow: bool = True
    mlflow_uri: str | None = None
    experiment: str = "mbtrain"
    parent: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    noise_scale: bool = False

    @model_validator(mode="after")
    def _no_password(self) -> LogConfig:
        # The configuration goes into the run directory, and to MLflow as parameters.
        if self.mlflow_uri and without_password(self.mlflow_uri) != self.mlflow_uri:
            raise ConfigError(
                f"log.mlflow_uri: {without_password(self.mlflow_uri)} has a password or token in it; give it in the "
                "environment: MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self


class Config(_Section):
    """A whole experiment; `name` names the run directory runs/<name>."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    sample: SampleConfig = SampleConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _rows_fit(self) -> Config:
        coarsest = self.model.stages[0].patch_size
        if self.data.seq_len % coarsest:
            _fail("data.seq_len", self.data.seq_len, f"a multiple of model.stages.0.patch_size = {coarsest}")
        if self.model.isolate_documents and not self.data.boundary:
            _fail("model.isolate_documents", True, "false where data.boundary is false: no id says where documents end")
        sequence = self.train.sequence_parallel
        if coarsest * sequence > self.data.seq_len or (self.data.seq_len // coarsest) % sequence:
            allowed = f"a divisor of the row's patches, {self.data.seq_len // coarsest}"
            _fail("train.sequence_parallel", sequence, allowed)
        if self.model.stages[0].n_heads % sequence:
            allowed = f"a divisor of model.stages.0.n_heads = {self.model.stages[0].n_heads}"
            _fail("train.sequence_parallel", sequence, allowed)
        if sequence > 1 and self.model.block.token_shift:
            _fail(
                "train.sequence_parallel", sequence, "1 with model.block.token_shift, which looks at the patch before"
            )
        if self.log.noise_scale and (sequence > 1 or self.train.precision == "fp16"):
            what = f"sequence_parallel={sequence}" if sequence > 1 else "precision=fp16"
            _fail("log.noise_scale", True, f"false with train.{what}: no rank has a row's whole gradient as it is")
        if sequence > 1 and not self.model.is_plain:
            _fail("train.sequence_parallel", sequence, "1 for this model.kind and these options of it")
        if self.train.chunk_bytes is not None and not self.model.in_chunks:
            _fail("train.chunk_bytes", self.train.chunk_bytes, "None for this model.kind and model.patching")
        latents = self.model.latents
        if latents is not None and (self.data.seq_len < latents or self.data.seq_len % (latents // 2)):
            _fail(
                "data.seq_len", self.data.seq_len, f"a multiple of model.latents / 2 = {latents // 2}, latents or more"
            )
        micro = self.train.micro_batch_size
        if micro is not None and self.train.global_batch_size % micro:
            allowed = f"a divisor of train.global_batch_size = {self.train.global_batch_size}"
            _fail("train.micro_batch_size", micro, allowed)
        return self

    @property
    def vocab_size(self) -> int:
        return vocab.vocab_size(self.data.boundary)


def source_paths(config: Config) -> list[tuple[str, str]]:
    """(name, path) of each data set that a run reads."""
    return [(source.label, source.path) for source in config.data.mixture]


def batch_shape(config: Config, world_size: int) -> tuple[int, int]:
    """(micro_batch_size, gradient_accumulation_steps) on so many ranks.

    Ranks that share their rows (train.sequence_parallel) count as one here.
    Raises ConfigError when the global batch cannot be cut evenly: a silently different batch is another experiment.
    """
    rows, sequence = config.train.global_batch_size, config.train.sequence_parallel
    if world_size % sequence:
        _fail("train.sequence_parallel", sequence, f"a divisor of the number of ranks, {world_size}")
    readers = world_size // sequence
    if rows % readers:
        what = "ranks" if sequence == 1 else f"groups of {sequence} ranks"
        _fail("train.global_batch_size", rows, f"a multiple of the number of {what}, {readers}")
    per_rank = rows // readers
    micro = min(config.train.micro_batch_size or per_rank, per_rank)
    if per_rank % micro:
        allowed = f"a divisor of global_batch_size / ranks = {rows} / {readers} = {per_rank}"
        _fail("train.micro_batch_size", micro, allowed)
    if config.log.noise_scale and micro == rows:
        allowed = f"below {rows}, or two ranks, with log.noise_scale: it compares the micro-batches of a step"
        _fail("train.micro_batch_size", micro, allowed)
    return micro, per_rank // micro


def chunk_bytes(config: Config) -> int | None:
    """Bytes of a micro-batch that a model computes at a time behind its coarsest stage; None: all of them."""
    row = config.data.seq_len // config.train.sequence_parallel
    asked = config.train.chunk_bytes
    if not config.model.in_chunks or row <= (asked or 0) or (asked is None and row < LONG_ROW_BYTES):
        return None
    return asked or CHUNK_BYTES


def step_limit(config: Config, flops_per_byte: float) -> int | None:
    """Optimizer steps at which the steps, bytes or FLOPs limit ends the run; None when only minutes do.

    flops_per_byte: training FLOPs per byte of a row (three times the forward pass).
    """
    row_bytes = config.train.global_batch_size * config.data.seq_len
    limits = []
    if config.train.steps is not None:
        limits.append(config.train.steps)
    if config.train.bytes is not None:
        limits.append(math.ceil(config.train.bytes / row_bytes))
    if config.train.flops is not None:
        limits.append(math.ceil(config.train.flops / (row_bytes * flops_per_byte)))
    return min(limits) if limits else None


def load(path: str | Path, overrides: Mapping[str, str] | None = None) -> Config:
    """Read a YAML file, lay dotted overrides (raw strings) over it, validate. Raises ConfigError."""
    return resolved(read(path), overrides or {}, Path(path).parent)


def read(path: str | Path) -> dict[str, Any]:
    """The sections of a YAML file as they stand there. Raises ConfigError."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config ({error.strerror}); see configs/ for examples") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of sections (model, data, train, ...), got {type(tree).__name__}"
        )
    return tree


def resolved(tree: Mapping[str, Any], overrides: Mapping[str, str], folder: Path) -> Config:
    """What `load` makes of a file in `folder` that has this tree, which stays as it is. Raises ConfigError."""
    own = copy.deepcopy(dict(tree))
    for key, value in overrides.items():
        _override(own, key, value)
    return _with_vocabulary_beside(validate(own), folder)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree by their dotted keys, as overrides name them. A list of plain values is one leaf."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    inner = ((f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items())
    return {dotted: leaf for key, item in inner for dotted, leaf in flat(item, key).items()}


def _with_vocabulary_beside(config: Config, folder: Path) -> Config:
    """A vocabulary is looked for beside the file that names it, and then from the working directory.

    So a run and an export find their own, wherever they were moved; of theirs the hash is known.
    """
    name = config.model.vocabulary
    if name is None:
        return config
    beside = folder / name
    if beside.is_file() or (config.model.vocabulary_sha256 is not None and not Path(name).is_file()):
        return config.model_copy(update={"model": config.model.model_copy(update={"vocabulary": str(beside)})})
    return config


def validate(tree: Mapping[str, Any]) -> Config:
    """Make a Config of a nested mapping. Raises ConfigError naming the first wrong key."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from error


def to_yaml(config: Config) -> str:
    """The whole resolved configuration; `load` of it gives the same Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merged(base[key], value) if isinstance(base.get(key), dict) and isinstance(value, dict) else value
    return out


def _override(tree: Any, dotted: str, raw: str) -> None:
    *parents, last = dotted.split(".")
    node = tree
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, dotted)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError(f"{dotted}: {'.'.join(parents[:i])} is a single value and has no keys")
    # Only brackets and null are read as YAML; anything else stays a string until its field's type is known.
    try:
        value = yaml.safe_load(raw) if raw[:1] in ("[", "{") or raw in ("null", "None") else raw
    except yaml.YAMLError as error:
        raise ConfigError(f"{dotted}: got {raw!r}, which is not valid YAML: {' '.join(str(error).split())}") from error
    value = None if value == "None" else value
    if isinstance(node, list):
        node[_index(node, last, dotted)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"{dotted}: {'.'.join(parents)} is a single value and has no keys")


def _index(node: list[Any], part: str, dotted: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"{dotted}: {part!r} is no position in a list of {len(node)}")
    return int(part)


def _base_fits(stage: StageConfig, where: str) -> None:
    base = stage.base_d_model or stage.d_model
    if base < stage.patch_size:
        _fail(f"{where}.base_d_model", base, f"at least patch_size = {stage.patch_size}")
    if stage.ff_width * base % stage.d_model:
        allowed = f"one at which d_ff, {stage.ff_width} at d_model = {stage.d_model}, is a whole number in proportion"
        _fail(f"{where}.base_d_model", base, allowed)


def _fail(where: str, got: object, allowed: str) -> None:
    raise ConfigError(f"{where}: got {got}, expected {allowed}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_beside(problem["loc"])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key (value {problem['input']!r}); {hint}"
    if problem["type"] == "missing":
        return f"{where}: missing; it has no default"
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: got {problem['input']!r}, expected {expected}"


# What the items of these lists are.
_OF_LISTS: dict[int | str, type[_Section]] = {"stages": StageConfig, "sources": SourceConfig}


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    section: Any = Config
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        section = _OF_LISTS.get(part, field.annotation if field else None)
        if section is None:
            return []
    return list(section.model_fields)
