"""MEGABYTE (Yu et al. 2023, arXiv 2305.07185, section 2.1), generalised from two stages to N, coarse to fine.

Legend: b batch · t bytes · k patches (positions of the coarsest stage) · p byte in patch · d features · v vocabulary
        r position inside the coarser stage's position · n all positions of the coarser stage, batch included

Stage s has positions of P_s bytes (P of the last is 1) and width D_s; bytes are embedded D_s / P_s wide.

  eq. 1  h_t = E[x_t] + E_pos[t]                                 per byte, in stage 0
  eq. 2  patches by concatenation, shifted by one patch; a trainable pad comes first, the last patch is dropped
  eq. 3  g = Transformer(patches)                                (k, D_0)
  eq. 4  each g_k is cut in slices, one for each finer position in it; w . slice + embedding of the finer position
         before it (a trainable pad at the first): a sum
  eq. 5  the finer stage runs inside every coarser position on its own
  eq. 6  p(x_t | x_<t) = softmax(E_last . l_t), tied to the last stage's byte embedding; or untied by configuration

With two stages (P, 1) this is the paper's model exactly; with one stage (1,) a byte-level transformer. What is ours:
the local position table (one row per slot, added to the pad's slot too; the equations show none, the authors said on
OpenReview that local positions are used) and the final norm of each stage; both are configuration.

With isolate_documents (ours, too) a packed row gives every document the logits that it has alone at the start of a
row. The loader lays documents out so that each begins with a patch; the model finds them by the boundaries in ids:
patch k starts a document if k = 0 or patch k - 1 holds a boundary. There eq. 2's shift brings the pad, the positions
of eq. 1 begin again, and eq. 3 looks no further back. Finer stages run inside one patch and never see two documents.

The paper's extensions and ablations, all off by default (ModelConfig says what each one is):

  conv_encoder   causal convolutions over E[x_t] alone, before eq. 1 adds positions: what they make of a run of bytes
                 is then the same wherever it stands, which is what the paper wants them for
  cross_patch    in eq. 5 the last stage looks at the last r positions of the patch before, in every layer, rotary
  without local  eqs. 4 to 6 are p(x_t | ..) = softmax(E_last . norm(w . slice)): a patch's bytes do not see each other
  without global eqs. 1 to 3 are left out: of earlier patches the last stage sees what cross_patch shows it
  widths         a width D that P does not divide: eq. 1 is D // P wide, eq. 2 leaves the features behind P (D // P)
                 zero, and eq. 4 hands on D // (number of slices) features a slice and leaves the rest

Ranks may share rows (sequence.py): each has all ids and computes the logits of its own part of the patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from mbtrain.config import ModelConfig
from mbtrain.model.chunks import Cut, InChunks
from mbtrain.model.decode import Decoder
from mbtrain.model.layers import (
    Attention,
    CausalConvolutions,
    Transformer,
    document_starts,
    final_norm,
    look_up,
    matrix,
    pad,
    readout,
    rule_of,
    table,
)
from mbtrain.model.loss import nats
from mbtrain.model.sequence import WHOLE, Attend, Part


def places_in_documents(starts: Tensor) -> Tensor:
    """Each patch's number inside its own document, (b, k); starts (b, k) is True where a document starts."""
    k = torch.arange(starts.shape[1], device=starts.device)
    return k - torch.where(starts, k, 0).cummax(dim=1).values


