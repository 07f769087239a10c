"""One short training of one model: how large its tensors are, how far they have moved, what each weight's update does.

Legend: b batch · t positions · v vocabulary

Everything is seen from outside, whatever kind of model it is: blocks by hooks; products with a parameter, attention
scores and the loss's logits by the torch functions that compute them. No model has code for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mbtrain.config import Config, ModelConfig
from mbtrain.coord_check.places import Place, Trained, stage_names
from mbtrain.engine import parameter_groups
from mbtrain.errors import ConfigError
from mbtrain.model import Model, build
from mbtrain.model.layers import Transformer, role_of
from mbtrain.model.loss import nats

ATTENTION_ROWS = 64  # of positions whose scores torch's own kernel hides


def trained(settings: Config, ids: Tensor, counts: Tensor, *, seed: int, lr: float, at: Sequence[int]) -> Trained:
    """Train a fresh model of this configuration on one batch, always the same; measure it at these steps.

    Plain AdamW over the engine's groups, at a constant LR: no warm-up, clipping or decay, no dropout. fp32.

    Args:
        ids: the batch, int64 (b, t).
        counts: which of them have a loss, bool (b, t).
        at: steps, rising, from 0 (before the first) to the last one.

    Raises:
        ConfigError: a matrix of the model takes part in no product that can be seen here.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    span = model.training_span(ids.shape[1], -1)  # the last of all, the longest
    ids, counts = (x[:, : span.stop] if span else x for x in (ids.to(device), counts.to(device)))
    weights = counts[:, span or slice(None)].float()
    groups = parameter_groups(model, settings)
    groups = [group | {"lr": lr * group["lr_scale"], "weight_decay": 0.0} for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=settings.optim.betas, foreach=True)
    watch = Watch(model, settings.model)
    out = Trained(roles=watch.roles)
    for step in range(at[-1] + 1):
        with watch.looking() if step in at else ExitStack():
            lost = nats(model(ids), ids[:, span or slice(None)])
        loss = (lost * weights).sum() / weights.sum()
        out.losses.append(loss.item())
        if step in at:
            out.sizes[step], out.changes[step], out.updates[step] = watch.taken()
        if step < at[-1]:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return out


