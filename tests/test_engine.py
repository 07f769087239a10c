"""The engine's pure parts: the whole DeepSpeed dictionary, and which parameter is in which group.

pytest tests/test_engine.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from mbtrain.engine import _single_process_defaults, deepspeed_config, parameter_groups
from mbtrain.errors import ConfigError
from mbtrain.model import build
from tests import launch, tiny

UNDECAYED = {"embedding", "tied", "position", "pad", "gain", "bias"}


def golden(stage: int, precision: str) -> dict[str, Any]:
    """Every key by name: DeepSpeed takes unknown keys in silence, and leaves out none of its own defaults."""
    autocast = precision == "autocast" or (precision, stage) == ("bf16", 0)
    made: dict[str, Any] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "contiguous_gradients": True},
        "bf16": {"enabled": precision == "bf16" and stage > 0},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 16, "loss_scale_window": 1000},
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
    }
    if precision == "bf16" and stage > 0:
        made["data_types"] = {"grad_accum_dtype": "fp32"}
    return made


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_whole_deepspeed_dictionary(stage: int, precision: str) -> None:
    train = {"zero_stage": stage, "precision": precision, "gradient_clipping": 0.5}
    if (stage, precision) == (0, "fp16"):
        with pytest.raises(ConfigError, match=r"train\.zero_stage: got 0, expected 1, 2 or 3"):
            tiny.make(train=train)
        return
    settings = tiny.make(train={**train, "global_batch_size": 8, "micro_batch_size": 2})
    made = deepspeed_config(settings, ranks=2)
    assert made == golden(stage, precision)
    assert sum(made[kind]["enabled"] for kind in ("bf16", "fp16", "torch_autocast")) == (precision != "fp32")
    assert deepspeed_config(settings, ranks=2) == made, "pure"


def test_no_clipping_is_written_out() -> None:
    """DeepSpeed's own default is 1.0, so 0 must stand there."""
    assert deepspeed_config(tiny.make(train={"gradient_clipping": 0}), 1)["gradient_clipping"] == 0


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size"):
        deepspeed_config(tiny.make(), 3)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("preset", ["paper", "modern"])
@pytest.mark.parametrize("decay_all", [False, True])
def test_every_parameter_is_in_the_one_group_of_its_role(stages: int, preset: str, decay_all: bool) -> None:
    optim = {"weight_decay": 0.3, "embedding_lr": 8.0, "decay_all": decay_all, "lr": 0.02}
    settings = tiny.make(stages, preset, optim=optim, model={"preset": preset, "block": {"bias": True}})
    model = build(settings)
    groups = parameter_groups(model, settings)
    where = [(id(param), group) for group in groups for param in group["params"]]
    assert len(where) == len(list(model.parameters()))
    by_id = dict(where)
    assert len(by_id) == len(where), "in one group only"
    roles = set()
    for param in model.parameters():
        role = param.role
        roles.add(role)
        group = by_id[id(param)]
        assert group["lr"] == 0.02
        assert group["lr_scale"] == (8.0 if role in ("embedding", "tied", "position", "pad") else 1.0)
        assert group["weight_decay"] == (0.3 if decay_all or role not in UNDECAYED else 0.0)
    assert {"tied" if preset == "paper" else "embedding", "pad", "hidden", "bias", "gain"} <= roles, "all of these"
    assert ("position" in roles) == (preset == "paper" or stages > 1)
    assert all(group["params"] for group in groups)


def test_matrices_are_decayed() -> None:
    """By shape as well as by role: what blocks multiply with is decayed."""
    model = build(tiny.make(2))
    decayed = {
        id(p) for group in parameter_groups(model, tiny.make(2)) if group["weight_decay"] for p in group["params"]
    }
    for name, param in model.named_parameters():
        assert (id(param) in decayed) == (param.ndim == 2 and "embed" not in name and "positions" not in name), name


def test_a_parameter_without_a_role_is_an_error() -> None:
    model = build(tiny.make())
    model.register_parameter("stray", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="stray has no role"):
        parameter_groups(model, tiny.make())


def test_the_order_of_groups_is_fixed() -> None:
    """Whatever the order of parameters: ZeRO's flat partitions follow from it."""
    keys = [
        [(group["lr_scale"], group["weight_decay"]) for group in parameter_groups(build(settings), settings)]
        for settings in (tiny.make(1, optim={"embedding_lr": 2}), tiny.make(3, optim={"embedding_lr": 2}))
    ]
    assert keys[0] == keys[1] == sorted(keys[0])


def test_start_makes_a_process_group_of_one_and_does_not_import_mlflow() -> None:
    """mlflow costs 2 s and belongs to the shipper; yet it can be imported afterwards."""
    program = (
        "import sys, mbtrain.engine as e\n"
        "assert 'deepspeed' not in sys.modules\n"
        "ranks = e.start()\n"
        "assert (ranks.rank, ranks.ranks, ranks.local_rank, ranks.local_ranks) == (0, 1, 0, 1)\n"
        "assert 'deepspeed' in sys.modules and 'mlflow' not in sys.modules, 'mlflow'\n"
        "assert e.total([1.5, 2.0], ranks) == [1.5, 2.0]\n"
        "assert e.gathered('x') == ['x'] and e.from_rank_0({'a': 1}) == {'a': 1}\n"
        "e.stop(); e.stop()\n"
        "import importlib.util; assert importlib.util.find_spec('mlflow') is not None\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=launch.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, ("3", "4", "1", "2")),  # deepspeed
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "9"},
            ("3", "4", "1", "2"),
        ),
        ({"SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, ("5", "9", "1", "4")),
        ({"SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1"}, ("5", "9", "1", "1")),
        ({"SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,5", "SLURM_TASKS_PER_NODE": "1"}, ("5", "9", "1", "5")),
        ({"SLURM_TASKS_PER_NODE": "8", "SLURM_NTASKS_PER_NODE": "2"}, ("5", "9", "1", "8")),
        ({}, ("5", "9", "1", "1")),
    ],
)
def test_a_launchers_variables_say_where_a_process_stands(
    given: dict[str, str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "9", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1"}
    monkeypatch.setattr("os.environ", {**given} if "RANK" in given else {**slurm, **given})
    _single_process_defaults()
    assert tuple(os.environ[name] for name in names) == expected