class Stage(nn.Module):
    """One scale: embeds bytes to its positions, adds the coarser stage's slices, runs its transformer.

    positions in one coarser position: `slots` (unbounded in stage 0); bytes of one position: `patch_size`.
    """

    def __init__(self, config: ModelConfig, index: int, vocab_size: int, seq_len: int):
        super().__init__()
        stage, base = config.stages[index], config.base(index)
        self.patch_size, self.d_byte = stage.patch_size, stage.d_byte
        self.left_over = stage.d_model - stage.patch_size * stage.d_byte
        self.coarsest = index == 0
        kind = config.positions if self.coarsest else config.local_positions
        cross_patch = config.cross_patch if index == len(config.stages) - 1 else 0
        tied = config.tied and index == len(config.stages) - 1
        self.embed = table("tied" if tied else "embedding", vocab_size, stage.d_byte, base.d_byte, config)
        self.pad = pad(stage.d_model, base.d_model, config)
        if self.coarsest:
            self.slots = 0
            self.project = None
            self.positions = (
                table("position", seq_len, stage.d_byte, base.d_byte, config) if kind == "learned" else None
            )
        else:
            self.slots = config.stages[index - 1].patch_size // stage.patch_size
            self.project = None if config.without == "global" else projection(config, index)
            self.positions = (
                table("position", self.slots, stage.d_model, base.d_model, config) if kind == "learned" else None
            )
        self.convolutions = CausalConvolutions(config) if self.coarsest and config.conv_encoder else None
        rotary = kind == "rotary" or cross_patch > 0
        self.transformer = Transformer(config, index, rotary=rotary, cross_patch=cross_patch)

    def run(self, ids: Tensor, coarse: Tensor | None, starts: Tensor | None = None) -> Tensor:
        """Eqs. 1 to 3, or 4 and 5: `inputs` through the transformer.

        Not `forward`: this stage's own tables are used after it, too (eq. 6), and ZeRO-3 then leaves them at hand.
        """
        x = self.inputs(ids, coarse, starts)
        patches = 1 if self.coarsest else x.shape[0] // ids.shape[0]
        return cast(Tensor, self.transformer(x, starts=starts, patches=patches))

    def inputs(self, ids: Tensor, coarse: Tensor | None, starts: Tensor | None = None) -> Tensor:
        """Positions of this stage before its transformer (eqs. 1, 2 and 4).

        ids (b, t), t a multiple of the coarsest patch; coarse (n, D) is the coarser stage's output with n over batch
        and positions, None in stage 0; starts (b, k) in stage 0 where documents are kept apart. Returns (n, r, d); in
        stage 0 (b, k, d).
        """
        embedded = self.embedded(ids, starts)
        x = torch.cat((self.first(embedded), embedded[:, :-1]), dim=1)
        return self.condition(x if starts is None else self.restart(x, starts), coarse)

    def inputs_of(self, part: Part, ids: Tensor, starts: Tensor | None = None) -> Tensor:
        """Of the coarsest stage's `inputs`, those of this part of the patches; ids and starts are the whole row's.

        Each needs the patch before it, whose bytes are at hand. The pad and the tables take part in every part's
        inputs, be it times 0: each rank then has a gradient of every parameter, as ZeRO's sums over ranks need.
        """
        p, k = self.patch_size, ids.shape[1] // self.patch_size
        if starts is None:
            starts = (torch.arange(k, device=ids.device) == 0).unsqueeze(0)
        own = part.columns(k)
        before = F.pad(ids, (p, -p))[:, own.start * p : own.stop * p]
        x = self.joined(look_up(before, self.embed))
        if self.positions is not None:
            x = x + self.positions_at(F.pad(places_in_documents(starts), (1, -1))[:, own])
        return self.restart(x, starts[:, own])

    def embedded(self, ids: Tensor, starts: Tensor | None = None) -> Tensor:
        """Bytes embedded and concatenated to this stage's positions: ids (b, t) -> (b, k, d) or ((b k), r, d)."""
        h = look_up(ids, self.embed)
        if not self.coarsest:
            return rearrange(self.joined(h), "b (k r) d -> (b k) r d", r=self.slots)
        if self.convolutions is not None:
            h = self.convolutions(h)
        if self.positions is not None and starts is None:
            h = h + self.positions[: ids.shape[1]]
        x = self.joined(h)
        return x if self.positions is None or starts is None else x + self.positions_from(starts)

    def joined(self, h: Tensor) -> Tensor:
        """Eq. 2: bytes (b, t, d) side by side, (b, k, p d), and zeros for features that are left over."""
        x = rearrange(h, "b (k p) d -> b k (p d)", p=self.patch_size)
        return F.pad(x, (0, self.left_over)) if self.left_over else x

    def positions_from(self, starts: Tensor) -> Tensor:
        """The coarsest stage's learned positions of whole patches, (b, k, d), counted from where documents start."""
        return self.positions_at(places_in_documents(starts))

    def positions_at(self, places: Tensor) -> Tensor:
        """The coarsest stage's learned positions of whole patches by number, (b, k) -> (b, k, d)."""
        assert self.positions is not None
        return look_up(places, self.joined(self.positions.unsqueeze(0)).squeeze(0))

    def restart(self, x: Tensor, starts: Tensor) -> Tensor:
        """x (b, k, d) with the pad in place of the patch of another document, where starts (b, k) is True."""
        return torch.where(starts.unsqueeze(-1), self.pad.to(x.dtype), x)

    def first(self, like: Tensor) -> Tensor:
        """The trainable pad as first position, (n, 1, d)."""
        return repeat(self.pad.to(like.dtype), "d -> n 1 d", n=like.shape[0])

    def condition(self, x: Tensor, coarse: Tensor | None) -> Tensor:
        """Eq. 4: add to every slot of x (n, r, d) its slice of the coarser stage's output (n, D), and its position."""
        if self.coarsest:
            return x
        if coarse is not None and self.project is not None:
            x = x + F.linear(slices(coarse, self.slots), self.project)
        return x if self.positions is None else x + self.positions

    def condition_slots(self, x: Tensor, coarse: Tensor | None, start: int) -> Tensor:
        """As `condition`, for x (n, r, d) in slots start .. start + r alone."""
        n, r, _ = x.shape
        if coarse is not None and self.project is not None:
            width = self.project.shape[1]
            x = x + F.linear(coarse.narrow(-1, start * width, r * width).view(n, r, width), self.project)
        return x if self.positions is None else x + self.positions[start : start + r]


