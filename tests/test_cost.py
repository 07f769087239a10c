"""What `mbtrain flops` says: figures that agree with each other, a table, and one line for a mistake.

pytest tests/test_cost.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mbtrain import cli, cost, gpus, hardware
from mbtrain.config import Config
from mbtrain.doctor import memory
from mbtrain.errors import ConfigError
from mbtrain.model.flops import count, kept_values
from tests import launch, tiny


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(list(args))
    assert isinstance(end.value.code, int)
    return end.value.code


def settings_of(**train: object) -> Config:
    stages = [{**tiny.STAGES[2][0], "window": 3}, tiny.STAGES[2][1]]
    limits = {"steps": 10, "global_batch_size": 4, "zero_stage": 1, "precision": "bf16", **train}
    return tiny.make(2, model={"stages": stages, "conv_encoder": [3], "cross_patch": 2}, train=limits)


def test_the_parts_add_up() -> None:
    settings = settings_of()
    found, counted = cost.figures(settings), count(settings)
    stages, readout = found["stages"], found["readout"]
    assert sum(stage["parameters"] for stage in stages) + readout["parameters"] == found["parameters"]
    forward = sum(stage[part] for stage in stages for part in cost.PARTS) + readout["forward"]
    assert forward == pytest.approx(found["forward_flops_per_byte"]) == pytest.approx(counted.forward_per_byte)
    assert sum(stage["share"] for stage in stages) + readout["share"] == pytest.approx(1)
    assert found["kv_cache_bytes"] == 2 * kept_values(settings)
    assert found["activation_bytes"]["cuda"] == sum(memory.activations(settings, 4, "cuda"))
    json.dumps(found)


def test_hours_are_operations_by_what_a_gpu_reaches() -> None:
    """Of the steps that the limits allow, whole rows, in the precision that is trained in."""
    for limit, steps in (({"steps": 10}, 10), ({"steps": None, "bytes": 4 * 32 * 7 - 1}, 7)):
        settings = settings_of(**limit)
        budget = cost.figures(settings, gpu_names=["H100"], mfu=0.25)["budget"]
        flops = count(settings).training_per_byte * steps * 4 * 32
        assert budget["steps"] == steps
        assert budget["flops"] == pytest.approx(flops)
        assert budget["gpu_hours"] == {"H100": pytest.approx(flops / (989e12 * 0.25) / 3600)}
    slower = cost.figures(settings_of(precision="fp32"), gpu_names=["H100"])["budget"]["gpu_hours"]["H100"]
    faster = cost.figures(settings_of(), gpu_names=["H100"])["budget"]["gpu_hours"]["H100"]
    assert slower == pytest.approx(faster * 989 / 494)
    assert cost.figures(settings_of(steps=None, minutes=1))["budget"] is None


def test_the_table_says_what_the_figures_are() -> None:
    text = "\n".join(cost.lines(cost.figures(settings_of(), gpu_names=["L4"])))
    for words in ("stage 0: every 4 B, 2 x 32", "conv", "readout", "keys, values", "micro-batch of 4 rows", "of L4"):
        assert words in text
    assert "assumed" not in text
    assert max(map(len, text.splitlines())) <= 120
    one = "\n".join(cost.lines(cost.figures(tiny.make(1, train={"steps": None, "minutes": 1.0}))))
    assert "patch size" not in one
    assert "project" not in one
    assert "operations depend on the machine" in one


def test_words_are_assumed_or_measured(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By whether the data set is at hand; and what a byte costs follows."""
    said = {}
    for name, path in (("assumed", "gone"), ("measured", str(shards))):
        tree = tiny.tree(2, seq_len=64, data={"path": path}, model={"patching": "space"})
        file = launch.config_file(tmp_path, tree)
        assert run("flops", str(file), "--json") == 0
        out = capsys.readouterr().out
        assert name in out
        said[name] = json.loads(out.splitlines()[-1])
    assert said["assumed"]["unit_bytes"] == 4
    assert 1 < said["measured"]["unit_bytes"] < 4
    assert said["measured"]["forward_flops_per_byte"] > said["assumed"]["forward_flops_per_byte"]


def test_gpus_are_known_by_the_names_of_users_and_of_drivers() -> None:
    assert gpus.named("--gpu", "h100") == "H100"
    assert gpus.named("--gpu", "h100-pcie") == "H100 PCIe"
    assert gpus.peak("NVIDIA H100 PCIe", "bf16") == 756e12
    assert gpus.peak("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
    assert gpus.peak("NVIDIA L40S", "bf16") == 362e12
    assert gpus.peak("something else", "bf16") is None
    assert hardware.gpus is gpus
    with pytest.raises(ConfigError, match="--gpu: got 'h1000', expected one of"):
        gpus.named("--gpu", "h1000")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--gpu=abacus", "--gpu: got 'abacus', expected one of H100 PCIe"),
        ("--gpu=h100,", "--gpu: got '', expected one of"),
        ("--mfu=1.5", "--mfu: expected at most 1, the whole peak, got 1.5"),
        ("--mfu=0", "--mfu: expected a number of at least 0.001, got '0'"),
        ("--gpus=h100", "--gpus: no such option (did you mean gpu?)"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, words: str) -> None:
    assert run("flops", str(launch.config_file(tmp_path, tiny.tree())), option) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
