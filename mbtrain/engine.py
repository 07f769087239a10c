"""The only room that knows DeepSpeed: start a process group, wrap a model, step, and read or write its whole state.

DeepSpeed's own checkpoints are pickles that fit one number of ranks. Here each rank hands out what it owns under ZeRO:
stretches of the fp32 weights and of what the optimizer keeps, by parameter name and offset. That needs no
communication, is written without pickle, and is put back into any number of ranks, any ZeRO stage and any precision.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, TCPStore

from mbtrain import optim
from mbtrain.checkpoint import TRAINED, WEIGHT, Fragment, Progress, Stored
from mbtrain.config import Config, batch_shape
from mbtrain.errors import PeersError
from mbtrain.model import Model
from mbtrain.model.chunks import InChunks
from mbtrain.model.compiling import compile_blocks, is_compiled
from mbtrain.model.layers import attend, role_of, rule_of
from mbtrain.model.sequence import Part, by_head, by_position
from mbtrain.model.sparing import scoring, spare
from mbtrain.schedule import ema_decay

UNDECAYED = ("embedding", "tied", "position", "pad", "gain", "bias")
EMBEDDINGS = ("embedding", "tied", "position", "pad")
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: rank of ranks, local_rank of local_ranks on this host, and its device."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    device: torch.device


def deepspeed_config(config: Config, ranks: int) -> dict[str, Any]:
    """The whole DeepSpeed dictionary, every key that matters named: unknown keys and defaults there are silent."""
    micro, accumulation = batch_shape(config, ranks)
    precision, stage = config.train.precision, config.train.zero_stage
    autocast = precision == "autocast" or (precision == "bf16" and stage == 0)
    bf16 = precision == "bf16" and not autocast
    made: dict[str, Any] = {
        # DeepSpeed counts ranks that share their rows as if each had its own; it only multiplies these three.
        "train_batch_size": micro * accumulation * ranks,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.gradient_clipping,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "contiguous_gradients": True},
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 16, "loss_scale_window": 1000},
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
    }
    if bf16:
        # Accumulated in bf16, a batch cut in four gives another gradient than the same batch in one piece.
        made["data_types"] = {"grad_accum_dtype": "fp32"}
    return made


def launched() -> bool:
    """Whether this process is one of several ranks that a launcher started."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1")) > 1
    return "MASTER_ADDR" in os.environ and "SLURM_PROCID" in os.environ and int(os.environ["SLURM_NTASKS"]) > 1


def start() -> Ranks:
    """Join the launcher's process group (deepspeed, torchrun, srun), or make one of a single process.

    Sets threads per process on CPU and returns this process's place.
    """
    _single_process_defaults()
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    local_ranks = local_ranks or int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())  # a scheduler may show each rank its own
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
        torch.set_flush_denormal(True)
        keep_memory()
    deepspeed = import_deepspeed()
    # DeepSpeed's timeout reaches only the world group; the groups that it makes later take torch's default.
    torch.distributed.distributed_c10d.default_pg_timeout = COLLECTIVE_TIMEOUT
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if os.environ["MASTER_ADDR"] in LOOPBACK and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
            _meet_on_loopback(backend)
        if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
            _meet_at_the_agent(backend)
        deepspeed.init_distributed(  # takes what is there, or makes it
            dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT
        )
    except (dist.DistError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise PeersError(
            f"rank {os.environ['RANK']}: the {os.environ['WORLD_SIZE']} ranks did not meet at {where}: "
            f"{str(error).splitlines()[0][:200]}; is that port free, and reached from every host? `mbtrain doctor`"
        ) from error
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, local_ranks, device)


def _meet_at_the_agent(backend: str) -> None:
    """Join by the store of torchrun's agent, which still holds the addresses of the ranks before a restart."""
    rank, ranks, port = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    store = TCPStore(os.environ["MASTER_ADDR"], port, ranks, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    named = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=named, rank=rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT)