class Slices(nn.Module):
    """The last stage of a model without local model: each byte of a patch from its slice of the coarser output alone.

    It has what logits need: eq. 4's matrix, the final norm, and where eq. 6 is tied the byte embedding.
    """

    coarsest = False

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        stage = config.stages[-1]
        self.patch_size, self.slots = stage.patch_size, config.stages[-2].patch_size // stage.patch_size
        width, base = stage.d_model, config.base(len(config.stages) - 1).d_model
        self.embed = table("tied", vocab_size, width, base, config) if config.tied else None
        self.project = projection(config, len(config.stages) - 1)
        self.final_norm = final_norm(config, len(config.stages) - 1)

    def run(self, ids: Tensor, coarse: Tensor | None) -> Tensor:
        """The coarser stage's output (n, D) -> (n, r, d); ids are not looked at."""
        assert coarse is not None
        return self.read(slices(coarse, self.slots))

    def read(self, parts: Tensor) -> Tensor:
        """Slices of the coarser stage's output, (..., D / r) -> (..., d)."""
        x = F.linear(parts, self.project)
        return x if self.final_norm is None else cast(Tensor, self.final_norm(x))


def projection(config: ModelConfig, index: int) -> nn.Parameter:
    """Eq. 4's matrix of a finer stage, (d, D // r)."""
    coarser = config.stages[index - 1]
    slots = coarser.patch_size // config.stages[index].patch_size
    shape = config.stages[index].d_model, coarser.d_model // slots
    base = config.base(index).d_model, config.base(index - 1).d_model // slots
    return matrix("project", shape, base, config)


def slices(coarse: Tensor, slots: int) -> Tensor:
    """The coarser stage's output (n, D) in slices, (n, r, D // r); features that are left over are not handed on."""
    width = coarse.shape[-1] // slots
    return rearrange(coarse[..., : slots * width], "n (r d) -> n r d", r=slots)