class Watch:
    """Looks at a model's tensors while it computes; the first look is what later ones are compared with."""

    def __init__(self, model: Model, config: ModelConfig):
        names = stage_names(config)
        self.stages = names[1:] if config.without == "global" else names  # as the model has them
        self.model, self.first = model, {name: p.detach().clone() for name, p in model.named_parameters()}
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.kept: dict[Place, Tensor] = {}
        self.roles = {self.place(name): role_of(name, p) for name, p in model.named_parameters()}
        self.roles |= {self.tied(name): "readout" for name, p in model.named_parameters() if role_of(name, p) == "tied"}
        self.now: dict[Place, Tensor] = {}
        self.updates: dict[Place, float] = {}
        self.attending: Place | None = None

    def place(self, name: str) -> Place:
        """The place of a parameter or module by its name, as in stages.1.transformer.blocks.0.attn.qkv.weight."""
        number = re.search(r"(?:^|\.)stages\.(\d+)\.", name)
        stage = self.stages[int(number[1])] if number else self.stages[0 if name == "filler" else -1]
        layer = re.search(r"\.(?:blocks|layers)\.(\d+)", name)
        part = re.sub(r"(?:stages\.\d+|transformer|blocks\.\d+|layers\.\d+)\.", "", name).removesuffix(".weight")
        return Place(stage, part, int(layer[1]) if layer else None)

    def tied(self, name: str) -> Place:
        """Where a tied table gives logits."""
        return self.place(name)._replace(part="readout")

    @contextmanager
    def looking(self) -> Iterator[None]:
        """What the model computes inside is measured."""
        self.now, self.updates = {}, {}
        with ExitStack() as held:
            for name, module in self.model.named_modules():
                if isinstance(module, Transformer):
                    for hook in self._hooks(name, module):
                        held.callback(hook.remove)
            held.enter_context(_Functions(self))
            yield

    def taken(self) -> tuple[dict[Place, float], dict[Place, float], dict[Place, float]]:
        """Sizes, changes and updates of the last look, in the order in which they were computed.

        Raises ConfigError where a matrix was not seen.
        """
        for name, param in self.model.named_parameters():
            place, role = self.place(name), role_of(name, param)
            if role in ("hidden", "project", "readout"):
                if place not in self.updates:
                    raise ConfigError(f"coord-check: {name} takes part in no product that can be watched")
            else:
                # A table is only looked up, so what its rows moved by is what they give; those not in the batch rest.
                moved = (param.detach() - self.first[name]).square()
                rows = moved[moved.flatten(1).sum(1) > 0] if moved.ndim > 1 else moved
                self.updates[place] = float(rows.mean().sqrt()) if rows.numel() else 0.0
        if not self.kept:
            self.kept = self.now
        sizes = {place: float(x.abs().mean()) for place, x in self.now.items()}
        changes = {place: _moved(x, self.kept[place]) for place, x in self.now.items()}
        return sizes, changes, self.updates

    def product(self, x: Tensor, weight: Tensor, out: Tensor, again: Any) -> None:
        """A product of x with a parameter, or with a view of one: `again` computes it with another."""
        owner = weight if id(weight) in self.names else weight._base
        if owner is None or id(owner) not in self.names:
            return
        name = self.names[id(owner)]
        role = self.roles[self.place(name)]
        place = self.tied(name) if role == "tied" else self.place(name)
        moved = again((owner.detach() - self.first[name]).view_as(weight))
        self.updates[place] = float(moved.square().mean().sqrt())
        if role == "project":
            self.saw(place._replace(part="slices"), out)

    def saw(self, place: Place, x: Tensor) -> None:
        """A tensor that the model computed."""
        self.now[place] = x.detach().float()

    def _hooks(self, name: str, module: Transformer) -> Iterator[Any]:
        for i, block in enumerate(module.blocks):
            at = self.place(f"{name}.blocks.{i}.")
            if i == 0:
                yield block.register_forward_pre_hook(lambda _, args, at=at: self.saw(_input(at), args[0]))
            yield block.register_forward_hook(lambda _, args, out, at=at: self.saw(at._replace(part="residual"), out))
            for part, made in (("attention", block.attn), ("feed-forward", block.ffn)):
                here = at._replace(part=part)
                yield cast(nn.Module, made).register_forward_hook(lambda _, args, out, at=here: self.saw(at, out))
            attention = cast(nn.Module, block.attn)
            yield attention.register_forward_pre_hook(lambda *_, at=at: self._attends(at._replace(part="scores")))
            yield attention.register_forward_hook(lambda *_: self._attends(None))

    def _attends(self, at: Place | None) -> None:
        self.attending = at


class _Functions(TorchFunctionMode):
    """Sees products, attention scores and logits where torch computes them."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        watch, name = self.watch, getattr(func, "__name__", "")
        with torch.no_grad():
            if name in ("linear", "conv1d"):
                x = args[0]
                watch.product(x, args[1], out, lambda moved: func(x, moved))
            elif name == "cross_entropy":
                watch.saw(Place(watch.stages[-1], "logits"), args[0])
            elif watch.attending is not None and name == "softmax":
                watch.saw(watch.attending, args[0][args[0].isfinite()])
            elif watch.attending is not None and name == "scaled_dot_product_attention":
                q, k = (x[..., :ATTENTION_ROWS, :] for x in args[:2])
                watch.saw(watch.attending, q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
        return out


def _moved(x: Tensor, first: Tensor) -> float:
    """RMS of the change; nan where scores are not finite that were: of those only the finite ones are kept."""
    return float((x - first).square().mean().sqrt()) if x.shape == first.shape else math.nan


def _input(at: Place) -> Place:
    return Place(at.stage, "input")