def _meet_on_loopback(backend: str) -> None:
    """Join ranks that are all on this host where no other host can reach them.

    By itself torch listens on all interfaces, and ranks tell each other pickles: whoever reaches them, commands them.
    """
    rank, ranks, port = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    listening = None
    if rank == 0:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(4096)
            listening = listener.detach()
    store = TCPStore(
        "127.0.0.1", port, ranks, rank == 0, COLLECTIVE_TIMEOUT, wait_for_workers=False, master_listen_fd=listening
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT)


def keep_memory() -> None:
    """Let glibc keep freed memory for the next step: a step else returns it all and pays 17,000 page faults, 12 %."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library: slower, not wrong
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(values: list[float], ranks: Ranks) -> list[float]:
    """Sums over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor)
    return [float(x) for x in tensor.tolist()]


def gathered(value: Any) -> list[Any]:
    """A small value of every rank, in rank order, on every rank."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def from_rank_0(value: Any) -> Any:
    """Rank 0's small value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The optimizer's groups, in a fixed order: the parameters that LR, weight decay and eps treat alike.

    By each parameter's role and muP rule (model/mup.py). A group holds its lr_scale, which `Engine.step` multiplies
    with the LR of the schedule, and as `name` the roles in it. One group for each parameter would be as right, but
    under ZeRO each group is a buffer and a collective of its own.
    """
    optim = config.optim
    groups: dict[tuple[float, float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, param in model.named_parameters():
        role, rule = role_of(name, param), rule_of(name, param)
        lr_scale = rule.lr * (optim.embedding_lr if role in EMBEDDINGS else 1.0)
        decayed = optim.decay_all or role not in UNDECAYED
        decay = optim.weight_decay * rule.weight_decay if decayed else 0.0
        groups.setdefault((lr_scale, decay, optim.eps * rule.eps), []).append((role, param))
    return [
        {
            "name": "+".join(sorted({role for role, _ in members})),
            "params": [param for _, param in members],
            "lr": optim.lr,
            "lr_scale": lr_scale,
            "weight_decay": decay,
            "eps": eps,
        }
        for (lr_scale, decay, eps), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def check_groups(given: list[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
    """Raises RuntimeError where DeepSpeed has not kept the groups, as its own schedulers do not: all would be one."""
    keys = ("name", "lr", "lr_scale", "weight_decay", "eps")
    wanted, got = ([[group.get(key) for key in keys] for group in groups] for groups in (given, kept))
    if wanted != got:
        raise RuntimeError(f"the optimizer's groups were changed by DeepSpeed: expected {wanted}, got {got}")


class Engine:
    """A model under DeepSpeed: forward and backward by micro-step, one optimizer step, exact state in and out."""

    def __init__(self, config: Config, model: Model, ranks: Ranks):
        self.config, self.ranks = config, ranks
        # Without ZeRO and loss scaling, DeepSpeed leaves weights, gradients and optimizer where torch has them.
        self._plain = config.train.zero_stage == 0 and config.train.precision != "fp16"
        self.micro, self.accumulation = batch_shape(config, ranks.ranks)
        # Of `readers` groups that read different rows this is one of group `reader`, and has `columns` of its rows.
        parts, width = config.train.sequence_parallel, config.data.seq_len // config.train.sequence_parallel
        self.reader, self.readers = ranks.rank // parts, ranks.ranks // parts
        part = ranks.rank % parts
        self.columns = slice(part * width, (part + 1) * width)
        self.counts_rows = part == 0
        if parts > 1:
            share_rows(model, ranks, parts)
        self.names = {id(param): name for name, param in model.named_parameters()}
        optimizer = optim.build(parameter_groups(model, config), config)
        groups = [dict(group) for group in optimizer.param_groups]
        self._shapes = {name: list(param.shape) for name, param in model.named_parameters()}
        # What is kept of each parameter, by name: it is the group's.
        self.kinds = {self.names[id(p)]: optimizer.kinds(group) for group in groups for p in group["params"]}
        spare(model, config)
        self._compiled = is_compiled(config, ranks.device)
        if self._compiled:
            compile_blocks(model)
        model.to(ranks.device)
        deepspeed = import_deepspeed()
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, ranks.ranks), dist_init_required=False
        )
        check_groups(groups, self.engine.optimizer.param_groups)
        if hasattr(self.engine.optimizer, "fp32_groups_gradients_flat"):
            self.engine.optimizer.update_hp_grads = self._take_gradients
            self.engine.optimizer.clear_hp_grads = self._forget_gradients
            self.engine.buffered_allreduce_fallback = self._average_gradients
        self.module: Model = self.engine.module
        self.optimizer = optimizer
        self.marks = torch.zeros(len(self.names), dtype=torch.float32, device=ranks.device)
        self._ready_state()
        self.averages = config.optim.averages
        # optim.ema, of so many updates: by name where this rank's stretch begins, its average, the weights it follows.
        self.ema: dict[str, tuple[int, Tensor, Tensor]] = {}
        self.updates = 0
        if config.optim.ema is not None:
            self._ready_ema()
        if config.train.precision != "fp16":  # there, an overflow is an ordinary event that DeepSpeed skips
            self._watch_gradients()

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of ids, through DeepSpeed's hooks."""
        return self.engine(ids)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-step's mean loss; averaging over micro-steps and ranks is DeepSpeed's."""
        self.engine.backward(loss)

    # Stage 1 in bf16 is DeepSpeed's BF16_Optimizer. What it does with gradients costs 8 % of a step of 4M parameters
    # on a CPU, on one rank, too: it fills both kinds with zeros, converts, adds, copies all into one buffer, rounds
    # them to bf16 (its communication_data_type), sums, and copies back. These three stand in its place.

    def _take_gradients(self, clear_lp_grads: bool = False) -> None:
        """Add a micro-step's bf16 gradients to those in fp32, and let go of them."""
        wrapper = self.engine.optimizer
        for sums, there, params in zip(
            wrapper.fp32_groups_gradients, wrapper.fp32_groups_has_gradients, wrapper.bf16_groups, strict=True
        ):
            for i, param in enumerate(params):
                if param.grad is not None:
                    (sums[i].add_ if there[i] else sums[i].copy_)(param.grad.view_as(sums[i]))
                    there[i], param._hp_grad, param.grad = True, sums[i], None

    def _average_gradients(self, *_: Any, **__: Any) -> None:
        """The mean over ranks of the sums, in fp32 and in their place. Collective."""
        wrapper = self.engine.optimizer
        for sums, there in zip(wrapper.fp32_groups_gradients, wrapper.fp32_groups_has_gradients, strict=True):
            for i, has in enumerate(there):
                if not has:
                    sums[i].zero_()
        if self.ranks.ranks > 1:
            for flat in wrapper.fp32_groups_gradients_flat:
                dist.all_reduce(flat)
                flat.div_(self.ranks.ranks)

    def _forget_gradients(self) -> None:
        """After a step: the next gradients replace the sums."""
        there = self.engine.optimizer.fp32_groups_has_gradients
        there[:] = [[False] * len(group) for group in there]

    def gradient_marks(self) -> list[float]:
        """Per parameter, of this rank's micro-steps since the last call: not finite where a gradient was not.

        Else with log.noise_scale the squared norms of its gradients of each micro-step's mean loss, before ranks are
        averaged, added up; without it nothing of meaning. With fp16 nothing is looked at, and all are 0.
        """
        marks = [x * self.accumulation**2 for x in self.marks.tolist()]  # DeepSpeed divides the loss
        self.marks.zero_()
        return marks

    def step(self, lr_factor: float, skip: bool = False) -> float | Tensor:
        """The optimizer step that ends a global batch; returns the gradient's norm before clipping.

        On a GPU that is a tensor: to read it is to wait for the update, and meanwhile the next step can be launched.
        Called once after every micro-step's backward; DeepSpeed acts on the last. In between returns 0.
        skip: the gradients are dropped and nothing is updated.
        """
        self.optimizer.paused = skip
        boundary = self.engine.is_gradient_accumulation_boundary()
        optim.set_lr(self.optimizer, self.config.optim.lr * lr_factor)
        own_norm = None
        if boundary and self._plain:
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            own_norm = torch.nn.utils.get_total_norm(grads)
        self.engine.step()
        if not boundary:
            return 0.0
        if self.ema and not skip and not getattr(self.engine.optimizer, "overflow", False):
            self._update_ema()
        norm = own_norm if own_norm is not None else self.engine.get_global_grad_norm()
        if isinstance(norm, Tensor) and norm.is_cuda:
            return norm
        return float(norm) if norm is not None else float("nan")

    def loss_scale(self) -> float:
        """fp16's current loss scale, 1 otherwise."""
        return float(getattr(self.engine.optimizer, "cur_scale", 1.0)) if self.config.train.precision == "fp16" else 1.0

    def optimizer_steps(self) -> int:
        """Steps that the optimizer has really made (fp16 may have skipped some)."""
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def optimizer_numbers(self) -> dict[str, float]:
        """What the optimizer keeps once, not of each element, but for its steps; on all ranks alike."""
        state: dict[str, Tensor] = next(iter(self.optimizer.state.values()), {})
        return {key: float(state[key]) for key in _kept_once(state) if key != "step"}

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of the state, in fp32: views into it, but for averages, which are made here.

        Over all ranks every element comes once. WEIGHT is what is evaluated; where that is an average, TRAINED is what
        training goes on from.
        """
        for name, start, parts in self._owned():
            if self.averages:
                trained = parts.pop(WEIGHT)
                parts |= {WEIGHT: self._averaged(name, trained, parts), TRAINED: trained}
            yield Fragment(name, start, parts)

    def _owned(self) -> Iterator[Fragment]:
        """What this rank owns of the weights that are trained, as WEIGHT, and of the state: views into it, in fp32."""
        for i, (name, param) in enumerate(self.module.named_parameters()):
            if self._plain:  # all ranks have all of it, and share the parameters out
                if i % self.ranks.ranks == self.ranks.rank:
                    state = {key: self.optimizer.state[param][key].view(-1) for key in self.kinds[name]}
                    yield Fragment(name, 0, {WEIGHT: param.data.view(-1), **state})
            elif hasattr(param, "ds_id"):
                start, parts = self._own_part_of_stage_3(name, param)
                if parts[WEIGHT].numel():
                    yield Fragment(name, start, parts)
            elif (owned := param._hp_mapping) is not None:  # type: ignore[attr-defined]
                state = {key: owned.get_optim_state_fragment(key) for key in self.kinds[name]}
                yield Fragment(name, owned.lp_fragment_address.start, {WEIGHT: owned.hp_fragment.data, **state})

    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of every parameter, by name."""
        return dict(self._shapes)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, in fp32, on CPU: what is evaluated. Collective."""
        tensors = _import("deepspeed.utils.tensor_fragment")
        own = {fragment.name: fragment for fragment in self.fragments()} if self.averages else {}
        for name, param in self.module.named_parameters():
            if self.averages:
                whole = self._whole(name, own)
            else:
                whole = param.data if self._plain else tensors.safe_get_full_fp32_param(param)
            yield name, whole.detach().to("cpu", torch.float32).reshape(self._shapes[name])

    @contextmanager
    def evaluating(self, last: bool = False) -> Iterator[None]:
        """Inside, the model is in eval mode, gives nats (sparing.scoring), and has the weights that are evaluated.

        Collective. last: with those that are trained, where averages are evaluated. What is compiled for training is
        not used here: ragged last batches and prompts would each make it compile anew.
        """
        self.module.eval()
        eager = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        try:
            with (
                eager,
                scoring(self.module, self.config),
                self._averages() if self.averages and not last else nullcontext(),
            ):
                yield
        finally:
            self.module.train()

    @contextmanager
    def _averages(self) -> Iterator[None]:
        """The averages in the model's place; afterwards the weights that are trained, bit for bit."""
        if self._plain:
            params = dict(self.module.named_parameters())
            kept = [param.data for param in params.values()]
            for name, param in params.items():
                param.data = self._averaged(name, param.data, self.optimizer.state[param]).view_as(param)
            try:
                yield
            finally:
                for param, data in zip(params.values(), kept, strict=True):
                    param.data = data
            return
        self._compute_with({fragment.name: fragment for fragment in self.fragments()})
        try:
            yield
        finally:
            self._compute_with({fragment.name: fragment for fragment in self._owned()})

    def _averaged(self, name: str, trained: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """What is evaluated of this rank's stretch of a parameter, flat or in its shape."""
        if self.config.optim.ema is not None:
            return self.ema[name][1]
        return self.optimizer.averaged(trained, state)

    def _ready_ema(self) -> None:
        """Begin the averages at the weights."""
        if self._plain:
            stretches = [(name, 0, param.data.view(-1)) for name, param in self.module.named_parameters()]
        else:
            stretches = [(name, start, parts[WEIGHT]) for name, start, parts in self._owned()]
        self.ema = {name: (start, weights.clone(), weights) for name, start, weights in stretches}

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Take in the weights after an update."""
        self.updates += 1
        kept = ema_decay(self.config.optim.ema or 0.5, self.updates)
        _, averages, weights = zip(*self.ema.values(), strict=True)
        torch._foreach_lerp_(averages, weights, 1 - kept)

    def _compute_with(self, own: dict[str, Fragment]) -> None:
        """Put weights, given on each rank by its own stretches, where ZeRO has those that the model computes with."""
        for name, param in self.module.named_parameters():
            if param.numel() == math.prod(self._shapes[name]):  # else ZeRO-3 left an empty tensor in its place
                param.data.copy_(self._whole(name, own).view_as(param))
            if hasattr(param, "ds_id") and name in own:
                mine = own[name].tensors[WEIGHT]
                param.ds_tensor.data[: mine.numel()].copy_(mine)  # type: ignore[attr-defined]

    def _whole(self, name: str, own: dict[str, Fragment]) -> Tensor:
        """A parameter's weights, flat, in fp32, of all ranks' stretches. Collective."""
        whole = torch.zeros(math.prod(self._shapes[name]), device=self.ranks.device)
        if name in own:
            mine = own[name].tensors[WEIGHT]
            whole[own[name].start : own[name].start + mine.numel()] = mine
        dist.all_reduce(whole)  # zeros are added to each: exact
        return whole

    def load_state(self, stored: Stored, progress: Progress) -> None:
        """Put back what all ranks' `fragments` gave, on any number of ranks, at the start or between two steps.

        Also the low-precision weights that the model computes with: the rounded fp32 ones, as after a step. Raises
        CheckpointError where it is another optimizer's state. optim.ema may be new, and then begins at the weights, or
        given up.
        """
        averages = self.optimizer.averages or stored.averages
        weight = TRAINED if averages else WEIGHT
        extra = (TRAINED,) if averages else ()
        stored.must_hold({name: kinds + extra for name, kinds in self.kinds.items()}, self.config.optim.name)
        for fragment in self._owned():
            for key, mine in fragment.tensors.items():
                key = weight if key == WEIGHT else key
                mine.copy_(stored.part(key, fragment.name, fragment.start, mine.numel()))
        for name, param in self.module.named_parameters():
            if param.numel() == math.prod(self._shapes[name]):  # else ZeRO-3 left an empty tensor in its place
                param.data.copy_(stored.whole(weight, name))
                if self._plain:
                    for key in self.kinds[name]:
                        self.optimizer.state[param][key].copy_(stored.whole(key, name))
            if hasattr(param, "ds_id"):
                start, parts = self._own_part_of_stage_3(name, param)
                mine = param.ds_tensor.data[: parts[WEIGHT].numel()]  # type: ignore[attr-defined]
                mine.copy_(stored.part(weight, name, start, mine.numel()))
        for name, (start, average, _) in self.ema.items():
            average.copy_(stored.part(WEIGHT, name, start, average.numel()))
        self.updates = progress.optimizer_steps
        for entry in self.optimizer.state.values():
            for key in _kept_once(entry):
                entry[key].fill_(progress.optimizer_steps if key == "step" else progress.optimizer[key])

    def _own_part_of_stage_3(self, name: str, param: Any) -> tuple[int, dict[str, Tensor]]:
        """Where this rank's partition begins, and views of it without ZeRO's filling behind the parameter's end."""
        partition = param._z3_optimizer._get_fp32_opt_state_partition
        state = {key: partition(param, False, key)[0] for key in self.kinds[name]}
        whole = {WEIGHT: partition(param, False)[0], **state}
        start = self.ranks.rank * param.ds_tensor.ds_numel
        numel = max(0, min(param.ds_tensor.ds_numel, param.ds_numel - start))
        return start, {key: value.data[:numel] for key, value in whole.items()}

    def loss_scaler_state(self) -> dict[str, float]:
        """fp16's dynamic scaler, as plain numbers; empty otherwise."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        if self.config.train.precision != "fp16" or scaler is None:
            return {}
        return {key: float(value) for key, value in vars(scaler).items() if isinstance(value, int | float)}

    def load_loss_scaler_state(self, state: Mapping[str, float]) -> None:
        """Put back what `loss_scaler_state` gave."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        for key, value in state.items():
            setattr(scaler, key, type(getattr(scaler, key))(value))

    def _ready_state(self) -> None:
        """Give the optimizer its first state now, not at its first step, so that it can be read and set at any time."""
        stepped = list(self._stepped())
        for group, param, _ in stepped:
            self.optimizer.ready(group, param)
        if hasattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        if isinstance(self.optimizer, optim.Muon) and not self._plain:
            self._say_where_matrices_lie(self.optimizer, stepped)

    def _stepped(self) -> Iterator[tuple[dict[str, Any], Tensor, list[nn.Parameter]]]:
        """What the optimizer steps: group, tensor, and the parameters in it; under ZeRO, this rank's flat parts."""
        wrapper, groups = self.engine.optimizer, self.optimizer.param_groups
        if self.config.train.zero_stage == 0:
            yield from ((group, param, [param]) for group in groups for param in group["params"])
        elif self.config.train.zero_stage == 3:
            flat = wrapper.fp32_partitioned_groups_flat
            of_parts = [groups[wrapper.sub_group_to_group_id[i]] for i in range(len(flat))]
            yield from zip(of_parts, flat, wrapper.fp16_groups, strict=True)
        elif hasattr(wrapper, "fp32_groups_flat_partition"):
            yield from zip(groups, wrapper.fp32_groups_flat_partition, wrapper.bf16_groups, strict=True)
        else:
            yield from zip(groups, wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups, strict=True)

    def _say_where_matrices_lie(
        self, muon: optim.Muon, stepped: list[tuple[dict[str, Any], Tensor, list[nn.Parameter]]]
    ) -> None:
        """Tell Muon which matrices are in each flat part, and what of them this rank has."""
        for _, flat, params in stepped:
            if "momentum" in muon.state[flat]:
                muon.pieces[flat] = [self._piece(self.names[id(param)], param, flat) for param in params]
        muon.shared = self.ranks.ranks > 1

    def _piece(self, name: str, param: Any, flat: Tensor) -> optim.Piece:
        """Where a matrix lies in a flat part of the weights, and what of it this rank has there."""
        rows, columns = self._shapes[name]
        parts = getattr(param, "parts", 1)
        if hasattr(param, "ds_id"):
            start, owned = self._own_part_of_stage_3(name, param)
            mine = owned[WEIGHT]
        elif param._hp_mapping is None:
            return optim.Piece((rows, columns), parts, 0, 0, 0)
        else:
            start, mine = param._hp_mapping.lp_fragment_address.start, param._hp_mapping.hp_fragment
        at = int(mine.storage_offset() - flat.storage_offset())
        return optim.Piece((rows, columns), parts, at, start, mine.numel())

    def _watch_gradients(self) -> None:
        """Let every gradient leave its mark: what is not finite stays so in a sum, which costs less than a norm."""
        mark = _squared_norm if self.config.log.noise_scale else _sum
        in_chunks = [module for module in self.module.modules() if isinstance(module, InChunks)]

        def watch(index: int) -> Any:
            def look(grad: Tensor) -> None:
                if not any(module.in_part for module in in_chunks):  # else the whole gradient comes later
                    self.marks[index] += mark(grad)

            return look

        for index, param in enumerate(self.module.parameters()):
            param.register_hook(watch(index))


def share_rows(model: Model, ranks: Ranks, parts: int) -> None:
    """Let every `parts` consecutive ranks share their rows: each then computes its own part of the patches. Collective.

    Called before deepspeed.initialize; 1 changes nothing. The groups are ours and unknown to DeepSpeed: ZeRO goes on
    averaging over all ranks. (Given them as mesh_param, it averages over some, and says nothing.)
    Raises ValueError for a model that cannot be cut so; the configuration has refused it before.
    """
    if parts == 1:
        return
    ours = None
    for first in range(0, ranks.ranks, parts):  # every rank makes all groups, in one order
        members = list(range(first, first + parts))
        group = dist.new_group(members)
        ours = group if ranks.rank in members else ours
    ulysses = _import("deepspeed.sequence.layer").DistributedAttention(by_position(attend), ours, 2, 1)
    # Kept out of torch.compile's graphs: DeepSpeed's own source says that tracing an exchange can lose its gradient.
    model.share(Part(ranks.rank % parts, parts), torch.compiler.disable(by_head(ulysses)))


def _kept_once(state: Mapping[str, Tensor]) -> list[str]:
    """What an optimizer's state holds that is not of each element."""
    return [key for key, value in state.items() if value.ndim == 0]


def _sum(grad: Tensor) -> Tensor:
    return grad.sum(dtype=torch.float32)


def _squared_norm(grad: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grad, dtype=torch.float32).square()


def _single_process_defaults() -> None:
    if "RANK" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        if "LOCAL_SIZE" in os.environ:  # DeepSpeed's launcher has another name for it
            os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
        return
    if "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(_slurm_tasks_here()))
        os.environ.setdefault("MASTER_PORT", "29500")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _slurm_tasks_here() -> int:
    """Tasks of this Slurm step on this node. Slurm says `2(x3),1` of four nodes; what only --ntasks-per-node asks for
    is not always there, nor what a step runs."""
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", "1")).split(","):
        tasks, _, nodes = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(nodes or 1)
    return counts[min(int(os.environ.get("SLURM_NODEID", "0")), len(counts) - 1)]


def import_deepspeed() -> Any:
    """DeepSpeed without what it costs to start: it would import mlflow (2 s) and torch's compiler (2 s), and build a
    CPU kernel, which nobody uses."""
    if "deepspeed" in sys.modules:
        return sys.modules["deepspeed"]
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    missing = "mlflow" not in sys.modules
    if missing:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        deepspeed = importlib.import_module("deepspeed")
    finally:
        if missing:
            del sys.modules["mlflow"]
    _import("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO asks whether an optimizer is DeepSpeed's own Muon, whose module has torch.compile import all of inductor.
    compiler = _import("deepspeed.runtime.compiler")
    compiling, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        _import("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compiling
    _import("deepspeed.utils").logger.setLevel(logging.WARNING)
    _import("deepspeed.runtime.zero.utils").ZERO_SUPPORTED_OPTIMIZERS.extend(optim.CLASSES)  # or it warns
    # DeepSpeed calls torch.distributed by names that this torch renames; nobody here can act on it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Seven reports of memory for each start, whatever the log level.
    _import("deepspeed.runtime.bf16_optimizer").see_memory_usage = lambda *args, **kwargs: None
    return deepspeed


def import_all() -> None:
    """Import what the first Engine would, for processes that are forked from this one."""
    import_deepspeed()
    for name in ("stage_1_and_2", "stage3"):
        _import(f"deepspeed.runtime.zero.{name}")


def _import(name: str) -> Any:
    return importlib.import_module(name)