class Megabyte(nn.Module):
    """ids (b, t) -> logits (b, t, v), logits[:, i] being for ids[:, i] given ids[:, :i]. Any t >= 1.

    seq_len bounds t only where the coarsest stage has learned positions. Of a row that is shared (see `share`) the
    logits are those of part.columns(t) alone, and t is a multiple of the patch size times the parts. With chunk_bytes
    it gives nats (b, t) in place of logits, made chunk by chunk (see sparing.py).
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int):
        super().__init__()
        self.config, self.vocab_size, self.seq_len = config, vocab_size, seq_len
        self.patch_size = config.stages[0].patch_size
        self.stages = nn.ModuleList(made_stages(config, vocab_size, seq_len))
        self.readout = readout(config, vocab_size)
        self.logit_multiplier = rule_of("readout", self.unembedding).multiplier
        self.part = WHOLE
        self.chunk_bytes: int | None = None
        self.in_chunks = InChunks(self.nats_of, self._finer)

    def share(self, part: Part, attend: Attend) -> None:
        """Compute only this part of every row from now on; attend (sequence.by_head) looks at all ranks' positions.

        Generation stays whole. Raises ValueError for a model that cannot be cut so.
        """
        if self.config.stages[0].n_heads % part.parts:
            raise ValueError(f"sequence parallelism: {self.config.stages[0].n_heads} heads, {part.parts} parts")
        if self.config.block.token_shift:
            raise ValueError("sequence parallelism: token_shift looks at the patch before, on another rank")
        self.part = part
        for module in cast(Stage, self.stages[0]).modules():
            if isinstance(module, Attention):
                module.part, module.attend = part, attend

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        if self.part.parts > 1 and t % (self.patch_size * self.part.parts):
            raise ValueError(f"rows of {t} bytes in patches of {self.patch_size}: no {self.part.parts} equal parts")
        # A row that ends inside a patch is filled up; causality keeps the filling out of every logit that is returned.
        filled = F.pad(ids, (0, -t % self.patch_size))
        coarse, own = self.over_patches(filled), filled[:, self.part.columns(filled.shape[1])]
        if self.chunk_bytes is not None:
            return self.nats_in_chunks(own, coarse, self.chunk_bytes)[:, :t]
        return self.logits(self.inside_patches(own, coarse))[:, :t]

    def over_patches(self, ids: Tensor) -> Tensor | None:
        """The coarsest stage of whole rows (b, t): its output for this part of the patches (b, k, d), if there is one.

        t is a multiple of the patch size times the parts.
        """
        first = cast(Stage, self.stages[0])
        if not first.coarsest:
            return None
        starts = document_starts(ids, self.patch_size) if self.config.isolate_documents else None
        if self.part == WHOLE:
            return first.run(ids, None, starts)
        return cast(Tensor, first.transformer(first.inputs_of(self.part, ids, starts), starts=starts))

    def inside_patches(self, ids: Tensor, coarse: Tensor | None) -> Tensor:
        """The finer stages of some whole patches: bytes (b, t) and the patches' outputs (b, k, d) -> (b, t, d).

        They run inside one patch, or with the one before in the row: they need no documents and no other ranks.
        """
        x = None if coarse is None else rearrange(coarse, "b k d -> (b k) d")
        for stage in self.stages:
            if not stage.coarsest:
                x = rearrange(cast(Stage | Slices, stage).run(ids, x), "n r d -> (n r) d")
        assert x is not None
        return rearrange(x, "(b t) d -> b t d", b=ids.shape[0])

    def nats_in_chunks(self, ids: Tensor, coarse: Tensor | None, chunk_bytes: int) -> Tensor:
        """As `inside_patches`, up to the nats (b, t), so many bytes of all rows at a time, in whole patches."""
        reach = self.reach_patches
        self.in_chunks.cut = Cut(self.patch_size, max(chunk_bytes // (len(ids) * self.patch_size), reach, 1), reach)
        return cast(Tensor, self.in_chunks(ids, coarse))

    def _finer(self) -> Iterator[nn.Module]:
        """The modules whose parameters are used behind the coarsest stage."""
        for stage in self.stages:
            if not stage.coarsest:
                yield from stage.modules()
        if self.readout is not None or len(self.stages) == 1:
            yield self if self.readout is not None else self.stages[-1]

    def nats_of(self, ids: Tensor, coarse: Tensor | None, before: int) -> Tensor:
        """The nats (b, t - before) of a chunk, (b, t) and (b, k, d), that begins `before` bytes too early."""
        return nats(self.logits(self.inside_patches(ids, coarse)[:, before:]), ids[:, before:])

    @property
    def reach_patches(self) -> int:
        """How many whole patches before its own a byte's finer stages look at, beside what the coarsest hands them.

        With cross_patch each layer looks at the patch before, so its output depends on as many as there are layers.
        """
        if not self.config.cross_patch:
            return 0
        return -(-self.config.stages[-1].n_layers * self.config.stages[-2].patch_size // self.patch_size)

    def logits(self, x: Tensor) -> Tensor:
        """The last stage's output (..., d) -> logits (..., v), eq. 6."""
        if self.logit_multiplier != 1:
            x = x * self.logit_multiplier
        return F.linear(x, self.unembedding)

    @property
    def unembedding(self) -> nn.Parameter:
        """The matrix of logits, (v, d)."""
        weight = cast(Stage | Slices, self.stages[-1]).embed if self.readout is None else self.readout
        assert weight is not None
        return weight

    def decoder(self, batch: int, compiled: bool = True) -> Decoder:
        """Cached generation of `batch` rows of equal length; compiled=False: by torch alone."""
        return Decoder(self, batch, compiled)

    def unit_bytes(self, ids: Tensor) -> float | None:
        """None: a position of the coarsest stage has so many bytes whatever they are."""
        return None

    def training_span(self, t: int, number: int) -> slice | None:
        """None: all columns of a row of t bytes are predicted."""
        return None


def made_stages(config: ModelConfig, vocab_size: int, seq_len: int) -> list[nn.Module]:
    """The model's stages, coarse to fine; without global or without local model one of them is left out."""
    if config.without == "global":
        return [Stage(config, 1, vocab_size, seq_len)]
    if config.without == "local":
        return [Stage(config, 0, vocab_size, seq_len), Slices(config, vocab_size)]
    return [Stage(config, i, vocab_size, seq_len) for i in range(len(config.stages))]
